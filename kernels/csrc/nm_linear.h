// One validated call of nm_linear, and the implementations the dispatcher chooses from.
#ifndef MASKPRO_NM_LINEAR_H_
#define MASKPRO_NM_LINEAR_H_

#include <stdint.h>

namespace maskpro {

struct NMLinear {
  void* y;              // [tokens, out_features], act_dtype
  const void* x;        // [tokens, in_features], act_dtype
  const uint8_t* weight;  // interleaved.h
  const float* scale;   // [out_features]; or null
  const float* x_scale;  // one number; or null
  const void* bias;     // [out_features], bias_dtype; or null
  int64_t tokens;
  int64_t in_features;
  int64_t out_features;
  int32_t n;
  int32_t m;
  int32_t act_dtype;
  int32_t weight_dtype;
  int32_t bias_dtype;
  int32_t threads;
};

// Each returns a maskpro_status and is compiled with its own instruction set: call it only where
// isa_available() says so.
int32_t nm_linear_portable(const NMLinear& call);
int32_t nm_linear_avx2(const NMLinear& call);
int32_t nm_linear_avx512(const NMLinear& call);
int32_t nm_linear_avx512_bf16(const NMLinear& call);
int32_t nm_linear_amx_bf16(const NMLinear& call);
int32_t nm_linear_avx512_vnni(const NMLinear& call);

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_H_
