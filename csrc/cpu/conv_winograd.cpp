// SPDX-License-Identifier: MIT
// 3x3 convolution of stride one by Winograd's minimal filtering F(2x2, 3x3): 16 products instead of 36 for
// each 2x2 outputs, channel and output channel (Lavin and Gray, arXiv 1509.09308, section 4).
//
//   U[e][k][c] = (G g G^T)[e]    once a call, packed in tiles of kRows output channels, for each e of 4x4
//   V[e][c][t] = (B^T d B)[e]    of the 4x4 inputs d of tile t
//   y[k][t]    = A^T (sum over c of U[e][k][c] V[e][c][t]) A,  16 GEMMs of K x C x tiles
//
// A task is a block of tiles of one image. It sorts its input by even and odd rows and columns, so that one
// element of all tiles lies side by side, a vector of tiles at a time; a row of tiles has one more, which is
// no tile, since neighbours share two columns. dgrad is the same with the filter turned and other padding.
//
// Sums of sums lose what is far smaller than their largest term, and make NaN of infinities. So where an
// input or a weight is not finite or above 2^50 (2^400 in float64) the slab row does the call.
//
// The floor is 16/36 of the multiply-adds of a direct convolution at the fused multiply-add rate, 117
// GFLOP/s in float32 on the Zen 4 core measured. Reached, in those of the direct one: 135 for 32 to 64
// channels of 14x14, where a quarter of the lanes is idle, 172 for 128 of 56x56.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <atomic>

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
constexpr int64_t kManyOutputs = 32 * kRows, kDepth = 128;
// Channels that a step is done for before the next, which reads at other places what was just written.
constexpr int64_t kTogether = 4;

template <class T>
constexpr int64_t kWidth = Simd<T>::kColumns;  // tiles of a task, with those between rows

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

// Whether every lane's magnitude is within reach of the transforms; false for NaN.
template <class T>
Vector<Lane<T>> is_moderate(Vector<T> v) {
  constexpr T limit = sizeof(T) == 8 ? T(0x1p400) : T(0x1p50);
  return (v < limit) & (v > -limit);
}

// out[e][channel][kRows] of kRows output channels, from `first`; false where a weight is too large.
template <class T, class Element>
bool transform_filter(const Correlation<Element>& c, int64_t first, T* out) {
  const int64_t live = std::min<int64_t>(kRows, c.outputs - first);
  bool moderate = true;
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    T g[3][3][kRows] = {}, rows[4][3][kRows];
    const Element* from = c.filter + first * c.filter_output + channel * c.filter_channel;
    for (int64_t i = 0; i < live; ++i)
      for (int r = 0; r < 3; ++r)
        for (int s = 0; s < 3; ++s) {
          g[r][s][i] = T(from[i * c.filter_output + r * c.filter_row + s * c.filter_col]);
          moderate &= is_moderate<T>(Vector<T>{} + g[r][s][i])[0] != 0;
        }
    for (int s = 0; s < 3; ++s)
      for (int i = 0; i < kRows; ++i) {
        const T ends = g[0][s][i] + g[2][s][i];
        rows[0][s][i] = g[0][s][i], rows[3][s][i] = g[2][s][i];
        rows[1][s][i] = (ends + g[1][s][i]) / 2, rows[2][s][i] = (ends - g[1][s][i]) / 2;
      }
    for (int r = 0; r < 4; ++r) {
      T* const to = out + (4 * r * c.channels + channel) * kRows;
      const int64_t next = c.channels * kRows;
      for (int i = 0; i < kRows; ++i) {
        const T ends = rows[r][0][i] + rows[r][2][i];
        to[i] = rows[r][0][i], to[3 * next + i] = rows[r][2][i];
        to[next + i] = (ends + rows[r][1][i]) / 2, to[2 * next + i] = (ends - rows[r][1][i]) / 2;
      }
    }
  }
  return moderate;
}

// How the tiles of an image are cut into tasks of rows x cols of them, so that few lanes are idle.
struct Tiling {
  int64_t rows = 1, cols = 1, tasks = 1;  // tasks of an image
  int64_t across = 1;                     // tasks beside each other

  Tiling(int64_t tile_rows, int64_t tile_cols, int64_t width, int64_t lanes) {
    int64_t best = -1;
    for (int64_t n = (tile_cols + width - 1) / width; n <= tile_cols && n <= 64; ++n) {
      const int64_t c = (tile_cols + n - 1) / n;
      int64_t r = std::min((width - c) / (c + 1) + 1, tile_rows);
      r = (tile_rows + (tile_rows + r - 1) / r - 1) / ((tile_rows + r - 1) / r);
      const int64_t count = (tile_rows + r - 1) / r * n;
      const int64_t used = count * (((r - 1) * (c + 1) + c + lanes - 1) / lanes);
      if (best < 0 || used < best) best = used, rows = r, cols = c, tasks = count, across = n;
    }
  }
};

