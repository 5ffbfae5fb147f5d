// One token of generalised advantage estimation, walking backwards: arXiv:1506.02438 eq. 16.
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

}  // namespace FASTRL_ISA
