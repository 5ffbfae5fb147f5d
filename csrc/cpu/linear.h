// A linear layer and its two derivatives, over the rows of x: accumulated in float32, rounded once.
//
//                                       rows of the product     lanes, in panels
//   forward       y  = x W^T + bias     outputs: W in place     rows of x, turned once for all
//   grad_input    dx = dy W             rows of dy, in place    inputs: columns of W, packed by each task
//   grad_weight   dW = dy^T x           outputs: dy turned      inputs: columns of x, packed once for all
//
// No product needs a second copy of W, so none has to be kept, or found out of date. No sum is ever split between tasks
// or lanes: neither the number of threads nor the other rows change a bit of a result. Tasks are handed out as threads
// get done, so that one which had to wait for its processor does not hold up the others for long.
#pragma once

#include "kernels.h"
#include "narrow.h"
#include "pack.h"

namespace FASTRL_ISA {

// How the rows and panels of a product are cut into tasks.
struct Tasks {
  ptrdiff_t rows, panels;  // of one task
  int threads;

  // From the largest task on, rows and then panels are halved until every thread has four tasks.
  static Tasks of(Tasks largest, ptrdiff_t rows, ptrdiff_t panels, double products) {
    constexpr double too_few = 5e5;  // products that one thread does while the others are woken
    constexpr ptrdiff_t least_rows = 48;
    Tasks cut = largest;
    if (products < too_few) cut.threads = 1;
    const auto too_large = [&] {
      const ptrdiff_t blocks = (rows + cut.rows - 1) / cut.rows, groups = (panels + cut.panels - 1) / cut.panels;
      return blocks * groups < 4 * cut.threads;
    };
    while (cut.rows > least_rows && too_large()) cut.rows /= 2;
    while (cut.panels > 1 && too_large()) cut.panels = (cut.panels + 1) / 2;
    if (too_large()) cut.rows = least_rows / 2;
    return cut;
  }
};

// Rows of memory that will be needed soon, asked for a few cache lines at a time while there is something to multiply:
// the processor itself foresees neither the next task's weights nor where a result goes.
template <bool Written>
struct Ahead {
  const char* row = nullptr;
  ptrdiff_t rows = 0, stride = 0, bytes = 0;
  ptrdiff_t offset = 0, lines = 0;

  template <typename T>
  static Ahead of(const T* row, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t calls) {
    constexpr ptrdiff_t size = sizeof(T);
    const ptrdiff_t lines = rows * ((count * size + 63) / 64);
    return {reinterpret_cast<const char*>(row), rows, stride * size, count * size, 0, (lines + calls - 1) / calls};
  }
  void operator()() {
    for (ptrdiff_t i = 0; i < lines && rows > 0; ++i) {
      if (Written)
        __builtin_prefetch(row + offset, 1, 3);
      else
        __builtin_prefetch(row + offset, 0, 2);
      offset += 64;
      if (offset >= bytes) offset = 0, row += stride, --rows;
    }
  }
};

// M: how units multiply. In: the element type of x, W, bias, y and their gradients.
template <typename M, typename In>
struct LinearKernel {
  using V = typename M::Vec;
  using Real = typename V::Real;
  using Unit = typename M::Unit;
  static constexpr ptrdiff_t pair = M::pair, lanes = V::lanes, vectors = Tile<M>::vectors, L = Tile<M>::lanes;
  static_assert(M::pieces == 1, "a value is one unit or half of one");

  static ptrdiff_t units_of(ptrdiff_t values) { return (values + pair - 1) / pair; }

  // Units from one row to the next in scratch: a multiple of 4 KB apart, rows would share one set of the first cache.
  static ptrdiff_t row_room(ptrdiff_t units) { return round_up(units, lanes) + lanes; }

  // As many rows of this many units as fit half of a second cache of 512 KB, in whole tiles of rows.
  static ptrdiff_t rows_in_cache(ptrdiff_t units) {
    return units * ptrdiff_t(sizeof(Unit)) * 96 <= 256 << 10 ? 96 : 48;
  }

