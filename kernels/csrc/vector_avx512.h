// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL, VBMI2) and BMI2.
//
// vpexpandw and vpexpandd (VBMI2, F) are the inverse of packing: they deal consecutive elements to the
// lanes whose mask bit is set and zero the rest, so every N:M pattern costs the same.
#ifndef MASKPRO_VECTOR_AVX512_H_
#define MASKPRO_VECTOR_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

#include "element_types.h"

namespace maskpro {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileTokens = 6;     // 6 tokens x 4 rows = 24 of 32 registers hold sums
  static constexpr int kDirectTokens = 18;  // measured: beyond this a panel is faster

  // Whether every vector of a row keeps the same number of weights, so that a row is walked by a
  // constant step instead of by counting bits.
  static bool regular(int32_t, int32_t m) { return m <= kLanes; }

  // How many values expand() may read from where it is pointed.
  template <bool kRegular>
  static constexpr int kWindow = kLanes;

  static uint32_t bits(const uint8_t* row, int64_t vector) {
    const uint8_t* p = row + 2 * vector;
    return p[0] | static_cast<uint32_t>(p[1]) << 8;
  }

  // The row's last bits, of which `count` are backed by memory.
  static uint32_t last_bits(const uint8_t* row, int64_t vector, int64_t count) {
    return count > 8 ? bits(row, vector) : row[2 * vector];
  }

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const BF16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static Vec load(const F16* p) { return _mm512_cvtph_ps(load256(p)); }

  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void store(F16* p, Vec v) {
    store256(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounds to nearest even; a NaN is made quiet, lest rounding carry it to infinity.
  static void store(BF16* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    store256(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16)));
  }

  template <bool kRegular>
  static Vec expand(const float* p, uint32_t bits) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load(p));
  }
  template <bool kRegular>
  static Vec expand(const BF16* p, uint32_t bits) {
    return expand_bf16(load256(p), bits);
  }
  template <bool kRegular>
  static Vec expand(const F16* p, uint32_t bits) {
    return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(static_cast<__mmask16>(bits), load256(p)));
  }

  // As expand(), but reads only the values that the bits keep.
  static Vec expand_exact(const float* p, uint32_t bits) {
    return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits), p);
  }
  static Vec expand_exact(const BF16* p, uint32_t bits) {
    return expand_bf16(_mm256_maskz_loadu_epi16(first(_mm_popcnt_u32(bits)), p), bits);
  }
  static Vec expand_exact(const F16* p, uint32_t bits) {
    return _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi16(static_cast<__mmask16>(bits), p));
  }

  static int count(uint32_t bits) { return _mm_popcnt_u32(bits); }

  // sums[i] += the sum of v[i]'s lanes. Two transposing steps sum four vectors at the price of one.
  static void accumulate(float* sums, const Vec (&v)[4]) {
    const Vec ab = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Vec cd = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const Vec abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const Vec halves = add(abcd, _mm512_shuffle_f32x4(abcd, abcd, 0x4e));
    const Vec total = add(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), _mm512_castps512_ps128(total)));
  }

 private:
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

  // A bfloat16 is the upper half of a float32: deal the words to the odd positions, and no conversion
  // is left to do.
  static Vec expand_bf16(__m256i words, uint32_t bits) {
    const __mmask32 upper_halves = _pdep_u32(bits, 0xaaaaaaaa);
    return _mm512_castsi512_ps(_mm512_maskz_expand_epi16(upper_halves, _mm512_castsi256_si512(words)));
  }
};

}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX512_H_
