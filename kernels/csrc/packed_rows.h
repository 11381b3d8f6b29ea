// Four rows of a packed weight, expanded to float32 step by step.
#ifndef MASKPRO_PACKED_ROWS_H_
#define MASKPRO_PACKED_ROWS_H_

#include <stdint.h>

#include "nm_linear.h"

namespace maskpro {

constexpr int kTileRows = 4;

// Columns whose weights are prefetched at once: a cache line of 2:4 bfloat16 values.
constexpr int64_t kPrefetchColumns = 64;

// Rows [row, row + 4) of the packed weight within a range of columns that starts at a multiple of 32, walked in steps
// of Isa::kStepVectors vectors. Rows from `row_end` on repeat the last one; their sums are never stored.
template <class Isa, class Weight, bool kRegular>
class PackedRows {
 public:
  static constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;

  [[gnu::always_inline]] PackedRows(const NMLinear& call, int64_t row, int64_t row_end, int64_t column, int64_t most) {
    const int64_t skipped = column / call.m * call.n;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t source = row + r < row_end ? row + r : row_end - 1;
      values_[r] = static_cast<const Weight*>(call.values) + source * call.kept + skipped;
      bitmask_[r] = call.bitmask + source * call.mask_bytes + column / 8;
    }
    next_values_ = kTileRows * call.kept;
    next_bitmask_ = kTileRows * call.mask_bytes;
    values_per_step_ = kRegular ? kStepColumns / call.m * call.n : 0;
    const int64_t rest = call.in_features - column;
    const int64_t columns = rest < most ? rest : most;
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
      Isa::template expand<kRegular>(values_[r] + step * values_per_step_, bits, values_per_step_, w[r]);
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

// Writes four rows, `stride` floats apart, columns in the order of the steps' lanes.
template <class Isa, class Rows>
inline void expand_rows(Rows rows, float* panel, int64_t stride) {
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
      float* to = panel + r * stride + step * kStepColumns;
#pragma GCC unroll 2
      for (int i = 0; i < Isa::kStepVectors; ++i) Isa::store(to + i * Isa::kLanes, w[r][i]);
    }
  }
}

}  // namespace maskpro

#endif  // MASKPRO_PACKED_ROWS_H_
