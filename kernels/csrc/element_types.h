// Storage types of weights and activations. Arithmetic is float32, but for nm_linear_amx_int8.h; the conversions live
// with each instruction set (vector_*.h).
#ifndef MASKPRO_ELEMENT_TYPES_H_
#define MASKPRO_ELEMENT_TYPES_H_

#include <stdint.h>

namespace maskpro {

struct BF16 {
  uint16_t bits;  // the upper half of a float32
};

struct F16 {
  uint16_t bits;  // IEEE 754 binary16
};

}  // namespace maskpro

#endif  // MASKPRO_ELEMENT_TYPES_H_
