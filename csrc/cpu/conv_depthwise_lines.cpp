// SPDX-License-Identifier: MIT
// fprop and dgrad of a 2-D depthwise convolution of stride one, 3x3, 5x5 or 7x7, with pixels side by side in
// the vector lanes, as they are in memory.
//
// A task is a plane. A band of its rows is copied with zeros around it; a tile is tile_rows rows of outputs,
// kTileVectors vectors wide. Each vector of the copy, at each of the filter's columns, is loaded once for all
// the rows of the tile that it reaches. dgrad is the same with the filter turned.
//
// The floor is a multiply-add's, 256 GFLOP/s in float32 on the Zen 5 core measured; but most loads cross a
// cache line, which counts as two of a cycle's two, and each feeds but the filter's rows. Reached (busy, one
// thread): 82 to 93 for 3x3 of 64 planes of four 56x56, 122 for 5x5 of 28x28, 142 to 155 for 7x7 of 56x56.
// A third of 3x3's time goes into the copy. Rows of 14 pixels and fewer leave lanes idle, and are better off
// with channels in the lanes (conv_depthwise.cpp), as is wgrad.
//
// Next: tiles that read the tensor itself, by masks where it ends.
#ifndef FASTCONV_ISA

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_depthwise_lines.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

namespace {

// Rows of a tile: as many as leave registers for a filter's weights, and divide images of 7 * 2^n pixels.
constexpr int tile_rows(int size) { return kVectorBytes == 64 && size == 3 ? 7 : 4; }
constexpr int kTileVectors = 2;
constexpr int64_t kBandElements = 1 << 13;

// y[k](p, q) = sum over r, s of x[k / outputs_per_channel](p + low_h + r, q + low_w + s) filter[k](r, s)
template <class Element>
struct Planes {
  int64_t images, outputs, rows, cols;  // of y
  int64_t outputs_per_channel, height, width, low_h, low_w;
  const Element* x;
  View x_view;
  Element* y;
  View y_view;
  const Element* filter;
  int64_t filter_output, filter_row, filter_col;  // strides
  const Element* bias;                            // or null
  Act act;
};

// What becomes of a sum: act(sum + bias).
template <class T>
struct Finish {
  T bias;
  bool adds, relu;

  [[gnu::always_inline]] Vector<T> operator()(Vector<T> v) const {
    if (adds) v += bias;
    return relu ? (v <= 0 ? Vector<T>{} : v) : v;
  }
};

// `rows` x `vectors` vectors of outputs, of which `live` pixels a row exist. x is what the first output's
// first tap meets.
template <class T, int size, int rows, int vectors, class Element>
[[gnu::noinline]] void tile(const T* x, int64_t pitch, const T* weights, const Finish<T>& finish,
                            Element* out, int64_t out_row, int64_t live) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> sums[rows][vectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < rows - 1 + size; ++i, x += pitch) {
#pragma GCC unroll 8
    for (int f = 0; f < size; ++f) {
      Vector<T> v[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) v[j] = load<T>(x + f + j * lanes), keep(v[j]);
#pragma GCC unroll 8
      for (int o = 0; o < rows; ++o)
        if (i >= o && i < o + size) {
#pragma GCC unroll 2
          for (int j = 0; j < vectors; ++j) sums[o][j] += weights[(i - o) * size + f] * v[j];
        }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < rows; ++o, out += out_row)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store_some<T>(finish(sums[o][j]), out + j * lanes, live - j * lanes);
}

// Copies `rows` rows of a plane, from row h on, to lines whose elements [0, cols) are columns from p.low_w
// on, zero outside the image. Vectors may be written behind them.
template <class T, class Element>
void copy_rows(const Planes<Element>& p, const Element* plane, int64_t h, int64_t rows, int64_t cols, T* to,
               int64_t pitch) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = std::clamp<int64_t>(-p.low_w, 0, cols),
                count = std::clamp<int64_t>(p.width - p.low_w, begin, cols) - begin;
  for (int64_t i = 0; i < rows; ++i, to += pitch) {
    const bool exists = h + i >= 0 && h + i < p.height;
    const Element* const from = plane + (h + i) * p.x_view.h + p.low_w + begin;
    T* const line = to + begin;
    for (int64_t j = 0; j < begin; j += lanes) store<T>(Vector<T>{}, to + j);
    int64_t j = 0;
    for (; exists && j + lanes <= count; j += lanes) store<T>(load<T>(from + j), line + j);
    if (exists && j < count) store<T>(load_some<T>(from + j, count - j), line + j), j += lanes;
    for (; j < cols - begin; j += lanes) store<T>(Vector<T>{}, line + j);
  }
}

