// SPDX-License-Identifier: MIT
// Average pooling, both passes: linear, so done an axis at a time, and each is the other read backwards.
// Of the floor, one tensor read and one written once, a core with AVX-512 does 7-21 GB/s forward and 10-19
// backward (10x10 planes: 6 and 4), channels_last 9-27 and 10-15; a copy makes 16 in memory, 70 in cache.
//   rows      (NCHW and any strides) Forward adds up the rows of a window in a line of scratch between zeros,
//             then the columns, and divides. Backward adds up the rows of the gradient that reach an input
//             row, scaled, in such a line, then hands the sums out along the width; input rows below the same
//             windows are copies.
//   channels  (channels_last) The channels of a pixel in the lanes, the cells of its window in turn; backward
//             the windows over a pixel in turn.
//
// Forward divides a sum once. Backward multiplies by the reciprocals of what a window counts along the height
// and depth, and along the width.
#ifndef FASTCONV_ISA

#include "core/naive.h"
#include "cpu/parallel.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/avg_pool_rows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"
#include "cpu/pool_rows.inl"

namespace {

constexpr int64_t kLines = 8;  // at a time, so that no line is read right after it is written

// One axis of the windows.
struct Axis {
  int64_t size, kernel, stride, padding, out;
  DivideBy by;

  // Input positions of window o.
  Span cells(int64_t o) const {
    const int64_t start = o * stride - padding, begin = std::max<int64_t>(start, 0);
    return {begin, std::max<int64_t>(std::min(start + kernel, size) - begin, 0)};
  }
  // Windows over input position i.
  Span windows(int64_t i) const {
    const int64_t first = i + padding - kernel < 0 ? 0 : (i + padding - kernel) / stride + 1;
    return {first, std::max<int64_t>(std::min((i + padding) / stride, out - 1) - first + 1, 0)};
  }
  // The same for each of them.
  const Span* all_windows(Shelf& shelf) const {
    Span* all = shelf.take<Span>(size);
    for (int64_t i = 0; i < size; ++i) all[i] = windows(i);
    return all;
  }
  // What window o contributes to the divisor.
  double counted(int64_t o) const {
    return by == DivideBy::number ? 1
                                  : double(naive::counted(by, o * stride - padding, kernel, padding, size));
  }
  // Its reciprocal for each window, and behind the last for a vector more.
  template <class T>
  const T* shares(Shelf& shelf) const {
    T* share = shelf.take<T>(out + kLanes<T>);
    for (int64_t o = 0; o < out + kLanes<T>; ++o)
      share[o] = static_cast<T>(1 / counted(std::min(o, out - 1)));
    return share;
  }
};

struct Axes {
  Axis d, h, w;
  double divisor;

  explicit Axes(const PoolArgs& a)
      : d{a.D, k(a).d, a.window.stride.d, a.window.padding.d, a.window.out.d, a.divide_by},
        h{a.H, k(a).h, a.window.stride.h, a.window.padding.h, a.window.out.h, a.divide_by},
        w{a.W, k(a).w, a.window.stride.w, a.window.padding.w, a.window.out.w, a.divide_by},
        divisor(a.divide_by == DivideBy::number ? double(a.divisor) : 1) {}
  int64_t outputs() const { return d.out + h.out + w.out; }

 private:
  static const Extent3& k(const PoolArgs& a) { return a.window.kernel; }
};

int64_t grain_of(double us) { return static_cast<int64_t>(10 / us); }

// Bytes of a Shelf for so many elements, in up to eight pieces.
template <class T>
int64_t shelf_bytes(int64_t elements) {
  return elements * int64_t(sizeof(T)) + 8 * 64;
}

// Calls body(first, h, count) for up to kLines rows of a plane at a time; `first` is the plane's row 0.
template <class Body>
[[gnu::always_inline]] inline void each_rows(int64_t begin, int64_t end, int64_t C, int64_t D, int64_t H,
                                             const Body& body) {
  for (int64_t count; begin < end; begin += count) {
    const int64_t h = begin % H;
    count = std::min({kLines, H - h, end - begin});
    body(naive::unflatten(begin - h, C, D, H, 1), h, count);
  }
}

// --- rows

// Stores the first `count` lanes `step` elements apart.
template <class T, class Element>
[[gnu::always_inline]] inline void put_some(Vector<T> v, Element* to, int64_t step, int64_t count) {
  if (step == 1) return store_lanes<T>(v, to, count);
  for (int i = 0; i < kLanes<T> && i < count; ++i) to[i * step] = Element(v[i]);
}

// Writes to `line` the sums of `count` columns over rows(add), which calls add(row, factor) for each row, and
// scales them where there is a `scale`; the vector that holds the last column is zero behind it.
template <class T, class Element, class Rows>
[[gnu::always_inline]] inline void add_rows(int64_t count, int64_t step, const T* scale, T* line,
                                            const Rows& rows) {
  if (step == 1) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      Vector<T> sum{};
      rows([&](const Element* row, T factor)
               [[gnu::always_inline]] { sum += load_lanes<T>(row + i, count - i) * factor; });
      store<T>(scale ? sum * load<T>(scale + i) : sum, line + i);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    T sum = 0;
    rows([&](const Element* row, T factor) { sum += T(row[i * step]) * factor; });
    line[i] = scale ? sum * scale[i] : sum;
  }
}

