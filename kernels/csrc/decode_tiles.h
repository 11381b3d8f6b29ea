// Expands a packed weight to tiles of bfloat16, [16 pairs of columns][16 rows][2], zeros included: for what multiplies
// pairs, or tiles of them (AMX).
//
// A decoder writes the tile of one step, the 32 columns from 32 * step on, of a block of rows. Columns past the
// weight's last are zeros. Of one that is kInPlace tiles lie in the weight itself; for AMX it says where, and writes
// only what is none. With AMX, up to its kFewTokens, measured, vectors are faster than tiles; mostly for more of them
// where values are int8, which take longer to expand than to read.
#ifndef MASKPRO_DECODE_TILES_H_
#define MASKPRO_DECODE_TILES_H_

#include <immintrin.h>
#include <stdint.h>

#include "interleaved.h"
#include "nm_linear.h"
#include "prefetch.h"
#include "vector_avx512_bf16.h"

namespace maskpro {
namespace {  // every file that includes it is compiled with flags of its own

constexpr int kTileRowBytes = 64;
constexpr int kTileSteps = 32;  // columns of a weight in a tile
constexpr int64_t kWeightTileBytes = 16 * kTileRowBytes;

// Where each lane's own four bytes begin, within the 16 that a shuffle of bytes chooses from.
inline __m512i lanes() { return _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0); }

// For every four bits of indices of kN kept columns of four, the shuffles of bytes that put a lane's values into the
// columns 0 and 1, and 2 and 3; one that names a byte from 128 on gives 0.
template <int kN>
struct ShufflesOfFour {
  alignas(64) uint32_t pairs[2][16] = {};

  constexpr ShufflesOfFour() {
    for (uint32_t code = 0; code < 16; ++code) {
      const uint32_t first = code & 3, second = kN == 2 ? code >> 2 : 4;
      for (uint32_t column = 0; column < 4; ++column) {
        const uint32_t word = column == first ? 0x0100u : column == second ? 0x0302u : 0x8080u;
        pairs[column / 2][code] |= word << (16 * (column % 2));
      }
    }
  }
};

// One or two of every four: what a lane keeps of a group becomes the lane of two pairs of columns.
template <class Weight, int kN>
class DecodeOfFour {
 public:
  static constexpr int64_t kFewTokens = kN == 2 ? 0 : sizeof(Weight) == 1 ? 8 : 6;
  static constexpr bool kInPlace = false;

  explicit DecodeOfFour(const NMLinear&) {}

  [[gnu::always_inline]] void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    constexpr int64_t kSlots = kTileSteps / 4 * kN;  // of a step: a chunk, or half of one
    const int64_t slot = step * kSlots % chunk_slots(2);
    const uint8_t* chunk = block + step * kSlots / chunk_slots(2) * chunk_bytes(2, sizeof(Weight));
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(2)) + slot * kBlockRows;
    const __m512i indices = _mm512_srlv_epi32(_mm512_loadu_si512(chunk), _mm512_set1_epi32(static_cast<int>(2 * slot)));
    const __m512i low = _mm512_load_si512(kShuffles.pairs[0]), high = _mm512_load_si512(kShuffles.pairs[1]);
    __builtin_prefetch(chunk + kNearBytes);
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const int pair = group * kN / 2 * 2;  // the slots that a lane has together
      const __m512i kept = (__m512i)Avx512BF16::load_pairs(values + pair * kBlockRows);
      if (group * kN % 2 == 0) prefetch(values, pair, kNearBytes);
      const __m512i lane = lanes() | _mm512_set1_epi8(group * kN % 2 == 0 ? 0 : 2);
      // A permute looks at the lower four bits.
      const __m512i code = _mm512_srli_epi32(indices, static_cast<unsigned>(2 * kN * group));
      const __m512i first = _mm512_or_si512(_mm512_permutexvar_epi32(code, low), lane);
      const __m512i second = _mm512_or_si512(_mm512_permutexvar_epi32(code, high), lane);
      _mm512_store_si512(tile + 2 * group * kTileRowBytes, _mm512_shuffle_epi8(kept, first));
      _mm512_store_si512(tile + (2 * group + 1) * kTileRowBytes, _mm512_shuffle_epi8(kept, second));
    }
  }

 private:
  static constexpr ShufflesOfFour<kN> kShuffles{};
};

