// The sums over tokens that make a loss and its metrics, and the table that reports them.
#pragma once

#include "policy_spec.h"
#include "real.h"

namespace FASTRL_ISA {

enum PolicySum : int { sum_loss = metrics, sum_count, policy_sums };  // after those of each Metric

FASTRL_HD bool is_max(int k) { return k == metric_ratio_max || k == metric_difference_max; }

// Two parts of sum k together; a NaN stays.
FASTRL_HD double join_sums(int k, double a, double b) {
  if (!is_max(k)) return a + b;
  return b > a || b != b ? b : a;
}

// Whether a metric has values: a row without is (0, 0).
template <typename Call>
FASTRL_HD bool reported(const Call& a, int k) {
  switch (k) {
    case metric_clip_low:
    case metric_clip_high: {
      const Surrogate s = a.spec.surrogate;
      return s != Surrogate::sapo && s != Surrogate::reinforce && s != Surrogate::vespo;
    }
    case metric_kl: return a.ref_logps;
    case metric_entropy: return a.entropy;
    case metric_difference_mean:
    case metric_difference_max:
    case metric_importance: return a.sampling_logps;
    case metric_kept: return a.spec.correction != CorrectionKind::none;
    default: return true;
  }
}

template <typename Real, typename Call>
FASTRL_HD void report(const Call& a, const double* total) {
  *static_cast<Real*>(a.loss) = Real(total[sum_loss]);
  Real* table = static_cast<Real*>(a.metrics);
  for (int k = 0; k < metrics; ++k) {
    const double count = is_max(k) ? double(total[sum_count] > 0) : total[sum_count];
    table[2 * k] = reported(a, k) ? Real(total[k]) : 0;
    table[2 * k + 1] = reported(a, k) ? Real(count) : 0;
  }
}

}  // namespace FASTRL_ISA