template <class Element>
void forward_rows(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>;
  const Axes axes(a);
  const int64_t Q = axes.w.out, K = axes.w.kernel, S = axes.w.stride;
  const int64_t length = std::max(a.W + axes.w.padding, (Q - 1) * S + K) + (S + 1) * lanes;
  const double row_us = double(a.D * a.H * a.W) / double(axes.d.out * axes.h.out) * kElementUs + 0.01;
  parallel_ranges(a.N * a.C * axes.d.out * axes.h.out, grain_of(row_us), [&](int64_t begin, int64_t end) {
    Shelf shelf(shelf_bytes<T>(kLines * length + Q + lanes));
    T *lines = shelf.take<T>(kLines * length), *counted = shelf.take<T>(Q + lanes);
    std::fill(lines, lines + kLines * length, T(0));
    for (int64_t q = 0; q < Q + lanes; ++q) counted[q] = static_cast<T>(axes.w.counted(std::min(q, Q - 1)));
    each_rows(begin, end, a.C, axes.d.out, axes.h.out,
              [&](const naive::Index5& at, int64_t p, int64_t count) {
                const Span ds = axes.d.cells(at.d);
                const Element* x = &naive::at<Element>(a.x, at.n, at.c, ds.begin, 0, 0);
                for (int64_t i = 0; i < count; ++i) {
                  const Span hs = axes.h.cells(p + i);
                  const Element* first = x + hs.begin * a.x.h;
                  add_rows<T, Element>(a.W, a.x.w, nullptr, lines + i * length + axes.w.padding,
                                       [&](auto add) [[gnu::always_inline]] {
                                         for (int64_t d = 0; d < ds.size; ++d)
                                           for (int64_t h = 0; h < hs.size; ++h)
                                             add(first + d * a.x.d + h * a.x.h, T(1));
                                       });
                }
                Element* y = &naive::at_mut<Element>(a.y, at.n, at.c, at.d, p, 0);
                for (int64_t i = 0; i < count; ++i, y += a.y.h) {
                  const T down = static_cast<T>(axes.divisor * axes.d.counted(at.d) * axes.h.counted(p + i));
                  for (int64_t q = 0; q < Q; q += lanes) {
                    const T* cells = lines + i * length + q * S;
                    Vector<T> sum{};
                    if (S == 1) {
                      for (int64_t s = 0; s < K; ++s) sum += load<T>(cells + s);
                    } else if (S == 2) {
                      for (int64_t s = 0; s < K; s += 2) {
                        const Vector<T> low = load<T>(cells + s), high = load<T>(cells + s + lanes);
                        sum += alternate<T, false>(low, high);
                        if (s + 1 < K) sum += alternate<T, true>(low, high);
                      }
                    } else {
                      for (int64_t l = 0; l < std::min(lanes, Q - q); ++l)
                        for (int64_t s = 0; s < K; ++s) sum[l] += cells[l * S + s];
                    }
                    put_some<T>(sum / (load<T>(counted + q) * down), y + q * a.y.w, a.y.w, Q - q);
                  }
                }
              });
  });
}

// Windows over input positions j * stride + f: j + low ... j + high.
struct Reach {
  int64_t low, high;

  Reach(const Axis& w, int64_t f) : high((f + w.padding) / w.stride) {
    const int64_t before = f + w.padding - w.kernel + 1;  // of the first window, in input positions
    low = before > 0 ? (before + w.stride - 1) / w.stride : -(-before / w.stride);
  }
};

