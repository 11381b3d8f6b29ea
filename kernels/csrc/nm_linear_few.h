// nm_linear for few tokens, bound by the bytes of the weight: a lane is an output, a block of the weight one stream.
//
//   for every block of sixteen rows, or of pairs and many tokens for some of them, that this thread takes (shares.h)
//     for every piece of it, for every tile of tokens, for every block: multiply_block
//     scale, add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_FEW_H_
#define MASKPRO_NM_LINEAR_FEW_H_

#include <omp.h>
#include <string.h>

#include <algorithm>

#include "elements.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "nm_linear_pairs.h"
#include "prefetch.h"
#include "scratch.h"
#include "shares.h"

namespace maskpro {

// Chunks that several tiles of tokens read in turn: those of one block stay in L1 with a tile's activations (2:4
// bfloat16: 7 KiB and, of 16 tokens, 12).
constexpr int64_t kPieceChunks = 12;

// In how many parts each of a few sums is added up: one product would wait for another, four cycles or, of a pair, six,
// while the memory of a Zen 5 core sends a slot of int8 in less. Pairs of 16 bits gain only for one token.
template <class Isa, class Weight>
constexpr int parts(int tokens) {
  if (!Isa::kUnrollSlots || (Isa::kPairs && tokens > 1 && sizeof(Weight) > 1)) return 1;
  const int sums = Isa::kPairs ? tokens : tokens * Isa::kVectors;
  return sums <= 2 ? 4 : sums <= 4 ? 2 : 1;
}

// sums[t][row] += rows . x[t] over some chunks of a block. All tokens use a weight once it is in registers; every
// group of activations is loaded once for sixteen rows.
//
//   bases  [chunks * slots], the first column of each slot's group
//   x      [kTokens, in_features], rows x_stride apart
//   sums   [kTokens, 16]
//   ahead  bytes of prefetch
template <class Isa, class Weight, int kBits, int kTokens, int kParts>
[[gnu::noinline]] void multiply_block(const uint8_t* chunk, int64_t chunks, const int32_t* bases, const float* x,
                                      int64_t x_stride, float* sums, int64_t ahead) {
  constexpr int kVectors = Isa::kVectors;
  constexpr int kSlots = chunk_slots(kBits);
  using Vec = typename Isa::Vec;
  Vec acc[kParts][kTokens][kVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[0][t][v] = Isa::load(sums + t * kBlockRows + v * Isa::kLanes);
#pragma GCC unroll 4
      for (int k = 1; k < kParts; ++k) acc[k][t][v] = Isa::zero();
    }
  }
  for (int64_t c = 0; c < chunks; ++c) {
    typename Isa::Indices indices[kVectors] = {};
    if constexpr (kBits > 0) {
      Isa::load_indices(chunk, indices);
      __builtin_prefetch(chunk + ahead);
    }
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
    for_slots<Isa, kSlots>([&](int j) {
      Vec w[kVectors];
      Isa::load_slot(values, j, w);
      prefetch(values, j, ahead);
      const float* group = x + bases[j];
      Vec(&its)[kTokens][kVectors] = acc[j % kParts];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          its[t][v] = Isa::fma(w[v], Isa::template pick<kBits>(group + t * x_stride, indices[v], j), its[t][v]);
        }
      }
    });
    chunk += chunk_bytes(kBits, sizeof(Weight));
    bases += kSlots;
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int k = 1; k < kParts; ++k) acc[0][t][v] = Isa::add(acc[0][t][v], acc[k][t][v]);
      Isa::store(sums + t * kBlockRows + v * Isa::kLanes, acc[0][t][v]);
    }
  }
}

