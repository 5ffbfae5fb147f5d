// How the rewards of a group, or of the batch, are spread: a warp or a block reads all rewards and takes those of the
// group. No sorting and no numbering of groups, so any ids will do; a batch has thousands of rewards, not millions.
#pragma once

#include "../math/group_advantage.h"
#include "device.h"

namespace FASTRL_ISA {

// Over the i in [thread, count) in steps of `threads` with member(i); `x(i)` is not NaN there. `reduce` joins threads.
template <typename Value, typename Member, typename Reduce>
__device__ Spread measure(int64_t count, int thread, int threads, Value x, Member member, Reduce reduce) {
  Spread of{0, HUGE_VAL, 0, 0};
  for (int64_t i = thread; i < count; i += threads)
    if (member(i)) {
      of.count += 1;
      of.low = x(i) < of.low ? x(i) : of.low;
    }
  of.count = reduce(of.count, Add());
  of.low = reduce(of.low, Smaller());
  double sum = 0;
  for (int64_t i = thread; i < count; i += threads)
    if (member(i)) sum += x(i) - of.low;
  of.set_mean(reduce(sum, Add()));
  sum = 0;
  for (int64_t i = thread; i < count; i += threads)
    if (member(i)) sum += of.deviation(x(i)) * of.deviation(x(i));
  of.set_std(reduce(sum, Add()));
  return of;
}

// The advantage of reward i before the spread of the batch, by all lanes of a warp. NaN where the reward is.
template <typename Real>
__device__ double advantage_by_warp(const GroupRewards& a, int64_t i) {
  const Real* rewards = static_cast<const Real*>(a.rewards);
  const int64_t own = a.group[i];
  const Spread of = measure(
      a.count, int(threadIdx.x % 32), 32, [=](int64_t j) { return double(rewards[j]); },
      [=](int64_t j) { return a.group[j] == own && rewards[j] == rewards[j]; },
      [](double value, auto join) { return warp_reduce(value, join); });
  return group_advantage(rewards[i], of, a.baseline, a.scale, a.eps);
}

// A reward that could not be scored is part of nothing.
__device__ inline double scored(double advantage) { return advantage == advantage ? advantage : 0; }

}  // namespace FASTRL_ISA
