// SPDX-License-Identifier: MIT
// 3x3 convolution of stride one by Winograd's minimal filtering F(2x2, 3x3): 16 products instead of 36 for
// each 2x2 outputs, channel and output channel (Lavin and Gray, arXiv 1509.09308, section 4).
//
//   U[e][c][k] = (G g G^T)[e]    once a call, in panels of output channels, for each e of 4x4
//   V[e][t][c] = (B^T d B)[e]    of the 4x4 inputs d of tile t
//   y[t][k]    = A^T (sum over c of V[e][t][c] U[e][c][k]) A,  16 GEMMs of tiles x K x C
//
// dgrad is the same with the filter turned and other padding. wgrad goes the other way (the transposes of the
// same matrices): M[e][t][k] = (A g A^T)[e] of the 2x2 gradients g of a tile, 16 GEMMs of C x K x tiles, and
// G^T (...) G of their sums.
//
// Channels are in the vector lanes throughout, so that transforms are additions of whole vectors. Where
// channels lie side by side, what lies inside the image is read in place and results are written in place;
// where pixels do, rows of a run of tiles are transposed on the way. A task of fprop and dgrad is kTiles
// tiles, whatever rows or images they lie in; tiles are down and output channels across in the micro-kernel,
// 12 x 2 vectors of AVX-512's 32 registers. A task of wgrad is a block of channels, a block of output
// channels and a piece of the tiles; channels are down, and sums join those in the workspace every kTiles
// tiles.
//
// Sums of sums lose what is far smaller than their largest term, and make NaN of infinities. So where an
// input or a weight is not finite or above 2^50 (2^400 in float64) the slab row does the call.
//
// The floor is 16/36 of the multiply-adds of a direct convolution at the fused multiply-add rate, 256
// GFLOP/s in float32 on the Zen 5 core measured (busy, one thread). Reached, in those of the direct one, of
// which 576 are the floor's, channels_last and (contiguous):
//
//                              fprop       dgrad       wgrad
//   32 to 64 of 14x14          455 (400)   310 (280)   430 (366)    unpadded: dgrad has 49 tiles, not 36
//   64 of 56x56                400 (360)   410 (365)   363 (312)
//   128 of 56x56               500 (480)   500 (480)   400 (360)
//   256 of 28x28               505 (465)   500 (465)   397 (392)
//   512 of eight 7x7           255 (250)   255 (245)   292 (276)    64 outputs computed for 49
//
// Next: what a panel of the filter costs where all of them leave the second-level cache (512 channels).
#ifndef FASTCONV_ISA

#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_winograd.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

void conv_fprop_slab(const ConvArgs& a, void* workspace, void*);
void conv_dgrad_slab(const ConvArgs& a, void* workspace, void*);
void conv_wgrad_slab(const ConvArgs& a, void* workspace, void*);

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

namespace {

constexpr int kProducts = 16;                      // of a tile, a channel and an output channel
constexpr int64_t kTiles = WinogradWgrad::kTiles;  // that are transformed at a time
constexpr int kTileRows = kVectorBytes == 64 ? 12 : kRows, kTileVectors = 2;
constexpr int64_t kDepth = 128, kEnoughTasks = 16, kSharePanels = 8;

template <class T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;  // output channels that are computed at a time

// Images that are read, from the first of some channels.
template <class Element>
struct Images {
  const Element* data;
  View view;
  int64_t channels, height, width;
};

// y[k](p, q) = sum over c, r, s of x[c](p + low_h + r, q + low_w + s) filter[k][c](r, s)
template <class Element>
struct Correlation {
  int64_t images, rows, cols, outputs;  // of y
  int64_t low_h, low_w;
  Images<Element> x;
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

// out[e][channel][kPanel] of kPanel output channels from `first` and a vector of channels from `channel`;
// false where a weight is too large.
template <class T, class Element>
bool transform_filter(const Correlation<Element>& c, int64_t first, int64_t channel, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = std::min(lanes, c.x.channels - channel);
  Magnitude<T> magnitude;
  for (int64_t v = 0; v < kPanel<T>; v += lanes) {
    const Element* const from = c.filter + (first + v) * c.filter_output + channel * c.filter_channel;
    Vector<T> taps[9][lanes];
    for (int tap = 0; tap < 9; ++tap)
      load_block<T>(from + tap / 3 * c.filter_row + tap % 3 * c.filter_col, c.filter_output, c.filter_channel,
                    c.outputs - first - v, count, taps[tap]);
    for (int64_t j = 0; j < count; ++j) {
      Vector<T> rows[4][3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        const Vector<T> a = taps[s][j], b = taps[3 + s][j], d = taps[6 + s][j];
        magnitude.meet(a), magnitude.meet(b), magnitude.meet(d);
        rows[0][s] = a, rows[1][s] = (a + d + b) / 2, rows[2][s] = (a + d - b) / 2, rows[3][s] = d;
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vector<T> a = rows[r][0], b = rows[r][1], d = rows[r][2];
        const Vector<T> row[] = {a, (a + d + b) / 2, (a + d - b) / 2, d};
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s)
          store<T>(row[s], out + ((4 * r + s) * c.x.channels + channel + j) * kPanel<T> + v);
      }
    }
  }
  return magnitude.is_moderate();
}

// Tiles beside each other in a row of tiles. A task is up to kTiles tiles in the order of images, rows and
// columns, so that its first run may start and its last one end within a row.
struct Run {
  static constexpr int64_t kMost = 15, kCols = 2 * kMost + 2;  // tiles, and the columns that they read

