// The softmax of one row of logits, by one block: statistics from one read.
//
// A thread sums in float, a block in double, in an order that depends on the row's length alone: no other row changes its
// bits, nor does the place of a row.
#pragma once

#include "../math/softmax.h"
#include "device.h"

namespace FASTRL_ISA {

template <typename Real>
constexpr Real lowest = sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.797693134862315e308);

// A quotient, not a product with the inverse: with z near 100 the inverse's rounding would show in exp(z).
template <typename Real, int N>
__device__ void divide(Real (&z)[N], Real temperature) {
  if (temperature == Real(1)) return;
#pragma unroll
  for (Real& x : z) x = x / temperature;
}

// finish(first, z) turns the logits from entry `first` on, in their place, into what the softmax is of.
template <typename In, typename Finish>
struct SoftmaxRow {
  using Real = typename Wide<In>::Real;

  const In* logits;
  int64_t vocabulary;
  Finish finish;

  // seen(first, pack) is told what was read.
  template <typename Seen>
  __device__ Softmax<double> statistics(bool moments, Seen seen) const {
    Softmax<Real> own{lowest<Real>, 0, 0};
    each_pack(logits, vocabulary, [&](int64_t first, const auto& pack) {
      seen(first, pack);
      Real z[pack.size];
      widen_all(pack, z);
      finish(first, z);
      own.add(z, pack.size, moments);
    });
    const Softmax<Real> level = own.below(block_reduce(own.top, Larger()));
    const double sum = block_reduce(double(level.sum), Add());
    return {double(level.top), sum, moments ? block_reduce(double(level.moment), Add()) : 0};
  }

  __device__ double logp(int64_t entry, const Softmax<double>& of) const {
    Real z[1] = {widen(logits[entry])};
    finish(entry, z);
    return double(z[0]) - of.top - of.log_total();
  }
};

}  // namespace FASTRL_ISA
