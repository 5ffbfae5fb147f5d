// Advantages within groups, in double. A batch has thousands of rewards, not millions: one thread, in order.
#pragma once

#include "../math/group_advantage.h"
#include "buffer.h"
#include "kernels.h"

namespace FASTRL_ISA {

inline void measure(const double* x, const int64_t* segment, int64_t n, Spread* spread, int64_t segments) {
  Buffer<double> sum(segments);
  for (int64_t s = 0; s < segments; ++s) spread[s] = {0, HUGE_VAL, 0, 0}, sum[s] = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) continue;
    Spread& of = spread[segment ? segment[i] : 0];
    of.count += 1;
    of.low = x[i] < of.low ? x[i] : of.low;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t s = segment ? segment[i] : 0;
    if (x[i] == x[i]) sum[s] += x[i] - spread[s].low;
  }
  for (int64_t s = 0; s < segments; ++s) spread[s].set_mean(sum[s]), sum[s] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t s = segment ? segment[i] : 0;
    const double deviation = spread[s].deviation(x[i]);
    if (x[i] == x[i]) sum[s] += deviation * deviation;
  }
  for (int64_t s = 0; s < segments; ++s) spread[s].set_std(sum[s]);
}

inline void group_advantages(const GroupAdvantages& a) {
  Buffer<Spread> groups(a.groups);
  measure(a.rewards, a.group, a.count, groups, a.groups);
  for (int64_t i = 0; i < a.count; ++i)
    a.advantages[i] = group_advantage(a.rewards[i], groups[a.group[i]], a.baseline, a.scale, a.eps);
  double batch_divisor = 1;
  if (a.scale == Scale::batch) {
    Spread batch;
    measure(a.advantages, nullptr, a.count, &batch, 1);
    batch_divisor = batch.divisor(a.eps);
  }
  for (int64_t i = 0; i < a.count; ++i)  // a reward that could not be scored is part of nothing
    a.advantages[i] = a.advantages[i] == a.advantages[i] ? a.advantages[i] / batch_divisor : 0;
}

}  // namespace FASTRL_ISA
