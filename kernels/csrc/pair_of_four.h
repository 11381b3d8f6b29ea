// Two of four columns, drawn without replacement from softmax(logits), for as many groups as a vector has lanes.
//
// The six masks have probabilities in closed form, so one random number chooses among them: no noise and no logarithm
// for each column. With e_i = exp(logit_i), S their sum and R(i) = S - e_i:
//
//   P(i, j) S = e_i e_j (1 / R(i) + 1 / R(j))
//
// Columns are sorted first, so that nothing overflows or cancels however far apart logits are: e is relative to the
// largest (e_0 = 1), and e_1, e_2, e_3 = t, t f_2, t f_3 where t and f are exponentials of differences of neighbours
// that may underflow, and R(0) = t F with F = 1 + f_2 + f_3 >= 1 is never subtracted from anything.
//
// maskpro_kernels/triton/policy_step.py draws the same masks, to the bit: what leads to a draw is the same float32
// operations in the same order. Change both.
#ifndef MASKPRO_PAIR_OF_FOUR_H_
#define MASKPRO_PAIR_OF_FOUR_H_

#include "lanes.h"

namespace maskpro {
namespace {

class PairOfFour {
 public:
  // sort_logits(), exponentials() and probabilities() prepare draws. They are apart so that each can be called for
  // several groups in turn: done at once they are one chain of operations that wait for each other.
  [[gnu::always_inline]] void sort_logits(const Floats (&logits)[4]) {
    for (int j = 0; j < 4; ++j) l_[j] = logits[j];
    for (int k = 0; k < 5; ++k) {
      const Floats a = l_[kFirst[k]], b = l_[kSecond[k]];
      swap_[k] = (Ints)(a < b);
      l_[kFirst[k]] = select(swap_[k], b, a);
      l_[kSecond[k]] = select(swap_[k], a, b);
    }
  }

  [[gnu::always_inline]] void exponentials() {
    t_ = exp_nonpositive(l_[1] - l_[0]);
    f2_ = exp_nonpositive(l_[2] - l_[1]);
    f3_ = exp_nonpositive(l_[3] - l_[1]);
  }

  [[gnu::always_inline]] void probabilities() {
    f_ = (1.0f + f2_) + f3_;
    r_[1] = fma(t_, f2_ + f3_, one());
    r_[2] = fma(t_, 1.0f + f3_, one());
    r_[3] = fma(t_, 1.0f + f2_, one());
    // One division for four reciprocals.
    const Floats product01 = f_ * r_[1], product23 = r_[2] * r_[3];
    const Floats all = 1.0f / (product01 * product23);
    const Floats half01 = all * product23, half23 = all * product01;
    inverse_f_ = half01 * r_[1];
    inverse_r_[1] = half01 * f_;
    inverse_r_[2] = half23 * r_[3];
    inverse_r_[3] = half23 * r_[2];
    const Floats g1 = t_ * inverse_r_[1], g2 = (t_ * f2_) * inverse_r_[2], g3 = (t_ * f3_) * inverse_r_[3];
    // P times S, summed up over the pairs 01, 02, 03, 12, 13, 23 of sorted columns.
    sum_[0] = fma(half01, r_[1], g1);
    sum_[1] = sum_[0] + fma(f2_, inverse_f_, g2);
    sum_[2] = sum_[1] + fma(f3_, inverse_f_, g3);
    sum_[3] = fma(t_, fma(f2_, g1, g2), sum_[2]);
    sum_[4] = fma(t_, fma(f3_, g1, g3), sum_[3]);
    sum_[5] = fma(t_, fma(f3_, g2, f2_ * g3), sum_[4]);
  }

  // kept[i] = -1 where the mask that a random word chooses keeps sorted column i, else 0.
  [[gnu::always_inline]] void draw(Words word, Ints (&kept)[4]) const {
    const Floats x = uniform(word) * sum_[5];
    Ints below[5];
    for (int k = 0; k < 5; ++k) below[k] = (Ints)(x < sum_[k]);
    kept[0] = below[2];
    kept[1] = below[0] | (~below[2] & below[4]);
    kept[2] = (~below[0] & below[1]) | (~below[2] & below[3]) | ~below[4];
    kept[3] = (~below[1] & below[2]) | ~below[3];
  }

