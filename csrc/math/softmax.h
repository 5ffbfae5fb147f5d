// Softmax statistics that can be taken in pieces and merged: Milakov and Gimelshein, arXiv:1805.02867, with one more
// sum for the entropy.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

// Of a set of logits z, with e = exp(z - top). `top` is finite: for a piece of -inf alone it is the lowest number.
template <typename T>
struct Softmax {
  T top, sum, moment;  // moment: sum of e (z - top)

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

}  // namespace FASTRL_ISA
