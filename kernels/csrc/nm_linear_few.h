// nm_linear for few tokens, bound by the bytes of the weight: sums of four rows times a few tokens straight from the
// packed weight, each a dot product along the columns.
//
//   convert the activations to float32 blocks, shared by all threads
//   for every kGroupRows rows of this thread
//     for every four rows, for every block of columns, for every tile of tokens: multiply_tile
//     add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_FEW_H_
#define MASKPRO_NM_LINEAR_FEW_H_

#include <omp.h>
#include <string.h>

#include "elements.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "packed_rows.h"
#include "row_share.h"
#include "scratch.h"

namespace maskpro {

// Columns per block: a tile's activations stay in L1, and the sum over lanes at a block's end costs a few per cent of
// the block. A multiple of every m.
constexpr int64_t kFewColumns = 1024;

// Floats between tokens of a block: one cache line more, or all would fall into the same L1 sets.
constexpr int64_t kFewStride = kFewColumns + 16;

// Rows whose sums are stored together.
constexpr int64_t kGroupRows = 48;

template <class Isa, int kTokens, class Vec>
[[gnu::always_inline]] inline void multiply_step(const Vec (&w)[kTileRows][Isa::kStepVectors], const float* x,
                                                 Vec (&sums)[kTokens][kTileRows]) {
#pragma GCC unroll 2
  for (int i = 0; i < Isa::kStepVectors; ++i) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Vec xt = Isa::load(x + t * kFewStride + i * Isa::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) sums[t][r] = Isa::fma(w[r][i], xt, sums[t][r]);
    }
  }
}

// sums[t][r] += rows[r] . x[t] over one block of columns. Twenty-four (AVX-512) or twelve (AVX2) sums stay in
// registers: enough independent FMA chains to hide the latency of four cycles, every weight used for all tokens once
// expanded, every activation loaded once for four rows.
//
//   x     [kTokens, kFewStride], zero from the block's last column up to a whole step
//   sums  [kTokens, kGroupRows], of which the first four columns are used
template <class Isa, int kTokens, class Rows>
[[gnu::noinline]] void multiply_tile(Rows rows, const float* x, float* sums) {
  constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;
  using Vec = typename Isa::Vec;
  Vec acc[kTokens][kTileRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) acc[t][r] = Isa::zero();
  }
  Vec w[kTileRows][Isa::kStepVectors];
  for (int64_t step = 0; step < rows.safe(); ++step) {
    rows.prefetch(step);
    rows.expand(step, w);
    multiply_step<Isa, kTokens>(w, x + step * kStepColumns, acc);
  }
  for (int64_t step = rows.safe(); step < rows.steps(); ++step) {
    rows.expand_exact(step, w);
    multiply_step<Isa, kTokens>(w, x + step * kStepColumns, acc);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) Isa::accumulate(sums + t * kGroupRows, acc[t]);
}

template <class Isa, class Weight, class Act>
class FewTokens {
 public:
  explicit FewTokens(const NMLinear& call)
      : call_(call), blocks_((call.in_features + kFewColumns - 1) / kFewColumns) {}

  int32_t operator()() {
    const int64_t x_floats = blocks_ * call_.tokens * kFewStride;
    const int64_t sums_floats = call_.tokens * kGroupRows;
    float* scratch = thread_scratch(x_floats + call_.threads * sums_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    x_ = scratch;
    convert_x();  // faster than threads meet at a barrier
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t thread = omp_get_thread_num();
      const RowShare rows = row_share<Isa>(call_.out_features, thread, omp_get_num_threads());
      float* sums = scratch + x_floats + thread * sums_floats;
      for (int64_t row = rows.begin; row < rows.end; row += kGroupRows) {
        const int64_t end = rows.end - row < kGroupRows ? rows.end : row + kGroupRows;
        multiply_rows(row, end, sums);
        store_rows(row, end, sums);
      }
    }
    return MASKPRO_OK;
  }

 private:
  // [block][token][kFewStride], zero beyond in_features up to a whole step.
  float* x_block(int64_t block) const { return x_ + block * call_.tokens * kFewStride; }

  void convert_x() const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t column = block * kFewColumns;
      const int64_t rest = call_.in_features - column;
      const int64_t count = rest < kFewColumns ? rest : kFewColumns;
      for (int64_t t = 0; t < call_.tokens; ++t) {
        const Act* from = static_cast<const Act*>(call_.x) + t * call_.in_features + column;
        convert_activations<Isa>(from, count, call_.weight_dtype, x_block(block) + t * kFewStride);
      }
    }
  }

  // sums = x W^T for the rows [row, row_end) of one group.
  void multiply_rows(int64_t row, int64_t row_end, float* sums) const {
    memset(sums, 0, static_cast<size_t>(call_.tokens * kGroupRows) * sizeof(float));
    if (Isa::regular(call_.n, call_.m)) {
      multiply_packed<PackedRows<Isa, Weight, true>>(row, row_end, sums);
    } else {
      multiply_packed<PackedRows<Isa, Weight, false>>(row, row_end, sums);
    }
  }

  template <class Packed>
  void multiply_packed(int64_t row, int64_t row_end, float* sums) const {
    for (int64_t tile = row; tile < row_end; tile += kTileRows) {
      for (int64_t block = 0; block < blocks_; ++block) {
        const Packed packed(call_, tile, row_end, block * kFewColumns, kFewColumns);
        for (int64_t t = 0; t < call_.tokens; t += Isa::kTileTokens) {
          multiply_some<Isa::kTileTokens>(packed, x_block(block) + t * kFewStride, call_.tokens - t,
                                          sums + t * kGroupRows + tile - row);
        }
      }
    }
  }

  // Finds the tile of min(tokens, kTokens) tokens.
  template <int kTokens, class Packed>
  static void multiply_some(const Packed& rows, const float* x, int64_t tokens, float* sums) {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return multiply_some<kTokens - 1>(rows, x, tokens, sums);
    }
    multiply_tile<Isa, kTokens>(rows, x, sums);
  }

  void store_rows(int64_t row, int64_t row_end, const float* sums) const {
    float bias[kGroupRows + Isa::kLanes * Isa::kStepVectors];
    load_bias<Isa>(call_, row, row_end - row, bias);
    Act* y = static_cast<Act*>(call_.y) + row;
    for (int64_t t = 0; t < call_.tokens; ++t) {
      store_outputs<Isa>(sums + t * kGroupRows, bias, row_end - row, y + t * call_.out_features);
    }
  }

  const NMLinear& call_;
  const int64_t blocks_;
  float* x_ = nullptr;
};

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_FEW_H_
