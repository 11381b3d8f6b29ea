// Eight float32 lanes of AVX2 with FMA and F16C.
//
// AVX2 has no expand instruction. Sixteen-bit weights are dealt to their columns by vpshufb, eight columns in each half
// of a register, with a table row chosen by a byte of bitmask; sixteen bfloat16 then become two vectors of float32 by a
// shift and an AND, but the even columns and the odd: activations are stored in that order. For float32 weights vpermps
// does the same eight columns at a time.
#ifndef MASKPRO_VECTOR_AVX2_H_
#define MASKPRO_VECTOR_AVX2_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "element_types.h"

namespace maskpro {

struct ExpandTables {
  // Bytes of the value that belongs in each of eight words; the high bit makes vpshufb write zero.
  alignas(64) uint8_t words[256][16];
  // The value that belongs in each lane; -1 marks an empty one: vpermps takes its low three bits, vblendvps its sign.
  alignas(64) int32_t lanes[256][8];

  constexpr ExpandTables() : words(), lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      int rank = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = bits >> lane & 1;
        words[bits][2 * lane] = static_cast<uint8_t>(kept ? 2 * rank : 0x80);
        words[bits][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * rank + 1 : 0x80);
        lanes[bits][lane] = kept ? rank : -1;
        rank += kept;
      }
    }
  }
};

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kStepVectors = 2;
  static constexpr int kTileTokens = 3;    // 3 tokens x 4 rows = 12 of 16 registers hold sums
  static constexpr int kDirectTokens = 9;  // measured: beyond this it is faster to expand a weight once
  static constexpr int kOuterRows = 6;     // 6 rows x 2 vectors of tokens = 12 of 16 registers hold sums

  // Whether every byte of bitmask keeps the same number of weights: then a row is walked by constant strides.
  static bool regular(int32_t, int32_t m) { return m <= kLanes; }

  // Whether the lanes of a step of bfloat16 weights are its even columns, then its odd ones.
  static constexpr bool kEvenOddBF16 = true;

  // How many values expand() may read from where it is pointed.
  template <bool kRegular>
  static constexpr int kWindow = 2 * kLanes;

  static uint32_t bits(const uint8_t* row, int64_t step) {
    uint16_t bits;
    memcpy(&bits, row + 2 * step, sizeof bits);
    return bits;
  }
  // The row's last bits: `count` of them, the others zero.
  static uint32_t last_bits(const uint8_t* row, int64_t step, int64_t count) {
    uint16_t bits = 0;
    memcpy(&bits, row + 2 * step, static_cast<size_t>(count + 7) / 8);
    return bits;
  }

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }

  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const BF16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static void store(F16* p, Vec v) {
    const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  // Rounds to nearest even; a NaN is made quiet, lest rounding carry it to infinity.
  static void store(BF16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i words = _mm256_srli_epi32(
        _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
    const __m128i low = _mm256_castsi256_si128(words);
    const __m128i packed = _mm_packus_epi32(low, _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }

  // Parts the 16 columns of a step, given as two vectors, into even and odd ones.
  static void part_even_odd(Vec (&v)[kStepVectors]) {
    const Vec low = _mm256_permute2f128_ps(v[0], v[1], 0x20);
    const Vec high = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[0] = _mm256_shuffle_ps(low, high, 0x88);
    v[1] = _mm256_shuffle_ps(low, high, 0xdd);
  }

  template <bool kRegular, class Weight>
  static void expand(const Weight* p, uint32_t bits, int64_t per_step, Vec (&w)[kStepVectors]) {
    const Weight* high = p + (kRegular ? per_step / 2 : count(bits & 0xff));
    if constexpr (sizeof(Weight) == 4) {
      w[0] = deal(p, bits & 0xff);
      w[1] = deal(high, bits >> 8);
    } else {
      // Rows of the table are 16 bytes apart, more than an address scales by.
      const uint8_t* table = kTables.words[0];
      const __m256i places = halves(table + (bits << 4 & 0xff0), table + (bits >> 4 & 0xff0));
      widen(_mm256_shuffle_epi8(halves(p, high), places), w, p);
    }
  }

  // As expand(), but reads only the values that the bits keep.
  template <class Weight>
  static void expand_exact(const Weight* p, uint32_t bits, Vec (&w)[kStepVectors]) {
    Weight values[2 * kWindow<false>] = {};
    memcpy(values, p, static_cast<size_t>(count(bits)) * sizeof(Weight));
    expand<false>(values, bits, 0, w);
  }

  static int count(uint32_t bits) { return _mm_popcnt_u32(bits); }

  // sums[i] += the sum of v[i]'s lanes. Two transposing steps sum four vectors at the price of one.
  static void accumulate(float* sums, const Vec (&v)[4]) {
    const Vec ab = add(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const Vec cd = add(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const Vec abcd = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    const __m128 total = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
  }

 private:
  static constexpr ExpandTables kTables{};

  static Vec from_bf16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }

  static __m256i halves(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
  }

  static Vec deal(const float* p, uint32_t bits) {
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.lanes[bits]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(p), lanes), zero(), _mm256_castsi256_ps(lanes));
  }

  // A bfloat16 is the upper half of a float32.
  static void widen(__m256i words, Vec (&w)[kStepVectors], const BF16*) {
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void widen(__m256i words, Vec (&w)[kStepVectors], const F16*) {
    w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    w[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  }
};

}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX2_H_
