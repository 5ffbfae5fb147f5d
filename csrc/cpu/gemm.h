// The one matmul kernel that all products of the head are made of.
//
//   c[r, l] (+)= sum_k a[k, l] b[r, k]        r: rows, l: lanes, k: units
//
// A unit is what one step of the inner loop multiplies: a float (multiply-add), or a pair of bfloat16 (dot product of
// two, accumulated in float32). A value too long for a unit is stored in pieces, one unit each. `a` is packed into
// panels of `tile` lanes, so that a step reads whole vectors; `b` is read a broadcast unit at a time and may have any
// strides. Each c[r, l] is a sum of partial sums over `chain` units in order, which keeps rounding errors small over
// long k, and starts from what c holds: how the work is cut into tiles or shared among threads changes no bit of it, as
// long as cuts of k fall on multiples of `chain`. AMX has its own: amx.h.
#pragma once

#include "simd.h"

namespace FASTRL_ISA {

// What a thread must hold while it multiplies: nothing.
struct NoRegion {};

// How units lie in memory, along a row of `b` or down a panel of `a`: `group` of them, rounded up with zeros, then the
// next piece of the same ones. place: where the first piece of unit u lies. stored: what this many units take.
template <typename M>
constexpr ptrdiff_t place(ptrdiff_t u) {
  return u / M::group * M::group * M::pieces + u % M::group;
}
template <typename M>
constexpr ptrdiff_t stored(ptrdiff_t units) {
  return (units + M::group - 1) / M::group * M::group * M::pieces;
}

// One float (or double) per unit.
template <typename V>
struct Plain {
  using Vec = V;
  using Unit = typename V::Real;
  using Region = NoRegion;
  static constexpr int pair = 1, pieces = 1, group = 1;
  static constexpr bool contiguous_rows = false;  // b may have any strides
  static V load(const Unit* a) { return V::load(a); }
  static V spread(const Unit* b) { return V::set(*b); }
  static V multiply_add(V a, V b, V acc) { return V::fma(a, b, acc); }
  // A unit for each lane, as bits: of neighbouring values of a row, or of one row's values (and, in pairs, the next's).
  template <typename In>
  static V load_row(const In* row) {
    return load_wide(row);
  }
  template <typename In>
  static V load_pair(const In* row, const In*) {
    return load_wide(row);
  }

  // What the two backward products read of dz for V::lanes tokens at an even vocabulary entry (a) and the next (b):
  //   by_entry[lane]: both entries of a token in one unit (contraction over the vocabulary)
  //   even, odd: neighbouring tokens of one entry in one unit (contraction over tokens)
  static void put_dz(Unit* by_entry, ptrdiff_t entry_stride, Unit* even, Unit* odd, V a, V b) {
    a.store(by_entry);
    b.store(by_entry + entry_stride);
    a.store(even);
    b.store(odd);
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 per unit: the even index in the low half.
struct Paired {
  using Vec = Float;
  using Unit = uint32_t;
  using Region = NoRegion;
  static constexpr int pair = 2, pieces = 1, group = 1;
  static constexpr bool contiguous_rows = false;
  struct Bits {
    __m512i x;
  };
  static Bits load(const Unit* a) { return {_mm512_loadu_si512(a)}; }
  static Bits spread(const Unit* b) { return {_mm512_set1_epi32(int(*b))}; }
  static Float multiply_add(Bits a, Bits b, Float acc) {
    return {_mm512_dpbf16_ps(acc.x, (__m512bh)a.x, (__m512bh)b.x)};
  }
  static Float load_row(const Bf16* row) { return {_mm512_loadu_ps(row)}; }
  static Float load_pair(const Bf16* row, const Bf16* next) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  static void put_dz(Unit* by_entry, ptrdiff_t, Unit* even, Unit* odd, Float a, Float b) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(a.x), high = (__m256i)_mm512_cvtneps_pbh(b.x);
    __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(by_entry, pairs);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), high);
  }
};
#endif

// Vectors of lanes and rows of one register tile: as many accumulators as leave room for the operands.
template <typename M>
struct Tile {
  using V = typename M::Vec;
  static constexpr int vectors = V::registers >= 32 ? 4 : V::registers >= 16 ? 2 : 1;
  static constexpr int rows = V::registers >= 16 ? 6 : 4;
  static constexpr int lanes = vectors * V::lanes;
  // Units of one partial sum. Its part of a panel takes at most half of 32 KB, the smallest first cache.
  static constexpr int chain = (vectors == 2 ? 20 : 10) * rows;
  static constexpr ptrdiff_t block = 20 * rows;    // rows of b (vocabulary entries) that stay in the second cache
  static constexpr ptrdiff_t segment = 4 * block;  // what a thread takes at once
};

