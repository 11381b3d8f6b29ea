// nm_linear for one instruction set: chooses the loops for the number of tokens and the storage types.
#ifndef MASKPRO_NM_LINEAR_IMPL_H_
#define MASKPRO_NM_LINEAR_IMPL_H_

#include "elements.h"
#include "nm_linear.h"
#include "nm_linear_few.h"
#include "nm_linear_many.h"

namespace maskpro {

template <class Isa>
int32_t run_nm_linear(const NMLinear& call) {
  return with_element(call.weight_dtype, [&](auto* weight) {
    return with_element(call.act_dtype, [&](auto* act) {
      using Weight = std::remove_pointer_t<decltype(weight)>;
      using Act = std::remove_pointer_t<decltype(act)>;
      if (call.tokens <= Isa::kDirectTokens) return FewTokens<Isa, Weight, Act>(call)();
      return ManyTokens<Isa, Weight, Act>(call)();
    });
  });
}

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_IMPL_H_
