// SPDX-License-Identifier: MIT
// 2-D convolution of channels side by side, with output channels in the vector lanes: the layout of the
// result is that of the registers, and of the input a tile needs single elements, which are read where they
// are.
//
//   fprop, dgrad  the correlations of correlation.inl
//
// The filter is packed once a call, in blocks of kTileVectors vectors of output channels. A task is a band of
// output rows: for each block, a tile is up to kTilePixels pixels of a row; an element of the filter's depth
// costs kTileVectors loads and one broadcast a pixel. Along a row of the filter the depth is one run of
// memory. Where something has to be padded or converted, or pixels would fall into the same sets of the
// cache, the band's input is copied first.
//
// The tile is the widest that leaves registers for its operands: 14 x 2 of AVX-512's 32, which divides images
// of 7 * 2^n pixels, 6 x 2 of 16. Two vectors rather than four halve what is read of the filter, which comes
// from the second-level cache. Long sums are cut, as their rounding errors grow with their length.
//
// The floor is the fused multiply-add rate, 117 GFLOP/s in float32 on the Zen 4 core measured. Reached: 3x3
// of 64 to 512 channels 105 to 111, 1x1 of 64 and more 98 to 104, of 24 92, the 7x7 of 3 channels 105. A tile
// ends with 28 stores, as much as 5 elements of the depth: 68 where the depth is 9.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_pixels.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

#include "cpu/slab.inl"

#include "cpu/correlation.inl"

namespace {

constexpr int kTilePixels = kVectorBytes == 64 ? 14 : 6, kTileVectors = 2;
constexpr int64_t kBandPixels = 224;
constexpr int64_t kChain = 48;  // elements of the depth that add up before they join the total

// Elements of the depth that follow each other in the input, from the one that the first pixel meets; at most
// kChain.
struct Run {
  int64_t from, length, depth;
};

// Where the tiles of one block of channels are written: y[pixel * step + channel], `live` channels.
template <class T, class Element>
struct Outputs {
  Element* y;
  int64_t step, live;
  const Element* bias;
  Act act;
};

template <class T, int pixels, int vectors, class Element>
[[gnu::noinline]] void pixel_tile(const T* x, int64_t pixel, const Run* runs, int64_t count, const T* weights,
                                  const Outputs<T, Element>& out, Vector<T>* totals) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[pixels][vectors] = {};
  int64_t chain = 0;
  bool is_first = true;
  for (const Run* run = runs; run < runs + count; ++run) {
    chain += run->length;
    if (chain > kChain) {
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) {
          Vector<T>* total = totals + p * vectors + j;
          *total = is_first ? sums[p][j] : *total + sums[p][j];
          sums[p][j] = Vector<T>{};
        }
      is_first = false, chain = run->length;
    }
    // Five pixels share a pointer: addresses hold 1, 2 and 4 times a distance.
    constexpr int groups = (pixels + 4) / 5;
    const T* from[groups];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) from[g] = x + run->from + g * 5 * pixel;
    const T* w = weights + run->depth * vectors * lanes;
#pragma GCC unroll 1
    for (int64_t i = 0; i < run->length; ++i, w += vectors * lanes) {
      Vector<T> line[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) line[j] = load<T>(w + j * lanes);
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) sums[p][j] += from[p / 5][i + p % 5 * pixel] * line[j];
    }
  }
  if (!is_first) {
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[p][j] += totals[p * vectors + j];
  }
#pragma GCC unroll 2
  for (int j = 0; j < vectors; ++j) {
    const int64_t live = out.live - j * lanes;
    const Vector<T> bias = out.bias ? load_some<T>(out.bias + j * lanes, live) : Vector<T>{};
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
      const Vector<T> v = out.bias ? sums[p][j] + bias : sums[p][j];
      store_some<T>(out.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v, out.y + p * out.step + j * lanes,
                    live);
    }
  }
}
template <class T, int vectors, int pixels = kTilePixels, class... Rest>
void some_pixels(int64_t count, const Rest&... rest) {
  if constexpr (pixels > 1) {
    if (count < pixels) return some_pixels<T, vectors, pixels - 1>(count, rest...);
  }
  pixel_tile<T, pixels, vectors>(rest...);
}

