// The CPU kernel of torch.ops.maskpro.nm_linear_interleaved (its schema and its fake are in maskpro_kernels/ops.py).
//
// Why not Python: a decode step calls it for every linear layer, and a small layer's product takes less time than an
// operator written in Python and a call through ctypes.
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.h"
#include "call_samples.h"
#include "maskpro_kernels.h"
#include "torch_shim.h"

namespace maskpro {
namespace {

using torch_shim::Tensor;
using torch_shim::torch;
using torch_shim::Value;

struct DType {
  int32_t torch;
  const char* name;
};

// Numbered as maskpro_dtype.
struct DTypes {
  DType all[4];

  int32_t find(int32_t torch_code) const {
    for (int32_t i = 0; i < 4; ++i) {
      if (all[i].torch == torch_code) return i;
    }
    return -1;
  }

  // Torch's own code where the kernels do not know the type.
  std::string name(int32_t torch_code) const {
    const int32_t found = find(torch_code);
    if (found >= 0) return all[found].name;
    if (torch_code == torch.aoti_torch_dtype_uint8()) return "torch.uint8";
    if (torch_code == torch.aoti_torch_dtype_float64()) return "torch.float64";
    return "ScalarType " + std::to_string(torch_code);
  }
};

DTypes dtypes;

// Torch makes a ValueError of it.
[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("nm_linear: " + what); }

int32_t float_dtype(const Tensor& tensor, const char* name) {
  const int32_t dtype = dtypes.find(tensor.dtype());
  if (dtype < 0 || dtype == MASKPRO_I8) {
    refuse(std::string(name) + ": expected a 16 or 32 bit float on cpu, found " + dtypes.name(tensor.dtype()));
  }
  return dtype;
}

void check_weight(const Tensor& weight, int64_t in_features, int64_t out_features, int64_t n, int64_t m,
                  int32_t dtype) {
  const bool narrow = n >= 1 && n <= m && m <= 32;
  const int64_t bytes = narrow ? maskpro_interleaved_bytes(in_features, out_features, static_cast<int32_t>(n),
                                                           static_cast<int32_t>(m), dtype)
                               : -1;
  if (bytes < 0) {
    refuse("expected n of every m = 4, 8, 16 or 32 kept, an in_features that m divides and sizes of at most 2^30, found " +
           std::to_string(n) + ":" + std::to_string(m) + " of " + std::to_string(out_features) + " x " +
           std::to_string(in_features));
  }
  if (weight.numel() == bytes && weight.dtype() == torch.aoti_torch_dtype_uint8() &&
      weight.is_contiguous()) {
    return;
  }
  refuse("expected an interleaved weight of " + std::to_string(bytes) + " contiguous bytes (" + std::to_string(n) +
         ":" + std::to_string(m) + ", " + std::to_string(out_features) + " x " + std::to_string(in_features) + ", " +
         dtypes.all[dtype].name + "), found " + std::to_string(weight.numel()) + " of " +
         dtypes.name(weight.dtype()));
}

void check_scale(const Tensor& scale, int32_t weight_dtype, int64_t out_features) {
  if (!scale) {
    if (weight_dtype == MASKPRO_I8) refuse("expected a scale with int8 weights, found none");
    return;
  }
  if (scale.dtype() == dtypes.all[MASKPRO_F32].torch && scale.dim() == 1 && scale.numel() == out_features &&
      scale.is_contiguous()) {
    return;
  }
  refuse("scale: expected contiguous torch.float32 (" + std::to_string(out_features) + ",) on cpu, found " +
         dtypes.name(scale.dtype()) + " " + scale.shape());
}

// What is rounded to 8 bits, or must not be.
void check_eight_bit(int64_t isa, const Tensor& x_scale, int64_t n, int64_t m, int32_t weight_dtype,
                     int64_t in_features) {
  if (isa == MASKPRO_AVX512_VNNI && !is_eight_bit(in_features, n, m, weight_dtype)) {
    refuse("expected a 2:4 int8 weight with in_features below 262144 for activations of 8 bits, found " +
           std::to_string(n) + ":" + std::to_string(m) + " " + dtypes.all[weight_dtype].name + " with " +
           std::to_string(in_features));
  }
  if (!x_scale) return;
  if (isa != MASKPRO_AVX512_VNNI) {
    refuse("x_scale: expected none with instruction set " + std::to_string(isa) + ", which does not round activations");
  }
  if (x_scale.dtype() != dtypes.all[MASKPRO_F32].torch || x_scale.numel() != 1) {
    refuse("x_scale: expected one number of torch.float32 on cpu, found " + dtypes.name(x_scale.dtype()) + " " +
           x_scale.shape());
  }
}

// nm_linear_interleaved(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int out_features, int in_features, int n,
// int m, ScalarType dtype, int isa, Tensor? x_scale=None) -> Tensor
void nm_linear_interleaved(Value* stack, uint64_t, uint64_t) {
  // Owned before anything is refused.
  Tensor x(stack[0]), weight(stack[1]);
  Tensor scale = Tensor::optional(stack[2]), bias = Tensor::optional(stack[3]), x_scale = Tensor::optional(stack[10]);
  const auto out_features = static_cast<int64_t>(stack[4]), in_features = static_cast<int64_t>(stack[5]);
  const auto n = static_cast<int64_t>(stack[6]), m = static_cast<int64_t>(stack[7]);
  const auto stored = static_cast<int32_t>(stack[8]);
  const auto isa = static_cast<int64_t>(stack[9]);

  const int64_t dim = x.dim();
  if (dim < 1 || dim > Tensor::kMaxDim || x.sizes()[dim - 1] != in_features) {
    refuse("expected x (..., " + std::to_string(in_features) + "), in_features of the weight, found " + x.shape());
  }
  const int32_t act_dtype = float_dtype(x, "x"), weight_dtype = dtypes.find(stored);
  if (weight_dtype < 0) refuse("expected kept values of a 16 or 32 bit float or int8, found " + dtypes.name(stored));
  check_weight(weight, in_features, out_features, n, m, weight_dtype);
  check_scale(scale, weight_dtype, out_features);
  if (isa < MASKPRO_PORTABLE || isa > MASKPRO_AVX512_VNNI) {
    refuse("expected the number of an instruction set, 0 to 5, found " + std::to_string(isa));
  }
  check_eight_bit(isa, x_scale, n, m, weight_dtype, in_features);
  int32_t bias_dtype = 0;
  if (bias) {
    if (bias.dim() != 1 || bias.numel() != out_features) {
      refuse("bias of shape " + bias.shape() + ", expected (" + std::to_string(out_features) + ",)");
    }
    bias_dtype = float_dtype(bias, "bias");
    bias.make_contiguous();
  }
  x.make_contiguous();

  int64_t sizes[Tensor::kMaxDim];
  int64_t tokens = 1;
  for (int64_t i = 0; i < dim; ++i) {
    sizes[i] = i + 1 < dim ? x.sizes()[i] : out_features;
    if (i + 1 < dim) tokens *= sizes[i];
  }
  Tensor y = Tensor::empty(sizes, dim, x.dtype());
  uint32_t threads = 1;
  torch_shim::check(torch.torch_get_num_threads(&threads));

  const bool sampled = is_sampled();
  const auto begin = sampled ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
  const int32_t status = maskpro_nm_linear(
      y.data(), x.data(), weight.data(), scale ? static_cast<const float*>(scale.data()) : nullptr,
      x_scale ? static_cast<const float*>(x_scale.data()) : nullptr, bias ? bias.data() : nullptr, tokens, in_features,
      out_features, static_cast<int32_t>(n), static_cast<int32_t>(m), act_dtype, weight_dtype, bias_dtype,
      static_cast<int32_t>(isa), static_cast<int32_t>(threads));
  if (status != MASKPRO_OK) {
    const char* const names[] = {"", "bad argument", "instruction set not available", "out of memory"};
    throw std::runtime_error("native nm_linear failed: " + std::string(names[status]) + " (x " + x.shape() +
                             ", weight " + std::to_string(out_features) + " x " + std::to_string(in_features) + ", " +
                             std::to_string(n) + ":" + std::to_string(m) + ", instruction set " + std::to_string(isa) +
                             ", " + std::to_string(threads) + " threads)");
  }
  if (sampled) {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    keep({tokens, weight.numel(), seconds.count(), static_cast<int32_t>(isa), static_cast<int32_t>(n),
          static_cast<int32_t>(m)});
  }
  stack[0] = y.release();
}

int32_t register_torch_ops(void* libtorch) {
  if (!torch.load(libtorch)) return MASKPRO_BAD_ARGUMENT;
  dtypes = {{{torch.aoti_torch_dtype_float32(), "torch.float32"},
             {torch.aoti_torch_dtype_bfloat16(), "torch.bfloat16"},
             {torch.aoti_torch_dtype_float16(), "torch.float16"},
             {torch.aoti_torch_dtype_int8(), "torch.int8"}}};
  void* library = nullptr;  // for as long as the process: nothing here can be unloaded
  if (torch.aoti_torch_library_init_impl("maskpro", "CPU", "torch_ops.cpp", __LINE__, &library) != 0 ||
      torch.torch_library_impl(library, "nm_linear_interleaved", nm_linear_interleaved, torch_shim::kVersion) != 0) {
    return MASKPRO_BAD_ARGUMENT;
  }
  return MASKPRO_OK;
}

}  // namespace
}  // namespace maskpro

int32_t maskpro_register_torch_ops(void* libtorch) {
  static const int32_t status = maskpro::register_torch_ops(libtorch);
  return status;
}
