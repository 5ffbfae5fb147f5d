// The LM head, its log-softmax and their derivatives, without ever storing more logits than a tile or than was asked.
//
//   forward    z = h W^T tile by tile: running maximum, sum of exp, and sum of exp times z, one lane per row
//   backward   dz tile by tile from z, computed again or stored, then d weight = dz^T h and d hidden = dz W
//
// Lanes are rows (tokens), so no sum ever runs across a vector. The vocabulary is cut into segments whose statistics
// are merged in order, in double: neither the number of threads nor the other rows change a bit of a row's result.
#pragma once

#include <math.h>

#include "kernels.h"
#include "narrow.h"
#include "pack.h"

namespace FASTRL_ISA {

// M: how units multiply. In: the element type of hidden, weight and bias.
template <typename M, typename In>
struct HeadKernel {
  using V = typename M::Vec;
  using Real = typename V::Real;
  using Unit = typename M::Unit;
  static constexpr int pair = M::pair, L = Tile<M>::lanes;
  static constexpr ptrdiff_t block = Tile<M>::block, segment = Tile<M>::segment;
  // Tokens that lie side by side where the product that contracts over entries reads them: its tiles of rows are whole.
  static constexpr int together = M::contiguous_rows ? L : least_common_multiple(L, Tile<M>::rows);
  static_assert(segment / pair % Tile<M>::chain == 0, "stripes of entries must end where partial sums end");
  static_assert(block % (pair * M::group) == 0, "blocks of entries must end where groups of units end");

  const Head& h;
  const In* hidden;
  const In* weight;
  const In* bias;
  const Real* temperature;
  ptrdiff_t n, padded, width, units, vocabulary, width_panels;  // units: of a row of hidden or weight, stored
  bool direct;                                                  // rows of weight can be read as units where they are
  bool tempered;                                                // some temperature is not 1

  explicit HeadKernel(const Head& head)
      : h(head),
        hidden(static_cast<const In*>(head.hidden)),
        weight(static_cast<const In*>(head.weight)),
        bias(static_cast<const In*>(head.bias)),
        temperature(static_cast<const Real*>(head.temperature)),
        n(head.count),
        padded(round_up(head.count, L)),
        width(head.width),
        units(stored<M>((head.width + pair - 1) / pair)),
        vocabulary(head.vocabulary),
        width_panels(round_up(head.width, L) / L),
        direct(sizeof(In) * pair == sizeof(Unit) && width % pair == 0 && head.weight_stride % pair == 0 &&
               reinterpret_cast<uintptr_t>(head.weight) % sizeof(Unit) == 0),
        tempered(head.temperature_per_row || *static_cast<const Real*>(head.temperature) != 1) {}

  // Units from one row to the next where M reads rows: a multiple of 4 KB apart they would share one set of the first
  // cache, off which a cache line keeps them.
  static ptrdiff_t row_room(ptrdiff_t row_units) { return row_units + (M::contiguous_rows ? 16 : 0); }

  // Row of hidden of the i-th token; null where there is none.
  const In* token(ptrdiff_t i) const { return i < n ? hidden + h.rows[i] * h.hidden_stride : nullptr; }

  // Rows of hidden with one lane per token: panel p holds tokens [p L, p L + L), a unit of each, then the next unit.
  void pack_tokens(Unit* out) const {
    Buffer<Unit> rows(M::pieces > 1 ? V::lanes * units : 0);
#pragma omp for schedule(static)
    for (ptrdiff_t p = 0; p < padded / L; ++p) {
      Unit* panel = out + p * units * L;
      if constexpr (M::pieces > 1) {
        for (int lane = 0; lane < L; lane += V::lanes) {
          for (int k = 0; k < V::lanes; ++k) {
            const In* from = token(p * L + lane + k);
            if (from)
              put_row<M>(rows + k * units, from, width);
            else
              memset(rows + k * units, 0, size_t(units) * sizeof(Unit));
          }
          for (ptrdiff_t u = 0; u < units; u += V::lanes)
            M::transpose(V::lanes, rows + u, units, panel + u * L + lane, L);
        }
      } else {
        for (int lane = 0; lane < L; lane += V::lanes) {
          const In* from[V::lanes];
          for (int k = 0; k < V::lanes; ++k) from[k] = token(p * L + lane + k);
          turn_rows<M>(from, width, panel + lane, L);
        }
      }
    }
  }

