// C ABI of the native kernels. Plain C types only: no torch and no Python at build time, so one
// shared library serves every CPython and every torch. FORMAT.md describes values and bitmask.
#ifndef MASKPRO_KERNELS_H_
#define MASKPRO_KERNELS_H_

#include <stdint.h>

#if defined(__GNUC__)
#define MASKPRO_API __attribute__((visibility("default")))
#else
#define MASKPRO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every incompatible change of this header; the Python loader checks it.
#define MASKPRO_ABI_VERSION 9

enum maskpro_dtype { MASKPRO_F32 = 0, MASKPRO_BF16 = 1, MASKPRO_F16 = 2, MASKPRO_I8 = 3 };

// Each includes those before it, and MASKPRO_AMX_BF16 also AMX_INT8 and AVX512_VBMI; but MASKPRO_AVX512_VNNI is
// MASKPRO_AVX512 with AVX512_VNNI and AVX512_VBMI, only for products of 8-bit integers.
enum maskpro_isa { MASKPRO_PORTABLE = 0, MASKPRO_AVX2 = 1, MASKPRO_AVX512 = 2, MASKPRO_AVX512_BF16 = 3,
                   MASKPRO_AMX_BF16 = 4, MASKPRO_AVX512_VNNI = 5 };

enum maskpro_status {
  MASKPRO_OK = 0,
  MASKPRO_BAD_ARGUMENT = 1,  // an impossible size, pattern, dtype or thread count
  MASKPRO_NO_ISA = 2,        // this machine or this build lacks the instruction set asked for
  MASKPRO_NO_MEMORY = 3,
};

MASKPRO_API int32_t maskpro_abi_version(void);

// 1 if the instruction set was compiled in and this machine runs it, else 0.
MASKPRO_API int32_t maskpro_isa_available(int32_t isa);

// The available one whose kernels are fastest on this machine, of those that multiply activations as they are.
MASKPRO_API int32_t maskpro_fastest_isa(void);

// Binds the calling thread to the first of `cores` (numbers as in /proc/cpuinfo) and the OpenMP threads that work for it to
// the others, one each, until they end: where two share a core, every call takes twice its time. Linux only.
// MASKPRO_BAD_ARGUMENT if there is no such core for this process, or no such thread; those before it may be bound.
MASKPRO_API int32_t maskpro_bind_threads(const int32_t* cores, int32_t threads);

// Picks out a weight's kept values, in column order. No threads: the caller packs several parts of a weight at once.
//
//   values  [out_features, in_features / m * n]  row-major, weight_dtype; written
//   dense   [out_features, in_features]  the same
//   bitmask [out_features, ceil(in_features / 8)], bit k of byte j is column 8j + k
//
// Every group of the bitmask must keep exactly n (not checked here: else values are any, but no other memory is touched).
// Pointers are aligned to their element. Reentrant. Returns a maskpro_status.
MASKPRO_API int32_t maskpro_kept_values(void* values, const void* dense, const uint8_t* bitmask, int64_t in_features,
                                        int64_t out_features, int32_t n, int32_t m, int32_t weight_dtype);

// Bytes of an (n:m)-sparse weight in the order that maskpro_nm_linear reads (interleaved.h); -1 for an impossible one.
// m is 4, 8, 16 or 32 and divides in_features.
MASKPRO_API int64_t maskpro_interleaved_bytes(int64_t in_features, int64_t out_features, int32_t n, int32_t m,
                                              int32_t weight_dtype);

// Brings a weight into that order.
//
//   weight  maskpro_interleaved_bytes, written
//   values  [out_features, in_features / m * n]  row-major, weight_dtype
//   bitmask [out_features, ceil(in_features / 8)], bit k of byte j is column 8j + k; spare bits 0. Not read if n is m.
//
// The bitmask must keep exactly n per group (checked when a weight is loaded, not here). Pointers need no alignment
// beyond their element's. Returns a maskpro_status.
MASKPRO_API int32_t maskpro_interleave(void* weight, const void* values, const uint8_t* bitmask, int64_t in_features,
                                       int64_t out_features, int32_t n, int32_t m, int32_t weight_dtype,
                                       int32_t threads);

