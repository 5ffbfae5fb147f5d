// The surrogates of a policy loss: value, derivatives, and which bound clipped. `log_ratio` is already bounded, and old
// policies are constants.
#pragma once

#include "policy_spec.h"
#include "real.h"

namespace FASTRL_ISA {

template <typename T>
struct SurrogateTerm {
  T loss, dlog_ratio, dlogp;  // the derivatives through the log-ratio, and directly by logps
  Truth<T> low, high;
};

// -min(rho A, clip(rho, low, high) A), with `dual` > 0 at most -dual A where A < 0: arXiv:1707.06347 eq. 7,
// arXiv:1912.09729 eq. 5. A tie is not clipped.
template <typename T>
FASTRL_HD SurrogateTerm<T> clip(T log_ratio, T advantage, T low, T high, T dual) {
  const T ratio = exp_of(log_ratio), bounded = clamp<T>(ratio, low, high), zero{};
  Truth<T> clipped = ratio * advantage > bounded * advantage;
  T loss = -((clipped ? bounded : ratio) * advantage);
  const T ceiling = -dual * advantage;
  const Truth<T> beyond = (dual > zero) & (advantage < zero) & (loss > ceiling);
  loss = beyond ? ceiling : loss;
  clipped = clipped | beyond;
  const Truth<T> down = clipped & (advantage < zero), up = clipped & (advantage > zero);
  return {loss, clipped ? zero : -ratio * advantage, zero, down, up};
}

// -sg(clamp(rho, low, high)) A log pi: arXiv:2506.13585 eq. 4. The ratio is a constant: no token loses its gradient.
template <typename T>
FASTRL_HD SurrogateTerm<T> cispo(T log_ratio, T logp, T advantage, T low, T high) {
  const T ratio = exp_of(log_ratio), dlogp = -clamp<T>(ratio, low, high) * advantage;
  return {dlogp * logp, T{}, dlogp, (ratio < low), (ratio > high)};
}

// -(4 / tau) sigmoid(tau (rho - 1)) A, tau_pos where A > 0 and tau_neg elsewhere: arXiv:2511.20347.
template <typename T>
FASTRL_HD SurrogateTerm<T> sapo(T log_ratio, T advantage, T tau_pos, T tau_neg) {
  const T one = constant<T>(1), four = constant<T>(4), ratio = exp_of(log_ratio);
  const T tau = advantage > T{} ? tau_pos : tau_neg;
  const T gate = one / (one + exp_of(tau * (one - ratio)));
  const T dlog_ratio = -four * gate * (one - gate) * ratio * advantage;
  return {-four / tau * gate * advantage, dlog_ratio, T{}, Truth<T>{}, Truth<T>{}};
}

// -A log pi.
template <typename T>
FASTRL_HD SurrogateTerm<T> reinforce(T logp, T advantage) {
  return {-advantage * logp, T{}, -advantage, Truth<T>{}, Truth<T>{}};
}

// -rho A, and nothing where the token's probability fell by more than `low` and A < 0, or rose by more than `high` and
// A > 0: arXiv:2602.04879.
template <typename T>
FASTRL_HD SurrogateTerm<T> dppo(T log_ratio, T logp, T old_logp, T advantage, T low, T high) {
  const T moved = exp_of(logp) - exp_of(old_logp), zero{};
  const Truth<T> down = (advantage < zero) & (moved < -low), up = (advantage > zero) & (moved > high);
  const T loss = down | up ? zero : -exp_of(log_ratio) * advantage;
  return {loss, loss, zero, down, up};
}

// The token's log-ratio as its sequence adds it up: gmpo clips it where it goes on as its advantage pulls.
template <typename T>
FASTRL_HD T summed_log_ratio(const PolicySpec& spec, T raw, T advantage) {
  if (spec.surrogate != Surrogate::gmpo) return raw;
  const T low = constant<T>(-spec.low), high = constant<T>(spec.high);
  const T below = raw > high ? high : raw, above = raw < low ? low : raw;
  return advantage > T{} ? below : above;
}

// -rho A of the mean of log-ratios that were clipped before: arXiv:2507.20673.
template <typename T>
FASTRL_HD SurrogateTerm<T> gmpo(const PolicySpec& spec, T log_ratio, T own_raw, T advantage) {
  const T loss = -exp_of(log_ratio) * advantage;
  const Truth<T> kept = summed_log_ratio<T>(spec, own_raw, advantage) == own_raw, up = advantage > T{};
  const Truth<T> below = (!kept) & !up, above = (!kept) & up;
  return {loss, loss, T{}, below, above};
}

// -sg(phi(W)) A log pi, phi(W) = W^k exp(lambda (1 - W)) with log W = `log_ratio`: arXiv:2602.10693.
template <typename T>
FASTRL_HD SurrogateTerm<T> vespo(const PolicySpec& spec, T log_ratio, T logp, T advantage) {
  const Truth<T> positive = advantage >= T{};
  const T k = positive ? constant<T>(spec.low) : constant<T>(spec.high);
  const T lambda = positive ? constant<T>(spec.tau_pos) : constant<T>(spec.tau_neg);
  const T dlogp = -exp_of(k * log_ratio - lambda * expm1_of(log_ratio)) * advantage;
  return {dlogp * logp, T{}, dlogp, Truth<T>{}, Truth<T>{}};
}

template <typename T>
FASTRL_HD SurrogateTerm<T> surrogate_term(const PolicySpec& spec, T log_ratio, T logp, T old_logp, T advantage) {
  const T low = constant<T>(spec.low), high = constant<T>(spec.high);
  switch (spec.surrogate) {
    case Surrogate::clip: return clip<T>(log_ratio, advantage, low, high, constant<T>(spec.dual));
    case Surrogate::cispo: return cispo<T>(log_ratio, logp, advantage, low, high);
    case Surrogate::sapo: return sapo<T>(log_ratio, advantage, constant<T>(spec.tau_pos), constant<T>(spec.tau_neg));
    case Surrogate::dppo: return dppo<T>(log_ratio, logp, old_logp, advantage, low, high);
    case Surrogate::gmpo: return gmpo<T>(spec, log_ratio, logp - old_logp, advantage);
    case Surrogate::vespo: return vespo<T>(spec, log_ratio, logp, advantage);
    default: return reinforce<T>(logp, advantage);
  }
}

}  // namespace FASTRL_ISA
