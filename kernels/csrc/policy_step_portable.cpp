#include "policy_step_impl.h"

namespace maskpro {

int32_t policy_step_portable(const PolicyStep& call) { return run_policy_step(call); }

}  // namespace maskpro
