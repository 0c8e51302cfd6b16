// SPDX-License-Identifier: MIT
// 2-D convolution, ReLU and 2x2/2 max-pool of few images: windows of the pool in the vector lanes, of one
// image or several. The input under a window is copied, element by element, into a band of its own
// (lanes.inl), so that each window is a small image; then a tile of conv_lanes.cpp computes the window's four
// pixels.
//
// LeNet's convolutions have 7,800 and 19,200 tiles' multiply-adds an image (2.2 and 5.3 us on a core that
// does one a cycle at 3.6 GHz) and 14,400 elements to copy, about 1 ns each.
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

template <class T>
struct WindowArrays {
  Vector<T>*x, *y, *offsets;

  WindowArrays(Carver& carver, const Band& band, int64_t channels)
      : x(carver.take<Vector<T>>(band.size())),
        y(carver.take<Vector<T>>(channels)),
        offsets(carver.take<Vector<T>>(channels)) {}
};

// The i-th window of all images.
struct Place {
  int64_t n, h, w;

  Place(int64_t i, const Extent3& out) : n(i / out.cells()), h(i / out.w % out.h), w(i % out.w) {}
};

// One lane of a band: the input from pixel (h0, w0) of image n, zero outside.
template <class T, class Element>
void copy_window(const ConvArgs& a, const Band& band, int64_t n, int64_t h0, int64_t w0, T* out) {
  const ConvShape& s = a.shape;
  const Rows rows = inside(h0, band.rows, s.H), cols = inside(w0, band.cols, s.W);
  const int64_t step = band.pitch() * kLanes<T>;
  if (rows.size() < band.rows || cols.size() < band.cols)
    for (int64_t i = 0; i < band.size(); ++i) out[i * kLanes<T>] = T(0);
  const auto* first = static_cast<const Element*>(a.x.data) + n * a.x.n + h0 * a.x.h + w0 * a.x.w;
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t c = 0; c < s.C; ++c) {
      const Element* from = first + h * a.x.h + c * a.x.c;
      T* to = out + (band.at(h, 0) + c) * kLanes<T>;
      for (int64_t w = cols.begin; w < cols.end; ++w) to[w * step] = T(from[w * a.x.w]);
    }
}

template <class Element>
void forward(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const Epilogue& e = a.epilogue;
  const Extent3 out = e.pool.out;
  const Band band = window_band(s);
  Carver carver(workspace);
  const WindowTables<T> tables(carver, s);
  for (int64_t k = 0; k < s.K; ++k)
    tables.bias[k] = e.bias ? T(static_cast<const Element*>(e.bias)[k]) : T(0);
  pack_filters<T, Element>(s, a.w, band, tables.weights, tables.taps);
  PixelList list = tables.list;
  for (int64_t i = 0; i < 2; ++i) {
    list.rows[i] = {band.at(i * s.stride.h, 0), 0, {0, s.R}};
    list.cols[i] = {band.at(0, i * s.stride.w), 0, {0, s.S}};
  }
  const Pixels pixels = list.tiles(2, 2);

  const int64_t total = s.N * out.cells(), tasks = (total + kLanes<T> - 1) / kLanes<T>;
  parallel_for(tasks, double(band.rows * band.cols * s.C * kLanes<T>) * 2e-3, [&](int64_t task) {
    auto at = in_scratch<WindowArrays<T>>(band, s.K);
    T* const lanes = reinterpret_cast<T*>(at.x);
    const int64_t first = task * kLanes<T>;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {  // a lane without a window has the last one again
      const Place p(std::min(first + lane, total - 1), out);
      copy_window<T, Element>(a, band, p.n, 2 * p.h * s.stride.h - s.padding.h,
                              2 * p.w * s.stride.w - s.padding.w, lanes + lane);
    }
    correlate_groups<T>(s, tables.weights, tables.taps, at.x, pixels,
                        {tables.bias, e.act, true, at.y, e.offsets.data ? at.offsets : nullptr});
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes<T>, total - first); ++lane) {
      const Place p(first + lane, out);
      Element* y = static_cast<Element*>(a.y.data) + p.n * a.y.n + p.h * a.y.h + p.w * a.y.w;
      for (int64_t k = 0; k < s.K; ++k) y[k * a.y.c] = Element(at.y[k][lane]);
      if (!e.offsets.data) continue;
      const View& v = e.offsets;
      uint8_t* offset = static_cast<uint8_t*>(v.data) + p.n * v.n + p.h * v.h + p.w * v.w;
      for (int64_t k = 0; k < s.K; ++k) offset[k * v.c] = static_cast<uint8_t>(at.offsets[k][lane]);
    }
  });
}

}  // namespace

void conv_act_pool_windows(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
