// SPDX-License-Identifier: MIT
// 2-D convolution, ReLU and 2x2/2 max-pool of few images, which would leave lanes empty that the batch fills
// (conv_lanes.cpp). A task is a band of rows of windows of one image; it copies the input under them into a
// strip (WindowStrip), where what the lanes or the sums of a tile read at a tap lies side by side, whatever
// the layout, stride, padding and dilation.
//
//   windows   kLanes windows of a row in the lanes, a tile of conv_lanes.cpp for their four pixels: 4 loads
//             for 24 fused multiply-adds. For few output channels and rows that fill the lanes.
//   channels  output channels in the lanes; a tile is up to kWindows windows of a row, whose pixels are
//             broadcast as an operand of the multiply-add: one load a sum. Filters are transposed on the way.
//
// LeNet's convolutions, one image: 8,400 multiply-adds by windows and 15,000 by channels, of 2.3 and 4.2 us
// on a core that does one a cycle at 3.6 GHz. Measured on a Zen 4 core, a third of what four images take over
// one: 3.9 and 5.2 us.
#ifndef FASTCONV_ISA

#include "cpu/lanes_plan.h"
#include "cpu/parallel.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_windows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/lanes_conv.inl"

namespace {

// Windows of a tile with the channels in the lanes.
constexpr int kWindows = kSums / kPositions;

// out[i] = from[i * step], zero where i is outside [begin, end).
template <class T, class Element>
void fill_row(const Element* from, int64_t step, int64_t begin, int64_t end, int64_t length, T* out) {
  constexpr int lanes = kLanes<T>;
  const auto put = [&](auto vector) [[gnu::always_inline]] {
    for (int64_t i = 0; i < length; i += lanes) store_some<T>(vector(i), out + i, length - i);
  };
  if (step == 1) return put([&](int64_t i) { return load_between<T>(from + i, begin - i, end - i); });
  if (step == 2)
    return put([&](int64_t i) {
      const int64_t first = 2 * (begin - i), last = 2 * (end - i) - 1;
      return alternate<T, false>(load_between<T>(from + 2 * i, first, last),
                                 load_between<T>(from + 2 * i + lanes, first - lanes, last - lanes));
    });
  for (int64_t i = 0; i < length; ++i) out[i] = i >= begin && i < end ? T(from[i * step]) : T(0);
}

// The input under the windows of some rows of image n, zero outside it.
template <class T, class Element>
void fill(const ConvArgs& a, const WindowStrip& strip, int64_t n, int64_t row, T* out) {
  const ConvShape& s = a.shape;
  const int64_t h0 = 2 * row * s.stride.h - s.padding.h;
  const auto* image = static_cast<const Element*>(a.x.data) + n * a.x.n;
  for (int64_t phase = 0; phase < strip.phases; ++phase) {
    const int64_t w0 = phase - s.padding.w;  // of element 0; the next is strip.step further
    const int64_t end = std::clamp<int64_t>((s.W - w0 + strip.step - 1) / strip.step, 0, strip.length);
    const int64_t begin = w0 < 0 ? std::min((-w0 + strip.step - 1) / strip.step, end) : 0;
    T* row_out = out + phase * strip.length;
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t h = h0; h < h0 + strip.in_rows; ++h, row_out += strip.pitch())
        fill_row<T>(image + c * a.x.c + h * a.x.h + w0 * a.x.w, strip.step * a.x.w, begin,
                    h >= 0 && h < s.H ? end : begin, strip.length, row_out);
  }
}

// Values of `channels` channels at `windows` windows of a row, values(k, i), to y or the offsets.
template <class Element, class Values>
void write(const View& view, int64_t n, int64_t k, int64_t h, int64_t w, int64_t channels, int64_t windows,
           const Values& values) {
  Element* y = static_cast<Element*>(view.data) + n * view.n + k * view.c + h * view.h + w * view.w;
  for (int64_t j = 0; j < channels; ++j)
    for (int64_t i = 0; i < windows; ++i) y[j * view.c + i * view.w] = Element(values(j, i));
}

template <class T>
struct WindowArrays {
  T* x;
  Vector<T>*y, *offsets;

  WindowArrays(Carver& carver, const WindowStrip& strip, int64_t vectors)
      : x(carver.take<T>(strip.size())),
        y(carver.take<Vector<T>>(vectors)),
        offsets(carver.take<Vector<T>>(vectors)) {}
};