// The sums of the windows over the cells of a row; `reaches` has those of each f.
template <class T, class Element>
[[gnu::always_inline]] inline void spread(const Axis& w, const Reach* reaches, const T* line, Element* x,
                                          int64_t step) {
  constexpr int64_t lanes = kLanes<T>;
  const auto sum = [&](const Reach& reach, int64_t j) [[gnu::always_inline]] {
    Vector<T> total{};
    for (int64_t s = reach.low; s <= reach.high; ++s) total += load<T>(line + j + s);
    return total;
  };
  if (w.stride == 1) {
    for (int64_t j = 0; j < w.size; j += lanes)
      put_some<T>(sum(reaches[0], j), x + j * step, step, w.size - j);
  } else if (w.stride == 2) {
    for (int64_t i = 0; i < w.size; i += 2 * lanes) {
      const Vector<T> low = sum(reaches[0], i / 2), high = sum(reaches[1], i / 2);
      put_some<T>(interleave<T, false>(low, high), x + i * step, step, w.size - i);
      put_some<T>(interleave<T, true>(low, high), x + (i + lanes) * step, step, w.size - i - lanes);
    }
  } else {
    for (int64_t f = 0; f < std::min(w.stride, w.size); ++f)
      for (int64_t j = 0; j * w.stride + f < w.size; ++j) {
        T total = 0;
        for (int64_t s = reaches[f].low; s <= reaches[f].high; ++s) total += line[j + s];
        x[(j * w.stride + f) * step] = Element(total);
      }
  }
}

template <class Element>
void backward_rows(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>;
  const Axes axes(a);
  const int64_t Q = axes.w.out, S = axes.w.stride;
  const int64_t front = -std::min<int64_t>(Reach(axes.w, 0).low, 0);
  const int64_t length = front + std::max(Q, ceil_div(a.W, S)) + Reach(axes.w, S - 1).high + 2 * lanes;
  const double row_us = double(a.W) * kElementUs + 0.01;
  parallel_ranges(a.N * a.C * a.D * a.H, grain_of(row_us), [&](int64_t begin, int64_t end) {
    const int64_t phases = std::min(S, std::max<int64_t>(a.W, 2));
    Shelf shelf(shelf_bytes<T>(kLines * length + axes.outputs() + 3 * lanes) + a.H * int64_t(sizeof(Span)) +
                phases * int64_t(sizeof(Reach)));
    T* lines = shelf.take<T>(kLines * length);
    const T *share_d = axes.d.shares<T>(shelf), *share_h = axes.h.shares<T>(shelf),
            *share_w = axes.w.shares<T>(shelf);
    const T share = static_cast<T>(1 / axes.divisor);
    const Span* windows = axes.h.all_windows(shelf);
    Reach* reaches = shelf.take<Reach>(phases);
    for (int64_t f = 0; f < phases; ++f) reaches[f] = Reach(axes.w, f);
    std::fill(lines, lines + kLines * length, T(0));
    each_rows(begin, end, a.C, a.D, a.H, [&](const naive::Index5& at, int64_t h, int64_t count) {
      const Span zs = axes.d.windows(at.d);
      const Element* y = &naive::at<Element>(a.y, at.n, at.c, zs.begin, 0, 0);
      bool repeats[kLines];  // the row above, whose windows are the same
      Span above{-1, -1};
      for (int64_t i = 0; i < count; ++i) {
        const Span ps = windows[h + i];
        repeats[i] = ps.begin == above.begin && ps.size == above.size && a.x.w == 1;
        above = ps;
        if (repeats[i]) continue;
        T* line = lines + i * length + front;
        add_rows<T, Element>(Q, a.y.w, share_w, line, [&](auto add) [[gnu::always_inline]] {
          for (int64_t z = zs.begin; z < zs.begin + zs.size; ++z)
            for (int64_t p = ps.begin; p < ps.begin + ps.size; ++p)
              add(y + (z - zs.begin) * a.y.d + p * a.y.h, share * share_d[z] * share_h[p]);
        });
      }
      Element* x = &naive::at_mut<Element>(a.x, at.n, at.c, at.d, h, 0);
      for (int64_t i = 0; i < count; ++i, x += a.x.h) {
        if (repeats[i]) {
          std::memcpy(x, x - a.x.h, a.W * sizeof(Element));
        } else {
          spread<T>(axes.w, reaches, lines + i * length + front, x, a.x.w);
        }
      }
    });
  });
}

// --- channels

// Calls body(c, vectors) for vectors of channels, four at a time as long as there are so many; the last may
// overlap the one before.
template <int64_t lanes, class Body>
[[gnu::always_inline]] inline void each_channels(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * lanes <= C; c += 4 * lanes) body(c, std::integral_constant<int, 4>{});
  for (; c < C; c += lanes) body(std::clamp<int64_t>(C - lanes, 0, c), std::integral_constant<int, 1>{});
}