  // Rows [first, first + count) of a matrix with one lane per column, `pair` rows in a unit: panels of L columns with
  // `panel_units` of room, from unit `at` on. `row(i)` is the i-th row, or null for a row of zeros.
  template <typename Row>
  void pack_columns(Unit* out, ptrdiff_t panel_units, ptrdiff_t at, ptrdiff_t count, Row row) const {
    for (ptrdiff_t i = 0; i < round_up(count, pair * M::group); i += pair) {
      const In* even = i < count ? row(i) : nullptr;
      const In* odd = pair > 1 && i + 1 < count ? row(i + 1) : nullptr;
      for (ptrdiff_t p = 0; p < width_panels; ++p) {
        In room[2][L];
        const In* a = columns_of(even, p * L, L, width, room[0]);
        const In* b = pair > 1 ? columns_of(odd, p * L, L, width, room[1]) : a;
        put_lanes<M>(out + (p * panel_units + place<M>(at + i / pair)) * L, a, b);
      }
    }
  }

  // Rows [v, v + count) of weight as units; copied to scratch only where they are not units already.
  const Unit* weight_units(ptrdiff_t v, ptrdiff_t count, Unit* scratch, ptrdiff_t* stride) const {
    if (direct) {
      *stride = h.weight_stride / pair;
      return reinterpret_cast<const Unit*>(weight + v * h.weight_stride);
    }
    *stride = row_room(units);
    for (ptrdiff_t r = 0; r < count; ++r) put_row<M>(scratch + r * *stride, weight + (v + r) * h.weight_stride, width);
    return scratch;
  }

  // Where a value of the i-th of `count` tokens is stored at entry 0, and how far it is to the next entry: panels of L
  // tokens, one entry after the other; the last panel is as narrow as what is left.
  struct Stored {
    ptrdiff_t first, stride;
  };
  Stored stored_at(ptrdiff_t i, ptrdiff_t count) const {
    const ptrdiff_t t = i / L * L;
    return {t * vocabulary + i - t, least(L, count - t)};
  }

  // Copies entries [v, v + count) of the stored values of tokens [t, t + L), of which `out.places` tells where they are,
  // to a tile; zeros where there is no token.
  template <typename T>
  void gather(const HeadBackward& out, const T* from, ptrdiff_t v, ptrdiff_t count, ptrdiff_t t, Real* tile) const {
    for (ptrdiff_t l = 0; l < L; ++l) {
      if (t + l >= n) {
        for (ptrdiff_t r = 0; r < count; ++r) tile[r * L + l] = 0;
        continue;
      }
      const Stored at = stored_at(out.places ? out.places[t + l] : t + l, out.places ? out.stored : n);
      for (ptrdiff_t r = 0; r < count; ++r) tile[r * L + l] = widen(from[at.first + (v + r) * at.stride]);
    }
  }

  Real temperature_of(ptrdiff_t i) const { return temperature[h.temperature_per_row ? h.rows[i] : 0]; }

  // Temperature and target of each token; padding gets a target that no entry has.
  void prepare(Real* warmth, int32_t* target) const {
    for (ptrdiff_t i = 0; i < padded; ++i) {
      warmth[i] = i < n ? temperature_of(i) : Real(1);
      target[i] = i < n ? int32_t(h.targets[h.rows[i]]) : -1;
    }
  }

  // z <- cap(scale (z + bias)) / temperature, for one vector of tokens at entry v.
  V finish(V z, ptrdiff_t v, V warmth) const {
    if (bias) z = z + V::set(Real(widen(bias[v])));
    if (h.logit_scale != 1) z = z * V::set(Real(h.logit_scale));
    if (h.softcap != 0) z = V::tanh(z / V::set(Real(h.softcap))) * V::set(Real(h.softcap));
    return tempered ? z / warmth : z;
  }