  // Panels of `all` lanes, L each; the last one no wider than whole vectors must be.
  struct Panels {
    ptrdiff_t all;
    ptrdiff_t count() const { return (all + L - 1) / L; }
    ptrdiff_t first(ptrdiff_t p) const { return p * L; }
    ptrdiff_t used(ptrdiff_t p) const { return least(L, all - p * L); }
    ptrdiff_t width(ptrdiff_t p) const { return M::contiguous_rows ? L : round_up(used(p), lanes); }
    ptrdiff_t stored() const { return first(count() - 1) + width(count() - 1); }
  };

  // Rows of values as units: where they are, or copied to `room`.
  struct Rows {
    const In* values;
    ptrdiff_t stride, width;
    bool in_place() const {
      return sizeof(In) * pair == sizeof(Unit) && width % pair == 0 && stride % pair == 0 &&
             reinterpret_cast<uintptr_t>(values) % sizeof(Unit) == 0;
    }
    const In* at(ptrdiff_t r) const { return values + r * stride; }
    ptrdiff_t unit_stride() const { return in_place() ? stride / pair : row_room(units_of(width)); }
    ptrdiff_t room(ptrdiff_t count) const { return in_place() ? 0 : count * unit_stride(); }
    const Unit* units(ptrdiff_t first, ptrdiff_t count, Unit* room) const {
      if (in_place()) return reinterpret_cast<const Unit*>(at(first));
      for (ptrdiff_t r = 0; r < count; ++r) put_row<M>(room + r * unit_stride(), at(first + r), width);
      return room;
    }
  };

  // `count` rows as panels [begin, end) of their columns, `room` units each, from unit `at` on; every row is read once,
  // from left to right.
  template <typename Row>
  static void take_panels(Row row, ptrdiff_t count, const Panels& panels, ptrdiff_t begin, ptrdiff_t end, Unit* to,
                          ptrdiff_t room, ptrdiff_t at) {
    for (ptrdiff_t k = 0; k < count; k += pair) {
      const In *even = row(k), *odd = pair > 1 && k + 1 < count ? row(k + 1) : nullptr;
      for (ptrdiff_t p = begin; p < end; ++p)
        take_columns<M>(even, odd, panels.first(p), panels.width(p), panels.all,
                        to + (p - begin) * L * room + (at + k / pair) * panels.width(p));
    }
  }

  // c[r, l] (+)= sum_k a[k, l] b[r, k], where a is a panel of `width` lanes, c is dense.
  template <int N = int(vectors), typename Between>
  static void multiply(ptrdiff_t width, ptrdiff_t rows, ptrdiff_t units, const Unit* a, const Unit* b, ptrdiff_t b_row,
                       Real* c, bool accumulate, Between& between) {
    if constexpr (N > 1 && !M::contiguous_rows)
      if (width < N * lanes) return multiply<N - 1>(width, rows, units, a, b, b_row, c, accumulate, between);
    multiply_panel<M, 1, N>(rows, units, a, b, b_row, c, N * lanes, accumulate, between);
  }

  // `count` values to where they belong, added to what is there or not, rounded once.
  template <typename Out>
  static void write(const Real* from, ptrdiff_t count, Out* to, bool add) {
    ptrdiff_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const V x = V::load(from + i);
      store_narrow(to + i, add ? x + load_wide(to + i) : x);
    }
    for (; i < count; ++i) narrow(add ? from[i] + widen(to[i]) : from[i], to + i);
  }

