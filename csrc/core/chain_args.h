// SPDX-License-Identifier: MIT
// What a kernel for a chain of stages is told.
#pragma once

#include "core/args.h"

namespace fastconv {

// A stage of a chain: a convolution with what follows it, or a linear layer, which is a convolution whose
// filter covers its input: the C x H x W numbers of an image are its features, in this order.
enum class Layer : uint8_t { conv, linear };
struct ChainStage {
  Layer layer = Layer::conv;
  ConvArgs conv;  // shape, w, epilogue; the tensors between stages are the kernel's business
  int64_t padded_h = 0, padded_w = 0;  // the input with its padding on all sides
  View grad_w;                         // backward; null: not wanted
  void* grad_b = nullptr;              // backward; null: not wanted; never wanted without grad_w
  // Where in `saved` the output and the offsets begin; -1: they are not kept.
  int64_t saved_output = -1, saved_offsets = -1;
  const void* row = nullptr;  // the composed rows' own: that of the stage, forward, where it is known
};

inline constexpr int kMostStages = 16;

// The images of `saved` are counted in whole units, so that its size is the same for every kernel.
inline constexpr int64_t kSavedUnit = 16;

// y = the last stage of ... of the first stage of x.
struct ChainArgs {
  Dtype dtype = Dtype::f32;
  Target target;
  Layout layout = Layout::contiguous;  // of x
  Layout inner = Layout::contiguous;   // of images between the stages and at the end; never strided
  int64_t count = 0;
  ChainStage stages[kMostStages];
  View x, y;              // of a linear stage: the rows' and the columns' distance are n and c
  void* saved = nullptr;  // what backward needs, or null
};

// The layout of what stage i reads; of the last stage's output where there is no stage i.
inline Layout chain_layout(const ChainArgs& a, int64_t i) {
  const bool is_row = i < a.count && a.stages[i].layer == Layer::linear;
  return i == 0 ? a.layout : is_row ? Layout::contiguous : a.inner;
}

// The extents of the output of stage i, behind its pool.
inline Extent3 chain_extent(const ChainArgs& a, int64_t i) {
  const ConvArgs& conv = a.stages[i].conv;
  return conv.epilogue.pools() ? conv.epilogue.pool.out : Extent3{1, conv.shape.P, conv.shape.Q};
}

// A dense tensor like the output of stage i.
inline View chain_output(const ChainArgs& a, int64_t i, void* data) {
  const int64_t K = a.stages[i].conv.shape.K;
  const Extent3 out = chain_extent(a, i);
  if (chain_layout(a, i + 1) == Layout::channels_last) return {data, out.cells() * K, 1, 0, out.w * K, K};
  return {data, out.cells() * K, out.cells(), 0, out.w, 1};
}

// What `saved` holds of stage i, if anything, but for rows that keep it in lanes: dense tensors, each at the
// front of its place.
inline View saved_tensor(const ChainArgs& a, int64_t i, int64_t at) {
  return a.saved && at >= 0 ? chain_output(a, i, static_cast<char*>(a.saved) + at) : View{};
}
inline View saved_output(const ChainArgs& a, int64_t i) {
  return saved_tensor(a, i, a.stages[i].saved_output);
}
inline View saved_offsets(const ChainArgs& a, int64_t i) {
  return saved_tensor(a, i, a.stages[i].saved_offsets);
}

struct ChainBackwardArgs {
  ChainArgs chain;
  const char* forward = nullptr;  // the row that has filled `saved`
  View grad_y;                    // dense, in layout `inner`
  View grad_x;                    // the same; null: not wanted
};

}  // namespace fastconv