// An even number of every eight, sixteen or thirty-two, known when this is compiled: which of the two slots of a lane goes
// to a pair of columns is compared, and so is the lane with its halves exchanged.
template <class Weight, int kN, int kM>
class DecodeEven {
 public:
  static constexpr int64_t kFewTokens = (kM == 8 && kN > 2 ? 3 : 6) + (sizeof(Weight) == 1 ? 2 : 0);
  static constexpr bool kInPlace = false;

  explicit DecodeEven(const NMLinear& call) : groups_(call.in_features / kM) {}

  [[gnu::noinline]] void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    constexpr int64_t kGroups = kTileSteps / kM;
    const int64_t rest = groups_ - step * kGroups;
    const int64_t slot = step * kGroups * kN;
    const uint8_t* chunk = block + slot / kSlots * kChunkBytes;
    int pair = static_cast<int>(slot % kSlots / 2);
    for (int64_t group = 0; group < kGroups; ++group) {
      __m512i columns[kM / 2] = {};
      if (group < rest) {
#pragma GCC unroll 16
        for (int k = 0; k < kN; k += 2) {
          add_pair(chunk, pair, k, columns);
          if (++pair < kSlots / 2) continue;
          chunk += kChunkBytes;
          pair = 0;
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kM / 2; ++i) _mm512_store_si512(tile + i * kTileRowBytes, columns[i]);
      tile += kM / 2 * kTileRowBytes;
    }
  }

 private:
  static constexpr int kBits = index_bits(kN, kM);
  static constexpr int kSlots = chunk_slots(kBits);
  static constexpr int64_t kChunkBytes = chunk_bytes(kBits, sizeof(Weight));

  // The k-th and the next kept value of every row's group.
  [[gnu::always_inline]] static void add_pair(const uint8_t* chunk, int pair, int k, __m512i (&columns)[kM / 2]) {
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
    const __m512i kept = (__m512i)Avx512BF16::load_pairs(values + 2 * pair * kBlockRows);
    prefetch(values, 2 * pair, kNearBytes);
    if (pair == 0) __builtin_prefetch(chunk + kNearBytes);
    const __m512i all = _mm512_loadu_si512(chunk);
    const __m512i first = _mm512_srlv_epi32(all, _mm512_set1_epi32(2 * pair * kBits));
    const __m512i second = _mm512_rorv_epi32(all, _mm512_set1_epi32((2 * pair + 1) * kBits - 16));
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, first, second);
    const __m512i places = _mm512_and_si512(both, _mm512_set1_epi16(kM - 1));
    const __m512i kept_exchanged = _mm512_rol_epi32(kept, 16), places_exchanged = _mm512_rol_epi32(places, 16);
    // k columns of the group are before the first, kN - 2 - k after the second.
#pragma GCC unroll 16
    for (int i = k / 2; i <= (kM - kN + k + 1) / 2; ++i) {
      const __m512i here = _mm512_set1_epi32(2 * i | (2 * i + 1) << 16);
      columns[i] = _mm512_mask_mov_epi16(columns[i], _mm512_cmpeq_epi16_mask(places, here), kept);
      columns[i] =
          _mm512_mask_mov_epi16(columns[i], _mm512_cmpeq_epi16_mask(places_exchanged, here), kept_exchanged);
    }
  }

  const int64_t groups_;
};

// Any other pattern: every slot's sixteen values go to those pairs of columns that its place in the group allows, under the
// mask of the lanes whose index says so.
template <class Weight, int kBits>
class DecodeAny {
 public:
  static constexpr int64_t kFewTokens = 16;
  static constexpr bool kInPlace = false;

  explicit DecodeAny(const NMLinear& call)
      : n_(call.n), m_(call.m), step_groups_(kTileSteps / call.m), groups_(call.in_features / call.m) {}

