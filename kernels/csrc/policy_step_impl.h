// One step of learning masks, as many groups at a time as a vector has lanes, or for 2:4, thirty-two:
//
//   logits += sum over the updates of  coefficient * d log P(mask of that draw | logits) / d logits
//             (with gains: times what that draw's mask of the group gains over the others')
//   masked  = weight where the mask of next_draw keeps it, else 0
//
// No mask is stored: draw d of group g is a function of the logits and of Philox at a counter made of g, the stream and
// d. The mask of an earlier draw is drawn again from the logits it was drawn from, which have not changed since. Two of
// four are drawn by one random number (pair_of_four.h); all other patterns keep the n largest of  logit + Gumbel noise.
// The formulas are those of learner/maskpro_learner/policy.py.
//
// Roofline: 8 bytes of logit and twice the weight's own per weight, some 12 bytes; the arithmetic, about fifteen
// operations for a weight of 2:4 and one update, is what takes the time.
#ifndef MASKPRO_POLICY_STEP_IMPL_H_
#define MASKPRO_POLICY_STEP_IMPL_H_

#include <omp.h>
#include <string.h>

#include "lanes.h"
#include "maskpro_kernels.h"
#include "pair_of_four.h"
#include "policy_step.h"
#include "scratch.h"
#include "shares.h"

namespace maskpro {
namespace {

constexpr int kMaxGroup = 16;

// Groups of 2:4 at a time, which share counters: group b of them has word b / 8 of counter b % 8, so that a word of a
// vector's lanes is for neighbours. And the vectors they are in.
constexpr int kSharing = 32;
constexpr int kBatch = kSharing / kLanes;

// What a thread takes at a time, in blocks of kWidth groups: some microseconds.
constexpr int64_t kUnitBlocks = 32;

// A group size and count known at compile time, or (0, 0) for any.
template <int kN, int kM>
class PolicyLanes {
 public:
  PolicyLanes(const PolicyStep& call, float* tables)
      : call_(call),
        log_f_(reinterpret_cast<Floats*>(tables)),
        log_g_(log_f_ + (int64_t{1} << n())),
        log_rest_(log_g_ + (int64_t{1} << n())),
        words_(reinterpret_cast<Words*>(tables)) {}

  // Vectors of tables that a thread needs.
  static int64_t table_vectors(const PolicyStep& call) {
    return kIsPairOfFour ? kBatch * (int64_t{call.updates} + 1) : 3 * (int64_t{1} << call.n);
  }

  // Masks written so far that are not a most likely one.
  int64_t flips() const {
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += flips_[lane];
    return sum;
  }

  static constexpr bool kIsPairOfFour = kN == 2 && kM == 4;

  // Groups at a time.
  static constexpr int kWidth = kIsPairOfFour ? kSharing : kLanes;

  // Groups [group, group + kWidth), of which `count` exist; the others go through a buffer of zeros.
  void run(int64_t group, int64_t count) {
    float* logits = call_.logits + group * m();
    const char* weight = static_cast<const char*>(call_.weight) + group * m() * call_.weight_bytes;
    char* masked = static_cast<char*>(call_.masked) + group * m() * call_.weight_bytes;
    const float* gains = call_.gains + group * m();
    if (count == kWidth) return run_whole(group, count, logits, gains, weight, masked);
    float some_gains[kWidth * kMaxGroup] = {};
    float some_logits[kWidth * kMaxGroup] = {};
    char some_weight[4 * kWidth * kMaxGroup] = {};
    char some_masked[4 * kWidth * kMaxGroup];
    const size_t elements = static_cast<size_t>(count * m());
    const size_t bytes = elements * static_cast<size_t>(call_.weight_bytes);
    memcpy(some_logits, logits, elements * sizeof(float));
    if (call_.gains != nullptr) memcpy(some_gains, gains, elements * sizeof(float));
    if (call_.masked != nullptr) memcpy(some_weight, weight, bytes);
    run_whole(group, count, some_logits, some_gains, some_weight, some_masked);
    memcpy(logits, some_logits, elements * sizeof(float));
    if (call_.masked != nullptr) memcpy(masked, some_masked, bytes);
  }

