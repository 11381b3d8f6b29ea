// nm_linear for many tokens and patterns that keep much, where an instruction set multiplies pairs of bfloat16: the
// weight is expanded to dense pairs, zeros included, whose activations need no permutation.
//
//   for every kExpandedPassTokens tokens              bounds the working memory
//     copy the activations, rows filled up with zeros, shared by all threads
//     for every kTogether blocks of rows that this thread takes (shares.h)
//       for every piece of their columns: expand it (decode_tiles.h; dense bfloat16 is multiplied where it lies), then
//         for every tile of tokens: multiply_pairs
//       scale, add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_EXPANDED_H_
#define MASKPRO_NM_LINEAR_EXPANDED_H_

#include <omp.h>
#include <string.h>

#include <algorithm>

#include "decode_tiles.h"
#include "elements.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "scratch.h"
#include "shares.h"
#include "vector_avx512_bf16.h"

namespace maskpro {
namespace {

// Those of 4096 columns fill 4 MiB, which comes from the L3 once for kTogether blocks of rows.
constexpr int64_t kExpandedPassTokens = 512;

// 3 vectors of rows and 8 tokens are 24 of 32 registers of sums, and take 11 loads for 24 products.
constexpr int64_t kTogether = 3;
constexpr int64_t kTokensTogether = 8;

// Expanded columns of all blocks: 96 KiB. With fewer, sums are loaded and stored more often.
constexpr int64_t kExpandedSteps = 32;

// sums[b][t] += x[t] W[b]^T over some pairs of columns.
//
//   w     [pairs][16 rows][2] of the first block; those of the next one are block_bytes on
//   x     [kTokens, 2 * pairs], rows x_stride apart
//   sums  [kBlocks][kTokens, 16], blocks sums_stride floats apart
template <int kBlocks, int kTokens>
[[gnu::noinline]] void multiply_pairs(const uint8_t* w, int64_t block_bytes, int64_t pairs, const BF16* x,
                                      int64_t x_stride, float* sums, int64_t sums_stride) {
  using Isa = Avx512BF16;
  Isa::Vec acc[kBlocks][kTokens];
#pragma GCC unroll 3
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[b][t] = Isa::load(sums + b * sums_stride + t * kBlockRows);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    Isa::Pairs rows[kBlocks];
#pragma GCC unroll 3
    for (int b = 0; b < kBlocks; ++b) {
      rows[b] = Isa::load_pairs(reinterpret_cast<const BF16*>(w + b * block_bytes + pair * kTileRowBytes));
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Isa::Pairs columns = Isa::broadcast_pair(x + t * x_stride + 2 * pair);
#pragma GCC unroll 3
      for (int b = 0; b < kBlocks; ++b) acc[b][t] = Isa::dot(rows[b], columns, acc[b][t]);
    }
  }
#pragma GCC unroll 3
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) Isa::store(sums + b * sums_stride + t * kBlockRows, acc[b][t]);
  }
}

// The same for min(tokens, kTokens) tokens and min(blocks, kBlocks) blocks.
template <int kBlocks = kTogether, int kTokens = kTokensTogether>
void multiply_some(int64_t blocks, int64_t tokens, const uint8_t* w, int64_t block_bytes, int64_t pairs, const BF16* x,
                   int64_t x_stride, float* sums, int64_t sums_stride) {
  if constexpr (kBlocks > 1) {
    if (blocks < kBlocks) {
      return multiply_some<kBlocks - 1, kTokens>(blocks, tokens, w, block_bytes, pairs, x, x_stride, sums, sums_stride);
    }
  }
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return multiply_some<kBlocks, kTokens - 1>(blocks, tokens, w, block_bytes, pairs, x, x_stride, sums, sums_stride);
    }
  }
  multiply_pairs<kBlocks, kTokens>(w, block_bytes, pairs, x, x_stride, sums, sums_stride);
}