  int64_t image, row, col, count;  // the first tile, and how many
  int64_t slot;                    // of the first among the task's
};
struct Runs {
  Run run[kTiles];
  int count = 0;

  Runs(int64_t first, int64_t tiles, int64_t tile_rows, int64_t tile_cols) {
    for (int64_t slot = 0; slot < tiles; slot += run[count++].count) {
      const int64_t row = (first + slot) / tile_cols, col = (first + slot) % tile_cols;
      run[count] = {row / tile_rows, row % tile_rows, col,
                    std::min({Run::kMost, tile_cols - col, tiles - slot}), slot};
    }
  }
  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// A task's memory: v[e][slot][channel], products[e][slot][output of a panel], and the pixels of a run. A gap
// of a vector ends each line, and one more each product, which keeps them out of the same sets of the cache.
template <class T>
struct Scratch {
  static constexpr int64_t kLine = kPanel<T> + kLanes<T>, kNext = kTiles * kLine + kLanes<T>;  // of products

  int64_t v_line, v_next;
  T *v, *products, *pixels;

  explicit Scratch(int64_t channels) {
    constexpr int64_t lanes = kLanes<T>, pixels_size = 4 * Run::kCols * lanes;
    v_line = (channels + 2 * lanes - 1) / lanes * lanes, v_next = kTiles * v_line + lanes;
    pixels =
        static_cast<T*>(thread_scratch((pixels_size + kProducts * (v_next + kNext)) * int64_t(sizeof(T))));
    v = pixels + pixels_size;
    products = v + kProducts * v_next;
  }
};

// The channels of a group of a tensor.
template <class Element>
Images<Element> images_of(const View& view, int64_t group, int64_t channels, int64_t height, int64_t width) {
  return {static_cast<const Element*>(view.data) + group * channels * view.c, view, channels, height, width};
}

// Pixels of a vector of channels: from one to the next below it and beside it.
template <class T>
struct Pixels {
  const T* data;
  int64_t row, col;
};

// rows x cols pixels from (h, w) of an image, of a vector of channels: where they are, or copied, with zeros
// around the image.
template <class T, int rows, class Element>
Pixels<T> read_pixels(const Images<Element>& from, int64_t image, int64_t channel, int64_t h, int64_t w,
                      int64_t cols, T* copy) {
  constexpr int64_t lanes = kLanes<T>;
  const View& view = from.view;
  const int64_t live = std::min(lanes, from.channels - channel);
  // The stride along a row of one pixel may be anything.
  const int64_t next = view.c == 1 ? view.w : 1;
  const Element* const data = from.data + image * view.n + channel * view.c + h * view.h + w * next;
  if constexpr (std::is_same_v<T, Element>) {
    const bool inside = h >= 0 && h + rows <= from.height && w >= 0 && w + cols <= from.width;
    if (inside && view.c == 1 && live == lanes) return {data, view.h, view.w};
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* const to = copy + i * Run::kCols * lanes;
    const bool exists = h + i >= 0 && h + i < from.height;
    const int64_t begin = exists ? std::clamp<int64_t>(-w, 0, cols) : cols,
                  end = exists ? std::clamp<int64_t>(from.width - w, begin, cols) : cols;
    const Element* const row = data + i * view.h;
    if (view.c == 1) {
      for (int64_t j = 0; j < cols; ++j)
        store<T>(j >= begin && j < end ? load_some<T>(row + j * next, live) : Vector<T>{}, to + j * lanes);
      continue;
    }
    for (int64_t j = 0; j < cols; j += lanes) {
      Vector<T> r[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l)
        r[l] = l < live ? load_between<T>(row + l * view.c + j, begin - j, end - j) : Vector<T>{};
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) store<T>(r[l], to + (j + l) * lanes);
    }
  }
  return {copy, Run::kCols * lanes, lanes};
}

// v[e] = (B^T d B)[e] of `tiles` tiles beside each other, a line apart; e is `next` elements from the one
// before. Neighbours share two columns.
template <class T>
[[gnu::noinline]] void transform_input(Pixels<T> pixels, int64_t tiles, T* v, int64_t line, int64_t next,
                                       Magnitude<T>& all) {
  Magnitude<T> magnitude = all;
  const auto column = [&](int64_t j, Vector<T>* to) {
    Vector<T> d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      d[i] = load<T>(pixels.data + i * pixels.row + j * pixels.col);
      magnitude.meet(d[i]);
    }
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
  };
  Vector<T> a[4], b[4], c[4], d[4];
  column(0, a), column(1, b);
  for (int64_t t = 0; t < tiles; ++t, v += line) {
    column(2 * t + 2, c), column(2 * t + 3, d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store<T>(a[i] - c[i], v + 4 * i * next);
      store<T>(b[i] + c[i], v + (4 * i + 1) * next);
      store<T>(c[i] - b[i], v + (4 * i + 2) * next);
      store<T>(b[i] - d[i], v + (4 * i + 3) * next);
      a[i] = c[i], b[i] = d[i];
    }
  }
  all = magnitude;
}

