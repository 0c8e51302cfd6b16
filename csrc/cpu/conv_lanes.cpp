// SPDX-License-Identifier: MIT
// 2-D convolution with the batch in the vector lanes (lanes.inl), alone or with ReLU and max-pool behind it,
// and its gradients with theirs in front.
//
//   fprop, dgrad  a tile is 2x2 output pixels x up to kChannels channels. Each tap costs one aligned load a
//                 pixel and one broadcast weight a channel: 10 loads for 24 fused multiply-adds. What a tap
//                 is (row, column, channel, stride, dilation) is an offset in a table; dgrad has a table for
//                 each residue of the input position modulo the stride. Taps in the zero padding are left
//                 out.
//   wgrad         a tile is taps x output channels, up to kSums of them, summed over the pixels of a band and
//                 then over the lanes. Pieces of the batch add up in a fixed order.
//   max-pool      2x2/2 windows are the four pixels of a tile and never leave the registers; others come from
//                 the band. backward spreads the pooled gradient over a band by its offsets.
//
// A task is a block of images and a band of rows that together fit the second-level cache. The floor is the
// fused multiply-add rate, 2 * lanes * 2 a cycle.
#ifndef FASTCONV_ISA

#include "cpu/lanes_plan.h"
#include "cpu/parallel.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_lanes.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/lanes_conv.inl"

namespace {

// --- fprop, with what follows it

// Offsets are integers in memory and numbers in lanes.
template <class T>
void read_offsets(const ConvArgs& a, const Band& band, int64_t h, const Block<T>& block, Vector<T>* out) {
  const Window& v = a.epilogue.pool;
  if (offset_type(v.kernel.cells()) == Offset::u8)
    read_band<T, uint8_t>(a.epilogue.offsets, v.out.h, v.out.w, band, h, 0, block, out);
  else
    read_band<T, int32_t>(a.epilogue.offsets, v.out.h, v.out.w, band, h, 0, block, out);
}
template <class T>
void write_offsets(const ConvArgs& a, const Band& band, int64_t h, const Block<T>& block,
                   const Vector<T>* in) {
  if (offset_type(a.epilogue.pool.kernel.cells()) == Offset::u8)
    write_band<T, uint8_t>(a.epilogue.offsets, band, h, block, in);
  else
    write_band<T, int32_t>(a.epilogue.offsets, band, h, block, in);
}

template <class T>
struct ForwardArrays {
  Vector<T>*x, *y, *offsets, *conv;
  PixelList pixels;

