// Which instruction sets this build has and this machine runs.
#ifndef MASKPRO_ISA_H_
#define MASKPRO_ISA_H_

#include <stdint.h>

namespace maskpro {

bool isa_available(int32_t isa);

}  // namespace maskpro

#endif  // MASKPRO_ISA_H_
