// Per-token estimates of KL(pi || pi_ref) with d = ref_logp - logp (http://joschu.net/blog/kl-approx.html):
//
//   k1 = -d    k2 = d^2 / 2    k3 = e^d - d - 1    k3_ratio = rho k3    k1+, k3+: with the derivative of k2
//
// rho is the ratio of the loss, the token's or the sequence's.
#pragma once

#include "bound.h"
#include "policy_spec.h"

namespace FASTRL_ISA {

template <typename T>
struct KLTerm {
  T loss, dlog_ratio, dlogp;  // derivatives through the ratio, where it is a sequence's, and by the token's own logp
  Truth<T> beyond;            // d is held at its bound, in an estimate that exponentiates it
};

// expm1 keeps the digits that e^d - 1 loses where policy and reference nearly agree.
template <typename T>
FASTRL_HD KLTerm<T> k3(T raw) {
  const Bounded<T> d = bound_above<T>(raw);
  const T growth = expm1_of(d.value);
  return {growth - d.value, T{}, d.beyond ? T{} : -growth, d.beyond};
}

// With rho the token's own, d (rho k3) = rho (e^d - d - 1) + rho (1 - e^d) = -rho d: a sum of two large numbers written
// as the small one that it is, right at any d.
template <typename T>
FASTRL_HD KLTerm<T> kl_term(KLKind kind, T d, T log_ratio, bool of_sequence) {
  if (kind == KLKind::k1) return {-d, T{}, constant<T>(1), Truth<T>{}};
  if (kind == KLKind::k1_plus) return {-d, T{}, -d, Truth<T>{}};
  if (kind == KLKind::k2) return {d * d / constant<T>(2), T{}, -d, Truth<T>{}};
  const KLTerm<T> term = k3<T>(d);
  if (kind == KLKind::k3) return term;
  if (kind == KLKind::k3_plus) return {term.loss, T{}, -d, term.beyond};
  const T ratio = exp_of(log_ratio), loss = ratio * term.loss;
  if (of_sequence) return {loss, term.beyond ? T{} : loss, ratio * term.dlogp, term.beyond};
  return {loss, T{}, -ratio * d, term.beyond};
}

}  // namespace FASTRL_ISA
