// SPDX-License-Identifier: MIT
// Chains of stages: fastconv::chain and chain_backward. Each has one function that checks and allocates, for
// real sizes and symbolic ones, and one that launches.
#include "core/chain.h"

#include <array>
#include <memory>

#include <torch/library.h>

#include "core/composed.h"
#include "glue/run.h"

namespace fastconv {

namespace {

std::vector<PlanStage> checked_plan(const char* op, const at::Tensor& input, at::TensorList params,
                                    at::IntArrayRef plan) {
  check_tensors(op, {{"input", input}});
  for (const at::Tensor& param : params) check_tensors(op, {{"input", input}, {"each of params", param}});
  return read_plan(plan.data(), plan.size(), params.size());
}

template <class Int>
ChainSizes<Int> sizes_of_chain(const std::vector<PlanStage>& plan, const at::Tensor& input,
                               at::TensorList params) {
  std::vector<Sizes<Int>> param_sizes;
  for (const at::Tensor& param : params) param_sizes.push_back(sizes_of<Int>(param));
  return chain_sizes(plan, sizes_of<Int>(input), param_sizes, static_cast<int64_t>(input.element_size()));
}

View row_view(const at::Tensor& t, const ConvShape& s) {  // of features C x H x W
  return {t.data_ptr(), t.stride(0), s.H * s.W * t.stride(1), 0, s.W * t.stride(1), t.stride(1)};
}
View weight_view(const ChainStage& stage, const at::Tensor& t) {
  return stage.layer == Layer::conv ? view_of(t) : row_view(t, stage.conv.shape);
}
View any_view(const at::Tensor& t) {
  return t.dim() == 4 ? view_of(t) : View{t.data_ptr(), t.stride(0), t.stride(1), 0, 0, 0};
}

at::Tensor dense(const at::Tensor& t, bool channels_last) {
  return t.contiguous(channels_last && t.dim() == 4 ? at::MemoryFormat::ChannelsLast
                                                    : at::MemoryFormat::Contiguous);
}

// Kernels read it in whole cache lines.
at::Tensor aligned(const at::Tensor& saved) {
  const bool is_aligned = saved.is_contiguous() && reinterpret_cast<uintptr_t>(saved.data_ptr()) % 64 == 0;
  return is_aligned ? saved : saved.clone(at::MemoryFormat::Contiguous);
}

// The call, with the tensors that it holds on to.
struct Call {
  ChainArgs args;
  std::vector<at::Tensor> biases;

