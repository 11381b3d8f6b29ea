// Blocks of rows shared out between the threads of a call.
#ifndef MASKPRO_SHARES_H_
#define MASKPRO_SHARES_H_

#include <stdint.h>

#include <atomic>
#include <new>

namespace maskpro {

// Every thread has a share of neighbouring blocks, which it works through from front to back as a stream. Whoever is done
// takes from the back of the largest rest: a thread that wakes late or loses its core for a while, to another process or
// another guest of the machine, does not keep the others waiting with half of the work undone.
class Shares {
 public:
  // Floats of working memory, aligned to 64 bytes.
  static int64_t floats(int64_t threads) { return threads * static_cast<int64_t>(sizeof(Rest) / sizeof(float)); }

  // unit: blocks that stay together, but for the last.
  Shares(float* memory, int64_t threads, int64_t blocks, int64_t unit)
      : rests_(reinterpret_cast<Rest*>(memory)), threads_(threads), blocks_(blocks), unit_(unit) {
    for (int64_t thread = 0; thread < threads; ++thread) {
      new (rests_ + thread) Rest;
      deal(thread);
    }
  }

  // Deals all blocks once more; each of the `running` threads calls it, between two barriers.
  void deal_again(int64_t thread, int64_t running) {
    for (; thread < threads_; thread += running) deal(thread);
  }

  // Takes blocks [*begin, *end), at most `most` units of them. False: none is left.
  bool take(int64_t thread, int64_t most, int64_t* begin, int64_t* end) {
    uint64_t rest = rests_[thread].units.load(std::memory_order_relaxed);
    while (count(rest) > 0) {
      const int64_t some = count(rest) < most ? count(rest) : most;
      if (exchange(thread, &rest, pack(first(rest) + some, last(rest)))) {
        return blocks(first(rest), first(rest) + some, begin, end);
      }
    }
    for (;;) {
      int64_t largest = 0;
      for (int64_t other = 0; other < threads_; ++other) {
        const uint64_t its = rests_[other].units.load(std::memory_order_relaxed);
        if (other == 0 || count(its) > count(rest)) {
          rest = its;
          largest = other;
        }
      }
      if (count(rest) <= 0) return false;
      const int64_t half = (count(rest) + 1) / 2, some = half < most ? half : most;
      if (exchange(largest, &rest, pack(first(rest), last(rest) - some))) {
        return blocks(last(rest) - some, last(rest), begin, end);
      }
    }
  }

 private:
  struct alignas(64) Rest {
    std::atomic<uint64_t> units;  // the first, and the one after the last in the upper half
  };

  static uint64_t pack(int64_t first, int64_t last) {
    return static_cast<uint64_t>(last) << 32 | static_cast<uint64_t>(first);
  }
  static int64_t first(uint64_t rest) { return static_cast<int64_t>(rest & 0xffffffff); }
  static int64_t last(uint64_t rest) { return static_cast<int64_t>(rest >> 32); }
  static int64_t count(uint64_t rest) { return last(rest) - first(rest); }

  void deal(int64_t thread) {
    const int64_t units = (blocks_ + unit_ - 1) / unit_;
    rests_[thread].units.store(pack(units * thread / threads_, units * (thread + 1) / threads_),
                               std::memory_order_relaxed);
  }

  // Relaxed: what a call reads is written before its threads start, and nobody reads what it writes before they end.
  bool exchange(int64_t thread, uint64_t* rest, uint64_t to) {
    return rests_[thread].units.compare_exchange_weak(*rest, to, std::memory_order_relaxed);
  }

  bool blocks(int64_t first, int64_t last, int64_t* begin, int64_t* end) const {
    *begin = first * unit_;
    *end = last * unit_ < blocks_ ? last * unit_ : blocks_;
    return true;
  }

  Rest* const rests_;
  const int64_t threads_;
  const int64_t blocks_;
  const int64_t unit_;
};

}  // namespace maskpro

#endif  // MASKPRO_SHARES_H_
