// nm_linear on AMX for int8 values of 2:4 and few tokens: products of 8-bit integers, so that no value is converted.
//
// A token's activations become integers q = round(x / s) of 24 bits, s the power of two that just lets the largest in,
// and those become three digits base 256 from -128 to 127. A digit of all activations is a row of a tile:
//
//   y = s (W q_2 256^2 + W q_1 256 + W q_0)
//
// bfloat16 has 8 bits: activations down to 2^-14 of the token's largest are exact integers. Smaller ones, and in a token
// below 2^-104 all of them, become multiples of s: at most 2^-21 of the largest, or 2^-126. Sums of a digit's products are
// exact; putting them together rounds a few times. A token that holds an infinity or a NaN gives NaN.
//
//   split every token into digits, tiles [step of 64 columns][digit][token][64], shared by all threads
//   for every pair of blocks of rows that this thread takes (shares.h): multiply_integers
//     put the digits' sums together, scale, add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_AMX_INT8_H_
#define MASKPRO_NM_LINEAR_AMX_INT8_H_

#include <immintrin.h>
#include <omp.h>
#include <string.h>

#include "amx_tiles.h"
#include "decode_tiles.h"
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

constexpr int64_t kIntegerColumns = 64;  // that one product takes
constexpr int kDigits = 3;

// Their digits are a tile's rows. With a second tile there are as many products as with bfloat16, which was faster where
// products, not memory, took the time.
constexpr int64_t kIntegerTokens = 16 / kDigits;

// Sums of 128 * 128 fit 32 bits.
constexpr int64_t kIntegerKept = (int64_t{1} << 17) - 1;

// For every four bits of a group's two indices, the shuffle that puts the first two bytes of a lane into their columns.
struct ShufflesOfBytes {
  alignas(64) uint32_t bytes[16] = {};

  constexpr ShufflesOfBytes() {
    for (uint32_t code = 0; code < 16; ++code) {
      const uint32_t first = code & 3, second = code >> 2;
      for (uint32_t column = 0; column < 4; ++column) {
        bytes[code] |= (column == first ? 0 : column == second ? 1 : 0x80u) << (8 * column);
      }
    }
  }
};

// Writes the tile of one step, [16 groups of four columns][16 rows][4], of a block of rows; columns past the last are
// zeros.
class DecodeBytes {
 public:
  explicit DecodeBytes(int64_t chunks) : chunks_(chunks) {}

  [[gnu::always_inline]] void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    chunk(block + 2 * step * kChunkBytes, tile);
    tile += 8 * kTileRowBytes;
    if (2 * step + 1 < chunks_) return chunk(block + (2 * step + 1) * kChunkBytes, tile);
    for (int row = 0; row < 8; ++row) _mm512_store_si512(tile + row * kTileRowBytes, _mm512_setzero_si512());
  }

 private:
  static constexpr int64_t kChunkBytes = chunk_bytes(2, 1);  // of 32 columns
  static constexpr ShufflesOfBytes kShuffles{};

  [[gnu::always_inline]] static void chunk(const uint8_t* from, uint8_t* tile) {
    const __m512i indices = _mm512_loadu_si512(from);
    const int8_t* values = reinterpret_cast<const int8_t*>(from + chunk_index_bytes(2));
    const __m512i shuffles = _mm512_load_si512(kShuffles.bytes);
    const __m512i second_lanes = lanes() | _mm512_set1_epi8(2);
    const __m512i transpose = Avx512::bytes_by_row();
    __builtin_prefetch(from + kNearBytes);
#pragma GCC unroll 4
    for (int slot = 0; slot < 16; slot += 4) {  // two groups
      const __m512i kept = _mm512_permutexvar_epi8(transpose, _mm512_loadu_si512(values + slot * kBlockRows));
      prefetch(values, slot, kNearBytes);
      // A permute looks at the lower four bits.
      const __m512i first = _mm512_permutexvar_epi32(_mm512_srli_epi32(indices, 2 * slot), shuffles);
      const __m512i second = _mm512_permutexvar_epi32(_mm512_srli_epi32(indices, 2 * slot + 4), shuffles);
      uint8_t* to = tile + slot / 2 * kTileRowBytes;
      _mm512_store_si512(to, _mm512_shuffle_epi8(kept, _mm512_or_si512(first, lanes())));
      _mm512_store_si512(to + kTileRowBytes, _mm512_shuffle_epi8(kept, _mm512_or_si512(second, second_lanes)));
    }
  }

  const int64_t chunks_;  // of a block
};

// sums[b] = x W[b]^T for kBlocks blocks, which read the activations once.
//
//   block    the first block of the weight; the next one is block_bytes on
//   decoded  tiles [2][2], of which a step uses one pair while the next step's is written
//   x        tiles [steps], each of tile_bytes
//   sums     int32 tiles [2], each of tile_bytes
template <int kBlocks>
[[gnu::noinline]] void multiply_integers(const DecodeBytes& decode, const uint8_t* block, int64_t block_bytes,
                                         int64_t steps, uint8_t* decoded, const uint8_t* x, int64_t tile_bytes,
                                         int32_t* sums) {
  const auto decode_step = [&](int64_t step) {
    uint8_t* to = decoded + step % 2 * 2 * kWeightTileBytes;
    decode(block, step, to);
    if constexpr (kBlocks > 1) decode(block + block_bytes, step, to + kWeightTileBytes);
  };
  _tile_zero(0);
  _tile_zero(1);
  decode_step(0);
  for (int64_t s = 0; s < steps; ++s) {
    between_writes_and_tile_loads();
    if (s + 1 < steps) decode_step(s + 1);  // ahead: what was stored just now cannot be read yet
    between_writes_and_tile_loads();
    const uint8_t* w = decoded + s % 2 * 2 * kWeightTileBytes;
    _tile_loadd(4, x + s * tile_bytes, kTileRowBytes);
    _tile_loadd(6, w, kTileRowBytes);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, w + kWeightTileBytes, kTileRowBytes);
      _tile_dpbssd(1, 4, 7);
    }
  }
  _tile_stored(0, sums, kTileRowBytes);
  if constexpr (kBlocks > 1) _tile_stored(1, sums + tile_bytes / 4, kTileRowBytes);
}