// micro_kernel over a panel of the filter, for a run-time number of tiles and vectors. Channels are added up
// in parts, so that rounding errors don't grow with all of them.
template <class T, int vectors, int rows = kTileRows>
void multiply_rows(int64_t count, int64_t depth, const T* v, int64_t v_line, const T* u, T* out) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<T, vectors, rows - 1>(count, depth, v, v_line, u, out);
  }
  for (int64_t k = 0; k < depth; k += kDepth)
    micro_kernel<T, rows, vectors>(std::min(kDepth, depth - k), v + k, v_line, 1, u + k * kPanel<T>,
                                   kPanel<T>, out, Scratch<T>::kLine, k > 0);
}
template <class T, int most = kTileVectors, class... Rest>
void multiply(int64_t vectors, const Rest&... rest) {
  if constexpr (most > 1) {
    if (vectors < most) return multiply<T, most - 1>(vectors, rest...);
  }
  multiply_rows<T, most>(rest...);
}

// Writes the tiles of a run, of a vector of output channels from k.
template <class T, class Element>
[[gnu::noinline]] void transform_output(const Correlation<Element>& c, const Run& run, int64_t k,
                                        const T* products, T* copy) {
  constexpr int64_t lanes = kLanes<T>, line = Scratch<T>::kLine, next = Scratch<T>::kNext;
  const int64_t live = std::min(lanes, c.outputs - k);
  const View& view = c.y_view;
  const Vector<T> bias = c.bias ? load_some<T>(c.bias + k, live) : Vector<T>{};
  const auto finish = [&](Vector<T> v) {
    if (c.bias) v += bias;
    return c.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v;
  };
  Element* const to = c.y + run.image * view.n + k * view.c + 2 * run.row * view.h + 2 * run.col * view.w;
  const int64_t rows = std::min<int64_t>(2, c.rows - 2 * run.row),
                cols = std::min(2 * run.count, c.cols - 2 * run.col);
  const auto write = [&](int64_t i, int64_t j, Vector<T> v) {
    if (i >= rows || j >= cols) return;
    if (view.c == 1)
      store_some<T>(finish(v), to + i * view.h + j * view.w, live);
    else
      store<T>(finish(v), copy + (i * Run::kCols + j) * lanes);
  };
  for (int64_t t = 0; t < run.count; ++t, products += line) {
    Vector<T> low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* const m = products + j * next;
      const Vector<T> b = load<T>(m + 4 * next), d = load<T>(m + 8 * next);
      low[j] = load<T>(m) + b + d, high[j] = b - d - load<T>(m + 12 * next);
    }
    write(0, 2 * t, low[0] + low[1] + low[2]), write(0, 2 * t + 1, low[1] - low[2] - low[3]);
    write(1, 2 * t, high[0] + high[1] + high[2]), write(1, 2 * t + 1, high[1] - high[2] - high[3]);
  }
  if (view.c == 1) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += lanes) {
      Vector<T> r[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) r[l] = load<T>(copy + (i * Run::kCols + j + l) * lanes);
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l)
        if (l < live) store_some<T>(r[l], to + i * view.h + l * view.c + j, cols - j);
    }
}

