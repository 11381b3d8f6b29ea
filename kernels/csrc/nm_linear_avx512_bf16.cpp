#include "nm_linear_expanded.h"
#include "nm_linear_few.h"
#include "passes.h"
#include "vector_avx512_bf16.h"

namespace maskpro {
namespace {

// Tokens whose activations stay in L2 while all rows are multiplied.
constexpr int64_t kPassTokensOfPairs = 128;

// With more tokens, permuting activations takes longer than multiplying by zeros where more than five of eight are
// kept.
constexpr int64_t kMostPermuted = 48;

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
  if (call.n == 3 && call.m == 4) return ExpandedTokens<DecodeThreeOfFour<Weight>>(call)();
  if (call.n == 6 && call.m == 8) return ExpandedTokens<DecodeEven<Weight, 6, 8>>(call)();
  switch (index_bits(call.n, call.m)) {
    case 0:
      return ExpandedTokens<DecodeDense<Weight>>(call)();
    case 3:
      return ExpandedTokens<DecodeAny<Weight, 3>>(call)();
    case 4:
      return ExpandedTokens<DecodeAny<Weight, 4>>(call)();
    case 5:
      return ExpandedTokens<DecodeAny<Weight, 5>>(call)();
    default:
      return MASKPRO_BAD_ARGUMENT;
  }
}

template <class Weight>
int32_t run_passes(const NMLinear& call) {
  const auto run = [](const NMLinear& pass) { return run_pass<Weight>(pass); };
  return in_passes<BF16>(call, kPassTokensOfPairs, Avx512BF16::kTileTokens, run);
}

}  // namespace

int32_t nm_linear_avx512_bf16(const NMLinear& call) {
  const bool int8 = call.weight_dtype == MASKPRO_I8;
  if (call.act_dtype != MASKPRO_BF16 || (call.weight_dtype != MASKPRO_BF16 && !int8)) return nm_linear_avx512(call);
  if (call.tokens > kMostPermuted && 8 * call.n > 5 * call.m) {
    return int8 ? run_expanded<int8_t>(call) : run_expanded<BF16>(call);
  }
  // Two kept weights of a row make a pair only where their groups lie in one line.
  if (call.n % 2 != 0 && call.m == Avx512BF16::kLine) return nm_linear_avx512(call);
  return int8 ? run_passes<int8_t>(call) : run_passes<BF16>(call);
}

}  // namespace maskpro