  ForwardArrays(Carver& carver, int64_t x_size, int64_t y_size, int64_t offsets_size, int64_t conv_size,
                int64_t rows, int64_t cols)
      : x(carver.take<Vector<T>>(x_size)),
        y(carver.take<Vector<T>>(y_size)),
        offsets(carver.take<Vector<T>>(offsets_size)),
        conv(carver.take<Vector<T>>(conv_size)),
        pixels(carver, rows, cols) {}
};

template <class Element>
void forward(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const Epilogue& e = a.epilogue;
  const LanesForward plan(a);
  const int64_t taps = s.group_c() * s.taps();
  const Band x_band{plan.in_rows(plan.conv_rows), plan.in_cols(), s.C};

  Carver carver(workspace);
  T* const weights = carver.take<T>(s.K * taps);
  T* const bias = carver.take<T>(s.K);
  int32_t* const offsets = carver.take<int32_t>(taps);
  for (int64_t k = 0; k < s.K; ++k) bias[k] = e.bias ? T(static_cast<const Element*>(e.bias)[k]) : T(0);
  pack_filters<T, Element>(s, a.w, x_band, weights, offsets);

  parallel_for(Block<T>::count(s.N) * plan.bands, plan.task_us(kLanes<T>), [&](int64_t task) {
    const Block<T> block(task / plan.bands, s.N);
    const Rows y = plan.output_rows(task % plan.bands), p = plan.conv_rows_of(y);
    const Band y_band{y.size(), plan.cols, s.K}, conv_band{p.size(), s.Q, s.K};
    auto at = in_scratch<ForwardArrays<T>>(x_band.size(), y_band.size(), e.offsets.data ? y_band.size() : 0,
                                           plan.pools_band ? conv_band.size() : 0, plan.conv_rows, s.Q);
    read_band<T, Element>(a.x, s.H, s.W, x_band, p.begin * s.stride.h - s.padding.h, -s.padding.w, block,
                          at.x);
    // Where 2x2 pixels become one, all four have its place.
    const int64_t shrink = plan.pools_tile ? 2 : 1;
    const int64_t rows = plan.pools_tile ? 2 * y.size() : p.size();
    const int64_t cols = plan.pools_tile ? 2 * plan.cols : s.Q;
    const Band& sums_band = plan.pools_band ? conv_band : y_band;
    Axis::rows(s).steps(
        p.begin, rows, at.pixels.rows, [&](int64_t h) { return x_band.at(h, 0); },
        [&](int64_t h) { return sums_band.at(h / shrink, 0); });
    Axis::cols(s).steps(
        0, cols, at.pixels.cols, [&](int64_t w) { return x_band.at(0, w); },
        [&](int64_t w) { return sums_band.at(0, w / shrink); });
    const Pixels pixels = at.pixels.tiles(rows, cols);
    correlate_groups<T>(s, weights, offsets, at.x, pixels,
                        {bias, e.act, plan.pools_tile, plan.pools_band ? at.conv : at.y,
                         plan.pools_tile && e.offsets.data ? at.offsets : nullptr});
    if (plan.pools_band)
      pool_band<T>(e.pool, conv_band, p.begin, s.P, s.Q, at.conv, y_band, y.begin, y.size(), at.y,
                   e.offsets.data ? at.offsets : nullptr);
    write_band<T, Element>(a.y, y_band, y.begin, block, at.y);
    if (e.offsets.data) write_offsets<T>(a, y_band, y.begin, block, at.offsets);
  });
}

// --- the gradient at the convolution's own output

// What it is made of: a gradient, and, where ReLU or max-pool follow the convolution, their output y and
// offsets.
struct Gradient {
  const ConvArgs& conv;
  View grad_y;
  bool gated, pooled;

  bool is_plain() const { return !gated && !pooled; }
  Window window() const {
    Window v = pooled ? conv.epilogue.pool : Window{};
    if (!pooled) v.out = {1, conv.shape.P, conv.shape.Q};
    return v;
  }
  // Rows of grad_y whose windows reach rows [p, p + rows).
  Rows sources(int64_t p, int64_t rows) const {
    const Window v = window();
    const int64_t last = p + rows - 1 + v.padding.h;
    const int64_t first = p + v.padding.h - (v.kernel.h - 1) * v.dilation.h + v.stride.h - 1;
    const int64_t begin = first < 0 ? 0 : first / v.stride.h;
    const int64_t end = last < 0 ? 0 : std::min(v.out.h, last / v.stride.h + 1);
    return {begin, std::max(begin, end)};
  }
  int64_t most_sources(int64_t rows) const {
    const Window v = window();
    return std::min(v.out.h, (rows - 1 + (v.kernel.h - 1) * v.dilation.h) / v.stride.h + 1);
  }
};

template <class T>
struct GradientArrays {
  Vector<T>*sum, *grad, *gate, *offsets;

