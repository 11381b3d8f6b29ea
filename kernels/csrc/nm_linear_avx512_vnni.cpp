#include "nm_linear_w8a8.h"
#include "passes.h"

namespace maskpro {

// Whose activations take as many bytes as those of the passes of pairs (nm_linear_avx512_bf16.cpp).
constexpr int64_t kPassTokensOfBytes = 256;

int32_t nm_linear_avx512_vnni(const NMLinear& call) {
  return with_float(call.act_dtype, [&](auto* element) {
    using Act = std::remove_pointer_t<decltype(element)>;
    const auto run = [](const NMLinear& pass) { return EightBitTokens<Act>(pass)(); };
    return in_passes<Act>(call, kPassTokensOfBytes, kByteTile, run);
  });
}

}  // namespace maskpro
