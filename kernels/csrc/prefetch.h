// Reading a weight ahead of its use.
#ifndef MASKPRO_PREFETCH_H_
#define MASKPRO_PREFETCH_H_

#include <stdint.h>

#include "interleaved.h"

namespace maskpro {

// How far ahead of its use. Of 4 to 32 KiB, 12 was the least that took bench/nm_linear.py the shortest time on a Zen 4
// core (1 to 8 tokens, weights in large pages).
constexpr int64_t kFarBytes = 12288;

// For more than two tiles of tokens, and for AMX: what they read again and again needs the L1.
constexpr int64_t kNearBytes = 4096;

// The hardware runs ahead of a stream, but stops where a page ends: fetches the lines of slot j, `ahead` bytes on. (A
// prefetch past the end of a buffer is no access.)
template <class Weight>
[[gnu::always_inline]] inline void prefetch(const Weight* values, int j, int64_t ahead) {
  constexpr int64_t kSlotBytes = kBlockRows * sizeof(Weight);
  const uint8_t* there = reinterpret_cast<const uint8_t*>(values) + ahead;
  if (j * kSlotBytes % 64 < kSlotBytes) __builtin_prefetch(there + j * kSlotBytes);
}

}  // namespace maskpro

#endif  // MASKPRO_PREFETCH_H_
