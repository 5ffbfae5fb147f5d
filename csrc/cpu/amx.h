// The matmul kernels on AMX: tiles of 16 rows of 64 bytes, and one instruction that multiplies two of bfloat16.
//
// 16 units by 16 lanes of a panel of `a`, packed as for every instruction set, are what TDPBF16PS wants of its second
// factor, and 16 rows of `b` by 16 units what it wants of its first.
//
//   Tiled             bfloat16. Rows and units that fill no whole tile are not padded: the tiles are configured smaller
//                     for them, so nothing beyond the operands is ever read, and a head's weights are read in place.
//   SplitTiled<n>     float32, each value the sum of n bfloat16. All operands are packed, so all tiles are whole.
//
// With FASTRL_EMULATE_TILES the instructions are plain C++ that aborts where the processor would raise a fault, so that
// everything but the instructions themselves can be proven on a machine without them.
#pragma once

#include <stdlib.h>

#include "buffer.h"
#include "gemm.h"

#if defined(__AMX_BF16__) || defined(FASTRL_EMULATE_TILES)
#define FASTRL_TILES

namespace FASTRL_ISA {

// What LDTILECFG reads.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "the layout is the processor's");

#if defined(FASTRL_EMULATE_TILES)

struct EmulatedTiles {
  TileShapes shapes;
  uint32_t units[8][16][16];
};
static thread_local EmulatedTiles tiles;

inline void fault_unless(bool valid) {
  if (!valid) abort();
}
inline float flush(float v) {  // subnormal numbers count as 0
  return (float_to_bits(v) & 0x7f800000) ? v : bits_to_float(float_to_bits(v) & 0x80000000);
}
inline float half_of(uint32_t unit, int i) { return flush(bits_to_float(i ? unit & 0xffff0000 : unit << 16)); }

inline void tile_configure(const TileShapes* shapes) {
  fault_unless(shapes->palette == 1 && shapes->start_row == 0);
  for (uint8_t byte : shapes->reserved) fault_unless(byte == 0);
  for (int t = 0; t < 16; ++t) {
    const int rows = shapes->rows[t], bytes = shapes->row_bytes[t];
    fault_unless(rows <= (t < 8 ? 16 : 0) && bytes <= (t < 8 ? 64 : 0) && (rows == 0) == (bytes == 0));
  }
  memset(&tiles, 0, sizeof tiles);
  tiles.shapes = *shapes;
}
inline void tile_release() { memset(&tiles, 0, sizeof tiles); }
template <int T>
inline void tile_zero() {
  fault_unless(tiles.shapes.palette == 1 && tiles.shapes.rows[T]);
  memset(tiles.units[T], 0, sizeof tiles.units[T]);
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t row_bytes) {
  tile_zero<T>();
  for (int r = 0; r < tiles.shapes.rows[T]; ++r)
    memcpy(tiles.units[T][r], static_cast<const char*>(from) + r * row_bytes, tiles.shapes.row_bytes[T]);
}
template <int T>
inline void tile_store(void* to, ptrdiff_t row_bytes) {
  fault_unless(tiles.shapes.palette == 1 && tiles.shapes.rows[T]);
  for (int r = 0; r < tiles.shapes.rows[T]; ++r)
    memcpy(static_cast<char*>(to) + r * row_bytes, tiles.units[T][r], tiles.shapes.row_bytes[T]);
}
// C += A B: the sums of the even and of the odd products are taken apart, added, and their sum added to C.
template <int C, int A, int B>
inline void tile_dot() {
  static_assert(C != A && C != B && A != B, "the processor wants three tiles");
  const TileShapes& s = tiles.shapes;
  fault_unless(s.palette == 1 && s.rows[C] && s.rows[C] == s.rows[A] && s.row_bytes[C] == s.row_bytes[B]);
  fault_unless(s.row_bytes[A] % 4 == 0 && s.row_bytes[B] % 4 == 0 && s.row_bytes[A] / 4 == s.rows[B]);
  for (int r = 0; r < s.rows[C]; ++r) {
    float sums[2][16] = {};
    for (int k = 0; k < s.rows[B]; ++k)
      for (int i = 0; i < 2; ++i) {
        const float a = half_of(tiles.units[A][r][k], i);
        for (int l = 0; l < 16; ++l)
          sums[i][l] = flush(__builtin_fmaf(a, half_of(tiles.units[B][k][l], i), sums[i][l]));
      }
    for (int l = 0; l < s.row_bytes[C] / 4; ++l) {
      const float sum = flush(sums[0][l] + sums[1][l]);
      tiles.units[C][r][l] = float_to_bits(flush(flush(bits_to_float(tiles.units[C][r][l])) + sum));
    }
  }
}

#else

// Not the intrinsics of the compiler: they want literal tile numbers, and those of gcc 12 do not say that they read
// memory, so a store to what they load may be moved behind them.
inline void tile_configure(const TileShapes* shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, ptrdiff_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}
// C += A B.
template <int C, int A, int B>
inline void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

constexpr int tile_rows = 16, tile_units = 16;  // of a whole tile

// Tiles 0 to 3: two by two of c. 4 and 5: rows of b. 6 and 7: lanes of a.
inline void configure_tiles(ptrdiff_t upper_rows, ptrdiff_t lower_rows, ptrdiff_t units) {
  TileShapes shapes = {};
  shapes.palette = 1;
  auto shape = [&](int tile, ptrdiff_t rows, ptrdiff_t row_units) {
    shapes.rows[tile] = uint8_t(rows);
    shapes.row_bytes[tile] = uint16_t(row_units * 4);
  };
  for (int l = 0; l < 2; ++l) {
    shape(l, upper_rows, tile_units);
    shape(2 + l, lower_rows, tile_units);
    shape(6 + l, units, tile_units);
  }
  shape(4, upper_rows, units);
  shape(5, lower_rows, units);
  tile_configure(&shapes);
}

// Two bfloat16 per unit as in Paired, multiplied a tile at a time. A row of b must be contiguous: b_unit is 1.
// A tile of 16 units is one partial sum of c[r, l]; within it the order is the processor's.
struct Tiled : Paired {
  static constexpr bool contiguous_rows = true;
  // Whole tiles, while a thread is in a parallel region; multiply_panel needs it and leaves it as it was.
  struct Region {
    Region() { configure_tiles(tile_rows, tile_rows, tile_units); }
    ~Region() { tile_release(); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
  };

