// Log-probabilities from logits in memory: a block to a row, 16 bytes to a load.
//
// The forward reads each row once. The backward needs the row's statistics before it can write, so it keeps the row in
// shared memory, and what does not fit there is read again while it is still in the second cache. A thread sums in
// float, a block in double, in an order that depends on the row's length alone: no other row changes its bits, nor does
// the place of a row.
#include "../math/softmax.h"
#include "device.h"

namespace FASTRL_ISA {
namespace {

template <typename In>
constexpr int most_threads = sizeof(In) == 8 ? 512 : 1024;  // a double takes twice the registers

template <typename Real>
constexpr Real lowest = sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.797693134862315e308);

template <typename In>
struct LogprobRow {
  using Real = typename Wide<In>::Real;

  const In* logits;
  int64_t vocabulary, target;
  Real temperature;
  bool ignored, outside;

  __device__ LogprobRow(const Logprob& a, int64_t i)
      : logits(static_cast<const In*>(a.logits) + i * a.stride),
        vocabulary(a.vocabulary),
        target(a.targets[i]),
        temperature(static_cast<const Real*>(a.temperature)[a.temperature_per_row ? i : 0]),
        ignored(target == a.ignore_index),
        outside(target < 0 || target >= vocabulary) {}

  // A quotient, not a product with the inverse: with z near 100 the inverse's rounding would show in exp(z).
  __device__ Real finished(In logit) const {
    const Real z = widen(logit);
    return temperature == Real(1) ? z : z / temperature;
  }

  // seen(first, pack) is told what was read.
  template <typename Seen>
  __device__ Softmax<double> statistics(bool moments, Seen seen) const {
    Softmax<Real> own{lowest<Real>, 0, 0};
    each_pack(logits, vocabulary, [&](int64_t first, const auto& pack) {
      seen(first, pack);
      Real z[pack.size];
#pragma unroll
      for (int i = 0; i < pack.size; ++i) z[i] = finished(pack.x[i]);
      own.add(z, pack.size, moments);
    });
    const Softmax<Real> level = own.below(block_reduce(own.top, Larger()));
    const double sum = block_reduce(double(level.sum), Add());
    return {double(level.top), sum, moments ? block_reduce(double(level.moment), Add()) : 0};
  }

  __device__ double logp(const Softmax<double>& of) const {
    return double(finished(logits[target])) - of.top - of.log_total();
  }
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
    logps[i] = row.outside ? Real(NAN) : Real(row.logp(of));
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
    write_row(to, row.vocabulary, [=](int64_t, auto pack) {
      for (In& x : pack.x) narrow(silent ? Real(0) : Real(NAN), &x);
      return pack;
    });
    return;
  }

  In* shared = reinterpret_cast<In*>(dynamic_shared());  // the first `kept` logits
  const Softmax<double> of = row.statistics(out.grad_entropy != nullptr, [=](int64_t first, const auto& pack) {
    if (first + pack.size <= kept) store_pack(shared + first, pack);
  });
  __syncthreads();
  const double entropy = out.grad_entropy ? of.entropy() : 0;
  const Real top = Real(of.top), log_total = Real(of.log_total()), h = Real(entropy);
  const Real inverse = Real(1) / row.temperature;
  write_row(to, row.vocabulary, [=](int64_t first, auto pack) {
    const In* from = first + pack.size <= kept ? shared : row.logits;
    load_elements(from + first, &pack);
    for (In& x : pack.x) narrow(dlogit<Real>(row.finished(x) - top - log_total, g, ge, h) * inverse, &x);
    return pack;
  });
  __syncthreads();  // the target's entry is written last
  if (threadIdx.x == 0) narrow(Real(dlogit_at_target<double>(row.logp(of), g, ge, entropy) * inverse), to + row.target);
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
  launch(backward_row<In>, out.logprob.rows, threads_of<In>(out.logprob), kept, stream, out, int64_t(kept / sizeof(In)));
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