  // A product as tasks. P says:
  //   rows, panels, units, chunk      its size; how many units a task sums up at a time
  //   share()                         packs what all tasks read, in parallel
  //   Own                             a thread's scratch
  //   prepare(own, task)              packs what only this task's chunk reads
  //   rows_of, row_stride, panel_of   where the units of a chunk are
  //   next(task), target(task, p)     what will be read next, and where a panel's sums will go
  //   write(task, p, sums)            puts them there
  struct Task {
    ptrdiff_t row, count, begin, end;  // rows [row, row + count) by panels [begin, end)
    ptrdiff_t first, some, calls;      // units [first, first + some) of them; register tiles that this takes
  };
  template <typename P>
  static void run(P& p, const LinearShape& shape, Tasks largest) {
    const Tasks tasks = Tasks::of(largest, p.rows, p.panels.count(), shape.products());
    const ptrdiff_t chunk = least(p.chunk, p.units), tile_rows = p.chunk < p.units ? tasks.panels : 1;
#pragma omp parallel num_threads(tasks.threads)
    {
      [[maybe_unused]] typename M::Region region;
      p.share();
      typename P::Own own(p, tasks);
      Buffer<Real> tiles(tasks.rows * L * tile_rows);
#pragma omp for collapse(2) schedule(dynamic, 1)
      for (ptrdiff_t row = 0; row < p.rows; row += tasks.rows)
        for (ptrdiff_t begin = 0; begin < p.panels.count(); begin += tasks.panels) {
          Task t = {row, least(tasks.rows, p.rows - row), begin, least(begin + tasks.panels, p.panels.count()), 0, 0,
                    0};
          for (; t.first < p.units; t.first += chunk) {
            t.some = least(chunk, p.units - t.first);
            const bool last = t.first + t.some == p.units;
            const ptrdiff_t in_panel = round_up(t.count, Tile<M>::rows) / Tile<M>::rows * (t.some / Tile<M>::chain + 1);
            t.calls = in_panel * (t.end - t.begin);
            p.prepare(own, t);
            struct {
              Ahead<false> read;
              Ahead<true> written;
              void operator()() { read(), written(); }
            } look;
            look.read = p.next(t, tasks);
            t.calls = in_panel;
            for (ptrdiff_t q = t.begin; q < t.end; ++q) {
              Real* sums = tiles + (tile_rows > 1 ? q - t.begin : 0) * tasks.rows * L;
              if (last) look.written = p.target(t, q);
              multiply(p.panels.width(q), t.count, t.some, p.panel_of(own, t, q), p.rows_of(own, t), p.row_stride(),
                       sums, t.first > 0, look);
              if (last) p.write(t, q, sums);
            }
          }
        }
    }
  }

  struct Forward {
    const LinearForward& f;
    const LinearShape& s = f.shape;
    const Rows weight = {static_cast<const In*>(f.weight), f.weight_stride, s.width};
    const ptrdiff_t rows = s.outputs, units = units_of(s.width), chunk = units;
    const Panels panels = {s.rows};
    Buffer<Unit> turned{panels.stored() * units};

    struct Own {
      Buffer<Unit> rows;
      const Unit* at = nullptr;
      Own(const Forward& p, Tasks tasks) : rows(p.weight.room(tasks.rows)) {}
    };
    void share() {
#pragma omp for schedule(static)
      for (ptrdiff_t first = 0; first < panels.stored(); first += lanes) {
        const ptrdiff_t p = first / L;
        const In* row[lanes];
        for (ptrdiff_t i = 0; i < lanes; ++i)
          row[i] = first + i < s.rows ? static_cast<const In*>(f.x) + (first + i) * f.x_stride : nullptr;
        turn_rows<M>(row, s.width, turned + p * L * units + first % L, panels.width(p));
      }
    }
    void prepare(Own& own, const Task& t) const { own.at = weight.units(t.row, t.count, own.rows); }
    const Unit* rows_of(const Own& own, const Task&) const { return own.at; }
    ptrdiff_t row_stride() const { return weight.unit_stride(); }
    const Unit* panel_of(const Own&, const Task&, ptrdiff_t p) { return turned + p * L * units; }
    Ahead<false> next(const Task& t, Tasks tasks) const {
      const ptrdiff_t row = t.row + tasks.rows * tasks.threads;
      if (row >= rows) return {};
      return Ahead<false>::of(weight.at(row), least(tasks.rows, rows - row), weight.stride, s.width, t.calls);
    }
    In* y(const Task& t, ptrdiff_t p) const { return static_cast<In*>(f.y) + panels.first(p) * f.y_stride + t.row; }
    Ahead<true> target(const Task& t, ptrdiff_t p) const {
      return Ahead<true>::of(y(t, p), panels.used(p), f.y_stride, t.count, t.calls);
    }
    // A tile has a row per output and a lane per row of x: it is turned.
    void write(const Task& t, ptrdiff_t p, const Real* sums) const {
      const In* bias = static_cast<const In*>(f.bias);
      for (ptrdiff_t o = 0; o < t.count; o += lanes) {
        const ptrdiff_t some = least(lanes, t.count - o);
        In room[lanes] = {};
        const V shift = bias ? load_wide(columns_of(bias + t.row, o, lanes, t.count, room)) : V::set(0);
        for (ptrdiff_t l = 0; l < panels.used(p); l += lanes) {
          V x[lanes];
          for (ptrdiff_t i = 0; i < lanes; ++i)
            x[i] = i < some ? V::load(sums + (o + i) * panels.width(p) + l) : V::set(0);
          V::transpose(x);
          for (ptrdiff_t i = 0; i < least(lanes, panels.used(p) - l); ++i) {
            Real row[lanes];
            (x[i] + shift).store(row);
            LinearKernel::write(row, some, y(t, p) + (l + i) * f.y_stride + o, f.add);
          }
        }
      }
    }
  };

