// One step of learning masks: checks the arguments and chooses the instruction set. See policy_step_impl.h.
#include "policy_step.h"

#include "isa.h"
#include "maskpro_kernels.h"

namespace maskpro {
namespace {

bool is_valid(const PolicyStep& call) {
  if (call.m != 4 && call.m != 8 && call.m != 16) return false;
  if (call.n < 1 || call.n > call.m || call.threads < 1 || call.updates < 0) return false;
  if (call.weight_bytes != 2 && call.weight_bytes != 4) return false;
  if (call.groups < 0 || call.groups > (int64_t{1} << 32)) return false;
  if (call.stream >= 1u << 30) return false;
  if (call.gains != nullptr && (call.updates < 2 || call.updates > MASKPRO_MAX_GAIN_DRAWS)) return false;
  if (call.groups == 0) return true;
  if (call.updates > 0 && (call.coefficients == nullptr || call.draws == nullptr)) return false;
  return call.logits != nullptr && (call.masked == nullptr || call.weight != nullptr);
}

}  // namespace
}  // namespace maskpro

int32_t maskpro_policy_step(float* logits, void* masked, const void* weight, int64_t* flips, int64_t groups,
                            int32_t n, int32_t m, int32_t weight_bytes, const float* gains,
                            const float* coefficients, const uint64_t* draws, int32_t updates, uint64_t next_draw,
                            uint64_t seed, uint32_t stream, int32_t isa, int32_t threads) {
  const maskpro::PolicyStep call{logits,       masked, weight,  flips,     groups, n,      m,      weight_bytes, gains,
                                 coefficients, draws,  updates, next_draw, seed,   stream, threads};
  if (!maskpro::is_valid(call)) return MASKPRO_BAD_ARGUMENT;
  if (isa == MASKPRO_AVX512_VNNI || !maskpro::isa_available(isa)) return MASKPRO_NO_ISA;
  switch (isa) {
#ifdef MASKPRO_X86_64
    case MASKPRO_AMX_BF16:  // nothing here multiplies bfloat16
    case MASKPRO_AVX512_BF16:
    case MASKPRO_AVX512:
      return maskpro::policy_step_avx512(call);
    case MASKPRO_AVX2:
      return maskpro::policy_step_avx2(call);
#endif
    default:
      return maskpro::policy_step_portable(call);
  }
}