  Call(const std::vector<PlanStage>& plan, const ChainArgs& without_tensors, const at::Tensor& input,
       at::TensorList params, const at::Tensor& output, const at::Tensor& saved)
      : args(without_tensors) {
    args.layout = layout_of({input});
    args.inner = is_channels_last(input) ? Layout::channels_last : Layout::contiguous;
    args.x = any_view(input), args.y = any_view(output);
    if (saved.dim() == 1 && saved.numel() > 0) args.saved = saved.data_ptr();
    size_t next = 0;
    for (size_t i = 0; i < plan.size(); ++i) {
      ChainStage& stage = args.stages[i];
      stage.conv.w = weight_view(stage, params[next++]);
      if (!plan[i].bias) continue;
      biases.push_back(params[next++].contiguous());
      stage.conv.epilogue.bias = biases.back().data_ptr();
    }
  }
};

using Gradients2 = std::tuple<at::Tensor, at::Tensor>;

template <class Int>
Gradients2 new_chain(const ChainSizes<Int>& sizes, const at::Tensor& input, bool save) {
  return {new_tensor(input, sizes.output(), is_channels_last(input), input.scalar_type()),
          new_tensor(input, Sizes<Int>{save ? sizes.saved_bytes : Int(0)}, false, at::kByte)};
}

// What follows from a call's plan and from its tensors' types, sizes, strides and alignment: it is the same
// for every call that agrees in these.
struct Prepared {
  std::vector<int64_t> key;
  std::vector<PlanStage> plan;
  ChainSizes<int64_t> sizes;
  ChainArgs args;  // without tensors
  const Row<ChainArgs>* row = nullptr;
  int64_t workspace_bytes = 0;
  // The same for backward, of the last call.
  std::vector<int64_t> backward_key;
  const Row<ChainBackwardArgs>* backward_row = nullptr;
  int64_t backward_bytes = 0;
};

void add_to_key(std::vector<int64_t>& key, const at::Tensor& t) {
  key.insert(key.end(), {t.dim(), int64_t(t.scalar_type()), int64_t(t.layout()), int64_t(t.device().type()),
                         t.device().index()});
  key.insert(key.end(), t.sizes().begin(), t.sizes().end());
  if (t.layout() != at::kStrided) return;
  key.insert(key.end(), t.strides().begin(), t.strides().end());
  key.push_back(int64_t(reinterpret_cast<uintptr_t>(t.data_ptr()) % 64));
}

// The few calls that this thread has made last are kept.
Prepared& prepare(const char* op, const at::Tensor& input, at::TensorList params, at::IntArrayRef plan_ints,
                  bool save, c10::string_view kernel) {
  constexpr size_t kKept = 8;
  thread_local std::array<std::unique_ptr<Prepared>, kKept> kept;
  thread_local size_t oldest = 0;
  thread_local std::vector<int64_t> key;
  const Device device = kernel_device(input);
  key.assign({save, default_target(device).level, allows_tf32(device, Layer::conv),
              allows_tf32(device, Layer::linear), int64_t(kernel.size())});
  key.insert(key.end(), kernel.begin(), kernel.end());
  key.push_back(int64_t(plan_ints.size()));
  key.insert(key.end(), plan_ints.begin(), plan_ints.end());
  add_to_key(key, input);
  for (const at::Tensor& param : params) add_to_key(key, param);
  for (const auto& each : kept)
    if (each && each->key == key) return *each;

  auto made = std::make_unique<Prepared>();
  made->plan = checked_plan(op, input, params, plan_ints);
  made->sizes = sizes_of_chain<int64_t>(made->plan, input, params);
  made->args = chain_args(made->plan, made->sizes, dtype_of(input), target_of(input.device()));
  for (ChainStage& stage : made->args.stages) stage.conv.tf32 = allows_tf32(device, stage.layer);
  const auto [output, saved] = new_chain(made->sizes, input, save);
  Call call(made->plan, made->args, input, params, output, saved);
  made->row = &choose(tables(device).chain, call.args, std::string(kernel).c_str());
  made->workspace_bytes = made->row->workspace_bytes(call.args);
  if (made->row->launch == composed::chain) composed::choose_rows(call.args);
  for (int64_t i = 0; i < call.args.count; ++i) made->args.stages[i].row = call.args.stages[i].row;
  made->key = key;
  return *(kept[oldest++ % kKept] = std::move(made));
}

Gradients2 chain(const at::Tensor& input, at::TensorList params, at::IntArrayRef plan_ints, bool save,
                 c10::string_view kernel) {
  const Prepared& prepared = prepare("chain", input, params, plan_ints, save, kernel);
  auto [output, saved] = new_chain(prepared.sizes, input, save);
  const Call call(prepared.plan, prepared.args, input, params, output, saved);
  launch(&Tables::chain, *prepared.row, call.args, prepared.workspace_bytes, input);
  return {output, saved};
}

Gradients2 chain_meta(const at::Tensor& input, at::TensorList params, at::IntArrayRef plan_ints, bool save,
                      c10::string_view) {
  const auto plan = checked_plan("chain", input, params, plan_ints);
  return new_chain(sizes_of_chain<c10::SymInt>(plan, input, params), input, save);
}

using Gradients = std::tuple<at::Tensor, std::vector<at::Tensor>>;

bool wanted(int64_t mask, size_t i) { return mask >> i & 1; }

// Gradients that are not wanted are empty.
template <class Int>
Gradients new_chain_backward(const std::vector<PlanStage>& plan, const ChainSizes<Int>& sizes,
                             const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& input,
                             at::TensorList params, const at::Tensor& saved, int64_t mask) {
  const char* op = "chain_backward";
  check_tensors(op, {{"input", input}, {"grad_output", grad_output}, {"output", output}});
  check_size(op, {"grad_output", grad_output}, sizes.output());
  check_size(op, {"output", output}, sizes.output());
  check_size(op, {"saved", saved}, Sizes<Int>{sizes.saved_bytes});
  TORCH_CHECK(saved.scalar_type() == at::kByte && saved.device() == input.device(), op,
              ": saved must be uint8 on ", input.device(), ", got ", saved.scalar_type(), " on ",
              saved.device());
  FASTCONV_CHECK(mask >= 0 && mask >> (params.size() + 1) == 0, op, ": mask must have a bit for input and ",
                 params.size(), " parameters, got ", mask);
  const auto dtype = input.scalar_type();
  const auto like = [&](const at::Tensor& t, bool is_wanted) {
    return new_tensor(t, is_wanted ? sizes_of<Int>(t) : Sizes<Int>{Int(0)}, is_channels_last(t), dtype);
  };
  std::vector<at::Tensor> grads;
  for (const PlanStage& stage : plan) {
    const size_t i = grads.size();  // a bias comes with its weight
    grads.push_back(like(params[i], wanted(mask, i + 1) || (stage.bias && wanted(mask, i + 2))));
    if (stage.bias) grads.push_back(like(params[i + 1], wanted(mask, i + 2)));
  }
  return {like(input, wanted(mask, 0)), grads};
}

Gradients chain_backward(const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& input,
                         at::TensorList params, const at::Tensor& saved, at::IntArrayRef plan_ints,
                         int64_t mask, c10::string_view kernel) {
  Prepared& prepared = prepare("chain_backward", input, params, plan_ints, true, kernel);
  const auto& plan = prepared.plan;
  auto [grad_input, grads] =
      new_chain_backward(plan, prepared.sizes, grad_output, output, input, params, saved, mask);
  const bool channels_last = is_channels_last(input);
  const at::Tensor dense_grad = dense(grad_output, channels_last), y = dense(output, channels_last);
  const at::Tensor kept = aligned(saved);
  Call call(plan, prepared.args, input, params, y, kept);
  size_t next = 0;
  for (size_t i = 0; i < plan.size(); ++i) {
    ChainStage& stage = call.args.stages[i];
    const at::Tensor& weight = grads[next++];
    if (weight.dim() > 1) stage.grad_w = weight_view(stage, weight);
    if (plan[i].bias && wanted(mask, ++next)) stage.grad_b = grads[next - 1].data_ptr();
  }
  ChainBackwardArgs args;
  args.chain = call.args;
  args.forward = prepared.row->name;
  args.grad_y = any_view(dense_grad);
  if (wanted(mask, 0)) args.grad_x = any_view(grad_input);
  std::vector<int64_t> key{mask};
  add_to_key(key, grad_input), add_to_key(key, dense_grad), add_to_key(key, y), add_to_key(key, kept);
  if (prepared.backward_key != key) {
    const auto& table = tables(kernel_device(input)).chain_backward;
    prepared.backward_row = &choose(table, args, std::string(kernel).c_str());
    prepared.backward_bytes = prepared.backward_row->workspace_bytes(args);
    prepared.backward_key = std::move(key);
  }
  launch(&Tables::chain_backward, *prepared.backward_row, args, prepared.backward_bytes, input);
  return {grad_input, grads};
}

Gradients chain_backward_meta(const at::Tensor& grad_output, const at::Tensor& output,
                              const at::Tensor& input, at::TensorList params, const at::Tensor& saved,
                              at::IntArrayRef plan_ints, int64_t mask, c10::string_view) {
  const auto plan = checked_plan("chain_backward", input, params, plan_ints);
  return new_chain_backward(plan, sizes_of_chain<c10::SymInt>(plan, input, params), grad_output, output,
                            input, params, saved, mask);
}

void register_kernels(torch::Library& m) {
  m.impl("chain", chain);
  m.impl("chain_backward", chain_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("chain", chain_meta);
  m.impl("chain_backward", chain_backward_meta);
}

}  // namespace fastconv