  static void multiply_panel(ptrdiff_t rows, ptrdiff_t units, const uint32_t* a, const uint32_t* b, ptrdiff_t b_row,
                             float* c, ptrdiff_t c_row, bool accumulate);

  // to[lane, unit] = from[unit, lane] for one vector of lanes; writes up to the next multiple of 16 units.
  static void transpose(ptrdiff_t units, const uint32_t* from, ptrdiff_t from_row, uint32_t* to, ptrdiff_t to_row) {
    for (ptrdiff_t u = 0; u < units; u += 16) {
      Float x[16];
      for (int i = 0; i < 16; ++i) x[i] = Float::load(reinterpret_cast<const float*>(from + (u + i) * from_row));
      Float::transpose(x);
      for (int i = 0; i < 16; ++i) x[i].store(reinterpret_cast<float*>(to + i * to_row + u));
    }
  }
};

// TDPBF16PS makes 512 multiplications a cycle, while a cache shared by all cores hands each some 4 to 8 bytes: a
// bfloat16 of the tokens must serve 256 entries, whose weights fill half of 2 MB at a width of 2048, with room for a
// panel of 64 tokens (256 KB) and its logits (64 KB). A segment stays near Paired's 480 entries, because segments of
// four blocks would leave some of 50 threads without work in a vocabulary of 50 thousand.
template <>
struct Tile<Tiled> {
  static constexpr int rows = 2 * tile_rows;
  static constexpr int vectors = Tile<Paired>::vectors, lanes = Tile<Paired>::lanes;
  static constexpr int chain = tile_units;
  static constexpr ptrdiff_t block = 256, segment = 2 * block;
};

// R by two tiles of c.
template <int R>
inline void multiply_tiles(ptrdiff_t units, ptrdiff_t step, const uint32_t* a, const uint32_t* b, ptrdiff_t b_row,
                           float* c, ptrdiff_t c_row, bool accumulate) {
  constexpr ptrdiff_t a_row_bytes = Tile<Tiled>::lanes * 4;
  const ptrdiff_t b_row_bytes = b_row * 4, c_row_bytes = c_row * 4;
  float* lower = c + tile_rows * c_row;
  if (accumulate) {
    tile_load<0>(c, c_row_bytes);
    tile_load<1>(c + tile_units, c_row_bytes);
    if (R == 2) tile_load<2>(lower, c_row_bytes);
    if (R == 2) tile_load<3>(lower + tile_units, c_row_bytes);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (ptrdiff_t k = 0; k < units; k += step) {
    tile_load<6>(a, a_row_bytes);
    tile_load<7>(a + tile_units, a_row_bytes);
    tile_load<4>(b, b_row_bytes);
    tile_dot<0, 4, 6>();
    tile_dot<1, 4, 7>();
    if (R == 2) {
      tile_load<5>(b + tile_rows * b_row, b_row_bytes);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    a += step * Tile<Tiled>::lanes;
    b += step;
  }
  tile_store<0>(c, c_row_bytes);
  tile_store<1>(c + tile_units, c_row_bytes);
  if (R == 2) tile_store<2>(lower, c_row_bytes);
  if (R == 2) tile_store<3>(lower + tile_units, c_row_bytes);
}

inline void Tiled::multiply_panel(ptrdiff_t rows, ptrdiff_t units, const uint32_t* a, const uint32_t* b,
                                  ptrdiff_t b_row, float* c, ptrdiff_t c_row, bool accumulate) {
  constexpr int R = Tile<Tiled>::rows, L = Tile<Tiled>::lanes;
  const ptrdiff_t whole_rows = rows / R * R, left = rows - whole_rows;
  // `count` units in steps of `step`, by all rows and lanes.
  auto multiply = [&](ptrdiff_t first, ptrdiff_t count, ptrdiff_t step, bool add) {
    const uint32_t *a_first = a + first * L, *b_first = b + first, *b_left = b_first + whole_rows * b_row;
    if (step < tile_units) configure_tiles(tile_rows, tile_rows, step);
    for (ptrdiff_t l = 0; l < L; l += 2 * tile_units)  // half a panel of a is read again for each pair of tiles of rows
      for (ptrdiff_t r = 0; r < whole_rows; r += R)
        multiply_tiles<2>(count, step, a_first + l, b_first + r * b_row, b_row, c + r * c_row + l, c_row, add);
    if (left > 0)
      configure_tiles(left < tile_rows ? left : tile_rows, left > tile_rows ? left - tile_rows : tile_rows, step);
    for (ptrdiff_t l = 0; left > 0 && l < L; l += 2 * tile_units) {
      float* c_left = c + whole_rows * c_row + l;
      if (left > tile_rows)
        multiply_tiles<2>(count, step, a_first + l, b_left, b_row, c_left, c_row, add);
      else
        multiply_tiles<1>(count, step, a_first + l, b_left, b_row, c_left, c_row, add);
    }
    if (step < tile_units || left > 0) configure_tiles(tile_rows, tile_rows, tile_units);
  };
  const ptrdiff_t rest = units % tile_units;
  if (units > rest) multiply(0, units - rest, tile_units, accumulate);
  if (rest > 0) multiply(units - rest, rest, rest, accumulate || units > rest);
}

// float32 on tiles of bfloat16: x = x1 + x2 + x3, each the bfloat16 nearest to what those before it leave of x. That is
// all of its 24 bits, and the products left out of a b are below 2^-23 of it (2^-20 from 2^110 on).
//
//   three pieces   a b = a1 b1 + a1 b2 + a2 b1 + a2 b2 + a1 b3 + a3 b1   no less exact than float32 multiply-adds
//   two pieces     a b = a1 b1 + a1 b2 + a2 b1                           to about 2^-16 of |a b|
//
// Two things differ from float32. Tiles take numbers below 2^-126 for 0, so of a value below 2^-102 bits are lost. And
// a product with an infinity may be NaN, since a piece of the other factor may be 0 or have the other sign.
template <int Pieces>
struct SplitTiled : Tiled {
  static_assert(Pieces == 2 || Pieces == 3);
  static constexpr int pieces = Pieces, group = tile_units;
  static constexpr int L = Tile<Paired>::lanes;  // of a panel

  // Takes the next piece off each lane of `rest`: a float whose lower half is 0. Infinities and NaN leave no rest.
  // From 2^110 on toward zero: rounded up, a piece or a sum of pieces could be infinite where the values' is not.
  static __m512i take_piece(__m512* rest) {
    const __m512i bits = _mm512_castps_si512(*rest);
    const __m512i nearest = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(*rest)), 16);
    const __mmask16 huge = _mm512_cmp_ps_mask(_mm512_abs_ps(*rest), _mm512_set1_ps(0x1p110f), _CMP_GE_OQ);
    const __m512i piece = _mm512_mask_and_epi32(nearest, huge, bits, _mm512_set1_epi32(int(0xffff0000)));
    constexpr int nan_or_infinity = 0x99;
    const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(*rest, nan_or_infinity));
    *rest = _mm512_maskz_sub_ps(finite, *rest, _mm512_castsi512_ps(piece));
    return piece;
  }
  // One piece of two values per lane, as a unit each.
  static void store_pairs(uint32_t* to, __m512i low, __m512i high) {
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
  }
  // One piece of 16 neighbouring values, as 8 units.
  static void store_neighbours(uint32_t* to, __m512i piece) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(piece, 16)));
  }

  static void put_lanes(uint32_t* to, const float* a, const float* b) {
    for (int l = 0; l < L; l += 16) {
      __m512 x = _mm512_loadu_ps(a + l), y = _mm512_loadu_ps(b + l);
      for (int j = 0; j < pieces; ++j) store_pairs(to + j * group * L + l, take_piece(&x), take_piece(&y));
    }
  }
  static void put_row(uint32_t* to, const float* from, ptrdiff_t width) {
    for (ptrdiff_t k = 0; k < round_up(width, pair * group); k += 16) {
      const ptrdiff_t left = width - k;
      const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
      __m512 x = _mm512_maskz_loadu_ps(some, from + k);
      for (int j = 0; j < pieces; ++j) store_neighbours(to + place<SplitTiled>(k / pair) + j * group, take_piece(&x));
    }
  }
  static void put_dz(uint32_t* by_entry, ptrdiff_t, uint32_t* even, uint32_t* odd, Float a, Float b) {
    for (int j = 0; j < pieces; ++j) {
      const __m512i low = take_piece(&a.x), high = take_piece(&b.x);
      store_pairs(by_entry + j * group * L, low, high);
      store_neighbours(even + j * group, low);
      store_neighbours(odd + j * group, high);
    }
  }

  // sum = a b over one chain of units, for 2 by 2 tiles. From one product of pieces to the next, one pair of tiles is
  // loaded anew.
  static void multiply_chain(ptrdiff_t units, const uint32_t* a, const uint32_t* b, ptrdiff_t b_row, float* sum) {
    constexpr ptrdiff_t second = group, third = 2 * group, all = pieces * group;
    auto lanes = [&](ptrdiff_t u) {
      tile_load<6>(a + u * L, L * 4);
      tile_load<7>(a + u * L + tile_units, L * 4);
    };
    auto rows = [&](ptrdiff_t u) {
      tile_load<4>(b + u, b_row * 4);
      tile_load<5>(b + tile_rows * b_row + u, b_row * 4);
    };
    auto dot = [] {
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    };
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (ptrdiff_t u = 0; u < units; u += all) {
      if (pieces == 3) {
        lanes(u), rows(u + third), dot();
        rows(u + second), dot();
        lanes(u + second), dot();
        rows(u), dot();
        lanes(u + third), dot();
      } else {
        lanes(u + second), rows(u), dot();
        lanes(u), dot();
        rows(u + second), dot();
      }
    }
    if (pieces == 3)  // apart from the five small products, so that those round nothing off the large sum
      for (ptrdiff_t u = 0; u < units; u += all) lanes(u), rows(u), dot();
    constexpr ptrdiff_t row = 2 * tile_units;
    tile_store<0>(sum, row * 4);
    tile_store<1>(sum + tile_units, row * 4);
    tile_store<2>(sum + tile_rows * row, row * 4);
    tile_store<3>(sum + tile_rows * row + tile_units, row * 4);
  }

  // Rows of b are read up to a multiple of 32: every operand is a buffer that has them. What they give is not stored.
  static void multiply_panel(ptrdiff_t rows, ptrdiff_t units, const uint32_t* a, const uint32_t* b, ptrdiff_t b_row,
                             float* c, ptrdiff_t c_row, bool accumulate) {
    constexpr ptrdiff_t chain = stored<SplitTiled>(Tile<SplitTiled>::chain);
    constexpr ptrdiff_t R = Tile<SplitTiled>::rows, row = 2 * tile_units;
    alignas(64) float sum[R * row];
    for (ptrdiff_t l = 0; l < L; l += row)
      for (ptrdiff_t r = 0; r < rows; r += R)
        for (ptrdiff_t first = 0; first == 0 || first < units; first += chain) {  // no units: a sum of 0
          multiply_chain(least(chain, units - first), a + first * L + l, b + r * b_row + first, b_row, sum);
          for (ptrdiff_t i = 0; i < least(R, rows - r); ++i)
            for (ptrdiff_t k = 0; k < row; k += Float::lanes) {
              float* to = c + (r + i) * c_row + l + k;
              const Float part = Float::load(sum + i * row + k);
              (accumulate || first > 0 ? Float::load(to) + part : part).store(to);
            }
        }
  }
};

// At a width of 2048 the weights of a block fill half of 2 MB, and half a panel of tokens a fifth. Tokens are read again
// for each block, at 5 bytes a cycle. A partial sum is as long as segments allow: each is folded into c by vectors.
template <int Pieces>
struct Tile<SplitTiled<Pieces>> {
  static constexpr int rows = 2 * tile_rows;
  static constexpr int vectors = Tile<Paired>::vectors, lanes = Tile<Paired>::lanes;
  static constexpr ptrdiff_t block = Pieces == 2 ? 128 : 96, segment = Pieces == 2 ? 4 * block : 5 * block;
  static constexpr int chain = segment / Paired::pair;
};

}  // namespace FASTRL_ISA

#endif
