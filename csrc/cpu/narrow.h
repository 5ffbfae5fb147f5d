// Vectors of lanes to a narrower type, each lane to the nearest value, ties to even; NaN stays NaN.
#pragma once

#include "simd.h"

namespace FASTRL_ISA {

inline void store_narrow(double* p, Array<double> v) { v.store(p); }
inline void store_narrow(float* p, Float v) { v.store(p); }

template <typename Out>
inline void store_narrow(Out* p, Float v) {
  float x[Float::lanes];
  v.store(x);
  for (int l = 0; l < Float::lanes; ++l) narrow(x[l], p + l);
}
#if defined(__AVX512F__)
inline void store_narrow(Bf16* p, Float v) {
  const __m512i bits = _mm512_castps_si512(v.x), one = _mm512_set1_epi32(1), high = _mm512_srli_epi32(bits, 16);
  const __m512i even = _mm512_add_epi32(_mm512_and_si512(high, one), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, even), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v.x, v.x, _CMP_UNORD_Q), rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}
inline void store_narrow(Fp16* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline void store_narrow(Bf16* p, Float v) {
  const __m256i bits = _mm256_castps_si256(v.x), high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, even), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.x, v.x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_narrow(Fp16* p, Float v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace FASTRL_ISA
