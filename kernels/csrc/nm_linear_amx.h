// nm_linear on AMX, for bfloat16 activations: tiles of 16 tokens by 32 columns times tiles of 32 columns by 16 rows.
//
//   for every kAmxPassTokens tokens                   bounds the working memory
//     lay the activations out in tiles [pair of tiles of tokens][step of 32 columns][tile], shared by all threads
//     for every group of pairs of blocks of rows that this thread takes (shares.h)
//       for every piece of at most kPieceSteps steps, whose activations stay in L2 throughout the group (all steps at
//       once for as few tokens as two tiles hold)
//         for every pair of blocks, for every pair of tiles of tokens: multiply_tiles
//       scale, add the bias, round, store
//
// The first pair of tiles of tokens decodes the weights that it multiplies (decode_tiles.h), a step ahead: the units
// that shuffle and those that multiply tiles work at once. Dense bfloat16 is multiplied where it lies.
#ifndef MASKPRO_NM_LINEAR_AMX_H_
#define MASKPRO_NM_LINEAR_AMX_H_

#include <immintrin.h>
#include <omp.h>

#include "amx_tiles.h"
#include "decode_tiles.h"
#include "elements.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "scratch.h"
#include "shares.h"
#include "vector_avx512.h"

namespace maskpro {
namespace {

constexpr int64_t kAmxPassTokens = 256;

// Decoded weights of a pair of blocks: 48 KiB.
constexpr int64_t kPieceSteps = 24;

// Pairs of blocks for which a piece's activations are read from L3 once.
constexpr int64_t kGroupPairs = 8;

// Where no other tokens need them, decoded tiles are overwritten two steps later: the L1 is for what memory sends.
constexpr int64_t kRingSteps = 2;

constexpr int64_t kSumsFloats = 16 * kBlockRows;  // of a tile of tokens and a block

// sums[b][t] += x[t] W[b]^T over some steps of kBlocks blocks and kTiles tiles of tokens.
//
//   block    the first block of the weight; the next one is block_bytes on
//   decoded  tiles [kPieceSteps or kRingSteps][2], of step s at s & ring_bits; written if kDecode. Of weights in place the
//            half tiles at the end, written each time; kDecode prefetches
//   x        tiles [steps][2], each of tile_bytes
//   sums     [kBlocks][kTiles] tiles, blocks sums_stride floats apart; not read if `fresh`
template <class Decoder, int kBlocks, int kTiles, bool kDecode>
[[gnu::noinline]] void multiply_tiles(const Decoder& decode, const uint8_t* block, int64_t block_bytes, int64_t first,
                                      int64_t steps, uint8_t* decoded, int64_t ring_bits, const uint8_t* x,
                                      int64_t tile_bytes, float* sums, int64_t sums_stride, bool fresh) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    between_writes_and_tile_loads();
    _tile_loadd(0, sums, kTileRowBytes);
    if constexpr (kTiles > 1) _tile_loadd(1, sums + kSumsFloats, kTileRowBytes);
    if constexpr (kBlocks > 1) _tile_loadd(2, sums + sums_stride, kTileRowBytes);
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_loadd(3, sums + sums_stride + kSumsFloats, kTileRowBytes);
  }
  const int64_t ahead = kDecode && !Decoder::kInPlace ? 1 : 0;  // what was stored just now cannot be read yet
  for (int64_t s = 0; s < steps + ahead; ++s) {
    const uint8_t* w[2];
    if constexpr (Decoder::kInPlace) {
      for (int b = 0; b < kBlocks; ++b) {
        w[b] = decode.template find<kDecode>(block + b * block_bytes, first + s, decoded + b * kWeightTileBytes);
      }
      between_writes_and_tile_loads();
    } else {
      if constexpr (kDecode) {
        if (s < steps) {
          between_writes_and_tile_loads();
          uint8_t* to = decoded + (s & ring_bits) * 2 * kWeightTileBytes;
          decode(block, first + s, to);
          if constexpr (kBlocks > 1) decode(block + block_bytes, first + s, to + kWeightTileBytes);
        }
        if (s < ahead) continue;
        between_writes_and_tile_loads();
      }
      w[0] = decoded + ((s - ahead) & ring_bits) * 2 * kWeightTileBytes;
      w[1] = w[0] + kWeightTileBytes;
    }
    const uint8_t* tokens = x + (s - ahead) * 2 * tile_bytes;
    _tile_loadd(4, tokens, kTileRowBytes);
    if constexpr (kTiles > 1) _tile_loadd(5, tokens + tile_bytes, kTileRowBytes);
    _tile_loadd(6, w[0], kTileRowBytes);
    if constexpr (kBlocks > 1) _tile_loadd(7, w[1], kTileRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles > 1) _tile_dpbf16ps(1, 5, 6);
    if constexpr (kBlocks > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kTileRowBytes);
  if constexpr (kTiles > 1) _tile_stored(1, sums + kSumsFloats, kTileRowBytes);
  if constexpr (kBlocks > 1) _tile_stored(2, sums + sums_stride, kTileRowBytes);
  if constexpr (kBlocks > 1 && kTiles > 1) _tile_stored(3, sums + sums_stride + kSumsFloats, kTileRowBytes);
}

template <class Decoder>
class AmxTokens {
 public:
  explicit AmxTokens(const NMLinear& call)
      : call_(call),
        sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype),
        decode_(call),
        steps_((call.in_features + kTileSteps - 1) / kTileSteps),
        most_(call.tokens < kAmxPassTokens ? call.tokens : kAmxPassTokens),
        rows_(call.tokens < 16 ? call.tokens : 16),
        tile_bytes_(rows_ * kTileRowBytes),
        used_once_(most_ <= 32),
        piece_(used_once_ ? steps_ : even_piece(steps_)),
        most_pairs_(used_once_ ? 1 : kGroupPairs),
        ring_bits_(used_once_ ? kRingSteps - 1 : ~int64_t{0}) {}