// y = (x @ W^T) * scale + bias for an (n:m)-sparse W, n of every m consecutive inputs kept; n = m is a dense one.
//
//   y       [tokens, out_features]  row-major, act_dtype; every element is written
//   x       [tokens, in_features]   row-major, act_dtype
//   weight  from maskpro_interleave
//   scale   [out_features] float32, or NULL for ones: a weight is its value times its row's scale
//   x_scale one finite number above 0 (not checked), or NULL; only with MASKPRO_AVX512_VNNI
//   bias    [out_features] bias_dtype, or NULL
//
// Sums are float32, rounded once to act_dtype, which like bias_dtype is no integer. With MASKPRO_AVX512_BF16 and
// MASKPRO_AMX_BF16, subnormal bfloat16 activations and weights, and subnormal sums, may count as zero; with the latter,
// for few tokens of 2:4 int8 each activation is rounded to a multiple of 2^-21 of its token's largest, or of 2^-126, or
// of less (nm_linear_amx_int8.h). An infinite activation or a NaN may reach all of its token's outputs, also those
// whose weight of its column is not kept: with AMX; with MASKPRO_AVX512_BF16 where n > 5 / 8 m, for more than 48 tokens;
// and everywhere in the last group of m columns, which the slots that fill up a row's last chunk read too, with weights
// of 0. Reentrant: any number of threads may call at once.
//
// MASKPRO_AVX512_VNNI takes 2:4 int8 weights with in_features below 2^18 alone, and rounds activations to 8 bits: to
// multiples of x_scale from -128 to 127 times it, or, without one, of 1 / 127 of their token's largest magnitude, at
// least of the smallest normal float32. Sums are of integers, and exact. A NaN, or without x_scale an infinity, makes
// all of its token's outputs NaN.
//
// Reads the weight once for up to a few tokens. Returns a maskpro_status; on anything but MASKPRO_OK, y is untouched.
MASKPRO_API int32_t maskpro_nm_linear(void* y, const void* x, const void* weight, const float* scale,
                                      const float* x_scale, const void* bias, int64_t tokens, int64_t in_features,
                                      int64_t out_features, int32_t n, int32_t m, int32_t act_dtype,
                                      int32_t weight_dtype, int32_t bias_dtype, int32_t isa, int32_t threads);

// Makes maskpro_nm_linear the CPU kernel of torch.ops.maskpro.nm_linear_interleaved. `libtorch` is what dlopen returned
// for torch's library, or for one that depends on it; only the first call does anything. MASKPRO_BAD_ARGUMENT if it is no
// torch from 2.11 on. That operator uses as many threads as torch does.
MASKPRO_API int32_t maskpro_register_torch_ops(void* libtorch);

// A timed call of that operator.
struct maskpro_sample {
  int64_t tokens;
  int64_t weight_bytes;  // read
  double seconds;
  int32_t isa;
  int32_t n;
  int32_t m;
};

// Times one in `every` of the operator's calls, whichever thread makes them; 0 times none.
MASKPRO_API void maskpro_sample_calls(int64_t every);

// Moves up to `capacity` samples to `samples`, oldest first, and returns how many. MASKPRO_MAX_SAMPLES wait at most;
// what comes then is dropped.
#define MASKPRO_MAX_SAMPLES 4096
MASKPRO_API int64_t maskpro_take_samples(struct maskpro_sample* samples, int64_t capacity);

// One step of learning (n:m) masks: updates logits by earlier draws, then writes a weight under the next draw.
//
//   logits  [groups, m] float32, in and out; finite
//   masked  [groups, m] of weight_bytes bytes each, written; or NULL to only update
//   weight  the same; any 2 or 4 byte type in which zero bits are 0
//   flips   one number, to which the groups are added whose mask of next_draw is not a most likely one; or NULL
//
// For each i of `updates`, logits += coefficients[i] * d log P(mask of draws[i]) / d logits, all at the logits as they
// were. With gains, float32 [groups, m], a group's coefficient is also multiplied by what its mask of draws[i] gains
// over the other draws' on average, the sum of the kept columns' gains; updates is then 2 to 16. A draw is a function
// of (seed, stream, draw, logits) alone: the same on every instruction set and for every number of threads. m is 4, 8
// or 16; stream, below 2^30, tells layers apart. Reentrant.
#define MASKPRO_MAX_GAIN_DRAWS 16
MASKPRO_API int32_t maskpro_policy_step(float* logits, void* masked, const void* weight, int64_t* flips,
                                        int64_t groups, int32_t n, int32_t m, int32_t weight_bytes,
                                        const float* gains, const float* coefficients, const uint64_t* draws,
                                        int32_t updates, uint64_t next_draw, uint64_t seed, uint32_t stream,
                                        int32_t isa, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif  // MASKPRO_KERNELS_H_
