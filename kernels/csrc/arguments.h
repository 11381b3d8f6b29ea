// What every entry point that takes a weight asks of its arguments.
#ifndef MASKPRO_ARGUMENTS_H_
#define MASKPRO_ARGUMENTS_H_

#include <stdint.h>

#include "maskpro_kernels.h"

namespace maskpro {

inline bool is_float(int32_t dtype) {
  return dtype == MASKPRO_F32 || dtype == MASKPRO_BF16 || dtype == MASKPRO_F16;
}

// Sizes that an int32 holds, and whose products overflow no int64: more than any machine's memory holds.
inline bool is_size(int64_t size) { return size >= 0 && size <= (int64_t{1} << 30); }

inline bool is_weight(int64_t in_features, int64_t out_features, int32_t n, int32_t m, int32_t dtype) {
  if (m != 4 && m != 8 && m != 16 && m != 32) return false;
  if (n < 1 || n > m || !(is_float(dtype) || dtype == MASKPRO_I8)) return false;
  return is_size(out_features) && is_size(in_features) && in_features > 0 && in_features % m == 0;
}

// What products of 8-bit integers take: sums of 128 * 128 fit 32 bits.
inline bool is_eight_bit(int64_t in_features, int64_t n, int64_t m, int32_t weight_dtype) {
  return n == 2 && m == 4 && weight_dtype == MASKPRO_I8 && in_features < 1 << 18;
}

}  // namespace maskpro

#endif  // MASKPRO_ARGUMENTS_H_
