// Values as units, and matrices of them laid out as gemm.h reads them: rows of units, and panels with one lane per row
// or per column.
#pragma once

#include "amx.h"
#include "buffer.h"
#include "gemm.h"

namespace FASTRL_ISA {

// Writes `pair` neighbouring values of a row as one unit.
inline void put(float* unit, float a, float) { *unit = a; }
inline void put(double* unit, double a, double) { *unit = a; }
inline void put(uint32_t* unit, Bf16 a, Bf16 b) { *unit = uint32_t(a.bits) | uint32_t(b.bits) << 16; }
inline void put(float* unit, Bf16 a, Bf16) { *unit = widen(a); }
inline void put(float* unit, Fp16 a, Fp16) { *unit = widen(a); }

// A row of values as units, one after the other; zeros fill up the last, and the last group.
template <typename M, typename In>
inline void put_row(typename M::Unit* to, const In* from, ptrdiff_t width) {
  constexpr ptrdiff_t pair = M::pair;
  if constexpr (M::pieces > 1)
    M::put_row(to, from, width);
  else
    for (ptrdiff_t u = 0; u < (width + pair - 1) / pair; ++u)
      put(to + u, from[u * pair], u * pair + 1 < width ? from[u * pair + 1] : In{});
}

// One unit for each lane of a panel: of the values a, or where a unit is a pair, of a and b.
template <typename M, typename In>
inline void put_lanes(typename M::Unit* to, const In* a, const In* b, ptrdiff_t lanes = Tile<M>::lanes) {
  if constexpr (M::pieces > 1)
    M::put_lanes(to, a, b);
  else
    for (ptrdiff_t l = 0; l < lanes; ++l) put(to + l, a[l], b[l]);
}

// Columns [first, first + count) of a row: where they are if all exist, else in `room`, with zeros for those that do
// not and for a row that is null.
template <typename In>
inline const In* columns_of(const In* row, ptrdiff_t first, ptrdiff_t count, ptrdiff_t width, In* room) {
  const ptrdiff_t left = row ? least(width - first, count) : 0;
  if (left == count) return row + first;
  for (ptrdiff_t l = 0; l < count; ++l) room[l] = l < left ? row[first + l] : In{};
  return room;
}

// Stores vectors of units, turned: to[i * stride + k] is lane i of vector k, for i below `lanes`.
template <typename M>
inline void store_turned(typename M::Vec* x, typename M::Unit* to, ptrdiff_t stride, ptrdiff_t lanes) {
  M::Vec::transpose(x);
  for (ptrdiff_t i = 0; i < lanes; ++i) x[i].store(reinterpret_cast<typename M::Vec::Real*>(to + i * stride));
}

// V::lanes rows of `width` values, a lane each: to[u * stride + lane] for each of their units. A row may be null: zeros.
template <typename M, typename In>
inline void turn_rows(const In* const* rows, ptrdiff_t width, typename M::Unit* to, ptrdiff_t stride) {
  using V = typename M::Vec;
  constexpr ptrdiff_t values = V::lanes * M::pair;
  for (ptrdiff_t k = 0; k < width; k += values) {
    V x[V::lanes];
    for (int i = 0; i < V::lanes; ++i) {
      In room[values];
      x[i] = M::load_row(columns_of(rows[i], k, values, width, room));
    }
    const ptrdiff_t left = (least(values, width - k) + M::pair - 1) / M::pair;
    store_turned<M>(x, to + k / M::pair * stride, stride, left);
  }
}

// A unit for each lane of a panel, of columns [first, first + lanes) of a row and, in pairs, of the next one.
template <typename M, typename In>
inline void take_columns(const In* row, const In* next, ptrdiff_t first, ptrdiff_t lanes, ptrdiff_t width,
                         typename M::Unit* to) {
  using V = typename M::Vec;
  for (ptrdiff_t l = 0; l < lanes; l += V::lanes) {
    In room[2][V::lanes];
    const In* a = columns_of(row, first + l, V::lanes, width, room[0]);
    const In* b = M::pair > 1 ? columns_of(next, first + l, V::lanes, width, room[1]) : a;
    M::load_pair(a, b).store(reinterpret_cast<typename V::Real*>(to + l));
  }
}

// Columns [first, first + columns) of `count` rows, `pair` of those in a unit, as rows: to[column * stride + u], with
// room for a multiple of V::lanes units and columns.
template <typename M, typename In, typename Row>
inline void turn_columns(Row row, ptrdiff_t count, ptrdiff_t first, ptrdiff_t columns, ptrdiff_t width,
                         typename M::Unit* to, ptrdiff_t stride) {
  using V = typename M::Vec;
  for (ptrdiff_t u = 0; u * M::pair < count; u += V::lanes)
    for (ptrdiff_t c = 0; c < columns; c += V::lanes) {
      V x[V::lanes];
      for (int i = 0; i < V::lanes; ++i) {
        const ptrdiff_t k = (u + i) * M::pair;
        In room[2][V::lanes];
        const In *even = k < count ? row(k) : nullptr, *odd = M::pair > 1 && k + 1 < count ? row(k + 1) : nullptr;
        const In* a = columns_of(even, first + c, V::lanes, width, room[0]);
        const In* b = M::pair > 1 ? columns_of(odd, first + c, V::lanes, width, room[1]) : a;
        x[i] = M::load_pair(a, b);
      }
      store_turned<M>(x, to + c * stride + u, stride, V::lanes);
    }
}

}  // namespace FASTRL_ISA