// False where something was too large: what is written is then of no use.
template <class Element>
bool correlate(const Correlation<Element>& c, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>, width = kPanel<T>;
  T* const u = static_cast<T*>(workspace);  // [panel][e][channel][kPanel]
  const int64_t panels = (c.outputs + width - 1) / width, panel_size = kProducts * c.x.channels * width;
  const int64_t vectors = (c.x.channels + lanes - 1) / lanes;
  std::atomic<bool> moderate{true};
  parallel_for(panels * vectors, double(kProducts * lanes * width) * 1e-3, [&](int64_t i) {
    const int64_t panel = i / vectors;
    if (!transform_filter<T>(c, panel * width, i % vectors * lanes, u + panel * panel_size)) moderate = false;
  });

  const int64_t tile_rows = (c.rows + 1) / 2, tile_cols = (c.cols + 1) / 2;
  const int64_t tiles = c.images * tile_rows * tile_cols;
  // Few blocks of tiles: tasks share the outputs of each, and transform its input for themselves.
  const int64_t blocks = (tiles + kTiles - 1) / kTiles;
  const int64_t share = blocks < kEnoughTasks ? std::min(kSharePanels, panels) : panels;
  const int64_t shares = (panels + share - 1) / std::max<int64_t>(1, share);
  const double task_us =
      macs_us(double(kProducts * kTiles) * double(c.x.channels) * double(share * width + 8));
  parallel_for(blocks * shares, task_us, [&](int64_t task) {
    if (!moderate.load(std::memory_order_relaxed)) return;
    const int64_t begin = task % blocks * kTiles, size = std::min(kTiles, tiles - begin);
    const Runs runs(begin, size, tile_rows, tile_cols);
    const Scratch<T> s(c.x.channels);
    Magnitude<T> magnitude;
    for (const Run& run : runs)
      for (int64_t channel = 0; channel < c.x.channels; channel += lanes)
        transform_input<T>(read_pixels<T, 4>(c.x, run.image, channel, 2 * run.row + c.low_h,
                                             2 * run.col + c.low_w, 2 * run.count + 2, s.pixels),
                           run.count, s.v + run.slot * s.v_line + channel, s.v_line, s.v_next, magnitude);
    if (!magnitude.is_moderate()) moderate = false;
    const int64_t parts = (size + kTileRows - 1) / kTileRows;
    const int64_t end = std::min(panels, (task / blocks + 1) * share);
    for (int64_t panel = task / blocks * share; panel < end; ++panel) {
      const int64_t first = panel * width, count = std::min(width, c.outputs - first);
      for (int e = 0; e < kProducts; ++e)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t slot = part_begin(part, parts, size);
          multiply<T>((count + lanes - 1) / lanes, part_begin(part + 1, parts, size) - slot, c.x.channels,
                      s.v + e * s.v_next + slot * s.v_line, s.v_line,
                      u + panel * panel_size + e * c.x.channels * width,
                      s.products + e * s.kNext + slot * s.kLine);
        }
      for (const Run& run : runs)
        for (int64_t k = 0; k < count; k += lanes)
          transform_output<T>(c, run, first + k, s.products + run.slot * s.kLine + k, s.pixels);
    }
  });
  return moderate;
}

