// Eight float32 lanes of AVX2 with FMA and F16C.
#ifndef MASKPRO_VECTOR_AVX2_H_
#define MASKPRO_VECTOR_AVX2_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "element_types.h"
#include "interleaved.h"

namespace maskpro {
namespace {  // every file that includes it is compiled with flags of its own

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileTokens = 4;   // 4 tokens x 16 rows = 8 of 16 registers hold sums
  // By index_bits; measured: beyond this many, tokens in lanes are faster.
  static constexpr int64_t few_tokens(int32_t bits) {
    return bits == 0 ? 32 : bits == 2 ? 16 : bits == 3 ? 8 : bits == 4 ? 4 : 4;
  }
  static constexpr bool kPairs = false;  // nm_linear_pairs.h
  static constexpr bool kUnrollSlots = true;
  static constexpr int kColumnShift = 7;  // nm_linear_many.h: a column of a tile is 4 vectors

  using Indices = __m256i;
  static constexpr int kVectors = kBlockRows / kLanes;

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

  static void load_indices(const uint8_t* p, Indices (&indices)[kVectors]) {
    indices[0] = load256(p);
    indices[1] = load256(p + 32);
  }

  // Slot j of a chunk's values, rows 0 to 7 and 8 to 15.
  static void load_slot(const float* p, int j, Vec (&w)[kVectors]) {
    w[0] = load(p + j * kBlockRows);
    w[1] = load(p + j * kBlockRows + kLanes);
  }
  static void load_slot(const F16* p, int j, Vec (&w)[kVectors]) {
    w[0] = load(p + j * kBlockRows);
    w[1] = load(p + j * kBlockRows + kLanes);
  }
  static void load_slot(const BF16* p, int j, Vec (&w)[kVectors]) {
    w[0] = half_of_pairs(p + j / 2 * 2 * kBlockRows, j % 2);
    w[1] = half_of_pairs(p + j / 2 * 2 * kBlockRows + kBlockRows, j % 2);
  }
  static void load_slot(const int8_t* p, int j, Vec (&w)[kVectors]) {
    w[0] = from_bytes(p + j * kBlockRows);
    w[1] = from_bytes(p + j * kBlockRows + kLanes);
  }

  // Each lane's own of a group's activations: by index j of its row, or the only one. A permute ignores the bits above
  // its own, which belong to the next slots.
  template <int kBits>
  static Vec pick(const float* group, Indices indices, int j) {
    if constexpr (kBits == 0) {
      return broadcast(group);
    } else {
      const __m256i index = _mm256_srli_epi32(indices, j * kBits);
      if constexpr (kBits == 2) {
        return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(group)), index);
      } else if constexpr (kBits == 3) {
        return permute(group, index);
      } else if constexpr (kBits == 4) {
        return choose(permute(group, index), permute(group + 8, index), _mm256_slli_epi32(index, 28));
      } else {
        static_assert(kBits == 5);
        const __m256i bit3 = _mm256_slli_epi32(index, 28);
        const Vec low = choose(permute(group, index), permute(group + 8, index), bit3);
        const Vec high = choose(permute(group + 16, index), permute(group + 24, index), bit3);
        return choose(low, high, _mm256_slli_epi32(index, 27));
      }
    }
  }

  // Entries {weight, offset} of nm_linear_many.h for consecutive rows; an offset is (base + index j) * bytes of a
  // column.
  template <int kBits>
  static void store_entries(float* to, Vec w, Indices indices, int j, int32_t base) {
    __m256i column = _mm256_set1_epi32(base);
    if constexpr (kBits > 0) {
      const __m256i index = _mm256_srli_epi32(indices, j * kBits);
      column = _mm256_add_epi32(column, _mm256_and_si256(index, _mm256_set1_epi32((1 << kBits) - 1)));
    }
    const Vec offsets = _mm256_castsi256_ps(_mm256_slli_epi32(column, kColumnShift));
    const Vec low = _mm256_unpacklo_ps(w, offsets);
    const Vec high = _mm256_unpackhi_ps(w, offsets);
    store(to, _mm256_permute2f128_ps(low, high, 0x20));
    store(to + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
  }

 private:
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  static Vec from_bf16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  // A bfloat16 is the upper half of a float32.
  static Vec half_of_pairs(const BF16* p, int half) {
    const __m256i pairs = load256(p);
    return _mm256_castsi256_ps(
        half == 0 ? _mm256_slli_epi32(pairs, 16)
                  : _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Vec from_bytes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  static Vec permute(const float* group, __m256i index) { return _mm256_permutevar8x32_ps(load(group), index); }
  // high where the sign bit is set.
  static Vec choose(Vec low, Vec high, __m256i sign) {
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
  }
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX2_H_