  void forward(const HeadForward& out) {
    const ptrdiff_t segments = (vocabulary + segment - 1) / segment;
    const bool entropy = out.entropy != nullptr;
    const ptrdiff_t summed = out.summaries ? segments * 4 * padded : 0;
    const Real lowest = sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.797693134862315e308);
    Buffer<Unit> tokens(padded * units);
    Buffer<Real> stats(segments * 4 * padded), summaries(summed), warmth(padded);
    Buffer<int32_t> target(padded);
    prepare(warmth, target);
#pragma omp parallel num_threads(h.threads)
    {
      [[maybe_unused]] typename M::Region region;
      pack_tokens(tokens);
      Buffer<Unit> scratch(direct ? 0 : block * row_room(units));
      Buffer<Real> tile(block * L);
#pragma omp for schedule(dynamic, 1)
      for (ptrdiff_t s = 0; s < segments; ++s) {
        Real* top = stats + s * 4 * padded;
        Real *sum = top + padded, *moment = sum + padded, *at_target = moment + padded;
        for (ptrdiff_t i = 0; i < padded; ++i) top[i] = lowest, sum[i] = 0, moment[i] = 0, at_target[i] = 0;
        Real* summary = summaries + s * 4 * padded;
        for (ptrdiff_t i = 0; summed && i < padded; ++i) summary[i] = lowest, summary[padded + i] = 0;
        for (ptrdiff_t i = 0; summed && i < padded; ++i) summary[2 * padded + i] = 0, summary[3 * padded + i] = 0;
        const ptrdiff_t end = least((s + 1) * segment, vocabulary);
        for (ptrdiff_t v = s * segment; v < end; v += block) {
          const ptrdiff_t count = least(block, end - v);
          ptrdiff_t stride;
          const Unit* w = weight_units(v, count, scratch, &stride);
          for (ptrdiff_t t = 0; t < padded; t += L) {
            Real* kept = out.logits ? static_cast<Real*>(out.logits) + stored_at(t, n).first : nullptr;
            Real* z = kept && t + L <= n ? kept + v * L : static_cast<Real*>(tile);
            multiply_panel<M, 1>(count, units, tokens + t * units, w, stride, z, L, false);
            for (ptrdiff_t l = 0; l < L; l += V::lanes)
              fold(z + l, v, count, warmth + t + l, target + t + l, top + t + l, sum + t + l, moment + t + l,
                   at_target + t + l, entropy);
            for (ptrdiff_t l = 0; summed && l < L; l += V::lanes)
              summarise(z + l, v, count, top + t + l, summary + t + l);
            if (kept && z == tile)
              for (ptrdiff_t r = 0; r < count; ++r)
                for (ptrdiff_t l = 0; l < n - t; ++l) kept[(v + r) * (n - t) + l] = tile[r * L + l];
          }
        }
      }
    }
    for (ptrdiff_t i = 0; i < n; ++i) {
      double most = -HUGE_VAL, total = 0, weighted = 0;
      for (ptrdiff_t s = 0; s < segments; ++s) {
        const double m = stats[s * 4 * padded + i];
        most = m > most ? m : most;
      }
      for (ptrdiff_t s = 0; s < segments; ++s) {
        const Real* top = stats + s * 4 * padded + i;
        const double shift = double(*top) - most, factor = ::exp(shift), sum = top[padded];
        total += factor * sum;
        weighted += factor * (top[2 * padded] + sum * (factor > 0 ? shift : 0));
      }
      const double log_total = ::log(total);
      const int64_t row = h.rows[i];
      const double at_target = stats[(h.targets[row] / segment * 4 + 3) * padded + i];
      static_cast<Real*>(out.lse)[row] = Real(most);
      static_cast<Real*>(out.lse)[h.all + row] = Real(log_total);
      static_cast<Real*>(out.logps)[row] = Real(at_target - most - log_total);
      if (entropy) static_cast<Real*>(out.entropy)[row] = Real(log_total - weighted / total);
      if (!summed) continue;
      double squares = 0, logits = 0, first = -1;
      for (ptrdiff_t s = 0; s < segments; ++s) {
        const Real* summary = summaries + s * 4 * padded + i;
        const double factor = ::exp(double(*summary) - most);
        if (first < 0 && *summary == Real(most)) first = summary[3 * padded];
        squares += factor * factor * summary[padded];
        logits += summary[2 * padded];
      }
      Real* to = static_cast<Real*>(out.summaries) + row;
      *to = Real(::log(squares) - 2 * log_total);
      to[h.all] = Real(logits / double(vocabulary));
      to[2 * h.all] = total == total && first == double(h.targets[row]);
    }
  }