// Vectors of a filter's block from output `first`.
template <class T>
int64_t block_vectors(int64_t outputs, int64_t first) {
  return std::min<int64_t>(kTileVectors, (outputs - first + kLanes<T> - 1) / kLanes<T>);
}

// The filter as [block][tap][channel][output of the block].
template <class T, class Element>
void pack_blocks(const Correlation<Element>& c, T* out) {
  constexpr int lanes = kLanes<T>, width = kTileVectors * lanes;
  const int64_t blocks = (c.outputs + width - 1) / width;
  parallel_for(blocks * c.grid.count, double(c.channels) * width * 1e-3, [&](int64_t i) {
    const int64_t block = i / c.grid.count, tap = i % c.grid.count, first = block * width;
    const int64_t columns = block_vectors<T>(c.outputs, first) * lanes;
    T* to = out + first * c.depth() + tap * c.channels * columns;
    const Element* filter = c.filter + first * c.filter_output + c.grid.taps[tap].weight;
    for (int64_t v = 0; v < columns; v += lanes, to += lanes, filter += lanes * c.filter_output) {
      const int64_t live = std::min<int64_t>(lanes, c.outputs - first - v);
      for (int64_t k = 0; k < c.channels; k += lanes) {
        Vector<T> r[lanes];
        load_block<T>(filter + k * c.filter_channel, c.filter_output, c.filter_channel, live, c.channels - k,
                      r);
        for (int64_t j = 0; j < std::min<int64_t>(lanes, c.channels - k); ++j)
          store<T>(r[j], to + (k + j) * columns);
      }
    }
  });
}

// The rows of input that a band of outputs reads, as the kernel meets them.
template <class T>
struct Input {
  const T* data;  // of the row and column that the band's first pixel meets first
  int64_t row, pixel;
};

template <class T, class Element>
Input<T> copy_band(const Correlation<Element>& c, int64_t image, int64_t first, int64_t rows, int64_t pixel,
                   T* out) {
  const Grid& g = c.grid;
  const int64_t columns = (g.cols - 1) * g.step_w + g.span_w, row = columns * pixel;
  const int64_t begin = std::clamp<int64_t>(-g.low_w, 0, columns),
                end = std::clamp<int64_t>(g.width - g.low_w, begin, columns);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t h = first + i;
    if (h < 0 || h >= g.height) continue;
    T* to = out + i * row;
    const Element* from = c.x + image * c.x_view.n + h * c.x_view.h + (g.low_w + begin) * c.x_view.w;
    std::fill(to, to + begin * pixel, T(0));
    std::fill(to + end * pixel, to + row, T(0));
    const bool whole = pixel == c.channels && c.x_view.w == c.channels;
    const int64_t length = whole ? (end - begin) * pixel : c.channels, count = whole ? 1 : end - begin;
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < length; k += kLanes<T>)
        store_some<T>(load_some<T>(from + q * c.x_view.w + k, length - k), to + (begin + q) * pixel + k,
                      length - k);
  }
  return {out, row, pixel};
}