// The tiles of a task, and where they are.
struct Tiles {
  int64_t image = 0, row = 0, col = 0;                 // the first
  int64_t rows = 0, cols = 0, pitch = 0, vectors = 0;  // pitch: from one row of tiles to the next
};

// A plane holds the elements of x, or of y, in every other row and column.
template <class T>
constexpr int64_t kPlane = 3 * kWidth<T> + 2 * kLanes<T>;
template <class T>
constexpr int64_t kOutPlane = kWidth<T> + kLanes<T>;

// A task's memory.
template <class T>
struct Scratch {
  T *planes, *v, *products, *out;

  Scratch(int64_t channels, int64_t outputs) {
    const int64_t sizes[] = {kTogether * 4 * kPlane<T>, kProducts * channels * kWidth<T>,
                             kProducts * outputs * kWidth<T>, kTogether * 4 * kOutPlane<T>};
    planes = static_cast<T*>(thread_scratch((sizes[0] + sizes[1] + sizes[2] + sizes[3]) * sizeof(T)));
    v = planes + sizes[0], products = v + sizes[1], out = products + sizes[2];
  }
};

// Sorts one channel of a task's input into planes[row % 2][col % 2]; zeros outside the image. False where a
// value is too large.
template <class T, class Element>
[[gnu::noinline]] bool sort_input(const Correlation<Element>& c, const Tiles& t, const Element* x,
                                  T* planes) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t first = 2 * t.col + c.low_w, begin = -first, end = c.width - first;
  Vector<Lane<T>> moderate = ~Vector<Lane<T>>{};
  for (int64_t i = 0; i < 2 * (t.rows + 1); ++i) {
    const int64_t h = 2 * t.row + c.low_h + i;
    const Element* const from = x + h * c.x_view.h + first * c.x_view.w;
    T* const even = planes + i % 2 * 2 * kPlane<T> + i / 2 * t.pitch;
    T* const odd = even + kPlane<T>;
    const bool outside = h < 0 || h >= c.height;
    for (int64_t j = 0; j < t.pitch; j += lanes) {
      const auto part = [&](int64_t at) {
        if (outside) return Vector<T>{};
        if (c.x_view.w == 1) return load_between<T>(from + at, begin - at, end - at);
        Vector<T> v{};
        for (int64_t l = std::max<int64_t>(begin - at, 0); l < std::min(end - at, lanes); ++l)
          v[l] = T(from[(at + l) * c.x_view.w]);
        return v;
      };
      const Vector<T> a = part(2 * j), b = part(2 * j + lanes);
      moderate &= is_moderate<T>(a) & is_moderate<T>(b);
      store<T>(alternate<T, false>(a, b), even + j);
      store<T>(alternate<T, true>(a, b), odd + j);
    }
  }
  bool all = true;
  for (int i = 0; i < lanes; ++i) all &= moderate[i] != 0;
  return all;
}

// v[e][..][kWidth] = (B^T d B)[e]; e is `next` elements from the one before.
template <class T>
[[gnu::noinline]] void transform_input(const Tiles& t, const T* planes, T* v, int64_t next) {
  for (int64_t f = 0; f < t.vectors * kLanes<T>; f += kLanes<T>) {
    Vector<T> d[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        d[i][j] = load<T>(planes + (i % 2 * 2 + j % 2) * kPlane<T> + i / 2 * t.pitch + j / 2 + f);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector<T> b = d[1][j], c = d[2][j];
      d[0][j] -= c, d[1][j] = b + c, d[2][j] = c - b, d[3][j] = b - d[3][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      T* const to = v + 4 * i * next + f;
      store<T>(d[i][0] - d[i][2], to);
      store<T>(d[i][1] + d[i][2], to + next);
      store<T>(d[i][2] - d[i][1], to + 2 * next);
      store<T>(d[i][1] - d[i][3], to + 3 * next);
    }
  }
}

// micro_kernel over a packed tile of the filter, for a run-time number of rows and vectors. Channels are
// added up in parts, so that rounding errors don't grow with all of them.
template <class T, int vectors, int rows = kRows>
void multiply_rows(int64_t count, int64_t depth, const T* u, const T* v, T* out) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<T, vectors, rows - 1>(count, depth, u, v, out);
  }
  for (int64_t k = 0; k < depth; k += kDepth)
    micro_kernel<T, rows, vectors>(std::min(kDepth, depth - k), u + k * kRows, 1, kRows, v + k * kWidth<T>,
                                   kWidth<T>, out, kWidth<T>, k > 0);
}
template <class T, int most = kVectors>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const T* u, const T* v, T* out) {
  if constexpr (most > 1) {
    if (vectors < most) return multiply<T, most - 1>(rows, vectors, depth, u, v, out);
  }
  multiply_rows<T, most>(rows, depth, u, v, out);
}

