#include "scratch.h"

#include <cstdlib>

namespace maskpro {
namespace {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* reserve(int64_t count) {
    if (count > capacity_) {
      constexpr int64_t kPage = 4096 / sizeof(float);
      count = (count + kPage - 1) / kPage * kPage;
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count) * sizeof(float)));
      capacity_ = data_ == nullptr ? 0 : count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace

float* thread_scratch(int64_t count) {
  thread_local Buffer buffer;
  return buffer.reserve(count);
}

}  // namespace maskpro
