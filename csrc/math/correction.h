// The constant that multiplies a surrogate where sampler and trainer disagree: min(w, high), or w within [low, high]
// and 0 outside, with w = exp(log_weight). NaN stays NaN.
#pragma once

#include "bound.h"
#include "policy_spec.h"

namespace FASTRL_ISA {

template <typename T>
struct CorrectionWeight {
  T weight;
  Truth<T> kept;  // left as it is
};

template <typename T>
FASTRL_HD CorrectionWeight<T> correction_weight(const PolicySpec& spec, T log_weight) {
  const T weight = exp_of(bound<T>(log_weight).value), zero{};
  const T low = constant<T>(spec.correction_low), high = constant<T>(spec.correction_high);
  if (spec.correction == CorrectionKind::truncate) return {weight > high ? high : weight, weight <= high};
  const Truth<T> outside = (weight < low) | (weight > high);
  return {outside ? zero : weight, (outside ? constant<T>(1) : zero) == zero};
}

}  // namespace FASTRL_ISA
