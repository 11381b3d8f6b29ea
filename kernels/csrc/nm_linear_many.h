// nm_linear for many tokens, bound by arithmetic: a matrix product of rows expanded once for some hundred tokens.
//
//   for every kPassTokens tokens                      bounds the working memory
//     turn the activations to [block][tile of tokens][column][token], shared by all threads
//     for every kGroupPanels panels of kPanelRows rows of this thread
//       for every block of columns, whose activations stay in L2 throughout the group
//         for every panel: expand it, then for every kOuterRows rows of it (in L1), for every tile: outer_tile
//       add the bias, round, store
//
// Lanes are tokens: a column's activations are one or two loads, a weight is broadcast, and nothing is summed over
// lanes. Two vectors of tokens by kOuterRows rows of sums fill the registers.
#ifndef MASKPRO_NM_LINEAR_MANY_H_
#define MASKPRO_NM_LINEAR_MANY_H_

#include <omp.h>
#include <string.h>

#include "elements.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "packed_rows.h"
#include "row_share.h"
#include "scratch.h"

namespace maskpro {

// Enough to make a row's expansion cheap; few enough that a block's activations, 256 KiB, stay in an L2 of 512 KiB.
constexpr int64_t kPassTokens = 256;
constexpr int64_t kManyColumns = 256;

// Floats between rows of a panel, and between the tokens that are being turned: one cache line more, or all would fall
// into the same L1 sets.
constexpr int64_t kManyStride = kManyColumns + 16;

// Rows of a panel, a multiple of every kOuterRows; and panels of a group, for which a block's activations are read
// from L3 once, and whose sums are 96 KiB.
constexpr int64_t kPanelRows = 48;
constexpr int64_t kGroupPanels = 2;

// sums[r][t] += w[r] . x[t] over `columns` columns, for kRows rows and two vectors of tokens.
//
//   w     [kRows, kManyStride]
//   x     [columns, 2 * Isa::kLanes]
//   sums  [kRows, kPassTokens]
template <class Isa, int kRows>
[[gnu::noinline]] void outer_tile(const float* w, const float* x, int64_t columns, float* sums) {
  using Vec = typename Isa::Vec;
  Vec acc[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = Isa::zero();
  for (int64_t column = 0; column < columns; ++column) {
    const Vec x0 = Isa::load(x);
    const Vec x1 = Isa::load(x + Isa::kLanes);
    x += 2 * Isa::kLanes;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Isa::broadcast(w + r * kManyStride + column);
      acc[r][0] = Isa::fma(weight, x0, acc[r][0]);
      acc[r][1] = Isa::fma(weight, x1, acc[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* to = sums + r * kPassTokens;
    Isa::store(to, Isa::add(Isa::load(to), acc[r][0]));
    Isa::store(to + Isa::kLanes, Isa::add(Isa::load(to + Isa::kLanes), acc[r][1]));
  }
}

template <class Isa, class Weight, class Act>
class ManyTokens {
 public:
  explicit ManyTokens(const NMLinear& call)
      : call_(call), blocks_((call.in_features + kManyColumns - 1) / kManyColumns) {}

  int32_t operator()() {
    const int64_t most = call_.tokens < kPassTokens ? call_.tokens : kPassTokens;
    const int64_t x_floats = blocks_ * tiles(most) * kTileFloats;
    const int64_t panel_floats = kPanelRows * kManyStride;  // also holds the tokens that are being turned
    const int64_t thread_floats = panel_floats + kGroupPanels * kPanelRows * kPassTokens;
    float* scratch = thread_scratch(x_floats + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    x_ = scratch;
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      float* panel = scratch + x_floats + thread * thread_floats;
      float* sums = panel + panel_floats;
      const RowShare rows = row_share<Isa>(call_.out_features, thread, threads);
      for (int64_t token = 0; token < call_.tokens; token += kPassTokens) {
        const int64_t rest = call_.tokens - token;
        const int64_t tokens = rest < kPassTokens ? rest : kPassTokens;
        turn_x(token, tokens, thread, threads, panel);
#pragma omp barrier
        for (int64_t row = rows.begin; row < rows.end; row += kGroupPanels * kPanelRows) {
          const int64_t most_end = row + kGroupPanels * kPanelRows;
          const int64_t end = most_end < rows.end ? most_end : rows.end;
          multiply_rows(row, end, tokens, panel, sums);
          store_rows(row, end, token, tokens, sums);
        }
        if (rest > kPassTokens) {
#pragma omp barrier
        }
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int64_t kTileTokens = 2 * Isa::kLanes;
  static constexpr int64_t kTileFloats = kManyColumns * kTileTokens;
  static constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;
  static_assert(kTileTokens <= kPanelRows && kPassTokens % kTileTokens == 0, "the panel holds a tile's tokens");
  static_assert(kPanelRows % Isa::kOuterRows == 0, "a panel is whole tiles");

  static int64_t tiles(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

  // Columns of a block, up to a whole step.
  int64_t width(int64_t block) const {
    const int64_t rest = call_.in_features - block * kManyColumns;
    return rest < kManyColumns ? (rest + kStepColumns - 1) / kStepColumns * kStepColumns : kManyColumns;
  }

  void turn_x(int64_t token, int64_t tokens, int64_t thread, int64_t threads, float* rows) const {
    const int64_t pieces = blocks_ * tiles(tokens);
    for (int64_t piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; ++piece) {
      const int64_t column = piece / tiles(tokens) * kManyColumns;
      const int64_t first = piece % tiles(tokens) * kTileTokens;
      const int64_t rest = call_.in_features - column;
      const int64_t count = rest < kManyColumns ? rest : kManyColumns;
      for (int64_t t = 0; t < kTileTokens; ++t) {
        float* to = rows + t * kManyStride;
        if (first + t >= tokens) {
          memset(to, 0, kManyColumns * sizeof(float));
          continue;
        }
        const Act* from = static_cast<const Act*>(call_.x) + (token + first + t) * call_.in_features + column;
        convert_activations<Isa>(from, count, call_.weight_dtype, to);
      }
      float* to = x_ + piece * kTileFloats;
      const int64_t columns = width(piece / tiles(tokens));
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t t = 0; t < kTileTokens; ++t) to[c * kTileTokens + t] = rows[t * kManyStride + c];
      }
    }
  }

  // sums = W x^T for the rows [row, row_end) of one group: [row][kPassTokens].
  void multiply_rows(int64_t row, int64_t row_end, int64_t tokens, float* panel, float* sums) const {
    memset(sums, 0, kGroupPanels * kPanelRows * kPassTokens * sizeof(float));
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t first = row; first < row_end; first += kPanelRows) {
        const int64_t end = row_end - first < kPanelRows ? row_end : first + kPanelRows;
        if (Isa::regular(call_.n, call_.m)) {
          expand_panel<PackedRows<Isa, Weight, true>>(first, end, block, panel);
        } else {
          expand_panel<PackedRows<Isa, Weight, false>>(first, end, block, panel);
        }
        float* panel_sums = sums + (first - row) * kPassTokens;
        for (int64_t r = 0; r < end - first; r += Isa::kOuterRows) {
          for (int64_t tile = 0; tile < tiles(tokens); ++tile) {
            const float* x = x_ + (block * tiles(tokens) + tile) * kTileFloats;
            multiply_some<Isa::kOuterRows>(end - first - r, panel + r * kManyStride, x, width(block),
                                           panel_sums + r * kPassTokens + tile * kTileTokens);
          }
        }
      }
    }
  }

  template <class Packed>
  void expand_panel(int64_t row, int64_t row_end, int64_t block, float* panel) const {
    for (int64_t tile = row; tile < row_end; tile += kTileRows) {
      expand_rows<Isa>(Packed(call_, tile, row_end, block * kManyColumns, kManyColumns),
                       panel + (tile - row) * kManyStride, kManyStride);
    }
  }

  // Finds the tile of min(rows, kRows) rows.
  template <int kRows>
  static void multiply_some(int64_t rows, const float* w, const float* x, int64_t columns, float* sums) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply_some<kRows - 1>(rows, w, x, columns, sums);
    }
    outer_tile<Isa, kRows>(w, x, columns, sums);
  }

  void store_rows(int64_t row, int64_t row_end, int64_t token, int64_t tokens, const float* sums) const {
    constexpr int64_t kRows = kGroupPanels * kPanelRows;
    float bias[kRows + kStepColumns];
    load_bias<Isa>(call_, row, row_end - row, bias);
    Act* y = static_cast<Act*>(call_.y) + token * call_.out_features + row;
    for (int64_t t = 0; t < tokens; ++t) {
      float outputs[kRows];
      for (int64_t r = 0; r < row_end - row; ++r) outputs[r] = sums[r * kPassTokens + t];
      store_outputs<Isa>(outputs, bias, row_end - row, y + t * call_.out_features);
    }
  }

  const NMLinear& call_;
  const int64_t blocks_;
  float* x_ = nullptr;
};

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_MANY_H_
