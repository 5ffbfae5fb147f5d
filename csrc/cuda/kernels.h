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

// Of the rows of a chunk, between the matmuls of an LM head: logits x = h W^T, z = cap(scale (x + bias)) / temperature.
// Real is float, or double when dtype is float64.
struct HeadChunk {
  Dtype dtype;         // of logits
  const void* logits;  // (n, V)
  int64_t rows, vocabulary;
  const int64_t* targets;   // (n); one outside [0, V) is not read
  const void* bias;         // Real (V) or null
  const void* temperature;  // Real, (1) or (n)
  bool temperature_per_row;
  double softcap, logit_scale;  // softcap 0: none
};

// A target outside [0, V) makes its log-probability NaN.
struct ChunkStatistics {
  HeadChunk chunk;  // float32 or float64
  void* logps;      // Real (n)
  void* lse;        // Real (2, n): the largest logit, and log sum exp of the logits minus it
  void* entropy;    // Real (n) or null
  void* summaries;  // Real (3, n): log sum of p^2, mean logit, 1 where the target is the first of the largest; or null
  // With a policy loss, its derivatives of each row: of `loss` are read what it has of every token, but mask and
  // log-probabilities, and of its outputs dlogps and dentropy, Real (n), are written.
  const int64_t* tokens;  // (n): which token each row is; null: no loss
  PolicyLossCall loss;
};
void head_statistics(const ChunkStatistics& call, Stream stream);

// d logits of sum_n grad_logps[n] logps[n] + grad_entropy[n] entropy[n]; without grad_logps, the probabilities.
struct ChunkGradient {
  HeadChunk chunk;  // any dtype where `kept`, which says that `logits` holds probabilities
  bool kept;
  const int64_t* from_rows;  // (n): in which row of logits each finds its own; null: in the same
  const int64_t* to_rows;    // (n): to which row of `out` each goes; null: to the same
  const void* logps;         // Real (n); read, as the next, where grad_logps is given
  const void* lse;           // Real (2, n)
  const void* entropy;       // Real (n), read where grad_entropy is given
  const void* grad_logps;    // Real (n) or null
  const void* grad_entropy;  // Real (n) or null
  Dtype out_dtype;           // Real or 16 bits
  void* out;                 // (n, V); of the same dtype, it may be logits
};
void head_gradient(const ChunkGradient& call, Stream stream);

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
