// Which outputs a thread computes.
#ifndef MASKPRO_ROW_SHARE_H_
#define MASKPRO_ROW_SHARE_H_

#include <stdint.h>

namespace maskpro {

struct RowShare {
  int64_t begin;
  int64_t end;
};

// Sixteen outputs are a cache line of the narrowest type or two: no false sharing of y. Where that would leave threads
// without work, sharing is the lesser evil. (Isa only keeps the copies of different compiler flags apart.)
template <class Isa>
inline RowShare row_share(int64_t out_features, int64_t thread, int64_t threads) {
  const int64_t unit = out_features >= 64 * threads ? 16 : 1;
  const int64_t units = (out_features + unit - 1) / unit;
  const int64_t end = units * (thread + 1) / threads * unit;
  return {units * thread / threads * unit, end < out_features ? end : out_features};
}

}  // namespace maskpro

#endif  // MASKPRO_ROW_SHARE_H_
