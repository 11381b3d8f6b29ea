#include <type_traits>

#include "nm_linear_amx.h"
#include "nm_linear_amx_int8.h"

namespace maskpro {
namespace {

template <class Weight>
int32_t run_pattern(const NMLinear& call) {
  return with_decoder<Weight>(call, [&](auto* decoder) {
    using Decoder = std::remove_pointer_t<decltype(decoder)>;
    // Up to here expanding a weight takes longer than reading it.
    if (call.tokens <= Decoder::kFewTokens) return nm_linear_avx512(call);
    return AmxTokens<Decoder>(call)();
  });
}

}  // namespace

int32_t nm_linear_amx_bf16(const NMLinear& call) {
  const bool int8 = call.weight_dtype == MASKPRO_I8;
  if (call.act_dtype != MASKPRO_BF16 || (call.weight_dtype != MASKPRO_BF16 && !int8)) return nm_linear_avx512(call);
  if (AmxIntegers::covers(call)) return AmxIntegers(call)();
  return int8 ? run_pattern<int8_t>(call) : run_pattern<BF16>(call);
}

}  // namespace maskpro