template <class Element>
void forward_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>;
  const Axes axes(a);
  const View x_view = a.x, y_view = a.y;
  const int64_t C = a.C;
  const double row_us = double(C * a.D * a.H * a.W) / double(axes.d.out * axes.h.out) * kElementUs + 0.02;
  const auto rows = [&, x_view, y_view, C](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const naive::Index5 at = naive::unflatten(i, 1, axes.d.out, axes.h.out, 1);
      const Span ds = axes.d.cells(at.d), hs = axes.h.cells(at.h);
      const double down = axes.divisor * axes.d.counted(at.d) * axes.h.counted(at.h);
      for (int64_t q = 0; q < axes.w.out; ++q) {
        const Span ws = axes.w.cells(q);
        const T divisor = static_cast<T>(down * axes.w.counted(q));
        const Element* x = &naive::at<Element>(x_view, at.n, 0, ds.begin, hs.begin, ws.begin);
        Element* y = &naive::at_mut<Element>(y_view, at.n, 0, at.d, at.h, q);
        each_channels<lanes>(C, [&](int64_t c, auto vectors) [[gnu::always_inline]] {
          Vector<T> sum[vectors] = {};
          for (int64_t d = 0; d < ds.size; ++d)
            for (int64_t h = 0; h < hs.size; ++h) {
              const Element* from = x + d * x_view.d + h * x_view.h + c;
              for (int64_t w = 0; w < ws.size; ++w, from += x_view.w)
                for (int i = 0; i < vectors(); ++i)
                  sum[i] += load_lanes<T>(from + i * lanes, vectors > 1 ? lanes : C - c);
            }
          for (int i = 0; i < vectors(); ++i)
            store_lanes<T>(sum[i] / divisor, y + c + i * lanes, vectors > 1 ? lanes : C - c);
        });
      }
    }
  };
  parallel_ranges(a.N * axes.d.out * axes.h.out, grain_of(row_us), rows);
}

template <class Element>
void backward_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>;
  const Axes axes(a);
  const View x_view = a.x, y_view = a.y;
  const int64_t C = a.C, W = a.W;
  const double row_us = double(W * C) * kElementUs + 0.02;
  parallel_ranges(a.N * a.D * a.H, grain_of(row_us), [&, x_view, y_view, C, W](int64_t begin, int64_t end) {
    Shelf shelf(shelf_bytes<T>(axes.outputs() + 3 * lanes) + W * int64_t(sizeof(Span)));
    const T *share_d = axes.d.shares<T>(shelf), *share_h = axes.h.shares<T>(shelf),
            *share_w = axes.w.shares<T>(shelf);
    const T share = static_cast<T>(1 / axes.divisor);
    const Span* windows = axes.w.all_windows(shelf);
    for (int64_t i = begin; i < end; ++i) {
      const naive::Index5 at = naive::unflatten(i, 1, a.D, a.H, 1);
      const Span zs = axes.d.windows(at.d), ps = axes.h.windows(at.h);
      const Element* y = &naive::at<Element>(y_view, at.n, 0, zs.begin, ps.begin, 0);
      Element* x = &naive::at_mut<Element>(x_view, at.n, 0, at.d, at.h, 0);
      for (int64_t w = 0; w < W; ++w, x += x_view.w) {
        const Span qs = windows[w];
        const Element* first = y + qs.begin * y_view.w;
        each_channels<lanes>(C, [&](int64_t c, auto vectors) [[gnu::always_inline]] {
          Vector<T> sum[vectors] = {};
          for (int64_t z = 0; z < zs.size; ++z)
            for (int64_t p = 0; p < ps.size; ++p) {
              const Element* from = first + z * y_view.d + p * y_view.h + c;
              const T down = share * share_d[zs.begin + z] * share_h[ps.begin + p];
              for (int64_t q = 0; q < qs.size; ++q, from += y_view.w) {
                const T factor = down * share_w[qs.begin + q];
                for (int i = 0; i < vectors(); ++i)
                  sum[i] += load_lanes<T>(from + i * lanes, vectors > 1 ? lanes : C - c) * factor;
              }
            }
          for (int i = 0; i < vectors(); ++i)
            store_lanes<T>(sum[i], x + c + i * lanes, vectors > 1 ? lanes : C - c);
        });
      }
    }
  });
}

bool by_channels(const PoolArgs& a) { return a.C > 1 && a.x.c == 1 && a.y.c == 1; }

}  // namespace

void avg_pool_rows(const PoolArgs& a, void*, void*) {
  if (a.N * a.C * a.window.out.cells() == 0) return;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    by_channels(a) ? forward_channels<Element>(a) : forward_rows<Element>(a);
  });
}

void avg_pool_backward_rows(const PoolArgs& a, void*, void*) {
  if (a.N * a.C * a.D * a.H * a.W == 0) return;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    by_channels(a) ? backward_channels<Element>(a) : backward_rows<Element>(a);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
