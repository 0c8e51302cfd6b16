// SPDX-License-Identifier: MIT
// Convolution, alone and fused with ReLU and max-pool: fastconv::conv_fprop, conv_dgrad, conv_wgrad,
// conv_act_pool, conv_act_pool_backward. Each operator has one function that checks and allocates, for real
// sizes and symbolic ones, and one that launches.
#include "glue/conv.h"

#include <torch/library.h>

#include "glue/pool.h"
#include "glue/run.h"

namespace fastconv {

ConvShape conv_shape(const Sizes<int64_t>& input, const Sizes<int64_t>& weight, const Sizes<int64_t>& output,
                     const Sizes<int64_t>& stride, const Sizes<int64_t>& padding,
                     const Sizes<int64_t>& dilation, int64_t groups) {
  const auto spatial = [](const Sizes<int64_t>& sizes) { return extent3(at::IntArrayRef(sizes).slice(2)); };
  const Extent3 in = spatial(input), filter = spatial(weight), out = spatial(output);
  ConvShape s;
  s.N = input[0], s.C = input[1], s.D = in.d, s.H = in.h, s.W = in.w;
  s.K = weight[0], s.T = filter.d, s.R = filter.h, s.S = filter.w;
  s.Z = out.d, s.P = out.h, s.Q = out.w;
  s.groups = groups;
  s.stride = extent3(stride);
  s.dilation = extent3(dilation);
  s.padding = extent3(at::IntArrayRef(padding).slice(0, stride.size()), 0);
  return s;
}

namespace {

// Attributes of a convolution, real or symbolic.
template <class Int>
struct ConvAttributes {
  Sizes<Int> stride, padding, dilation;
  Int groups;

  Sizes<Int> output_size(const Sizes<Int>& input, const Sizes<Int>& weight) const {
    return conv_output_size(input, weight, stride, padding, dilation, groups);
  }
  ConvShape shape(const Sizes<Int>& input, const Sizes<Int>& weight, const Sizes<Int>& output) const {
    return conv_shape(input, weight, output, stride, padding, dilation, groups);
  }
};

template <class Int, class IntArrayRef>
ConvAttributes<Int> attributes(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                               const Int& groups) {
  return {stride.vec(), padding.vec(), dilation.vec(), groups};
}

ConvArgs conv_args(const ConvShape& shape, const at::Tensor& x, const at::Tensor& w, const at::Tensor& y) {
  ConvArgs args;
  args.dtype = dtype_of(x);
  args.tf32 = allows_tf32(kernel_device(x), Layer::conv);
  args.target = target_of(x.device());
  args.layout = layout_of({x, y});
  args.shape = shape;
  args.x = view_of(x), args.w = view_of(w), args.y = view_of(y);
  return args;
}

// --- fprop

template <class Int>
at::Tensor new_fprop(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     const ConvAttributes<Int>& a) {
  const char* op = conv_name(a.stride.size());
  check_tensors(op, {{"input", input}, {"weight", weight}});
  if (bias) check_tensors(op, {{"input", input}, {"bias", *bias}});
  const Sizes<Int> output = a.output_size(sizes_of<Int>(input), sizes_of<Int>(weight));
  if (bias) require_bias(sizes_of<Int>(*bias), output[1], op);
  return new_tensor(input, output, is_channels_last(input) || is_channels_last(weight), input.scalar_type());
}

at::Tensor conv_fprop(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups, c10::string_view kernel) {
  const auto a = attributes(stride, padding, dilation, groups);
  const at::Tensor y = new_fprop(input, weight, bias, a);
  ConvArgs args =
      conv_args(a.shape(input.sizes().vec(), weight.sizes().vec(), y.sizes().vec()), input, weight, y);
  const OptionalTensor dense_bias = contiguous(bias);
  args.epilogue.bias = data_of(dense_bias);
  run(&Tables::conv_fprop, args, input, kernel);
  return y;
}

at::Tensor conv_fprop_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                           c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                           c10::SymIntArrayRef dilation, c10::SymInt groups, c10::string_view) {
  return new_fprop(input, weight, bias, attributes(stride, padding, dilation, groups));
}

// --- dgrad

template <class Int>
at::Tensor new_dgrad(const at::Tensor& grad_output, const at::Tensor& weight, const Sizes<Int>& input_size,
                     const ConvAttributes<Int>& a) {
  const char* op = "conv_dgrad";
  check_tensors(op, {{"grad_output", grad_output}, {"weight", weight}});
  check_size(op, {"grad_output", grad_output}, a.output_size(input_size, sizes_of<Int>(weight)));
  return new_tensor(grad_output, input_size, is_channels_last(grad_output) || is_channels_last(weight),
                    grad_output.scalar_type());
}

at::Tensor conv_dgrad(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups, c10::string_view kernel) {
  const auto a = attributes(stride, padding, dilation, groups);
  const at::Tensor x = new_dgrad(grad_output, weight, input_size.vec(), a);
  const ConvShape shape = a.shape(input_size.vec(), weight.sizes().vec(), grad_output.sizes().vec());
  run(&Tables::conv_dgrad, conv_args(shape, x, weight, grad_output), grad_output, kernel);
  return x;
}

at::Tensor conv_dgrad_meta(const at::Tensor& grad_output, const at::Tensor& weight,
                           c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride,
                           c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                           c10::string_view) {
  return new_dgrad(grad_output, weight, input_size.vec(), attributes(stride, padding, dilation, groups));
}

// --- wgrad

using Gradients2 = std::tuple<at::Tensor, at::Tensor>;

template <class Int>
Gradients2 new_wgrad(const at::Tensor& grad_output, const at::Tensor& input, const Sizes<Int>& weight_size,
                     const ConvAttributes<Int>& a, bool bias) {
  const char* op = "conv_wgrad";
  check_tensors(op, {{"grad_output", grad_output}, {"input", input}});
  check_size(op, {"grad_output", grad_output}, a.output_size(sizes_of<Int>(input), weight_size));
  const bool channels_last = is_channels_last(grad_output) || is_channels_last(input);
  const auto dtype = input.scalar_type();
  return {new_tensor(input, weight_size, channels_last, dtype),
          new_tensor(input, Sizes<Int>{bias ? weight_size[0] : Int(0)}, false, dtype)};
}

Gradients2 conv_wgrad(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups, bool bias, c10::string_view kernel) {
  const auto a = attributes(stride, padding, dilation, groups);
  auto [w, b] = new_wgrad(grad_output, input, weight_size.vec(), a, bias);
  const ConvShape shape = a.shape(input.sizes().vec(), weight_size.vec(), grad_output.sizes().vec());
  ConvArgs args = conv_args(shape, input, w, grad_output);
  if (bias) args.bias_grad = b.data_ptr();
  run(&Tables::conv_wgrad, args, input, kernel);
  return {w, b};
}

Gradients2 conv_wgrad_meta(const at::Tensor& grad_output, const at::Tensor& input,
                           c10::SymIntArrayRef weight_size, c10::SymIntArrayRef stride,
                           c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                           bool bias, c10::string_view) {
  return new_wgrad(grad_output, input, weight_size.vec(), attributes(stride, padding, dilation, groups),
                   bias);
}

// --- conv -> act -> max-pool

template <class Int>
struct PoolAttributes {
  Sizes<Int> kernel, stride, padding;