 private:
  int n() const { return kN ? kN : call_.n; }
  int m() const { return kM ? kM : call_.m; }

  void run_whole(int64_t group, int64_t count, float* logits, const float* gains, const char* weight, char* masked) {
    if constexpr (kIsPairOfFour) return run_pairs(group, count, logits, gains, weight, masked);
    Floats spare[kMaxGroup];
    memcpy(logits_, logits, sizeof(Floats) * static_cast<size_t>(m()));
    rows_to_columns(logits_, spare, m());
    if (call_.updates > 0 && n() < m()) {
      Floats change[kMaxGroup] = {};
      if (call_.gains != nullptr) gain_of_draws(group, gains);
      for (int32_t update = 0; update < call_.updates; ++update) {
        Floats coefficient = splat(call_.coefficients[update]);
        if (call_.gains == nullptr) {
          draw(group, call_.draws[update]);
        } else {
          for (int j = 0; j < m(); ++j) kept_[j] = -(drawn_[update] >> j & 1);
          coefficient *= advantage_[update];
        }
        if constexpr (kN == 2) {
          add_score_of_pair(coefficient, change);
        } else {
          add_score(coefficient, change);
        }
      }
      add_and_store(change, logits);
    }
    if (call_.masked == nullptr) return;
    draw(group, call_.next_draw);
    count_flips(count);
    Ints rows[kMaxGroup], spare_rows[kMaxGroup];
    for (int j = 0; j < m(); ++j) rows[j] = kept_[j];
    columns_to_rows(rows, spare_rows, m());
    store_masked(rows, weight, masked);
  }

  // run_whole() for 2:4.
  void run_pairs(int64_t group, int64_t count, float* logits, const float* gains, const char* weight, char* masked) {
    draw_words(group);
    Floats columns[kBatch][4];
    for (int v = 0; v < kBatch; ++v) load_columns(logits + v * 4 * kLanes, columns[v]);
    PairOfFour pairs[kBatch];
    if (call_.updates > 0) {
      prepare(columns, pairs);
      Floats change[kBatch][4] = {};
      if (call_.gains == nullptr) {
        for (int32_t i = 0; i < call_.updates; ++i) {
          Ints kept[kBatch][4];
          for (int v = 0; v < kBatch; ++v) pairs[v].draw(words_[kBatch * i + v], kept[v]);
          const Floats coefficient = splat(call_.coefficients[i]);
          for (int v = 0; v < kBatch; ++v) pairs[v].add_score(kept[v], coefficient, change[v]);
        }
      } else {
        for (int v = 0; v < kBatch; ++v) add_scores_by_gain(pairs[v], v, gains + v * 4 * kLanes, change[v]);
      }
      for (int v = 0; v < kBatch; ++v) {
        pairs[v].unsort(change[v]);
        for (int j = 0; j < 4; ++j) columns[v][j] += change[v][j];
        Floats rows[4];
        for (int j = 0; j < 4; ++j) rows[j] = columns[v][j];
        transpose_fours(rows);
        memcpy(logits + v * 4 * kLanes, rows, sizeof rows);
      }
    }
    if (call_.masked == nullptr) return;
    prepare(columns, pairs);
    for (int v = 0; v < kBatch; ++v) {
      Ints kept[4], lane_row;
      pairs[v].draw(words_[kBatch * call_.updates + v], kept);
      for (int lane = 0; lane < kLanes; ++lane) lane_row[lane] = row_of_lane(lane);
      flips_ -= pairs[v].flipped(kept) & (Ints)(lane_row < static_cast<int32_t>(count - v * kLanes));
      pairs[v].unsort(kept);
      transpose_fours(kept);
      const int64_t bytes = v * 4 * kLanes * call_.weight_bytes;
      store_masked(kept, weight + bytes, masked + bytes);
    }
  }

  static void prepare(const Floats (&columns)[kBatch][4], PairOfFour (&pairs)[kBatch]) {
    for (int v = 0; v < kBatch; ++v) pairs[v].sort_logits(columns[v]);
    for (int v = 0; v < kBatch; ++v) pairs[v].exponentials();
    for (int v = 0; v < kBatch; ++v) pairs[v].probabilities();
  }

