// nm_linear for one instruction set: cuts the work into threads, row panels, column blocks and tiles.
//
//   for every kPassTokens tokens                    bounds the working memory
//     convert the activations to float32 blocks, shared by all threads
//     few tokens: for every kPanelRows rows of this thread
//       tiles straight from the packed weight
//       add the bias, round, store
//     many tokens: for every kGroupPanels panels of kPanelRows rows of this thread
//       for every block of columns, whose activations stay in L2 throughout the group
//         for every panel: expand it into L2, then tiles from the panel
//       add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_IMPL_H_
#define MASKPRO_NM_LINEAR_IMPL_H_

#include <omp.h>
#include <string.h>

#include "element_types.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "nm_linear_tile.h"
#include "scratch.h"

namespace maskpro {

// Enough to make a panel's expansion cheap; few enough that a block's activations, 1 MiB, stay in an L2
// of 2 MiB and that working memory is bounded.
constexpr int64_t kPassTokens = 256;

// The activations of a block are read from L3 once per group.
constexpr int64_t kGroupPanels = 16;

template <class Isa>
class NMLinearRun {
 public:
  explicit NMLinearRun(const NMLinear& call)
      : call_(call),
        blocks_((call.in_features + kBlockColumns - 1) / kBlockColumns),
        pass_tokens_(call.tokens < kPassTokens ? call.tokens : kPassTokens),
        group_rows_(is_direct(call.tokens) ? kPanelRows : kGroupPanels * kPanelRows) {}

  int32_t operator()() {
    const int64_t x_floats = blocks_ * pass_tokens_ * kBlockStride;
    const int64_t sums_floats = pass_tokens_ * group_rows_;
    const int64_t thread_floats = kPanelRows * kBlockStride + sums_floats;
    float* scratch = thread_scratch(x_floats + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    x_ = scratch;
    const bool direct = is_direct(call_.tokens);
    // A few tokens are converted faster than threads meet at a barrier.
    if (direct) convert_x(0, call_.tokens, 0, 1);
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      float* panel = scratch + x_floats + thread * thread_floats;
      float* sums = panel + kPanelRows * kBlockStride;
      // Sixteen outputs are a cache line of the narrowest type or two: no false sharing of y. Where that
      // would leave threads without work, sharing is the lesser evil.
      const int64_t unit = call_.out_features >= 64 * threads ? 16 : 1;
      const int64_t units = (call_.out_features + unit - 1) / unit;
      const int64_t row_begin = units * thread / threads * unit;
      const int64_t row_limit = units * (thread + 1) / threads * unit;
      const int64_t row_end = row_limit < call_.out_features ? row_limit : call_.out_features;
      for (int64_t token = 0; token < call_.tokens; token += pass_tokens_) {
        const int64_t rest = call_.tokens - token;
        const int64_t tokens = rest < pass_tokens_ ? rest : pass_tokens_;
        if (!direct) {
          convert_x(token, tokens, thread, threads);
#pragma omp barrier
        }
        for (int64_t row = row_begin; row < row_end; row += group_rows_) {
          const int64_t group_end = row_end - row < group_rows_ ? row_end : row + group_rows_;
          multiply_rows(row, group_end, tokens, panel, sums);
          store_rows(row, group_end, token, tokens, sums);
        }
        if (rest > pass_tokens_) {
#pragma omp barrier
        }
      }
    }
    return MASKPRO_OK;
  }

 private:
  using Vec = typename Isa::Vec;
  static constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;

  // Decided by the whole call, so that its last, shorter pass goes the same way.
  static bool is_direct(int64_t tokens) { return tokens <= Isa::kDirectTokens; }

  // Sums of a group, [panel][token][kPanelRows].
  static float* panel_sums(float* sums, int64_t panel_row, int64_t tokens) { return sums + panel_row * tokens; }

  // Activations of the pass, [block][token][kBlockStride], zero beyond in_features up to a whole vector.
  float* x_block(int64_t block, int64_t tokens) const { return x_ + block * tokens * kBlockStride; }