  bool pools() const { return !kernel.empty(); }
  Sizes<Int> dilation() const { return Sizes<Int>(kernel.size(), Int(1)); }
  Sizes<Int> output_size(const Sizes<Int>& input) const {
    return pools() ? pool_output_size(max_pool_name(kernel.size()), input, kernel, stride, padding,
                                      dilation(), false)
                   : input;
  }
};

template <class Int, class IntArrayRef>
PoolAttributes<Int> pool_attributes(IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  return {kernel.vec(), stride.vec(), padding.vec()};
}

template <class Int>
Gradients2 new_conv_act_pool(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                             const ConvAttributes<Int>& conv, const PoolAttributes<Int>& pool,
                             bool save_offsets) {
  const char* op = conv_name(conv.stride.size());
  check_tensors(op, {{"input", input}, {"weight", weight}});
  if (bias) check_tensors(op, {{"input", input}, {"bias", *bias}});
  const Sizes<Int> unpooled = conv.output_size(sizes_of<Int>(input), sizes_of<Int>(weight));
  if (bias) require_bias(sizes_of<Int>(*bias), unpooled[1], op);
  const Sizes<Int> output = pool.output_size(unpooled);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  const bool offsets = save_offsets && pool.pools();
  return {new_tensor(input, output, channels_last, input.scalar_type()),
          new_tensor(input, offsets ? output : Sizes<Int>{Int(0)}, channels_last, offset_dtype(pool.kernel))};
}

// The argument struct of the fused block. `unpooled` is the convolution's own output size.
ConvArgs conv_act_pool_args(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& y,
                            const at::Tensor& offsets, const ConvAttributes<int64_t>& conv,
                            const PoolAttributes<int64_t>& pool, Act act) {
  const auto unpooled = conv.output_size(input.sizes().vec(), weight.sizes().vec());
  ConvArgs args =
      conv_args(conv.shape(input.sizes().vec(), weight.sizes().vec(), unpooled), input, weight, y);
  args.epilogue.act = act;
  if (pool.pools())
    args.epilogue.pool = window_of(y.sizes().vec(), pool.kernel, pool.stride, pool.padding, pool.dilation());
  if (offsets.dim() > 1) args.epilogue.offsets = view_of(offsets);
  return args;
}

Gradients2 conv_act_pool(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, c10::string_view act, at::IntArrayRef pool_kernel,
                         at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, bool save_offsets,
                         c10::string_view kernel) {
  const auto conv = attributes(stride, padding, dilation, groups);
  const auto pool = pool_attributes<int64_t>(pool_kernel, pool_stride, pool_padding);
  auto [y, offsets] = new_conv_act_pool(input, weight, bias, conv, pool, save_offsets);
  ConvArgs args = conv_act_pool_args(input, weight, y, offsets, conv, pool, act_of(act));
  const OptionalTensor dense_bias = contiguous(bias);
  args.epilogue.bias = data_of(dense_bias);
  run(&Tables::conv_act_pool, args, input, kernel);
  return {y, offsets};
}

Gradients2 conv_act_pool_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                              c10::SymIntArrayRef dilation, c10::SymInt groups, c10::string_view act,
                              c10::SymIntArrayRef pool_kernel, c10::SymIntArrayRef pool_stride,
                              c10::SymIntArrayRef pool_padding, bool save_offsets, c10::string_view) {
  act_of(act);
  return new_conv_act_pool(input, weight, bias, attributes(stride, padding, dilation, groups),
                           pool_attributes<c10::SymInt>(pool_kernel, pool_stride, pool_padding),
                           save_offsets);
}

