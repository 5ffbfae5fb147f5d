// Generalised advantage estimation as a scan: sequences are cut into tiles, and each token's recursion into what happens
// within its thread, its block and its sequence, in double.
//
//   1  a block sums a tile up as one span       2  a block joins the spans behind its tile, then walks its tokens
//
// Tiles start where their sequence does, so that no other sequence changes its bits. Their number is known without
// reading the bounds: tile j of sequence s has the place bounds[s] / tile + s + j; places between are empty.
//
// So one long sequence is as parallel as many short ones: 16 sequences of 131,072 tokens are 1,024 tiles of 2,048, in two
// launches of 1,041 blocks (16 + 1 places are empty), and a block joins at most 63 spans behind its own, one to a thread.
#include "../math/gae_step.h"
#include "device.h"

namespace FASTRL_ISA {
namespace {

constexpr int threads = 256, warps = threads / 32, each = 8, tile = threads * each;

using Span = GaeSpan<double>;
using State = GaeState<double>;

struct Tile {
  int64_t begin, end;  // tokens; none where the place is empty
  int64_t behind;      // tiles behind this one in its sequence
};

__device__ Tile tile_at(const Gae& a, int64_t place) {
  int64_t s = 0, beyond = a.sequences;  // the last sequence whose first place is not behind this one
  while (beyond - s > 1) {
    const int64_t middle = s + (beyond - s) / 2;
    if (a.bounds[middle] / tile + middle <= place)
      s = middle;
    else
      beyond = middle;
  }
  if (a.sequences == 0) return {0, 0, 0};
  const int64_t begin = a.bounds[s] + (place - a.bounds[s] / tile - s) * tile, end = a.bounds[s + 1];
  if (begin >= end) return {0, 0, 0};
  return {begin, least(end, begin + tile), (end - begin - 1) / tile};
}

// The tokens of one thread, neighbours.
template <typename Real>
struct Tokens {
  int64_t begin;
  int count;
  Real reward[each], value[each];
  bool valid[each];

  __device__ Tokens(const Gae& a, const Tile& of) : begin(of.begin + int64_t(threadIdx.x) * each) {
    const int64_t left = of.end - begin;
    count = left < 0 ? 0 : int(least<int64_t>(left, each));
#pragma unroll
    for (int t = 0; t < each; ++t) {
      reward[t] = t < count ? static_cast<const Real*>(a.rewards)[begin + t] : Real(0);
      value[t] = t < count ? static_cast<const Real*>(a.values)[begin + t] : Real(0);
      valid[t] = t < count && a.mask[begin + t];  // nothing behind the end is as a masked token without a reward
    }
  }
  __device__ Span span(double gamma, double decay) const {
    Span own{{0, 0, 0}, 0, false};
#pragma unroll
    for (int t = each - 1; t >= 0; --t) own.extend(reward[t], value[t], valid[t], gamma, decay);
    return own;
  }
};

__device__ Span span_from_later_lane(const Span& own, int distance) {
  Span later;
  later.state.value = __shfl_down_sync(whole_warp, own.state.value, distance);
  later.state.advantage = __shfl_down_sync(whole_warp, own.state.advantage, distance);
  later.state.stray_reward = __shfl_down_sync(whole_warp, own.state.stray_reward, distance);
  later.slope = __shfl_down_sync(whole_warp, own.slope, distance);
  later.any = __shfl_down_sync(whole_warp, int(own.any), distance);
  const int lane = threadIdx.x % 32;
  return lane + distance < 32 ? later : Span{{0, 0, 0}, 0, false};
}

struct Joined {
  Span behind, all;  // the spans of the threads behind this one, and of all threads
};

__device__ Joined join_block(Span own, double gamma, double decay) {
  __shared__ Span of_warp[warps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2)
    own = own.join(span_from_later_lane(own, distance), gamma, decay);
  const Span behind_in_warp = span_from_later_lane(own, 1);
  __syncthreads();  // who reads the previous spans is done
  if (lane == 0) of_warp[warp] = own;
  __syncthreads();
  Span later{{0, 0, 0}, 0, false}, all = later;
  for (int w = warps - 1; w >= 0; --w) {
    all = of_warp[w].join(all, gamma, decay);
    if (w == warp + 1) later = all;
  }
  return {behind_in_warp.join(later, gamma, decay), all};
}

template <typename Real>
__global__ void __launch_bounds__(threads, 4) sum_up(Gae a, Span* spans) {
  const Tile own = tile_at(a, blockIdx.x);
  if (own.begin == own.end) return;
  const double decay = a.gamma * a.lam;
  const Joined joined = join_block(Tokens<Real>(a, own).span(a.gamma, decay), a.gamma, decay);
  if (threadIdx.x == 0) spans[blockIdx.x] = joined.all;
}

template <typename Real>
__global__ void __launch_bounds__(threads) walk(Gae a, const Span* spans) {
  Real *advantages = static_cast<Real*>(a.advantages), *returns = static_cast<Real*>(a.returns);
  const int64_t own_thread = int64_t(blockIdx.x) * threads + threadIdx.x, all_threads = int64_t(gridDim.x) * threads;
  for (int64_t t = a.bounds[a.sequences] + own_thread; t < a.tokens; t += all_threads)
    advantages[t] = returns[t] = 0;  // padding

  const Tile own = tile_at(a, blockIdx.x);
  if (own.begin == own.end) return;
  const double gamma = a.gamma, decay = a.gamma * a.lam;
  State state{0, 0, 0};
  for (int64_t first = (own.behind - 1) / threads * threads; own.behind > 0 && first >= 0; first -= threads) {
    const int64_t j = first + threadIdx.x;
    const Span later = j < own.behind ? spans[blockIdx.x + 1 + j] : Span{{0, 0, 0}, 0, false};
    state = join_block(later, gamma, decay).all.after(state, gamma, decay);
  }
  const Tokens<Real> tokens(a, own);
  state = join_block(tokens.span(gamma, decay), gamma, decay).behind.after(state, gamma, decay);
#pragma unroll
  for (int t = each - 1; t >= 0; --t) {
    state = gae_step<double>(state, tokens.reward[t], tokens.value[t], tokens.valid[t], gamma, decay);
    if (t >= tokens.count) continue;
    advantages[tokens.begin + t] = tokens.valid[t] ? Real(state.advantage) : Real(0);
    returns[tokens.begin + t] = tokens.valid[t] ? Real(state.advantage + state.value) : Real(0);
  }
}

int64_t places(const Gae& a) { return a.tokens / tile + a.sequences + 1; }

template <typename Real>
void launch_gae(const Gae& a, Span* spans, Stream stream) {
  launch(sum_up<Real>, places(a), threads, 0, stream, a, spans);
  launch(walk<Real>, places(a), threads, 0, stream, a, static_cast<const Span*>(spans));
}

}  // namespace

size_t gae_scratch(const Gae& a) { return size_t(places(a)) * sizeof(Span); }

void gae(const Gae& a, void* scratch, Stream stream) {
  if (a.tokens == 0) return;
  if (a.dtype == Dtype::float64)
    launch_gae<double>(a, static_cast<Span*>(scratch), stream);
  else
    launch_gae<float>(a, static_cast<Span*>(scratch), stream);
}

}  // namespace FASTRL_ISA
