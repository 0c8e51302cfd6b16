// SPDX-License-Identifier: MIT
// How batch-norm is cut into blocks, as plain C++: the table plans in every build, the launchers follow the
// same plan.
#pragma once

#include "cuda/plan.h"

namespace fastconv::cuda {

inline constexpr int64_t kNormThreads = 256;

// The distance between neighbouring cells of a channel, where each is as far from the next; else -1.
inline int64_t norm_cell_step(const NormArgs& a, const View& v) {
  const int64_t step = a.W > 1 ? v.w : a.H > 1 ? v.h : a.D > 1 ? v.d : 1;
  const bool even =
      (a.H == 1 || a.W == 1 || v.h == a.W * step) && (a.D == 1 || a.H * a.W == 1 || v.d == a.H * a.W * step);
  return even ? step : -1;
}

// Threads: channel vectors x lanes, both powers of two. The vectors lie along the channels where those are
// neighbours in memory, else along the cells of one channel. The lanes of a slice take its units, vectors of
// one place each, in turn.
struct NormSlices {
  bool by_channels = false;
  int64_t vector = 1;                         // elements
  int64_t vectors = 1, lanes = kNormThreads;  // threads of a block
  int64_t cells = 1, units = 1;               // vectors along an image's cells; of the batch
  int64_t channel_blocks = 1, slices = 1, slice_units = 1;

  int64_t blocks() const { return channel_blocks * slices; }
  // Of each slice and channel two sums, then of each channel what backward subtracts.
  int64_t workspace_bytes(int64_t channels) const {
    return (slices + 1) * channels * 2 * static_cast<int64_t>(sizeof(double));
  }
};

// `tensors`: all that have the shape of x; null: there is none.
inline NormSlices plan_norm(const NormArgs& a, std::initializer_list<View> tensors) {
  constexpr int64_t kBlocks = 8 * 132, kLaneUnits = 8;
  constexpr int64_t kAlone = 16;                          // units of a lane that are worth two launches
  constexpr int64_t kSectorBytes = 32, kLineBytes = 128;  // of neighbouring channels, in few units, in many
  NormSlices p;
  p.by_channels = a.C > 1 && a.x.c == 1;
  const int64_t size = dtype_size(a.dtype), most = std::min<int64_t>(16 / size, p.by_channels ? 4 : 8);
  bool fits = (p.by_channels ? a.C : a.cells()) % most == 0;
  for (const View& v : tensors) {
    if (!v.data && &v != tensors.begin()) continue;  // the first is x, of which a question has no data
    View flat = v;                                   // the cells as one axis
    flat.h = 0, flat.d = 0, flat.w = norm_cell_step(a, v);
    fits = fits && (p.by_channels ? flat.c == 1 : flat.w == 1) &&
           is_aligned(flat, p.by_channels ? &View::c : &View::w, size, most);
  }
  p.vector = fits ? most : 1;
  p.cells = p.by_channels ? a.cells() : a.cells() / p.vector;
  p.units = a.N * p.cells;
  const int64_t vectors = p.by_channels ? a.C / p.vector : a.C;
  const auto width = [&](int64_t bytes) {
    p.vectors = 1;
    while (p.by_channels && p.vectors < std::min<int64_t>(vectors, 32) && p.vectors * p.vector * size < bytes)
      p.vectors *= 2;
    p.lanes = kNormThreads / p.vectors;
    return p.lanes;
  };
  const bool alone = p.units <= kAlone * width(kSectorBytes);
  if (!alone) width(kLineBytes);
  p.channel_blocks = ceil_div(vectors, p.vectors);
  const int64_t wanted = alone ? 1
                               : std::clamp<int64_t>(p.units / (p.lanes * kLaneUnits), 1,
                                                     std::max<int64_t>(1, kBlocks / p.channel_blocks));
  p.slice_units = std::max<int64_t>(1, ceil_div(p.units, wanted));
  p.slices = std::max<int64_t>(1, ceil_div(p.units, p.slice_units));
  return p;
}
inline NormSlices plan_norm(const NormArgs& a) { return plan_norm(a, {a.x, a.y}); }
inline NormSlices plan_norm(const NormBackwardArgs& a) {
  return plan_norm(a.norm, {a.norm.x, a.norm.act == Act::none ? View{} : a.norm.y, a.grad_y, a.grad_x});
}

}  // namespace fastconv::cuda