  GradientArrays(Carver& carver, const Gradient& g, const Band& band)
      : sum(carver.take<Vector<T>>(band.size())) {
    const int64_t size = Band{g.most_sources(band.rows), g.window().out.w, band.channels}.size();
    grad = carver.take<Vector<T>>(g.is_plain() ? 0 : size);
    gate = carver.take<Vector<T>>(g.gated ? size : 0);
    offsets = carver.take<Vector<T>>(g.pooled ? size : 0);
  }
};

// Reads the gradient at pixels (p, q) of the convolution's output, and those that follow, into a band; zero
// outside the output.
template <class T, class Element>
void read_gradient(const Gradient& g, const Band& band, int64_t p, int64_t q, const Block<T>& block,
                   const GradientArrays<T>& at) {
  const ConvShape& s = g.conv.shape;
  if (g.is_plain()) return read_band<T, Element>(g.grad_y, s.P, s.Q, band, p, q, block, at.sum);
  const Window v = g.window();
  const Rows rows = g.sources(p, band.rows);
  const Band source{rows.size(), v.out.w, s.K};
  read_band<T, Element>(g.grad_y, v.out.h, v.out.w, source, rows.begin, 0, block, at.grad);
  if (g.gated) {
    read_band<T, Element>(g.conv.y, v.out.h, v.out.w, source, rows.begin, 0, block, at.gate);
    for (int64_t i = 0; i < source.size(); ++i) at.grad[i] = at.gate[i] <= 0 ? Vector<T>{} : at.grad[i];
  }
  if (g.pooled) read_offsets<T>(g.conv, source, rows.begin, block, at.offsets);
  const Unpool<T> unpool{source, source.rows, source.cols, at.grad, g.pooled ? at.offsets : nullptr};
  if (g.pooled && is_tile(v) && q <= 0 && q + band.cols >= s.Q) {
    const int64_t top = rows.begin * 2 - p;
    zero_frame(band, {std::max<int64_t>(top, 0), top + 2 * source.rows}, {-q, 2 * source.cols - q}, at.sum);
    spread_tiles<T>(unpool, band, top, -q, at.sum);
  } else {
    spread<T>(v, rows.begin, unpool, band, p, q, s.P, s.Q, at.sum);
  }
}

template <class T>
struct BackwardArrays {
  GradientArrays<T> gradient;
  Vector<T>* x;
  PixelList pixels;

