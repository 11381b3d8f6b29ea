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

// Rows [row, row + 4) of the packed weight within one block of columns. Rows from `row_end` on repeat
// the last one; their sums are never stored.
template <class Isa, class Weight, bool kRegular>
class PackedRows {
 public:
  [[gnu::always_inline]] PackedRows(const NMLinear& call, int64_t row, int64_t row_end, int64_t block) {
    const int64_t column = block * kBlockColumns;
    const int64_t skipped = block * (static_cast<int32_t>(kBlockColumns) / call.m * call.n);
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t source = row + r < row_end ? row + r : row_end - 1;
      values_[r] = static_cast<const Weight*>(call.values) + source * call.kept + skipped;
      bitmask_[r] = call.bitmask + source * call.mask_bytes + column / 8;
    }
    step_ = kRegular ? Isa::kLanes / call.m * call.n : 0;
    const int64_t rest = call.in_features - column;
    const int64_t columns = rest < kBlockColumns ? rest : kBlockColumns;
    whole_ = columns / Isa::kLanes;
    vectors_ = (columns + Isa::kLanes - 1) / Isa::kLanes;
    last_columns_ = columns % Isa::kLanes;
    const int64_t last = row + kTileRows < row_end ? row + kTileRows - 1 : row_end - 1;
    safe_ = safe_vectors(call, (call.out_features - last) * call.kept - skipped);
  }

  int64_t vectors() const { return vectors_; }
  // How many leading vectors expand() may load; the others need expand_exact().
  int64_t safe() const { return safe_; }

  template <class Vec>
  [[gnu::always_inline]] void expand(int64_t vector, Vec (&w)[kTileRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const uint32_t bits = Isa::bits(bitmask_[r], vector);
      w[r] = Isa::template expand<kRegular>(values_[r] + vector * step_, bits);
      if constexpr (!kRegular) values_[r] += Isa::count(bits);
    }
  }

  // As expand(), reading no byte that is not the weight's: near the end of a row or of the buffers.
  template <class Vec>
  [[gnu::always_inline]] void expand_exact(int64_t vector, Vec (&w)[kTileRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const uint32_t bits = vector < whole_ ? Isa::bits(bitmask_[r], vector)
                                            : Isa::last_bits(bitmask_[r], vector, last_columns_);
      w[r] = Isa::expand_exact(values_[r] + vector * step_, bits);
      if constexpr (!kRegular) values_[r] += Isa::count(bits);
    }
  }

 private:
  // `available` values lie between the block's first and the end of the buffer. Within a group nothing
  // is known but that it keeps n, hence the group a vector starts in is counted as consumed.
  int64_t safe_vectors(const NMLinear& call, int64_t available) const {
    available -= Isa::template kWindow<kRegular>;
    if (available >= call.kept) return whole_;
    const int64_t groups = available / call.n - 1;
    if (available < 0 || groups < 0) return 0;
    const int64_t covered = groups * call.m / Isa::kLanes + 1;
    return covered < whole_ ? covered : whole_;
  }

  const Weight* values_[kTileRows];
  const uint8_t* bitmask_[kTileRows];
  int64_t step_;
  int64_t vectors_;
  int64_t whole_;
  int64_t last_columns_;
  int64_t safe_;
};

// Four consecutive rows of an expanded panel, whose rows are zero up to a whole vector.
template <class Isa>
class PanelRows {
 public:
  PanelRows(const float* rows, int64_t vectors) : rows_(rows), vectors_(vectors) {}

  int64_t vectors() const { return vectors_; }
  int64_t safe() const { return vectors_; }

  template <class Vec>
  [[gnu::always_inline]] void expand(int64_t vector, Vec (&w)[kTileRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) w[r] = Isa::load(rows_ + r * kBlockStride + vector * Isa::kLanes);
  }
  template <class Vec>
  [[gnu::always_inline]] void expand_exact(int64_t vector, Vec (&w)[kTileRows]) {
    expand(vector, w);
  }

 private:
  const float* rows_;
  int64_t vectors_;
};

template <class Isa, int kTokens, class Vec>
[[gnu::always_inline]] inline void multiply_vector(const Vec (&w)[kTileRows], const float* x,
                                                   Vec (&sums)[kTokens][kTileRows]) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const Vec xt = Isa::load(x + t * kBlockStride);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) sums[t][r] = Isa::fma(w[r], xt, sums[t][r]);
  }
}

// sums[t][r] += rows[r] . x[t] over one block of columns.
//
//   x     [kTokens, kBlockStride], zero from the block's last column up to a whole vector
//   sums  [kTokens, kPanelRows], of which the first four columns are used
template <class Isa, int kTokens, class Rows>
[[gnu::noinline]] void multiply_tile(Rows rows, const float* x, float* sums) {
  using Vec = typename Isa::Vec;
  Vec acc[kTokens][kTileRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) acc[t][r] = Isa::zero();
  }
  Vec w[kTileRows];
  for (int64_t vector = 0; vector < rows.safe(); ++vector) {
    rows.expand(vector, w);
    multiply_vector<Isa, kTokens>(w, x + vector * Isa::kLanes, acc);
  }
  for (int64_t vector = rows.safe(); vector < rows.vectors(); ++vector) {
    rows.expand_exact(vector, w);
    multiply_vector<Isa, kTokens>(w, x + vector * Isa::kLanes, acc);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) Isa::accumulate(sums + t * kPanelRows, acc[t]);
}

// Writes rows to a panel: [4, kBlockStride] float32.
template <class Isa, class Rows>
inline void expand_tile(Rows rows, float* panel) {
  typename Isa::Vec w[kTileRows];
  for (int64_t vector = 0; vector < rows.vectors(); ++vector) {
    if (vector < rows.safe()) {
      rows.expand(vector, w);
    } else {
      rows.expand_exact(vector, w);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) Isa::store(panel + r * kBlockStride + vector * Isa::kLanes, w[r]);
  }
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_TILE_H_
