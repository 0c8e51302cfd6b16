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

struct ChainBackwardArgs {
  ChainArgs chain;
  const char* forward = nullptr;  // the row that has filled `saved`
  View grad_y;                    // dense, in layout `inner`
  View grad_x;                    // the same; null: not wanted
};

}  // namespace fastconv
