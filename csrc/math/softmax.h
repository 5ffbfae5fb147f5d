// Softmax statistics that can be taken in pieces and merged: Milakov and Gimelshein, arXiv:1805.02867, with one more
// sum for the entropy.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

// Of a set of logits z, with e = exp(z - top). `top` is finite: for a piece of -inf alone it is the lowest number.
template <typename T>
struct Softmax {
  T top, sum, moment;  // moment: sum of e (z - top)

  // With n more logits. A NaN is passed over by the maximum and found by the sum.
  FASTRL_HD void add(const T* z, int n, bool moments) {
    T highest = top;
    for (int i = 0; i < n; ++i) highest = z[i] > highest ? z[i] : highest;
    if (highest > top) *this = below(highest);
    for (int i = 0; i < n; ++i) {
      const T shifted = z[i] - top, e = exp_of(shifted);
      sum += e;
      if (moments) moment += e == T(0) ? T(0) : e * shifted;  // 0 log 0 = 0
    }
  }
  // Relative to a higher maximum. A piece that falls away entirely has no moment: 0 times its shift could be NaN.
  FASTRL_HD Softmax below(T higher) const {
    const T shift = top - higher, factor = exp_of(shift), scaled = sum * factor;
    return {higher, scaled, factor > T(0) ? moment * factor + scaled * shift : T(0) * sum};
  }
  FASTRL_HD Softmax merge(const Softmax& other) const {
    const T higher = top > other.top ? top : other.top;
    const Softmax a = below(higher), b = other.below(higher);
    return {higher, a.sum + b.sum, a.moment + b.moment};
  }
  // log p of a logit is (z - top) - log_total().
  FASTRL_HD T log_total() const { return log_of(sum); }
  FASTRL_HD T entropy() const { return log_total() - moment / sum; }
};

// d (g log p_y + ge H) / d z_v at a v that is not the target y, from p = p_v and its logarithm: -g p - ge p (log p + H).
template <typename T>
FASTRL_HD T dlogit(T p, T logp, T g, T ge, T entropy) {
  return -(g * p) - (p == T(0) ? T(0) : ge * p * (logp + entropy));
}

// The same at the target, from log p_y itself: with a probability near 1, 1 - p would be lost.
template <typename T>
FASTRL_HD T dlogit_at_target(T logp, T g, T ge, T entropy) {
  const T p = exp_of(logp);
  return -g * expm1_of(logp) - (p > T(0) ? ge * p * (logp + entropy) : ge * p);
}

}  // namespace FASTRL_ISA
