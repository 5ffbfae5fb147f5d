// What the Python side may call: one table of functions per instruction set, and their arguments.
//
// Every pointer was checked in Python: shapes, dtypes, contiguity, ranges of ids. Rows are listed by index, so that the
// rows which need no work are never touched.
#pragma once

#include <stdint.h>

#include "../math/group_spec.h"
#include "../math/policy_spec.h"

enum class Dtype : int { float32, float64, bfloat16, float16 };

// An LM head applied to n rows of `hidden`: finished logits z = cap(scale (h W^T + bias)) / temperature.
// Real is float, or double when dtype is float64.
struct Head {
  Dtype dtype;
  const void* hidden;  // (N, H), row stride hidden_stride
  const void* weight;  // (V, H), row stride weight_stride
  const void* bias;    // (V) or null
  int64_t hidden_stride, weight_stride, width, vocabulary;
  const int64_t* rows;      // (n), ascending: which rows of hidden, targets and every per-row array
  int64_t count, all;       // n, N
  const int64_t* targets;   // (N)
  const void* temperature;  // Real, (1) or (N)
  bool temperature_per_row;
  double softcap, logit_scale;  // softcap 0: none
  bool reduced_float32;         // float32 products may be short of 8 bits where that is quicker
  int threads;
};

struct HeadForward {
  Head head;
  void* logps;      // Real (N)
  void* lse;        // Real (2, N): the largest logit, and log sum exp of the logits minus it
  void* entropy;    // Real (N) or null
  void* logits;     // Real, n V of them: the finished logits, or null
  void* summaries;  // Real (3, N): log sum of p^2, mean logit, 1 where the target is the first of the largest; or null
};

// Probabilities of the listed rows, in hidden's dtype, from the logits that HeadForward left.
//
// Stored logits and probabilities lie in panels of `lane_tile` rows: a value for each of them, entry after entry. The
// last panel is as narrow as what is left of the rows.
struct HeadKeep {
  Head head;
  const void* lse;     // Real (2, N)
  const void* logits;  // Real, n V
  void* kept;          // n V
};

// d hidden, d weight and d bias of sum_n grad_logps[n] logps[n] + grad_entropy[n] entropy[n].
// A row whose two gradients are exactly 0 contributes exactly 0, whatever it holds.
struct HeadBackward {
  Head head;
  const void* logps;         // Real (N)
  const void* lse;           // Real (2, N)
  const void* entropy;       // Real (N), read where grad_entropy is given
  const void* grad_logps;    // Real (N)
  const void* grad_entropy;  // Real (N) or null
  const void* logits;        // from HeadForward; or null
  const void* kept;          // from HeadKeep, without softcap and grad_entropy only; or null. Neither: computed again
  const int64_t* places;     // (n): which of the rows that were stored each listed one is; null: they are the same rows
  int64_t stored;            // how many were, where there are places
  void* grad_hidden;         // Real (N, H), the listed rows are written; or null
  void* grad_weight;         // Real (V, H), or with round_weight the dtype of weight; or null
  void* grad_bias;           // Real (V) or null
  bool add_weight;           // add to what is there, or overwrite it
  bool round_weight;         // round d weight once to the dtype of weight; never with add_weight
};

// y = x W^T + bias, x (rows, width), W (outputs, width), y (rows, outputs), all of one dtype, which is float32 or
// bfloat16; rows may be any stride apart, their values lie side by side. No size is 0. `add`: to what is there.
struct LinearShape {
  Dtype dtype;
  int64_t rows, width, outputs;
  int threads;
  double products() const { return double(rows) * double(width) * double(outputs); }
};

struct LinearForward {
  LinearShape shape;
  const void* x;
  const void* weight;
  const void* bias;  // (outputs) or null
  void* y;
  int64_t x_stride, weight_stride, y_stride;
  bool add;
};

struct LinearGradInput {
  LinearShape shape;
  const void* dy;
  const void* weight;
  void* dx;
  int64_t dy_stride, weight_stride, dx_stride;
  bool add;
};

