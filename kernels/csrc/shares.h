// Work shared out between the threads of a call.
#ifndef MASKPRO_SHARES_H_
#define MASKPRO_SHARES_H_

#include <stdint.h>

#include <atomic>

namespace maskpro {

// Every thread has a share of neighbouring blocks, which it works through from front to back as a stream. Whoever is done
// takes from the back of the largest rest. A thread that wakes late, has a slower core, or loses it for a while to another
// process or to another guest of the machine, does not keep the others waiting for more than it has taken.
//
// Compiled once, for any CPU: nothing here is inlined.
class Shares {
 public:
  // unit: blocks that stay together, but for the last; there are less than 2^32 units.
  Shares(int64_t threads, int64_t blocks, int64_t unit);

  // How many blocks to take at once where they meet a tile's activations while those are in L1: one after the other,
  // where there are many tiles, they would fetch them from L2 each time. All takes are alike, as far as they can be.
  static int64_t together(int64_t threads, int64_t blocks);

  // Takes blocks [*begin, *end), at most `most` units of them. False: none is left.
  bool take(int64_t thread, int64_t most, int64_t* begin, int64_t* end);

  // Deals all blocks once more; each of the `running` threads calls it, between two barriers.
  void deal_again(int64_t thread, int64_t running);

 private:
  // More threads than this share these.
  static constexpr int64_t kMost = 64;

  // Units [first, last) that nobody has taken, in one word, so that both ends change at once; alone in its cache line.
  struct alignas(64) Rest {
    std::atomic<uint64_t> word;
  };

  void deal(int64_t share);
  void give(int64_t first, int64_t last, int64_t* begin, int64_t* end) const;

  const int64_t shares_;
  const int64_t blocks_;
  const int64_t unit_;
  Rest rests_[kMost];
};

}  // namespace maskpro

#endif  // MASKPRO_SHARES_H_
