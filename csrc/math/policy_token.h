// One token of a policy loss: w (c surrogate + coef KL - entropy_coef H), its derivatives, and what it reports.
#pragma once

#include "correction.h"
#include "kl.h"
#include "surrogate.h"

namespace FASTRL_ISA {

// What is not given is 0, but old_logp, which is then logp.
template <typename T>
struct PolicyToken {
  T logp, advantage, weight, old_logp, ref_logp, sampling_logp, entropy;
  T mean_log_ratio, mean_mismatch;  // of its sequence, read where the spec asks for them; vespo's is a sum
};

template <typename T>
struct PolicyTerm {
  T loss, dlog_ratio, dlogp, dentropy;  // derivatives before a sequence shares its ratio's
  T metric[metrics];                    // all but metric_gradient, which is known once the gradient is
};

template <typename T>
FASTRL_HD PolicyTerm<T> policy_token(const PolicySpec& spec, const PolicyToken<T>& x) {
  const T zero{};
  const T own_raw = x.logp - x.old_logp, mismatch = x.old_logp - x.sampling_logp, d = x.ref_logp - x.logp;
  const Bounded<T> own = bound<T>(own_raw), log_ratio = spec.sequence_ratio ? bound<T>(x.mean_log_ratio) : own;
  const SurrogateTerm<T> surrogate = surrogate_term<T>(spec, log_ratio.value, x.logp, x.old_logp, x.advantage);
  PolicyTerm<T> out;
  out.loss = surrogate.loss;
  out.dlogp = surrogate.dlogp;
  out.dlog_ratio = log_ratio.beyond ? zero : surrogate.dlog_ratio;
  Truth<T> beyond = log_ratio.beyond;

  out.metric[metric_importance] = exp_of(bound<T>(mismatch).value);
  out.metric[metric_kept] = zero;
  if (spec.correction != CorrectionKind::none) {
    const CorrectionWeight<T> c = correction_weight<T>(spec, spec.sequence_correction ? x.mean_mismatch : mismatch);
    out.loss = c.weight * out.loss;
    out.dlogp = c.weight * out.dlogp;
    out.dlog_ratio = c.weight * out.dlog_ratio;
    out.metric[metric_importance] = c.weight;
    out.metric[metric_kept] = indicator<T>(c.kept);
  }
  if (spec.kl != KLKind::none) {
    const T coef = constant<T>(spec.kl_coef);
    // What gmpo and vespo make of a sequence is no ratio of its probabilities: there the token's own is taken.
    const bool of_token = spec.surrogate == Surrogate::gmpo || spec.surrogate == Surrogate::vespo;
    const T ratio = of_token ? own.value : log_ratio.value;
    const KLTerm<T> kl = kl_term<T>(spec.kl, d, ratio, spec.shared_ratio && !of_token);
    out.loss = out.loss + coef * kl.loss;
    out.dlogp = out.dlogp + coef * kl.dlogp;
    out.dlog_ratio = out.dlog_ratio + (log_ratio.beyond ? zero : coef * kl.dlog_ratio);
    beyond = beyond | kl.beyond;
  }
  out.dentropy = zero;
  if (spec.entropy_coef != 0) {
    const T coef = constant<T>(spec.entropy_coef);
    out.loss = out.loss - coef * x.entropy;
    out.dentropy = -coef * x.weight;
  }

  const Truth<T> silent = x.weight == zero;  // exactly nothing, also where the term is NaN
  out.loss = silent ? zero : x.weight * out.loss;
  out.dlogp = silent ? zero : x.weight * out.dlogp;
  out.dlog_ratio = silent ? zero : x.weight * out.dlog_ratio;

  out.metric[metric_clip_low] = indicator<T>(surrogate.low);
  out.metric[metric_clip_high] = indicator<T>(surrogate.high);
  out.metric[metric_ratio_mean] = out.metric[metric_ratio_max] = exp_of(log_ratio.value);
  out.metric[metric_kl] = k3<T>(d).loss;
  out.metric[metric_old_kl] = k3<T>(own_raw).loss;  // of the old policy against this one, from the old one's samples
  out.metric[metric_entropy] = x.entropy;
  out.metric[metric_difference_mean] = out.metric[metric_difference_max] = magnitude<T>(mismatch);
  out.metric[metric_gradient] = zero;
  out.metric[metric_clamped] = indicator<T>(beyond);
  out.metric[metric_nonfinite] = constant<T>(1) - indicator<T>(is_finite<T>(x.logp) & is_finite<T>(out.loss));
  return out;
}

}  // namespace FASTRL_ISA