  struct GradInput {
    const LinearGradInput& g;
    const LinearShape& s = g.shape;
    const Rows dy = {static_cast<const In*>(g.dy), g.dy_stride, s.outputs};
    const ptrdiff_t rows = s.rows, units = units_of(s.outputs), chunk = 2 * Tile<M>::chain;
    const Panels panels = {s.width};
    Buffer<Unit> copied{dy.room(s.rows)};

    struct Own {
      Buffer<Unit> packed;
      Own(const GradInput& p, Tasks tasks) : packed(tasks.panels * L * p.chunk) {}
    };
    void share() {
      if (dy.in_place()) return;
#pragma omp for schedule(static)
      for (ptrdiff_t r = 0; r < s.rows; ++r) dy.units(r, 1, copied + r * dy.unit_stride());
    }
    const In* weight(ptrdiff_t output, ptrdiff_t input) const {
      return static_cast<const In*>(g.weight) + output * g.weight_stride + input;
    }
    ptrdiff_t outputs_from(const Task& t) const { return least(t.some * pair, s.outputs - t.first * pair); }
    void prepare(Own& own, const Task& t) const {
      take_panels([&](ptrdiff_t o) { return weight(t.first * pair + o, 0); }, outputs_from(t), panels, t.begin, t.end,
                  own.packed, chunk, 0);
    }
    const Unit* rows_of(const Own&, const Task& t) {
      const Unit* all = dy.in_place() ? dy.units(0, 0, nullptr) : static_cast<const Unit*>(copied);
      return all + t.row * row_stride() + t.first;
    }
    ptrdiff_t row_stride() const { return dy.unit_stride(); }
    const Unit* panel_of(Own& own, const Task& t, ptrdiff_t p) const { return own.packed + (p - t.begin) * L * chunk; }
    Ahead<false> next(const Task& t, Tasks) const {
      const ptrdiff_t output = (t.first + t.some) * pair, inputs = least(t.end * L, s.width) - panels.first(t.begin);
      if (output >= s.outputs) return {};
      return Ahead<false>::of(weight(output, panels.first(t.begin)), least(chunk * pair, s.outputs - output),
                              g.weight_stride, inputs, t.calls);
    }
    In* dx(const Task& t, ptrdiff_t p) const { return static_cast<In*>(g.dx) + t.row * g.dx_stride + panels.first(p); }
    Ahead<true> target(const Task& t, ptrdiff_t p) const {
      return Ahead<true>::of(dx(t, p), t.count, g.dx_stride, panels.used(p), t.calls);
    }
    void write(const Task& t, ptrdiff_t p, const Real* sums) const {
      for (ptrdiff_t r = 0; r < t.count; ++r)
        LinearKernel::write(sums + r * panels.width(p), panels.used(p), dx(t, p) + r * g.dx_stride, g.add);
    }
  };

  // Out: the element type of dW. Over rows [from, from + count) of x and dy.
  template <typename Out>
  struct GradWeight {
    const LinearGradWeight& g;
    Out* dw;
    const ptrdiff_t from, count;
    const bool add;
    const LinearShape& s = g.shape;
    const ptrdiff_t rows = s.outputs, units = units_of(count), chunk = units;
    const Panels panels = {s.width};
    Buffer<Unit> columns{panels.stored() * units};