  BackwardArrays(Carver& carver, const Gradient& g, const Band& band, int64_t x_size, int64_t rows,
                 int64_t cols)
      : gradient(carver, g, band), x(carver.take<Vector<T>>(x_size)), pixels(carver, rows, cols) {}
};

// --- dgrad

template <class Element>
void dgrad(const Gradient& gradient, const View& grad_x, const View& w, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = gradient.conv.shape;
  const LanesDgrad plan(gradient.conv);
  const Band y_band{plan.gradient_rows(plan.rows_per_band), plan.gradient_cols(), s.K};

  // For each phase: the offsets of its taps, and its filters, group by group.
  Carver carver(workspace);
  T* const zeros = carver.take<T>(s.group_c());
  T* const all_weights = carver.take<T>(s.K * s.group_c() * s.taps());
  int32_t* const all_offsets = carver.take<int32_t>(s.group_k() * s.taps());
  const PhaseFilters<T> filters{s, all_weights, all_offsets};
  std::fill(zeros, zeros + s.group_c(), T(0));
  filters.template pack<Element>(w, y_band);

  parallel_for(Block<T>::count(s.N) * plan.bands, plan.task_us(kLanes<T>), [&](int64_t task) {
    const Block<T> block(task / plan.bands, s.N);
    const Rows h = plan.input_rows(task % plan.bands);
    const Band x_band{h.size(), s.W, s.C};
    auto at = in_scratch<BackwardArrays<T>>(gradient, y_band, x_band.size(), h.size(), s.W);
    const int64_t p = first_reached(h.begin, s.padding.h, s.R, s.dilation.h, s.stride.h);
    const int64_t q = first_reached(0, s.padding.w, s.S, s.dilation.w, s.stride.w);
    read_gradient<T, Element>(gradient, y_band, p, q, block, at.gradient);
    filters.correlate_rows(
        h, p, q, y_band, at.gradient.sum, zeros, at.pixels, [&](int64_t i) { return x_band.at(i, 0); },
        [&](int64_t i) { return x_band.at(0, i); }, at.x);
    write_band<T, Element>(grad_x, x_band, h.begin, block, at.x);
  });
}

// --- wgrad

template <class Element>
void wgrad(const Gradient& gradient, const View& x, const View& grad_w, void* grad_b, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = gradient.conv.shape;
  const LanesWgrad plan(gradient.conv);
  const int64_t taps = s.group_c() * s.taps(), sums = s.K * (taps + 1);  // behind the filters the biases
  const Band x_band{plan.in_rows(plan.rows_per_band), plan.in_cols(), s.C};
  const Band y_band{plan.rows_per_band, s.Q, s.K};

  Carver carver(workspace);
  T* const pieces = carver.take<T>(plan.pieces * sums);
  int32_t* const offsets = carver.take<int32_t>(taps);
  each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
    offsets[t] = bytes_of(x_band.at(r * s.dilation.h, f * s.dilation.w) + c);
  });

  const auto add_band = [&](const Block<T>& block, const Rows& p, T* total) {
    auto at = in_scratch<BackwardArrays<T>>(gradient, y_band, x_band.size(), p.size(), s.Q);
    read_band<T, Element>(x, s.H, s.W, x_band, p.begin * s.stride.h - s.padding.h, -s.padding.w, block, at.x);
    read_gradient<T, Element>(gradient, y_band, p.begin, 0, block, at.gradient);
    for (int64_t h = 0; h < p.size(); ++h)
      at.pixels.rows[h] = {x_band.at(h * s.stride.h, 0), y_band.at(h, 0), {}};
    for (int64_t v = 0; v < s.Q; ++v) at.pixels.cols[v] = {x_band.at(0, v * s.stride.w), y_band.at(0, v), {}};
    at.pixels.tiles(p.size(), s.Q);
    wgrad_pixels<T>(s, at.x, offsets, at.gradient.sum, at.pixels, p.size() * s.Q, grad_b, total);
  };
  parallel_for(plan.pieces, plan.piece_us(), [&](int64_t piece) {
    T* const total = pieces + piece * sums;
    std::fill(total, total + sums, T(0));
    for (int64_t unit = plan.unit(piece); unit < plan.unit(piece + 1); ++unit) {
      const int64_t image = unit / plan.bands * kUnit, end = std::min(s.N, image + kUnit);
      for (int64_t i = image; i < end; i += kLanes<T>)
        add_band(Block<T>(i / kLanes<T>, s.N), plan.output_rows(unit % plan.bands), total);
    }
  });

  const auto total_of = [&](int64_t i) {
    T sum = pieces[i];
    for (int64_t piece = 1; piece < plan.pieces; ++piece) sum += pieces[piece * sums + i];
    return Element(sum);
  };
  parallel_for(s.K, double(taps * plan.pieces) * 1e-3, [&](int64_t k) {
    each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
      weight_at<Element>(grad_w, k, c, r, f) = total_of(k * taps + t);
    });
    if (grad_b) static_cast<Element*>(grad_b)[k] = total_of(s.K * taps + k);
  });
}

Gradient plain(const ConvArgs& a) { return {a, a.y, false, false}; }

}  // namespace

void conv_fprop_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

void conv_act_pool_lanes(const ConvArgs& a, void* workspace, void* stream) {
  conv_fprop_lanes(a, workspace, stream);
}

void conv_dgrad_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype,
             [&](auto* t) { dgrad<std::remove_pointer_t<decltype(t)>>(plain(a), a.x, a.w, workspace); });
}

void conv_wgrad_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    wgrad<std::remove_pointer_t<decltype(t)>>(plain(a), a.x, a.w, a.bias_grad, workspace);
  });
}

void conv_act_pool_backward_lanes(const ConvActPoolBackwardArgs& a, void* workspace, void*) {
  const Gradient gradient{a.conv, a.grad_y, a.conv.epilogue.act == Act::relu, a.conv.epilogue.pools()};
  with_dtype(a.conv.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    if (a.grad_x.data) dgrad<Element>(gradient, a.grad_x, a.conv.w, workspace);
    if (a.grad_w.data) wgrad<Element>(gradient, a.conv.x, a.grad_w, a.grad_b, workspace);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