  // change += coefficient * d log P(kept) / d logits, of sorted columns:
  //   d log P(a, b) / d logit_i = [i kept] - e_i (1 / S + [i not a] alpha / R(a) + [i not b] beta / R(b))
  // where a comes before b and alpha = R(b) / (R(a) + R(b)) is the share of the order a, b; beta = 1 - alpha.
  [[gnu::always_inline]] void add_score(const Ints (&kept)[4], Floats coefficient, Floats (&change)[4]) const {
    const Floats tf = t_ * f_;
    const Floats ra = select(kept[0], tf, select(kept[1], r_[1], r_[2]));
    const Floats rb = select(kept[3], r_[3], select(kept[2], r_[2], r_[1]));
    const Floats inverse_rb = select(kept[3], inverse_r_[3], select(kept[2], inverse_r_[2], inverse_r_[1]));
    const Floats s = 1.0f + tf, both = ra + rb;
    const Floats inverse = 1.0f / (s * both);
    const Floats inverse_s = inverse * both, inverse_both = inverse * s;
    const Floats beta_part = fma(ra * inverse_both, inverse_rb, inverse_s);  // 1 / S + beta / R(b)
    const Floats rb_share = rb * inverse_both;
    const Floats alpha_part = rb_share * select(kept[1], inverse_r_[1], inverse_r_[2]);  // alpha / R(a), a not 0
    const Floats t_alpha_part = select(kept[0], rb_share * inverse_f_, t_ * alpha_part);
    const Floats t_beta_part = t_ * beta_part, t_inverse_s = t_ * inverse_s;
    const Floats dropped = t_beta_part + t_alpha_part, second = t_inverse_s + t_alpha_part;
    change[0] = fma(select(kept[0], 1.0f - beta_part, -(beta_part + alpha_part)), coefficient, change[0]);
    const Floats first1 = select(kept[0], second, t_beta_part);
    change[1] = fma(select(kept[1], one(), Floats{}) - select(kept[1], first1, dropped), coefficient, change[1]);
    const Floats first2 = select(kept[3], t_beta_part, second);
    change[2] = fma(fma(-f2_, select(kept[2], first2, dropped), select(kept[2], one(), Floats{})), coefficient, change[2]);
    change[3] = fma(fma(-f3_, select(kept[3], second, dropped), select(kept[3], one(), Floats{})), coefficient, change[3]);
  }

  // -1 where a mask is not a most likely one: some column it drops has a larger logit than one it keeps.
  [[gnu::always_inline]] Ints flipped(const Ints (&kept)[4]) const {
    const Floats least = select(kept[3], l_[3], select(kept[2], l_[2], l_[1]));
    const Floats most = select(kept[0], select(kept[1], l_[2], l_[1]), l_[0]);
    return (Ints)(least < most);
  }

  // Brings what belongs to the columns into sorted order, and back.
  template <class Vec>
  [[gnu::always_inline]] void sort(Vec (&v)[4]) const {
    for (int k = 0; k < 5; ++k) exchange(k, v);
  }
  template <class Vec>
  [[gnu::always_inline]] void unsort(Vec (&v)[4]) const {
    for (int k = 4; k >= 0; --k) exchange(k, v);
  }

 private:
  static Floats one() { return splat(1.0f); }
  static constexpr int kFirst[5] = {0, 2, 0, 1, 1}, kSecond[5] = {1, 3, 2, 3, 2};

  template <class Vec>
  [[gnu::always_inline]] void exchange(int k, Vec (&v)[4]) const {
    const Vec a = v[kFirst[k]], b = v[kSecond[k]];
    v[kFirst[k]] = select(swap_[k], b, a);
    v[kSecond[k]] = select(swap_[k], a, b);
  }

  Floats l_[4];     // logits, the largest first
  Ints swap_[5];    // the sorting network's exchanges
  Floats t_, f2_, f3_, f_;
  Floats r_[4];     // R(i), i > 0
  Floats inverse_f_, inverse_r_[4];
  Floats sum_[6];
};

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_PAIR_OF_FOUR_H_