  static void load_columns(const float* rows, Floats (&columns)[4]) {
    memcpy(columns, rows, sizeof columns);
    transpose_fours(columns);
  }

  // One word for each group of a batch and each draw, the next one last; lanes as transpose_fours() leaves them.
  void draw_words(int64_t group) {
    Words row;
    for (int lane = 0; lane < kLanes; ++lane) row[lane] = static_cast<uint32_t>(row_of_lane(lane));
    for (int32_t i = 0; i <= call_.updates; ++i) {
      const uint64_t number = i < call_.updates ? call_.draws[i] : call_.next_draw;
      for (int first = 0; first < 8; first += kLanes) {
        const Words counter = (row & 7u) + static_cast<uint32_t>(group / 4 + first);
        Words words[4] = {counter, Words{} + (call_.stream << 2), Words{} + static_cast<uint32_t>(number),
                          Words{} + static_cast<uint32_t>(number >> 32)};
        philox(words, call_.seed);
        for (int k = 0; k < 4; ++k) {
          const Ints here = (Ints)((row & ~7u) == static_cast<uint32_t>(8 * k % kLanes));  // all lanes, up to eight
          Words& to = words_[kBatch * i + (8 * k + first) / kLanes];
          to = (Words)select(here, (Ints)words[k], (Ints)to);
        }
      }
    }
  }

  // Each draw's score, times its coefficient and what it gains over the other draws' mean; of vector v of a batch.
  void add_scores_by_gain(const PairOfFour& pair, int v, const float* gains, Floats (&change)[4]) {
    Floats gain[4];
    load_columns(gains, gain);
    pair.sort(gain);
    Ints kept[MASKPRO_MAX_GAIN_DRAWS][4];
    Floats total = {};
    for (int32_t i = 0; i < call_.updates; ++i) {
      pair.draw(words_[kBatch * i + v], kept[i]);
      advantage_[i] = Floats{};
      for (int j = 0; j < 4; ++j) advantage_[i] += select(kept[i][j], gain[j], Floats{});
      total += advantage_[i];
    }
    const float others = static_cast<float>(call_.updates - 1);
    for (int32_t i = 0; i < call_.updates; ++i) {
      const Floats advantage = advantage_[i] - (total - advantage_[i]) / others;
      pair.add_score(kept[i], splat(call_.coefficients[i]) * advantage, change);
    }
  }

  void add_and_store(const Floats* change, float* logits) {
    Floats rows[kMaxGroup], spare[kMaxGroup];
    for (int j = 0; j < m(); ++j) {
      logits_[j] += change[j];
      rows[j] = logits_[j];
    }
    columns_to_rows(rows, spare, m());
    memcpy(logits, rows, sizeof(Floats) * static_cast<size_t>(m()));
  }

  // Weights under masks that are in their order.
  void store_masked(const Ints* rows, const char* weight, char* masked) const {
    if (call_.weight_bytes == 2) {
      store_masked_as<Shorts>(rows, weight, masked);
    } else {
      store_masked_as<Ints>(rows, weight, masked);
    }
  }

  // drawn_[i] = the columns that draw i keeps, as bits; advantage_[i] = what they gain over the other draws' mean.
  void gain_of_draws(int64_t group, const float* gains) {
    Floats gain[kMaxGroup], spare[kMaxGroup];
    memcpy(gain, gains, sizeof(Floats) * static_cast<size_t>(m()));
    rows_to_columns(gain, spare, m());
    Floats total = {};
    for (int32_t i = 0; i < call_.updates; ++i) {
      draw(group, call_.draws[i]);
      drawn_[i] = Ints{};
      advantage_[i] = Floats{};
      for (int j = 0; j < m(); ++j) {
        drawn_[i] -= kept_[j] << j;
        advantage_[i] += kept_[j] != 0 ? gain[j] : Floats{};
      }
      total += advantage_[i];
    }
    const float others = static_cast<float>(call_.updates - 1);
    for (int32_t i = 0; i < call_.updates; ++i) advantage_[i] -= (total - advantage_[i]) / others;
  }