// out[row % 2][col % 2][tile] of output channel k; products[e] are `next` elements apart.
template <class T, class Element>
[[gnu::noinline]] void transform_output(const Correlation<Element>& c, const Tiles& t, int64_t k,
                                        const T* products, int64_t next, T* out) {
  const Vector<T> bias = c.bias ? Vector<T>{} + T(c.bias[k]) : Vector<T>{};
  const auto finish = [&](Vector<T> v, T* to) {
    if (c.bias) v += bias;
    store<T>(c.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v, to);
  };
  for (int64_t f = 0; f < t.vectors * kLanes<T>; f += kLanes<T>) {
    Vector<T> low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* const m = products + j * next + f;
      const Vector<T> b = load<T>(m + 4 * next), d = load<T>(m + 8 * next);
      low[j] = load<T>(m) + b + d, high[j] = b - d - load<T>(m + 12 * next);
    }
    finish(low[0] + low[1] + low[2], out + f);
    finish(low[1] - low[2] - low[3], out + kOutPlane<T> + f);
    finish(high[0] + high[1] + high[2], out + 2 * kOutPlane<T> + f);
    finish(high[1] - high[2] - high[3], out + 3 * kOutPlane<T> + f);
  }
}

template <class T, class Element>
[[gnu::noinline]] void write_output(const Correlation<Element>& c, const Tiles& t, int64_t k, const T* out) {
  constexpr int64_t lanes = kLanes<T>;
  Element* const y = c.y + t.image * c.y_view.n + k * c.y_view.c;
  for (int64_t i = 0; i < 2 * t.rows && 2 * t.row + i < c.rows; ++i) {
    const T* const even = out + i % 2 * 2 * kOutPlane<T> + i / 2 * t.pitch;
    Element* const to = y + (2 * t.row + i) * c.y_view.h + 2 * t.col;
    const int64_t count = std::min(2 * t.cols, c.cols - 2 * t.col);
    for (int64_t j = 0; j < count; j += 2 * lanes) {
      const Vector<T> a = load<T>(even + j / 2), b = load<T>(even + kOutPlane<T> + j / 2);
      store_some<T>(interleave<T, false>(a, b), to + j, count - j);
      if (count - j > lanes) store_some<T>(interleave<T, true>(a, b), to + j + lanes, count - j - lanes);
    }
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
  const Tiling tiling(tile_rows, tile_cols, kWidth<T>, kLanes<T>);
  const bool is_small = kProducts * c.channels * kWidth<T> * int64_t(sizeof(T)) <= kSmallBytes;
  const int64_t outputs = is_small ? kRows : std::min(kManyOutputs, output_tiles * kRows);
  const double task_us = macs_us(double(kProducts * kWidth<T>) * double(c.channels) * double(c.outputs + 8));
  parallel_for(c.images * tiling.tasks, task_us, [&](int64_t task) {
    const int64_t block = task % tiling.tasks;
    Tiles t{task / tiling.tasks, block / tiling.across * tiling.rows, block % tiling.across * tiling.cols};
    t.rows = std::min(tiling.rows, tile_rows - t.row), t.cols = std::min(tiling.cols, tile_cols - t.col);
    if (t.cols <= 0 || !moderate.load(std::memory_order_relaxed)) return;
    t.pitch = t.cols + 1;
    t.vectors = ((t.rows - 1) * t.pitch + t.cols + kLanes<T> - 1) / kLanes<T>;
    const Scratch<T> s(c.channels, outputs);
    const int64_t v_size = c.channels * kWidth<T>, product_size = outputs * kWidth<T>;
    const Element* const x = c.x + t.image * c.x_view.n;
    for (int64_t channel = 0; channel < c.channels; channel += kTogether) {
      const int64_t count = std::min(kTogether, c.channels - channel);
      for (int64_t i = 0; i < count; ++i)
        if (!sort_input<T>(c, t, x + (channel + i) * c.x_view.c, s.planes + i * 4 * kPlane<T>))
          moderate = false;
      for (int64_t i = 0; i < count; ++i)
        transform_input<T>(t, s.planes + i * 4 * kPlane<T>, s.v + (channel + i) * kWidth<T>, v_size);
    }
    for (int64_t first = 0; first < c.outputs; first += outputs) {
      const int64_t count = std::min(outputs, c.outputs - first);
      for (int e = 0; e < kProducts; ++e)
        for (int64_t k = 0; k < count; k += kRows)
          multiply<T>(std::min<int64_t>(kRows, count - k), t.vectors, c.channels,
                      u + (first + k) / kRows * tile_size + e * c.channels * kRows, s.v + e * v_size,
                      s.products + e * product_size + k * kWidth<T>);
      for (int64_t k = 0; k < count; k += kTogether) {
        const int64_t end = std::min(kTogether, count - k);
        for (int64_t i = 0; i < end; ++i)
          transform_output<T>(c, t, first + k + i, s.products + (k + i) * kWidth<T>, product_size,
                              s.out + i * 4 * kOutPlane<T>);
        for (int64_t i = 0; i < end; ++i) write_output<T>(c, t, first + k + i, s.out + i * 4 * kOutPlane<T>);
      }
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
