// One step of learning masks, as many groups at a time as a vector has lanes:
//
//   logits += sum over the updates of  coefficient * d log P(mask of that draw | logits) / d logits
//             (with gains: times what that draw's mask of the group gains over the others')
//   masked  = weight where the mask of next_draw keeps it, else 0
//
// No mask is stored: draw d of group g is the n largest of  logit + Gumbel noise,  whose noise is Philox at the
// counter (g, stream, d). The mask of an earlier draw is drawn again from the logits it was drawn from, which
// have not changed since. The formulas are those of learner/maskpro_learner/policy.py.
//
// Roofline: 8 bytes of logit and twice the weight's own per weight, some 12 bytes; the arithmetic, about a hundred
// operations for a weight of 2:4 and one update, is what takes the time.
#ifndef MASKPRO_POLICY_STEP_IMPL_H_
#define MASKPRO_POLICY_STEP_IMPL_H_

#include <omp.h>
#include <string.h>

#include "lanes.h"
#include "maskpro_kernels.h"
#include "policy_step.h"
#include "scratch.h"

namespace maskpro {
namespace {

constexpr int kMaxGroup = 16;

// A group size and count known at compile time, or (0, 0) for any.
template <int kN, int kM>
class PolicyLanes {
 public:
  PolicyLanes(const PolicyStep& call, float* tables)
      : call_(call),
        log_f_(reinterpret_cast<Floats*>(tables)),
        log_g_(log_f_ + (int64_t{1} << n())),
        log_rest_(log_g_ + (int64_t{1} << n())) {}

  // Vectors of tables that a thread needs.
  static int64_t table_vectors(int32_t n) { return 3 * (int64_t{1} << n); }

  // Masks written so far that are not a most likely one.
  int64_t flips() const {
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += flips_[lane];
    return sum;
  }

  // Groups [group, group + kLanes), of which `count` exist; the others go through a buffer of zeros.
  void run(int64_t group, int64_t count) {
    float* logits = call_.logits + group * m();
    const char* weight = static_cast<const char*>(call_.weight) + group * m() * call_.weight_bytes;
    char* masked = static_cast<char*>(call_.masked) + group * m() * call_.weight_bytes;
    const float* gains = call_.gains + group * m();
    if (count == kLanes) return run_whole(group, count, logits, gains, weight, masked);
    float some_gains[kLanes * kMaxGroup] = {};
    float some_logits[kLanes * kMaxGroup] = {};
    char some_weight[4 * kLanes * kMaxGroup] = {};
    char some_masked[4 * kLanes * kMaxGroup];
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
      Floats rows[kMaxGroup];
      for (int j = 0; j < m(); ++j) {
        logits_[j] += change[j];
        rows[j] = logits_[j];
      }
      columns_to_rows(rows, spare, m());
      memcpy(logits, rows, sizeof(Floats) * static_cast<size_t>(m()));
    }
    if (call_.masked == nullptr) return;
    draw(group, call_.next_draw);
    count_flips(count);
    if (call_.weight_bytes == 2) {
      store_masked<Shorts>(weight, masked);
    } else {
      store_masked<Ints>(weight, masked);
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
  void store_masked(const char* weight, char* masked) const {
    Ints rows[kMaxGroup], spare[kMaxGroup];
    for (int j = 0; j < m(); ++j) rows[j] = kept_[j];
    columns_to_rows(rows, spare, m());
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
        // The middles of 2^23 intervals: exact in float32, neither 0 nor 1.
        const Floats uniform = (__builtin_convertvector((Ints)(words[j] >> 9), Floats) + 0.5f) * 0x1p-23f;
        const Floats exponential = -log_positive(uniform);
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
  Floats logits_[kMaxGroup];
  Ints kept_[kMaxGroup];
  Ints flips_ = {};
  Ints drawn_[MASKPRO_MAX_GAIN_DRAWS];
  Floats advantage_[MASKPRO_MAX_GAIN_DRAWS];
};

template <int kN, int kM>
int32_t run_pattern(const PolicyStep& call) {
  const int64_t blocks = (call.groups + kLanes - 1) / kLanes;
  const int64_t table_floats = PolicyLanes<kN, kM>::table_vectors(call.n) * kLanes;
  float* tables = thread_scratch(table_floats * call.threads);
  if (tables == nullptr) return MASKPRO_NO_MEMORY;
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    PolicyLanes<kN, kM> lanes(call, tables + thread * table_floats);
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
      const int64_t group = block * kLanes;
      const int64_t rest = call.groups - group;
      lanes.run(group, rest < kLanes ? rest : kLanes);
    }
    if (call.flips != nullptr) {
#pragma omp atomic
      *call.flips += lanes.flips();
    }
  }
  return MASKPRO_OK;
}

// The common patterns unrolled, all others by one loop; both give the same bits.
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
