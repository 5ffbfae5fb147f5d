// A vector of lanes with the operators of a number, so that the formulas of csrc/math run on it as they are written.
// Include this before them: their calls of exp_of and expm1_of see what is declared above them.
#pragma once

#include "../math/real.h"
#include "simd.h"

namespace FASTRL_ISA {

typedef float FloatLanes __attribute__((vector_size(Float::lanes * sizeof(float))));
typedef double DoubleLanes __attribute__((vector_size(8 * sizeof(double))));

template <>
struct RealOf<FloatLanes> {
  using type = float;
};
template <>
struct RealOf<DoubleLanes> {
  using type = double;
};

template <typename T>
constexpr int lanes_of = int(sizeof(T) / sizeof(RealIn<T>));

inline FloatLanes exp_of(FloatLanes x) {
  Float v;
  memcpy(&v, &x, sizeof x);
  v = Float::exp(v);
  memcpy(&x, &v, sizeof x);
  return x;
}

// e^x - 1: near 0 its series to degree 9, whose remainder there is below 2^-31 of it.
inline FloatLanes expm1_of(FloatLanes x) {
  FloatLanes p = constant<FloatLanes>(1.0 / 362880);
  p = p * x + constant<FloatLanes>(1.0 / 40320);
  p = p * x + constant<FloatLanes>(1.0 / 5040);
  p = p * x + constant<FloatLanes>(1.0 / 720);
  p = p * x + constant<FloatLanes>(1.0 / 120);
  p = p * x + constant<FloatLanes>(1.0 / 24);
  p = p * x + constant<FloatLanes>(1.0 / 6);
  p = p * x + constant<FloatLanes>(0.5);
  const FloatLanes near = x + x * x * p, far = exp_of(x) - constant<FloatLanes>(1);
  return magnitude(x) < constant<FloatLanes>(0.5) ? near : far;
}

inline DoubleLanes exp_of(DoubleLanes x) {
  for (int l = 0; l < lanes_of<DoubleLanes>; ++l) x[l] = exp_of(x[l]);
  return x;
}
inline DoubleLanes expm1_of(DoubleLanes x) {
  for (int l = 0; l < lanes_of<DoubleLanes>; ++l) x[l] = expm1_of(x[l]);
  return x;
}

}  // namespace FASTRL_ISA
