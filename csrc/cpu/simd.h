// One vector of floating-point lanes per instruction set, and the few operations that the kernels need.
//
// Included by isa.cpp only, once per instruction set, with FASTRL_ISA naming it. Every type lives in a namespace of that
// name, and nothing here calls an inline function of the standard library: the linker keeps one copy of each of those,
// and it might be the copy compiled for the wider instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace FASTRL_ISA {

// Lanes as an array: the compiler makes of it what the target has. Also the float64 of every instruction set, which
// exists to check the others, not to be fast.
template <typename T>
struct Array {
  using Real = T;
  static constexpr int lanes = 8, registers = 8;
  struct Mask {
    bool m[lanes];
  };
  struct Int {
    int32_t i[lanes];
  };
  T x[lanes];

  static Array load(const T* p) {
    Array r;
    for (int i = 0; i < lanes; ++i) r.x[i] = p[i];
    return r;
  }
  void store(T* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = x[i];
  }
  static Array set(T v) {
    Array r;
    for (int i = 0; i < lanes; ++i) r.x[i] = v;
    return r;
  }
  static Int load_int(const int32_t* p) {
    Int r;
    for (int i = 0; i < lanes; ++i) r.i[i] = p[i];
    return r;
  }
  static Mask equal(Int a, int32_t b) {
    Mask r;
    for (int i = 0; i < lanes; ++i) r.m[i] = a.i[i] == b;
    return r;
  }
  static Mask is_zero(Array a) {
    Mask r;
    for (int i = 0; i < lanes; ++i) r.m[i] = a.x[i] == 0;
    return r;
  }
  static Mask below(Array a, Array b) {
    Mask r;
    for (int i = 0; i < lanes; ++i) r.m[i] = a.x[i] < b.x[i];
    return r;
  }
  static Array select(Mask m, Array a, Array b) {
    Array r;
    for (int i = 0; i < lanes; ++i) r.x[i] = m.m[i] ? a.x[i] : b.x[i];
    return r;
  }
  friend Array operator+(Array a, Array b) {
    for (int i = 0; i < lanes; ++i) a.x[i] += b.x[i];
    return a;
  }
  friend Array operator-(Array a, Array b) {
    for (int i = 0; i < lanes; ++i) a.x[i] -= b.x[i];
    return a;
  }
  friend Array operator*(Array a, Array b) {
    for (int i = 0; i < lanes; ++i) a.x[i] *= b.x[i];
    return a;
  }
  friend Array operator/(Array a, Array b) {
    for (int i = 0; i < lanes; ++i) a.x[i] /= b.x[i];
    return a;
  }
  static Array fma(Array a, Array b, Array c) {
    for (int i = 0; i < lanes; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  // The larger; b where a is not a number.
  static Array max(Array a, Array b) {
    for (int i = 0; i < lanes; ++i) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
  }
  static Array exp(Array a) {
    for (int i = 0; i < lanes; ++i) a.x[i] = real_exp(a.x[i]);
    return a;
  }
  T total() const {
    T sum = 0;
    for (int i = 0; i < lanes; ++i) sum += x[i];
    return sum;
  }
  static Array tanh(Array a) {
    for (int i = 0; i < lanes; ++i) a.x[i] = real_tanh(a.x[i]);
    return a;
  }
  // Lane i of vector k and lane k of vector i change places, in every vector type as bits: no lane is looked at.
  static void transpose(Array* v) {
    for (int i = 0; i < lanes; ++i)
      for (int k = 0; k < i; ++k) {
        T other = v[i].x[k];
        v[i].x[k] = v[k].x[i];
        v[k].x[i] = other;
      }
  }

 private:
  static float real_exp(float v) { return __builtin_expf(v); }
  static double real_exp(double v) { return __builtin_exp(v); }
  static float real_tanh(float v) { return __builtin_tanhf(v); }
  static double real_tanh(double v) { return __builtin_tanh(v); }
};

// exp and tanh on float lanes, from the operations of V alone; V adds `round`, `scale_by_power` and `abs`.
//
// exp: x = n log 2 + r with |r| <= log(2)/2, e^r by its series to degree 7, whose remainder there is below 2^-27.
template <typename V>
inline V exp_lanes(V x) {
  x = V::max(V::set(-110.0f), x);  // keeps -inf out of the subtraction below; a NaN in the second operand passes
  x = V::min(V::set(110.0f), x);
  V n = V::round(x * V::set(1.44269504088896341f));
  V r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(1.0f / 5040);
  p = V::fma(p, r, V::set(1.0f / 720));
  p = V::fma(p, r, V::set(1.0f / 120));
  p = V::fma(p, r, V::set(1.0f / 24));
  p = V::fma(p, r, V::set(1.0f / 6));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::scale_by_power(p, n);
}

// tanh: an odd minimax polynomial near 0 (Cephes, Moshier 1989), 1 - 2 / (e^2|x| + 1) elsewhere.
template <typename V>
inline V tanh_lanes(V x) {
  V a = V::abs(x), s = x * x;
  V p = V::set(-5.70498872745e-3f);
  p = V::fma(p, s, V::set(2.06390887954e-2f));
  p = V::fma(p, s, V::set(-5.37397155531e-2f));
  p = V::fma(p, s, V::set(1.33314422036e-1f));
  p = V::fma(p, s, V::set(-3.33332819422e-1f));
  V near = V::fma(p * s, x, x);
  V far = V::set(1.0f) - V::set(2.0f) / (V::exp(a + a) + V::set(1.0f));
  return V::select(V::below(a, V::set(0.625f)), near, V::copy_sign(far, x));
}

#if defined(__AVX512F__)

struct Float {
  using Real = float;
  using Mask = __mmask16;
  using Int = __m512i;
  static constexpr int lanes = 16, registers = 32;
  __m512 x;

  static Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, x); }
  static Float set(float v) { return {_mm512_set1_ps(v)}; }
  static Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Mask equal(Int a, int32_t b) { return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(b)); }
  static Mask is_zero(Float a) { return _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_EQ_OQ); }
  static Mask below(Float a, Float b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }
  static Float select(Mask m, Float a, Float b) { return {_mm512_mask_blend_ps(m, b.x, a.x)}; }
  friend Float operator+(Float a, Float b) { return {_mm512_add_ps(a.x, b.x)}; }
  friend Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.x, b.x)}; }
  friend Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.x, b.x)}; }
  friend Float operator/(Float a, Float b) { return {_mm512_div_ps(a.x, b.x)}; }
  static Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  static Float max(Float a, Float b) { return {_mm512_max_ps(a.x, b.x)}; }
  static Float min(Float a, Float b) { return {_mm512_min_ps(a.x, b.x)}; }
  static Float round(Float a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Float scale_by_power(Float a, Float n) { return {_mm512_scalef_ps(a.x, n.x)}; }
  static Float abs(Float a) { return {_mm512_abs_ps(a.x)}; }
  static Float copy_sign(Float a, Float sign) {
    __m512i high = _mm512_set1_epi32(INT32_MIN);
    return {_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(high, _mm512_castps_si512(sign.x), _mm512_castps_si512(a.x), 0xCA))};
  }
  float total() const { return _mm512_reduce_add_ps(x); }
  static void transpose(Float* v) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_castps_si512(v[i].x);
    for (int i = 0; i < 16; i += 2) {  // 2 by 2 lanes within each quarter
      y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // 4 by 4: x[i + j] has lane j of each quarter, of vectors i to i + 3
      for (int j = 0; j < 2; ++j) {
        x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
        x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
      }
    for (int j = 0; j < 4; ++j) {  // the quarters themselves
      __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
      __m512i c = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd), d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
      v[j].x = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a, b, 0x88));
      v[4 + j].x = _mm512_castsi512_ps(_mm512_shuffle_i32x4(c, d, 0x88));
      v[8 + j].x = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a, b, 0xdd));
      v[12 + j].x = _mm512_castsi512_ps(_mm512_shuffle_i32x4(c, d, 0xdd));
    }
  }
  static Float exp(Float a) { return exp_lanes(a); }
  static Float tanh(Float a) { return tanh_lanes(a); }
};