  [[gnu::noinline]] void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    for (int row = 0; row < 16; ++row) _mm512_store_si512(tile + row * kTileRowBytes, _mm512_setzero_si512());
    const int64_t rest = groups_ - step * step_groups_;
    const int64_t groups = rest < step_groups_ ? rest : step_groups_;
    const int64_t slot = step * step_groups_ * n_;
    const uint8_t* chunk = block + slot / kSlots * kChunkBytes;
    int j = static_cast<int>(slot % kSlots);
    for (int64_t group = 0; group < groups; ++group) {
      for (int32_t k = 0; k < n_; ++k) {
        spread(chunk, j, k, tile + group * (m_ / 2) * kTileRowBytes);
        if (++j < kSlots) continue;
        for (int64_t byte = 0; byte < kChunkBytes; byte += 64) __builtin_prefetch(chunk + kNearBytes + byte);
        chunk += kChunkBytes;
        j = 0;
      }
    }
  }

 private:
  static constexpr int kSlots = chunk_slots(kBits);
  static constexpr int64_t kChunkBytes = chunk_bytes(kBits, sizeof(Weight));

  // Slot j of a chunk, the k-th kept value of its group, whose columns begin at `tile`.
  void spread(const uint8_t* chunk, int j, int32_t k, uint8_t* tile) const {
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
    // In each lane's both halves.
    const __m512i pairs = (__m512i)Avx512BF16::load_pairs(values + j / 2 * 2 * kBlockRows);
    const __m512i half = _mm512_set1_epi32(j % 2 == 0 ? 0x01000100 : 0x03020302);
    const __m512i value = _mm512_shuffle_epi8(pairs, _mm512_or_si512(half, lanes()));
    const __m512i shifted = _mm512_srl_epi32(_mm512_loadu_si512(chunk), _mm_cvtsi32_si128(j * kBits));
    const __m512i index = _mm512_and_si512(shifted, _mm512_set1_epi32((1 << kBits) - 1));
    const __m512i indices = _mm512_or_si512(index, _mm512_slli_epi32(index, 16));
    // k columns of the group are before it, n - 1 - k after it.
    const int32_t first = k / 2, last = (m_ - n_ + k) / 2;
    for (int32_t pair = first; pair <= last; ++pair) {
      const __m512i columns = _mm512_set1_epi32(2 * pair | (2 * pair + 1) << 16);
      _mm512_mask_storeu_epi16(tile + pair * kTileRowBytes, _mm512_cmpeq_epi16_mask(indices, columns), value);
    }
  }

  const int32_t n_, m_;
  const int64_t step_groups_, groups_;
};

// For every four bits of two indices of a group that keeps three of four, shuffles of bytes as in ShufflesOfFour: those
// of its first and second value, for columns 0 and 1, and those of its second and third, for columns 2 and 3; for
// lanes that hold the two in order, and exchanged.
struct ShufflesOfThree {
  alignas(64) uint32_t first[2][16], second[2][16];

  constexpr ShufflesOfThree() : first(), second() {
    for (uint32_t exchanged = 0; exchanged < 2; ++exchanged) {
      const uint32_t none = 0x8080, early = exchanged ? 0x0302 : 0x0100, late = exchanged ? 0x0100 : 0x0302;
      for (uint32_t code = 0; code < 16; ++code) first[exchanged][code] = second[exchanged][code] = none | none << 16;
      first[exchanged][0 | 1 << 2] = early | late << 16;
      first[exchanged][0 | 2 << 2] = early | none << 16;
      first[exchanged][1 | 2 << 2] = none | early << 16;
      second[exchanged][2 | 3 << 2] = early | late << 16;
      second[exchanged][1 | 3 << 2] = none | late << 16;
      second[exchanged][1 | 2 << 2] = late | none << 16;
    }
  }
};

// Three of every four. Two groups have three lanes of pairs: one each for its own and one that they share.
template <class Weight>
class DecodeThreeOfFour {
 public:
  static constexpr int64_t kFewTokens = sizeof(Weight) == 1 ? 4 : 1;
  static constexpr bool kInPlace = false;

  explicit DecodeThreeOfFour(const NMLinear& call) : any_(call), groups_(call.in_features / 4) {}

