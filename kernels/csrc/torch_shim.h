// The part of torch's stable C interface that torch_ops.cpp calls, looked up in the torch that is loaded: so no header
// of torch is needed to build, and one shared library serves every torch from 2.11 on.
//
// Declarations follow torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, which promise to keep
// them; a value on the stack of an operator is a StableIValue, 64 bits (torch/csrc/stable/stableivalue_conversions.h).
#ifndef MASKPRO_TORCH_SHIM_H_
#define MASKPRO_TORCH_SHIM_H_

#include <dlfcn.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace maskpro::torch_shim {

using Value = uint64_t;
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);
using Status = int32_t;  // 0 is success; torch has written the rest to its log

// The version whose meaning of the stack is asked for: 2.10, as major << 56 | minor << 48.
constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

struct Functions {
  Status (*aoti_torch_library_init_impl)(const char* name, const char* key, const char* file, uint32_t line,
                                         void** library);
  Status (*torch_library_impl)(void* library, const char* name, Kernel kernel, uint64_t version);
  Status (*torch_get_num_threads)(uint32_t* threads);
  Status (*aoti_torch_get_data_ptr)(void* tensor, void** data);
  Status (*aoti_torch_get_dim)(void* tensor, int64_t* dim);
  Status (*aoti_torch_get_sizes)(void* tensor, int64_t** sizes);
  Status (*aoti_torch_get_numel)(void* tensor, int64_t* numel);
  Status (*aoti_torch_get_dtype)(void* tensor, int32_t* dtype);
  Status (*aoti_torch_is_contiguous)(void* tensor, bool* contiguous);
  Status (*aoti_torch_empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                     int32_t device_type, int32_t device_index, void** tensor);
  Status (*aoti_torch_copy_)(void* to, void* from, int32_t non_blocking);
  Status (*aoti_torch_delete_tensor_object)(void* tensor);
  int32_t (*aoti_torch_device_type_cpu)();
  int32_t (*aoti_torch_dtype_float32)();
  int32_t (*aoti_torch_dtype_float64)();
  int32_t (*aoti_torch_dtype_bfloat16)();
  int32_t (*aoti_torch_dtype_float16)();
  int32_t (*aoti_torch_dtype_int8)();
  int32_t (*aoti_torch_dtype_uint8)();
  Status (*torch_delete_stable_ivalue)(Value* value);  // from 2.13 on, else NULL

  // False if the library behind the handle (from dlopen, or among its dependencies) lacks one.
  bool load(void* library) {
    bool found = true;
    const auto look_up = [&](auto& function, const char* name) {
      void* symbol = dlsym(library, name);
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
      found = found && symbol != nullptr;
    };
#define MASKPRO_LOOK_UP(name) look_up(name, #name)
    MASKPRO_LOOK_UP(aoti_torch_library_init_impl);
    MASKPRO_LOOK_UP(torch_library_impl);
    MASKPRO_LOOK_UP(torch_get_num_threads);
    MASKPRO_LOOK_UP(aoti_torch_get_data_ptr);
    MASKPRO_LOOK_UP(aoti_torch_get_dim);
    MASKPRO_LOOK_UP(aoti_torch_get_sizes);
    MASKPRO_LOOK_UP(aoti_torch_get_numel);
    MASKPRO_LOOK_UP(aoti_torch_get_dtype);
    MASKPRO_LOOK_UP(aoti_torch_is_contiguous);
    MASKPRO_LOOK_UP(aoti_torch_empty_strided);
    MASKPRO_LOOK_UP(aoti_torch_copy_);
    MASKPRO_LOOK_UP(aoti_torch_delete_tensor_object);
    MASKPRO_LOOK_UP(aoti_torch_device_type_cpu);
    MASKPRO_LOOK_UP(aoti_torch_dtype_float32);
    MASKPRO_LOOK_UP(aoti_torch_dtype_float64);
    MASKPRO_LOOK_UP(aoti_torch_dtype_bfloat16);
    MASKPRO_LOOK_UP(aoti_torch_dtype_float16);
    MASKPRO_LOOK_UP(aoti_torch_dtype_int8);
    MASKPRO_LOOK_UP(aoti_torch_dtype_uint8);
    const bool all = found;
    MASKPRO_LOOK_UP(torch_delete_stable_ivalue);
#undef MASKPRO_LOOK_UP
    return all;
  }
};

inline Functions torch;  // valid once load() was true

inline void check(Status status) {
  if (status != 0) throw std::runtime_error("nm_linear: torch refused a call, see its message above");
}

// A tensor of the caller's stack, or a new one: owned.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Value value) : handle_(reinterpret_cast<void*>(value)) {}
  Tensor(Tensor&& other) noexcept : Tensor(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
  }

  // Of a `Tensor?`: the stack holds the address of a value on the heap, or 0.
  static Tensor optional(Value value) {
    if (value == 0) return Tensor();
    auto* const inner = reinterpret_cast<Value*>(value);
    Tensor tensor(*inner);
    if (torch.torch_delete_stable_ivalue != nullptr) {
      torch.torch_delete_stable_ivalue(inner);
    } else {
      delete inner;
    }
    return tensor;
  }

  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {
    int64_t strides[kMaxDim];
    int64_t stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    Tensor tensor;
    check(torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, torch.aoti_torch_device_type_cpu(), 0,
                                         &tensor.handle_));
    return tensor;
  }

  explicit operator bool() const { return handle_ != nullptr; }

  Value release() {
    void* const handle = handle_;
    handle_ = nullptr;
    return reinterpret_cast<Value>(handle);
  }

  void* data() const { return get<void*>(torch.aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(torch.aoti_torch_get_dim); }
  const int64_t* sizes() const { return get<int64_t*>(torch.aoti_torch_get_sizes); }
  int64_t numel() const { return get<int64_t>(torch.aoti_torch_get_numel); }
  int32_t dtype() const { return get<int32_t>(torch.aoti_torch_get_dtype); }
  bool is_contiguous() const { return get<bool>(torch.aoti_torch_is_contiguous); }

  // Replaces a strided tensor by a copy that is not; more dimensions than kMaxDim are the caller's to refuse.
  void make_contiguous() {
    if (is_contiguous()) return;
    Tensor copy = empty(sizes(), dim(), dtype());
    check(torch.aoti_torch_copy_(copy.handle_, handle_, 0));
    *this = std::move(copy);
  }

  std::string shape() const {
    const int64_t n = dim();
    std::string text = "(";
    for (int64_t i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes()[i]);
    return text + (n == 1 ? ",)" : ")");
  }

  static constexpr int64_t kMaxDim = 64;  // torch's own limit for most operators

 private:
  template <typename T>
  T get(Status (*function)(void*, T*)) const {
    T result{};
    check(function(handle_, &result));
    return result;
  }

  void* handle_ = nullptr;
};

}  // namespace maskpro::torch_shim

#endif  // MASKPRO_TORCH_SHIM_H_
