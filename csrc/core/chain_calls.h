// SPDX-License-Identifier: MIT
// The stages of a chain as calls of their own. What backward needs lies in `saved`, dense and at its front;
// other intermediates lie in slots of the workspace.
#pragma once

#include <algorithm>

#include "core/chain_args.h"

namespace fastconv {

class ChainCalls {
 public:
  // Stages take turns in so many slots. Over no memory it serves to ask rows for cost and workspace; a
  // placeholder tells them then which gradients are wanted.
  ChainCalls(const ChainArgs& args, void* workspace, int64_t slots) : a_(args), slots_(slots) {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i + 1 < a_.count; ++i)
      slot_ = std::max(slot_, (bytes(i) + kLine - 1) / kLine * kLine);
    static char placeholder;
    data_ = static_cast<char*>(workspace ? workspace : &placeholder);
  }

  int64_t slot_bytes() const { return slots_ * slot_; }
  void* rest() const { return data_ + slot_bytes(); }
  const ChainStage& stage(int64_t i) const { return a_.stages[i]; }
  bool is_conv(int64_t i) const { return stage(i).layer == Layer::conv; }

  View slot(int64_t i) const { return chain_output(a_, i, data_ + i % slots_ * slot_); }
  View input(int64_t i) const { return i == 0 ? a_.x : output(i - 1); }
  View output(int64_t i) const {
    const View saved = saved_output(a_, i);
    return saved.data ? saved : i + 1 == a_.count ? a_.y : slot(i);
  }

  // A stage forward.
  ConvArgs conv(int64_t i) const {
    ConvArgs conv = stage(i).conv;
    conv.x = input(i), conv.y = output(i);
    const Layout layout = chain_layout(a_, i);
    conv.layout = layout == chain_layout(a_, i + 1) ? layout : Layout::strided;
    conv.epilogue.offsets = saved_offsets(a_, i);
    return conv;
  }
  LinearArgs linear(int64_t i) const {
    const ConvArgs& conv = stage(i).conv;
    const ConvShape& s = conv.shape;
    LinearArgs linear;
    linear.dtype = a_.dtype, linear.tf32 = conv.tf32, linear.target = a_.target;
    linear.layout = chain_layout(a_, i);
    linear.M = s.N, linear.N = s.K, linear.K = s.C * s.in_cells();
    const View x = input(i);
    linear.x = i == 0 ? Matrix{x.data, x.n, x.c} : Matrix{x.data, linear.K, 1};
    linear.w = {conv.w.data, conv.w.n, conv.w.w};
    linear.y = matrix(output(i));
    linear.epilogue = conv.epilogue;
    return linear;
  }

  // Calls f(arguments) for each stage.
  template <class F>
  void each_forward(const F& f) const {
    for (int64_t i = 0; i < a_.count; ++i) is_conv(i) ? f(conv(i)) : f(linear(i));
  }

  // The first stage that has a gradient to give; `count` where none has.
  int64_t first_backward(const ChainBackwardArgs& b) const {
    int64_t i = 0;
    while (i < a_.count && !b.grad_x.data && !stage(i).grad_w.data) ++i;
    return i;
  }
  // The gradient at the output of a stage, and where that of its input goes, if that is wanted.
  View grad_y(const ChainBackwardArgs& b, int64_t i) const { return i + 1 == a_.count ? b.grad_y : slot(i); }
  View grad_x(const ChainBackwardArgs& b, int64_t i) const {
    return i == 0 ? b.grad_x : i == first_backward(b) ? View{} : slot(i - 1);
  }
  ConvActPoolBackwardArgs conv_backward(const ChainBackwardArgs& b, int64_t i) const {
    return {conv(i), grad_y(b, i), grad_x(b, i), stage(i).grad_w, stage(i).grad_b};
  }
  LinearActBackwardArgs linear_backward(const ChainBackwardArgs& b, int64_t i) const {
    const View x = grad_x(b, i), &w = stage(i).grad_w;
    const Matrix rows = i > 0 && is_conv(i - 1) ? Matrix{x.data, x.n, 1} : matrix(x);
    return {linear(i), matrix(grad_y(b, i)), rows, {w.data, w.n, w.w}, stage(i).grad_b};
  }
  // Calls f(arguments) for each stage backward, from the last to the first that has a gradient to give.
  template <class F>
  void each_backward(const ChainBackwardArgs& b, const F& f) const {
    const int64_t first = first_backward(b);
    for (int64_t i = a_.count - 1; i >= first; --i)
      is_conv(i) ? f(conv_backward(b, i)) : f(linear_backward(b, i));
  }

 private:
  static Matrix matrix(const View& v) { return {v.data, v.n, v.c}; }
  int64_t bytes(int64_t i) const {
    const ConvShape& s = stage(i).conv.shape;
    return s.N * s.K * chain_extent(a_, i).cells() * dtype_size(a_.dtype);
  }

  const ChainArgs& a_;
  int64_t slots_, slot_ = 0;
  char* data_;
};

}  // namespace fastconv
