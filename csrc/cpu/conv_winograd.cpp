// SPDX-License-Identifier: MIT
// 3x3 convolution of stride one by Winograd's minimal filtering F(2x2, 3x3): 16 products instead of 36 for
// each 2x2 outputs, channel and output channel (Lavin and Gray, arXiv 1509.09308, section 4).
//
//   U[e][k][c] = (G g G^T)[e]    once a call, packed in tiles of kRows output channels, for each e of 4x4
//   V[e][c][t] = (B^T d B)[e]    of the 4x4 inputs d of tile t
//   y[k][t]    = A^T (sum over c of U[e][k][c] V[e][c][t]) A,  16 GEMMs of K x C x tiles
//
// A task is as many tiles as the GEMM's micro-kernel has columns, whatever rows or images they lie in, so
// that only the last task has idle lanes. Each row of tiles is read, transformed and sorted in registers, and
// so are the products. dgrad is the same with the filter turned and other padding.
//
// Sums of sums lose what is far smaller than their largest term, and make NaN of infinities. So where an
// input or a weight is not finite or above 2^50 (2^400 in float64) the slab row does the call.
//
// The floor is 16/36 of the multiply-adds of a direct convolution at the fused multiply-add rate, 117
// GFLOP/s in float32 on the Zen 4 core measured. Reached, in those of the direct one, of which 263 are the
// floor's: 217 for 128 channels of 56x56, 175 for 32 to 64 of 14x14, 134 for 512 of eight 7x7, where a fifth
// of the time is the filter's.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_winograd.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

void conv_fprop_slab(const ConvArgs& a, void* workspace, void*);
void conv_dgrad_slab(const ConvArgs& a, void* workspace, void*);

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

namespace {

constexpr int kProducts = 16;  // of a tile, a channel and an output channel
// Bytes of V up to which products of few output channels at a time, which stay in the first cache, are best.
constexpr int64_t kSmallBytes = 1 << 18;
constexpr int64_t kManyOutputs = 32 * kRows, kDepth = 128, kEnoughTasks = 16;

constexpr int64_t kWidth = 48;  // tiles of a task: a multiple of the micro-kernel's columns

// y[k](p, q) = sum over c, r, s of x[c](p + low_h + r, q + low_w + s) filter[k][c](r, s)
template <class Element>
struct Correlation {
  int64_t images, rows, cols, outputs;  // of y
  int64_t channels, height, width;      // of x
  int64_t low_h, low_w;
  const Element* x;
  View x_view;
  Element* y;
  View y_view;
  const Element* filter;
  int64_t filter_output, filter_channel, filter_row, filter_col;  // strides
  const Element* bias;                                            // or null
  Act act;
};

// Magnitudes as integers, which order as the numbers do: NaN and infinity are the largest.
template <class T>
struct Magnitude {
  Vector<Lane<T>> largest{};

  void meet(Vector<T> v) {
    const Vector<Lane<T>> bits = (Vector<Lane<T>>)v & std::numeric_limits<Lane<T>>::max();
    largest = bits > largest ? bits : largest;
  }
  // Whether all is within reach of the transforms.
  bool is_moderate() const {
    constexpr T most = sizeof(T) == 8 ? T(0x1p400) : T(0x1p50);
    const auto limit = (Vector<Lane<T>>)(Vector<T>{} + most);
    bool all = true;
    for (int i = 0; i < kLanes<T>; ++i) all &= largest[i] < limit[i];
    return all;
  }
};

// out[e][channel][kRows] of kRows output channels, from `first`; false where a weight is too large.
template <class T, class Element>
bool transform_filter(const Correlation<Element>& c, int64_t first, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t live = std::min<int64_t>(kRows, c.outputs - first), next = c.channels * kRows;
  Magnitude<T> magnitude;
  T taps[9][lanes * kRows] = {};  // of `lanes` channels
  for (int64_t channel = 0; channel < c.channels; channel += lanes, out += lanes * kRows) {
    const int64_t count = std::min(lanes, c.channels - channel);
    for (int64_t i = 0; i < live; ++i)
      for (int64_t j = 0; j < count; ++j) {
        const Element* const from =
            c.filter + (first + i) * c.filter_output + (channel + j) * c.filter_channel;
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s)
            taps[3 * r + s][j * kRows + i] = T(from[r * c.filter_row + s * c.filter_col]);
      }
    for (int64_t f = 0; f < count * kRows; f += lanes) {
      Vector<T> rows[4][3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        const Vector<T> a = load<T>(taps[s] + f), b = load<T>(taps[3 + s] + f), d = load<T>(taps[6 + s] + f);
        magnitude.meet(a), magnitude.meet(b), magnitude.meet(d);
        rows[0][s] = a, rows[1][s] = (a + d + b) / 2, rows[2][s] = (a + d - b) / 2, rows[3][s] = d;
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vector<T> a = rows[r][0], b = rows[r][1], d = rows[r][2];
        const Vector<T> row[] = {a, (a + d + b) / 2, (a + d - b) / 2, d};
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) store_some<T>(row[s], out + (4 * r + s) * next + f, count * kRows - f);
      }
    }
  }
  return magnitude.is_moderate();
}

