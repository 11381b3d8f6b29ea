// nm_linear of 2:4 int8 values with activations of 8 bits (W8A8): products of integers, four a lane, with AVX512_VNNI.
//
// A token's activations become integers q = round(x / s) of 8 bits, as maskpro_kernels/activations.py has it: s is the
// token's largest magnitude / 127, or one that was calibrated, beyond which q is clipped.
//
//   y = (s (W q)) scale + bias
//
// Sums of integers are exact. VPDPBUSD multiplies unsigned bytes by signed ones, so q + 128 is what is multiplied, and
// 128 times the sum of the row's kept values taken off. A lane is a row's next four kept values, two groups of eight
// columns: eight bytes of a token are broadcast and each lane's four shuffled out of them, without a permutation (which
// would also do, from whole lines: 4.0 products a ns on a Zen 5 core instead of 4.7).
//
//   round every token
//   for every block of rows, or some of them for many tokens, that this thread takes (shares.h)
//     for every piece of it, for every tile of tokens, for every block: multiply_bytes
//     scale by token and row, add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_W8A8_H_
#define MASKPRO_NM_LINEAR_W8A8_H_

#include <immintrin.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <limits>

#include "elements.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "prefetch.h"
#include "scratch.h"
#include "shares.h"
#include "vector_avx512.h"

namespace maskpro {
namespace {

constexpr int64_t kByteTile = 16;  // tokens whose sums are in registers

// Chunks of a piece, 1024 columns, whose bytes stay in L1 for a tile of tokens and one block of the weight.
constexpr int64_t kBytePieceChunks = 32;

constexpr int64_t kByteChunk = chunk_bytes(2, 1);
constexpr int64_t kByteColumns = 32;  // of a chunk

// q + 128 of one token, and s. A NaN, or without a calibrated scale an infinity, makes s a NaN, and all outputs.
template <class Act>
[[gnu::noinline]] float round_token(const Act* x, int64_t columns, const float* calibrated, uint8_t* levels) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();  // as integers, so that a NaN is the largest
  const auto load = [&](int64_t i) {
    const int64_t rest = columns - i;
    return rest >= Avx512::kLanes ? Avx512::load(x + i) : load_partial<Avx512>(x + i, rest);
  };
  for (int64_t i = 0; i < columns; i += Avx512::kLanes) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(load(i)), magnitude));
  }
  constexpr int32_t kInfinity = 0x7f800000;
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float scale;
  if (calibrated != nullptr) {
    scale = *calibrated;
  } else {
    memcpy(&scale, &bits, sizeof scale);
    scale = std::max(scale / 127.0F, std::numeric_limits<float>::min());
  }
  const __m512 divisor = _mm512_set1_ps(scale);
  const __m512i low = _mm512_set1_epi32(-128), high = _mm512_set1_epi32(127), middle = _mm512_set1_epi8(-128);
  for (int64_t i = 0; i < columns; i += Avx512::kLanes) {
    // Clipped as floats: what does not fit 32 bits would become the lowest.
    const __m512 clipped = _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(load(i), divisor), _mm512_cvtepi32_ps(high)),
                                         _mm512_cvtepi32_ps(low));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clipped));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + i), _mm_xor_si128(bytes, _mm512_castsi512_si128(middle)));
  }
  const bool undefined = calibrated != nullptr ? bits > kInfinity : bits >= kInfinity;
  return undefined ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// sums[t][row] += rows . (levels[t] - 128) over some chunks of a block.
//
//   levels  [kTokens, columns of the chunks], rows stride apart
//   sums    [kTokens, 16]
template <int kTokens>
[[gnu::noinline]] void multiply_bytes(const uint8_t* chunk, int64_t chunks, const uint8_t* levels, int64_t stride,
                                      int32_t* sums, int64_t ahead) {
  __m512i acc[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_loadu_si512(sums + t * kBlockRows);
  __m512i all = _mm512_setzero_si512();  // 128 times the sum of the row's values
  const __m512i middle = _mm512_set1_epi8(-128);
  const __m512i transpose = Avx512::bytes_by_row();
  // Where in two rows' words the indices of four slots begin; of the first in its group the two low bits are read.
  const __m512i begins = _mm512_set1_epi64(0x2624222006040200);
  const __m512i two_bits = _mm512_set1_epi8(3), groups = _mm512_set1_epi32(0x04040000);
  for (int64_t c = 0; c < chunks; ++c) {
    const __m512i indices = _mm512_loadu_si512(chunk);
    __builtin_prefetch(chunk + ahead);
    const int8_t* values = reinterpret_cast<const int8_t*>(chunk + chunk_index_bytes(2));
    for_slots<Avx512, chunk_slots(2) / 4>([&](int four) {
      const int slot = 4 * four;
      const __m512i kept = _mm512_permutexvar_epi8(transpose, _mm512_loadu_si512(values + slot * kBlockRows));
      prefetch(values, slot, ahead);
      constexpr int kAndThenOr = 0xea;
      const __m512i shifted = _mm512_srli_epi32(indices, static_cast<unsigned>(2 * slot));
      const __m512i places =
          _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(begins, shifted), two_bits, groups, kAndThenOr);
      all = _mm512_dpbusd_epi32(all, middle, kept);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        int64_t eight;
        memcpy(&eight, levels + t * stride + 2 * slot, sizeof eight);
        acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_shuffle_epi8(_mm512_set1_epi64(eight), places), kept);
      }
    });
    chunk += kByteChunk;
    levels += kByteColumns;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) _mm512_storeu_si512(sums + t * kBlockRows, _mm512_sub_epi32(acc[t], all));
}

