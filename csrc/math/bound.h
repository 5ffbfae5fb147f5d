// A log-ratio held where its exp is finite; beyond the bound it is a constant. NaN stays NaN.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

template <typename T>
struct Bounded {
  T value;
  Truth<T> beyond;
};

template <typename T>
FASTRL_HD Bounded<T> bound(T raw) {
  const T limit = constant<T>(20);  // exp of it is 5e8: still finite, also squared, and beyond any useful ratio
  return {clamp<T>(raw, -limit, limit), magnitude<T>(raw) > limit};
}

}  // namespace FASTRL_ISA