    struct Own {
      Buffer<Unit> turned;
      Own(const GradWeight& p, Tasks tasks) : turned(round_up(tasks.rows, lanes) * p.row_stride()) {}
    };
    const In* x(ptrdiff_t r) const { return static_cast<const In*>(g.x) + (from + r) * g.x_stride; }
    const In* dy(ptrdiff_t r) const { return static_cast<const In*>(g.dy) + (from + r) * g.dy_stride; }
    void share() {
      constexpr ptrdiff_t piece = 32;  // units
#pragma omp for schedule(static)
      for (ptrdiff_t u = 0; u < units; u += piece)
        take_panels([&](ptrdiff_t r) { return x(u * pair + r); }, least(piece * pair, count - u * pair), panels, 0,
                    panels.count(), columns, units, u);
    }
    void prepare(Own& own, const Task& t) const {
      turn_columns<M, In>([&](ptrdiff_t r) { return dy(r); }, count, t.row, t.count, s.outputs, own.turned,
                          row_stride());
    }
    const Unit* rows_of(Own& own, const Task&) const { return own.turned; }
    ptrdiff_t row_stride() const { return row_room(units); }
    const Unit* panel_of(const Own&, const Task&, ptrdiff_t p) { return columns + p * L * units; }
    Ahead<false> next(const Task& t, Tasks tasks) const {
      const ptrdiff_t output = t.row + tasks.rows * tasks.threads;
      if (output >= s.outputs) return {};
      return Ahead<false>::of(dy(0) + output, count, g.dy_stride, least(tasks.rows, s.outputs - output), t.calls);
    }
    Out* target_row(const Task& t, ptrdiff_t p) const { return dw + t.row * s.width + panels.first(p); }
    Ahead<true> target(const Task& t, ptrdiff_t p) const {
      return Ahead<true>::of(target_row(t, p), t.count, s.width, panels.used(p), t.calls);
    }
    void write(const Task& t, ptrdiff_t p, const Real* sums) const {
      for (ptrdiff_t r = 0; r < t.count; ++r)
        LinearKernel::write(sums + r * panels.width(p), panels.used(p), target_row(t, p) + r * s.width, add);
    }
  };

  static void forward(const LinearForward& f) {
    Forward p{f};
    run(p, f.shape, {rows_in_cache(p.units), p.panels.count(), f.shape.threads});
  }

  // A chunk of a task's panels, of its rows, and its sums are to lie in the second cache together.
  static void grad_input(const LinearGradInput& g) {
    GradInput p{g};
    run(p, g.shape, {192, (96 + L - 1) / L, g.shape.threads});
  }

  // The panels of x are packed for this many rows at a time.
  static constexpr ptrdiff_t most_rows = 4096;

  static void grad_weight(const LinearGradWeight& g) {
    if (!g.round || sizeof(In) == sizeof(Real)) return sum_weight(g, static_cast<Real*>(g.dw), g.add);
    if (g.shape.rows <= most_rows) return sum_weight(g, static_cast<In*>(g.dw), g.add);
    const ptrdiff_t size = g.shape.outputs * g.shape.width;
    Buffer<Real> whole(size);
    sum_weight(g, static_cast<Real*>(whole), false);
    write(whole, size, static_cast<In*>(g.dw), g.add);
  }
  template <typename Out>
  static void sum_weight(const LinearGradWeight& g, Out* dw, bool add) {
    for (ptrdiff_t from = 0; from < g.shape.rows; from += most_rows) {
      GradWeight<Out> p{g, dw, from, least(most_rows, g.shape.rows - from), add || from > 0};
      run(p, g.shape, {rows_in_cache(p.units), p.panels.count(), g.shape.threads});
    }
  }
};

// A dtype's kernel under this instruction set.
template <typename Run>
inline void with_linear_kernel(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32: run(LinearKernel<Plain<Float>, float>()); break;
#if defined(FASTRL_TILES)
    case Dtype::bfloat16: run(LinearKernel<Tiled, Bf16>()); break;
#elif defined(__AVX512BF16__)
    case Dtype::bfloat16: run(LinearKernel<Paired, Bf16>()); break;
#else
    case Dtype::bfloat16: run(LinearKernel<Plain<Float>, Bf16>()); break;
#endif
    case Dtype::float64:
    case Dtype::float16: break;  // refused in Python
  }
}

inline void linear_forward(const LinearForward& f) {
  with_linear_kernel(f.shape.dtype, [&](auto kernel) { kernel.forward(f); });
}
inline void linear_grad_input(const LinearGradInput& g) {
  with_linear_kernel(g.shape.dtype, [&](auto kernel) { kernel.grad_input(g); });
}
inline void linear_grad_weight(const LinearGradWeight& g) {
  with_linear_kernel(g.shape.dtype, [&](auto kernel) { kernel.grad_weight(g); });
}

}  // namespace FASTRL_ISA
