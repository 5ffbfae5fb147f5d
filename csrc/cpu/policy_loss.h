// The policy loss of a batch of tokens, its derivatives and its metrics.
//
//   1  sequence means, where the spec has any        3  a sequence shares its ratio's derivative among its tokens
//   2  every token, by blocks                        4  count the tokens that send a gradient
//
// Sums are taken per block of a fixed number of tokens, in double, and added in order: threads change no bit.
#pragma once

#include "lanes.h"

#include "../math/policy_report.h"
#include "../math/policy_token.h"
#include "buffer.h"
#include "kernels.h"

namespace FASTRL_ISA {

template <typename T>
struct PolicyLossKernel {
  using Real = RealIn<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr ptrdiff_t block = 1024;
  static constexpr int sums = policy_sums;
  typedef uint8_t Bytes __attribute__((vector_size(L)));

  const PolicyLossCall& a;
  const PolicySpec& spec;
  ptrdiff_t n, blocks;

  explicit PolicyLossKernel(const PolicyLossCall& call)
      : a(call), spec(call.spec), n(call.count), blocks((call.count + block - 1) / block) {}

  bool corrects_sequences() const { return spec.correction != CorrectionKind::none && spec.sequence_correction; }
  Real old_logp(ptrdiff_t i) const { return static_cast<const Real*>(a.old_logps ? a.old_logps : a.logps)[i]; }

  // Sums over the masked-in tokens of each sequence. Neighbours mostly share one: their sum stays in a register.
  template <typename Value>
  void sum_by_sequence(double* out, Value value) const {
    for (ptrdiff_t s = 0; s < a.sequences; ++s) out[s] = 0;
    for (ptrdiff_t i = 0; i < n;) {
      const int64_t id = a.sequence_ids[i];
      double sum = 0;
      for (; i < n && a.sequence_ids[i] == id; ++i) {
        const double x = value(i);
        sum += a.mask[i] ? x : 0;
      }
      out[id] += sum;
    }
  }

  void means(Real* out, const double* total, const double* count) const {
    for (ptrdiff_t s = 0; s < a.sequences; ++s) out[s] = Real(total[s] / (count[s] > 1 ? count[s] : 1));
  }

  // What a sequence adds up of token i.
  template <typename Number>
  Number summed(ptrdiff_t i) const {
    const Number raw = Number(static_cast<const Real*>(a.logps)[i]) - Number(old_logp(i));
    return summed_log_ratio<Number>(spec, raw, Number(static_cast<const Real*>(a.advantages)[i]));
  }

  // Whether the derivative of its sequence's ratio reaches token i.
  bool takes_part(ptrdiff_t i) const {
    const bool clips = spec.surrogate == Surrogate::gmpo;
    return a.mask[i] && (!clips || summed<Real>(i) == static_cast<const Real*>(a.logps)[i] - old_logp(i));
  }

  T read(const void* array, ptrdiff_t i, ptrdiff_t count, Truth<T> mask) const {
    T x{};
    if (!array) return x;
    const Real* from = static_cast<const Real*>(array) + i;
    if (count == L)
      memcpy(&x, from, sizeof x);
    else
      memcpy(&x, from, size_t(count) * sizeof(Real));
    return mask ? x : T{};  // a NaN times a weight of 0 would be NaN
  }

  Truth<T> read_mask(ptrdiff_t i, ptrdiff_t count) const {
    Bytes bytes{};
    memcpy(&bytes, a.mask + i, size_t(count));
    return __builtin_convertvector(bytes, Truth<T>) != 0;
  }

  T gather(const Real* of_sequence, ptrdiff_t i, ptrdiff_t count) const {
    T x{};
    for (ptrdiff_t l = 0; l < count; ++l) x[l] = of_sequence[a.sequence_ids[i + l]];
    return x;
  }

  static void write(void* array, ptrdiff_t i, ptrdiff_t count, T x) {
    memcpy(static_cast<Real*>(array) + i, &x, size_t(count) * sizeof(Real));
  }

  static void add(double* sum, T x) {
    for (int l = 0; l < L; ++l) sum[l] += x[l];
  }
  static T larger(T most, T x) { return (x > most) | (x != x) ? x : most; }  // a NaN stays