template <class Element>
void correlate(const Correlation<Element>& c, void* workspace) {
  using T = typename Compute<Element>::type;
  const Grid& g = c.grid;
  const int64_t depth = c.depth();
  if (c.pixels() == 0 || c.outputs == 0) return;
  T* const filter = static_cast<T*>(workspace);
  pack_blocks<T>(c, filter);

  const int64_t bands = std::clamp<int64_t>(g.rows * g.cols / kBandPixels, 1, g.rows);
  const int64_t band_rows = (g.rows + bands - 1) / bands;
  const int64_t read_rows = (band_rows - 1) * g.step_h + g.span_h;
  constexpr int64_t kConflict = 2048;  // bytes
  const bool conflicts = c.x_view.w * int64_t(sizeof(T)) % kConflict == 0;
  const bool in_place = std::is_same_v<T, Element> && g.inside() && !conflicts;
  const int64_t pixel =
      in_place ? c.x_view.w : c.channels + (c.channels * int64_t(sizeof(T)) % kConflict ? 0 : kLanes<T>);

  const int64_t run_count = g.count * ((c.channels + kChain - 1) / kChain);
  constexpr int64_t total_bytes = kTilePixels * kTileVectors * kVectorBytes;
  const int64_t run_bytes = (run_count * int64_t(sizeof(Run)) + 63) / 64 * 64;

  const double task_us = macs_us(double(band_rows * g.cols * c.outputs) * double(depth + 8));
  parallel_for(g.images * bands, task_us, [&](int64_t task) {
    const int64_t image = task / bands;
    const Rows rows{part_begin(task % bands, bands, g.rows), part_begin(task % bands + 1, bands, g.rows)};
    const int64_t h = g.low_h + rows.begin * g.step_h;
    const int64_t copied = in_place ? 0 : read_rows * ((g.cols - 1) * g.step_w + g.span_w) * pixel;
    auto* const totals =
        static_cast<Vector<T>*>(thread_scratch(total_bytes + run_bytes + copied * int64_t(sizeof(T))));
    auto* const runs = reinterpret_cast<Run*>(totals + kTilePixels * kTileVectors);
    Input<T> x{nullptr, c.x_view.h, pixel};
    if constexpr (std::is_same_v<T, Element>) {
      if (in_place) x.data = c.x + image * c.x_view.n + h * c.x_view.h + g.low_w * c.x_view.w;
    }
    if (!in_place) {
      x = copy_band<T>(c, image, h, (rows.size() - 1) * g.step_h + g.span_h, pixel,
                       reinterpret_cast<T*>(reinterpret_cast<char*>(runs) + run_bytes));
    }
    for (int64_t first = 0; first < c.outputs; first += kTileVectors * kLanes<T>) {
      const int64_t vectors = block_vectors<T>(c.outputs, first);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        int64_t count = 0;
        for (int64_t t = 0; t < g.count; ++t) {
          const Tap& tap = g.taps[t];
          const int64_t at = g.low_h + row * g.step_h + tap.h;
          if (at < 0 || at >= g.height) continue;
          const int64_t from = (at - h) * x.row + tap.w * x.pixel;
          Run* last = count ? runs + count - 1 : nullptr;
          if (last && last->from + last->length == from && last->length + c.channels <= kChain) {
            last->length += c.channels;
            continue;
          }
          for (int64_t k = 0; k < c.channels; k += kChain)
            runs[count++] = {from + k, std::min(kChain, c.channels - k), t * c.channels + k};
        }
        const int64_t parts = (g.cols + kTilePixels - 1) / kTilePixels;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t q = part_begin(part, parts, g.cols), size = part_begin(part + 1, parts, g.cols) - q;
          const Outputs<T, Element> out{c.y + image * c.y_view.n + row * c.y_view.h + q * c.y_view.w + first,
                                        c.y_view.w, c.outputs - first, c.bias ? c.bias + first : nullptr,
                                        c.act};
          const T* from = x.data + q * g.step_w * x.pixel;
          const T* weights = filter + first * depth;
          if (vectors == kTileVectors)
            some_pixels<T, kTileVectors>(size, from, g.step_w * x.pixel, runs, count, weights, out, totals);
          else
            some_pixels<T, 1>(size, from, g.step_w * x.pixel, runs, count, weights, out, totals);
        }
      }
    }
  });
}

}  // namespace

void conv_fprop_pixels(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    fprop_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

void conv_dgrad_pixels(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    dgrad_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
