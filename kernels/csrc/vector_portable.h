// Four float32 lanes in plain C++ (GNU vector types: SSE2, NEON or scalars, as the compiler targets).
#ifndef MASKPRO_VECTOR_PORTABLE_H_
#define MASKPRO_VECTOR_PORTABLE_H_

#include <stdint.h>
#include <string.h>

#include "element_types.h"

namespace maskpro {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kStepVectors = 1;
  static constexpr int kTileTokens = 2;    // 2 tokens x 4 rows = 8 of 16 registers hold sums
  static constexpr int kDirectTokens = 2;  // measured: beyond this it is faster to expand a weight once
  static constexpr int kOuterRows = 6;     // 6 rows x 2 vectors of tokens = 12 of 16 registers hold sums

  // Whether every nibble of bitmask keeps the same number of weights.
  static bool regular(int32_t, int32_t m) { return m == kLanes; }

  // Whether the lanes of a step of bfloat16 weights are its even columns, then its odd ones.
  static constexpr bool kEvenOddBF16 = false;

  // How many values expand() may read from where it is pointed.
  template <bool kRegular>
  static constexpr int kWindow = kLanes;

  static uint32_t bits(const uint8_t* row, int64_t step) { return row[step >> 1] >> (4 * (step & 1)) & 15u; }
  static uint32_t last_bits(const uint8_t* row, int64_t step, int64_t) { return bits(row, step); }

  static Vec zero() { return Vec{}; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec add(Vec a, Vec b) { return a + b; }

  static Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
  template <class Element>
  static Vec load(const Element* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  template <class Element>
  static void store(Element* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
  }

  // No branch and no select: the bits are as good as random to a branch predictor.
  template <bool kRegular, class Weight>
  static void expand(const Weight* p, uint32_t bits, int64_t, Vec (&w)[kStepVectors]) {
    const uint32_t rank1 = bits & 1;
    const uint32_t rank2 = rank1 + (bits >> 1 & 1);
    const uint32_t rank3 = rank2 + (bits >> 2 & 1);
    const Vec dealt{to_float(p[0]), to_float(p[rank1]), to_float(p[rank2]), to_float(p[rank3])};
    const int32_t word = static_cast<int32_t>(bits);
    const Lanes kept = (Lanes{word, word, word, word} & Lanes{1, 2, 4, 8}) != 0;
    w[0] = reinterpret_cast<Vec>(reinterpret_cast<Lanes>(dealt) & kept);
  }
  // As expand(), but reads only the values that the bits keep.
  template <class Weight>
  static void expand_exact(const Weight* p, uint32_t bits, Vec (&w)[kStepVectors]) {
    Weight values[kLanes] = {};
    memcpy(values, p, static_cast<size_t>(count(bits)) * sizeof(Weight));
    expand<false>(values, bits, 0, w);
  }

  static int count(uint32_t bits) {
    bits -= bits >> 1 & 5;
    return static_cast<int>((bits & 3) + (bits >> 2));
  }

  // sums[i] += the sum of v[i]'s lanes.
  static void accumulate(float* sums, const Vec (&v)[4]) {
    for (int i = 0; i < 4; ++i) sums[i] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  }

 private:
  typedef int32_t Lanes __attribute__((vector_size(16)));

  static float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
  static uint32_t to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
  }

  static float to_float(float f) { return f; }
  static float to_float(BF16 h) { return from_bits(static_cast<uint32_t>(h.bits) << 16); }
  static float to_float(F16 h) {
    const uint32_t magnitude = h.bits & 0x7fffu;
    const uint32_t sign = (h.bits & 0x8000u) << 16;
    // A subnormal counts units of 2^-24, which are the last place of a float32 in [0.5, 1).
    const uint32_t subnormal = to_bits(from_bits(0x3f000000u + magnitude) - 0.5f);
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    return from_bits(sign | (magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special));
  }

  // Both round to nearest even, and keep a NaN a (quiet) NaN.
  static void from_float(float f, float* p) { *p = f; }
  static void from_float(float f, BF16* p) {
    const uint32_t bits = to_bits(f);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
    p->bits = static_cast<uint16_t>((f != f ? bits | 0x400000u : rounded) >> 16);
  }
  static void from_float(float f, F16* p) {
    const uint32_t sign = to_bits(f) >> 16 & 0x8000u;
    const uint32_t magnitude = to_bits(f) & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest and the next
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: let the addition round to units of 2^-24
      half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
  }
};

}  // namespace maskpro

#endif  // MASKPRO_VECTOR_PORTABLE_H_
