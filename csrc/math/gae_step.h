// One token of generalised advantage estimation, walking backwards: arXiv:1506.02438 eq. 16; and a stretch of tokens at
// once, for those who walk many stretches side by side.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

template <typename T>
struct GaeState {
  T value, advantage;  // of the next token with mask 1; 0 behind the last
  T stray_reward;      // of masked tokens, on its way to the action before them
};

// A masked token changes nothing but the stray reward, whatever its value holds.
template <typename T>
FASTRL_HD GaeState<T> gae_step(const GaeState<T>& next, T reward, T value, bool valid, T gamma, T decay) {
  if (!valid) return {next.value, next.advantage, next.stray_reward + (is_finite(reward) ? reward : T(0))};
  const T delta = reward + next.stray_reward + gamma * next.value - value;
  return {value, delta + decay * next.advantage, T(0)};
}

// What a stretch of tokens makes of any state behind it. The first valid token that the walk meets is the only one to
// read that state, as x = stray_reward + gamma value + decay advantage, so the stretch's advantage is affine in x.
template <typename T>
struct GaeSpan {
  GaeState<T> state;  // from a state of zeros
  T slope;            // d advantage / d x: decay to the number of valid tokens but one
  bool any;           // a valid token

  // With one more token in front.
  FASTRL_HD void extend(T reward, T value, bool valid, T gamma, T decay) {
    state = gae_step<T>(state, reward, value, valid, gamma, decay);
    if (!valid) return;
    slope = any ? slope * decay : T(1);
    any = true;
  }
  FASTRL_HD GaeState<T> after(const GaeState<T>& behind, T gamma, T decay) const {
    if (!any) return {behind.value, behind.advantage, behind.stray_reward + state.stray_reward};
    const T x = behind.stray_reward + gamma * behind.value + decay * behind.advantage;
    return {state.value, state.advantage + slope * x, state.stray_reward};
  }
  // This stretch with `later` behind it.
  FASTRL_HD GaeSpan join(const GaeSpan& later, T gamma, T decay) const {
    const T both = later.any ? slope * decay * later.slope : slope;
    return {after(later.state, gamma, decay), any ? both : later.slope, any || later.any};
  }
};

}  // namespace FASTRL_ISA