template <class Element>
bool fprop(const ConvArgs& a, void* workspace) {
  const ConvShape& s = a.shape;
  bool moderate = true;
  for (int64_t group = 0; group < s.groups && moderate; ++group) {
    const int64_t k = group * s.group_k();
    const auto* bias = static_cast<const Element*>(a.epilogue.bias);
    moderate = correlate<Element>(
        {s.N, s.P, s.Q, s.group_k(), -s.padding.h, -s.padding.w,
         images_of<Element>(a.x, group, s.group_c(), s.H, s.W), static_cast<Element*>(a.y.data) + k * a.y.c,
         a.y, static_cast<const Element*>(a.w.data) + k * a.w.n, a.w.n, a.w.c, a.w.h, a.w.w,
         bias ? bias + k : nullptr, a.epilogue.act},
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
    moderate = correlate<Element>(
        {s.N, s.H, s.W, s.group_c(), s.padding.h - 2, s.padding.w - 2,
         images_of<Element>(a.y, group, s.group_k(), s.P, s.Q), static_cast<Element*>(a.x.data) + c * a.x.c,
         a.x, static_cast<const Element*>(a.w.data) + k * a.w.n + 2 * (a.w.h + a.w.w), a.w.c, a.w.n, -a.w.h,
         -a.w.w, nullptr, Act::none},
        workspace);
  }
  return moderate;
}

// m[e] = (A g A^T)[e] of `tiles` tiles beside each other; lines and products as in Scratch.
template <class T>
[[gnu::noinline]] void transform_gradient(Pixels<T> pixels, int64_t tiles, T* m, Magnitude<T>& all) {
  constexpr int64_t next = Scratch<T>::kNext;
  Magnitude<T> magnitude = all;
  for (int64_t t = 0; t < tiles; ++t, m += Scratch<T>::kLine) {
    Vector<T> g[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const T* const from = pixels.data + (2 * t + j) * pixels.col;
      const Vector<T> low = load<T>(from), high = load<T>(from + pixels.row);
      magnitude.meet(low), magnitude.meet(high);
      g[0][j] = low, g[1][j] = low + high, g[2][j] = low - high, g[3][j] = -high;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store<T>(g[i][0], m + 4 * i * next);
      store<T>(g[i][0] + g[i][1], m + (4 * i + 1) * next);
      store<T>(g[i][0] - g[i][1], m + (4 * i + 2) * next);
      store<T>(-g[i][1], m + (4 * i + 3) * next);
    }
  }
  all = magnitude;
}

// sums[channel][kPanel] (+)= the sum over `tiles` tiles of v[channel] m[output], for `count` channels.
template <class T, int vectors, int rows = kTileRows>
void add_products(int64_t count, int64_t tiles, const T* v, int64_t v_line, const T* m, T* sums,
                  bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) return add_products<T, vectors, rows - 1>(count, tiles, v, v_line, m, sums, accumulate);
  }
  micro_kernel<T, rows, vectors>(tiles, v, 1, v_line, m, Scratch<T>::kLine, sums, kPanel<T>, accumulate);
}

// w[k][c] = G^T (sum over pieces of sums[e][c][k]) G for a vector of output channels and one of channels;
// a piece is `piece` elements from the next, e is `next`.
template <class T, class Element>
void write_filter(const View& w, Element* to, int64_t outputs, int64_t channels, const T* sums,
                  int64_t pieces, int64_t piece, int64_t next) {
  constexpr int64_t lanes = kLanes<T>;
  const bool dense = w.w == 1 && w.h == 3 && w.c == 9;  // [channel][tap] in memory, or else tap by tap
  Vector<T> taps[9 * lanes];
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> rows[3][4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      Vector<T> m[4] = {};
      for (int64_t i = 0; i < pieces; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) m[r] += load<T>(sums + i * piece + (4 * r + s) * next + c * kPanel<T>);
      const Vector<T> even = (m[1] + m[2]) / 2;
      rows[0][s] = m[0] + even, rows[1][s] = (m[1] - m[2]) / 2, rows[2][s] = even + m[3];
    }
    const int64_t at = dense ? 9 * c : c, step = dense ? 1 : lanes;
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      const Vector<T>* const m = rows[r];
      const Vector<T> even = (m[1] + m[2]) / 2;
      taps[at + 3 * r * step] = m[0] + even;
      taps[at + (3 * r + 1) * step] = (m[1] - m[2]) / 2;
      taps[at + (3 * r + 2) * step] = even + m[3];
    }
  }
  if (dense) {
    for (int64_t i = 0; i < 9 * channels; i += lanes)
      store_block<T>(taps + i, to + i, w.n, 1, outputs, 9 * channels - i);
  } else {
    for (int tap = 0; tap < 9; ++tap)
      store_block<T>(taps + tap * lanes, to + tap / 3 * w.h + tap % 3 * w.w, w.n, w.c, outputs, channels);
  }
}

