// Log-probabilities from logits in memory: lanes run along the vocabulary, threads over the rows.
//
// A block of a row is widened into scratch that stays in the first cache, where its maximum and then its sums are
// taken; blocks are merged in double. The backward takes a row's statistics again, then writes its gradient while the
// row is still in the cache. Every row is one thread's, in one order: no other row and no number of threads changes its
// bits.
#pragma once

#include "../math/softmax.h"
#include "buffer.h"
#include "kernels.h"
#include "narrow.h"

namespace FASTRL_ISA {

template <typename V, typename In>
struct LogprobKernel {
  using Real = typename V::Real;
  static constexpr int L = V::lanes, chains = 4;  // independent sums, so that an addition need not wait for the last
  static constexpr ptrdiff_t step = chains * L, block = 32 * step;

  const Logprob& a;
  const In* logits;
  const Real* temperature;

  explicit LogprobKernel(const Logprob& call)
      : a(call), logits(static_cast<const In*>(call.logits)), temperature(static_cast<const Real*>(call.temperature)) {}

  const In* row_of(int64_t i) const { return logits + i * a.stride; }
  Real temperature_of(int64_t i) const { return temperature[a.temperature_per_row ? i : 0]; }

  // A quotient, not a product with the inverse: with z near 100 the inverse's rounding would show in exp(z).
  static V over(V x, Real t) { return t == 1 ? x : x / V::set(t); }

  // Logits [v, v + count) over the temperature, then -inf up to a whole step; returns the length with it.
  static ptrdiff_t widen_block(Real* z, const In* row, ptrdiff_t v, ptrdiff_t count, Real t) {
    ptrdiff_t i = 0;
    for (; i + L <= count; i += L) over(load_wide(row + v + i), t).store(z + i);
    for (; i < count; ++i) z[i] = Real(widen(row[v + i])) / t;
    const ptrdiff_t padded = round_up(count, step);
    for (; i < padded; ++i) z[i] = -Real(HUGE_VAL);
    return padded;
  }

  static double add_lanes(const V* chain) {
    Real lanes[L];
    ((chain[0] + chain[1]) + (chain[2] + chain[3])).store(lanes);
    double total = 0;
    for (int l = 0; l < L; ++l) total += lanes[l];
    return total;
  }

  // A NaN is passed over by the maximum and found by the sum.
  Softmax<double> statistics(const In* row, Real t, bool moments) const {
    const Real lowest = sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.797693134862315e308);
    alignas(64) Real z[block];
    Softmax<double> all{lowest, 0, 0};
    for (ptrdiff_t v = 0; v < a.vocabulary; v += block) {
      const ptrdiff_t n = widen_block(z, row, v, least(block, a.vocabulary - v), t);
      V most[chains], total[chains], moment[chains];
      for (int c = 0; c < chains; ++c) most[c] = V::set(lowest), total[c] = V::set(0), moment[c] = V::set(0);
      for (ptrdiff_t i = 0; i < n; i += step)
        for (int c = 0; c < chains; ++c) most[c] = V::max(V::load(z + i + c * L), most[c]);
      Real lanes[L], top = lowest;
      V::max(V::max(most[0], most[1]), V::max(most[2], most[3])).store(lanes);
      for (int l = 0; l < L; ++l) top = lanes[l] > top ? lanes[l] : top;
      const V shift = V::set(top);
      for (ptrdiff_t i = 0; i < n; i += step)
        for (int c = 0; c < chains; ++c) {
          const V shifted = V::load(z + i + c * L) - shift, e = V::exp(shifted);
          total[c] = total[c] + e;
          if (moments) moment[c] = moment[c] + V::select(V::is_zero(e), V::set(0), e * shifted);
        }
      all = all.merge({top, add_lanes(total), moments ? add_lanes(moment) : 0});
    }
    return all;
  }

  void forward(const LogprobForward& out) const {
    Real *logps = static_cast<Real*>(out.logps), *entropy = static_cast<Real*>(out.entropy);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t target = a.targets[i];
      if (target == a.ignore_index) {
        logps[i] = 0;
        if (entropy) entropy[i] = 0;
        continue;
      }
      const Real t = temperature_of(i);
      const Softmax<double> of = statistics(row_of(i), t, entropy != nullptr);
      const Real at_target = Real(widen(row_of(i)[target])) / t;
      logps[i] = Real(double(at_target) - of.top - of.log_total());
      if (entropy) entropy[i] = Real(of.entropy());
    }
  }

  // dz_v = g ([v = y] - p_v) - ge p_v (log p_v + H), over the temperature.
  void backward(const LogprobBackward& out) const {
    const Real* grad_logps = static_cast<const Real*>(out.grad_logps);
    const Real* grad_entropy = static_cast<const Real*>(out.grad_entropy);
    const size_t row_bytes = size_t(a.vocabulary) * sizeof(In);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < a.rows; ++i) {
      In* to = static_cast<In*>(out.grad_logits) + i * a.vocabulary;
      const Real g = grad_logps[i], ge = grad_entropy ? grad_entropy[i] : 0;
      const int64_t target = a.targets[i];
      if (target == a.ignore_index || (g == 0 && ge == 0)) {
        memset(to, 0, row_bytes);
        continue;
      }
      const In* row = row_of(i);
      const Real t = temperature_of(i), inverse = Real(1) / t;
      const Softmax<double> of = statistics(row, t, grad_entropy != nullptr);
      const double entropy = grad_entropy ? of.entropy() : 0;
      const V top = V::set(Real(of.top)), log_total = V::set(Real(of.log_total())), up = V::set(-g * inverse),
              up_entropy = V::set(-ge * inverse), h = V::set(Real(entropy));
      auto derivative = [&](V x) {
        const V logp = over(x, t) - top - log_total, p = V::exp(logp);
        if (!grad_entropy) return up * p;
        return up * p + up_entropy * V::select(V::is_zero(p), V::set(0), p * (logp + h));
      };
      ptrdiff_t v = 0;
      for (; v + L <= a.vocabulary; v += L) store_narrow(to + v, derivative(load_wide(row + v)));
      if (v < a.vocabulary) {
        Real rest[L] = {};
        for (ptrdiff_t l = 0; v + l < a.vocabulary; ++l) rest[l] = widen(row[v + l]);
        derivative(V::load(rest)).store(rest);
        for (ptrdiff_t l = 0; v + l < a.vocabulary; ++l) narrow(rest[l], to + v + l);
      }
      const Real at_target = Real(widen(row[target])) / t;
      const double logp = double(at_target) - of.top - of.log_total();
      narrow(Real(dlogit_at_target<double>(logp, g, ge, entropy) * inverse), to + target);
    }
  }
};

// A dtype's kernel under this instruction set.
template <typename Run>
inline void with_logprob_kernel(const Logprob& call, Run run) {
  switch (call.dtype) {
    case Dtype::float64: run(LogprobKernel<Array<double>, double>(call)); break;
    case Dtype::float32: run(LogprobKernel<Float, float>(call)); break;
    case Dtype::bfloat16: run(LogprobKernel<Float, Bf16>(call)); break;
    case Dtype::float16: run(LogprobKernel<Float, Fp16>(call)); break;
  }
}

inline void logprob_forward(const LogprobForward& out) {
  with_logprob_kernel(out.logprob, [&](auto kernel) { kernel.forward(out); });
}

inline void logprob_backward(const LogprobBackward& out) {
  with_logprob_kernel(out.logprob, [&](auto kernel) { kernel.backward(out); });
}

}  // namespace FASTRL_ISA