// Tiles beside each other, of which a vector holds what they read. A task is up to kWidth tiles in the order
// of images, rows and columns: runs, the first of which may start and the last end within a row of tiles.
struct Run {
  int64_t image, row, col, count;  // the first tile, and how many
  int64_t slot;                    // of the first among the task's
};
template <class T>
struct Runs {
  Run run[kWidth];
  int count = 0;

  Runs(int64_t first, int64_t tiles, int64_t tile_rows, int64_t tile_cols) {
    constexpr int64_t most = kLanes<T> - 1;  // neighbours share two columns
    for (int64_t slot = 0; slot < tiles; slot += run[count++].count) {
      const int64_t row = (first + slot) / tile_cols, col = (first + slot) % tile_cols;
      run[count] = {row / tile_rows, row % tile_rows, col, std::min({most, tile_cols - col, tiles - slot}),
                    slot};
    }
  }
  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// A task's memory. A vector's rest may lie over what follows, which is written later; a gap of a vector ends
// each of the products, and keeps them out of the same sets of the cache.
template <class T>
struct Scratch {
  int64_t v_next, products_next;  // from one product to the next
  T *v, *products;

  Scratch(int64_t channels, int64_t outputs)
      : v_next(channels * kWidth + kLanes<T>), products_next(outputs * kWidth + kLanes<T>) {
    v = static_cast<T*>(thread_scratch(kProducts * (v_next + products_next) * int64_t(sizeof(T))));
    products = v + kProducts * v_next;
  }
};

// Lanes first, first + 2, ... of a and b laid end to end; what is past them does not matter.
template <class T, int first>
[[gnu::always_inline]] inline Vector<T> every_other(Vector<T> a, Vector<T> b) {
  return every<T, first, 2>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// transform_input for one run; wide: it reads more than a vector of columns.
template <bool wide, class T, class Element>
[[gnu::always_inline]] inline void transform_run(const Correlation<Element>& c, const Run& run,
                                                 const Element* x, T* to, int64_t next,
                                                 Magnitude<T>& magnitude) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int parts = wide ? 2 : 1;
  const int64_t h = 2 * run.row + c.low_h, w = 2 * run.col + c.low_w;
  const Element* const from = x + run.image * c.x_view.n + h * c.x_view.h + w * c.x_view.w;
  Vector<T> d[4][parts];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < parts; ++j) {
      const int64_t begin = -w - j * lanes, end = c.width - w - j * lanes;
      Vector<T> part{};
      if (h + i >= 0 && h + i < c.height) {
        const Element* const at = from + i * c.x_view.h + j * lanes * c.x_view.w;
        if (c.x_view.w == 1)
          part = load_between<T>(at, begin, end);
        else
          for (int64_t l = std::max<int64_t>(begin, 0); l < std::min(end, lanes); ++l)
            part[l] = T(at[l * c.x_view.w]);
      }
      magnitude.meet(part);
      d[i][j] = part;
    }
#pragma GCC unroll 2
  for (int j = 0; j < parts; ++j) {
    const Vector<T> a = d[1][j], b = d[2][j];
    d[0][j] -= b, d[1][j] = a + b, d[2][j] = b - a, d[3][j] = a - d[3][j];
  }
  const auto put = [](Vector<T> v, T* at) { std::memcpy(at, &v, wide ? sizeof v : sizeof v / 2); };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * next) {
    const Vector<T> a = d[i][0], b = d[i][parts - 1];
    const Vector<T> v[] = {every_other<T, 0>(a, b), every_other<T, 1>(a, b), every_other<T, 2>(a, b),
                           every_other<T, 3>(a, b)};
    put(v[0] - v[2], to);
    put(v[1] + v[2], to + next);
    put(v[2] - v[1], to + 2 * next);
    put(v[1] - v[3], to + 3 * next);
  }
}

