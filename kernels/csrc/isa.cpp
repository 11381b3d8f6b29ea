#include "isa.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "maskpro_kernels.h"

namespace maskpro {
namespace {

// Linux keeps tile registers for a process only once it has asked, which covers threads started before and after.
bool tiles_permitted() {
#if defined(MASKPRO_X86_64) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, asm/prctl.h
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

}  // namespace

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
    case MASKPRO_AVX512_BF16:
      return isa_available(MASKPRO_AVX512) && __builtin_cpu_supports("avx512bf16");
    case MASKPRO_AMX_BF16:
      return isa_available(MASKPRO_AVX512_BF16) && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
             __builtin_cpu_supports("avx512vbmi") && tiles_permitted();
    case MASKPRO_AVX512_VNNI:
      return isa_available(MASKPRO_AVX512) && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni");
#endif
    default:
      return false;
  }
}

}  // namespace maskpro

int32_t maskpro_abi_version(void) { return MASKPRO_ABI_VERSION; }

int32_t maskpro_fastest_isa(void) {
  int32_t isa = MASKPRO_AMX_BF16;
  while (!maskpro::isa_available(isa)) --isa;
#ifdef MASKPRO_X86_64
  // AMD's cores start as many products of pairs a cycle as float32 multiply-adds. On Intel's (Sapphire Rapids) the kernels
  // that use them were slower than those that do not.
  if (isa == MASKPRO_AVX512_BF16 && !__builtin_cpu_is("amd")) isa = MASKPRO_AVX512;
#endif
  return isa;
}

int32_t maskpro_isa_available(int32_t isa) { return maskpro::isa_available(isa) ? 1 : 0; }
