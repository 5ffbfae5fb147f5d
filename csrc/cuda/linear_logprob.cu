// Between the matmuls of an LM head, over the logits of a chunk of rows: one read for the statistics, and for a policy loss
// its derivatives; one read and one write for the gradient. A block to a row, 16 bytes to a load.
//
// Bias, scale, softcap and temperature are applied as logits are read: what is in memory are the matmul's own.
#include <type_traits>

#include "../math/softcap.h"
#include "policy_batch.h"
#include "softmax_row.h"

namespace FASTRL_ISA {
namespace {

// Two blocks to a multiprocessor in float: one reads while the other adds up its row.
constexpr int most_threads = 512;
template <typename Real>
constexpr int blocks_at_once = sizeof(Real) == 8 ? 1 : 2;

template <typename Real>
__device__ const Real* reals(const void* array) {
  return static_cast<const Real*>(array);
}

// bias, scale, softcap, temperature: what a matmul's logits become before the softmax.
template <typename Real, bool capped>
struct HeadFinish {
  const Real* bias;
  Real scale, softcap, temperature;

  __device__ HeadFinish(const HeadChunk& a, int64_t i)
      : bias(reals<Real>(a.bias)),
        scale(Real(a.logit_scale)),
        softcap(Real(a.softcap)),
        temperature(reals<Real>(a.temperature)[a.temperature_per_row ? i : 0]) {}