  // Folds the finished logits of a block, whose largest so far are in `top`, into the rest that may be asked of them: of
  // each lane the largest that the sum of exp^2 is relative to, that sum, the sum of all, and where the largest is first.
  void summarise(const Real* z, ptrdiff_t v, ptrdiff_t count, const Real* top, Real* summary) const {
    const V most = V::load(top), before = V::load(summary), factor = V::exp(before - most);
    V squares = V::set(0), sum = V::set(0), few = V::set(0), first = V::set(0);
    for (ptrdiff_t r = count - 1; r >= 0; --r) {
      const V x = V::load(z + r * L), e = V::exp(x - most);
      squares = squares + e * e;
      few = few + x;
      if (r % 16 == 0) sum = sum + few, few = V::set(0);  // in two steps, for fewer roundings of a long sum
      first = V::select(V::is_zero(x - most), V::set(Real(v + r)), first);  // exact up to 2^24 entries
    }
    const V place = V::select(V::below(before, most), first, V::load(summary + 3 * padded));
    most.store(summary);
    (squares + V::load(summary + padded) * factor * factor).store(summary + padded);
    (sum + V::load(summary + 2 * padded)).store(summary + 2 * padded);
    place.store(summary + 3 * padded);
  }

  // Finishes the logits of one vector of tokens over `count` entries, in place, and folds them into its statistics.
  void fold(Real* z, ptrdiff_t v, ptrdiff_t count, const Real* warmth, const int32_t* target, Real* top, Real* sum,
            Real* moment, Real* at_target, bool entropy) const {
    const V heat = V::load(warmth), before = V::load(top);
    const auto wanted = V::load_int(target);
    V most = before, found = V::load(at_target);
    for (ptrdiff_t r = 0; r < count; ++r) {
      const V x = finish(V::load(z + r * L), v + r, heat);
      x.store(z + r * L);
      most = V::max(x, most);
      found = V::select(V::equal(wanted, int32_t(v + r)), x, found);
    }
    V total = V::set(0), weighted = V::set(0);
    for (ptrdiff_t r = 0; r < count; ++r) {
      const V shifted = V::load(z + r * L) - most, e = V::exp(shifted);
      total = total + e;
      if (entropy) weighted = weighted + V::select(V::is_zero(e), V::set(0), e * shifted);
    }
    const V shift = before - most, factor = V::exp(shift), old = V::load(sum) * factor;
    if (entropy) {
      const V carried = V::load(moment) * factor + V::select(V::is_zero(old), V::set(0), old * shift);
      (weighted + carried).store(moment);
    }
    (total + old).store(sum);
    most.store(top);
    found.store(at_target);
  }

  // Both parts of the log-sum-exp of each token.
  void gather_lse(const void* lse, Real* parts) const {
    for (ptrdiff_t part = 0; part < 2; ++part)
      for (ptrdiff_t i = 0; i < padded; ++i)
        parts[part * padded + i] = i < n ? static_cast<const Real*>(lse)[part * h.all + h.rows[i]] : 0;
  }

  void keep(const HeadKeep& out) const {
    const Real* z = static_cast<const Real*>(out.logits);
    Buffer<Real> lse(2 * padded);
    gather_lse(out.lse, lse);
    In* kept = static_cast<In*>(out.kept);
#pragma omp parallel for collapse(2) num_threads(h.threads) schedule(static)
    for (ptrdiff_t t = 0; t < n; t += L)
      for (ptrdiff_t v = 0; v < vocabulary; ++v) {
        const Stored at = stored_at(t, n);
        for (ptrdiff_t l = 0; l < at.stride; l += V::lanes) {
          const ptrdiff_t i = at.first + v * at.stride + l, some = least(V::lanes, at.stride - l);
          Real room[V::lanes] = {};
          for (ptrdiff_t k = 0; k < (some < V::lanes ? some : 0); ++k) room[k] = z[i + k];
          const V x = V::load(some < V::lanes ? room : z + i);
          const V p = V::exp(x - V::load(lse + t + l) - V::load(lse + padded + t + l));
          if (some == V::lanes) {
            store_narrow(kept + i, p);
            continue;
          }
          p.store(room);
          for (ptrdiff_t k = 0; k < some; ++k) narrow(room[k], kept + i + k);
        }
      }
  }