#elif defined(__AVX2__)

struct Float {
  using Real = float;
  using Mask = __m256;
  using Int = __m256i;
  static constexpr int lanes = 8, registers = 16;
  __m256 x;

  static Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, x); }
  static Float set(float v) { return {_mm256_set1_ps(v)}; }
  static Int load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Mask equal(Int a, int32_t b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, _mm256_set1_epi32(b))); }
  static Mask is_zero(Float a) { return _mm256_cmp_ps(a.x, _mm256_setzero_ps(), _CMP_EQ_OQ); }
  static Mask below(Float a, Float b) { return _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ); }
  static Float select(Mask m, Float a, Float b) { return {_mm256_blendv_ps(b.x, a.x, m)}; }
  friend Float operator+(Float a, Float b) { return {_mm256_add_ps(a.x, b.x)}; }
  friend Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.x, b.x)}; }
  friend Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.x, b.x)}; }
  friend Float operator/(Float a, Float b) { return {_mm256_div_ps(a.x, b.x)}; }
  static Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static Float max(Float a, Float b) { return {_mm256_max_ps(a.x, b.x)}; }
  static Float min(Float a, Float b) { return {_mm256_min_ps(a.x, b.x)}; }
  static Float round(Float a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Float scale_by_power(Float a, Float n) {  // in two steps, so that neither power leaves the exponent's range
    __m256i k = _mm256_cvtps_epi32(n.x), half = _mm256_srai_epi32(k, 1), rest = _mm256_sub_epi32(k, half);
    __m256i one = _mm256_set1_epi32(127);
    __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.x, first), second)};
  }
  static Float abs(Float a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.x)}; }
  static Float copy_sign(Float a, Float sign) {
    __m256 high = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_and_ps(high, sign.x), _mm256_andnot_ps(high, a.x))};
  }
  float total() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void transpose(Float* v) {
    __m256 x[8], y[8];
    for (int i = 0; i < 8; i += 2) {  // 2 by 2 lanes within each half
      y[i] = _mm256_unpacklo_ps(v[i].x, v[i + 1].x);
      y[i + 1] = _mm256_unpackhi_ps(v[i].x, v[i + 1].x);
    }
    for (int i = 0; i < 8; i += 4)  // 4 by 4: x[i + j] has lane j of each half, of vectors i to i + 3
      for (int j = 0; j < 2; ++j) {
        x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
        x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0xee);
      }
    for (int j = 0; j < 4; ++j) {  // the halves themselves
      v[j].x = _mm256_permute2f128_ps(x[j], x[4 + j], 0x20);
      v[4 + j].x = _mm256_permute2f128_ps(x[j], x[4 + j], 0x31);
    }
  }
  static Float exp(Float a) { return exp_lanes(a); }
  static Float tanh(Float a) { return tanh_lanes(a); }
};