  // A mask is a most likely one if no column it drops has a larger logit than one it keeps.
  void count_flips(int64_t count) {
    Floats least = splat(3.4e38f), most = splat(-3.4e38f);
    for (int j = 0; j < m(); ++j) {
      least = ((kept_[j] != 0) & (logits_[j] < least)) ? logits_[j] : least;
      most = ((kept_[j] == 0) & (logits_[j] > most)) ? logits_[j] : most;
    }
    Ints lane_number;
    for (int lane = 0; lane < kLanes; ++lane) lane_number[lane] = lane;
    flips_ -= (Ints)(least < most) & (Ints)(lane_number < static_cast<int32_t>(count));
  }

  template <class Weights>
  void store_masked_as(const Ints* rows, const char* weight, char* masked) const {
    for (int j = 0; j < m(); ++j) {
      Weights w;
      memcpy(&w, weight + static_cast<size_t>(j) * sizeof w, sizeof w);
      w &= __builtin_convertvector(rows[j], Weights);
      memcpy(masked + static_cast<size_t>(j) * sizeof w, &w, sizeof w);
    }
  }

  // kept_[j] = -1 where the mask of a draw keeps column j, else 0.
  void draw(int64_t group, uint64_t number) {
    Floats key[kMaxGroup];
    Words lane_group;
    for (int lane = 0; lane < kLanes; ++lane) lane_group[lane] = static_cast<uint32_t>(group + lane);
    for (int first = 0; first < m(); first += 4) {
      const uint32_t place = call_.stream << 2 | static_cast<uint32_t>(first / 4);
      Words words[4] = {lane_group, Words{} + place, Words{} + static_cast<uint32_t>(number),
                        Words{} + static_cast<uint32_t>(number >> 32)};
      philox(words, call_.seed);
      for (int j = 0; j < 4; ++j) {
        const Floats exponential = -log_positive(uniform(words[j]));
        key[first + j] = logits_[first + j] - log_positive(exponential);
      }
    }
    for (int j = 0; j < m(); ++j) {
      Ints before = {};  // minus the number of columns ahead of j; ties go to the lower column
      for (int k = 0; k < m(); ++k) {
        if (k < j) before += (Ints)(key[k] >= key[j]);
        if (k > j) before += (Ints)(key[k] > key[j]);
      }
      kept_[j] = (Ints)(before > -n());
    }
  }

  // add_score() for two kept columns a and b: the only ways are a then b, and b then a.
  void add_score_of_pair(Floats coefficient, Floats* change) const {
    Floats a = {}, b = {};
    Ints seen = {};
    Floats dropped_max = splat(-3.4e38f);
    for (int j = 0; j < m(); ++j) {
      a = (kept_[j] & ~seen) != 0 ? logits_[j] : a;
      b = (kept_[j] & seen) != 0 ? logits_[j] : b;
      seen |= kept_[j];
      dropped_max = kept_[j] != 0 ? dropped_max : max(dropped_max, logits_[j]);
    }
    Floats share[kMaxGroup];  // of the dropped columns
    Floats dropped_sum = {};
    for (int j = 0; j < m(); ++j) {
      share[j] = kept_[j] != 0 ? Floats{} : exp_nonpositive(logits_[j] - dropped_max);
      dropped_sum += share[j];
    }
    const Floats dropped = dropped_max + log_positive(dropped_sum);
    // Probabilities of drawing a, b or a dropped column: first, after a, and after b.
    const Floats most = max(max(a, b), dropped);
    const Floats first_a = exp_nonpositive(a - most), first_b = exp_nonpositive(b - most);
    const Floats first_dropped = exp_nonpositive(dropped - most);
    const Floats first = 1.0f / (first_a + first_b + first_dropped);
    const Floats after_a = draw_probability(b, dropped), after_b = draw_probability(a, dropped);
    // log R(a) - log R(b), of which the order a, b has the share 1 / (1 + e^difference).
    const Floats difference = log_sum_of_two(b, dropped) - log_sum_of_two(a, dropped);
    const Floats small = exp_nonpositive(difference < 0.0f ? difference : -difference);
    const Floats larger = 1.0f / (1.0f + small), smaller = small * larger;
    const Floats a_first = difference < 0.0f ? larger : smaller;
    const Floats b_first = difference < 0.0f ? smaller : larger;
    const Floats gradient_a = 1.0f - fma(b_first, after_b, first_a * first);
    const Floats gradient_b = 1.0f - fma(a_first, after_a, first_b * first);
    const Floats dropped_part =
        fma(first_dropped, first, fma(a_first, 1.0f - after_a, b_first * (1.0f - after_b))) / dropped_sum;
    seen = Ints{};
    for (int j = 0; j < m(); ++j) {
      Floats gradient = -dropped_part * share[j];
      gradient = (kept_[j] & ~seen) != 0 ? gradient_a : gradient;
      gradient = (kept_[j] & seen) != 0 ? gradient_b : gradient;
      seen |= kept_[j];
      change[j] = fma(gradient, coefficient, change[j]);
    }
  }