  void convert_x(int64_t token, int64_t tokens, int64_t thread, int64_t threads) const {
    switch (call_.act_dtype) {
      case MASKPRO_F32:
        return convert_x(static_cast<const float*>(call_.x), token, tokens, thread, threads);
      case MASKPRO_BF16:
        return convert_x(static_cast<const BF16*>(call_.x), token, tokens, thread, threads);
      default:
        return convert_x(static_cast<const F16*>(call_.x), token, tokens, thread, threads);
    }
  }

  template <class Act>
  void convert_x(const Act* x, int64_t token, int64_t tokens, int64_t thread, int64_t threads) const {
    const int64_t pieces = blocks_ * tokens;
    for (int64_t piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; ++piece) {
      const int64_t block = piece / tokens;
      const int64_t t = piece % tokens;
      const int64_t column = block * kBlockColumns;
      const int64_t rest = call_.in_features - column;
      const int64_t count = rest < kBlockColumns ? rest : kBlockColumns;
      const Act* from = x + (token + t) * call_.in_features + column;
      float* to = x_block(block, tokens) + t * kBlockStride;
      if (Isa::kEvenOddBF16 && call_.weight_dtype == MASKPRO_BF16) {
        convert<Isa::kEvenOddBF16>(from, count, to);
      } else {
        convert<false>(from, count, to);
      }
    }
  }

  // Writes `count` floats, and zeros up to a whole step.
  template <bool kEvenOdd, class Element>
  static void convert(const Element* from, int64_t count, float* to) {
    for (int64_t column = 0; column < count; column += kStepColumns) {
      Vec v[Isa::kStepVectors];
      for (int i = 0; i < Isa::kStepVectors; ++i) {
        const int64_t rest = count - column - i * Isa::kLanes;
        const Element* p = from + column + i * Isa::kLanes;
        v[i] = rest >= Isa::kLanes ? Isa::load(p) : rest > 0 ? load_partial(p, rest) : Isa::zero();
      }
      if constexpr (kEvenOdd) Isa::part_even_odd(v);
      for (int i = 0; i < Isa::kStepVectors; ++i) Isa::store(to + column + i * Isa::kLanes, v[i]);
    }
  }

  template <class Element>
  static Vec load_partial(const Element* p, int64_t count) {
    Element padded[Isa::kLanes] = {};
    memcpy(padded, p, static_cast<size_t>(count) * sizeof(Element));
    return Isa::load(padded);
  }

  // sums = x W^T for the rows [row, row_end) of one group.
  void multiply_rows(int64_t row, int64_t row_end, int64_t tokens, float* panel, float* sums) const {
    memset(sums, 0, static_cast<size_t>(tokens * group_rows_) * sizeof(float));
    switch (call_.weight_dtype) {
      case MASKPRO_F32:
        return multiply_weight<float>(row, row_end, tokens, panel, sums);
      case MASKPRO_BF16:
        return multiply_weight<BF16>(row, row_end, tokens, panel, sums);
      default:
        return multiply_weight<F16>(row, row_end, tokens, panel, sums);
    }
  }

  template <class Weight>
  void multiply_weight(int64_t row, int64_t row_end, int64_t tokens, float* panel, float* sums) const {
    if (Isa::regular(call_.n, call_.m)) {
      multiply_packed<PackedRows<Isa, Weight, true>>(row, row_end, tokens, panel, sums);
    } else {
      multiply_packed<PackedRows<Isa, Weight, false>>(row, row_end, tokens, panel, sums);
    }
  }

  template <class Packed>
  void multiply_packed(int64_t row, int64_t row_end, int64_t tokens, float* panel, float* sums) const {
    if (is_direct(call_.tokens)) {
      for (int64_t tile = row; tile < row_end; tile += kTileRows) {
        for (int64_t block = 0; block < blocks_; ++block) {
          multiply_tile_rows(Packed(call_, tile, row_end, block), block, tokens, sums + tile - row);
        }
      }
      return;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t first = row; first < row_end; first += kPanelRows) {
        const int64_t end = row_end - first < kPanelRows ? row_end : first + kPanelRows;
        multiply_panel<Packed>(first, end, block, tokens, panel, panel_sums(sums, first - row, tokens));
      }
    }
  }

