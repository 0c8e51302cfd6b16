// SPDX-License-Identifier: MIT
// 2-D convolution as a GEMM over slabs (slab.inl): output channels down, output pixels in the vector lanes.
//
//   M = outputs, N = pixels, K = channels * taps of each correlation (correlation.inl)
//
// The filter is packed once a call, in tiles of kRows output channels. A task is a block of pixels and of
// output channels: for a few input channels at a time it fills their slab, copies the slab's vectors at each
// tap into panels of kVectors vectors of pixels, and runs the micro-kernel over every tile and panel. Where
// nothing has to be padded, converted or sorted, panels are copied from the tensor itself.
//
// The floor is the fused multiply-add rate, 117 GFLOP/s in float32 on the Zen 4 core measured. Reached: 3x3
// 90 to 101, 1x1 70 to 88. Copying takes about 2 cycles a vector and tap, which each output channel of the
// block shares; few of them are better off with the batch in the lanes.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_slab.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

#include "cpu/slab.inl"

#include "cpu/correlation.inl"

namespace {

// Pixels and output channels of a task, and about how deep a panel is.
constexpr int64_t kPixels = 240, kMostTiles = 32, kDepth = 192;

template <class T>
constexpr int64_t kWidth = Simd<T>::kColumns;

// Elements of a packed filter: [tile][channel][tap][kRows].
inline int64_t tiles_of(int64_t outputs) { return (outputs + kRows - 1) / kRows; }

template <class T, class Element>
void pack_filter(const Correlation<Element>& c, T* out) {
  const Grid& g = c.grid;
  const int64_t tiles = tiles_of(c.outputs);
  const auto pack = [&](int64_t tile, int64_t channel) {
    T* to = out + (tile * c.depth() + channel * g.count) * kRows;
    const Element* from = c.filter + tile * kRows * c.filter_output + channel * c.filter_channel;
    const int64_t live = std::min<int64_t>(kRows, c.outputs - tile * kRows);
    for (int64_t tap = 0; tap < g.count; ++tap, to += kRows) {
      const Element* weights = from + g.taps[tap].weight;
      if (live == kRows) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) to[i] = T(weights[i * c.filter_output]);
      } else {
        for (int i = 0; i < kRows; ++i) to[i] = i < live ? T(weights[i * c.filter_output]) : T(0);
      }
    }
  };
  // The filter is read in the order of its memory.
  if (c.filter_channel > c.filter_output) {
    parallel_for(c.channels, double(tiles * g.count) * kRows * 1e-3, [&](int64_t channel) {
      for (int64_t tile = 0; tile < tiles; ++tile) pack(tile, channel);
    });
  } else {
    parallel_for(tiles, double(c.depth()) * kRows * 1e-3, [&](int64_t tile) {
      for (int64_t channel = 0; channel < c.channels; ++channel) pack(tile, channel);
    });
  }
}

// `count` pixels that lie side by side in the input at each tap, and in a panel.
struct Copy {
  int64_t from, to, count;
};

// The pixels of a task: how they are copied into panels, and where they go.
struct Block {
  int64_t segment_count = 0, copy_count = 0;
  Segment segments[kPixels];
  Copy copies[2 * kPixels];
  int64_t out[kPixels];  // of each pixel, from y

  // Pixels [begin, begin + size) of a grid. Distances in the input are those of a slab, or, without one, of
  // the tensor. A panel is `panel` elements and `width` pixels.
  template <class Element>
  Block(const Correlation<Element>& c, int64_t begin, int64_t size, bool direct, int64_t pitch, int64_t width,
        int64_t panel) {
    const Grid& g = c.grid;
    int64_t q = begin % g.cols, p = begin / g.cols % g.rows, n = begin / (g.cols * g.rows);
    for (int64_t done = 0; done < size; ++p, q = 0) {
      if (p == g.rows) p = 0, ++n;
      const int64_t count = std::min(g.cols - q, size - done);
      if (segment_count == 0 || segments[segment_count - 1].image != n) {
        const int64_t first = segment_count ? slab_rows() : 0;
        segments[segment_count++] = {n, g.low_h + p * g.step_h, g.span_h - g.step_h, first};
      }
      Segment& segment = segments[segment_count - 1];
      const int64_t row = segment.first + segment.rows + g.step_h - g.span_h;
      segment.rows += g.step_h;
      add(direct ? n * c.x_view.n + (g.low_h + p * g.step_h) * c.x_view.h + g.low_w + q : row * pitch + q,
          done, count, width, panel);
      for (int64_t i = 0; i < count; ++i)
        out[done + i] = n * c.y_view.n + p * c.y_view.h + (q + i) * c.y_view.w;
      done += count;
    }
  }
  int64_t slab_rows() const { return segments[segment_count - 1].first + segments[segment_count - 1].rows; }

