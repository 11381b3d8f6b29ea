#include "call_samples.h"

#include <algorithm>
#include <atomic>
#include <mutex>

namespace maskpro {
namespace {

std::atomic<int64_t> every{0};
std::atomic<int64_t> left{0};

std::mutex mutex;
maskpro_sample waiting[MASKPRO_MAX_SAMPLES];
int64_t count = 0;

}  // namespace

bool is_sampled() {
  const int64_t period = every.load(std::memory_order_relaxed);
  if (period == 0 || left.fetch_sub(1, std::memory_order_relaxed) > 1) return false;
  left.store(period, std::memory_order_relaxed);
  return true;
}

void keep(const maskpro_sample& sample) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (count < MASKPRO_MAX_SAMPLES) waiting[count++] = sample;
}

}  // namespace maskpro

void maskpro_sample_calls(int64_t every) {
  maskpro::left.store(every);
  maskpro::every.store(every);
}

int64_t maskpro_take_samples(maskpro_sample* samples, int64_t capacity) {
  const std::lock_guard<std::mutex> lock(maskpro::mutex);
  const int64_t taken = std::min(capacity, maskpro::count);
  std::copy_n(maskpro::waiting, taken, samples);
  std::copy(maskpro::waiting + taken, maskpro::waiting + maskpro::count, maskpro::waiting);
  maskpro::count -= taken;
  return taken;
}
