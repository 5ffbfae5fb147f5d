// Generalised advantage estimation: one walk backwards through each sequence, in double.
#pragma once

#include "../math/gae_step.h"
#include "kernels.h"

namespace FASTRL_ISA {

template <typename T>
inline void gae_of(const Gae& a) {
  const T *rewards = static_cast<const T*>(a.rewards), *values = static_cast<const T*>(a.values);
  T *advantages = static_cast<T*>(a.advantages), *returns = static_cast<T*>(a.returns);
  const double gamma = a.gamma, decay = a.gamma * a.lam;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t s = 0; s < a.sequences; ++s) {
    GaeState<double> state{0, 0, 0};
    for (int64_t t = a.bounds[s + 1] - 1; t >= a.bounds[s]; --t) {
      state = gae_step<double>(state, rewards[t], values[t], a.mask[t], gamma, decay);
      advantages[t] = a.mask[t] ? T(state.advantage) : T(0);
      returns[t] = a.mask[t] ? T(state.advantage + state.value) : T(0);
    }
  }
  for (int64_t t = a.bounds[a.sequences]; t < a.tokens; ++t) advantages[t] = returns[t] = 0;  // padding
}

inline void gae(const Gae& a) {
  if (a.dtype == Dtype::float64)
    gae_of<double>(a);
  else
    gae_of<float>(a);
}

}  // namespace FASTRL_ISA
