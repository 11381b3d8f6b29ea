// y = x W^T + b for (N:M)-sparse W: checks the arguments and chooses the instruction set.
//
// Roofline. For few tokens the time is that of reading the weights, so the bits stored per original
// weight set the limit: dense f32 32, dense bf16 16, N:M (N/M) * dtype bits + 1:
//
//               bits    limit over dense bf16    limit over dense f32
//   2:4 bf16     9              1.78x                   3.56x
//   1:4 bf16     5              3.20x                   6.40x
//   2:4 f32     17               -                      1.88x
//
// For many tokens it is that of out * in * tokens FMAs: the CPU has no sparse multiply, so a weight is
// expanded once per some hundred tokens and the limit is a dense float32 GEMM.
//
// A result does not depend on the number of threads, nor on the other tokens of the call but for how many they are: few
// and many tokens are summed in different orders.
//
// Structure: nm_linear_few.h and nm_linear_many.h cut the work into blocks and threads for few and for many tokens,
// packed_rows.h expands weights, vector_<isa>.h has the instructions, nm_linear_<isa>.cpp is the instantiation under
// that ISA's flags.
#include "nm_linear.h"

#include "isa.h"
#include "maskpro_kernels.h"

namespace maskpro {
namespace {

bool is_dtype(int32_t dtype) {
  return dtype == MASKPRO_F32 || dtype == MASKPRO_BF16 || dtype == MASKPRO_F16;
}

bool is_pattern(int32_t n, int32_t m) {
  return (m == 4 || m == 8 || m == 16 || m == 32) && n >= 1 && n <= m;
}

// Sizes whose products overflow no int64: more than any machine's memory holds.
bool is_size(int64_t size) { return size >= 0 && size <= (int64_t{1} << 31); }

bool is_valid(const NMLinear& call) {
  if (!is_pattern(call.n, call.m) || call.threads < 1) return false;
  if (!is_dtype(call.act_dtype) || !is_dtype(call.weight_dtype)) return false;
  if (call.bias != nullptr && !is_dtype(call.bias_dtype)) return false;
  if (!is_size(call.tokens) || !is_size(call.out_features) || !is_size(call.in_features)) return false;
  if (call.in_features == 0 || call.in_features % call.m != 0) return false;
  if (call.tokens == 0 || call.out_features == 0) return true;
  return call.y != nullptr && call.x != nullptr && call.values != nullptr && call.bitmask != nullptr;
}

}  // namespace
}  // namespace maskpro

int32_t maskpro_nm_linear(void* y, const void* x, const void* values, const uint8_t* bitmask,
                          const void* bias, int64_t tokens, int64_t in_features, int64_t out_features,
                          int32_t n, int32_t m, int32_t act_dtype, int32_t weight_dtype,
                          int32_t bias_dtype, int32_t isa, int32_t threads) {
  maskpro::NMLinear call{y,           x,  values, bitmask,   bias,         tokens,     in_features,
                         out_features, n, m,      act_dtype, weight_dtype, bias_dtype, threads,
                         /*kept=*/0,   /*mask_bytes=*/0};
  if (!maskpro::is_valid(call)) return MASKPRO_BAD_ARGUMENT;
  if (!maskpro::isa_available(isa)) return MASKPRO_NO_ISA;
  if (tokens == 0 || out_features == 0) return MASKPRO_OK;
  call.kept = in_features / m * n;
  call.mask_bytes = (in_features + 7) / 8;
  switch (isa) {
#ifdef MASKPRO_X86_64
    case MASKPRO_AVX512:
      return maskpro::nm_linear_avx512(call);
    case MASKPRO_AVX2:
      return maskpro::nm_linear_avx2(call);
#endif
    default:
      return maskpro::nm_linear_portable(call);
  }
}
