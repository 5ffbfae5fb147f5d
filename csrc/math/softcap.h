// The softcap of an LM head, x -> c tanh(x / c): Gemma Team, arXiv:2408.00118, section 2.
#pragma once

#include "real.h"

namespace FASTRL_ISA {

template <typename T>
struct Tanh {
  T value, slope;
};

// tanh x and its derivative 4 u / (1 + u)^2, u = e^a, a = -2 |x|: 1 - tanh^2 has no digits left near 1.
//
// Both forms of the value are a number plus a smaller correction, so that little more than the last rounding is lost: a
// softcap of 30 makes 30 times the error one of the logit. Far from 0, 1 - 2 u / (1 + u). Near 0, with
// e^a = 1 + a + a^2 r and r = 1/2 + a s, |x| - a^3 (s - r/2) / (2 + a + a^2 r).
template <typename T>
FASTRL_HD Tanh<T> tanh_and_slope(T x) {
  const T size = magnitude(x), a = T(-2) * size, u = exp_of(a), slope = T(4) * u / ((T(1) + u) * (T(1) + u));
  T value;
  if (a > T(-1.1)) {
    constexpr int terms = sizeof(T) == 8 ? 20 : 12;
    T series = T(1);
    for (int k = terms; k > 3; --k) series = T(1) + series * a * T(1.0 / k);
    const T s = series * T(1.0 / 6), r = T(0.5) + a * s;
    value = size - a * a * a * (s - T(0.5) * r) / (T(2) + a + a * a * r);
  } else {
    value = T(1) - T(2) * u / (T(1) + u);
  }
  return {x < T(0) ? -value : value, slope};
}

// The slope from the capped value over c, which rounding may have put beyond 1.
template <typename T>
FASTRL_HD T slope_of_tanh(T value) {
  const T t = clamp(value, T(-1), T(1));
  return T(1) - t * t;
}

}  // namespace FASTRL_ISA