  // The probability of x where only x and y are left, and the logarithm of what they sum to.
  static Floats draw_probability(Floats x, Floats y) {
    const Floats difference = x - y;
    const Floats small = exp_nonpositive(difference < 0.0f ? difference : -difference);
    const Floats larger = 1.0f / (1.0f + small);
    return difference < 0.0f ? small * larger : larger;
  }
  static Floats log_sum_of_two(Floats x, Floats y) {
    const Floats difference = x - y;
    return max(x, y) + log_positive(1.0f + exp_nonpositive(difference < 0.0f ? difference : -difference));
  }

  // change += coefficient * d log P(kept_) / d logits.
  void add_score(Floats coefficient, Floats* change) {
    Floats kept[kMaxGroup] = {};
    Ints rank[kMaxGroup];  // among the kept columns, where kept
    Ints count = {};
    Floats dropped_max = splat(-3.4e38f);
    for (int j = 0; j < m(); ++j) {
      rank[j] = count;
      for (int r = 0; r < n(); ++r) kept[r] = ((kept_[j] != 0) & (count == r)) ? logits_[j] : kept[r];
      count -= kept_[j];
      dropped_max = kept_[j] != 0 ? dropped_max : max(dropped_max, logits_[j]);
    }
    Floats dropped_sum = {};
    for (int j = 0; j < m(); ++j) {
      dropped_sum += kept_[j] != 0 ? Floats{} : exp_nonpositive(min_zero(logits_[j] - dropped_max));
    }
    const Floats dropped = dropped_max + log_positive(dropped_sum);  // the dropped columns as one

    fill_tables(kept, dropped);
    // visits_p[r] = the expected number of times that an order, on its way to the mask, could have drawn r but
    // weighs it with the others: the sum over T without r of nu(T) p_r / R(T).
    const int states = 1 << n();
    Floats kept_part[kMaxGroup] = {};
    Floats dropped_part = {};
    const Floats total = log_f_[states - 1];
    for (int state = 0; state < states - 1; ++state) {
      const Floats visits = exp_nonpositive(min_zero(log_f_[state] + log_g_[state] - total));
      for (int r = 0; r < n(); ++r) {
        if (!(state >> r & 1)) kept_part[r] += visits * exp_nonpositive(min_zero(kept[r] - log_rest_[state]));
      }
      dropped_part += visits * exp_nonpositive(min_zero(dropped - log_rest_[state]));
    }
    for (int j = 0; j < m(); ++j) {
      Floats gradient = -dropped_part * exp_nonpositive(min_zero(logits_[j] - dropped));
      for (int r = 0; r < n(); ++r) {
        gradient = ((kept_[j] != 0) & (rank[j] == r)) ? 1.0f - kept_part[r] : gradient;
      }
      change[j] += coefficient * gradient;
    }
  }

  // Rounding can carry a logarithm of a probability a little above 0. Also tames unused lanes.
  static Floats min_zero(Floats x) { return x < 0.0f ? x : Floats{}; }

