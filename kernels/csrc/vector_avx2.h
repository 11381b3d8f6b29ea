// Eight float32 lanes of AVX2 with FMA and F16C.
//
// AVX2 has no expand instruction. vpermps with a table row chosen by a byte of bitmask does the same:
// lane k of row b names the value that belongs in lane k, or lane 7 where b keeps nothing.
#ifndef MASKPRO_VECTOR_AVX2_H_
#define MASKPRO_VECTOR_AVX2_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "element_types.h"

namespace maskpro {

struct ExpandTable {
  // -1 marks an empty lane: vpermps takes its low three bits, lane 7, and vblendvps its sign.
  alignas(32) int32_t lanes[256][8];

  constexpr ExpandTable() : lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      int rank = 0;
      for (int lane = 0; lane < 8; ++lane) lanes[bits][lane] = (bits >> lane & 1) ? rank++ : -1;
    }
  }
};

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kStepVectors = 1;
  static constexpr int kTileTokens = 3;     // 3 tokens x 4 rows = 12 of 16 registers hold sums
  static constexpr int kDirectTokens = 9;  // measured: beyond this a panel is faster

  // Whether every byte of bitmask keeps the same number of weights, at most four: then the upper half
  // of the loaded values can be zero, and lane 7 serves the empty lanes without a blend.
  static bool regular(int32_t n, int32_t m) { return m <= kLanes && kLanes / m * n <= 4; }

  // Whether the lanes of a step of bfloat16 weights are its even columns, then its odd ones.
  static constexpr bool kEvenOddBF16 = false;

  // How many values expand() may read from where it is pointed.
  template <bool kRegular>
  static constexpr int kWindow = kRegular ? 4 : 8;

  static uint32_t bits(const uint8_t* row, int64_t step) { return row[step]; }
  static uint32_t last_bits(const uint8_t* row, int64_t step, int64_t) { return row[step]; }

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }

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

  template <bool kRegular, class Weight>
  static void expand(const Weight* p, uint32_t bits, Vec (&w)[kStepVectors]) {
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTable.lanes[bits]));
    if constexpr (kRegular) {
      w[0] = _mm256_permutevar8x32_ps(load_low(p), lanes);
    } else {
      const Vec dealt = _mm256_permutevar8x32_ps(load(p), lanes);
      w[0] = _mm256_blendv_ps(dealt, zero(), _mm256_castsi256_ps(lanes));
    }
  }

  // As expand(), but reads only the values that the bits keep.
  template <class Weight>
  static void expand_exact(const Weight* p, uint32_t bits, Vec (&w)[kStepVectors]) {
    Weight values[kLanes] = {};
    memcpy(values, p, static_cast<size_t>(count(bits)) * sizeof(Weight));
    expand<false>(values, bits, w);
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
  static constexpr ExpandTable kTable{};

  static Vec from_bf16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }

  // Four values in the lower lanes, zero in the upper ones.
  static Vec load_low(const float* p) { return _mm256_zextps128_ps256(_mm_loadu_ps(p)); }
  static Vec load_low(const BF16* p) { return from_bf16(load64(p)); }
  static Vec load_low(const F16* p) { return _mm256_cvtph_ps(load64(p)); }
  static __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
};

}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX2_H_
