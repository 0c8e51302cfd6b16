// SPDX-License-Identifier: MIT
// Batch-norm by the batch's own statistics, act and max-pool: fastconv::norm_act_pool and its backward.
#include <torch/library.h>

#include "glue/pool.h"
#include "glue/run.h"

namespace fastconv {

namespace {

// Without a kernel nothing pools.
template <class Int>
struct Attributes {
  WindowAttributes<Int> pool;

  template <class IntArrayRef>
  Attributes(IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding)
      : pool{max_pool_name(kernel.size()),      kernel.vec(), stride.vec(), padding.vec(),
             Sizes<Int>(kernel.size(), Int(1)), false} {}
  bool pools() const { return !pool.kernel.empty(); }
  Sizes<Int> output_size(const Sizes<Int>& input) const { return pools() ? pool.output_size(input) : input; }
};

template <class Int>
void check_input(const char* op, const Sizes<Int>& input) {
  FASTCONV_CHECK(input.size() >= 3 && input.size() <= 5, op,
                 ": input must have 3 to 5 dimensions [N, C, ...], got input of size ", text(input));
  for (size_t i = 1; i < input.size(); ++i)
    FASTCONV_CHECK(input[i] >= 1, op, ": only the batch may be empty, got input of size ", text(input));
}

template <class Int>
void check_channels(const char* op, const char* name, const OptionalTensor& tensor, const at::Tensor& input) {
  if (!tensor || !tensor->defined()) return;
  check_tensors(op, {{"input", input}, {name, *tensor}});
  check_size(op, {name, *tensor}, Sizes<Int>{sizes_of<Int>(input)[1]});
}

NormArgs norm_args(const at::Tensor& input, const at::Tensor& y, const at::Tensor& offsets,
                   const void* weight, const at::Tensor& mean, const at::Tensor& invstd, Act act,
                   const Attributes<int64_t>& a) {
  NormArgs args;
  const Extent3 in = extent3(input.sizes().slice(2));
  args.dtype = dtype_of(input);
  args.target = target_of(input.device());
  args.layout = layout_of({input, y});
  args.N = input.size(0), args.C = input.size(1), args.D = in.d, args.H = in.h, args.W = in.w;
  args.act = act;
  args.window.out = extent3(y.sizes().slice(2));
  args.x = view_of(input), args.y = view_of(y);
  if (a.pools()) {
    args.window = window_of(y.sizes().vec(), a.pool.kernel, a.pool.stride, a.pool.padding, a.pool.dilation);
    args.offsets = view_of(offsets);
    args.offset = offset_type(args.window.kernel.cells());
  }
  args.weight = weight;
  args.mean = mean.data_ptr<double>(), args.invstd = invstd.data_ptr<double>();
  return args;
}

// --- forward

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class Int>
Outputs new_norm_act_pool(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Attributes<Int>& a) {
  const char* op = "norm_act_pool";
  check_tensors(op, {{"input", input}});
  const Sizes<Int> size = sizes_of<Int>(input), none{Int(0)};
  check_input(op, size);
  check_channels<Int>(op, "weight", weight, input);
  check_channels<Int>(op, "bias", bias, input);
  const Sizes<Int> output = a.output_size(size), channels{size[1]};
  const bool channels_last = is_channels_last(input);
  return {new_tensor(input, output, channels_last, input.scalar_type()),
          new_tensor(input, a.pools() ? output : none, channels_last, offset_dtype(a.pool.kernel)),
          new_tensor(input, channels, false, at::kDouble), new_tensor(input, channels, false, at::kDouble)};
}

Outputs norm_act_pool(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps, c10::string_view act, at::IntArrayRef pool_kernel,
                      at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, c10::string_view kernel) {
  const Attributes<int64_t> a(pool_kernel, pool_stride, pool_padding);
  auto [y, offsets, mean, invstd] = new_norm_act_pool(input, weight, bias, a);
  const OptionalTensor dense_weight = contiguous(weight), dense_bias = contiguous(bias);
  NormArgs args = norm_args(input, y, offsets, data_of(dense_weight), mean, invstd, act_of(act), a);
  args.bias = data_of(dense_bias);
  args.eps = eps;
  run(&Tables::norm_act_pool, args, input, kernel);
  return {y, offsets, mean, invstd};
}

Outputs norm_act_pool_meta(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           double, c10::string_view act, c10::SymIntArrayRef pool_kernel,
                           c10::SymIntArrayRef pool_stride, c10::SymIntArrayRef pool_padding,
                           c10::string_view) {
  act_of(act);
  return new_norm_act_pool(input, weight, bias,
                           Attributes<c10::SymInt>(pool_kernel, pool_stride, pool_padding));
}

// --- backward

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// What both forms of backward read.
struct Operands {
  const at::Tensor &grad_output, &output, &offsets, &input;
  const OptionalTensor& weight;
  const at::Tensor &mean, &invstd;
};

// Gradients that are not wanted are empty.
template <class Int>
Gradients new_gradients(const Operands& t, const Attributes<Int>& a, const std::array<bool, 3>& mask) {
  const char* op = "norm_act_pool_backward";
  check_tensors(op, {{"grad_output", t.grad_output}, {"output", t.output}, {"input", t.input}});
  const Sizes<Int> x = sizes_of<Int>(t.input), none{Int(0)};
  check_input(op, x);
  check_channels<Int>(op, "weight", t.weight, t.input);
  const Sizes<Int> y = a.output_size(x), channels{x[1]};
  check_size(op, {"grad_output", t.grad_output}, y);
  check_size(op, {"output", t.output}, y);
  if (a.pools()) check_offsets(op, t.offsets, t.input, y, a.pool.kernel);
  for (const Named& each : {Named{"mean", t.mean}, Named{"invstd", t.invstd}}) {
    check_size(op, each, channels);
    TORCH_CHECK(each.tensor.scalar_type() == at::kDouble && each.tensor.device() == t.input.device() &&
                    each.tensor.is_contiguous(),
                op, ": ", each.name, " must be contiguous float64 on ", t.input.device(), ", got ",
                each.tensor.scalar_type(), " on ", each.tensor.device());
  }
  const auto dtype = t.input.scalar_type();
  return {new_tensor(t.input, mask[0] ? x : none, is_channels_last(t.input), dtype),
          new_tensor(t.input, mask[1] ? channels : none, false, dtype),
          new_tensor(t.input, mask[2] ? channels : none, false, dtype)};
}

// The same, the input's gradient over the input.
template <class Int>
Gradients gradients_over_input(const Operands& t, const Attributes<Int>& a, const std::array<bool, 2>& mask) {
  auto [none, w, b] = new_gradients(t, a, {false, mask[0], mask[1]});
  TORCH_CHECK(t.input.is_non_overlapping_and_dense(),
              "norm_act_pool_backward_: input must be dense to be written over, got strides ",
              t.input.sym_strides());
  return {t.input, w, b};
}

void run_backward(const Gradients& grads, const Operands& t, c10::string_view act,
                  const Attributes<int64_t>& a, const std::array<bool, 3>& mask, c10::string_view kernel) {
  const auto& [x, w, b] = grads;
  const OptionalTensor dense_weight = contiguous(t.weight);
  NormBackwardArgs args;
  args.norm =
      norm_args(t.input, t.output, t.offsets, data_of(dense_weight), t.mean, t.invstd, act_of(act), a);
  args.grad_y = view_of(t.grad_output);
  if (mask[0]) args.grad_x = view_of(x);
  if (mask[1]) args.grad_w = w.data_ptr();
  if (mask[2]) args.grad_b = b.data_ptr();
  run(&Tables::norm_act_pool_backward, args, t.input, kernel);
}

Gradients norm_act_pool_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                 const at::Tensor& offsets, const at::Tensor& input,
                                 const OptionalTensor& weight, const at::Tensor& mean,
                                 const at::Tensor& invstd, c10::string_view act, at::IntArrayRef pool_kernel,
                                 at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                 std::array<bool, 3> mask, c10::string_view kernel) {
  const Operands t{grad_output, output, offsets, input, weight, mean, invstd};
  const Attributes<int64_t> a(pool_kernel, pool_stride, pool_padding);
  const Gradients grads = new_gradients(t, a, mask);
  run_backward(grads, t, act, a, mask, kernel);
  return grads;
}

Gradients norm_act_pool_backward_meta(const at::Tensor& grad_output, const at::Tensor& output,
                                      const at::Tensor& offsets, const at::Tensor& input,
                                      const OptionalTensor& weight, const at::Tensor& mean,
                                      const at::Tensor& invstd, c10::string_view act,
                                      c10::SymIntArrayRef pool_kernel, c10::SymIntArrayRef pool_stride,
                                      c10::SymIntArrayRef pool_padding, std::array<bool, 3> mask,
                                      c10::string_view) {
  act_of(act);
  return new_gradients({grad_output, output, offsets, input, weight, mean, invstd},
                       Attributes<c10::SymInt>(pool_kernel, pool_stride, pool_padding), mask);
}

using ParameterGradients = std::tuple<at::Tensor, at::Tensor>;

ParameterGradients norm_act_pool_backward_(const at::Tensor& grad_output, const at::Tensor& output,
                                           const at::Tensor& offsets, const at::Tensor& input,
                                           const OptionalTensor& weight, const at::Tensor& mean,
                                           const at::Tensor& invstd, c10::string_view act,
                                           at::IntArrayRef pool_kernel, at::IntArrayRef pool_stride,
                                           at::IntArrayRef pool_padding, std::array<bool, 2> mask,
                                           c10::string_view kernel) {
  const Operands t{grad_output, output, offsets, input, weight, mean, invstd};
  const Attributes<int64_t> a(pool_kernel, pool_stride, pool_padding);
  const Gradients grads = gradients_over_input(t, a, mask);
  run_backward(grads, t, act, a, {true, mask[0], mask[1]}, kernel);
  if (!input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return {std::get<1>(grads), std::get<2>(grads)};
}

ParameterGradients norm_act_pool_backward_meta_(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& offsets,
    const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& mean, const at::Tensor& invstd,
    c10::string_view act, c10::SymIntArrayRef pool_kernel, c10::SymIntArrayRef pool_stride,
    c10::SymIntArrayRef pool_padding, std::array<bool, 2> mask, c10::string_view) {
  act_of(act);
  const Gradients grads =
      gradients_over_input({grad_output, output, offsets, input, weight, mean, invstd},
                           Attributes<c10::SymInt>(pool_kernel, pool_stride, pool_padding), mask);
  return {std::get<1>(grads), std::get<2>(grads)};
}

void register_kernels(torch::Library& m) {
  m.impl("norm_act_pool", norm_act_pool);
  m.impl("norm_act_pool_backward", norm_act_pool_backward);
  m.impl("norm_act_pool_backward_", norm_act_pool_backward_);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("norm_act_pool", norm_act_pool_meta);
  m.impl("norm_act_pool_backward", norm_act_pool_backward_meta);
  m.impl("norm_act_pool_backward_", norm_act_pool_backward_meta_);
}

}  // namespace fastconv
