// One validated call of policy_step, and the implementations the dispatcher chooses from.
#ifndef MASKPRO_POLICY_STEP_H_
#define MASKPRO_POLICY_STEP_H_

#include <stdint.h>

namespace maskpro {

struct PolicyStep {
  float* logits;              // [groups, m], updated
  void* masked;               // [groups, m] of weight_bytes each, written; or null
  const void* weight;         // [groups, m] of weight_bytes each
  int64_t* flips;             // added to; or null
  int64_t groups;
  int32_t n;
  int32_t m;
  int32_t weight_bytes;
  const float* gains;         // [groups, m]; or null
  const float* coefficients;  // [updates]
  const uint64_t* draws;      // [updates]
  int32_t updates;
  uint64_t next_draw;
  uint64_t seed;
  uint32_t stream;
  int32_t threads;
};

// Each returns a maskpro_status and is compiled with its own instruction set.
int32_t policy_step_portable(const PolicyStep& call);
int32_t policy_step_avx2(const PolicyStep& call);
int32_t policy_step_avx512(const PolicyStep& call);

}  // namespace maskpro

#endif  // MASKPRO_POLICY_STEP_H_
