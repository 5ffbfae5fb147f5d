// A `fastrl.spec.PolicyLoss` as plain numbers, and the rows of `fastrl.kernels.policy_loss.metrics.METRICS`, in order.
#pragma once

enum class Surrogate : int { clip, cispo, sapo, reinforce, dppo, gmpo, vespo };
enum class KLKind : int { none, k1, k2, k3, k3_ratio, k1_plus, k3_plus };
enum class CorrectionKind : int { none, truncate, mask };

struct PolicySpec {
  Surrogate surrogate;
  // Bounds of the ratio itself: clip and cispo; distances of probabilities: dppo; of log-ratios: gmpo; k of advantages of
  // at least 0, and of the others: vespo.
  double low, high;
  double dual;              // clip; 0: none
  double tau_pos, tau_neg;  // sapo; lambda: vespo
  bool sequence_ratio;      // the ratio is the sequence's
  bool shared_ratio;        // and so is its derivative: else it is that of each token's own log-probability
  KLKind kl;
  double kl_coef;
  CorrectionKind correction;
  bool sequence_correction;
  double correction_low, correction_high;
  double entropy_coef;
};

enum Metric : int {
  metric_clip_low,
  metric_clip_high,
  metric_ratio_mean,
  metric_ratio_max,
  metric_kl,
  metric_old_kl,
  metric_entropy,
  metric_difference_mean,
  metric_difference_max,
  metric_importance,
  metric_kept,
  metric_gradient,
  metric_clamped,
  metric_nonfinite,
  metrics
};
