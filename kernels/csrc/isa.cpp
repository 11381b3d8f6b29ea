#include "isa.h"

#include "maskpro_kernels.h"

namespace maskpro {

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
bool isa_available(int32_t isa) {
  switch (isa) {
    case MASKPRO_PORTABLE:
      return true;
#ifdef MASKPRO_X86_64
    case MASKPRO_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case MASKPRO_AVX512:
      return isa_available(MASKPRO_AVX2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

}  // namespace maskpro

int32_t maskpro_abi_version(void) { return MASKPRO_ABI_VERSION; }

int32_t maskpro_isa_available(int32_t isa) { return maskpro::isa_available(isa) ? 1 : 0; }
