// What the kernels are written in: CUDA, or with FASTRL_EMULATE_CUDA its emulation on the host; 16-bit numbers, rows in
// pieces of 16 bytes, and reductions in a fixed order.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#if defined(FASTRL_EMULATE_CUDA)
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../math/real.h"
#include "kernels.h"

namespace FASTRL_ISA {

// Launching.

#if defined(FASTRL_EMULATE_CUDA)
inline void use_device(int) {}
inline void fill_zero(void* to, size_t bytes, Stream) { memset(to, 0, bytes); }
template <typename... Parameters>
size_t allow_shared(void (*)(Parameters...), size_t wanted) {
  return wanted < 1024 ? wanted : 1024;  // so that rows outgrow it, as they do on a GPU
}
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Stream, Arguments... arguments) {
  emulation::launch(blocks, threads, shared, [=] { kernel(arguments...); });
}
#else
inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code));
}
// PyTorch's CUDA runtime is another copy: this one is told which device the addresses are of.
inline void use_device(int device) { check(cudaSetDevice(device)); }
inline void fill_zero(void* to, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}
// As much dynamic shared memory as the device gives one block, `wanted` at most.
template <typename... Parameters>
size_t allow_shared(void (*kernel)(Parameters...), size_t wanted) {
  constexpr size_t for_reductions = 4096;
  int device, most;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const size_t bytes = wanted < size_t(most) - for_reductions ? wanted : size_t(most) - for_reductions;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  return bytes;
}
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Stream stream,
            Arguments... arguments) {
  kernel<<<unsigned(blocks), unsigned(threads), shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}
#endif

__device__ inline char* dynamic_shared() {
#if defined(FASTRL_EMULATE_CUDA)
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulation::block.dynamic_shared.data());
  return reinterpret_cast<char*>((start + 15) / 16 * 16);
#else
  extern __shared__ __align__(16) char bytes[];
  return bytes;
#endif
}

// Numbers of 16 bits: to the nearest, ties to even; NaN stays NaN.

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// In which a dtype is computed.
template <typename In>
struct Wide {
  using Real = float;
};
template <>
struct Wide<double> {
  using Real = double;
};

