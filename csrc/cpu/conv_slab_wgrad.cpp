// SPDX-License-Identifier: MIT
// wgrad of a 2-D convolution over slabs (slab.inl), with output channels in the vector lanes:
//
//   M = C/groups * R * S, N = K/groups, K = batch * P * Q
//
// A task is a block of input channels, a block of output channels and a piece of the batch. For each band of
// output rows it fills the slab of its channels, turns the gradient's pixels into vectors of output channels
// (planes.inl), and runs the micro-kernel: kRows rows of the slab, each at its tap, against kVectors vectors
// of gradient. Neighbouring pixels lie side by side in the slab, so there is no im2col. Where nothing has to
// be padded, converted or sorted, there is no slab either.
//
// A sum runs over up to kChain pixels in registers, then part after part in the workspace; pieces are added
// in a fixed order, and the result is transposed. The floor is the fused multiply-add rate, 117 GFLOP/s in
// float32 on the Zen 4 core measured; reached: 75 to 100. On a Zen 5 core (256; busy) 145 to 210, of which
// the short sums take up to 5 %.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_slab_wgrad.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/gemm.inl"

#include "cpu/planes.inl"

#include "cpu/slab.inl"

namespace {

template <class T>
constexpr int64_t kWidth = Simd<T>::kColumns;

constexpr int64_t kChain = 96;  // pixels: rounding errors grow with a sum's length

// A band of `rows` x `cols` pixels: from a row to the next, the slab's rows are `pitch` elements apart; the
// gradient has kWidth elements a pixel.
struct Pixels {
  int64_t rows, cols, pitch;
};

// c[i][lane] (+)= the sum over the pixels of x[i][pixel] * gradient[pixel][lane]
template <class T, int rows, int vectors>
[[gnu::always_inline]] inline void sum_pixels(const T* const* x, const Pixels& pixels, const T* gradient,
                                              T* c, int64_t c_row, bool accumulate) {
  Vector<T> sums[rows][vectors] = {};
  for (int64_t p = 0; p < pixels.rows; ++p) {
    const T* from[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) from[i] = x[i] + p * pixels.pitch;
    for (int64_t q = 0; q < pixels.cols; ++q, gradient += kWidth<T>) {
      Vector<T> line[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) line[j] = load<T>(gradient + j * kLanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sums[i][j] += from[i][q] * line[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T* out = c + i * c_row + j * kLanes<T>;
      store<T>(accumulate ? load<T>(out) + sums[i][j] : sums[i][j], out);
    }
}

// The same for a run-time number of rows and vectors.
template <class T, int vectors, int rows = kRows>
void sum_rows(int64_t count, const T* const* x, const Pixels& pixels, const T* gradient, T* c, int64_t c_row,
              bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) return sum_rows<T, vectors, rows - 1>(count, x, pixels, gradient, c, c_row, accumulate);
  }
  sum_pixels<T, rows, vectors>(x, pixels, gradient, c, c_row, accumulate);
}
template <class T, int most = kVectors>
void sum_tile(int64_t rows, int64_t vectors, const T* const* x, const Pixels& pixels, const T* gradient, T* c,
              int64_t c_row, bool accumulate) {
  if constexpr (most > 1) {
    if (vectors < most)
      return sum_tile<T, most - 1>(rows, vectors, x, pixels, gradient, c, c_row, accumulate);
  }
  sum_rows<T, most>(rows, x, pixels, gradient, c, c_row, accumulate);
}

// The filter's channels and taps as rows, in the order of its memory.
struct FilterRows {
  int64_t channels, taps;
  bool taps_first;

  int64_t count() const { return channels * taps; }
  int64_t at(int64_t channel, int64_t tap) const {
    return taps_first ? tap * channels + channel : channel * taps + tap;
  }
  int64_t channel(int64_t row) const { return taps_first ? row % channels : row / taps; }
  int64_t tap(int64_t row) const { return taps_first ? row / channels : row % taps; }
};

// Where a row of a block lies: from the first pixel of the input, and in the workspace.
struct Place {
  int64_t x, sums;
};

// Sums the pieces of the workspace, [piece][group][row][output channel], into the filter.
template <class T, class Element>
void write_filter(const ConvArgs& a, int64_t pieces, const FilterRows& filter, int64_t pitch, const T* sums) {
  const ConvShape& s = a.shape;
  constexpr int lanes = kLanes<T>;
  const int64_t rows = filter.count(), piece = s.groups * rows * pitch;
  const int64_t blocks = (s.group_k() + lanes - 1) / lanes;
  const bool dense = filter.taps == 1    ? a.w.c == 1
                     : filter.taps_first ? a.w.w == filter.channels && a.w.h == s.S * a.w.w
                                         : a.w.w == 1 && a.w.h == s.S && a.w.c == filter.taps;
  parallel_for(s.groups * blocks, double(rows * pieces) * lanes * 1e-4, [&](int64_t task) {
    const int64_t group = task / blocks, k = task % blocks * lanes;
    const int64_t live = std::min<int64_t>(lanes, s.group_k() - k);
    const T* from = sums + group * rows * pitch + k;
    Element* to = static_cast<Element*>(a.w.data) + (group * s.group_k() + k) * a.w.n;
    for (int64_t row = 0; row < rows; row += lanes) {
      const int64_t count = std::min<int64_t>(lanes, rows - row);
      Vector<T> r[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        r[i] = Vector<T>{};
        for (int64_t j = 0; j < pieces && i < count; ++j)
          r[i] += load<T>(from + j * piece + (row + i) * pitch);
      }
      transpose<T>(r);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i >= live) continue;
        if (dense) {
          store_some<T>(r[i], to + i * a.w.n + row, count);
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          const int64_t c = filter.channel(row + j), tap = filter.tap(row + j);
          to[i * a.w.n + c * a.w.c + tap / s.S * a.w.h + tap % s.S * a.w.w] = Element(r[i][j]);
        }
      }
    }
  });
}