// v[e][slot] = (B^T d B)[e] of a channel, whose first image is x; e is `next` elements from the one before.
template <class T, class Element>
[[gnu::noinline]] void transform_input(const Correlation<Element>& c, const Runs<T>& runs, const Element* x,
                                       T* v, int64_t next, Magnitude<T>& magnitude) {
  for (const Run& run : runs)
    if (2 * run.count + 2 > kLanes<T>)
      transform_run<true>(c, run, x, v + run.slot, next, magnitude);
    else
      transform_run<false>(c, run, x, v + run.slot, next, magnitude);
}

// micro_kernel over a packed tile of the filter, for a run-time number of rows and vectors. Channels are
// added up in parts, so that rounding errors don't grow with all of them.
template <class T, int vectors, int rows = kRows>
void multiply_rows(int64_t count, int64_t depth, const T* u, const T* v, T* out) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<T, vectors, rows - 1>(count, depth, u, v, out);
  }
  for (int64_t k = 0; k < depth; k += kDepth)
    micro_kernel<T, rows, vectors>(std::min(kDepth, depth - k), u + k * kRows, 1, kRows, v + k * kWidth,
                                   kWidth, out, kWidth, k > 0);
}
template <class T, int most = kVectors>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const T* u, const T* v, T* out) {
  static_assert(kWidth % Simd<T>::kColumns == 0);
  if constexpr (most > 1) {
    if (vectors < most) return multiply<T, most - 1>(rows, vectors, depth, u, v, out);
  }
  multiply_rows<T, most>(rows, depth, u, v, out);
}

// Writes output channel k; products[e] are `next` elements apart.
template <class T, class Element>
[[gnu::noinline]] void transform_output(const Correlation<Element>& c, const Runs<T>& runs, int64_t k,
                                        const T* products, int64_t next) {
  constexpr int64_t lanes = kLanes<T>;
  const Vector<T> bias = c.bias ? Vector<T>{} + T(c.bias[k]) : Vector<T>{};
  const auto finish = [&](Vector<T> v) {
    if (c.bias) v += bias;
    return c.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v;
  };
  for (const Run& run : runs) {
    Element* const to =
        c.y + run.image * c.y_view.n + k * c.y_view.c + 2 * run.row * c.y_view.h + 2 * run.col;
    const int64_t count = std::min(2 * run.count, c.cols - 2 * run.col);
    const auto write = [&](Vector<T> even, Vector<T> odd, Element* row) {
      even = finish(even), odd = finish(odd);
      store_some<T>(interleave<T, false>(even, odd), row, count);
      if (count > lanes) store_some<T>(interleave<T, true>(even, odd), row + lanes, count - lanes);
    };
    Vector<T> low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* const m = products + j * next + run.slot;
      const Vector<T> b = load<T>(m + 4 * next), d = load<T>(m + 8 * next);
      low[j] = load<T>(m) + b + d, high[j] = b - d - load<T>(m + 12 * next);
    }
    write(low[0] + low[1] + low[2], low[1] - low[2] - low[3], to);
    if (2 * run.row + 1 < c.rows)
      write(high[0] + high[1] + high[2], high[1] - high[2] - high[3], to + c.y_view.h);
  }
}