template <class Element>
bool wgrad(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>, width = kPanel<T>;
  const ConvShape& s = a.shape;
  const WinogradWgrad plan(s);
  const int64_t channels = s.group_c(), outputs = s.group_k(), panels = (outputs + width - 1) / width;
  T* const all_sums = static_cast<T*>(workspace);  // [piece][panel][e][channel][kPanel]
  const int64_t next = channels * width, piece_size = panels * kProducts * next;
  std::atomic<bool> moderate{true};
  for (int64_t group = 0; group < s.groups && moderate; ++group) {
    const auto x = images_of<Element>(a.x, group, channels, s.H, s.W),
               y = images_of<Element>(a.y, group, outputs, s.P, s.Q);
    const double task_us = macs_us(s.macs() / 2 / double(s.groups * std::max<int64_t>(1, plan.tasks())));
    parallel_for(plan.tasks(), task_us, [&](int64_t task) {
      const int64_t piece = task / plan.channel_blocks / plan.output_blocks;
      const int64_t first = task % plan.channel_blocks * plan.kChannels,
                    end = std::min(channels, first + plan.kChannels);
      const int64_t first_panel = task / plan.channel_blocks % plan.output_blocks * plan.kOutputs / width,
                    end_panel = std::min(panels, first_panel + plan.kOutputs / width);
      const Scratch<T> scratch(plan.kChannels);
      Magnitude<T> magnitude;
      const int64_t begin_block = part_begin(piece, plan.pieces, plan.blocks),
                    end_block = part_begin(piece + 1, plan.pieces, plan.blocks);
      for (int64_t block = begin_block; block < end_block; ++block) {
        if (!moderate.load(std::memory_order_relaxed)) return;
        const int64_t size = std::min(kTiles, plan.tiles - block * kTiles);
        const Runs runs(block * kTiles, size, plan.tile_rows, plan.tile_cols);
        for (const Run& run : runs)
          for (int64_t c = first; c < end; c += lanes)
            transform_input<T>(
                read_pixels<T, 4>(x, run.image, c, 2 * run.row - s.padding.h, 2 * run.col - s.padding.w,
                                  2 * run.count + 2, scratch.pixels),
                run.count, scratch.v + run.slot * scratch.v_line + c - first, scratch.v_line, scratch.v_next,
                magnitude);
        for (int64_t panel = first_panel; panel < end_panel; ++panel) {
          const int64_t vectors = (std::min(width, outputs - panel * width) + lanes - 1) / lanes;
          for (const Run& run : runs)
            for (int64_t v = 0; v < vectors; ++v)
              transform_gradient<T>(read_pixels<T, 2>(y, run.image, panel * width + v * lanes, 2 * run.row,
                                                      2 * run.col, 2 * run.count, scratch.pixels),
                                    run.count, scratch.products + run.slot * scratch.kLine + v * lanes,
                                    magnitude);
          T* const sums = all_sums + piece * piece_size + panel * kProducts * next;
          const int64_t parts = (end - first + kTileRows - 1) / kTileRows;
          for (int e = 0; e < kProducts; ++e)
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t c = part_begin(part, parts, end - first),
                            count = part_begin(part + 1, parts, end - first) - c;
              const auto add = vectors == kTileVectors ? add_products<T, kTileVectors> : add_products<T, 1>;
              add(count, size, scratch.v + e * scratch.v_next + c, scratch.v_line,
                  scratch.products + e * scratch.kNext, sums + e * next + (first + c) * width,
                  block > begin_block);
            }
        }
        if (!magnitude.is_moderate()) moderate = false;
      }
    });
    if (!moderate) break;
    const int64_t k_vectors = (outputs + lanes - 1) / lanes, c_vectors = (channels + lanes - 1) / lanes;
    parallel_for(k_vectors * c_vectors, double(plan.pieces + 10) * kProducts * lanes * 1e-3, [&](int64_t i) {
      const int64_t k = i / c_vectors * lanes, c = i % c_vectors * lanes;
      write_filter<T>(a.w, static_cast<Element*>(a.w.data) + (group * outputs + k) * a.w.n + c * a.w.c,
                      std::min(lanes, outputs - k), std::min(lanes, channels - c),
                      all_sums + k / width * kProducts * next + c * width + k % width, plan.pieces,
                      piece_size, next);
    });
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

void conv_wgrad_winograd(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    if (!wgrad<std::remove_pointer_t<decltype(t)>>(a, workspace))
      return conv_wgrad_slab(a, workspace, stream);
    conv_bias_grad(a);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
