// AVX-512 with products of bfloat16 pairs (AVX512_BF16): a lane of a register is a pair, two multiply-adds a lane.
//
// VDPBF16PS adds a.first * b.first and a.second * b.second to a float32: products are exact, each sum is rounded to
// nearest even. It takes subnormal operands for zero, and flushes subnormal sums to it.
#ifndef MASKPRO_VECTOR_AVX512_BF16_H_
#define MASKPRO_VECTOR_AVX512_BF16_H_

#include "vector_avx512.h"

namespace maskpro {
namespace {  // every file that includes it is compiled with flags of its own

struct Avx512BF16 : Avx512 {
  static constexpr int kTileTokens = 16;  // 16 of 32 registers hold sums

  static constexpr bool kPairs = true;

  using Pairs = __m512bh;

  // acc + the sum of both products.
  static Vec dot(Pairs a, Pairs b, Vec acc) { return _mm512_dpbf16_ps(acc, a, b); }

  static Pairs load_pairs(const BF16* p) { return (__m512bh)_mm512_loadu_si512(p); }

  // Two slots of sixteen rows. An integer of 8 bits is a bfloat16: the lower half of its float32 is 0.
  static Pairs load_pairs(const int8_t* p) {
    const __m512i first = bits_of(p);
    const __m512i second = bits_of(p + kBlockRows);
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(first, 16), second);
  }

  // The indices of the slots 2 * pair and 2 * pair + 1 of each lane's row, and other bits above them.
  template <int kBits>
  static __m512i places(Indices indices, int pair) {
    const unsigned shift = static_cast<unsigned>(2 * pair * kBits);
    const __m512i first = _mm512_srli_epi32(indices, shift);
    const __m512i second = shift + kBits < 16 ? _mm512_slli_epi32(indices, 16 - shift - kBits)
                                              : _mm512_srli_epi32(indices, shift + kBits - 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, first, second);
  }

  // The same within a line, whose columns `firsts` begin the groups of the two slots: 16 bits each.
  template <int kBits>
  static __m512i within_line(__m512i places, int32_t firsts) {
    constexpr int kAndThenOr = 0xea;
    return _mm512_ternarylogic_epi32(places, _mm512_set1_epi16((1 << kBits) - 1), _mm512_set1_epi32(firsts),
                                     kAndThenOr);
  }
  static constexpr int64_t kLine = 32;

  // Each lane's own two of a line of activations, of a group of four, or the two that all lanes share. (From lines 5.3
  // products a ns on a Zen 5 core; 3.5 where groups of eight or sixteen are broadcast, 3.8 where 64 bytes are read from
  // where a group begins, mostly of two lines.)
  template <int kBits, bool kLines>
  static Pairs pick_pairs(const BF16* from, __m512i places) {
    if constexpr (kLines) {
      return (__m512bh)_mm512_permutexvar_epi16(places, _mm512_loadu_si512(from));
    } else if constexpr (kBits == 0) {
      return broadcast_pair(from);
    } else {
      static_assert(kBits == 2);
      const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return (__m512bh)_mm512_permutexvar_epi16(places, _mm512_broadcastq_epi64(four));  // ignores the bits above
    }
  }

  static Pairs broadcast_pair(const BF16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }

 private:
  static __m512i bits_of(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_VECTOR_AVX512_BF16_H_
