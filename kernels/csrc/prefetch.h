// Reading a weight ahead of its use.
#ifndef MASKPRO_PREFETCH_H_
#define MASKPRO_PREFETCH_H_

#include <stdint.h>

#include "interleaved.h"

namespace maskpro {

constexpr int64_t kPrefetchBytes = 4096;

// The hardware runs ahead of a stream, but stops where a page ends: fetches the lines of slot j, some chunks ahead. (A
// prefetch past the end of a buffer is no access.)
template <class Weight>
[[gnu::always_inline]] inline void prefetch(const Weight* values, int j) {
  constexpr int64_t kSlotBytes = kBlockRows * sizeof(Weight);
  const uint8_t* ahead = reinterpret_cast<const uint8_t*>(values) + kPrefetchBytes;
  if (j * kSlotBytes % 64 < kSlotBytes) __builtin_prefetch(ahead + j * kSlotBytes);
}

}  // namespace maskpro

#endif  // MASKPRO_PREFETCH_H_