class AmxIntegers {
 public:
  static bool covers(const NMLinear& call) {
    return call.act_dtype == MASKPRO_BF16 && call.weight_dtype == MASKPRO_I8 && call.n == 2 && call.m == 4 &&
           call.tokens <= kIntegerTokens && call.in_features / 2 <= kIntegerKept;
  }

  explicit AmxIntegers(const NMLinear& call)
      : call_(call),
        sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype),
        decode_(sizes_.chunks),
        steps_((call.in_features + kIntegerColumns - 1) / kIntegerColumns),
        tile_bytes_(kDigits * call.tokens * kTileRowBytes) {}

  int32_t operator()() {
    float* scratch = thread_scratch(steps_ * tile_bytes_ / 4);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 2);
    x_ = reinterpret_cast<uint8_t*>(scratch);
    for (int64_t token = 0; token < call_.tokens; ++token) split(token);  // faster than threads meet at a barrier
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      alignas(64) uint8_t decoded[2 * 2 * kWeightTileBytes];
      alignas(64) int32_t sums[2 * 16 * kBlockRows];
      const ConfiguredTiles tiles(kDigits * call_.tokens);
      for (int64_t block, end; shares.take(thread, 1, &block, &end);) {
        const bool two = end - block > 1;
        const uint8_t* weight = call_.weight + block * sizes_.block_bytes;
        kMultiply[two](decode_, weight, sizes_.block_bytes, steps_, decoded, x_, tile_bytes_, sums);
        store(block, sums);
        if (two) store(block + 1, sums + tile_bytes_ / 4);
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr decltype(&multiply_integers<1>) kMultiply[2] = {multiply_integers<1>, multiply_integers<2>};

  // Writes one token's digits.
  void split(int64_t token) {
    const BF16* x = static_cast<const BF16*>(call_.x) + token * call_.in_features;
    __m512i largest = _mm512_setzero_si512();
    for (int64_t column = 0; column < call_.in_features; column += 32) {
      const __m512i some = _mm512_maskz_loadu_epi16(first_columns(call_.in_features - column), x + column);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(some, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i odd = _mm512_srli_epi32(largest, 16), even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
    const int32_t bits = static_cast<int32_t>(_mm512_reduce_max_epu32(_mm512_max_epu32(odd, even)));
    // The exponent of the largest; one more if its eight bits are ones, whose quotient by s would be more than the digits
    // 127, 127, 127; at least what leaves s a normal number.
    const int32_t exponent = (bits + 1) >> 7 > 23 ? (bits + 1) >> 7 : 23;
    const bool finite = bits < 0x7f80;
    scale_[token] = finite ? power_of_two(exponent - 22) : __builtin_nanf("");
    const __m512 inverse = finite ? _mm512_set1_ps(power_of_two(276 - exponent)) : _mm512_setzero_ps();
    for (int64_t column = 0; column < steps_ * kIntegerColumns; column += 16) {
      const int64_t rest = call_.in_features - column;
      __m256i some = _mm256_setzero_si256();
      if (rest > 0) some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_columns(rest)), x + column);
      const __m512i wide = _mm512_cvtepu16_epi32(some);
      const __m512 quotients = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), inverse);
      // Adding 128 to every digit carries what is above 127 to the next.
      const __m512i carry = _mm512_set1_epi32(0x808080);
      const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(quotients), carry), carry);
      uint8_t* to = x_ + column / kIntegerColumns * tile_bytes_ + token * kTileRowBytes + column % kIntegerColumns;
      store_bytes(to, digits);
      store_bytes(to + call_.tokens * kTileRowBytes, _mm512_srli_epi32(digits, 8));
      store_bytes(to + 2 * call_.tokens * kTileRowBytes, _mm512_srli_epi32(digits, 16));
    }
  }

  static void store_bytes(uint8_t* to, __m512i lanes) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(lanes));
  }

  // 2^(exponent - 127)
  static float power_of_two(int32_t exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Sums [digit][token][16] to outputs.
  void store(int64_t block, const int32_t* sums) const {
    const BlockOutputs<Avx512, BF16> to(call_, block);
    const __m512 base = _mm512_set1_ps(256.0F);
    for (int64_t t = 0; t < call_.tokens; ++t) {
      __m512 sum = _mm512_setzero_ps();
      for (int digit = kDigits - 1; digit >= 0; --digit) {
        const __m512i own = _mm512_load_si512(sums + (digit * call_.tokens + t) * kBlockRows);
        sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(own));
      }
      alignas(64) float outputs[kBlockRows];
      _mm512_store_ps(outputs, _mm512_mul_ps(sum, _mm512_set1_ps(scale_[t])));
      to.store(t, outputs);
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
  const DecodeBytes decode_;
  const int64_t steps_;  // of 64 columns
  const int64_t tile_bytes_;
  uint8_t* x_ = nullptr;
  float scale_[kIntegerTokens];
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_AMX_INT8_H_
