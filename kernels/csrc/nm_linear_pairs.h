// What nm_linear_few.h repeats where an instruction set multiplies pairs of bfloat16: a lane is two kept weights of
// a row.
#ifndef MASKPRO_NM_LINEAR_PAIRS_H_
#define MASKPRO_NM_LINEAR_PAIRS_H_

#include <stdint.h>
#include <string.h>

#include "element_types.h"
#include "interleaved.h"
#include "prefetch.h"

namespace maskpro {

// Turns the first columns of slots' groups into what multiply_block_of_pairs() reads with kLines: of each pair of slots
// the first column of the line of Isa::kLine in which both groups lie, and the groups' within it, 16 bits each. Both do
// where n is even or a line holds several groups of n: an even number of slots.
template <class Isa>
inline void find_lines(int64_t slots, int32_t* bases) {
  for (int64_t slot = 0; slot < slots; slot += 2) {
    const int32_t line = bases[slot] / Isa::kLine * Isa::kLine;
    bases[slot + 1] = (bases[slot + 1] - line) << 16 | (bases[slot] - line);
    bases[slot] = line;
  }
}

// multiply_block() of pairs of slots: of one group of four, or of all columns; with kLines of those find_lines() knows.
//
//   bases  the first column of each slot's group, or what find_lines() makes of them
//   x      [kTokens, in_features], rows x_stride apart; with kLines aligned to whole lines, which are read
template <class Isa, class Weight, int kBits, int kTokens, int kParts, bool kLines>
[[gnu::noinline]] void multiply_block_of_pairs(const uint8_t* chunk, int64_t chunks, const int32_t* bases,
                                               const BF16* x, int64_t x_stride, float* sums,
                                               int64_t ahead) {
  constexpr int kSlots = chunk_slots(kBits);
  using Vec = typename Isa::Vec;
  Vec acc[kParts][kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    acc[0][t] = Isa::load(sums + t * kBlockRows);
#pragma GCC unroll 4
    for (int k = 1; k < kParts; ++k) acc[k][t] = Isa::zero();
  }
  for (int64_t c = 0; c < chunks; ++c) {
    typename Isa::Indices indices[1] = {};
    if constexpr (kBits > 0) {
      Isa::load_indices(chunk, indices);
      __builtin_prefetch(chunk + ahead);
    }
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
#pragma GCC unroll 16
    for (int pair = 0; pair < kSlots / 2; ++pair) {
      const auto w = Isa::load_pairs(values + 2 * pair * kBlockRows);
      prefetch(values, 2 * pair, ahead);
      const BF16* first = x + bases[2 * pair];
      auto places = Isa::template places<kBits>(indices[0], pair);
      if constexpr (kLines) places = Isa::template within_line<kBits>(places, bases[2 * pair + 1]);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const auto columns = Isa::template pick_pairs<kBits, kLines>(first + t * x_stride, places);
        acc[pair % kParts][t] = Isa::dot(w, columns, acc[pair % kParts][t]);
      }
    }
    chunk += chunk_bytes(kBits, sizeof(Weight));
    bases += kSlots;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int k = 1; k < kParts; ++k) acc[0][t] = Isa::add(acc[0][t], acc[k][t]);
    Isa::store(sums + t * kBlockRows, acc[0][t]);
  }
}

// Chunks of int8 as chunks of bfloat16, exactly.
template <class Isa, int kBits>
[[gnu::noinline]] void widen(const uint8_t* from, int64_t chunks, uint8_t* to) {
  for (int64_t c = 0; c < chunks; ++c) {
    memcpy(to, from, chunk_index_bytes(kBits));
    const int8_t* values = reinterpret_cast<const int8_t*>(from + chunk_index_bytes(kBits));
    uint8_t* pairs = to + chunk_index_bytes(kBits);
#pragma GCC unroll 16
    for (int slot = 0; slot < chunk_slots(kBits); slot += 2) {
      const auto both = Isa::load_pairs(values + slot * kBlockRows);
      memcpy(pairs + slot * kBlockRows * sizeof(BF16), &both, sizeof both);
    }
    from += chunk_bytes(kBits, sizeof(int8_t));
    to += chunk_bytes(kBits, sizeof(BF16));
  }
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_PAIRS_H_