 private:
  void add(int64_t from, int64_t pixel, int64_t count, int64_t width, int64_t panel) {
    while (count > 0) {
      const int64_t fits = std::min(count, width - pixel % width);
      const int64_t to = pixel / width * panel + pixel % width;
      Copy* last = copy_count ? copies + copy_count - 1 : nullptr;
      if (last && last->from + last->count == from && last->to + last->count == to) {
        last->count += fits;
      } else {
        copies[copy_count++] = {from, to, fits};
      }
      from += fits, pixel += fits, count -= fits;
    }
  }
};

// Copies one channel's pixels at one tap. What lies behind a copy may be overwritten, and is before it is
// read unless it belongs to no pixel; `exact` reads no further than a copy.
template <class T, bool exact>
[[gnu::noinline]] void fill_line(const T* from, const Block& block, T* to) {
  for (const Copy* copy = block.copies; copy < block.copies + block.copy_count; ++copy) {
    const T* in = from + copy->from;
    T* out = to + copy->to;
    int64_t i = 0;
    for (; i + kLanes<T> <= copy->count; i += kLanes<T>) store<T>(load<T>(in + i), out + i);
    if (i < copy->count) store<T>(exact ? load_some<T>(in + i, copy->count - i) : load<T>(in + i), out + i);
  }
}

// Rows of the filter, packed in tiles or where they are: weights[output * row + k * step].
template <class T>
struct Weights {
  const T* data;
  int64_t row, step;

  Weights at(int64_t output, int64_t k, int64_t depth) const {
    return {data + output * (row == 1 ? depth : row) + k * step, row, step};
  }
};

// micro_kernel for a run-time number of rows and vectors; c has kWidth elements a row.
template <class T, int vectors, bool packed, int rows = kRows>
void micro_rows(int64_t count, int64_t depth, const Weights<T>& a, const T* b, T* c, bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) return micro_rows<T, vectors, packed, rows - 1>(count, depth, a, b, c, accumulate);
  }
  for (int64_t k = 0; k < depth; k += kTerms<T>)
    micro_kernel<T, rows, vectors>(std::min(kTerms<T>, depth - k), a.data + k * (packed ? kRows : 1),
                                   packed ? 1 : a.row, packed ? kRows : 1, b + k * kWidth<T>, kWidth<T>, c,
                                   kWidth<T>, accumulate || k > 0);
}
template <class T, int most = kVectors>
void micro(int64_t rows, int64_t vectors, int64_t depth, const Weights<T>& a, const T* b, T* c,
           bool accumulate) {
  if constexpr (most > 1) {
    if (vectors < most) return micro<T, most - 1>(rows, vectors, depth, a, b, c, accumulate);
  }
  if (a.row == 1) return micro_rows<T, most, true>(rows, depth, a, b, c, accumulate);
  micro_rows<T, most, false>(rows, depth, a, b, c, accumulate);
}

// Writes `rows` output channels of `count` pixels; `sums` has `pitch` elements a row.
template <class T, class Element>
void write_pixels(const Correlation<Element>& c, int64_t first, int64_t rows, const int64_t* out,
                  int64_t count, const T* sums, int64_t pitch) {
  const auto value = [&](Vector<T> v) { return c.act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v; };
  if (c.y_view.c == 1) {
    constexpr int lanes = kLanes<T>;
    for (int64_t m = 0; m < rows; m += lanes) {
      const int64_t live = std::min<int64_t>(lanes, rows - m);
      const Vector<T> bias = c.bias ? load_some<T>(c.bias + first + m, live) : Vector<T>{};
      for (int64_t i = 0; i < count; i += lanes) {
        Vector<T> r[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) r[j] = j < live ? load<T>(sums + (m + j) * pitch + i) : Vector<T>{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j)
          if (i + j < count)
            store_some<T>(value(c.bias ? r[j] + bias : r[j]), c.y + out[i + j] + first + m, live);
      }
    }
    return;
  }
  if (c.y_view.w != 1) {
    for (int64_t m = 0; m < rows; ++m) {
      Element* to = c.y + (first + m) * c.y_view.c;
      for (int64_t i = 0; i < count; ++i)
        to[out[i]] = Element(activated(sums[m * pitch + i], c.bias, first + m, c.act));
    }
    return;
  }
  for (int64_t i = 0; i < count;) {
    int64_t size = 1;  // pixels side by side
    while (i + size < count && out[i + size] == out[i] + size) ++size;
    for (int64_t m = 0; m < rows; ++m) {
      Element* to = c.y + (first + m) * c.y_view.c + out[i];
      const T* from = sums + m * pitch + i;
      const Vector<T> bias = c.bias ? Vector<T>{} + T(c.bias[first + m]) : Vector<T>{};
      for (int64_t j = 0; j < size; j += kLanes<T>) {
        const Vector<T> v = load<T>(from + j);
        store_some<T>(value(c.bias ? v + bias : v), to + j, size - j);
      }
    }
    i += size;
  }
}

