// nm_linear for one instruction set: chooses the loops for the number of tokens, the pattern and the storage types.
#ifndef MASKPRO_NM_LINEAR_IMPL_H_
#define MASKPRO_NM_LINEAR_IMPL_H_

#include "elements.h"
#include "nm_linear.h"
#include "nm_linear_few.h"
#include "nm_linear_many.h"

namespace maskpro {

template <class Isa, class Weight, class Act, int kBits>
int32_t run_pattern(const NMLinear& call) {
  if (call.tokens <= Isa::few_tokens(kBits)) return FewTokens<Isa, Weight, Act, kBits>(call)();
  return ManyTokens<Isa, Weight, Act, kBits>(call)();
}

template <class Isa>
int32_t run_nm_linear(const NMLinear& call) {
  return with_element(call.weight_dtype, [&](auto* weight) {
    return with_float(call.act_dtype, [&](auto* act) {
      using Weight = std::remove_pointer_t<decltype(weight)>;
      using Act = std::remove_pointer_t<decltype(act)>;
      switch (index_bits(call.n, call.m)) {
        case 0:
          return run_pattern<Isa, Weight, Act, 0>(call);
        case 2:
          return run_pattern<Isa, Weight, Act, 2>(call);
        case 3:
          return run_pattern<Isa, Weight, Act, 3>(call);
        case 4:
          return run_pattern<Isa, Weight, Act, 4>(call);
        case 5:
          return run_pattern<Isa, Weight, Act, 5>(call);
        default:
          return int32_t{MASKPRO_BAD_ARGUMENT};
      }
    });
  });
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_IMPL_H_
