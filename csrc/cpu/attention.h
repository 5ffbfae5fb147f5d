// Attention of one new token per row over a cache of keys and values: softmax(scale q K^T + mask) V.
//
// Decoding reads every key and value once for a handful of products, so it runs at the speed of memory: keys stay in
// their 16 bits, and the query heads that share a key head find it in the first cache.
#pragma once

#include "head.h"

namespace FASTRL_ISA {

template <typename In>
void decode_rows(const DecodeAttention& a) {
  using V = Float;
  constexpr int chains = 4;  // sums at a time: one alone would wait for each of its additions
  const ptrdiff_t width = a.width, seen = a.seen, padded = round_up(seen, V::lanes), parts = width / V::lanes;
#pragma omp parallel num_threads(a.threads)
  {
    Buffer<float> weights(padded), query(width);
#pragma omp for collapse(2) schedule(static)
    for (ptrdiff_t row = 0; row < a.rows; ++row)
      for (ptrdiff_t head = 0; head < a.heads; ++head) {
        const In* q = static_cast<const In*>(a.query) + (row * a.heads + head) * width;
        const ptrdiff_t shared = head / (a.heads / a.key_heads);
        const In* keys = static_cast<const In*>(a.keys) + row * a.row_stride + shared * a.head_stride;
        const In* values = static_cast<const In*>(a.values) + row * a.row_stride + shared * a.head_stride;
        for (ptrdiff_t i = 0; i < width; ++i) query[i] = widen(q[i]) * float(a.scale);
        float most = -3.402823466e38f;
        for (ptrdiff_t first = 0; first < seen; first += chains) {
          V sum[chains];
          for (int c = 0; c < chains; ++c) sum[c] = V::set(0);
          for (ptrdiff_t i = 0; i < parts; ++i)
            for (int c = 0; c < chains; ++c) {
              const In* key = keys + least(first + c, seen - 1) * width;
              sum[c] = V::fma(V::load(query + i * V::lanes), load_wide(key + i * V::lanes), sum[c]);
            }
          for (int c = 0; c < least(chains, seen - first); ++c) {
            float score = sum[c].total() + (a.mask ? a.mask[row * a.mask_stride + first + c] : 0.0f);
            weights[first + c] = score;
            most = score > most || score != score ? score : most;
          }
        }
        for (ptrdiff_t t = seen; t < padded; ++t) weights[t] = -HUGE_VALF;
        V all = V::set(0);
        for (ptrdiff_t t = 0; t < padded; t += V::lanes) {
          const V e = V::exp(V::load(weights + t) - V::set(most));
          e.store(weights + t);
          all = all + e;
        }
        const V share = V::set(1.0f / all.total());
        In* out = static_cast<In*>(a.out) + (row * a.heads + head) * width;
        for (ptrdiff_t first = 0; first < parts; first += chains) {
          const int some = int(least(chains, parts - first));
          V sum[chains];
          for (int c = 0; c < chains; ++c) sum[c] = V::set(0);
          for (ptrdiff_t t = 0; t < seen; ++t) {
            const V weight = V::set(weights[t]);
            const In* value = values + t * width + first * V::lanes;
            if (some == chains)
              for (int c = 0; c < chains; ++c) sum[c] = V::fma(weight, load_wide(value + c * V::lanes), sum[c]);
            else
              for (int c = 0; c < some; ++c) sum[c] = V::fma(weight, load_wide(value + c * V::lanes), sum[c]);
          }
          for (int c = 0; c < some; ++c) {
            float lanes[V::lanes];
            (sum[c] * share).store(lanes);
            for (int l = 0; l < V::lanes; ++l) narrow(lanes[l], out + (first + c) * V::lanes + l);
          }
        }
      }
  }
}

inline void decode_attention(const DecodeAttention& a) {
  switch (a.dtype) {
    case Dtype::float32: decode_rows<float>(a); break;
    case Dtype::bfloat16: decode_rows<Bf16>(a); break;
    case Dtype::float16: decode_rows<Fp16>(a); break;
    case Dtype::float64: break;  // refused in Python
  }
}

}  // namespace FASTRL_ISA