// One partial sum, of at most a chain of units, by R rows and a panel of N vectors. Step: from one unit of b to the next.
// Never inlined: gcc 12 may inline its beginning alone and then keep the sums in memory, at half the speed.
template <typename M, int R, int N, int Step>
[[gnu::noinline]] inline void multiply_tile(ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b,
                                            ptrdiff_t b_row, typename M::Vec::Real* c, ptrdiff_t c_row,
                                            bool accumulate) {
  using V = typename M::Vec;
  // What is neither a load nor a multiplication costs time where another thread shares the core: four units at a time
  // have their offsets in the instructions, and an address is one of few pointers and up to twice the row stride.
  constexpr int unrolled = R * N > 8 ? 4 : 1;
  const typename M::Unit* row[(R + 2) / 3];
  for (int r = 0; r < R; r += 3) row[r / 3] = b + r * b_row;
  V acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = V::set(0);
  const auto multiply = [&](int k) {
    decltype(M::load(a)) lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = M::load(a + (k * N + n) * V::lanes);
    for (int r = 0; r < R; ++r) {
      auto unit = M::spread(row[r / 3] + r % 3 * b_row + k * Step);
      for (int n = 0; n < N; ++n) acc[r][n] = M::multiply_add(lanes[n], unit, acc[r][n]);
    }
  };
  const auto advance = [&](int by) {
    a += by * N * V::lanes;
    for (int r = 0; r < R; r += 3) row[r / 3] += by * Step;
  };
  ptrdiff_t k = 0;
  for (; k + unrolled <= units; k += unrolled) {
    for (int j = 0; j < unrolled; ++j) multiply(j);
    advance(unrolled);
  }
  for (; k < units; ++k) {
    multiply(0);
    advance(1);
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      typename V::Real* to = c + r * c_row + n * V::lanes;
      (accumulate ? V::load(to) + acc[r][n] : acc[r][n]).store(to);
    }
}

// What a product does between two register tiles: nothing.
struct Nothing {
  void operator()() const {}
};

// The same by any number of rows, R at a time and those left over by halves of R.
template <typename M, int R, int N, int Step, typename Between>
inline void multiply_rows(ptrdiff_t rows, ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b,
                          ptrdiff_t b_row, typename M::Vec::Real* c, ptrdiff_t c_row, bool accumulate,
                          Between& between) {
  ptrdiff_t r = 0;
  for (; r + R <= rows; r += R) {
    between();
    multiply_tile<M, R, N, Step>(units, a, b + r * b_row, b_row, c + r * c_row, c_row, accumulate);
  }
  if constexpr (R > 1)
    if (r < rows)
      multiply_rows<M, R / 2, N, Step>(rows - r, units, a, b + r * b_row, b_row, c + r * c_row, c_row, accumulate,
                                       between);
}

// All `rows` of one panel of N vectors of lanes and `units` stored units; c has room for all lanes. A chain of units at
// a time: its part of the panel stays in the first cache for all rows. A narrow panel has more rows in its tile.
template <typename M, int Step, int N = Tile<M>::vectors, typename Between = const Nothing>
inline void multiply_panel(ptrdiff_t rows, ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b,
                           ptrdiff_t b_row, typename M::Vec::Real* c, ptrdiff_t c_row, bool accumulate,
                           Between& between = Nothing()) {
  if constexpr (M::contiguous_rows) {
    static_assert(N == Tile<M>::vectors && Step == 1, "tiles are whole, and their rows contiguous");
    M::multiply_panel(rows, units, a, b, b_row, c, c_row, accumulate);
  } else {
    constexpr int R = Tile<M>::rows * Tile<M>::vectors / N;
    constexpr ptrdiff_t chain = Tile<M>::chain;
    ptrdiff_t first = 0;
    do {  // once for no units, too: that writes zeros
      const ptrdiff_t count = first + chain < units ? chain : units - first;
      multiply_rows<M, R, N, Step>(rows, count, a + first * N * M::Vec::lanes, b + first * Step, b_row, c, c_row,
                                   accumulate || first > 0, between);
      first += chain;
    } while (first < units);
  }
}

// The same where only the first `lanes` of the panel exist in c.
template <typename M, int Step>
inline void multiply_panel_edge(ptrdiff_t rows, ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b,
                                ptrdiff_t b_row, typename M::Vec::Real* c, ptrdiff_t c_row, bool accumulate,
                                ptrdiff_t lanes) {
  using Real = typename M::Vec::Real;
  constexpr int L = Tile<M>::lanes, R = Tile<M>::rows;
  Real whole[R * L];
  for (ptrdiff_t first = 0; first < rows; first += R) {
    ptrdiff_t count = rows - first < R ? rows - first : R;
    for (ptrdiff_t r = 0; r < count; ++r)
      for (ptrdiff_t l = 0; l < L; ++l)
        whole[r * L + l] = accumulate && l < lanes ? c[(first + r) * c_row + l] : Real(0);
    multiply_panel<M, Step>(count, units, a, b + first * b_row, b_row, whole, L, true);
    for (ptrdiff_t r = 0; r < count; ++r)
      for (ptrdiff_t l = 0; l < lanes; ++l) c[(first + r) * c_row + l] = whole[r * L + l];
  }
}

}  // namespace FASTRL_ISA