  void backward(const HeadBackward& out) {
    const Real* grad_logps = static_cast<const Real*>(out.grad_logps);
    const Real* grad_entropy = static_cast<const Real*>(out.grad_entropy);
    const bool needs_hidden = out.grad_hidden != nullptr, needs_weight = out.grad_weight != nullptr;
    const bool kept = out.kept != nullptr, recompute = !kept && out.logits == nullptr;
    const ptrdiff_t token_units = stored<M>(padded / pair), token_room = token_units + 64 / ptrdiff_t(sizeof(Unit));
    // Entries whose dz all threads finish before the product that contracts over them.
    const ptrdiff_t stripe = least(segment * (h.threads > 4 ? h.threads : 4), round_up(vocabulary, block));
    const ptrdiff_t stripe_units = row_room(stored<M>(round_up(stripe, pair) / pair));

    Buffer<Unit> tokens(recompute ? padded * units : 0);
    Buffer<Unit> columns(needs_weight ? width_panels * token_units * L : 0);
    Buffer<Unit> weights(needs_hidden ? width_panels * stripe_units * L : 0);
    // Groups of tokens: one unit of entries after the other, or where M wants its rows so, one token after the other.
    Buffer<Unit> by_entry(stripe_units * round_up(padded, together));
    const ptrdiff_t entry_row = M::contiguous_rows ? stripe_units : 1;
    constexpr ptrdiff_t entry_unit = M::contiguous_rows ? 1 : together;
    constexpr ptrdiff_t entry_step = M::contiguous_rows ? L : together;  // before it is turned
    Buffer<Real> d_hidden(needs_hidden ? padded * width : 0);
    Buffer<Real> row(8 * padded);
    Buffer<int32_t> target(padded);
    Real *warmth = row, *lse = warmth + padded, *lse_rest = lse + padded, *g = lse_rest + padded, *ge = g + padded,
         *entropy = ge + padded, *chain = entropy + padded, *at_target = chain + padded;
    prepare(warmth, target);
    gather_lse(out.lse, lse);
    for (ptrdiff_t i = 0; i < padded; ++i) {
      const int64_t r = i < n ? h.rows[i] : 0;
      g[i] = i < n ? grad_logps[r] : 0;
      ge[i] = i < n && grad_entropy ? grad_entropy[r] : 0;
      const bool silent = g[i] == 0 && ge[i] == 0;
      entropy[i] = silent || !grad_entropy ? 0 : static_cast<const Real*>(out.entropy)[r];
      chain[i] = Real(h.logit_scale) / warmth[i];
      // From logp itself: with a probability near 1, 1 - p would be lost.
      const double logp = silent ? 0 : static_cast<const Real*>(out.logps)[r];
      const double surprise = ge[i] == 0 ? 0 : ge[i] * ::exp(logp) * (logp + entropy[i]);
      at_target[i] = silent ? 0 : Real(-g[i] * ::expm1(logp) - surprise);
    }

#pragma omp parallel num_threads(h.threads)
    {
      [[maybe_unused]] typename M::Region region;
      if (recompute) pack_tokens(tokens);
      if (needs_weight) {
        constexpr ptrdiff_t piece = 64;
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < padded; i += piece)
          pack_columns(columns, token_units, i / pair, least(piece, padded - i), [&](ptrdiff_t k) -> const In* {
            const ptrdiff_t t = i + k;
            return g[t] != 0 || ge[t] != 0 ? token(t) : nullptr;
          });
      }
      Buffer<Unit> scratch(direct ? 0 : block * row_room(units));
      Buffer<Real> tile(block * L), sums((block > together ? block : together) * L);
      Buffer<Unit> by_token(block * token_room);
      Buffer<Unit> unturned(M::contiguous_rows ? stored<M>(block / pair) * L : 0);
      Buffer<V> bias_sum(out.grad_bias ? block : 0);

      for (ptrdiff_t first = 0; first < vocabulary; first += stripe) {
        const ptrdiff_t last = least(first + stripe, vocabulary);
#pragma omp for schedule(dynamic, 1)
        for (ptrdiff_t v = first; v < last; v += block) {
          const ptrdiff_t count = least(block, last - v), even = round_up(count, 2 * M::group);
          const ptrdiff_t at = (v - first) / pair;
          const Unit* w = nullptr;
          ptrdiff_t stride = 0;
          if (recompute) w = weight_units(v, count, scratch, &stride);
          if (out.grad_bias)
            for (ptrdiff_t r = 0; r < count; ++r) bias_sum[r] = V::set(0);
          for (ptrdiff_t t = 0; t < padded; t += L) {
            const Real* z = tile;
            if (out.logits && !out.places && t + L <= n)
              z = static_cast<const Real*>(out.logits) + stored_at(t, n).first + v * L;
            else if (out.logits)
              gather(out, static_cast<const Real*>(out.logits), v, count, t, tile);
            if (kept) gather(out, static_cast<const In*>(out.kept), v, count, t, tile);
            if (recompute) multiply_panel<M, 1>(count, units, tokens + t * units, w, stride, tile, L, false);
            for (ptrdiff_t l = 0; l < L; l += V::lanes) {
              const ptrdiff_t i = t + l;
              const V heat = V::load(warmth + i), shift = V::load(lse + i), shift_rest = V::load(lse_rest + i),
                      up = V::load(g + i), up_entropy = V::load(ge + i), h_row = V::load(entropy + i),
                      link = V::load(chain + i), peak = V::load(at_target + i);
              const auto wanted = V::load_int(target + i);
              const auto no_logp = V::is_zero(up);
              const auto no_entropy = V::is_zero(up_entropy);
              auto derivative = [&](ptrdiff_t r) {
                if (r >= count) return V::set(0);
                V x = V::load(z + r * L + l);
                if (recompute) x = finish(x, v + r, heat);
                const V logp = x - shift - shift_rest, p = kept ? x : V::exp(logp);
                V dz = V::select(no_logp, V::set(0), V::set(0) - up * p);
                if (grad_entropy) {
                  const V part = V::select(V::is_zero(p), V::set(0), p * (logp + h_row)) * up_entropy;
                  dz = dz - V::select(no_entropy, V::set(0), part);
                }
                dz = V::select(V::equal(wanted, int32_t(v + r)), peak, dz) * link;
                if (h.softcap != 0) {
                  const V c = x * heat / V::set(Real(h.softcap));
                  dz = V::select(V::is_zero(dz), dz, dz * (V::set(1) - c * c));
                }
                if (out.grad_bias) bias_sum[r] = bias_sum[r] + dz;
                return dz;
              };
              const ptrdiff_t in_group = i % together;
              Unit* turned =
                  by_entry + (i - in_group) * stripe_units + in_group * entry_row + place<M>(at) * entry_unit;
              Unit* entry = M::contiguous_rows ? unturned + l : turned;
              Unit* even_row = by_token + place<M>(i / pair);
              for (ptrdiff_t r = 0; r < even; r += 2) {
                const V a = derivative(r), b = derivative(r + 1);
                Unit* to = even_row + r * token_room;
                M::put_dz(entry + place<M>(r / pair) * entry_step, entry_step, to, to + token_room, a, b);
              }
              if constexpr (M::contiguous_rows) M::transpose(stored<M>(even / pair), entry, L, turned, entry_row);
            }
          }
          if (out.grad_bias)
            for (ptrdiff_t r = 0; r < count; ++r) {
              Real lanes[V::lanes], total = 0;
              bias_sum[r].store(lanes);
              for (int l = 0; l < V::lanes; ++l) total += lanes[l];
              static_cast<Real*>(out.grad_bias)[v + r] = total;
            }
          if (needs_weight) {
            Real* real = static_cast<Real*>(out.grad_weight) + v * width;
            In* rounded = static_cast<In*>(out.grad_weight) + v * width;
            for (ptrdiff_t p = 0; p < width_panels; ++p) {
              const auto multiply = [&](bool add) {
                multiply_panel<M, 1>(count, token_units, columns + p * token_units * L, by_token, token_room, sums, L,
                                     add);
              };
              if (out.round_weight)
                with_tile<false>(count, p, rounded, multiply, sums);
              else if (out.add_weight)
                with_tile<true>(count, p, real, multiply, sums);
              else
                with_tile<false>(count, p, real, multiply, sums);
            }
          }
          if (needs_hidden)
            pack_columns(weights, stripe_units, at, count,
                         [&](ptrdiff_t r) { return weight + (v + r) * h.weight_stride; });
        }
        if (needs_hidden) {
          const ptrdiff_t contracted = stored<M>((last - first + pair - 1) / pair);
#pragma omp for collapse(2) schedule(dynamic, 1)
          for (ptrdiff_t t = 0; t < n; t += together)
            for (ptrdiff_t p = 0; p < width_panels; ++p) {
              const ptrdiff_t count = least(together, n - t);
              const auto multiply = [&](bool add) {
                multiply_panel<M, entry_unit>(count, contracted, weights + p * stripe_units * L,
                                              by_entry + t * stripe_units, entry_row, sums, L, add);
              };
              Real* to = d_hidden + t * width;
              if (first > 0)
                with_tile<true>(count, p, to, multiply, sums);
              else
                with_tile<false>(count, p, to, multiply, sums);
            }
        }
      }
      if (needs_hidden) {
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < n; ++i) {
          Real* to = static_cast<Real*>(out.grad_hidden) + h.rows[i] * width;
          memcpy(to, d_hidden + i * width, size_t(width) * sizeof(Real));
        }
      }
    }
  }

  // Runs `multiply` on a tile of `rows` of panel p of a matrix of `width` columns, and writes it where it belongs, rounded
  // once. Add: the tile starts from what is there. A tile's rows are neighbours, unlike those of the matrix, which the
  // product would come back to for every partial sum; the next panel's are fetched while there is something to multiply.
  template <bool Add, typename Out, typename Multiply>
  void with_tile(ptrdiff_t rows, ptrdiff_t p, Out* matrix, Multiply multiply, Real* tile) const {
    const ptrdiff_t used = least(L, width - p * L);
    Out* to = matrix + p * L;
    for (ptrdiff_t r = 0; Add && r < rows; ++r) {
      for (ptrdiff_t l = 0; l < used; ++l) tile[r * L + l] = widen(to[r * width + l]);
      for (ptrdiff_t l = used; l < L; ++l) tile[r * L + l] = 0;
    }
    for (ptrdiff_t r = 0; r < rows; ++r) __builtin_prefetch(to + r * width + L, 1, 3);
    multiply(Add);
    for (ptrdiff_t r = 0; r < rows; ++r) {
      const Real* from = tile + r * L;
      if (used == L)
        for (ptrdiff_t l = 0; l < L; l += V::lanes) store_narrow(to + r * width + l, V::load(from + l));
      else
        for (ptrdiff_t l = 0; l < used; ++l) narrow(from[l], to + r * width + l);
    }
  }
};

