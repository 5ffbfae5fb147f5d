// Scratch memory, and the arithmetic of cutting arrays into pieces.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace FASTRL_ISA {

inline ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }
inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
constexpr int least_common_multiple(int a, int b) {
  int multiple = a;
  while (multiple % b != 0) multiple += a;
  return multiple;
}

// Scratch that starts on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(ptrdiff_t n)
      : data_(static_cast<T*>(aligned_alloc(64, size_t(round_up((n > 0 ? n : 1) * ptrdiff_t(sizeof(T)), 64))))) {
    if (!data_) abort();  // no memory for a few megabytes: nothing sensible is left to do
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

}  // namespace FASTRL_ISA
