// SPDX-License-Identifier: MIT
// How depthwise convolutions (one input channel a group) are cut into blocks, as plain C++: the table plans
// in every build, the launchers follow the same plan.
#pragma once

#include <utility>

#include "cuda/plan.h"

namespace fastconv::cuda {

inline constexpr int64_t kDepthwiseThreads = 192;  // of a block, at most: some need 168 registers
inline constexpr int kDepthwiseVector = 4;         // channels of a thread where they lie side by side
inline constexpr int64_t kDepthwiseStrides = 4;    // of dgrad, at most: its residues travel with the launch
inline constexpr int64_t kDepthwiseTaps = 1024;    // at most: a block keeps some channels' in shared memory
inline constexpr int64_t kDepthwiseLanes = 32;     // wgrad: threads of a block that share a sum
inline constexpr int64_t kDepthwiseBlocks = 4 * 132;  // wgrad: about as many

// One axis of a correlation: its output i, at out_first + i * out_step of a tensor, meets input
// first + i * step + t * tap_step at tap t, whose weight is at weight + t * weight_step of the filter.
struct DepthwiseAxis {
  int outputs = 0, out_first = 0, out_step = 1;
  int inputs = 0, first = 0, step = 1;
  int taps = 0, tap_step = 1, weight = 0, weight_step = 1;
};

inline DepthwiseAxis depthwise_fprop_axis(int64_t in, int64_t out, int64_t taps, int64_t stride,
                                          int64_t padding, int64_t dilation) {
  DepthwiseAxis a;
  a.outputs = static_cast<int>(out), a.inputs = static_cast<int>(in);
  a.first = static_cast<int>(-padding), a.step = static_cast<int>(stride);
  a.taps = static_cast<int>(taps), a.tap_step = static_cast<int>(dilation);
  return a;
}

// dgrad: the positions of grad_x that are `residue` modulo the stride, and the taps that reach them.
inline DepthwiseAxis depthwise_dgrad_axis(int64_t residue, int64_t in, int64_t out, int64_t taps,
                                          int64_t stride, int64_t padding, int64_t dilation) {
  DepthwiseAxis a;
  a.outputs = static_cast<int>(in > residue ? ceil_div(in - residue, stride) : 0);
  a.out_first = static_cast<int>(residue), a.out_step = static_cast<int>(stride);
  a.inputs = static_cast<int>(out);
  int64_t last = 0, before = 0;  // the tap that meets the first input, and the one that meets the next
  for (int64_t t = taps - 1; t >= 0; --t) {
    if ((residue + padding - t * dilation) % stride != 0) continue;
    if (a.taps == 0) last = t;
    if (a.taps == 1) before = t;
    ++a.taps;
  }
  if (a.taps == 0) return a;
  a.first = static_cast<int>((residue + padding - last * dilation) / stride);
  a.weight = static_cast<int>(last);
  if (a.taps > 1) {
    a.weight_step = static_cast<int>(before - last);
    a.tap_step = static_cast<int>((last - before) * dilation / stride);
  }
  return a;
}

// Whether a thread's rows share what they read: the taps follow each other, and there is a kernel for them.
inline bool depthwise_shares_rows(const DepthwiseAxis& rows) {
  const bool odd = rows.taps == 3 || rows.taps == 5 || (rows.taps == 7 && rows.step == 1);
  return odd && rows.tap_step == 1 && rows.step <= 2;
}

// Outputs of a thread below each other: what images of 7 * 2^n divide into; fewer where they share more
// inputs than registers hold. `step` is 0 where they share none.
FASTCONV_HD constexpr int depthwise_thread_rows(int step) { return step == 2 ? 4 : 7; }

// fprop; or dgrad as a correlation of grad_y, for each residue of either axis. `y` is what is written.
struct DepthwiseShape {
  int64_t n, channels, taps;  // of y; taps of a filter
  int64_t shared, summed;     // channels of y that read one of x; channels of x that one of y reads
  View x, y;
  Dtype dtype;
  int64_t row_residues = 1, col_residues = 1;
  DepthwiseAxis rows[kDepthwiseStrides] = {}, cols[kDepthwiseStrides] = {};

