// y = x W^T + b for (N:M)-sparse W: checks the arguments and chooses the instruction set.
//
// Roofline. For few tokens the time is that of reading the weights, so the bits stored per original
// weight set the limit: dense f32 32, dense bf16 16, N:M (N/M) * (dtype bits + an index's, interleaved.h):
//
//               bits    limit over dense bf16    limit over dense f32
//   2:4 bf16     9              1.78x                   3.56x
//   1:4 bf16     4.5            3.56x                   7.11x
//   4:8 bf16     9.6            1.67x                   3.33x
//   2:4 f32     17               -                      1.88x
//   2:4 int8     5              3.20x                   6.40x
//
// For many tokens it is that of FMAs, out * in * N/M * tokens of them: none is spent on a weight that is not kept.
// Activations are read through indices there, ten loads for eight FMAs, which dense products need not: of two loads and
// two FMAs a cycle, 2:4 is at most 1.6 times as fast as a dense float32 product.
// AVX512_BF16 does two products in an FMA's time, for dense as for sparse; there a pair costs a permutation as well. On
// a Zen 5 core product and permutation take 1.5 times as long as the product alone, so that for many tokens 2:4 is at
// most 1.34 times as fast as a dense bfloat16 product at its peak. A pattern that keeps more than five of eight is
// expanded there, and costs what dense costs and what expanding it takes.
// AMX multiplies tiles, zeros included: 2:4 costs what dense costs, and what expanding it takes.
// Activations of 8 bits, where a checkpoint allows them, are multiplied four a lane, twice a pair's work in its time.
//
// A result does not depend on the number of threads, nor on the other tokens of the call but for how many they are: up
// to four, few and many tokens are summed in different orders, and on AMX few may be multiplied as integers.
//
// Structure: interleaved.h is the order of the weight; nm_linear_few.h and nm_linear_many.h cut the work into blocks
// for few and for many tokens, nm_linear_pairs.h is the innermost loop of pairs, nm_linear_expanded.h multiplies pairs
// of an expanded weight (decode_tiles.h); nm_linear_amx.h does all of it with tiles, nm_linear_amx_int8.h few tokens of
// 2:4 int8; nm_linear_w8a8.h does all of 2:4 int8 with activations of 8 bits. passes.h cuts many tokens into passes,
// shares.h gives blocks to threads. vector_<isa>.h has the instructions, nm_linear_<isa>.cpp is the instantiation under
// that ISA's flags.
#include "nm_linear.h"

#include "arguments.h"
#include "isa.h"
#include "maskpro_kernels.h"

namespace maskpro {
namespace {

bool is_valid(const NMLinear& call) {
  if (!is_weight(call.in_features, call.out_features, call.n, call.m, call.weight_dtype)) return false;
  if (!is_float(call.act_dtype) || !is_size(call.tokens) || call.threads < 1) return false;
  if (call.bias != nullptr && !is_float(call.bias_dtype)) return false;
  if (call.tokens == 0 || call.out_features == 0) return true;
  return call.y != nullptr && call.x != nullptr && call.weight != nullptr;
}

}  // namespace
}  // namespace maskpro

int32_t maskpro_nm_linear(void* y, const void* x, const void* weight, const float* scale, const float* x_scale,
                          const void* bias, int64_t tokens, int64_t in_features, int64_t out_features, int32_t n,
                          int32_t m, int32_t act_dtype, int32_t weight_dtype, int32_t bias_dtype, int32_t isa,
                          int32_t threads) {
  const maskpro::NMLinear call{y,           x,            static_cast<const uint8_t*>(weight),
                               scale,       x_scale,      bias,
                               tokens,      in_features,  out_features,
                               n,           m,            act_dtype,
                               weight_dtype, bias_dtype,  threads};
  if (!maskpro::is_valid(call)) return MASKPRO_BAD_ARGUMENT;
  const bool rounds = isa == MASKPRO_AVX512_VNNI;
  if (rounds && !maskpro::is_eight_bit(in_features, n, m, weight_dtype)) return MASKPRO_BAD_ARGUMENT;
  if (!rounds && x_scale != nullptr) return MASKPRO_BAD_ARGUMENT;
  if (!maskpro::isa_available(isa)) return MASKPRO_NO_ISA;
  if (tokens == 0 || out_features == 0) return MASKPRO_OK;
  switch (isa) {
#ifdef MASKPRO_X86_64
    case MASKPRO_AVX512_VNNI:
      return maskpro::nm_linear_avx512_vnni(call);
    case MASKPRO_AMX_BF16:
      return maskpro::nm_linear_amx_bf16(call);
    case MASKPRO_AVX512_BF16:
      return maskpro::nm_linear_avx512_bf16(call);
    case MASKPRO_AVX512:
      return maskpro::nm_linear_avx512(call);
    case MASKPRO_AVX2:
      return maskpro::nm_linear_avx2(call);
#endif
    default:
      return maskpro::nm_linear_portable(call);
  }
}