using Gradients3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Gradients that are not wanted are empty.
template <class Int>
Gradients3 new_conv_act_pool_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                      const at::Tensor& offsets, const at::Tensor& input,
                                      const at::Tensor& weight, const ConvAttributes<Int>& conv,
                                      const PoolAttributes<Int>& pool, const std::array<bool, 3>& mask) {
  const char* op = "conv_act_pool_backward";
  check_tensors(op, {{"grad_output", grad_output}, {"output", output}, {"input", input}, {"weight", weight}});
  const Sizes<Int> x = sizes_of<Int>(input), w = sizes_of<Int>(weight), none{Int(0)};
  const Sizes<Int> y = pool.output_size(conv.output_size(x, w));
  check_size(op, {"grad_output", grad_output}, y);
  check_size(op, {"output", output}, y);
  if (pool.pools()) check_offsets(op, offsets, input, y, pool.kernel);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  const auto dtype = input.scalar_type();
  return {new_tensor(input, mask[0] ? x : none, channels_last, dtype),
          new_tensor(input, mask[1] || mask[2] ? w : none, channels_last, dtype),
          new_tensor(input, mask[2] ? Sizes<Int>{w[0]} : none, false, dtype)};
}

Gradients3 conv_act_pool_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                  const at::Tensor& offsets, const at::Tensor& input,
                                  const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, int64_t groups, c10::string_view act,
                                  at::IntArrayRef pool_kernel, at::IntArrayRef pool_stride,
                                  at::IntArrayRef pool_padding, std::array<bool, 3> mask,
                                  c10::string_view kernel) {
  const auto conv = attributes(stride, padding, dilation, groups);
  const auto pool = pool_attributes<int64_t>(pool_kernel, pool_stride, pool_padding);
  auto [x, w, b] = new_conv_act_pool_backward(grad_output, output, offsets, input, weight, conv, pool, mask);
  ConvActPoolBackwardArgs args;
  args.conv = conv_act_pool_args(input, weight, output, offsets, conv, pool, act_of(act));
  args.grad_y = view_of(grad_output);
  if (mask[0]) args.grad_x = view_of(x);
  if (mask[1] || mask[2]) args.grad_w = view_of(w);
  if (mask[2]) args.grad_b = b.data_ptr();
  run(&Tables::conv_act_pool_backward, args, input, kernel);
  return {x, w, b};
}

Gradients3 conv_act_pool_backward_meta(const at::Tensor& grad_output, const at::Tensor& output,
                                       const at::Tensor& offsets, const at::Tensor& input,
                                       const at::Tensor& weight, c10::SymIntArrayRef stride,
                                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                       c10::SymInt groups, c10::string_view act,
                                       c10::SymIntArrayRef pool_kernel, c10::SymIntArrayRef pool_stride,
                                       c10::SymIntArrayRef pool_padding, std::array<bool, 3> mask,
                                       c10::string_view) {
  act_of(act);
  return new_conv_act_pool_backward(
      grad_output, output, offsets, input, weight, attributes(stride, padding, dilation, groups),
      pool_attributes<c10::SymInt>(pool_kernel, pool_stride, pool_padding), mask);
}

void register_kernels(torch::Library& m) {
  m.impl("conv_fprop", conv_fprop);
  m.impl("conv_dgrad", conv_dgrad);
  m.impl("conv_wgrad", conv_wgrad);
  m.impl("conv_act_pool", conv_act_pool);
  m.impl("conv_act_pool_backward", conv_act_pool_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("conv_fprop", conv_fprop_meta);
  m.impl("conv_dgrad", conv_dgrad_meta);
  m.impl("conv_wgrad", conv_wgrad_meta);
  m.impl("conv_act_pool", conv_act_pool_meta);
  m.impl("conv_act_pool_backward", conv_act_pool_backward_meta);
}

}  // namespace fastconv