  bool shares_rows() const {
    return dtype != Dtype::f64 && row_residues * col_residues == 1 && depthwise_shares_rows(rows[0]);
  }
  int64_t thread_rows() const { return depthwise_thread_rows(shares_rows() ? rows[0].step : 0); }

  // A thread owns rows; an image of one row, as of a convolution along one axis, is turned on its side.
  bool turns() const { return rows[0].outputs * row_residues <= 1; }

  void turn() {
    std::swap(rows, cols);
    std::swap(row_residues, col_residues);
    std::swap(x.h, x.w);
    std::swap(y.h, y.w);
  }
};

inline DepthwiseShape depthwise_fprop(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  DepthwiseShape d{s.N, s.K, s.taps(), s.group_k(), 1, a.x, a.y, a.dtype};
  d.rows[0] = depthwise_fprop_axis(s.H, s.P, s.R, s.stride.h, s.padding.h, s.dilation.h);
  d.cols[0] = depthwise_fprop_axis(s.W, s.Q, s.S, s.stride.w, s.padding.w, s.dilation.w);
  return d;
}
inline DepthwiseShape depthwise_dgrad(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  DepthwiseShape d{s.N, s.C, s.taps(), 1, s.group_k(), a.y, a.x, a.dtype, s.stride.h, s.stride.w};
  for (int64_t i = 0; i < std::min(s.stride.h, kDepthwiseStrides); ++i)
    d.rows[i] = depthwise_dgrad_axis(i, s.H, s.P, s.R, s.stride.h, s.padding.h, s.dilation.h);
  for (int64_t i = 0; i < std::min(s.stride.w, kDepthwiseStrides); ++i)
    d.cols[i] = depthwise_dgrad_axis(i, s.W, s.Q, s.S, s.stride.w, s.padding.w, s.dilation.w);
  return d;
}

// The channels that a thread owns: four, where each tensor (null: there is none) has them side by side.
inline int64_t depthwise_vector(int64_t channels, Dtype dtype, std::initializer_list<View> tensors) {
  if (dtype == Dtype::f64 || channels % kDepthwiseVector != 0) return 1;
  for (const View& v : tensors)
    if (v.c != 1 || !is_aligned(v, &View::c, dtype_size(dtype), kDepthwiseVector)) return 1;
  return kDepthwiseVector;
}

// `count` cut into the fewest equal pieces of at most `most`.
inline int64_t even_piece(int64_t count, int64_t most) {
  most = std::max<int64_t>(1, most);
  return ceil_div(count, std::max<int64_t>(1, ceil_div(count, most)));
}

// The threads of a block: channel vectors x columns x patches of rows; the first are neighbours along the
// channels where those are neighbours in memory, else along the columns.
struct DepthwisePlan {
  bool channels_first = false;
  int64_t vector = 1, vectors = 1, cols = 1, rows = 1;
  int64_t channel_blocks = 1, col_blocks = 1, row_blocks = 1;
  int64_t filters = 1;  // of the channels that are summed, those whose filters are in shared memory at a time

