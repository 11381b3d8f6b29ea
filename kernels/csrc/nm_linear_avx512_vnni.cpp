#include "nm_linear_w8a8.h"

namespace maskpro {
namespace {

// Tokens whose activations stay in L2 while all rows are multiplied.
constexpr int64_t kPassTokensOfBytes = 256;

// About as many tokens in every pass as in others, whole tiles of them: none reads the weight for a few.
template <class Act>
int32_t run_passes(const NMLinear& call) {
  const int64_t passes = (call.tokens + kPassTokensOfBytes - 1) / kPassTokensOfBytes;
  NMLinear pass = call;
  for (int64_t i = 0, token = 0; i < passes; ++i, token += pass.tokens) {
    const int64_t end = (call.tokens * (i + 1) / passes + kByteTile - 1) / kByteTile * kByteTile;
    pass.tokens = (end < call.tokens ? end : call.tokens) - token;
    pass.x = static_cast<const Act*>(call.x) + token * call.in_features;
    pass.y = static_cast<Act*>(call.y) + token * call.out_features;
    const int32_t status = EightBitTokens<Act>(pass)();
    if (status != MASKPRO_OK) return status;
  }
  return MASKPRO_OK;
}

}  // namespace

int32_t nm_linear_avx512_vnni(const NMLinear& call) {
  return with_float(call.act_dtype,
                    [&](auto* element) { return run_passes<std::remove_pointer_t<decltype(element)>>(call); });
}

}  // namespace maskpro
