// What the Python side may call. The arguments are those of the CPU kernels, with addresses on the device; `threads` is
// not read. Every call only launches, on `stream` of the current device; errors are thrown.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../cpu/kernels.h"
#include "../math/real.h"

namespace FASTRL_ISA {

using Stream = void*;  // a cudaStream_t

// A target outside [0, V) that is not ignore_index makes its row NaN and is not read.
void logprob_forward(const LogprobForward& out, Stream stream);
void logprob_backward(const LogprobBackward& out, Stream stream);

// Advantages within groups. Real is float or double, by dtype.
struct GroupRewards {
  Dtype dtype;
  const void* rewards;   // Real (B), NaN where there is none
  const int64_t* group;  // (B) any numbers, equal within a group
  int64_t count;
  Baseline baseline;
  Scale scale;
  double eps;
};
size_t group_advantages_scratch(const GroupRewards& call);
void group_advantages(const GroupRewards& call, void* advantages, void* scratch, Stream stream);

// sequence_ids must not decrease: where they do, the loss is NaN. With rewards, one per sequence and not scaled by the
// batch, they take the place of the advantages; with none of them (count 0) the advantages are read.
size_t policy_loss_scratch(const PolicyLossCall& call);
void policy_loss(const PolicyLossCall& call, const GroupRewards& rewards, void* scratch, Stream stream);

size_t gae_scratch(const Gae& call);
void gae(const Gae& call, void* scratch, Stream stream);

}  // namespace FASTRL_ISA