  int64_t threads() const { return ceil_div(vectors * cols * rows, 32) * 32; }
  int64_t blocks(const DepthwiseShape& s) const {
    return s.n * s.row_residues * s.col_residues * channel_blocks * col_blocks * row_blocks;
  }
  // Elements from a tap to the next in shared memory; the pad spreads a filter's taps over the banks.
  int64_t pitch() const { return vector > 1 ? vectors * vector + vector : vectors | 1; }
};

// `s` as it is, or turned.
inline DepthwisePlan plan_depthwise(const DepthwiseShape& s, int64_t vector) {
  constexpr int64_t kFilters = 32 * 1024;  // bytes of shared memory
  DepthwisePlan p;
  p.channels_first = s.channels > 1 && s.y.c == 1;
  p.vector = vector;
  const int64_t rows = s.rows[0].outputs, cols = s.cols[0].outputs;  // residue 0 has the most
  const int64_t patches = ceil_div(rows, s.thread_rows()), vectors = ceil_div(s.channels, vector);
  const int64_t fit = kFilters / (s.taps * (s.dtype == Dtype::f64 ? 8 : 4) * vector) - 1;
  if (p.channels_first) {
    p.vectors = even_piece(vectors, std::min<int64_t>(fit, vector > 1 ? 8 : 32));
    p.cols = even_piece(cols, std::min(int64_t(8), kDepthwiseThreads / p.vectors));
    p.rows = even_piece(patches, kDepthwiseThreads / (p.vectors * p.cols));
  } else {
    p.cols = even_piece(cols, 64);
    p.rows = even_piece(patches, kDepthwiseThreads / p.cols);
    p.vectors = even_piece(vectors, std::min(fit, kDepthwiseThreads / (p.cols * p.rows)));
  }
  p.filters = std::clamp<int64_t>((fit + 1) * vector / p.pitch(), 1, s.summed);
  p.channel_blocks = ceil_div(vectors, p.vectors);
  p.col_blocks = ceil_div(cols, p.cols);
  p.row_blocks = ceil_div(patches, p.rows);
  return p;
}

// wgrad. A thread owns a column of taps, `column_taps` of them below each other, of one filter vector. Its
// units are `rows` gradients below each other.
struct DepthwiseWgradPlan {
  bool channels_first = false;
  int64_t vector = 1, column_taps = 1, rows = 1;
  int64_t vectors = 1, columns = 1, lanes = 1;  // threads of a block
  int64_t patches = 1, units = 1;               // of a plane along its rows; of the batch
  int64_t channel_blocks = 1, column_blocks = 1, slices = 1, slice_units = 1;

  int64_t threads() const { return ceil_div(vectors * columns * lanes, 32) * 32; }
  int64_t blocks() const { return channel_blocks * column_blocks * slices; }
  static int64_t slice_elements(const ConvShape& s) { return s.K * (s.taps() + 1); }  // and the bias gradient
  int64_t workspace_bytes(const ConvArgs& a) const {
    return slices * slice_elements(a.shape) * (a.dtype == Dtype::f64 ? 8 : 4);
  }
};

inline DepthwiseWgradPlan plan_depthwise_wgrad(const ConvArgs& a) {
  constexpr int64_t kLaneUnits = 2;  // of a thread, at least where it can be
  const ConvShape& s = a.shape;
  DepthwiseWgradPlan p;
  p.channels_first = s.K > 1 && a.y.c == 1;
  p.vector = s.group_k() == 1 ? depthwise_vector(s.K, a.dtype, {a.x, a.y}) : 1;
  const DepthwiseAxis rows = depthwise_fprop_axis(s.H, s.P, s.R, s.stride.h, s.padding.h, s.dilation.h);
  const bool shares = a.dtype != Dtype::f64 && depthwise_shares_rows(rows);
  p.column_taps = shares ? s.R : 1;
  p.rows = depthwise_thread_rows(shares ? rows.step : 0);
  const int64_t columns = s.taps() / p.column_taps;
  p.patches = ceil_div(s.P, p.rows);
  p.units = s.N * p.patches * s.Q;
  // Neither lanes nor slices depend on the vector, so that a sum has one order whatever its alignment.
  p.columns = even_piece(columns, 8);
  const int64_t most_lanes = kDepthwiseThreads / (p.channels_first ? 8 * p.columns : p.columns);
  p.lanes = std::clamp<int64_t>(p.units, 1, std::min(most_lanes, kDepthwiseLanes));
  p.vectors =
      even_piece(ceil_div(s.K, p.vector), std::min<int64_t>(8, kDepthwiseThreads / (p.columns * p.lanes)));
  p.channel_blocks = ceil_div(ceil_div(s.K, p.vector), p.vectors);
  p.column_blocks = ceil_div(columns, p.columns);
  const int64_t tiles = ceil_div(s.K, p.channels_first ? 32 : 8) * p.column_blocks;
  const int64_t wanted = std::clamp<int64_t>(p.units / (p.lanes * kLaneUnits), 1,
                                             std::max<int64_t>(1, kDepthwiseBlocks / tiles));
  p.slice_units = std::max<int64_t>(1, ceil_div(p.units, wanted));
  p.slices = std::max<int64_t>(1, ceil_div(p.units, p.slice_units));
  return p;
}

}  // namespace fastconv::cuda