  int32_t operator()() {
    const int64_t x_bytes = pairs(most_) * steps_ * 2 * tile_bytes_;
    const int64_t sums_floats = kGroupPairs * 2 * sums_stride(most_);
    const int64_t thread_floats = kDecodedFloats + sums_floats;
    float* scratch = thread_scratch(x_bytes / 4 + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 2);
    x_ = reinterpret_cast<uint8_t*>(scratch);
    const bool alone = most_ <= kSerialTokens;  // faster than threads meet at a barrier
    if (alone) lay_out(0, most_, 0, 1);
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      float* decoded = scratch + x_bytes / 4 + thread * thread_floats;
      float* sums = decoded + kDecodedFloats;
      const ConfiguredTiles tiles(rows_);
      for (int64_t token = 0; token < call_.tokens; token += kAmxPassTokens) {
        const int64_t rest = call_.tokens - token;
        const int64_t tokens = rest < kAmxPassTokens ? rest : kAmxPassTokens;
        if (!alone) {
          lay_out(token, tokens, thread, threads);
#pragma omp barrier
        }
        for (int64_t block, end; shares.take(thread, most_pairs_, &block, &end);) {
          multiply(block, end, tokens, reinterpret_cast<uint8_t*>(decoded), sums);
          store_outputs<Avx512, BF16>(call_, block, end, token, tokens, sums, sums_stride(tokens));
        }
        if (rest > kAmxPassTokens) {
#pragma omp barrier
          shares.deal_again(thread, threads);
        }
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int64_t kSerialTokens = 16;
  static constexpr int64_t kDecodedFloats = kPieceSteps * 2 * kWeightTileBytes / 4;

  // By whether there are two blocks and two tiles of tokens, and whether they are the first to meet their weights.
  static constexpr decltype(&multiply_tiles<Decoder, 1, 1, false>) kMultiply[2][2][2] = {
      {{multiply_tiles<Decoder, 1, 1, false>, multiply_tiles<Decoder, 1, 1, true>},
       {multiply_tiles<Decoder, 1, 2, false>, multiply_tiles<Decoder, 1, 2, true>}},
      {{multiply_tiles<Decoder, 2, 1, false>, multiply_tiles<Decoder, 2, 1, true>},
       {multiply_tiles<Decoder, 2, 2, false>, multiply_tiles<Decoder, 2, 2, true>}}};

  // At most kPieceSteps, and no short piece at the end: sums are stored and loaded again between pieces.
  static int64_t even_piece(int64_t steps) {
    const int64_t pieces = (steps + kPieceSteps - 1) / kPieceSteps;
    return (steps + pieces - 1) / pieces;
  }

  static int64_t tiles(int64_t tokens) { return (tokens + 15) / 16; }
  static int64_t pairs(int64_t tokens) { return (tiles(tokens) + 1) / 2; }
  // Floats of a block's sums.
  static int64_t sums_stride(int64_t tokens) { return pairs(tokens) * 2 * kSumsFloats; }

  uint8_t* x_tile(int64_t tile, int64_t step) const {
    return x_ + ((tile / 2 * steps_ + step) * 2 + tile % 2) * tile_bytes_;
  }

  // This thread's share of the tokens' tiles; rows past the last token, and columns past the last, are zeros.
  void lay_out(int64_t token, int64_t tokens, int64_t thread, int64_t threads) const {
    const int64_t pieces = tiles(tokens) * steps_;
    for (int64_t piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; ++piece) {
      const int64_t tile = piece / steps_, column = piece % steps_ * kTileSteps;
      const BF16* from = static_cast<const BF16*>(call_.x) + (token + tile * 16) * call_.in_features + column;
      uint8_t* to = x_tile(tile, piece % steps_);
      const int64_t rest = call_.in_features - column;
      const __mmask32 columns = first_columns(rest);
      const int64_t rows = tokens - tile * 16;
      for (int64_t row = 0; row < rows_; ++row) {
        const __mmask32 some = row < rows ? columns : 0;
        _mm512_store_si512(to + row * kTileRowBytes, _mm512_maskz_loadu_epi16(some, from + row * call_.in_features));
      }
    }
  }

  // sums = x W^T for the blocks [block, end) of one group: [block][tile of tokens][token][row].
  void multiply(int64_t block, int64_t end, int64_t tokens, uint8_t* decoded, float* sums) const {
    for (int64_t step = 0; step < steps_; step += piece_) {
      const int64_t steps = step + piece_ < steps_ ? piece_ : steps_ - step;
      for (int64_t b = block; b < end; b += 2) {
        const uint8_t* weight = call_.weight + b * sizes_.block_bytes;
        float* to = sums + (b - block) * sums_stride(tokens);
        for (int64_t tile = 0; tile < tiles(tokens); tile += 2) {
          const auto run = kMultiply[end - b > 1][tiles(tokens) - tile > 1][tile == 0];
          run(decode_, weight, sizes_.block_bytes, step, steps, decoded, ring_bits_, x_tile(tile, step), tile_bytes_,
              to + tile * kSumsFloats, sums_stride(tokens), step == 0);
        }
      }
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
  const Decoder decode_;
  const int64_t steps_;  // of 32 columns
  const int64_t most_;   // tokens of a pass
  const int64_t rows_;   // of a tile of tokens
  const int64_t tile_bytes_;
  const bool used_once_;      // decoded weights: all tokens are one pair of tiles
  const int64_t piece_;       // steps that stay decoded
  const int64_t most_pairs_;  // of blocks, that a thread takes at once
  const int64_t ring_bits_;   // the bits of a step's number that say where its decoded weights are
  uint8_t* x_ = nullptr;
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_AMX_H_