// Calls tile(image, row of windows, the strip at that row, arrays) for every row of every image.
template <class T, class Element, class Tile>
void each_row(const ConvArgs& a, const WindowStrip& strip, int64_t vectors, const Tile& tile) {
  const Extent3 out = a.epilogue.pool.out;
  const int64_t bands = (out.h + strip.rows - 1) / strip.rows;
  const double task_us = a.shape.macs() / double(a.shape.N * bands) / 5e4;
  parallel_for(a.shape.N * bands, task_us, [&](int64_t task) {
    const int64_t n = task / bands, begin = task % bands * strip.rows;
    const auto at = in_scratch<WindowArrays<T>>(strip, vectors);
    fill<T, Element>(a, strip, n, begin, at.x);
    for (int64_t h = begin; h < std::min(out.h, begin + strip.rows); ++h)
      tile(n, h, at.x + 2 * (h - begin) * a.shape.stride.h * strip.pitch(), at);
  });
}

template <class T, class Element>
void read_bias(const ConvArgs& a, T* out) {
  const auto* bias = static_cast<const Element*>(a.epilogue.bias);
  for (int64_t k = 0; k < a.shape.K; ++k) out[k] = bias ? T(bias[k]) : T(0);
}

// --- windows in the lanes

template <class Element>
void by_windows(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int lanes = kLanes<T>;
  const ConvShape& s = a.shape;
  const Epilogue& e = a.epilogue;
  const WindowStrip strip = WindowStrip::windows(a, lanes);
  const int64_t taps = s.group_c() * s.taps();

  Carver carver(workspace);
  const WindowTables<T> tables(carver, s, 1);
  read_bias<T, Element>(a, tables.bias);
  each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
    tables.taps[t] = static_cast<int32_t>(strip.tap(s, c, r, f) * int64_t(sizeof(T)));
    for (int64_t g = 0; g < s.groups; ++g) {
      T* const out = tables.weights + g * s.group_k() * taps;
      Filter<T>{s.group_k(), s.R, s.S, s.group_c(), tables.taps, out}.fill(
          out, t, [&](int64_t k) { return T(weight_at<const Element>(a.w, g * s.group_k() + k, c, r, f)); });
    }
  });
  // The four pixels of a window, in vectors.
  PixelList list = tables.list;
  for (int64_t i = 0; i < 2; ++i) {
    list.rows[i] = {i * s.stride.h * strip.pitch() / lanes, 0, {0, s.R}};
    list.cols[i] = {i * s.stride.w * strip.length / lanes, 0, {0, s.S}};
  }
  const Pixels pixels = list.tiles(2, 2);

  each_row<T, Element>(a, strip, s.K, [&](int64_t n, int64_t h, const T* x, const WindowArrays<T>& at) {
    for (int64_t w = 0; w < e.pool.out.w; w += lanes) {
      const auto* from = reinterpret_cast<const Vector<T>*>(x + w);
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t k = g * s.group_k();
        correlate<T>({s.group_k(), s.R, s.S, s.group_c(), tables.taps, tables.weights + k * taps},
                     from + g * s.group_c() * strip.plane() / lanes, pixels,
                     {tables.bias + k, e.act, true, at.y + k, e.offsets.data ? at.offsets + k : nullptr});
      }
      const int64_t live = std::min<int64_t>(lanes, e.pool.out.w - w);
      if (std::is_same_v<T, Element> && a.y.w == 1) {
        T* y = static_cast<T*>(a.y.data) + n * a.y.n + h * a.y.h + w;
        for (int64_t k = 0; k < s.K; ++k) store_some<T>(at.y[k], y + k * a.y.c, live);
      } else {
        write<Element>(a.y, n, 0, h, w, s.K, live, [&](int64_t k, int64_t i) { return at.y[k][i]; });
      }
      if (e.offsets.data)
        write<uint8_t>(e.offsets, n, 0, h, w, s.K, live,
                       [&](int64_t k, int64_t i) { return at.offsets[k][i]; });
    }
  });
}

// --- output channels in the lanes

template <class T, int windows>
struct WindowTile {
  Vector<T> sums[windows][kPositions];

  [[gnu::always_inline]] void add(const T* x, int64_t below, const int32_t* taps, int64_t count,
                                  const T* weights) {
    for (int64_t t = 0; t < count; ++t, weights += kLanes<T>) {
      const Vector<T> w = load<T>(weights);
      const T *above = x + taps[t], *under = above + below;
#pragma GCC unroll 6
      for (int i = 0; i < windows; ++i) {
        sums[i][0] += w * above[2 * i];
        sums[i][1] += w * above[2 * i + 1];
        sums[i][2] += w * under[2 * i];
        sums[i][3] += w * under[2 * i + 1];
      }
    }
  }
  [[gnu::always_inline]] void add(const WindowTile& other) {
#pragma GCC unroll 6
    for (int i = 0; i < windows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) sums[i][j] += other.sums[i][j];
  }
};

