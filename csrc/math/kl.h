// Per-token estimates of KL(pi || pi_ref) with d = ref_logp - logp (http://joschu.net/blog/kl-approx.html):
//
//   k1 = -d    k2 = d^2 / 2    k3 = e^d - d - 1    k3_ratio = rho k3    k1+, k3+: with the derivative of k2
#pragma once

#include "bound.h"
#include "policy_spec.h"

namespace FASTRL_ISA {

template <typename T>
struct KLTerm {
  T loss, dlogp;    // the whole derivative by logps, that of rho included
  Truth<T> beyond;  // d is held at its bound, in an estimate that exponentiates it
};

// expm1 keeps the digits that e^d - 1 loses where policy and reference nearly agree.
template <typename T>
FASTRL_HD KLTerm<T> k3(T raw) {
  const Bounded<T> d = bound<T>(raw);
  const T growth = expm1_of(d.value);
  return {growth - d.value, d.beyond ? T{} : -growth, d.beyond};
}

// `log_ratio` is the token's own, also when the surrogate's ratio is the sequence's.
template <typename T>
FASTRL_HD KLTerm<T> kl_term(KLKind kind, T d, const Bounded<T>& log_ratio) {
  if (kind == KLKind::k1) return {-d, constant<T>(1), Truth<T>{}};
  if (kind == KLKind::k1_plus) return {-d, -d, Truth<T>{}};
  if (kind == KLKind::k2) return {d * d / constant<T>(2), -d, Truth<T>{}};
  const KLTerm<T> term = k3<T>(d);
  if (kind == KLKind::k3) return term;
  if (kind == KLKind::k3_plus) return {term.loss, -d, term.beyond};
  const T ratio = exp_of(log_ratio.value), loss = ratio * term.loss;
  return {loss, ratio * term.dlogp + (log_ratio.beyond ? T{} : loss), term.beyond};
}

}  // namespace FASTRL_ISA
