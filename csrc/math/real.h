// What the per-token formulas are written in: a float, a double, or on the CPU a vector of them with like operators.
//
// A condition on vectors is a vector, so a formula chooses with `?:` between values that are both computed, and joins
// conditions with & and |. FASTRL_ISA names the namespace: the CPU kernels are compiled once per instruction set, and
// the linker must not merge their copies.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FASTRL_HD __host__ __device__ inline
#else
#define FASTRL_HD inline __attribute__((always_inline))  // a vector of lanes is slow to pass
#endif

#if !defined(FASTRL_ISA)
#define FASTRL_ISA cuda
#endif

namespace FASTRL_ISA {

template <typename T>
struct RealOf {
  using type = T;
};
// The type of one element.
template <typename T>
using RealIn = typename RealOf<T>::type;
// What a comparison gives.
template <typename T>
using Truth = decltype(T{} < T{});

// The C functions by name: an overload of the C++ library is an inline function, of which the linker keeps one copy.
FASTRL_HD float exp_of(float x) { return expf(x); }
FASTRL_HD double exp_of(double x) { return ::exp(x); }
FASTRL_HD float expm1_of(float x) { return expm1f(x); }
FASTRL_HD double expm1_of(double x) { return ::expm1(x); }
FASTRL_HD float log_of(float x) { return logf(x); }
FASTRL_HD double log_of(double x) { return ::log(x); }

template <typename T>
FASTRL_HD T constant(double value) {
  return T{} + RealIn<T>(value);
}

template <typename T>
FASTRL_HD T magnitude(T x) {
  return x < T{} ? -x : x;
}

template <typename T>
FASTRL_HD Truth<T> is_finite(T x) {
  return x - x == T{};
}

// 1 where true.
template <typename T>
FASTRL_HD T indicator(Truth<T> condition) {
  return condition ? constant<T>(1) : T{};
}

// NaN stays NaN.
template <typename T>
FASTRL_HD T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

}  // namespace FASTRL_ISA
