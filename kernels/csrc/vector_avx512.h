// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL, VBMI2) and BMI2.
//
// vpexpandw and vpexpandd (VBMI2, F) are the inverse of packing: they deal consecutive elements to the
// lanes whose mask bit is set and zero the rest, so every N:M pattern costs the same. A step is 32
// columns, the words of a register. Thirty-two bfloat16 become two vectors of float32 by a shift and an
// AND, but the even columns and the odd: activations are then stored in that order.
#ifndef MASKPRO_VECTOR_AVX512_H_
#define MASKPRO_VECTOR_AVX512_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "element_types.h"

namespace maskpro {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kStepVectors = 2;
  static constexpr int kTileTokens = 6;     // 6 tokens x 4 rows = 24 of 32 registers hold sums
  static constexpr int kDirectTokens = 18;  // measured: beyond this it is faster to expand a weight once
  static constexpr int kOuterRows = 12;     // 12 rows x 2 vectors of tokens = 24 of 32 registers hold sums

  // Whether the lanes of a step of bfloat16 weights are its even columns, then its odd ones.
  static constexpr bool kEvenOddBF16 = true;

  // Whether every step keeps the same number of weights, at most half: then a row is walked by a constant
  // stride instead of by counting bits, and half a register of words is loaded.
  static bool regular(int32_t n, int32_t m) { return 2 * n <= m; }

  // How many values expand() may read from where it is pointed.
  template <bool kRegular>
  static constexpr int kWindow = 2 * kLanes;

  static uint32_t bits(const uint8_t* row, int64_t step) {
    uint32_t bits;
    memcpy(&bits, row + 4 * step, sizeof bits);
    return bits;
  }
  // The row's last bits: `count` of them, the others zero.
  static uint32_t last_bits(const uint8_t* row, int64_t step, int64_t count) {
    uint32_t bits = 0;
    memcpy(&bits, row + 4 * step, static_cast<size_t>(count + 7) / 8);
    return bits;
  }

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }

  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
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

  // Parts the 32 columns of a step, given as two vectors, into even and odd ones.
  static void part_even_odd(Vec (&v)[kStepVectors]) {
    const __m512i even = _mm512_add_epi32(lane_numbers(), lane_numbers());
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const Vec odds = _mm512_permutex2var_ps(v[0], odd, v[1]);
    v[0] = _mm512_permutex2var_ps(v[0], even, v[1]);
    v[1] = odds;
  }

  template <bool kRegular, class Weight>
  static void expand(const Weight* p, uint32_t bits, int64_t, Vec (&w)[kStepVectors]) {
    if constexpr (sizeof(Weight) == 4) {
      w[0] = _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load(p));
      w[1] = _mm512_maskz_expand_ps(static_cast<__mmask16>(bits >> 16), load(p + count(bits & 0xffff)));
    } else {
      widen(expand_words(load_words<kRegular>(p), bits), w, p);
    }
  }

  // As expand(), but reads only the values that the bits keep.
  template <class Weight>
  static void expand_exact(const Weight* p, uint32_t bits, Vec (&w)[kStepVectors]) {
    if constexpr (sizeof(Weight) == 4) {
      w[0] = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits), p);
      w[1] = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits >> 16), p + count(bits & 0xffff));
    } else {
      const __mmask32 kept = _bzhi_u32(~0u, static_cast<uint32_t>(count(bits)));
      widen(expand_words(_mm512_maskz_loadu_epi16(kept, p), bits), w, p);
    }
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

  static __m512i lane_numbers() {
    return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  }

  template <bool kRegular>
  static __m512i load_words(const void* p) {
    if constexpr (kRegular) return _mm512_castsi256_si512(load256(p));
    return _mm512_loadu_si512(p);
  }

  // In place: with another destination, Zen 4 waits for that register's last value, eight cycles a time.
  static __m512i expand_words(__m512i words, uint32_t bits) {
    asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(words) : "Yk"(static_cast<__mmask32>(bits)));
    return words;
  }

  // A bfloat16 is the upper half of a float32.
  static void widen(__m512i words, Vec (&w)[kStepVectors], const BF16*) {
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void widen(__m512i words, Vec (&w)[kStepVectors], const F16*) {
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
  }
};

}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX512_H_