#else

using Float = Array<float>;

#endif

// 16-bit formats, as bit patterns.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(Bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float widen(Fp16 v) {
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);       // infinity, NaN
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + (uint32_t(112) << 23)));  // normal
  return bits_to_float(sign | float_to_bits(float(rest) * (1.0f / (1 << 24))));             // subnormal: exact
}

// A vector of lanes from a narrower type.
inline Array<double> load_wide(const double* p) { return Array<double>::load(p); }
inline Float load_wide(const float* p) { return Float::load(p); }
#if defined(__AVX512F__)
inline Float load_wide(const Bf16* p) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Float load_wide(const Fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
#elif defined(__AVX2__)
inline Float load_wide(const Bf16* p) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Float load_wide(const Fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
#else
template <typename In>
inline Float load_wide(const In* p) {
  Float r;
  for (int i = 0; i < Float::lanes; ++i) r.x[i] = widen(p[i]);
  return r;
}
#endif

// The nearest value of a narrower type, ties to even; NaN stays NaN.
inline void narrow(float v, float* to) { *to = v; }
inline void narrow(double v, double* to) { *to = v; }
inline void narrow(float v, Bf16* to) {
  uint32_t u = float_to_bits(v);
  bool nan = (u & 0x7fffffff) > 0x7f800000;
  to->bits = uint16_t((nan ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float v, Fp16* to) {
  uint32_t u = float_to_bits(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000)
    to->bits = uint16_t(sign | 0x7e00);
  else if (rest >= 0x477ff000)
    to->bits = uint16_t(sign | 0x7c00);  // rounds beyond the largest: infinity
  else if (rest >= 0x38800000)
    to->bits = uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
  else
    to->bits = uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));  // subnormal: rounds at 2^-24
}

}  // namespace FASTRL_ISA