template <class Element>
void wgrad(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const SlabWgrad plan(s);
  std::vector<Tap> taps;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t f = 0; f < s.S; ++f) taps.push_back({r * s.dilation.h, f * s.dilation.w, 0});
  Grid grid{s.N, s.P, s.Q, s.stride.h, s.stride.w, -s.padding.h, -s.padding.w, s.H, s.W};
  grid.taps = taps.data(), grid.count = s.R * s.S;
  grid.measure();

  const int64_t panels = (s.group_k() + kWidth<T> - 1) / kWidth<T>, pitch = panels * kWidth<T>;
  const FilterRows filter{s.group_c(), grid.count, a.w.c == 1 && grid.count > 1};
  T* const all_sums = static_cast<T*>(workspace);
  const bool direct = std::is_same_v<T, Element> && grid.inside() && grid.step_w == 1 && a.x.w == 1;
  const int64_t tasks = s.groups * plan.blocks * plan.output_blocks * plan.pieces;
  static_assert(SlabWgrad::kMostColumns % kWidth<T> == 0);
  parallel_for(tasks, macs_us(s.macs() / double(std::max<int64_t>(1, tasks))), [&](int64_t task) {
    const int64_t block = task % plan.blocks, output_block = task / plan.blocks % plan.output_blocks,
                  part = task / plan.blocks / plan.output_blocks, group = part % s.groups,
                  piece = part / s.groups;
    const Rows outputs = plan.outputs(s, output_block);
    const int64_t first = block * plan.channels, channels = std::min(plan.channels, s.group_c() - first);
    const int64_t first_c = group * s.group_c() + first, first_k = group * s.group_k();
    const SlabShape shape(grid, (plan.rows_per_band() - 1) * s.stride.h + grid.span_h);
    const int64_t most = plan.rows_per_band() * s.Q;
    const int64_t block_panels = (outputs.size() + kWidth<T> - 1) / kWidth<T>,
                  block_pitch = block_panels * kWidth<T>;
    const int64_t slab_size = direct ? 0 : channels * shape.size;
    const FilterRows block_rows{channels, grid.count, filter.taps_first};
    const int64_t place_bytes = (block_rows.count() * int64_t(sizeof(Place)) + 63) / 64 * 64;
    char* const scratch = static_cast<char*>(
        thread_scratch(place_bytes + (most * block_pitch + slab_size) * int64_t(sizeof(T))));
    Place* const places = reinterpret_cast<Place*>(scratch);
    for (int64_t row = 0; row < block_rows.count(); ++row) {
      const int64_t c = block_rows.channel(row);
      const Tap& tap = taps[block_rows.tap(row)];
      places[row] = {
          c * (direct ? a.x.c : shape.size) + (direct ? tap.h * a.x.h + tap.w : shape.tap(grid, tap)),
          filter.at(first + c, block_rows.tap(row)) * pitch + outputs.begin};
    }
    T* const gradient = reinterpret_cast<T*>(scratch + place_bytes);
    T* const slab = gradient + most * block_pitch;
    std::fill(slab, slab + slab_size, T(0));
    T* const sums = all_sums + (piece * s.groups + group) * filter.count() * pitch;
    if (plan.units == 0 && block + output_block == 0) std::fill(sums, sums + filter.count() * pitch, T(0));
    // Rows that follow each other in the filter.
    const int64_t run = filter.taps_first && channels < filter.channels ? channels : block_rows.count();

    const Rows units{part_begin(piece, plan.pieces, plan.units),
                     part_begin(piece + 1, plan.pieces, plan.units)};
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t n = unit / plan.bands;
      const Rows band = plan.band(unit % plan.bands);
      const Segment segment{n, grid.low_h + band.begin * s.stride.h,
                            (band.size() - 1) * s.stride.h + grid.span_h, 0};
      const Element* image = static_cast<const Element*>(a.x.data) + n * a.x.n + first_c * a.x.c;
      const T* from = slab;
      if constexpr (std::is_same_v<T, Element>)
        if (direct) from = image + segment.from * a.x.h + grid.low_w;
      if (!direct) fill_slab<T>(image - n * a.x.n, a.x, grid, shape, &segment, 1, channels, true, slab);
      for (int64_t k = 0; k < outputs.size(); k += kLanes<T>) {
        const Channels<T> of(a.y, outputs.size() - k,
                             [&](int lane) { return first_k + outputs.begin + k + lane; });
        T* const to = gradient + k / kWidth<T> * most * kWidth<T> + k % kWidth<T>;
        patch_to_lanes<T>(static_cast<const Element*>(a.y.data) + n * a.y.n, a.y, of,
                          {s.P, s.Q, band.begin, 0, band.size(), s.Q, kWidth<T> / kLanes<T>},
                          reinterpret_cast<Vector<T>*>(to));
      }
      // What a sum takes before it joins those in the workspace: rows, or an even part of a long one.
      const int64_t pitch_x = s.stride.h * (direct ? a.x.h : shape.pitch);
      const int64_t parts = (s.Q + kChain - 1) / kChain, part_cols = (s.Q + parts - 1) / parts;
      const int64_t part_rows = std::max<int64_t>(1, kChain / s.Q);
      for (int64_t panel = 0; panel < block_panels; ++panel) {
        const int64_t used = std::min(kWidth<T>, outputs.size() - panel * kWidth<T>);
        for (int64_t row = 0; row < block_rows.count();) {
          const int64_t count = std::min<int64_t>(kRows, run - row % run);
          const T* x[kRows] = {};
          for (int64_t i = 0; i < count; ++i) x[i] = from + places[row + i].x;
          for (int64_t p = 0; p < band.size(); p += part_rows)
            for (int64_t q = 0; q < s.Q; q += part_cols) {
              const T* part[kRows] = {};
              for (int64_t i = 0; i < count; ++i) part[i] = x[i] + p * pitch_x + q;
              const int64_t rows = std::min(part_rows, band.size() - p), cols = std::min(part_cols, s.Q - q);
              const Pixels pixels = pitch_x == cols ? Pixels{1, rows * cols, 0} : Pixels{rows, cols, pitch_x};
              sum_tile<T>(count, (used + kLanes<T> - 1) / kLanes<T>, part, pixels,
                          gradient + (panel * most + p * s.Q + q) * kWidth<T>,
                          sums + places[row].sums + panel * kWidth<T>, pitch,
                          unit > units.begin || p + q > 0);
            }
          row += count;
        }
      }
    }
  });
  write_filter<T, Element>(a, plan.pieces, filter, pitch, all_sums);
}

}  // namespace

void conv_wgrad_slab(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { wgrad<std::remove_pointer_t<decltype(t)>>(a, workspace); });
  conv_bias_grad(a);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