// False where something was too large: what is written is then of no use.
template <class Element>
bool correlate(const Correlation<Element>& c, void* workspace) {
  using T = typename Compute<Element>::type;
  T* const u = static_cast<T*>(workspace);  // [tile of kRows outputs][e][channel][kRows]
  const int64_t output_tiles = (c.outputs + kRows - 1) / kRows, tile_size = kProducts * c.channels * kRows;
  std::atomic<bool> moderate{true};
  parallel_for(output_tiles, double(tile_size) * 1e-3, [&](int64_t tile) {
    if (!transform_filter<T>(c, tile * kRows, u + tile * tile_size)) moderate = false;
  });

  const int64_t tile_rows = (c.rows + 1) / 2, tile_cols = (c.cols + 1) / 2;
  const int64_t tiles = c.images * tile_rows * tile_cols;
  const bool is_small = kProducts * c.channels * kWidth * int64_t(sizeof(T)) <= kSmallBytes;
  const int64_t outputs = is_small ? kRows : std::min(kManyOutputs, output_tiles * kRows);
  // Few blocks of tiles: tasks share the outputs of each, and transform its input for themselves.
  const int64_t blocks = (tiles + kWidth - 1) / kWidth;
  const int64_t share = blocks < kEnoughTasks ? kManyOutputs : output_tiles * kRows;
  const int64_t shares = (c.outputs + share - 1) / std::max<int64_t>(1, share);
  const double task_us = macs_us(double(kProducts * kWidth) * double(c.channels) * double(share + 8));
  parallel_for(blocks * shares, task_us, [&](int64_t task) {
    if (!moderate.load(std::memory_order_relaxed)) return;
    const int64_t begin = task % blocks * kWidth, size = std::min(kWidth, tiles - begin);
    const Runs<T> runs(begin, size, tile_rows, tile_cols);
    const Scratch<T> s(c.channels, outputs);
    Magnitude<T> magnitude;
    for (int64_t channel = 0; channel < c.channels; ++channel)
      transform_input<T>(c, runs, c.x + channel * c.x_view.c, s.v + channel * kWidth, s.v_next, magnitude);
    if (!magnitude.is_moderate()) moderate = false;
    const int64_t end = std::min(c.outputs, (task / blocks + 1) * share);
    for (int64_t first = task / blocks * share; first < end; first += outputs) {
      const int64_t count = std::min(outputs, end - first);
      for (int e = 0; e < kProducts; ++e)
        for (int64_t k = 0; k < count; k += kRows)
          for (int64_t f = 0; f < size; f += Simd<T>::kColumns)
            multiply<T>(std::min<int64_t>(kRows, count - k), (size - f + kLanes<T> - 1) / kLanes<T>,
                        c.channels, u + (first + k) / kRows * tile_size + e * c.channels * kRows,
                        s.v + e * s.v_next + f, s.products + e * s.products_next + k * kWidth + f);
      for (int64_t k = 0; k < count; ++k)
        transform_output<T>(c, runs, first + k, s.products + k * kWidth, s.products_next);
    }
  });
  return moderate;
}

template <class Element>
bool fprop(const ConvArgs& a, void* workspace) {
  const ConvShape& s = a.shape;
  bool moderate = true;
  for (int64_t group = 0; group < s.groups && moderate; ++group) {
    const int64_t k = group * s.group_k(), c = group * s.group_c();
    const auto* bias = static_cast<const Element*>(a.epilogue.bias);
    moderate = correlate<Element>({s.N,
                                   s.P,
                                   s.Q,
                                   s.group_k(),
                                   s.group_c(),
                                   s.H,
                                   s.W,
                                   -s.padding.h,
                                   -s.padding.w,
                                   static_cast<const Element*>(a.x.data) + c * a.x.c,
                                   a.x,
                                   static_cast<Element*>(a.y.data) + k * a.y.c,
                                   a.y,
                                   static_cast<const Element*>(a.w.data) + k * a.w.n,
                                   a.w.n,
                                   a.w.c,
                                   a.w.h,
                                   a.w.w,
                                   bias ? bias + k : nullptr,
                                   a.epilogue.act},
                                  workspace);
  }
  return moderate;
}

template <class Element>
bool dgrad(const ConvArgs& a, void* workspace) {
  const ConvShape& s = a.shape;
  bool moderate = true;
  for (int64_t group = 0; group < s.groups && moderate; ++group) {
    const int64_t k = group * s.group_k(), c = group * s.group_c();
    moderate = correlate<Element>({s.N,
                                   s.H,
                                   s.W,
                                   s.group_c(),
                                   s.group_k(),
                                   s.P,
                                   s.Q,
                                   s.padding.h - 2,
                                   s.padding.w - 2,
                                   static_cast<const Element*>(a.y.data) + k * a.y.c,
                                   a.y,
                                   static_cast<Element*>(a.x.data) + c * a.x.c,
                                   a.x,
                                   static_cast<const Element*>(a.w.data) + k * a.w.n + 2 * (a.w.h + a.w.w),
                                   a.w.c,
                                   a.w.n,
                                   -a.w.h,
                                   -a.w.w,
                                   nullptr,
                                   Act::none},
                                  workspace);
  }
  return moderate;
}

}  // namespace

void conv_fprop_winograd(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    if (!fprop<std::remove_pointer_t<decltype(t)>>(a, workspace)) conv_fprop_slab(a, workspace, stream);
  });
}

void conv_dgrad_winograd(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    if (!dgrad<std::remove_pointer_t<decltype(t)>>(a, workspace)) conv_dgrad_slab(a, workspace, stream);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