template <class Element>
void correlate(const Correlation<Element>& c, void* workspace) {
  using T = typename Compute<Element>::type;
  const Grid& g = c.grid;
  const int64_t pixels = c.pixels(), depth = c.depth();
  if (pixels == 0 || c.outputs == 0) return;
  Weights<T> weights{static_cast<const T*>(workspace), 1, kRows};
  if (c.filter_in_place()) {
    if constexpr (std::is_same_v<T, Element>) weights = {c.filter, c.filter_output, 1};
  } else {
    pack_filter<T>(c, static_cast<T*>(workspace));
  }

  const bool direct = std::is_same_v<T, Element> && g.inside() && g.step_w == 1 && c.x_view.w == 1;
  const int64_t channels_at_once = std::clamp<int64_t>(kDepth / std::max<int64_t>(1, g.count), 1, c.channels);
  const int64_t panel = channels_at_once * g.count * kWidth<T> + kLanes<T>;
  const int64_t pixel_blocks = (pixels + kPixels - 1) / kPixels;
  const int64_t block_pixels =
      ((pixels + pixel_blocks - 1) / pixel_blocks + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  int64_t tiles = std::min(kMostTiles, tiles_of(c.outputs));
  while (tiles > kMostTiles / 2 && pixel_blocks * ((tiles_of(c.outputs) + tiles - 1) / tiles) < 8)
    tiles = (tiles + 1) / 2;
  const int64_t output_blocks = (tiles_of(c.outputs) + tiles - 1) / tiles;

  const double task_us = macs_us(double(tiles * kRows * kPixels) * double(depth + 8));
  parallel_for(output_blocks * pixel_blocks, task_us, [&](int64_t task) {
    const int64_t first_pixel = task % pixel_blocks * block_pixels,
                  first = task / pixel_blocks * tiles * kRows;
    const int64_t size = std::min(block_pixels, pixels - first_pixel);
    const int64_t outputs = std::min(tiles * kRows, c.outputs - first);
    const Block block(c, first_pixel, size, direct, SlabShape(g, 0).pitch, kWidth<T>, panel);
    const SlabShape shape(g, block.slab_rows());

    const int64_t panels = (size + kWidth<T> - 1) / kWidth<T>;
    const int64_t slab_size = (direct ? 0 : channels_at_once * shape.size) + kLanes<T>;
    T* const b = static_cast<T*>(
        thread_scratch((panels * panel + tiles * kRows * kWidth<T> * panels + slab_size) * sizeof(T)));
    T* const sums = b + panels * panel;  // [panel][output][pixel]
    T* const slab = sums + panels * tiles * kRows * kWidth<T>;
    if (depth == 0) std::fill(sums, slab, T(0));
    std::fill(slab, slab + slab_size, T(0));

    for (int64_t channel = 0; channel < std::max<int64_t>(1, c.channels); channel += channels_at_once) {
      const int64_t channels = std::min(channels_at_once, c.channels - channel), k = channel * g.count;
      const bool is_last = channel + channels >= c.channels;
      if constexpr (std::is_same_v<T, Element>) {
        if (direct)
          for (int64_t i = 0; i < channels; ++i)
            for (int64_t tap = 0; tap < g.count; ++tap)
              fill_line<T, true>(
                  c.x + (channel + i) * c.x_view.c + g.taps[tap].h * c.x_view.h + g.taps[tap].w, block,
                  b + (i * g.count + tap) * kWidth<T>);
      }
      if (!direct && g.count > 0) {
        fill_slab<T>(c.x + channel * c.x_view.c, c.x_view, g, shape, block.segments, block.segment_count,
                     channels, false, slab);
        for (int64_t i = 0; i < channels; ++i)
          for (int64_t tap = 0; tap < g.count; ++tap)
            fill_line<T, false>(slab + i * shape.size + shape.tap(g, g.taps[tap]), block,
                                b + (i * g.count + tap) * kWidth<T>);
      }
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t used = std::min(kWidth<T>, size - j * kWidth<T>);
        T* const out = sums + j * tiles * kRows * kWidth<T>;
        for (int64_t m = 0; m < outputs && depth > 0; m += kRows)
          micro<T>(std::min<int64_t>(kRows, outputs - m), (used + kLanes<T> - 1) / kLanes<T>,
                   channels * g.count, weights.at(first + m, k, depth), b + j * panel, out + m * kWidth<T>,
                   channel > 0);
        if (is_last) write_pixels<T>(c, first, outputs, block.out + j * kWidth<T>, used, out, kWidth<T>);
      }
    }
  });
}

}  // namespace

void conv_fprop_slab(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    fprop_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

void conv_dgrad_slab(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    dgrad_correlations<std::remove_pointer_t<decltype(t)>>(a,
                                                           [&](const auto& c) { correlate(c, workspace); });
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