// kLanes channels at `windows` windows: finish.y[i] is what window i comes to.
template <class T, int windows>
void window_tile(const T* x, int64_t below, const int32_t* taps, int64_t count, const T* weights,
                 Vector<T> bias, const Finish<T>& finish) {
  WindowTile<T, windows> tile{};
  const int64_t first = std::min(kDepth<T>, count);
  tile.add(x, below, taps, first, weights);
  for (int64_t t = first; t < count; t += kDepth<T>) {
    WindowTile<T, windows> more{};
    more.add(x, below, taps + t, std::min(kDepth<T>, count - t), weights + t * kLanes<T>);
    tile.add(more);
  }
  Vector<T> all{};
#pragma GCC unroll 6
  for (int i = 0; i < windows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPositions; ++j) tile.sums[i][j] += bias;
    all += (tile.sums[i][0] + tile.sums[i][1]) + (tile.sums[i][2] + tile.sums[i][3]);
  }
  if (has_nan<T>(all)) {
    for (int i = 0; i < windows; ++i) finish.pool_nan(tile.sums[i], i);
  } else {
#pragma GCC unroll 6
    for (int i = 0; i < windows; ++i) finish.pool(tile.sums[i], i);
  }
}
template <class T, int windows = kWindows, class... Rest>
void window_tiles(int64_t count, const Rest&... rest) {
  if constexpr (windows > 1) {
    if (count < windows) return window_tiles<T, windows - 1>(count, rest...);
  }
  window_tile<T, windows>(rest...);
}

// Filters as [kLanes channels of a group][tap][lane], taps in the order of a dense filter.
template <class T, class Element>
void pack_lanes(const ConvShape& s, const View& w, T* out) {
  constexpr int lanes = kLanes<T>;
  const int64_t taps = s.group_c() * s.taps();
  const bool dense = w.w == 1 && w.h == s.S && (s.group_c() == 1 || w.c == s.R * s.S);
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t k = 0; k < s.group_k(); k += lanes, out += taps * lanes) {
      const int64_t first = g * s.group_k() + k, live = std::min<int64_t>(lanes, s.group_k() - k);
      const Element* filter = static_cast<const Element*>(w.data) + first * w.n;
      for (int64_t t = 0; t < taps && dense; t += lanes) {
        Vector<T> r[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          r[i] = i < live ? load_some<T>(filter + i * w.n + t, taps - t) : Vector<T>{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          if (i < taps - t) store<T>(r[i], out + (t + i) * lanes);
      }
      if (dense) continue;
      int64_t t = 0;
      for (int64_t c = 0; c < s.group_c(); ++c)
        for (int64_t r = 0; r < s.R; ++r)
          for (int64_t f = 0; f < s.S; ++f, ++t)
            for (int64_t i = 0; i < lanes; ++i)
              out[t * lanes + i] = i < live ? T(weight_at<const Element>(w, first + i, c, r, f)) : T(0);
    }
}

template <class Element>
void by_channels(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int lanes = kLanes<T>;
  const ConvShape& s = a.shape;
  const Epilogue& e = a.epilogue;
  const WindowStrip strip = WindowStrip::channels(a);
  const int64_t taps = s.group_c() * s.taps();

  Carver carver(workspace);
  const WindowTables<T> tables(carver, s, lanes);
  read_bias<T, Element>(a, tables.bias);
  pack_lanes<T, Element>(s, a.w, tables.weights);
  int32_t* tap = tables.taps;
  for (int64_t c = 0; c < s.group_c(); ++c)
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t f = 0; f < s.S; ++f) *tap++ = static_cast<int32_t>(strip.tap(s, c, r, f));

  const int64_t parts = (e.pool.out.w + kWindows - 1) / kWindows;
  each_row<T, Element>(a, strip, kWindows, [&](int64_t n, int64_t h, const T* x, const WindowArrays<T>& at) {
    const T* weights = tables.weights;
    const Finish<T> finish{nullptr, e.act, true, at.y, e.offsets.data ? at.offsets : nullptr};
    for (int64_t g = 0; g < s.groups; ++g, x += s.group_c() * strip.plane())
      for (int64_t i = 0; i < s.group_k(); i += lanes, weights += taps * lanes) {
        const int64_t k = g * s.group_k() + i, live = std::min<int64_t>(lanes, s.group_k() - i);
        const Vector<T> bias = load_some<T>(tables.bias + k, live);
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t w = part_begin(part, parts, e.pool.out.w);
          const int64_t count = part_begin(part + 1, parts, e.pool.out.w) - w;
          window_tiles<T>(count, x + 2 * w, s.stride.h * strip.pitch(), tables.taps, taps, weights, bias,
                          finish);
          write<Element>(a.y, n, k, h, w, live, count, [&](int64_t j, int64_t c) { return at.y[c][j]; });
          if (e.offsets.data)
            write<uint8_t>(e.offsets, n, k, h, w, live, count,
                           [&](int64_t j, int64_t c) { return at.offsets[c][j]; });
        }
      }
  });
}

}  // namespace

void conv_act_pool_windows(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { by_windows<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}
void conv_act_pool_channels(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { by_channels<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
