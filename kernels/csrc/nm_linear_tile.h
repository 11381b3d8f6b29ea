// The inner loop: four weight rows times a few tokens over one block of columns.
//
// Twenty-four (AVX-512) or twelve (AVX2) sums stay in registers: enough independent FMA chains to hide
// the latency of four cycles, every weight used for all tokens once expanded, every activation loaded
// once for four rows. The weights come either packed, to be expanded on the way (PackedRows), or from
// a panel that was expanded before (PanelRows).
//
// Each sum runs over the same columns in the same order wherever it is computed, so a token's result
// depends neither on the other tokens of the batch nor on the number of threads.
#ifndef MASKPRO_NM_LINEAR_TILE_H_
#define MASKPRO_NM_LINEAR_TILE_H_

#include <stdint.h>

#include "nm_linear.h"

namespace maskpro {

constexpr int kTileRows = 4;

// Columns per block: 6 tokens x 4 KiB of activations and 4 rows of a panel fit in a 48 KiB L1, and the
// sum over lanes at a block's end costs a few per cent of the block. A multiple of every m.
constexpr int64_t kBlockColumns = 1024;

// Floats between rows of a block: one cache line more, or all rows would fall into the same L1 sets.
constexpr int64_t kBlockStride = kBlockColumns + 16;

// Rows of a panel: 48 x 4 KiB stays in L2 beside the sums.
constexpr int64_t kPanelRows = 48;

// Columns whose weights are prefetched at once: a cache line of 2:4 bfloat16 values.
constexpr int64_t kPrefetchColumns = 64;

// Rows [row, row + 4) of the packed weight within one block of columns, walked in steps of
// Isa::kStepVectors vectors. Rows from `row_end` on repeat the last one; their sums are never stored.
template <class Isa, class Weight, bool kRegular>
class PackedRows {
 public:
  static constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;

  [[gnu::always_inline]] PackedRows(const NMLinear& call, int64_t row, int64_t row_end, int64_t block) {
    const int64_t column = block * kBlockColumns;
    const int64_t skipped = block * (static_cast<int32_t>(kBlockColumns) / call.m * call.n);
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t source = row + r < row_end ? row + r : row_end - 1;
      values_[r] = static_cast<const Weight*>(call.values) + source * call.kept + skipped;
      bitmask_[r] = call.bitmask + source * call.mask_bytes + column / 8;
    }
    next_values_ = kTileRows * call.kept;
    next_bitmask_ = kTileRows * call.mask_bytes;
    values_per_step_ = kRegular ? kStepColumns / call.m * call.n : 0;
    const int64_t rest = call.in_features - column;
    const int64_t columns = rest < kBlockColumns ? rest : kBlockColumns;
    whole_ = columns / kStepColumns;
    steps_ = (columns + kStepColumns - 1) / kStepColumns;
    last_columns_ = columns % kStepColumns;
    const int64_t last = row + kTileRows < row_end ? row + kTileRows - 1 : row_end - 1;
    safe_ = safe_steps(call, (call.out_features - last) * call.kept - skipped);
  }

  int64_t steps() const { return steps_; }
  // How many leading steps expand() may load; the others need expand_exact().
  int64_t safe() const { return safe_; }

