// The policy loss of a batch of tokens, its derivatives and its metrics. One launch where the spec looks at tokens alone:
//
//   1  sequence means, where the spec has any       2  every token; the last block adds up what the others found
//   3  a sequence shares its ratio's derivative among its tokens
//
// Advantages are given, or taken from the rewards of the sequences: then each block computes those of its own sequences,
// some of them again, which costs less than another launch. Sums are taken per block of a fixed number of tokens, in
// double, and added in order.
#include "../math/policy_report.h"
#include "group_advantages.h"
#include "policy_batch.h"

namespace FASTRL_ISA {
namespace {

constexpr int threads = 256, warps = threads / 32, block_tokens = 512;

// Beside the arguments, in one piece of memory.
template <typename T>
struct Scratch {
  double* partial;                    // (blocks, policy_sums)
  T* mean_log_ratio;                  // (S)
  T* mean_mismatch;                   // (S)
  double* valid_tokens;               // (S)
  T* through_ratio;                   // (N), where the ratio's derivative is the sequence's
  unsigned* tickets;                  // (2)
  unsigned long long* with_gradient;  // (1)
};

int64_t blocks_of(const PolicyLossCall& a) { return a.count == 0 ? 1 : (a.count + block_tokens - 1) / block_tokens; }

__device__ bool corrects_sequences(const PolicySpec& spec) {
  return spec.correction != CorrectionKind::none && spec.sequence_correction;
}

// The first token of sequence `id` or a later one.
__device__ int64_t first_token(const PolicyLossCall& a, int64_t id) {
  int64_t low = 0, high = a.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (a.sequence_ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// What a sequence adds up of token i, given its old log-probability.
template <typename Number, typename T>
__device__ Number summed(const PolicyLossCall& a, int64_t i) {
  const T *logps = static_cast<const T*>(a.logps), *old = a.old_logps ? static_cast<const T*>(a.old_logps) : logps;
  const T advantage = a.advantages ? static_cast<const T*>(a.advantages)[i] : T(0);
  return summed_log_ratio<Number>(a.spec, Number(logps[i]) - Number(old[i]), Number(advantage));
}

// Over the masked-in tokens of this block's sequence.
template <typename Value>
__device__ double sum_of_sequence(const PolicyLossCall& a, Value value) {
  const int64_t end = first_token(a, int64_t(blockIdx.x) + 1);
  double sum = 0;
  for (int64_t i = first_token(a, blockIdx.x) + threadIdx.x; i < end; i += threads)
    if (a.mask[i]) sum += value(i);
  return block_reduce(sum, Add());
}

template <typename T>
__device__ T mean(double total, double count) {
  return T(total / (count > 1 ? count : 1));
}

template <typename T>
__global__ void __launch_bounds__(threads) sequence_means(PolicyLossCall a, Scratch<T> s) {
  const T *logps = static_cast<const T*>(a.logps), *sampling = static_cast<const T*>(a.sampling_logps);
  const T* old = a.old_logps ? static_cast<const T*>(a.old_logps) : logps;
  const double count = sum_of_sequence(a, [](int64_t) { return 1.0; });
  if (threadIdx.x == 0) s.valid_tokens[blockIdx.x] = count;
  if (a.spec.sequence_ratio) {
    const double total = sum_of_sequence(a, [&](int64_t i) { return summed<double, T>(a, i); });
    const bool adds = a.spec.surrogate == Surrogate::vespo;
    if (threadIdx.x == 0) s.mean_log_ratio[blockIdx.x] = adds ? T(total) : mean<T>(total, count);
  }
  if (corrects_sequences(a.spec)) {
    const double total = sum_of_sequence(a, [=](int64_t i) { return double(old[i]) - sampling[i]; });
    if (threadIdx.x == 0) s.mean_mismatch[blockIdx.x] = mean<T>(total, count);
  }
}

// Of each of the tokens [begin, end), the advantage of its sequence. A warp takes every eighth token, and where a sequence
// starts it finds the sequence's advantage and hands it to all its neighbours.
template <typename T>
__device__ void sequence_advantages(const PolicyLossCall& a, const GroupRewards& rewards, int64_t begin, int64_t end,
                                    T* to) {
  for (int64_t i = begin + threadIdx.x / 32; i < end; i += warps) {
    const int64_t id = a.sequence_ids[i];
    if (i > begin && a.sequence_ids[i - 1] == id) continue;
    const T advantage = T(scored(advantage_by_warp<T>(rewards, id)));
    for (int64_t j = i + threadIdx.x % 32; j < end && a.sequence_ids[j] == id; j += 32) to[j - begin] = advantage;
  }
  __syncthreads();
}

// Token i, and what it adds to the sums. `advantage`: its own, or null.
template <typename T>
__device__ void token(const PolicyLossCall& a, const Scratch<T>& s, int64_t i, const T* advantage, double* sum) {
  const bool mask = a.mask[i];
  const auto read = [=](const void* array) { return array && mask ? static_cast<const T*>(array)[i] : T(0); };
  PolicyToken<T> x = token_of(a, i, mask, read(a.logps), read(a.entropy));
  if (advantage) x.advantage = mask ? *advantage : T(0);
  x.mean_log_ratio = a.spec.sequence_ratio ? s.mean_log_ratio[a.sequence_ids[i]] : T(0);
  x.mean_mismatch = corrects_sequences(a.spec) ? s.mean_mismatch[a.sequence_ids[i]] : T(0);
  const PolicyTerm<T> term = policy_token<T>(a.spec, x);

  const T dlogp = a.spec.shared_ratio ? term.dlogp : term.dlogp + term.dlog_ratio;
  static_cast<T*>(a.dlogps)[i] = dlogp;
  static_cast<T*>(a.dentropy)[i] = term.dentropy;
  if (a.spec.shared_ratio) s.through_ratio[i] = term.dlog_ratio;
#pragma unroll
  for (int k = 0; k < metrics; ++k)
    if (mask) sum[k] = join_sums(k, sum[k], term.metric[k]);
  if (mask && (dlogp != 0 || term.dentropy != 0)) sum[metric_gradient] += 1;
  sum[sum_loss] += term.loss;
  sum[sum_count] += mask;
  // The sums of sequences were taken between the first and the last of equal ids: other orders must not pass silently.
  if (a.sequence_ids && i > 0 && a.sequence_ids[i - 1] > a.sequence_ids[i]) sum[sum_loss] = NAN;
}

template <typename T>
__global__ void __launch_bounds__(threads, 2) every_token(PolicyLossCall a, GroupRewards rewards, Scratch<T> s) {
  __shared__ T advantages[block_tokens];
  const int64_t begin = int64_t(blockIdx.x) * block_tokens, end = least(a.count, begin + block_tokens);
  if (rewards.count > 0) sequence_advantages(a, rewards, begin, end, advantages);
  double sum[policy_sums] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += threads)
    token(a, s, i, rewards.count > 0 ? advantages + (i - begin) : nullptr, sum);

  __shared__ double of_warp[warps][policy_sums], total[policy_sums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < policy_sums; ++k) {
    const double joined = warp_reduce(sum[k], [=](double x, double y) { return join_sums(k, x, y); });
    if (lane == 0) of_warp[warp][k] = joined;
  }
  __syncthreads();
  if (threadIdx.x < policy_sums) {
    const int k = threadIdx.x;
    double joined = 0;
    for (int w = 0; w < warps; ++w) joined = join_sums(k, joined, of_warp[w][k]);
    s.partial[int64_t(blockIdx.x) * policy_sums + k] = joined;
  }
  if (!last_block(s.tickets)) return;
  for (int k = warp; k < policy_sums; k += warps) {
    double joined = 0;
    for (int64_t b = lane; b < gridDim.x; b += 32)
      joined = join_sums(k, joined, __ldcg(s.partial + b * policy_sums + k));
    joined = warp_reduce(joined, [=](double x, double y) { return join_sums(k, x, y); });
    if (lane == 0) total[k] = joined;
  }
  __syncthreads();
  if (threadIdx.x == 0) report<T>(a, total);
}

template <typename T>
__global__ void __launch_bounds__(threads) share_ratio(PolicyLossCall a, Scratch<T> s) {
  T* dlogps = static_cast<T*>(a.dlogps);
  const T* dentropy = static_cast<const T*>(a.dentropy);
  const T *through = s.through_ratio, *logps = static_cast<const T*>(a.logps);
  const T* old = a.old_logps ? static_cast<const T*>(a.old_logps) : logps;
  const T shared =
      mean<T>(sum_of_sequence(a, [=](int64_t i) { return double(through[i]); }), s.valid_tokens[blockIdx.x]);
  const double found = sum_of_sequence(a, [&](int64_t i) {
    if (a.spec.surrogate != Surrogate::gmpo || summed<T, T>(a, i) == logps[i] - old[i]) dlogps[i] += shared;
    return double(dlogps[i] != 0 || dentropy[i] != 0);
  });
  if (threadIdx.x == 0) atomicAdd(s.with_gradient, static_cast<unsigned long long>(found));
  if (last_block(s.tickets + 1) && threadIdx.x == 0)
    static_cast<T*>(a.metrics)[2 * metric_gradient] = T(__ldcg(s.with_gradient));
}

// Where each part starts; returns the bytes of all.
template <typename T>
size_t place(const PolicyLossCall& a, void* memory, Scratch<T>* s) {
  char* next = static_cast<char*>(memory);
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(next);
    next += (size_t(count) * sizeof *part + 7) / 8 * 8;
  };
  take(s->with_gradient, 1);
  take(s->tickets, 2);
  take(s->partial, blocks_of(a) * policy_sums);
  take(s->mean_log_ratio, a.sequences);
  take(s->mean_mismatch, a.sequences);
  take(s->valid_tokens, a.sequences);
  take(s->through_ratio, a.spec.shared_ratio ? a.count : 0);
  return size_t(next - static_cast<char*>(memory));
}

template <typename T>
void launch_policy_loss(const PolicyLossCall& a, const GroupRewards& rewards, void* memory, Stream stream) {
  Scratch<T> s;
  place(a, memory, &s);
  fill_zero(memory, size_t(reinterpret_cast<char*>(s.partial) - static_cast<char*>(memory)), stream);
  const bool by_sequence =
      a.spec.sequence_ratio || (a.spec.correction != CorrectionKind::none && a.spec.sequence_correction);
  if (by_sequence && a.sequences > 0) launch(sequence_means<T>, a.sequences, threads, 0, stream, a, s);
  launch(every_token<T>, blocks_of(a), threads, 0, stream, a, rewards, s);
  if (a.spec.shared_ratio && a.sequences > 0) launch(share_ratio<T>, a.sequences, threads, 0, stream, a, s);
}

}  // namespace

size_t policy_loss_scratch(const PolicyLossCall& a) {
  Scratch<double> as_wide;
  return place(a, nullptr, &as_wide);
}

void policy_loss(const PolicyLossCall& a, const GroupRewards& rewards, void* scratch, Stream stream) {
  if (a.dtype == Dtype::float64)
    launch_policy_loss<double>(a, rewards, scratch, stream);
  else
    launch_policy_loss<float>(a, rewards, scratch, stream);
}

}  // namespace FASTRL_ISA
