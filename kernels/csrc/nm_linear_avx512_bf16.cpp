#include <type_traits>

#include "nm_linear_expanded.h"
#include "nm_linear_few.h"
#include "vector_avx512_bf16.h"

namespace maskpro {
namespace {

// Tokens whose activations stay in L2 while all rows are multiplied.
constexpr int64_t kPassTokensOfPairs = 128;

// With more tokens, permuting activations takes longer than multiplying by zeros, where more than five of eight are kept.
// What makes no pairs is multiplied as float32, where more than two of eight take longer.
constexpr int64_t kFewestExpanded = 48;

template <class Weight>
int32_t run_pass(const NMLinear& call) {
  switch (index_bits(call.n, call.m)) {
    case 0:
      return FewTokens<Avx512BF16, Weight, BF16, 0>(call)();
    case 2:
      if (call.n % 2 != 0) return FewTokens<Avx512BF16, Weight, BF16, 2, true>(call)();
      return FewTokens<Avx512BF16, Weight, BF16, 2>(call)();
    case 3:
      return FewTokens<Avx512BF16, Weight, BF16, 3>(call)();
    case 4:
      return FewTokens<Avx512BF16, Weight, BF16, 4>(call)();
    case 5:
      return FewTokens<Avx512BF16, Weight, BF16, 5>(call)();
    default:
      return MASKPRO_BAD_ARGUMENT;
  }
}

template <class Weight>
int32_t run_expanded(const NMLinear& call) {
  return with_decoder<Weight>(call, [&](auto* decoder) {
    return ExpandedTokens<std::remove_pointer_t<decltype(decoder)>>(call)();
  });
}

}  // namespace

int32_t nm_linear_avx512_bf16(const NMLinear& call) {
  const bool int8 = call.weight_dtype == MASKPRO_I8;
  if (call.act_dtype != MASKPRO_BF16 || (call.weight_dtype != MASKPRO_BF16 && !int8)) return nm_linear_avx512(call);
  // Two kept weights of a row make a pair only where their groups lie in one line.
  const bool pairs = call.n % 2 == 0 || call.m < Avx512BF16::kLine;
  if (call.tokens > kFewestExpanded && 8 * call.n > (pairs ? 5 : 2) * call.m) {
    return int8 ? run_expanded<int8_t>(call) : run_expanded<BF16>(call);
  }
  if (!pairs) return nm_linear_avx512(call);
  NMLinear pass = call;
  for (int64_t token = 0; token < call.tokens; token += kPassTokensOfPairs) {
    const int64_t rest = call.tokens - token;
    pass.tokens = rest < kPassTokensOfPairs ? rest : kPassTokensOfPairs;
    pass.x = static_cast<const BF16*>(call.x) + token * call.in_features;
    pass.y = static_cast<BF16*>(call.y) + token * call.out_features;
    const int32_t status = int8 ? run_pass<int8_t>(pass) : run_pass<BF16>(pass);
    if (status != MASKPRO_OK) return status;
  }
  return MASKPRO_OK;
}

}  // namespace maskpro
