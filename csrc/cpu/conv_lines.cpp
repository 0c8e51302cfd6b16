// SPDX-License-Identifier: MIT
// 2-D convolution with lines of pixels in the vector lanes, for results whose pixels lie side by side: the
// correlations of correlation.inl, straight from the slab (slab.inl).
//
// The filter is packed once a call, in blocks of up to kTileOutputs output channels. A task is a band of
// output rows of an image: it fills the slab of all its channels, and for each block and each kTileVectors
// vectors of a row keeps the sums in registers through the whole depth; an element of the depth costs
// kTileVectors loads, wherever they lie in the slab, and one broadcast an output channel. Neither panels nor
// sums go through memory, as they do in conv_slab.cpp, which pays where the depth is small: first layers. In
// turn the last vector of each row is a rest: rows of few pixels are better off there.
//
// The tile is as in conv_pixels.cpp. The floor is the fused multiply-add rate, 117 GFLOP/s in float32 on the
// Zen 4 core measured. Reached: the 7x7 of 3 channels of 224x224 108, 3x3 of as many 89 to 93, and of one
// channel of 28x28, with 4 of 32 lanes idle and 28 stores after 9 elements of the depth, 63.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_lines.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

#include "cpu/slab.inl"

#include "cpu/correlation.inl"

namespace {

constexpr int kTileOutputs = kVectorBytes == 64 ? 14 : 6, kTileVectors = 2;
constexpr int64_t kChain = 64;  // elements of the depth that add up before they join the total

// Where a tile is written: y[output * step + pixel], `live` pixels.
template <class T, class Element>
struct Outputs {
  Element* y;
  int64_t step, live;
  const Element* bias;
  Act act;
};

template <class T, int outputs, int vectors, class Element>
[[gnu::noinline]] void line_tile(const T* x, const int32_t* places, int64_t depth, const T* weights,
                                 const Outputs<T, Element>& out, Vector<T>* totals) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[outputs][vectors] = {};
  for (int64_t t = 0; t < depth;) {
    const int64_t end = std::min(depth, t + kChain);
    if (t > 0) {
#pragma GCC unroll 16
      for (int k = 0; k < outputs; ++k)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) {
          Vector<T>* total = totals + k * vectors + j;
          *total = t == kChain ? sums[k][j] : *total + sums[k][j];
          sums[k][j] = Vector<T>{};
        }
    }
#pragma GCC unroll 1
    for (; t < end; ++t, weights += outputs) {
      Vector<T> line[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) line[j] = load<T>(x + places[t] + j * lanes);
#pragma GCC unroll 16
      for (int k = 0; k < outputs; ++k)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) sums[k][j] += weights[k] * line[j];
    }
  }
  if (depth > kChain) {
#pragma GCC unroll 16
    for (int k = 0; k < outputs; ++k)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[k][j] += totals[k * vectors + j];
  }
#pragma GCC unroll 16
  for (int k = 0; k < outputs; ++k) {
    const Vector<T> bias = Vector<T>{} + (out.bias ? T(out.bias[k]) : T(0));
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      const Vector<T> v = out.bias ? sums[k][j] + bias : sums[k][j];
      store_some<T>(out.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v, out.y + k * out.step + j * lanes,
                    out.live - j * lanes);
    }
  }
}
template <class T, int vectors, int outputs = kTileOutputs, class... Rest>
void some_outputs(int64_t count, const Rest&... rest) {
  if constexpr (outputs > 1) {
    if (count < outputs) return some_outputs<T, vectors, outputs - 1>(count, rest...);
  }
  line_tile<T, outputs, vectors>(rest...);
}

template <class Element>
void correlate(const Correlation<Element>& c, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int64_t width = kTileVectors * kLanes<T>;
  const Grid& g = c.grid;
  const int64_t depth = c.depth();
  if (c.pixels() == 0 || c.outputs == 0) return;

  // The filter as [block][channel][tap][output of the block].
  auto* const filter = static_cast<T*>(workspace);
  const int64_t blocks = (c.outputs + kTileOutputs - 1) / kTileOutputs;
  const auto block = [&](int64_t i) {
    return Rows{part_begin(i, blocks, c.outputs), part_begin(i + 1, blocks, c.outputs)};
  };
  parallel_for(blocks, double(depth) * kTileOutputs * 1e-3, [&](int64_t i) {
    const Rows k = block(i);
    T* to = filter + k.begin * depth;
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t t = 0; t < g.count; ++t)
        for (int64_t j = k.begin; j < k.end; ++j)
          *to++ = T(c.filter[j * c.filter_output + channel * c.filter_channel + g.taps[t].weight]);
  });

  // Where each element of the depth lies in the slab, from what the first pixel meets first.
  auto* const places = reinterpret_cast<int32_t*>(filter + c.outputs * depth);
  const RowBands bands(g.images, g.rows, g.cols);
  const SlabShape shape(g, (bands.most_rows() - 1) * g.step_h + std::max<int64_t>(1, g.span_h));
  for (int64_t t = 0; t < g.count; ++t) {
    const int64_t tap = shape.tap(g, g.taps[t]);
    for (int64_t channel = 0; channel < c.channels; ++channel)
      places[channel * g.count + t] = static_cast<int32_t>(channel * shape.size + tap);
  }

  const double task_us = macs_us(double(bands.most_rows() * g.cols * c.outputs) * double(depth + 8));
  parallel_for(g.images * bands.count, task_us, [&](int64_t task) {
    const int64_t image = task / bands.count;
    const Rows rows = bands.band(task % bands.count);
    const int64_t slab_size = c.channels * shape.size + width;
    auto* const totals = static_cast<Vector<T>*>(
        thread_scratch(kTileOutputs * kTileVectors * kVectorBytes + slab_size * int64_t(sizeof(T))));
    T* const slab = reinterpret_cast<T*>(totals + kTileOutputs * kTileVectors);
    std::fill(slab, slab + slab_size, T(0));
    const Segment segment{image, g.low_h + rows.begin * g.step_h,
                          (rows.size() - 1) * g.step_h + std::max<int64_t>(1, g.span_h), 0};
    if (g.count > 0) fill_slab<T>(c.x, c.x_view, g, shape, &segment, 1, c.channels, false, slab);

    for (int64_t i = 0; i < blocks; ++i) {
      const Rows k = block(i);
      for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t q = 0; q < g.cols; q += width) {
          const int64_t live = std::min(width, g.cols - q);
          const Outputs<T, Element> out{
              c.y + image * c.y_view.n + k.begin * c.y_view.c + row * c.y_view.h + q, c.y_view.c, live,
              c.bias ? c.bias + k.begin : nullptr, c.act};
          const T* x = slab + (row - rows.begin) * g.step_h * shape.pitch + q;
          const T* weights = filter + k.begin * depth;
          if (live > kLanes<T>)
            some_outputs<T, kTileVectors>(k.size(), x, places, depth, weights, out, totals);
          else
            some_outputs<T, 1>(k.size(), x, places, depth, weights, out, totals);
        }
    }
  });
}

}  // namespace

void conv_fprop_lines(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    fprop_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

void conv_dgrad_lines(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    dgrad_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