template <class Act>
class EightBitTokens {
 public:
  explicit EightBitTokens(const NMLinear& call)
      : call_(call),
        sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype),
        stride_(sizes_.chunks * kByteColumns + kLine) {}

  int32_t operator()() {
    const int64_t together = blocks_together();
    const int64_t levels_floats = (call_.tokens * stride_ + kLine - 1) / kLine * kLine / sizeof(float);
    const int64_t scales_floats = (call_.tokens + 15) / 16 * 16;
    const int64_t sums_floats = together * call_.tokens * kBlockRows;
    float* scratch = thread_scratch(levels_floats + scales_floats + call_.threads * sums_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    uint8_t* levels = reinterpret_cast<uint8_t*>(scratch);
    float* scales = scratch + levels_floats;
    Shares shares(call_.threads, sizes_.blocks, 1);
    if (call_.tokens == 1) round(0, levels, scales);
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      if (call_.tokens > 1) {
        for (int64_t t = thread; t < call_.tokens; t += omp_get_num_threads()) round(t, levels, scales);
#pragma omp barrier
      }
      float* sums = scales + scales_floats + thread * sums_floats;
      for (int64_t block, end; shares.take(thread, together, &block, &end);) {
        const int64_t count = (end - block) * call_.tokens;
        multiply(block, end, levels, reinterpret_cast<int32_t*>(sums));
        for (int64_t i = 0; i < count; ++i) {
          float* row = sums + i * kBlockRows;
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(row));
          _mm512_storeu_ps(row, _mm512_mul_ps(sum, _mm512_set1_ps(scales[i % call_.tokens])));
        }
        store_outputs<Avx512, Act>(call_, block, end, 0, call_.tokens, sums, call_.tokens * kBlockRows);
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int64_t kLine = 64;  // one more, or all tokens would fall into the same L1 sets

  bool many_tiles() const { return call_.tokens > 2 * kByteTile; }

  int64_t blocks_together() const {
    return many_tiles() ? Shares::together(call_.threads, sizes_.blocks) : 1;
  }

  void round(int64_t token, uint8_t* levels, float* scales) const {
    const Act* x = static_cast<const Act*>(call_.x) + token * call_.in_features;
    scales[token] = round_token(x, call_.in_features, call_.x_scale, levels + token * stride_);
  }

  // Sums of the blocks [block, end), [block][token][row].
  void multiply(int64_t block, int64_t end, const uint8_t* levels, int32_t* sums) const {
    memset(sums, 0, static_cast<size_t>((end - block) * call_.tokens * kBlockRows) * sizeof(int32_t));
    const int64_t most = call_.tokens > kByteTile ? kBytePieceChunks : sizes_.chunks;
    const int64_t ahead = many_tiles() ? kNearBytes : kFarBytes;
    for (int64_t chunk = 0; chunk < sizes_.chunks; chunk += most) {
      const int64_t chunks = std::min(sizes_.chunks - chunk, most);
      for (int64_t t = 0; t < call_.tokens; t += kByteTile) {
        for (int64_t b = block; b < end; ++b) {
          multiply_some<kByteTile>(call_.tokens - t, call_.weight + b * sizes_.block_bytes + chunk * kByteChunk, chunks,
                                   levels + t * stride_ + chunk * kByteColumns,
                                   sums + ((b - block) * call_.tokens + t) * kBlockRows, ahead);
        }
      }
    }
  }

  // Finds the tile of min(tokens, kTokens) tokens.
  template <int kTokens>
  void multiply_some(int64_t tokens, const uint8_t* chunk, int64_t chunks, const uint8_t* levels, int32_t* sums,
                     int64_t ahead) const {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return multiply_some<kTokens - 1>(tokens, chunk, chunks, levels, sums, ahead);
    }
    multiply_bytes<kTokens>(chunk, chunks, levels, stride_, sums, ahead);
  }

  const NMLinear& call_;
  const Interleaved sizes_;
  const int64_t stride_;  // bytes between tokens
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_W8A8_H_