template <int size, class Element>
void correlate(const Planes<Element>& p) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>, most = tile_rows(size);
  // Lines begin so that the image does at whole vectors.
  const int64_t cols = p.cols + size - 1, pitch = (cols + 4 * lanes) / lanes * lanes;
  const int64_t shift = (lanes - std::clamp<int64_t>(-p.low_w, 0, cols) % lanes) % lanes;
  const int64_t band_rows =
      std::clamp<int64_t>(kBandElements / pitch - size, most, std::max<int64_t>(most, p.rows));
  const double plane_us = double(p.rows * pitch) * (8 + size * size) * 5e-5;
  parallel_for(p.images * p.outputs, plane_us, [&](int64_t i) {
    const int64_t n = i / p.outputs, k = i % p.outputs;
    T* const copy = static_cast<T*>(thread_scratch((band_rows + size) * pitch * int64_t(sizeof(T)))) + shift;
    T weights[size * size];
    for (int tap = 0; tap < size * size; ++tap)
      weights[tap] = T(p.filter[k * p.filter_output + tap / size * p.filter_row + tap % size * p.filter_col]);
    const Finish<T> finish{p.bias ? T(p.bias[k]) : T(0), p.bias != nullptr, p.act == Act::relu};
    const Element* const plane = p.x + n * p.x_view.n + k / p.outputs_per_channel * p.x_view.c;
    for (int64_t first = 0; first < p.rows; first += band_rows) {
      const int64_t rows = std::min(band_rows, p.rows - first);
      copy_rows<T>(p, plane, first + p.low_h, rows + size - 1, cols, copy, pitch);
      Element* const to = p.y + n * p.y_view.n + k * p.y_view.c + first * p.y_view.h;
      for (int64_t col = 0; col < p.cols; col += kTileVectors * lanes) {
        const auto run = [&](auto count, int64_t row) {
          const int64_t live = p.cols - col;
          const auto compute =
              live > lanes ? tile<T, size, count, kTileVectors, Element> : tile<T, size, count, 1, Element>;
          compute(copy + row * pitch + col, pitch, weights, finish, to + row * p.y_view.h + col, p.y_view.h,
                  live);
        };
        int64_t row = 0;
        for (; row + most <= rows; row += most) run(std::integral_constant<int, most>{}, row);
        for (; row < rows; ++row) run(std::integral_constant<int, 1>{}, row);
      }
    }
  });
}

template <class Element>
void correlate_of(int64_t size, const Planes<Element>& p) {
  if (size == 3) return correlate<3>(p);
  if (size == 5) return correlate<5>(p);
  correlate<7>(p);
}

}  // namespace

void conv_fprop_depthwise_lines(const ConvArgs& a, void*, void*) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    correlate_of<Element>(s.R, {s.N, s.K, s.P, s.Q, s.group_k(), s.H, s.W, -s.padding.h, -s.padding.w,
                                static_cast<const Element*>(a.x.data), a.x, static_cast<Element*>(a.y.data),
                                a.y, static_cast<const Element*>(a.w.data), a.w.n, a.w.h, a.w.w,
                                static_cast<const Element*>(a.epilogue.bias), a.epilogue.act});
  });
}

void conv_dgrad_depthwise_lines(const ConvArgs& a, void*, void*) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    correlate_of<Element>(
        s.R, {s.N, s.C, s.H, s.W, 1, s.P, s.Q, s.padding.h - (s.R - 1), s.padding.w - (s.S - 1),
              static_cast<const Element*>(a.y.data), a.y, static_cast<Element*>(a.x.data), a.x,
              static_cast<const Element*>(a.w.data) + (s.R - 1) * a.w.h + (s.S - 1) * a.w.w, a.w.n, -a.w.h,
              -a.w.w, nullptr, Act::none});
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