  // Rows are too short for the hardware to run ahead from one to the next, and it stops at pages: fetches
  // the place of a step in the next four rows. (A prefetch past the end of a buffer is no access.)
  [[gnu::always_inline]] void prefetch(int64_t step) const {
    if (step % (kPrefetchColumns / kStepColumns) != 0) return;
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Weight* next = values_[r] + step * values_per_step_ + next_values_;
      __builtin_prefetch(next, 0, 2);
      if constexpr (sizeof(Weight) == 4) __builtin_prefetch(next + 16, 0, 2);
      __builtin_prefetch(bitmask_[r] + step * kStepColumns / 8 + next_bitmask_, 0, 2);
    }
  }

  // w[r][i] = vector i of the step in row r.
  template <class Vec>
  [[gnu::always_inline]] void expand(int64_t step, Vec (&w)[kTileRows][Isa::kStepVectors]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const uint32_t bits = Isa::bits(bitmask_[r], step);
      Isa::template expand<kRegular>(values_[r] + step * values_per_step_, bits, w[r]);
      if constexpr (!kRegular) values_[r] += Isa::count(bits);
    }
  }

  // As expand(), reading no byte that is not the weight's: near the end of a row or of the buffers.
  template <class Vec>
  [[gnu::always_inline]] void expand_exact(int64_t step, Vec (&w)[kTileRows][Isa::kStepVectors]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const uint32_t bits =
          step < whole_ ? Isa::bits(bitmask_[r], step) : Isa::last_bits(bitmask_[r], step, last_columns_);
      Isa::expand_exact(values_[r] + step * values_per_step_, bits, w[r]);
      if constexpr (!kRegular) values_[r] += Isa::count(bits);
    }
  }

 private:
  // `available` values lie between the block's first and the end of the buffer. Within a group nothing
  // is known but that it keeps n, hence the group a step starts in is counted as consumed.
  int64_t safe_steps(const NMLinear& call, int64_t available) const {
    available -= Isa::template kWindow<kRegular>;
    if (available >= call.kept) return whole_;
    const int64_t groups = available / call.n - 1;
    if (available < 0 || groups < 0) return 0;
    const int64_t covered = groups * call.m / kStepColumns + 1;
    return covered < whole_ ? covered : whole_;
  }

  const Weight* values_[kTileRows];
  const uint8_t* bitmask_[kTileRows];
  int64_t next_values_;
  int64_t next_bitmask_;
  int64_t values_per_step_;
  int64_t steps_;
  int64_t whole_;
  int64_t last_columns_;
  int64_t safe_;
};

// Four consecutive rows of an expanded panel, whose rows are zero up to a whole step.
template <class Isa>
class PanelRows {
 public:
  PanelRows(const float* rows, int64_t steps) : rows_(rows), steps_(steps) {}

  int64_t steps() const { return steps_; }
  int64_t safe() const { return steps_; }

  void prefetch(int64_t) const {}

  template <class Vec>
  [[gnu::always_inline]] void expand(int64_t step, Vec (&w)[kTileRows][Isa::kStepVectors]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const float* row = rows_ + r * kBlockStride + step * Isa::kStepVectors * Isa::kLanes;
#pragma GCC unroll 2
      for (int i = 0; i < Isa::kStepVectors; ++i) w[r][i] = Isa::load(row + i * Isa::kLanes);
    }
  }
  template <class Vec>
  [[gnu::always_inline]] void expand_exact(int64_t step, Vec (&w)[kTileRows][Isa::kStepVectors]) {
    expand(step, w);
  }

 private:
  const float* rows_;
  int64_t steps_;
};

template <class Isa, int kTokens, class Vec>
[[gnu::always_inline]] inline void multiply_step(const Vec (&w)[kTileRows][Isa::kStepVectors], const float* x,
                                                 Vec (&sums)[kTokens][kTileRows]) {
#pragma GCC unroll 2
  for (int i = 0; i < Isa::kStepVectors; ++i) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Vec xt = Isa::load(x + t * kBlockStride + i * Isa::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) sums[t][r] = Isa::fma(w[r][i], xt, sums[t][r]);
    }
  }
}

// sums[t][r] += rows[r] . x[t] over one block of columns.
//
//   x     [kTokens, kBlockStride], zero from the block's last column up to a whole step
//   sums  [kTokens, kPanelRows], of which the first four columns are used
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
  for (int t = 0; t < kTokens; ++t) Isa::accumulate(sums + t * kPanelRows, acc[t]);
}

// Writes rows to a panel: [4, kBlockStride] float32, columns in the order of the steps' lanes.
template <class Isa, class Rows>
inline void expand_tile(Rows rows, float* panel) {
  constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;
  typename Isa::Vec w[kTileRows][Isa::kStepVectors];
  for (int64_t step = 0; step < rows.steps(); ++step) {
    if (step < rows.safe()) {
      rows.prefetch(step);
      rows.expand(step, w);
    } else {
      rows.expand_exact(step, w);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      float* to = panel + r * kBlockStride + step * kStepColumns;
#pragma GCC unroll 2
      for (int i = 0; i < Isa::kStepVectors; ++i) Isa::store(to + i * Isa::kLanes, w[r][i]);
    }
  }
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_TILE_H_