  [[gnu::always_inline]] void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    if (groups_ - step * 8 < 8) return any_(block, step, tile);  // there may be no chunk to read its end from
    // A step has 24 slots, a chunk 16: an even step ends in the middle of its second chunk, where the next one begins.
    const uint8_t* chunk = block + step * 3 / 2 * kChunkBytes;
    const __m512i begin = _mm512_loadu_si512(chunk), end = _mm512_loadu_si512(chunk + kChunkBytes);
    const __m512i middle = _mm512_or_si512(_mm512_srli_epi32(begin, 16), _mm512_slli_epi32(end, 16));
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
    const Weight* more = reinterpret_cast<const Weight*>(chunk + kChunkBytes + chunk_index_bytes(kBits));
    if (step % 2 == 0) {
      spread(values, values + kEightSlots, more, begin, middle, tile);
    } else {
      spread(values + kEightSlots, more, more + kEightSlots, middle, end, tile);
    }
    __builtin_prefetch(chunk + kNearBytes);
    __builtin_prefetch(chunk + kChunkBytes + kNearBytes);
  }

 private:
  static constexpr int kBits = index_bits(3, 4);
  static constexpr int64_t kChunkBytes = chunk_bytes(kBits, sizeof(Weight));
  static constexpr int64_t kEightSlots = 8 * kBlockRows;
  static constexpr ShufflesOfThree kShuffles{};

  // A step from its slots 0 to 7, 8 to 15 and 16 to 23, and the indices of the sixteen slots from 0 and from 8 on.
  static void spread(const Weight* slots0, const Weight* slots8, const Weight* slots16, __m512i indices0,
                     __m512i indices8, uint8_t* tile) {
    const Weight* eights[3] = {slots0, slots8, slots16};
    const auto pair = [&](int i) {
      prefetch(eights[i / 4], i % 4 * 2, kNearBytes);
      return (__m512i)Avx512BF16::load_pairs(eights[i / 4] + i % 4 * 2 * kBlockRows);
    };
#pragma GCC unroll 4
    for (int twice = 0; twice < 4; ++twice) {
      const __m512i own = pair(3 * twice), shared = pair(3 * twice + 1), next_own = pair(3 * twice + 2);
      const __m512i indices =
          twice < 2 ? _mm512_srli_epi32(indices0, twice * 12) : _mm512_srli_epi32(indices8, twice * 12 - 16);
      // In both, the later of two values comes first.
      const __m512i ends = _mm512_mask_blend_epi16(0xaaaaaaaa, shared, own);
      const __m512i begins = _mm512_mask_blend_epi16(0xaaaaaaaa, next_own, shared);
      store(own, kShuffles.first[0], indices, tile);
      store(ends, kShuffles.second[1], _mm512_srli_epi32(indices, 2), tile + kTileRowBytes);
      store(begins, kShuffles.first[1], _mm512_srli_epi32(indices, 6), tile + 2 * kTileRowBytes);
      store(next_own, kShuffles.second[0], _mm512_srli_epi32(indices, 8), tile + 3 * kTileRowBytes);
      tile += 4 * kTileRowBytes;
    }
  }

  // A permute looks at the lower four bits of what tells two indices.
  [[gnu::always_inline]] static void store(__m512i pairs, const uint32_t (&shuffles)[16], __m512i code, uint8_t* to) {
    const __m512i shuffle = _mm512_permutexvar_epi32(code, _mm512_load_si512(shuffles));
    _mm512_store_si512(to, _mm512_shuffle_epi8(pairs, _mm512_or_si512(shuffle, lanes())));
  }

  const DecodeAny<Weight, kBits> any_;
  const int64_t groups_;
};

// Every column kept: the values of a step are a tile as they lie.
template <class Weight>
class DecodeDense {
 public:
  static constexpr int64_t kFewTokens = 0;
  static constexpr bool kInPlace = sizeof(Weight) == 2;

  explicit DecodeDense(const NMLinear& call) : pairs_((call.in_features + 15) / 16 * 8) {}

  // Where the step's tile lies: in the weight itself, but for half a tile at its end.
  template <bool kPrefetch>
  [[gnu::always_inline]] const uint8_t* find(const uint8_t* block, int64_t step, uint8_t* spare) const {
    if (pairs_ - step * 16 < 16) {
      (*this)(block, step, spare);
      return spare;
    }
    const uint8_t* place = block + step * kWeightTileBytes;
    if constexpr (kPrefetch) {
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) prefetch(reinterpret_cast<const Weight*>(place), 2 * row, kNearBytes);
    }
    return place;
  }

  void operator()(const uint8_t* block, int64_t step, uint8_t* tile) const {
    const Weight* values = reinterpret_cast<const Weight*>(block) + step * kTileSteps * kBlockRows;
    const int64_t rest = pairs_ - step * 16;
    for (int row = 0; row < 16; ++row) {
      __m512i pairs = _mm512_setzero_si512();
      if (row < rest) {
        pairs = (__m512i)Avx512BF16::load_pairs(values + 2 * row * kBlockRows);
        prefetch(values, 2 * row, kNearBytes);
      }
      _mm512_store_si512(tile + row * kTileRowBytes, pairs);
    }
  }

 private:
  const int64_t pairs_;  // in a block, a chunk of zeros filled up
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_DECODE_TILES_H_
