// What a policy loss takes of each token of a batch.
#pragma once

#include "../math/policy_token.h"
#include "device.h"

namespace FASTRL_ISA {

// Token i, whose log-probability and entropy are given. What a masked-out one holds is not read: a NaN times a weight of 0
// would be NaN.
template <typename T>
__device__ PolicyToken<T> token_of(const PolicyLossCall& a, int64_t i, bool mask, T logp, T entropy) {
  const auto read = [=](const void* array, T otherwise) {
    return array && mask ? static_cast<const T*>(array)[i] : otherwise;
  };
  PolicyToken<T> x;
  x.logp = logp;
  x.entropy = entropy;
  x.advantage = read(a.advantages, T(0));
  x.weight = read(a.weights, T(0));
  x.old_logp = read(a.old_logps, logp);
  x.ref_logp = read(a.ref_logps, logp);
  x.sampling_logp = read(a.sampling_logps, x.old_logp);
  x.mean_log_ratio = x.mean_mismatch = T(0);
  return x;
}

}  // namespace FASTRL_ISA
