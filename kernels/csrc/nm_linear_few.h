// nm_linear for few tokens, bound by the bytes of the weight: a lane is an output, a block of the weight one stream.
//
//   for every block of sixteen rows that this thread takes (shares.h)
//     for every piece of it that stays in L1, for every tile of tokens: multiply_block
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

// Chunks that several tiles of tokens read in turn: with their activations, they stay in L1 (2:4 bfloat16: 7 KiB).
constexpr int64_t kPieceChunks = 12;

// sums[t][row] += rows . x[t] over some chunks of a block. All tokens use a weight once it is in registers; every
// group of activations is loaded once for sixteen rows.
//
//   bases  [chunks * slots], the first column of each slot's group
//   x      [kTokens, in_features], rows x_stride apart
//   sums   [kTokens, 16]
//   ahead  bytes of prefetch
template <class Isa, class Weight, int kBits, int kTokens>
[[gnu::noinline]] void multiply_block(const uint8_t* chunk, int64_t chunks, const int32_t* bases, const float* x,
                                      int64_t x_stride, float* sums, int64_t ahead) {
  constexpr int kVectors = Isa::kVectors;
  constexpr int kSlots = chunk_slots(kBits);
  using Vec = typename Isa::Vec;
  Vec acc[kTokens][kVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[t][v] = Isa::load(sums + t * kBlockRows + v * Isa::kLanes);
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
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          acc[t][v] = Isa::fma(w[v], Isa::template pick<kBits>(group + t * x_stride, indices[v], j), acc[t][v]);
        }
      }
    });
    chunk += chunk_bytes(kBits, sizeof(Weight));
    bases += kSlots;
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Isa::store(sums + t * kBlockRows + v * Isa::kLanes, acc[t][v]);
  }
}

template <class Isa, class Weight, class Act, int kBits>
class FewTokens {
 public:
  explicit FewTokens(const NMLinear& call)
      : call_(call), sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype) {}

  int32_t operator()() {
    const int64_t slots = sizes_.chunks * kSlots;
    const int64_t x_floats = kConvert ? call_.tokens * x_stride() * sizeof(Element) / sizeof(float) : 0;
    const int64_t sums_floats = call_.tokens * kBlockRows;
    float* scratch = thread_scratch(slots + x_floats + call_.threads * sums_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 1);
    int32_t* bases = reinterpret_cast<int32_t*>(scratch);
    write_bases<Isa>(call_, slots, bases);
    const Element* x = convert_x(scratch + slots);
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      float* sums = scratch + slots + x_floats + thread * sums_floats;
      for (int64_t block, end; shares.take(thread, 1, &block, &end);) {
        memset(sums, 0, static_cast<size_t>(sums_floats) * sizeof(float));
        multiply(call_.weight + block * sizes_.block_bytes, bases, x, sums);
        const BlockOutputs<Isa, Act> outputs(call_, block);
        for (int64_t t = 0; t < call_.tokens; ++t) outputs.store(t, sums + t * kBlockRows);
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
      return (call_.in_features + 31) / 32 * 32 + Isa::kReadAhead;
    }
    return kConvert ? (call_.in_features + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes : call_.in_features;
  }

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

  void multiply(const uint8_t* block, const int32_t* bases, const Element* x, float* sums) const {
    const int64_t most = call_.tokens > Isa::kTileTokens ? kPieceChunks : sizes_.chunks;
    const int64_t ahead = call_.tokens > 2 * Isa::kTileTokens ? kNearBytes : kFarBytes;
    for (int64_t chunk = 0; chunk < sizes_.chunks; chunk += most) {
      const int64_t rest = sizes_.chunks - chunk;
      const int64_t chunks = rest < most ? rest : most;
      for (int64_t t = 0; t < call_.tokens; t += Isa::kTileTokens) {
        multiply_some<Isa::kTileTokens>(call_.tokens - t, block + chunk * kChunkBytes, chunks, bases + chunk * kSlots,
                                        x + t * x_stride(), sums + t * kBlockRows, ahead);
      }
    }
  }

  // Finds the tile of min(tokens, kTokens) tokens.
  template <int kTokens>
  void multiply_some(int64_t tokens, const uint8_t* chunk, int64_t chunks, const int32_t* bases, const Element* x,
                     float* sums, int64_t ahead) const {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return multiply_some<kTokens - 1>(tokens, chunk, chunks, bases, x, sums, ahead);
    }
    if constexpr (Isa::kPairs) {
      multiply_block_of_pairs<Isa, Weight, kBits, kTokens>(chunk, chunks, bases, x, x_stride(), sums, ahead);
    } else {
      multiply_block<Isa, Weight, kBits, kTokens>(chunk, chunks, bases, x, x_stride(), sums, ahead);
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
};

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_FEW_H_