  template <class Packed>
  void multiply_panel(int64_t row, int64_t row_end, int64_t block, int64_t tokens, float* panel,
                      float* sums) const {
    int64_t steps = 0;
    for (int64_t tile = row; tile < row_end; tile += kTileRows) {
      const Packed packed(call_, tile, row_end, block);
      steps = packed.steps();
      expand_tile<Isa>(packed, panel + (tile - row) * kBlockStride);
    }
    // Tokens outside, rows inside: the few tokens stay in L1 while the panel streams from L2.
    for (int64_t t = 0; t < tokens; t += Isa::kTileTokens) {
      const int64_t rest = tokens - t;
      const int64_t some = rest < Isa::kTileTokens ? rest : Isa::kTileTokens;
      const float* x = x_block(block, tokens) + t * kBlockStride;
      for (int64_t r = 0; r < row_end - row; r += kTileRows) {
        multiply_some<Isa::kTileTokens>(PanelRows<Isa>(panel + r * kBlockStride, steps), x, some,
                                        sums + t * kPanelRows + r);
      }
    }
  }

  template <class Packed>
  void multiply_tile_rows(const Packed& packed, int64_t block, int64_t tokens, float* sums) const {
    for (int64_t t = 0; t < tokens; t += Isa::kTileTokens) {
      const int64_t rest = tokens - t;
      multiply_some<Isa::kTileTokens>(packed, x_block(block, tokens) + t * kBlockStride,
                                      rest < Isa::kTileTokens ? rest : Isa::kTileTokens,
                                      sums + t * kPanelRows);
    }
  }

  // Finds the tile of exactly `tokens` <= kTokens tokens.
  template <int kTokens, class Rows>
  static void multiply_some(const Rows& rows, const float* x, int64_t tokens, float* sums) {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return multiply_some<kTokens - 1>(rows, x, tokens, sums);
    }
    multiply_tile<Isa, kTokens>(rows, x, sums);
  }

  void store_rows(int64_t row, int64_t row_end, int64_t token, int64_t tokens, float* sums) const {
    for (int64_t first = row; first < row_end; first += kPanelRows) {
      const int64_t rows = row_end - first < kPanelRows ? row_end - first : kPanelRows;
      store_panel(first, rows, token, tokens, panel_sums(sums, first - row, tokens));
    }
  }

  void store_panel(int64_t row, int64_t rows, int64_t token, int64_t tokens, const float* sums) const {
    float bias[kPanelRows + kStepColumns] = {};  // convert() writes whole steps
    if (call_.bias != nullptr) load_bias(row, rows, bias);
    const int64_t first = token * call_.out_features + row;
    switch (call_.act_dtype) {
      case MASKPRO_F32:
        return store_rows(static_cast<float*>(call_.y) + first, rows, tokens, sums, bias);
      case MASKPRO_BF16:
        return store_rows(static_cast<BF16*>(call_.y) + first, rows, tokens, sums, bias);
      default:
        return store_rows(static_cast<F16*>(call_.y) + first, rows, tokens, sums, bias);
    }
  }

  void load_bias(int64_t row, int64_t rows, float* bias) const {
    switch (call_.bias_dtype) {
      case MASKPRO_F32:
        return convert<false>(static_cast<const float*>(call_.bias) + row, rows, bias);
      case MASKPRO_BF16:
        return convert<false>(static_cast<const BF16*>(call_.bias) + row, rows, bias);
      default:
        return convert<false>(static_cast<const F16*>(call_.bias) + row, rows, bias);
    }
  }

  template <class Act>
  void store_rows(Act* y, int64_t rows, int64_t tokens, const float* sums, const float* bias) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; r += Isa::kLanes) {
        const Vec value = Isa::add(Isa::load(sums + t * kPanelRows + r), Isa::load(bias + r));
        Act* to = y + t * call_.out_features + r;
        if (rows - r >= Isa::kLanes) {
          Isa::store(to, value);
        } else {
          Act padded[Isa::kLanes];
          Isa::store(padded, value);
          memcpy(to, padded, static_cast<size_t>(rows - r) * sizeof(Act));
        }
      }
    }
  }

  const NMLinear& call_;
  const int64_t blocks_;
  const int64_t pass_tokens_;
  const int64_t group_rows_;
  float* x_ = nullptr;
};

template <class Isa>
int32_t run_nm_linear(const NMLinear& call) {
  return NMLinearRun<Isa>(call)();
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_IMPL_H_