  void run() {
    Buffer<double> count(a.sequences), total(a.sequences);
    Buffer<Real> mean_log_ratio(a.sequences), mean_mismatch(a.sequences), through_ratio(spec.shared_ratio ? n : 0);
    if (spec.sequence_ratio || corrects_sequences()) sum_by_sequence(count, [&](ptrdiff_t) { return 1.0; });
    if (spec.sequence_ratio) {
      sum_by_sequence(total, [&](ptrdiff_t i) { return summed<double>(i); });
      if (spec.surrogate == Surrogate::vespo)
        for (ptrdiff_t s = 0; s < a.sequences; ++s) mean_log_ratio[s] = Real(total[s]);
      else
        means(mean_log_ratio, total, count);
    }
    if (corrects_sequences()) {
      const Real* sampling = static_cast<const Real*>(a.sampling_logps);
      sum_by_sequence(total, [&](ptrdiff_t i) { return double(old_logp(i)) - sampling[i]; });
      means(mean_mismatch, total, count);
    }

    Buffer<double> partial(blocks * sums);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
      for (ptrdiff_t b = 0; b < blocks; ++b)
        tokens(b, partial + b * sums, mean_log_ratio, mean_mismatch, through_ratio);
      if (spec.shared_ratio) {
#pragma omp single
        {
          sum_by_sequence(total, [&](ptrdiff_t i) { return through_ratio[i]; });
          means(mean_log_ratio, total, count);
        }
        Real* dlogps = static_cast<Real*>(a.dlogps);
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < n; ++i) {
          const Real shared = mean_log_ratio[a.sequence_ids[i]];
          dlogps[i] += takes_part(i) ? shared : 0;
        }
      }
#pragma omp for schedule(static)
      for (ptrdiff_t b = 0; b < blocks; ++b) partial[b * sums + metric_gradient] = double(with_gradient(b));
    }
    report_sums(partial);
  }

  // The tokens of block b, and their sums.
  void tokens(ptrdiff_t b, double* partial, const Real* mean_log_ratio, const Real* mean_mismatch,
              Real* through_ratio) const {
    double sum[sums][L] = {};
    T most[metrics] = {};
    const ptrdiff_t end = least(n, (b + 1) * block);
    for (ptrdiff_t i = b * block; i < end; i += L) {
      const ptrdiff_t left = least(L, end - i);
      const Truth<T> mask = read_mask(i, left);
      PolicyToken<T> x;
      x.logp = read(a.logps, i, left, mask);
      x.advantage = read(a.advantages, i, left, mask);
      x.weight = read(a.weights, i, left, mask);
      x.old_logp = a.old_logps ? read(a.old_logps, i, left, mask) : x.logp;
      x.ref_logp = a.ref_logps ? read(a.ref_logps, i, left, mask) : x.logp;
      x.sampling_logp = a.sampling_logps ? read(a.sampling_logps, i, left, mask) : x.old_logp;
      x.entropy = read(a.entropy, i, left, mask);
      x.mean_log_ratio = spec.sequence_ratio ? gather(mean_log_ratio, i, left) : T{};
      x.mean_mismatch = corrects_sequences() ? gather(mean_mismatch, i, left) : T{};
      const PolicyTerm<T> term = policy_token<T>(spec, x);
      if (spec.shared_ratio) write(through_ratio, i, left, term.dlog_ratio);
      write(a.dlogps, i, left, spec.shared_ratio ? term.dlogp : term.dlogp + term.dlog_ratio);
      write(a.dentropy, i, left, term.dentropy);
      for (int k = 0; k < metrics; ++k) {
        const T seen = mask ? term.metric[k] : T{};
        if (is_max(k))
          most[k] = larger(most[k], seen);
        else
          add(sum[k], seen);
      }
      add(sum[sum_loss], term.loss);
      add(sum[sum_count], indicator<T>(mask));
    }
    for (int k = 0; k < sums; ++k) {
      partial[k] = 0;
      for (int l = 0; l < L; ++l) partial[k] = join_sums(k, partial[k], is_max(k) ? double(most[k][l]) : sum[k][l]);
    }
  }

  ptrdiff_t with_gradient(ptrdiff_t b) const {
    const Real *dlogps = static_cast<const Real*>(a.dlogps), *dentropy = static_cast<const Real*>(a.dentropy);
    ptrdiff_t found = 0;
    for (ptrdiff_t i = b * block; i < least(n, (b + 1) * block); ++i)
      found += a.mask[i] & ((dlogps[i] != 0) | (dentropy[i] != 0));
    return found;
  }

  void report_sums(const double* partial) const {
    double total[sums] = {};
    for (ptrdiff_t b = 0; b < blocks; ++b)
      for (int k = 0; k < sums; ++k) total[k] = join_sums(k, total[k], partial[b * sums + k]);
    report<Real>(a, total);
  }
};

inline void policy_loss(const PolicyLossCall& a) {
  if (a.dtype == Dtype::float64)
    PolicyLossKernel<DoubleLanes>(a).run();
  else
    PolicyLossKernel<FloatLanes>(a).run();
}

}  // namespace FASTRL_ISA
