// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL): a slot of a block is a register.
#ifndef MASKPRO_VECTOR_AVX512_H_
#define MASKPRO_VECTOR_AVX512_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "element_types.h"
#include "interleaved.h"

namespace maskpro {
namespace {  // every file that includes it is compiled with flags of its own

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileTokens = 8;   // 8 of 32 registers hold sums
  // By index_bits; beyond this many, tokens in lanes are faster.
  static constexpr int64_t few_tokens(int32_t bits) {
    return bits == 0 ? 32 : bits == 2 ? 16 : bits == 3 ? 16 : bits == 4 ? 16 : 8;
  }
  static constexpr bool kPairs = false;  // nm_linear_pairs.h
  static constexpr bool kUnrollSlots = true;
  static constexpr int kColumnShift = 8;  // nm_linear_many.h: a column of a tile is 4 vectors

  using Indices = __m512i;
  static constexpr int kVectors = kBlockRows / kLanes;

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

  static void load_indices(const uint8_t* p, Indices (&indices)[kVectors]) { indices[0] = _mm512_loadu_si512(p); }

  // Slot j of a chunk's values.
  static void load_slot(const float* p, int j, Vec (&w)[kVectors]) { w[0] = load(p + j * kBlockRows); }
  static void load_slot(const F16* p, int j, Vec (&w)[kVectors]) { w[0] = load(p + j * kBlockRows); }
  // A bfloat16 is the upper half of a float32.
  static void load_slot(const BF16* p, int j, Vec (&w)[kVectors]) {
    const __m512i pairs = _mm512_loadu_si512(p + j / 2 * 2 * kBlockRows);
    const __m512i bits = j % 2 == 0 ? _mm512_slli_epi32(pairs, 16)
                                    : _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    w[0] = _mm512_castsi512_ps(bits);
  }
  static void load_slot(const int8_t* p, int j, Vec (&w)[kVectors]) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * kBlockRows));
    w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }

  // The permutation of bytes that takes byte r of four slots of sixteen rows each to the lane of row r.
  static __m512i bytes_by_row() {
    const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(_mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01010101)), _mm512_set1_epi32(0x30201000));
  }

  // Each lane's own of a group's activations: by index j of its row, or the only one. A permute ignores the bits above
  // its own, which belong to the next slots; for groups of eight, twice over, bit 3 chooses between equals.
  template <int kBits>
  static Vec pick(const float* group, Indices indices, int j) {
    if constexpr (kBits == 0) {
      return broadcast(group);
    } else {
      const __m512i index = _mm512_srli_epi32(indices, static_cast<unsigned>(j * kBits));
      if constexpr (kBits == 2) {
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(group)), index);
      } else if constexpr (kBits == 3) {
        return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(group)));
      } else if constexpr (kBits == 4) {
        return _mm512_permutexvar_ps(index, load(group));
      } else {
        static_assert(kBits == 5);
        return _mm512_permutex2var_ps(load(group), index, load(group + kLanes));
      }
    }
  }

  // Entries {weight, offset} of nm_linear_many.h for consecutive rows; an offset is (base + index j) * bytes of a
  // column.
  template <int kBits>
  static void store_entries(float* to, Vec w, Indices indices, int j, int32_t base) {
    __m512i column = _mm512_set1_epi32(base);
    if constexpr (kBits > 0) {
      const __m512i index = _mm512_srli_epi32(indices, static_cast<unsigned>(j * kBits));
      column = _mm512_add_epi32(column, _mm512_and_si512(index, _mm512_set1_epi32((1 << kBits) - 1)));
    }
    const Vec offsets = _mm512_castsi512_ps(_mm512_slli_epi32(column, kColumnShift));
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    store(to, _mm512_permutex2var_ps(w, low, offsets));
    store(to + kLanes, _mm512_permutex2var_ps(w, high, offsets));
  }

 private:
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX512_H_
