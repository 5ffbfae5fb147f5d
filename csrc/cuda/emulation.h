// CUDA's execution model on one host thread, to run and sanitize the kernels where there is no GPU.
//
// The threads of a block are coroutines that switch at barriers and shuffles; the order in which they run turns around
// at every switch, and that of the blocks at every launch, so that a result that depends on either shows. A barrier that
// not all threads reach throws. Blocks run one after the other: a kernel must not wait for another block.
#pragma once

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class State { runnable, at_warp, at_block, done };

// One block; its stacks and its dynamic shared memory serve the next one too.
struct Block {
  static constexpr size_t stack_bytes = 1 << 16, widest_shuffle = 16;
  struct Thread {
    State state;
    bool started, odd;  // odd: which of its two slots the next shuffle writes
    ucontext_t start;
    jmp_buf resume;
    std::vector<char> stack;
    char slot[2][widest_shuffle];
  };

  std::vector<Thread> threads;
  std::vector<char> dynamic_shared;
  std::function<void()> body;
  jmp_buf scheduler;
  size_t current = 0;
  bool backwards = false;

  Thread& own() { return threads[current]; }

  static void enter();
  void leave(State state) {
    own().state = state;
    if (_setjmp(own().resume) == 0) _longjmp(scheduler, 1);
  }
  // setjmp keeps no registers of its caller, so nothing else happens here.
  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler) != 0) return;
    if (own().started) _longjmp(own().resume, 1);
    own().started = true;
    setcontext(&own().start);
  }

  void prepare(size_t count) {
    if (threads.size() < count) threads.resize(count);
    for (size_t t = 0; t < count; ++t) {
      Thread& thread = threads[t];
      thread.state = State::runnable;
      thread.started = thread.odd = false;
      thread.stack.resize(stack_bytes);
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.data();
      thread.start.uc_stack.ss_size = stack_bytes;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, &Block::enter, 0);
    }
  }

  bool all(size_t begin, size_t end, State state) const {
    for (size_t t = begin; t < end; ++t)
      if (threads[t].state != state) return false;
    return true;
  }
  void release(size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) threads[t].state = State::runnable;
  }

  void run(size_t count) {
    prepare(count);
    while (!all(0, count, State::done)) {
      bool moved = false;
      for (size_t n = 0; n < count; ++n) {
        current = backwards ? count - 1 - n : n;
        if (own().state != State::runnable) continue;
        threadIdx.x = unsigned(current);
        resume();
        moved = true;
      }
      backwards = !backwards;
      for (size_t warp = 0; warp < count; warp += 32)
        if (all(warp, warp + 32, State::at_warp)) release(warp, warp + 32), moved = true;
      if (all(0, count, State::at_block)) release(0, count), moved = true;
      if (!moved) throw std::runtime_error("emulated CUDA: some threads of a block are missing at a barrier");
    }
  }
};

inline Block block;
inline void Block::enter() {
  block.body();
  block.leave(State::done);
}

inline void launch(int64_t blocks, int threads, size_t shared, std::function<void()> body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  static bool backwards = false;
  backwards = !backwards;
  block.body = std::move(body);
  block.dynamic_shared.assign(shared + 16, char(0xff));  // NaN
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = unsigned(backwards ? blocks - 1 - b : b);
    block.run(size_t(threads));
  }
}

// What `lane` of this warp passes to the same call.
template <typename T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) <= Block::widest_shuffle);
  const bool odd = block.own().odd;
  block.own().odd = !odd;
  memcpy(block.own().slot[odd], &value, sizeof value);
  block.leave(State::at_warp);
  memcpy(&value, block.threads[block.current / 32 * 32 + lane].slot[odd], sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.leave(emulation::State::at_block); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, threadIdx.x % 32 ^ unsigned(mask));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::from_lane(value, lane + distance < 32 ? lane + distance : lane);
}
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