template <class Decoder>
class ExpandedTokens {
 public:
  explicit ExpandedTokens(const NMLinear& call)
      : call_(call),
        sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype),
        decode_(call),
        steps_((call.in_features + kTileSteps - 1) / kTileSteps),
        most_(std::min(call.tokens, kExpandedPassTokens)),
        x_stride_((steps_ + 1) * kTileSteps) {}  // a cache line more, or all tokens would fall into the same L1 sets

  int32_t operator()() {
    const int64_t x_floats = most_ * x_stride_ / 2;
    const int64_t sums_floats = kTogether * sums_stride();
    const int64_t thread_floats = sums_floats + kTogether * kExpandedBytes / 4;
    float* scratch = thread_scratch(x_floats + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 1);
    x_ = reinterpret_cast<BF16*>(scratch);
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      float* sums = scratch + x_floats + thread * thread_floats;
      uint8_t* expanded = reinterpret_cast<uint8_t*>(sums + sums_floats);
      for (int64_t token = 0; token < call_.tokens; token += kExpandedPassTokens) {
        const int64_t rest = call_.tokens - token;
        const int64_t tokens = std::min(rest, kExpandedPassTokens);
        copy_x(token, tokens, thread, threads);
#pragma omp barrier
        for (int64_t block, end; shares.take(thread, kTogether, &block, &end);) {
          multiply(block, end - block, tokens, expanded, sums);
          store_outputs<Avx512, BF16>(call_, block, end, token, tokens, sums, sums_stride());
        }
        if (rest > kExpandedPassTokens) {
#pragma omp barrier
          shares.deal_again(thread, threads);
        }
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int64_t kTilePairs = kTileSteps / 2;
  static constexpr int64_t kExpandedBytes = Decoder::kInPlace ? 0 : kExpandedSteps * kWeightTileBytes;  // of a block

  int64_t sums_stride() const { return most_ * kBlockRows; }

  // This thread's share of the tokens.
  void copy_x(int64_t token, int64_t tokens, int64_t thread, int64_t threads) const {
    for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t) {
      const BF16* from = static_cast<const BF16*>(call_.x) + (token + t) * call_.in_features;
      BF16* to = x_ + t * x_stride_;
      std::fill(std::copy_n(from, call_.in_features, to), to + x_stride_, BF16{});
    }
  }

  void multiply(int64_t block, int64_t blocks, int64_t tokens, uint8_t* expanded, float* sums) const {
    for (int64_t b = 0; b < blocks; ++b) {
      memset(sums + b * sums_stride(), 0, static_cast<size_t>(tokens * kBlockRows) * sizeof(float));
    }
    for (int64_t step = 0; step < steps_; step += kExpandedSteps) {
      const int64_t steps = std::min(kExpandedSteps, steps_ - step);
      const uint8_t* from = call_.weight + block * sizes_.block_bytes;
      const BF16* x = x_ + step * kTileSteps;
      if constexpr (Decoder::kInPlace) {
        const int64_t pairs = std::min(steps * kTilePairs, sizes_.block_bytes / kTileRowBytes - step * kTilePairs);
        multiply_piece(from + step * kWeightTileBytes, sizes_.block_bytes, blocks, pairs, x, tokens, sums);
      } else {
        for (int64_t b = 0; b < blocks; ++b, from += sizes_.block_bytes) {
          uint8_t* to = expanded + b * kExpandedBytes;
          for (int64_t s = 0; s < steps; ++s) decode_(from, step + s, to + s * kWeightTileBytes);
        }
        multiply_piece(expanded, kExpandedBytes, blocks, steps * kTilePairs, x, tokens, sums);
      }
    }
  }

  // Adds what some pairs of columns of blocks that are block_bytes apart contribute.
  void multiply_piece(const uint8_t* w, int64_t block_bytes, int64_t blocks, int64_t pairs, const BF16* x,
                      int64_t tokens, float* sums) const {
    for (int64_t t = 0; t < tokens; t += kTokensTogether) {
      multiply_some(blocks, tokens - t, w, block_bytes, pairs, x + t * x_stride_, x_stride_, sums + t * kBlockRows,
                    sums_stride());
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
  const Decoder decode_;
  const int64_t steps_;  // of 32 columns
  const int64_t most_;   // tokens of a pass
  const int64_t x_stride_;
  BF16* x_ = nullptr;
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_EXPANDED_H_