__device__ inline double widen(double v) { return v; }
__device__ inline float widen(float v) { return v; }
__device__ inline void narrow(double v, double* to) { *to = v; }
__device__ inline void narrow(float v, float* to) { *to = v; }
#if defined(FASTRL_EMULATE_CUDA)
inline float widen(Bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(Fp16 v) {
  _Float16 half;
  memcpy(&half, &v, sizeof half);
  return float(half);
}
inline void narrow(float v, Bf16* to) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  to->bits = uint16_t(v != v ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float v, Fp16* to) {
  const _Float16 half = _Float16(v);
  memcpy(to, &half, sizeof half);
}
#else
__device__ inline float widen(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float widen(Fp16 v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ inline void narrow(float v, Bf16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
__device__ inline void narrow(float v, Fp16* to) { to->bits = __half_as_ushort(__float2half_rn(v)); }
#endif

template <typename T>
FASTRL_HD constexpr T least(T a, T b) {
  return a < b ? a : b;
}

// N neighbours, loaded and stored at once where they fill 16 bytes.
template <typename In, int N>
struct alignas(N * sizeof(In)) Pack {
  static constexpr int size = N;
  In x[N];
};
template <typename In>
constexpr int pack_size = 16 / int(sizeof(In));
template <typename In>
using FullPack = Pack<In, pack_size<In>>;

__device__ inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// To an address that is a multiple of the pack's size.
template <typename In, int N>
__device__ void store_pack(In* to, const Pack<In, N>& pack) {
  *reinterpret_cast<Pack<In, N>*>(to) = pack;
}

template <typename In, int N>
__device__ void widen_all(const Pack<In, N>& pack, typename Wide<In>::Real (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.x[i]);
}

// At any address, at once where it is aligned.
template <typename In, int N>
__device__ void load_elements(const In* from, Pack<In, N>* pack) {
  if (N > 1 && reinterpret_cast<uintptr_t>(from) % sizeof *pack == 0) {
    *pack = *reinterpret_cast<const Pack<In, N>*>(from);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) pack->x[i] = from[i];
}

// The same in two loads where it is not aligned; an `edge` may lie at either end of the memory, where nothing beside it may be read.
template <typename In>
__device__ FullPack<In> load_pack(const In* from, bool edge) {
  FullPack<In> pack;
  if (edge || aligned(from)) {
    load_elements(from, &pack);
    return pack;
  }
  // The four halves of the two aligned packs that it lies in; three of them hold it.
  struct alignas(16) Halves {
    uint64_t x[2];
  };
  const unsigned beyond = unsigned(reinterpret_cast<uintptr_t>(from) % 16), shift = beyond % 8 * 8;
  const Halves* around = reinterpret_cast<const Halves*>(reinterpret_cast<uintptr_t>(from) - beyond);
  const Halves low = around[0], high = around[1];
  const uint64_t a = beyond < 8 ? low.x[0] : low.x[1], b = beyond < 8 ? low.x[1] : high.x[0],
                 c = beyond < 8 ? high.x[0] : high.x[1];
  const Halves joined =
      shift == 0 ? Halves{{a, b}} : Halves{{a >> shift | b << (64 - shift), b >> shift | c << (64 - shift)}};
  memcpy(&pack, &joined, sizeof pack);
  return pack;
}

// N neighbours at any address, as packs where they fill any.
template <typename In, int N>
__device__ Pack<In, N> load_packs(const In* from, bool edge) {
  constexpr int size = pack_size<In>;
  Pack<In, N> all;
  if constexpr (N < size) {
    load_elements(from, &all);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += size) {
      const FullPack<In> part = load_pack(from + i, edge);
#pragma unroll
      for (int j = 0; j < size; ++j) all.x[i + j] = part.x[j];
    }
  }
  return all;
}

// use(first, pack) for each piece of a row that is this thread's: full packs, then the elements behind the last. Which
// those are depends on the row's length alone, so that it is summed up in the same order wherever it starts.
template <typename In, typename Use>
__device__ void each_pack(const In* row, int64_t count, Use use) {
  constexpr int ahead = 4, size = pack_size<In>;  // loads on their way at once
  const int64_t packs = count / size, step = blockDim.x;
  const auto load = [=](int64_t p) { return load_pack(row + p * size, p == 0 || p + 1 == packs); };
  int64_t p = threadIdx.x;
  for (; p + (ahead - 1) * step < packs; p += ahead * step) {
    FullPack<In> loaded[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) loaded[i] = load(p + i * step);
#pragma unroll
    for (int i = 0; i < ahead; ++i) use((p + i * step) * size, loaded[i]);
  }
  for (; p < packs; p += step) use(p * size, load(p));
  for (int64_t v = packs * size + threadIdx.x; v < count; v += step) use(v, Pack<In, 1>{{row[v]}});
}

// Writes make(first, load(first, of that size)) at `first` for each piece of a row, whole packs at addresses that are
// multiples of 16 bytes: with an odd vocabulary in 16 bits, each row starts at another distance to such an address. `ahead`
// packs are loaded before the first of them is written: a load may be of what a write changes, so none passes it.
template <int ahead, typename Out, typename Load, typename Make>
__device__ void write_row(Out* row, int64_t count, Load load, Make make) {
  constexpr int size = pack_size<Out>;
  const int64_t beyond = int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Out)), step = blockDim.x;
  const int64_t head = least<int64_t>(beyond == 0 ? 0 : size - beyond, count), packs = (count - head) / size;
  int64_t p = threadIdx.x;
  for (; p + (ahead - 1) * step < packs; p += ahead * step) {
    decltype(load(p, FullPack<Out>{})) loaded[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) loaded[i] = load(head + (p + i * step) * size, FullPack<Out>{});
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int64_t first = head + (p + i * step) * size;
      store_pack(row + first, make(first, loaded[i]));
    }
  }
  const auto write = [=](int64_t first, auto pack) { store_pack(row + first, make(first, load(first, pack))); };
  for (; p < packs; p += step) write(head + p * size, FullPack<Out>{});
  for (int64_t v = threadIdx.x; v < head; v += step) write(v, Pack<Out, 1>{});
  for (int64_t v = head + packs * size + threadIdx.x; v < count; v += step) write(v, Pack<Out, 1>{});
}

// Reductions. Every thread gets the result, and every run the same one.

constexpr unsigned whole_warp = 0xffffffffu;
constexpr int most_warps = 32;

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {  // passes over NaN
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct Smaller {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

template <typename T, typename Join>
__device__ T warp_reduce(T value, Join join) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = join(value, __shfl_xor_sync(whole_warp, value, mask));
  return value;
}

template <typename T, typename Join>
__device__ T block_reduce(T value, Join join) {
  __shared__ T of_warp[most_warps];
  value = warp_reduce(value, join);
  __syncthreads();  // who reads the previous reduction's results is done
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) value = join(value, of_warp[w]);
  return value;
}

// Whether this is the last block to come here; what the others wrote before is then visible to it through __ldcg.
__device__ inline bool last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace FASTRL_ISA
