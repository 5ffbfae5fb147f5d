// Advantages within groups, in double. A batch has thousands of rewards, not millions: one thread, in order.
#pragma once

#include <math.h>

#include "buffer.h"
#include "kernels.h"

namespace FASTRL_ISA {

// Over the numbers of each segment that are not NaN: how many, the least, the mean, the sample standard deviation.
struct Spread {
  double count, low, mean, std;
};

// Numbers are shifted by the least of their segment before anything is summed: differences of equals are exactly 0, so
// a constant segment has exactly no spread, and a large common offset costs no digits.
inline void measure(const double* x, const int64_t* segment, int64_t n, Spread* spread, int64_t segments) {
  for (int64_t s = 0; s < segments; ++s) spread[s] = {0, HUGE_VAL, 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) continue;
    Spread& of = spread[segment ? segment[i] : 0];
    of.count += 1;
    of.low = x[i] < of.low ? x[i] : of.low;
  }
  for (int64_t i = 0; i < n; ++i) {
    Spread& of = spread[segment ? segment[i] : 0];
    if (x[i] == x[i]) of.mean += x[i] - of.low;
  }
  for (int64_t s = 0; s < segments; ++s) spread[s].mean /= spread[s].count > 1 ? spread[s].count : 1;
  for (int64_t i = 0; i < n; ++i) {
    Spread& of = spread[segment ? segment[i] : 0];
    const double deviation = x[i] - of.low - of.mean;
    if (x[i] == x[i]) of.std += deviation * deviation;
  }
  for (int64_t s = 0; s < segments; ++s) {
    Spread& of = spread[s];
    of.std = ::sqrt(of.std / (of.count > 2 ? of.count - 1 : 1));
  }
}

inline double divisor(const Spread& of, double eps) { return of.std > 0 ? of.std + eps : 1; }

inline void group_advantages(const GroupAdvantages& a) {
  Buffer<Spread> groups(a.groups);
  measure(a.rewards, a.group, a.count, groups, a.groups);
  for (int64_t i = 0; i < a.count; ++i) {
    const Spread& of = groups[a.group[i]];
    double x = a.rewards[i];
    if (a.baseline != Baseline::none) x = x - of.low - of.mean;
    // r - mean of the others = (r - mean) n / (n - 1)
    if (a.baseline == Baseline::leave_one_out && of.count > 1) x *= of.count / (of.count - 1);
    if (a.scale == Scale::group) x /= divisor(of, a.eps);
    a.advantages[i] = x;
  }
  double batch_divisor = 1;
  if (a.scale == Scale::batch) {
    Spread batch;
    measure(a.advantages, nullptr, a.count, &batch, 1);
    batch_divisor = divisor(batch, a.eps);
  }
  for (int64_t i = 0; i < a.count; ++i)  // a reward that could not be scored is part of nothing
    a.advantages[i] = a.advantages[i] == a.advantages[i] ? a.advantages[i] / batch_divisor : 0;
}

}  // namespace FASTRL_ISA
