#include "nm_linear_amx.h"
#include "nm_linear_amx_int8.h"

namespace maskpro {
namespace {

// Up to a decoder's kFewTokens expanding a weight takes longer than reading it.
template <class Decoder>
int32_t run_tiles(const NMLinear& call) {
  if (call.tokens <= Decoder::kFewTokens) return nm_linear_avx512(call);
  return AmxTokens<Decoder>(call)();
}

template <class Weight>
int32_t run_pattern(const NMLinear& call) {
  const auto is = [&](int32_t n, int32_t m) { return call.n == n && call.m == m; };
  if (is(1, 4)) return run_tiles<DecodeOfFour<Weight, 1>>(call);
  if (is(2, 4)) return run_tiles<DecodeOfFour<Weight, 2>>(call);
  if (is(3, 4)) return run_tiles<DecodeThreeOfFour<Weight>>(call);
  if (is(2, 8)) return run_tiles<DecodeEven<Weight, 2, 8>>(call);
  if (is(4, 8)) return run_tiles<DecodeEven<Weight, 4, 8>>(call);
  if (is(6, 8)) return run_tiles<DecodeEven<Weight, 6, 8>>(call);
  if (is(8, 16)) return run_tiles<DecodeEven<Weight, 8, 16>>(call);
  if (is(16, 32)) return run_tiles<DecodeEven<Weight, 16, 32>>(call);
  switch (index_bits(call.n, call.m)) {
    case 0:
      return run_tiles<DecodeDense<Weight>>(call);
    case 3:
      return run_tiles<DecodeAny<Weight, 3>>(call);
    case 4:
      return run_tiles<DecodeAny<Weight, 4>>(call);
    case 5:
      return run_tiles<DecodeAny<Weight, 5>>(call);
    default:
      return MASKPRO_BAD_ARGUMENT;
  }
}

}  // namespace

int32_t nm_linear_amx_bf16(const NMLinear& call) {
  const bool int8 = call.weight_dtype == MASKPRO_I8;
  if (call.act_dtype != MASKPRO_BF16 || (call.weight_dtype != MASKPRO_BF16 && !int8)) return nm_linear_avx512(call);
  if (AmxIntegers::covers(call)) return AmxIntegers(call)();
  return int8 ? run_pattern<int8_t>(call) : run_pattern<BF16>(call);
}

}  // namespace maskpro