  // And the derivative of the softcap there.
  template <int N>
  __device__ void operator()(int64_t first, Real (&z)[N], Real (&slope)[N]) const {
    if (bias) {
      const Pack<Real, N> more = load_packs<Real, N>(bias + first, /*edge=*/true);
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = z[i] + more.x[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] = z[i] * scale;
      slope[i] = Real(1);
      if constexpr (capped) {
        const Tanh<Real> t = tanh_and_slope(z[i] / softcap);
        z[i] = softcap * t.value;
        slope[i] = t.slope;
      }
    }
    divide(z, temperature);
  }
  template <int N>
  __device__ void operator()(int64_t first, Real (&z)[N]) const {
    Real slope[N];
    (*this)(first, z, slope);
  }
};

// The rest that may be asked of a row, from a second read: log sum of p^2, mean logit, and whether the target is the
// first of the largest; each `apart` from the last.
template <typename Real, typename Row>
__device__ void summarise(const Row& row, const Softmax<double>& of, int64_t target, Real* to, int64_t apart) {
  const Real top = Real(of.top);
  Real squares = 0, total = 0;
  int64_t first = row.vocabulary;
  each_pack(row.logits, row.vocabulary, [&](int64_t at, const auto& pack) {
    Real z[pack.size];
    widen_all(pack, z);
    row.finish(at, z);
    for (int k = 0; k < pack.size; ++k) {
      const Real e = exp_of(z[k] - top);
      squares += e * e;
      total += z[k];
      if (z[k] == top && at + k < first) first = at + k;
    }
  });
  const double all_squares = block_reduce(double(squares), Add()), sum = block_reduce(double(total), Add());
  const double place = -block_reduce(-double(first), Larger());
  if (threadIdx.x != 0) return;
  to[0] = Real(log_of(all_squares) - 2 * of.log_total());
  to[apart] = Real(sum / double(row.vocabulary));
  to[2 * apart] = of.sum == of.sum && place == double(target);
}

template <typename Real, bool capped>
__global__ void __launch_bounds__(most_threads, blocks_at_once<Real>) statistics_of_row(ChunkStatistics a) {
  const HeadChunk& chunk = a.chunk;
  const int64_t i = blockIdx.x, target = chunk.targets[i], vocabulary = chunk.vocabulary;
  const SoftmaxRow<Real, HeadFinish<Real, capped>> row{
      reals<Real>(chunk.logits) + i * vocabulary, vocabulary, {chunk, i}};
  const Softmax<double> of = row.statistics(a.entropy != nullptr, [](int64_t, const auto&) {});
  if (a.summaries) summarise(row, of, target, static_cast<Real*>(a.summaries) + i, chunk.rows);
  if (threadIdx.x != 0) return;
  const Real logp = target < 0 || target >= vocabulary ? Real(NAN) : Real(row.logp(target, of));
  const Real entropy = a.entropy ? Real(of.entropy()) : Real(0);
  static_cast<Real*>(a.logps)[i] = logp;
  static_cast<Real*>(a.lse)[i] = Real(of.top);
  static_cast<Real*>(a.lse)[chunk.rows + i] = Real(of.log_total());
  if (a.entropy) static_cast<Real*>(a.entropy)[i] = entropy;
  if (!a.tokens) return;
  const PolicyTerm<Real> term = policy_token<Real>(a.loss.spec, token_of(a.loss, a.tokens[i], true, logp, entropy));
  static_cast<Real*>(a.loss.dlogps)[i] = term.dlogp + term.dlog_ratio;
  static_cast<Real*>(a.loss.dentropy)[i] = term.dentropy;
}

enum class Source { logits, capped_logits, probabilities };

template <typename In, typename Out, Source source>
__global__ void __launch_bounds__(most_threads, blocks_at_once<typename Wide<In>::Real>)
    gradient_of_row(ChunkGradient a) {
  using Real = typename Wide<In>::Real;
  const HeadChunk& chunk = a.chunk;
  const int64_t i = blockIdx.x, vocabulary = chunk.vocabulary, target = chunk.targets[i];
  const In* from = static_cast<const In*>(chunk.logits) + (a.from_rows ? a.from_rows[i] : i) * vocabulary;
  Out* to = static_cast<Out*>(a.out) + (a.to_rows ? a.to_rows[i] : i) * vocabulary;
  const HeadFinish<Real, source == Source::capped_logits> finish(chunk, i);
  const Real top = reals<Real>(a.lse)[i], log_total = reals<Real>(a.lse)[chunk.rows + i];
  const bool wanted = a.grad_logps != nullptr;
  const Real g = wanted ? reals<Real>(a.grad_logps)[i] : Real(0), own = wanted ? reals<Real>(a.logps)[i] : Real(0);
  const Real ge = a.grad_entropy ? reals<Real>(a.grad_entropy)[i] : Real(0);
  const Real entropy = a.grad_entropy ? reals<Real>(a.entropy)[i] : Real(0);
  const Real at_target = dlogit_at_target(own, g, ge, entropy), chain = finish.scale / finish.temperature;

  constexpr int ahead = least(4, 16 / pack_size<Out>);  // 16 logits on their way to each thread
  const auto load = [=](int64_t first, auto pack) {
    const bool edge = first < pack_size<In> || first + pack.size + pack_size<In> > vocabulary;
    return load_packs<In, pack.size>(from + first, edge);
  };
  write_row<ahead>(to, vocabulary, load, [=](int64_t first, const auto& loaded) {
    constexpr int size = std::decay_t<decltype(loaded)>::size;
    Real x[size], slope[size];
    widen_all(loaded, x);
    if constexpr (source != Source::probabilities) finish(first, x, slope);
    Pack<Out, size> out;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const bool here = first + k == target;
      Real p, logp;
      if constexpr (source == Source::probabilities) {
        p = x[k];
        logp = here ? own : log_of(p);
        const Real capped = (logp + (top + log_total)) * finish.temperature;
        slope[k] = finish.softcap == 0 ? Real(1) : slope_of_tanh(capped / finish.softcap);
      } else {
        logp = x[k] - top - log_total;
        p = exp_of(logp);
      }
      const Real dz = here ? at_target : dlogit(p, logp, g, ge, entropy);
      narrow(wanted ? dz * chain * slope[k] : p, &out.x[k]);
    }
    return out;
  });
}

template <typename Out>
int threads_of(int64_t vocabulary) {
  const int64_t packs = (vocabulary + pack_size<Out> - 1) / pack_size<Out>;
  return int(least<int64_t>((packs + 31) / 32 * 32, most_threads));
}

template <typename Real>
void launch_statistics(const ChunkStatistics& a, Stream stream) {
  const auto kernel = a.chunk.softcap == 0 ? statistics_of_row<Real, false> : statistics_of_row<Real, true>;
  launch(kernel, a.chunk.rows, threads_of<Real>(a.chunk.vocabulary), 0, stream, a);
}

template <typename Out>
void from_logits(const ChunkGradient& a, Stream stream) {
  using In = typename Wide<Out>::Real;
  const auto kernel =
      a.chunk.softcap == 0 ? gradient_of_row<In, Out, Source::logits> : gradient_of_row<In, Out, Source::capped_logits>;
  launch(kernel, a.chunk.rows, threads_of<Out>(a.chunk.vocabulary), 0, stream, a);
}

template <typename In>
void from_probabilities(const ChunkGradient& a, Stream stream) {
  using Real = typename Wide<In>::Real;
  const int64_t rows = a.chunk.rows, vocabulary = a.chunk.vocabulary;
  if (a.out_dtype == a.chunk.dtype)
    launch(gradient_of_row<In, In, Source::probabilities>, rows, threads_of<In>(vocabulary), 0, stream, a);
  else
    launch(gradient_of_row<In, Real, Source::probabilities>, rows, threads_of<Real>(vocabulary), 0, stream, a);
}

}  // namespace

void head_statistics(const ChunkStatistics& call, Stream stream) {
  if (call.chunk.rows == 0) return;
  call.chunk.dtype == Dtype::float64 ? launch_statistics<double>(call, stream) : launch_statistics<float>(call, stream);
}

void head_gradient(const ChunkGradient& call, Stream stream) {
  if (call.chunk.rows == 0) return;
  switch (call.kept ? call.chunk.dtype : call.out_dtype) {
    case Dtype::float64:
      return call.kept ? from_probabilities<double>(call, stream) : from_logits<double>(call, stream);
    case Dtype::float32: return call.kept ? from_probabilities<float>(call, stream) : from_logits<float>(call, stream);
    case Dtype::bfloat16: return call.kept ? from_probabilities<Bf16>(call, stream) : from_logits<Bf16>(call, stream);
    case Dtype::float16: return call.kept ? from_probabilities<Fp16>(call, stream) : from_logits<Fp16>(call, stream);
  }
}

}  // namespace FASTRL_ISA
