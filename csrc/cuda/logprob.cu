// Log-probabilities from logits in memory: a block to a row, 16 bytes to a load.
//
// The forward reads each row once. The backward needs the row's statistics before it can write, so it keeps the row in
// shared memory, and what does not fit there is read again while it is still in the second cache.
#include "softmax_row.h"

namespace FASTRL_ISA {
namespace {

template <typename In>
constexpr int most_threads = sizeof(In) == 8 ? 512 : 1024;  // a double takes twice the registers

template <typename Real>
struct OverTemperature {
  Real temperature;

  template <int N>
  __device__ void operator()(int64_t, Real (&z)[N]) const {
    divide(z, temperature);
  }
};

template <typename In>
struct LogprobRow : SoftmaxRow<In, OverTemperature<typename Wide<In>::Real>> {
  using Real = typename Wide<In>::Real;

  int64_t target;
  bool ignored, outside;

  __device__ LogprobRow(const Logprob& a, int64_t i)
      : SoftmaxRow<In, OverTemperature<Real>>{static_cast<const In*>(a.logits) + i * a.stride,
                                              a.vocabulary,
                                              {static_cast<const Real*>(a.temperature)[a.temperature_per_row ? i : 0]}},
        target(a.targets[i]),
        ignored(target == a.ignore_index),
        outside(target < 0 || target >= a.vocabulary) {}
};

template <typename In>
__global__ void __launch_bounds__(most_threads<In>, 1) forward_row(LogprobForward out) {
  using Real = typename Wide<In>::Real;
  const int64_t i = blockIdx.x;
  const LogprobRow<In> row(out.logprob, i);
  Real *logps = static_cast<Real*>(out.logps), *entropy = static_cast<Real*>(out.entropy);
  if (row.ignored) {
    if (threadIdx.x == 0) {
      logps[i] = 0;
      if (entropy) entropy[i] = 0;
    }
    return;
  }
  const Softmax<double> of = row.statistics(entropy != nullptr, [](int64_t, const auto&) {});
  if (threadIdx.x == 0) {
    logps[i] = row.outside ? Real(NAN) : Real(row.logp(row.target, of));
    if (entropy) entropy[i] = Real(of.entropy());
  }
}

template <typename In>
__global__ void __launch_bounds__(most_threads<In>, 1) backward_row(LogprobBackward out, int64_t kept) {
  using Real = typename Wide<In>::Real;
  const int64_t i = blockIdx.x;
  const LogprobRow<In> row(out.logprob, i);
  In* to = static_cast<In*>(out.grad_logits) + i * row.vocabulary;
  const Real g = static_cast<const Real*>(out.grad_logps)[i];
  const Real ge = out.grad_entropy ? static_cast<const Real*>(out.grad_entropy)[i] : Real(0);
  const bool silent = row.ignored || (g == 0 && ge == 0);
  if (silent || row.outside) {
    In value;
    narrow(silent ? Real(0) : Real(NAN), &value);
    const auto fill = [=](int64_t, auto pack) {
      for (In& x : pack.x) x = value;
      return pack;
    };
    write_row<1>(to, row.vocabulary, fill, [](int64_t, auto pack) { return pack; });
    return;
  }

  In* shared = reinterpret_cast<In*>(dynamic_shared());  // the first `kept` logits
  const Softmax<double> of = row.statistics(out.grad_entropy != nullptr, [=](int64_t first, const auto& pack) {
    if (first + pack.size <= kept) store_pack(shared + first, pack);
  });
  __syncthreads();
  const double entropy = out.grad_entropy ? of.entropy() : 0;
  const Real top = Real(of.top), log_total = Real(of.log_total()), h = Real(entropy);
  const Real inverse = Real(1) / row.finish.temperature;
  const auto load = [=](int64_t first, auto pack) {
    const In* from = first + pack.size <= kept ? shared : row.logits;
    load_elements(from + first, &pack);
    return pack;
  };
  write_row<1>(to, row.vocabulary, load, [=](int64_t first, auto pack) {
    Real z[pack.size];
    widen_all(pack, z);
    row.finish(first, z);
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const Real logp = z[i] - top - log_total;
      narrow(dlogit(exp_of(logp), logp, g, ge, h) * inverse, &pack.x[i]);
    }
    return pack;
  });
  __syncthreads();  // the target's entry is written last
  if (threadIdx.x != 0) return;
  narrow(Real(dlogit_at_target<double>(row.logp(row.target, of), g, ge, entropy) * inverse), to + row.target);
}

template <typename In>
int threads_of(const Logprob& a) {
  const int64_t packs = (a.vocabulary + pack_size<In> - 1) / pack_size<In>;
  return int(least<int64_t>((packs + 31) / 32 * 32, most_threads<In>));
}

template <typename In>
void launch_forward(const LogprobForward& out, Stream stream) {
  launch(forward_row<In>, out.logprob.rows, threads_of<In>(out.logprob), 0, stream, out);
}

template <typename In>
void launch_backward(const LogprobBackward& out, Stream stream) {
  const size_t packs = size_t(out.logprob.vocabulary) / pack_size<In>;
  const size_t kept = allow_shared(backward_row<In>, packs * 16) / 16 * 16;
  launch(backward_row<In>, out.logprob.rows, threads_of<In>(out.logprob), kept, stream, out,
         int64_t(kept / sizeof(In)));
}

}  // namespace

void logprob_forward(const LogprobForward& out, Stream stream) {
  if (out.logprob.rows == 0) return;
  switch (out.logprob.dtype) {
    case Dtype::float64: return launch_forward<double>(out, stream);
    case Dtype::float32: return launch_forward<float>(out, stream);
    case Dtype::bfloat16: return launch_forward<Bf16>(out, stream);
    case Dtype::float16: return launch_forward<Fp16>(out, stream);
  }
}

void logprob_backward(const LogprobBackward& out, Stream stream) {
  if (out.logprob.rows == 0) return;
  switch (out.logprob.dtype) {
    case Dtype::float64: return launch_backward<double>(out, stream);
    case Dtype::float32: return launch_backward<float>(out, stream);
    case Dtype::bfloat16: return launch_backward<Bf16>(out, stream);
    case Dtype::float16: return launch_backward<Fp16>(out, stream);
  }
}

}  // namespace FASTRL_ISA
