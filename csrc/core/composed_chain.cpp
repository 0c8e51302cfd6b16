// SPDX-License-Identifier: MIT
// A chain stage by stage. What backward needs lies in `saved`, dense and at its front; other intermediates
// take turns in two halves of the workspace.
#include <cstring>

#include "core/composed.h"

namespace fastconv::composed {

namespace {

// Where the tensors of a chain lie. Over no memory it serves to ask rows for cost and workspace; a
// placeholder tells them then which gradients are wanted.
class Chain {
 public:
  Chain(const ChainArgs& args, void* workspace) : a_(args), tables_(tables(args.target.device)) {
    for (int64_t i = 0; i + 1 < a_.count; ++i) slot_ = std::max(slot_, align(bytes(i)));
    static char placeholder;
    slots_ = workspace ? workspace : &placeholder;
    rest_ = after(slots_, 2 * slot_);
  }

  int64_t slot_bytes() const { return 2 * slot_; }
  void* rest() const { return rest_; }
  const ChainStage& stage(int64_t i) const { return a_.stages[i]; }
  bool is_conv(int64_t i) const { return stage(i).layer == Layer::conv; }

  View slot(int64_t i) const { return chain_output(a_, i, static_cast<char*>(slots_) + i % 2 * slot_); }
  View input(int64_t i) const { return i == 0 ? a_.x : output(i - 1); }
  View output(int64_t i) const {
    const View saved = saved_output(a_, i);
    return saved.data ? saved : i + 1 == a_.count ? a_.y : slot(i);
  }

  // A stage as a call of its own, forward.
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
  static Matrix matrix(const View& v) { return {v.data, v.n, v.c}; }

  // Calls f(table, arguments) for each stage.
  template <class F>
  void each_forward(const F& f) const {
    for (int64_t i = 0; i < a_.count; ++i)
      is_conv(i) ? f(tables_.conv_act_pool, conv(i)) : f(tables_.linear_fprop, linear(i));
  }
  // The same for backward, from the last stage to the first that has a gradient to give.
  template <class F>
  void each_backward(const ChainBackwardArgs& b, const F& f) const {
    int64_t first = b.grad_x.data ? 0 : a_.count;
    for (int64_t i = a_.count - 1; i >= 0; --i)
      if (stage(i).grad_w.data) first = std::min(first, i);
    for (int64_t i = a_.count - 1; i >= first; --i) {
      const View grad_y = i + 1 == a_.count ? b.grad_y : slot(i);
      View grad_x = i > 0 ? slot(i - 1) : b.grad_x;
      if (i > 0 && i == first) grad_x = View{};
      const View& grad_w = stage(i).grad_w;
      void* const grad_b = stage(i).grad_b;
      if (is_conv(i)) {
        f(tables_.conv_act_pool_backward, ConvActPoolBackwardArgs{conv(i), grad_y, grad_x, grad_w, grad_b});
      } else {
        Matrix rows = matrix(grad_x);
        if (i > 0 && is_conv(i - 1)) rows = {grad_x.data, grad_x.n, 1};
        f(tables_.linear_act_backward,
          LinearActBackwardArgs{linear(i), matrix(grad_y), rows, {grad_w.data, grad_w.n, grad_w.w}, grad_b});
      }
    }
  }

 private:
  int64_t bytes(int64_t i) const {
    const ConvShape& s = stage(i).conv.shape;
    return s.N * s.K * chain_extent(a_, i).cells() * dtype_size(a_.dtype);
  }

  const ChainArgs& a_;
  const Tables& tables_;
  int64_t slot_ = 0;
  void *slots_, *rest_;
};

}  // namespace

double chain_cost(const ChainArgs& a) {
  double sum = 0;
  Chain(a, nullptr).each_forward([&](const auto& table, const auto& args) { sum += cost(table, args); });
  return sum;
}

int64_t chain_workspace(const ChainArgs& a) {
  const Chain chain(a, nullptr);
  int64_t most = 0;
  chain.each_forward(
      [&](const auto& table, const auto& args) { most = std::max(most, workspace(table, args)); });
  return chain.slot_bytes() + most;
}

void chain(const ChainArgs& a, void* workspace, void* stream) {
  const Chain chain(a, workspace);
  int64_t i = 0;
  chain.each_forward([&](const auto& table, const auto& args) {
    using RowOf = std::decay_t<decltype(*table.begin())>;
    const void* known = a.stages[i++].row;
    const RowOf& row = known ? *static_cast<const RowOf*>(known) : choose(table, args);
    note_launch(table, args, row);
    row.launch(args, chain.rest(), stream);
  });
}

void choose_rows(ChainArgs& a) {
  int64_t i = 0;
  Chain(a, nullptr).each_forward([&](const auto& table, const auto& args) {
    a.stages[i++].row = &choose(table, args);
  });
}

const char* chain_backward_reject(const ChainBackwardArgs& a) {
  bool reads = false;
  for (int64_t i = 0; i < a.chain.count; ++i)
    reads = reads || a.chain.stages[i].saved_output >= 0 || a.chain.stages[i].saved_offsets >= 0;
  return !reads || !strstr(a.forward, "_lanes_") ? nullptr : "reads dense tensors, and lanes were saved";
}

double chain_backward_cost(const ChainBackwardArgs& a) {
  double sum = 0;
  Chain(a.chain, nullptr).each_backward(a, [&](const auto& table, const auto& args) {
    sum += cost(table, args);
  });
  return sum;
}

int64_t chain_backward_workspace(const ChainBackwardArgs& a) {
  const Chain chain(a.chain, nullptr);
  int64_t most = 0;
  chain.each_backward(
      a, [&](const auto& table, const auto& args) { most = std::max(most, workspace(table, args)); });
  return chain.slot_bytes() + most;
}

void chain_backward(const ChainBackwardArgs& a, void* workspace, void* stream) {
  const Chain chain(a.chain, workspace);
  chain.each_backward(
      a, [&](const auto& table, const auto& args) { launch(table, args, chain.rest(), stream); });
}

}  // namespace fastconv::composed
