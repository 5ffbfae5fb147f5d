// A log-ratio held where its exp is finite: beyond the bound it is a constant. NaN stays NaN.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

template <typename T>
struct Bounded {
  T value;
  Truth<T> beyond;
};

constexpr double log_ratio_bound = 20;  // exp of it is 5e8: still finite, also squared, and beyond any useful ratio

template <typename T>
FASTRL_HD Bounded<T> bound(T raw) {
  const T limit = constant<T>(log_ratio_bound);
  return {clamp<T>(raw, -limit, limit), magnitude<T>(raw) > limit};
}

// Held from above alone, for what is a sum with its exp: at a low end the exp is 0, and the rest goes on.
template <typename T>
FASTRL_HD Bounded<T> bound_above(T raw) {
  const T limit = constant<T>(log_ratio_bound);
  const Truth<T> beyond = raw > limit;
  return {beyond ? limit : raw, beyond};
}

}  // namespace FASTRL_ISA