struct LinearGradWeight {
  LinearShape shape;
  const void* dy;
  const void* x;
  void* dw;  // (outputs, width), dense: float, or with `round` the dtype of x
  int64_t dy_stride, x_stride;
  bool add, round;
};

// Attention of one query token per row over cached keys and values, (rows, key_heads, seen, width) with equal strides.
struct DecodeAttention {
  Dtype dtype;        // of query, keys, values and out; not float64
  const void* query;  // (rows, heads, width)
  const void* keys;
  const void* values;
  const float* mask;                            // (rows, seen), added to the scores; row stride mask_stride; or null
  void* out;                                    // (rows, heads, width)
  int64_t rows, heads, key_heads, seen, width;  // width: a multiple of 16
  int64_t row_stride, head_stride, mask_stride;
  double scale;
  int threads;
};

// Log-probabilities of targets under softmax(logits / temperature). Real is float, or double when dtype is float64.
struct Logprob {
  Dtype dtype;
  const void* logits;  // (N, V), row stride `stride`
  int64_t stride, rows, vocabulary;
  const int64_t* targets;   // (N)
  const void* temperature;  // Real, (1) or (N)
  bool temperature_per_row;
  int64_t ignore_index;
  int threads;
};

struct LogprobForward {
  Logprob logprob;
  void* logps;    // Real (N)
  void* entropy;  // Real (N) or null
};

struct LogprobBackward {
  Logprob logprob;
  const void* grad_logps;    // Real (N)
  const void* grad_entropy;  // Real (N) or null
  void* grad_logits;         // (N, V) in the dtype of logits, dense
};

// A policy loss over tokens. Real is float or double, by dtype.
struct PolicyLossCall {
  PolicySpec spec;
  Dtype dtype;
  int64_t count;                                                 // N
  const void *logps, *advantages, *weights;                      // Real (N)
  const uint8_t* mask;                                           // (N)
  const void *old_logps, *ref_logps, *sampling_logps, *entropy;  // Real (N) or null
  const int64_t* sequence_ids;                                   // (N), read where the spec works on sequences
  int64_t sequences;
  int threads;
  void* loss;      // Real (1)
  void* dlogps;    // Real (N)
  void* dentropy;  // Real (N)
  void* metrics;   // Real (K, 2): (sum, count) of each Metric
};

// Generalised advantage estimation over packed sequences [bounds[s], bounds[s + 1]). Real is float or double, by dtype.
struct Gae {
  Dtype dtype;
  const void *rewards, *values;  // Real (N)
  const uint8_t* mask;           // (N)
  const int64_t* bounds;         // (S + 1)
  int64_t sequences, tokens;     // S, N
  double gamma, lam;
  int threads;
  void *advantages, *returns;  // Real (N)
};

struct GroupAdvantages {
  const double* rewards;  // (B), NaN where there is none
  const int64_t* group;   // (B) in [0, groups)
  int64_t count, groups;
  Baseline baseline;
  Scale scale;
  double eps;
  double* advantages;  // (B)
};

struct Kernels {
  const char* name;
  int64_t lane_tile[2];  // rows are padded to a multiple of this: float, double
  void (*head_forward)(const HeadForward&);
  void (*head_keep)(const HeadKeep&);
  void (*head_backward)(const HeadBackward&);
  void (*linear_forward)(const LinearForward&);
  void (*linear_grad_input)(const LinearGradInput&);
  void (*linear_grad_weight)(const LinearGradWeight&);
  void (*decode_attention)(const DecodeAttention&);
  void (*logprob_forward)(const LogprobForward&);
  void (*logprob_backward)(const LogprobBackward&);
  void (*policy_loss)(const PolicyLossCall&);
  void (*gae)(const Gae&);
  void (*group_advantages)(const GroupAdvantages&);
};

// Defined once per instruction set, in isa.cpp; null where this build does not have it.
const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_amx_emulated();  // only in a build that emulates tiles
