// Picks a dense weight's kept values out. Limit: for 16-bit values 2 bytes read, 2 n/m written and 1/8 of bitmask read a
// weight. Eight of them are moved by one byte shuffle where there is one, else one by one; no branch depends on the mask.
#include <stdint.h>
#ifdef MASKPRO_X86_64
#include <tmmintrin.h>
#endif

#include "arguments.h"
#include "group_bits.h"
#include "interleaved.h"
#include "maskpro_kernels.h"

namespace maskpro {
namespace {

struct Source {
  const void* dense;
  const uint8_t* bitmask;
  int64_t in_features;
  int64_t out_features;
  int32_t n;
};

#ifdef MASKPRO_X86_64
// For every byte of a bitmask, which bytes of eight 16-bit values come first, and how many values those are.
struct Shuffles {
  uint8_t bytes[256][16];
  uint8_t kept[256];
};

constexpr Shuffles make_shuffles() {
  Shuffles made{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int column = 0; column < 8; ++column) {
      if ((bits >> column & 1) == 0) continue;
      const int slot = made.kept[bits]++;
      made.bytes[bits][2 * slot] = static_cast<uint8_t>(2 * column);
      made.bytes[bits][2 * slot + 1] = static_cast<uint8_t>(2 * column + 1);
    }
  }
  return made;
}

constexpr Shuffles kShuffles = make_shuffles();

// As many columns of a row as can be done eight at once, from the first on; returns how many, whole groups. Eight values
// are written for every byte, those not kept over again: never past `end`, whatever the bitmask says.
template <int kM>
__attribute__((target("ssse3"))) int64_t shuffle_out(uint16_t* values, const uint16_t* end, const uint16_t* dense,
                                                     const uint8_t* bitmask, int64_t in_features) {
  constexpr int64_t kStep = kM < 8 ? 8 : kM;
  int64_t column = 0;
  for (; column + kStep <= in_features && end - values >= kStep; column += kStep) {
    for (int64_t k = 0; k < kStep; k += 8) {
      const uint8_t bits = bitmask[(column + k) / 8];
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(dense + column + k));
      const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShuffles.bytes[bits]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(eight, order));
      values += kShuffles.kept[bits];
    }
  }
  return column;
}
#endif

template <typename T, int kM>
void pick_out(T* values, const Source& from) {
  const int64_t kept = from.in_features / kM * from.n;
  for (int64_t row = 0; row < from.out_features; ++row) {
    const uint8_t* bitmask = from.bitmask + row * ((from.in_features + 7) / 8);
    const T* dense = static_cast<const T*>(from.dense) + row * from.in_features;
    T* to = values + row * kept;
    int64_t done = 0;
#ifdef MASKPRO_X86_64
    if constexpr (sizeof(T) == 2) {
      if (__builtin_cpu_supports("ssse3")) {
        done = shuffle_out<kM>(to, values + from.out_features * kept, dense, bitmask, from.in_features);
      }
    }
#endif
    for (int64_t group = done / kM; group < from.in_features / kM; ++group) {
      uint32_t bits = group_bits<kM>(bitmask, group);
      for (int32_t k = 0; k < from.n; ++k) {  // exactly n, whatever the bitmask says
        to[group * from.n + k] = dense[group * kM + take_lowest(bits)];
      }
    }
  }
}

template <typename T>
void pick_out(void* values, const Source& from, int32_t m) {
  T* to = static_cast<T*>(values);
  switch (m) {
    case 4:
      return pick_out<T, 4>(to, from);
    case 8:
      return pick_out<T, 8>(to, from);
    case 16:
      return pick_out<T, 16>(to, from);
    default:
      return pick_out<T, 32>(to, from);
  }
}

}  // namespace
}  // namespace maskpro

int32_t maskpro_kept_values(void* values, const void* dense, const uint8_t* bitmask, int64_t in_features,
                            int64_t out_features, int32_t n, int32_t m, int32_t weight_dtype) {
  if (!maskpro::is_weight(in_features, out_features, n, m, weight_dtype)) return MASKPRO_BAD_ARGUMENT;
  if (out_features == 0) return MASKPRO_OK;
  if (values == nullptr || dense == nullptr || bitmask == nullptr) return MASKPRO_BAD_ARGUMENT;
  const maskpro::Source source{dense, bitmask, in_features, out_features, n};
  switch (maskpro::element_bytes(weight_dtype)) {
    case 4:
      maskpro::pick_out<uint32_t>(values, source, m);
      break;
    case 2:
      maskpro::pick_out<uint16_t>(values, source, m);
      break;
    default:
      maskpro::pick_out<uint8_t>(values, source, m);
  }
  return MASKPRO_OK;
}
