// Arithmetic in GNU vector types as wide as the instruction set that the file is compiled for.
//
// Everything here has internal linkage, because each file that includes it is compiled with its own flags. Where a
// product and a sum round once is written out (fma), and the compiler may not choose it elsewhere, so that every
// instruction set gives the same bits.
#ifndef MASKPRO_LANES_H_
#define MASKPRO_LANES_H_

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace maskpro {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));  // lanes 2i and 2i + 1 as one

[[gnu::always_inline]] inline Floats splat(float x) { return x - Floats{}; }
[[gnu::always_inline]] inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// a where the mask is -1, b where it is 0.
[[gnu::always_inline]] inline Floats select(Ints mask, Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)b, (__m512)a);
#elif defined(__AVX2__)
  return (Floats)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
  return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
#endif
}
[[gnu::always_inline]] inline Ints select(Ints mask, Ints a, Ints b) {
  return (Ints)select(mask, (Floats)a, (Floats)b);
}

[[gnu::always_inline]] inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  Floats sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}
[[gnu::always_inline]] inline Floats fma(Floats a, Floats b, float c) { return fma(a, b, splat(c)); }

// Turns m vectors that hold rows of m elements, one row after the other, into one vector per column. m is a power of
// two; `spare` has room for m vectors.
template <class Vec>
[[gnu::always_inline]] inline void rows_to_columns(Vec* v, Vec* spare, int m) {
  Ints even, odd;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int stride = 1; stride < m; stride *= 2) {
    for (int i = 0; i < m; i += 2) {
      spare[i / 2] = __builtin_shuffle(v[i], v[i + 1], even);
      spare[i / 2 + m / 2] = __builtin_shuffle(v[i], v[i + 1], odd);
    }
    for (int i = 0; i < m; ++i) v[i] = spare[i];
  }
}

// The inverse of rows_to_columns.
template <class Vec>
[[gnu::always_inline]] inline void columns_to_rows(Vec* v, Vec* spare, int m) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int stride = 1; stride < m; stride *= 2) {
    for (int i = 0; i < m; i += 2) {
      spare[i] = __builtin_shuffle(v[i / 2], v[i / 2 + m / 2], low);
      spare[i + 1] = __builtin_shuffle(v[i / 2], v[i / 2 + m / 2], high);
    }
    for (int i = 0; i < m; ++i) v[i] = spare[i];
  }
}

// For rows of four elements, four vectors of them to one vector per column, and back: the same shuffles do both. Shuffles
// inside 128 bits are the cheap ones, so the rows end up in an order of their own: row_of_lane().
template <class Vec>
[[gnu::always_inline]] inline void transpose_fours(Vec (&v)[4]) {
  Ints low, high, low_pairs, high_pairs;
  for (int i = 0; i < kLanes; ++i) {
    const int part = i / 4 * 4, place = i % 4;
    low[i] = part + place / 2 + place % 2 * kLanes;
    high[i] = low[i] + 2;
    low_pairs[i] = part + place % 2 + place / 2 * kLanes;
    high_pairs[i] = low_pairs[i] + 2;
  }
  const Vec a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[0], v[1], high);
  const Vec c = __builtin_shuffle(v[2], v[3], low), d = __builtin_shuffle(v[2], v[3], high);
  v[0] = __builtin_shuffle(a, c, low_pairs);
  v[1] = __builtin_shuffle(a, c, high_pairs);
  v[2] = __builtin_shuffle(b, d, low_pairs);
  v[3] = __builtin_shuffle(b, d, high_pairs);
}

// The row that a lane holds after transpose_fours().
inline int row_of_lane(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }

// e^x for x <= 0, to 2 units in the last place; from -87 down it stays at 2^-126 or so.
[[gnu::always_inline]] inline Floats exp_nonpositive(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  x = max(x, splat(-87.0f));
  const Floats shifted = fma(x, splat(1.44269504f), kMagic);
  const Floats whole = shifted - kMagic;
  // ln 2 in two parts, as one float is not enough of it.
  const Floats r = fma(whole, splat(1.42860677e-6f), fma(whole, splat(-0.693148613f), x));
  // Taylor to the seventh power: for |r| <= 0.35 the rest is under 2^-27.
  Floats p = splat(1.0f / 5040);
  p = fma(p, r, 1.0f / 720);
  p = fma(p, r, 1.0f / 120);
  p = fma(p, r, 1.0f / 24);
  p = fma(p, r, 1.0f / 6);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  const Ints power = (Ints)shifted - (Ints)splat(kMagic);
  return p * (Floats)((power + 127) << 23);
}

// The natural logarithm of a positive normal number, to 3 units in the last place.
[[gnu::always_inline]] inline Floats log_positive(Floats x) {
  const Ints bits = (Ints)x;
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Floats mantissa = (Floats)(bits - (exponent << 23));
  // log m = 2 atanh(s): a series in s^2, |s| <= 0.172, whose rest is under 2^-29.
  const Floats s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const Floats s2 = s * s;
  Floats p = splat(2.0f / 9);
  p = fma(p, s2, 2.0f / 7);
  p = fma(p, s2, 2.0f / 5);
  p = fma(p, s2, 2.0f / 3);
  p = fma(p, s2, 2.0f);
  return fma(__builtin_convertvector(exponent, Floats), splat(0.693147181f), p * s);
}

// The 64-bit product of the lower half of every pair with b. In words, the compiler would multiply all 64 bits.
[[gnu::always_inline]] inline Pairs multiply_even(Pairs a, uint32_t b) {
#if defined(__AVX512F__)
  return (Pairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

[[gnu::always_inline]] inline void multiply_wide(Words a, uint32_t b, Words* low, Words* high) {
  const Pairs even = multiply_even((Pairs)a, b);
  const Pairs odd = multiply_even((Pairs)a >> 32, b);
#if defined(__AVX2__) && !defined(__AVX512F__)
  *low = (Words)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
  *high = (Words)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xaa);
#else
  constexpr uint64_t kLower = 0xffffffffu;
  *low = (Words)((even & kLower) | odd << 32);
  *high = (Words)(even >> 32 | (odd & ~kLower));
#endif
}

// The middles of 2^23 intervals: exact in float32, neither 0 nor 1.
[[gnu::always_inline]] inline Floats uniform(Words words) {
  return (__builtin_convertvector((Ints)(words >> 9), Floats) + 0.5f) * 0x1p-23f;
}

// Philox 4x32-10 (Salmon et al., SC 2011): four random words from a counter and a key.
[[gnu::always_inline]] inline void philox(Words (&counter)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Words low0, high0, low1, high1;
    multiply_wide(counter[0], 0xd2511f53u, &low0, &high0);
    multiply_wide(counter[2], 0xcd9e8d57u, &low1, &high1);
    counter[0] = high1 ^ counter[1] ^ k0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ k1;
    counter[3] = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_LANES_H_