// kLines: as multiply_block_of_pairs().
template <class Isa, class Weight, class Act, int kBits, bool kLines = Isa::kPairs && (kBits > 2)>
class FewTokens {
 public:
  explicit FewTokens(const NMLinear& call)
      : call_(call), sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype) {}

  int32_t operator()() {
    const int64_t slots = (sizes_.chunks * kSlots + 15) / 16 * 16;  // what comes after begins with a cache line
    const int64_t x_floats = kConvert ? call_.tokens * x_stride() * sizeof(Element) / sizeof(float) : 0;
    const int64_t together = blocks_together();
    const int64_t sums_floats = together * call_.tokens * kBlockRows;
    const int64_t thread_floats = sums_floats + (widens() ? together * kWideBytes / sizeof(float) : 0);
    float* scratch = thread_scratch(slots + x_floats + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 1);
    int32_t* bases = reinterpret_cast<int32_t*>(scratch);
    write_bases<Isa>(call_, slots, bases);
    if constexpr (kLines) find_lines<Isa>(slots, bases);
    const Element* x = convert_x(scratch + slots);
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      float* sums = scratch + slots + x_floats + thread * thread_floats;
      uint8_t* wide = reinterpret_cast<uint8_t*>(sums + sums_floats);
      for (int64_t block, end; shares.take(thread, together, &block, &end);) {
        memset(sums, 0, static_cast<size_t>((end - block) * call_.tokens * kBlockRows) * sizeof(float));
        multiply(block, end, bases, x, sums, wide);
        store_outputs<Isa, Act>(call_, block, end, 0, call_.tokens, sums, call_.tokens * kBlockRows);
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int kSlots = chunk_slots(kBits);
  static constexpr int64_t kChunkBytes = chunk_bytes(kBits, sizeof(Weight));
  // What activations are multiplied as.
  using Element = std::conditional_t<Isa::kPairs, BF16, float>;
  static constexpr bool kConvert = Isa::kPairs || !std::is_same<Act, float>::value;

  // Elements between tokens; converted ones are whole vectors.
  int64_t x_stride() const {
    if constexpr (Isa::kPairs) {  // a cache line more, or all tokens would fall into the same L1 sets
      return (call_.in_features + Isa::kLine - 1) / Isa::kLine * Isa::kLine + Isa::kLine;
    }
    return kConvert ? (call_.in_features + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes : call_.in_features;
  }

  static constexpr int64_t kWideBytes = kPieceChunks * chunk_bytes(kBits, sizeof(BF16));

  bool many_tiles() const { return call_.tokens > 2 * Isa::kTileTokens; }

  // Of how many blocks a thread takes the rows at once; all threads take as many.
  int64_t blocks_together() const {
    return Isa::kPairs && many_tiles() ? Shares::together(call_.threads, sizes_.blocks) : 1;
  }

  // Whether integers become pairs of bfloat16 once for all tiles, rather than for each.
  bool widens() const { return kWidens && many_tiles(); }
  static constexpr bool kWidens = Isa::kPairs && std::is_same<Weight, int8_t>::value;

  const Element* convert_x(float* to) const {
    if constexpr (!kConvert) {
      return static_cast<const float*>(call_.x);
    } else {  // faster than threads meet at a barrier
      Element* elements = reinterpret_cast<Element*>(to);
      for (int64_t t = 0; t < call_.tokens; ++t) {
        const Act* from = static_cast<const Act*>(call_.x) + t * call_.in_features;
        if constexpr (Isa::kPairs) {
          // Weights of 0 fill a row up; where all are kept, they meet what lies past x, which must not be a NaN.
          Element* after = std::copy_n(from, call_.in_features, elements + t * x_stride());
          std::fill(after, elements + (t + 1) * x_stride(), Element{});
        } else {
          convert<Isa>(from, call_.in_features, elements + t * x_stride());
        }
      }
      return elements;
    }
  }

  // Sums of the blocks [block, end), [block][token][row]; `wide` holds a piece of each, if integers are widened.
  void multiply(int64_t block, int64_t end, const int32_t* bases, const Element* x, float* sums, uint8_t* wide) const {
    const int64_t most = call_.tokens > Isa::kTileTokens ? kPieceChunks : sizes_.chunks;
    for (int64_t chunk = 0; chunk < sizes_.chunks; chunk += most) {
      const int64_t rest = sizes_.chunks - chunk;
      const int64_t chunks = rest < most ? rest : most;
      const uint8_t* from = call_.weight + block * sizes_.block_bytes + chunk * kChunkBytes;
      if constexpr (kWidens) {
        if (widens()) {
          for (int64_t b = 0; b < end - block; ++b) {
            widen<Isa, kBits>(from + b * sizes_.block_bytes, chunks, wide + b * kWideBytes);
          }
          multiply_piece<BF16>(end - block, wide, kWideBytes, chunks, bases + chunk * kSlots, x, sums);
          continue;
        }
      }
      multiply_piece<Weight>(end - block, from, sizes_.block_bytes, chunks, bases + chunk * kSlots, x, sums);
    }
  }

  // Adds what a piece of some blocks contributes, `block_bytes` apart.
  template <class Stored>
  void multiply_piece(int64_t blocks, const uint8_t* from, int64_t block_bytes, int64_t chunks, const int32_t* bases,
                      const Element* x, float* sums) const {
    const int64_t ahead = many_tiles() ? kNearBytes : kFarBytes;
    for (int64_t t = 0; t < call_.tokens; t += Isa::kTileTokens) {
      for (int64_t b = 0; b < blocks; ++b) {
        multiply_some<Stored, Isa::kTileTokens>(call_.tokens - t, from + b * block_bytes, chunks, bases,
                                                x + t * x_stride(), sums + (b * call_.tokens + t) * kBlockRows, ahead);
      }
    }
  }

  // Finds the tile of min(tokens, kTokens) tokens.
  template <class Stored, int kTokens>
  void multiply_some(int64_t tokens, const uint8_t* chunk, int64_t chunks, const int32_t* bases, const Element* x,
                     float* sums, int64_t ahead) const {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return multiply_some<Stored, kTokens - 1>(tokens, chunk, chunks, bases, x, sums, ahead);
    }
    // Only where these are all tokens of a call: a token's sums do not depend on its place among others.
    constexpr int kParts = parts<Isa, Stored>(kTokens);
    if constexpr (kParts > 1) {
      if (call_.tokens == kTokens) return multiply_tile<Stored, kTokens, kParts>(chunk, chunks, bases, x, sums, ahead);
    }
    multiply_tile<Stored, kTokens, 1>(chunk, chunks, bases, x, sums, ahead);
  }

  template <class Stored, int kTokens, int kParts>
  void multiply_tile(const uint8_t* chunk, int64_t chunks, const int32_t* bases, const Element* x, float* sums,
                     int64_t ahead) const {
    if constexpr (Isa::kPairs) {
      multiply_block_of_pairs<Isa, Stored, kBits, kTokens, kParts, kLines>(chunk, chunks, bases, x, x_stride(), sums,
                                                                           ahead);
    } else {
      multiply_block<Isa, Stored, kBits, kTokens, kParts>(chunk, chunks, bases, x, x_stride(), sums, ahead);
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
};

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_FEW_H_
