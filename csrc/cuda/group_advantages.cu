// Advantages within groups, in double: a warp to a reward; where the batch's spread is the scale, the last block to
// finish takes it and divides.
#include "group_advantages.h"

namespace FASTRL_ISA {
namespace {

constexpr int threads = 256, warps = threads / 32;

template <typename Real>
__global__ void __launch_bounds__(threads)
    advantages_of(GroupRewards a, Real* advantages, double* centred, unsigned* ticket) {
  const int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (i < a.count) {
    const double advantage = advantage_by_warp<Real>(a, i);
    if (threadIdx.x % 32 == 0) {
      if (a.scale == Scale::batch)
        centred[i] = advantage;
      else
        advantages[i] = Real(scored(advantage));
    }
  }
  if (a.scale != Scale::batch || !last_block(ticket)) return;
  const Spread batch = measure(
      a.count, int(threadIdx.x), threads, [=](int64_t j) { return __ldcg(centred + j); },
      [=](int64_t j) { return __ldcg(centred + j) == __ldcg(centred + j); },
      [](double value, auto join) { return block_reduce(value, join); });
  for (int64_t j = threadIdx.x; j < a.count; j += threads)
    advantages[j] = Real(scored(__ldcg(centred + j) / batch.divisor(a.eps)));
}

template <typename Real>
void launch_advantages(const GroupRewards& a, void* advantages, void* scratch, Stream stream) {
  unsigned* ticket = static_cast<unsigned*>(scratch);
  double* centred = static_cast<double*>(scratch) + 1;
  if (a.scale == Scale::batch) fill_zero(ticket, sizeof *ticket, stream);
  launch(advantages_of<Real>, (a.count + warps - 1) / warps, threads, 0, stream, a, static_cast<Real*>(advantages),
         centred, ticket);
}

}  // namespace

size_t group_advantages_scratch(const GroupRewards& a) {
  return a.scale == Scale::batch ? size_t(a.count + 1) * sizeof(double) : 0;
}

void group_advantages(const GroupRewards& a, void* advantages, void* scratch, Stream stream) {
  if (a.count == 0) return;
  if (a.dtype == Dtype::float64)
    launch_advantages<double>(a, advantages, scratch, stream);
  else
    launch_advantages<float>(a, advantages, scratch, stream);
}

}  // namespace FASTRL_ISA
