// Four float32 lanes in plain C++ (GNU vector types: SSE2, NEON or scalars, as the compiler targets).
#ifndef MASKPRO_VECTOR_PORTABLE_H_
#define MASKPRO_VECTOR_PORTABLE_H_

#include <stdint.h>
#include <string.h>

#include "element_types.h"
#include "interleaved.h"

namespace maskpro {
namespace {  // every file that includes it is compiled with flags of its own

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTileTokens = 2;   // 2 tokens x 16 rows = 8 of 16 registers hold sums
  // By index_bits; measured: beyond this many, tokens in lanes are faster.
  static constexpr int64_t few_tokens(int32_t bits) {
    return bits == 0 ? 8 : bits == 2 ? 4 : bits == 3 ? 4 : bits == 4 ? 4 : 4;
  }
  static constexpr bool kPairs = false;  // nm_linear_pairs.h
  static constexpr bool kUnrollSlots = false;
  static constexpr int kColumnShift = 6;  // nm_linear_many.h: a column of a tile is 4 vectors

  typedef uint32_t Indices __attribute__((vector_size(16)));
  static constexpr int kVectors = kBlockRows / kLanes;

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

  static void load_indices(const uint8_t* p, Indices (&indices)[kVectors]) { memcpy(indices, p, sizeof indices); }

  template <class Element>
  static void load_slot(const Element* p, int j, Vec (&w)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) w[v] = load(p + j * kBlockRows + v * kLanes);
  }
  static void load_slot(const BF16* p, int j, Vec (&w)[kVectors]) {
    p += j / 2 * 2 * kBlockRows + j % 2;
    for (int v = 0; v < kVectors; ++v, p += 2 * kLanes) {
      w[v] = Vec{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])};
    }
  }

  // Each lane's own of a group's activations: by index j of its row, or the only one.
  template <int kBits>
  static Vec pick(const float* group, Indices indices, int j) {
    if constexpr (kBits == 0) return broadcast(group);
    const Indices index = indices >> (j * kBits) & ((1u << kBits) - 1);
    return Vec{group[index[0]], group[index[1]], group[index[2]], group[index[3]]};
  }

  // Entries {weight, offset} of nm_linear_many.h for consecutive rows; an offset is (base + index j) * bytes of a
  // column.
  template <int kBits>
  static void store_entries(float* to, Vec w, Indices indices, int j, int32_t base) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t index = kBits == 0 ? 0 : indices[i] >> (j * kBits) & ((1u << kBits) - 1);
      const int32_t offset = (base + static_cast<int32_t>(index)) * (1 << kColumnShift);
      to[2 * i] = w[i];
      memcpy(to + 2 * i + 1, &offset, sizeof offset);
    }
  }

 private:
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
  static float to_float(int8_t i) { return i; }
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

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_VECTOR_PORTABLE_H_