  // log_rest_[T] = log of what the subset T of the kept columns leaves; log_f_[T] = of drawing T first, in any order;
  // log_g_[T] = of going on from T to the whole mask. All but for factors common to every order.
  void fill_tables(const Floats* kept, Floats dropped) {
    const int states = 1 << n();
    for (int state = 0; state < states - 1; ++state) {
      Floats most = dropped;
      for (int r = 0; r < n(); ++r) {
        if (!(state >> r & 1)) most = max(most, kept[r]);
      }
      Floats sum = exp_nonpositive(dropped - most);
      for (int r = 0; r < n(); ++r) {
        if (!(state >> r & 1)) sum += exp_nonpositive(kept[r] - most);
      }
      log_rest_[state] = most + log_positive(sum);
    }
    // Every order draws each kept column once, so their weights are left out and only the R remain.
    log_f_[0] = Floats{};
    for (int state = 1; state < states; ++state) {
      Floats ways[kMaxGroup];
      int count = 0;
      for (int r = 0; r < n(); ++r) {
        if (state >> r & 1) ways[count++] = log_f_[state & ~(1 << r)] - log_rest_[state & ~(1 << r)];
      }
      log_f_[state] = log_sum(ways, count);
    }
    log_g_[states - 1] = Floats{};
    for (int state = states - 2; state >= 0; --state) {
      Floats ways[kMaxGroup];
      int count = 0;
      for (int r = 0; r < n(); ++r) {
        if (!(state >> r & 1)) ways[count++] = log_g_[state | 1 << r] - log_rest_[state];
      }
      log_g_[state] = log_sum(ways, count);
    }
  }

  static Floats log_sum(const Floats* x, int count) {
    if (count == 1) return x[0];
    Floats most = x[0];
    for (int i = 1; i < count; ++i) most = max(most, x[i]);
    Floats sum = {};
    for (int i = 0; i < count; ++i) sum += exp_nonpositive(x[i] - most);
    return most + log_positive(sum);
  }

  const PolicyStep& call_;
  Floats* log_f_;
  Floats* log_g_;
  Floats* log_rest_;
  Words* words_;  // [draw][vector]
  Floats logits_[kMaxGroup];
  Ints kept_[kMaxGroup];
  Ints flips_ = {};
  Ints drawn_[MASKPRO_MAX_GAIN_DRAWS];
  Floats advantage_[MASKPRO_MAX_GAIN_DRAWS];
};

template <int kN, int kM>
int32_t run_pattern(const PolicyStep& call) {
  constexpr int64_t kWidth = PolicyLanes<kN, kM>::kWidth;
  const int64_t blocks = (call.groups + kWidth - 1) / kWidth;
  const int64_t table_floats = PolicyLanes<kN, kM>::table_vectors(call) * kLanes;
  float* tables = thread_scratch(table_floats * call.threads);
  if (tables == nullptr) return MASKPRO_NO_MEMORY;
  Shares shares(call.threads, blocks, kUnitBlocks);
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t thread = omp_get_thread_num();
    PolicyLanes<kN, kM> lanes(call, tables + thread * table_floats);
    for (int64_t block, end; shares.take(thread, 1, &block, &end);) {
      for (; block < end; ++block) {
        const int64_t group = block * kWidth;
        const int64_t rest = call.groups - group;
        lanes.run(group, rest < kWidth ? rest : kWidth);
      }
    }
    if (call.flips != nullptr) {
#pragma omp atomic
      *call.flips += lanes.flips();
    }
  }
  return MASKPRO_OK;
}

// The common patterns unrolled, all others by one loop; both give the same bits, but for 2:4, whose draws are its own.
inline int32_t run_policy_step(const PolicyStep& call) {
  if (call.m == 4 && call.n == 1) return run_pattern<1, 4>(call);
  if (call.m == 4 && call.n == 2) return run_pattern<2, 4>(call);
  if (call.m == 8 && call.n == 2) return run_pattern<2, 8>(call);
  if (call.m == 8 && call.n == 4) return run_pattern<4, 8>(call);
  return run_pattern<0, 0>(call);
}

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_POLICY_STEP_IMPL_H_
