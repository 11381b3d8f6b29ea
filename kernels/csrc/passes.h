// Many tokens in passes, so that the activations of one stay in L2 while all rows are multiplied.
#ifndef MASKPRO_PASSES_H_
#define MASKPRO_PASSES_H_

#include <stdint.h>

#include "maskpro_kernels.h"
#include "nm_linear.h"

namespace maskpro {

// Calls `run` with about as many tokens in every pass as in others, `most` and less than a tile more, whole tiles of
// them: none reads the weight for a few. (Run is a lambda, and keeps the copies of different compiler flags apart.)
template <class Act, class Run>
inline int32_t in_passes(const NMLinear& call, int64_t most, int64_t tile, const Run& run) {
  const int64_t passes = (call.tokens + most - 1) / most;
  NMLinear pass = call;
  for (int64_t i = 0, token = 0; i < passes; ++i, token += pass.tokens) {
    const int64_t end = (call.tokens * (i + 1) / passes + tile - 1) / tile * tile;
    pass.tokens = (end < call.tokens ? end : call.tokens) - token;
    pass.x = static_cast<const Act*>(call.x) + token * call.in_features;
    pass.y = static_cast<Act*>(call.y) + token * call.out_features;
    const int32_t status = run(pass);
    if (status != MASKPRO_OK) return status;
  }
  return MASKPRO_OK;
}

}  // namespace maskpro

#endif  // MASKPRO_PASSES_H_
