// The advantage of one reward, from how the rewards of its group are spread.
#pragma once

#include "group_spec.h"
#include "real.h"

namespace FASTRL_ISA {

// Of the numbers of a segment that are not NaN: how many, the least, the mean, the sample standard deviation.
//
// Numbers are shifted by the least of their segment before anything is summed: differences of equals are exactly 0, so
// a constant segment has exactly no spread, and a large common offset costs no digits. So `mean` is relative to `low`.
struct Spread {
  double count, low, mean, std;

  FASTRL_HD double deviation(double x) const { return x - low - mean; }
  FASTRL_HD void set_mean(double shifted_sum) { mean = shifted_sum / (count > 1 ? count : 1); }
  FASTRL_HD void set_std(double squared_sum) { std = ::sqrt(squared_sum / (count > 2 ? count - 1 : 1)); }
  FASTRL_HD double divisor(double eps) const { return std > 0 ? std + eps : 1; }
};

// NaN for a reward that is NaN; before the spread of the batch, where that is the scale.
FASTRL_HD double group_advantage(double x, const Spread& of, Baseline baseline, Scale scale, double eps) {
  if (baseline != Baseline::none) x = of.deviation(x);
  // r - mean of the others = (r - mean) n / (n - 1)
  if (baseline == Baseline::leave_one_out && of.count > 1) x *= of.count / (of.count - 1);
  return scale == Scale::group ? x / of.divisor(eps) : x;
}

}  // namespace FASTRL_ISA