// A dtype's kernel under this instruction set.
template <typename Run>
inline void with_head_kernel(const Head& head, Run run) {
  switch (head.dtype) {
    case Dtype::float64: run(HeadKernel<Plain<Array<double>>, double>(head)); break;
    case Dtype::float16: run(HeadKernel<Plain<Float>, Fp16>(head)); break;
#if defined(FASTRL_TILES)
    case Dtype::float32:
      if (head.reduced_float32)
        run(HeadKernel<SplitTiled<2>, float>(head));
      else
        run(HeadKernel<SplitTiled<3>, float>(head));
      break;
    case Dtype::bfloat16: run(HeadKernel<Tiled, Bf16>(head)); break;
#elif defined(__AVX512BF16__)
    case Dtype::float32: run(HeadKernel<Plain<Float>, float>(head)); break;
    case Dtype::bfloat16: run(HeadKernel<Paired, Bf16>(head)); break;
#else
    case Dtype::float32: run(HeadKernel<Plain<Float>, float>(head)); break;
    case Dtype::bfloat16: run(HeadKernel<Plain<Float>, Bf16>(head)); break;
#endif
  }
}

inline void head_forward(const HeadForward& out) {
  with_head_kernel(out.head, [&](auto kernel) { kernel.forward(out); });
}

inline void head_keep(const HeadKeep& out) {
  with_head_kernel(out.head, [&](auto kernel) { kernel.keep(out); });
}

inline void head_backward(const HeadBackward& out) {
  with_head_kernel(out.head, [&](auto kernel) { kernel.backward(out); });
}

}  // namespace FASTRL_ISA
