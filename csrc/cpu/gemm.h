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
constexpr ptrdiff_t place(ptrdiff_t u) { return u / M::group * M::group * M::pieces + u % M::group; }
template <typename M>
constexpr ptrdiff_t stored(ptrdiff_t units) { return (units + M::group - 1) / M::group * M::group * M::pieces; }

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
  struct Bits { __m512i x; };
  static Bits load(const Unit* a) { return {_mm512_loadu_si512(a)}; }
  static Bits spread(const Unit* b) { return {_mm512_set1_epi32(int(*b))}; }
  static Float multiply_add(Bits a, Bits b, Float acc) {
    return {_mm512_dpbf16_ps(acc.x, (__m512bh)a.x, (__m512bh)b.x)};
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
  static constexpr int rows = V::registers >= 32 ? 6 : V::registers >= 16 ? 5 : 4;
  static constexpr int lanes = vectors * V::lanes;
  static constexpr int chain = 10 * rows;  // units of one partial sum
  static constexpr ptrdiff_t block = 20 * rows;    // rows of b (vocabulary entries) that stay in the second cache
  static constexpr ptrdiff_t segment = 4 * block;  // what a thread takes at once
};

// One partial sum, of at most a chain of units, by R rows and the lanes of a panel.
template <typename M, int R>
inline void multiply_tile(ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b, ptrdiff_t b_row,
                          ptrdiff_t b_unit, typename M::Vec::Real* c, ptrdiff_t c_row, bool accumulate) {
  using V = typename M::Vec;
  constexpr int N = Tile<M>::vectors;
  V acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = V::set(0);
  for (ptrdiff_t k = 0; k < units; ++k) {
    decltype(M::load(a)) lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = M::load(a + n * V::lanes);
    for (int r = 0; r < R; ++r) {
      auto unit = M::spread(b + r * b_row);
      for (int n = 0; n < N; ++n) acc[r][n] = M::multiply_add(lanes[n], unit, acc[r][n]);
    }
    a += Tile<M>::lanes;
    b += b_unit;
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      typename V::Real* to = c + r * c_row + n * V::lanes;
      (accumulate ? V::load(to) + acc[r][n] : acc[r][n]).store(to);
    }
}

// All `rows` of one panel of `Tile::lanes` lanes and `units` stored units; c has room for all lanes. A chain of units at
// a time: its part of the panel stays in the first cache for all rows.
template <typename M>
inline void multiply_panel(ptrdiff_t rows, ptrdiff_t units, const typename M::Unit* a, const typename M::Unit* b,
                           ptrdiff_t b_row, ptrdiff_t b_unit, typename M::Vec::Real* c, ptrdiff_t c_row,
                           bool accumulate) {
  if constexpr (M::contiguous_rows) {
    M::multiply_panel(rows, units, a, b, b_row, c, c_row, accumulate);
  } else {
    constexpr int R = Tile<M>::rows;
    constexpr ptrdiff_t chain = Tile<M>::chain;
    ptrdiff_t first = 0;
    do {  // once for no units, too: that writes zeros
      const ptrdiff_t count = first + chain < units ? chain : units - first;
      const typename M::Unit *a_part = a + first * Tile<M>::lanes, *b_part = b + first * b_unit;
      const bool add = accumulate || first > 0;
      ptrdiff_t r = 0;
      for (; r + R <= rows; r += R)
        multiply_tile<M, R>(count, a_part, b_part + r * b_row, b_row, b_unit, c + r * c_row, c_row, add);
      for (; r < rows; ++r)
        multiply_tile<M, 1>(count, a_part, b_part + r * b_row, b_row, b_unit, c + r * c_row, c_row, add);
      first += chain;
    } while (first < units);
  }
}

// The same where only the first `lanes` of the panel exist in c.
template <typename M>
inline void multiply_panel_edge(ptrdiff_t rows, ptrdiff_t units, const typename M::Unit* a,
                                const typename M::Unit* b, ptrdiff_t b_row, ptrdiff_t b_unit,
                                typename M::Vec::Real* c, ptrdiff_t c_row, bool accumulate, ptrdiff_t lanes) {
  using Real = typename M::Vec::Real;
  constexpr int L = Tile<M>::lanes, R = Tile<M>::rows;
  Real whole[R * L];
  for (ptrdiff_t first = 0; first < rows; first += R) {
    ptrdiff_t count = rows - first < R ? rows - first : R;
    for (ptrdiff_t r = 0; r < count; ++r)
      for (ptrdiff_t l = 0; l < L; ++l) whole[r * L + l] = accumulate && l < lanes ? c[(first + r) * c_row + l] : Real(0);
    multiply_panel<M>(count, units, a, b + first * b_row, b_row, b_unit, whole, L, true);
    for (ptrdiff_t r = 0; r < count; ++r)
      for (ptrdiff_t l = 0; l < lanes; ++l) c[(first + r) * c_row + l] = whole[r * L + l];
  }
}

}  // namespace FASTRL_ISA
