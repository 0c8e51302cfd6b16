// SPDX-License-Identifier: MIT
// Linear, alone and with ReLU: fastconv::linear_act, linear_dgrad, linear_wgrad, linear_act_backward. Leading
// dimensions of the input are flattened into the rows of a matrix.
#include <torch/library.h>

#include "glue/conv.h"
#include "glue/run.h"

namespace fastconv {

namespace {

// [..., K] -> [rows, K], a view wherever strides allow.
at::Tensor rows_of(const at::Tensor& t) {
  const int64_t features = t.size(-1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return t.dim() == 2 ? t : t.reshape({rows, features});
}

LinearArgs linear_args(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y) {
  LinearArgs args;
  args.dtype = dtype_of(x);
  args.tf32 = allows_tf32(kernel_device(x), Layer::linear);
  args.target = target_of(x.device());
  args.layout = layout_of({x, w, y});
  args.M = x.size(0), args.N = w.size(0), args.K = w.size(1);
  args.x = matrix_of(x), args.w = matrix_of(w), args.y = matrix_of(y);
  return args;
}

// --- forward

template <class Int>
at::Tensor new_linear_act(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  const char* op = "linear";
  check_tensors(op, {{"input", input}, {"weight", weight}});
  if (bias) check_tensors(op, {{"input", input}, {"bias", *bias}});
  const Sizes<Int> output = linear_output_size(sizes_of<Int>(input), sizes_of<Int>(weight));
  if (bias) require_bias(sizes_of<Int>(*bias), output.back(), op);
  return new_tensor(input, output, false, input.scalar_type());
}

at::Tensor linear_act(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      c10::string_view act, c10::string_view kernel) {
  const at::Tensor y = new_linear_act<int64_t>(input, weight, bias);
  const OptionalTensor dense_bias = contiguous(bias);
  const at::Tensor x = rows_of(input);
  LinearArgs args = linear_args(x, weight, rows_of(y));
  args.epilogue.bias = data_of(dense_bias);
  args.epilogue.act = act_of(act);
  run(&Tables::linear_fprop, args, input, kernel);
  return y;
}

at::Tensor linear_act_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                           c10::string_view act, c10::string_view) {
  act_of(act);
  return new_linear_act<c10::SymInt>(input, weight, bias);
}

// --- dgrad

template <class Int>
at::Tensor new_linear_dgrad(const at::Tensor& grad_output, const at::Tensor& weight) {
  const char* op = "linear_dgrad";
  check_tensors(op, {{"grad_output", grad_output}, {"weight", weight}});
  Sizes<Int> input = sizes_of<Int>(grad_output);
  FASTCONV_CHECK(!input.empty() && weight.dim() == 2 && input.back() == sizes_of<Int>(weight)[0], op,
                 ": grad_output.size(-1) must equal weight.size(0), got sizes ", text(input), " and ",
                 text(sizes_of<Int>(weight)));
  input.back() = sizes_of<Int>(weight)[1];
  return new_tensor(grad_output, input, false, grad_output.scalar_type());
}

at::Tensor linear_dgrad(const at::Tensor& grad_output, const at::Tensor& weight, c10::string_view kernel) {
  const at::Tensor x = new_linear_dgrad<int64_t>(grad_output, weight);
  const at::Tensor grad = rows_of(grad_output);
  run(&Tables::linear_dgrad, linear_args(rows_of(x), weight, grad), grad_output, kernel);
  return x;
}

at::Tensor linear_dgrad_meta(const at::Tensor& grad_output, const at::Tensor& weight, c10::string_view) {
  return new_linear_dgrad<c10::SymInt>(grad_output, weight);
}

// --- wgrad

using Gradients2 = std::tuple<at::Tensor, at::Tensor>;

template <class Int>
Gradients2 new_linear_wgrad(const at::Tensor& grad_output, const at::Tensor& input, bool bias) {
  const char* op = "linear_wgrad";
  check_tensors(op, {{"grad_output", grad_output}, {"input", input}});
  const Sizes<Int> gy = sizes_of<Int>(grad_output), x = sizes_of<Int>(input);
  FASTCONV_CHECK(!gy.empty() && gy.size() == x.size() && std::equal(gy.begin(), gy.end() - 1, x.begin()), op,
                 ": grad_output and input must agree in all but the last dimension, got sizes ", text(gy),
                 " and ", text(x));
  return {new_tensor(input, Sizes<Int>{gy.back(), x.back()}, false, input.scalar_type()),
          new_tensor(input, Sizes<Int>{bias ? gy.back() : Int(0)}, false, input.scalar_type())};
}

Gradients2 linear_wgrad(const at::Tensor& grad_output, const at::Tensor& input, bool bias,
                        c10::string_view kernel) {
  auto [w, b] = new_linear_wgrad<int64_t>(grad_output, input, bias);
  const at::Tensor grad = rows_of(grad_output), x = rows_of(input);
  LinearArgs args = linear_args(x, w, grad);
  if (bias) args.bias_grad = b.data_ptr();
  run(&Tables::linear_wgrad, args, input, kernel);
  return {w, b};
}

Gradients2 linear_wgrad_meta(const at::Tensor& grad_output, const at::Tensor& input, bool bias,
                             c10::string_view) {
  return new_linear_wgrad<c10::SymInt>(grad_output, input, bias);
}

// --- backward of linear -> act

using Gradients3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class Int>
Gradients3 new_linear_act_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                   const at::Tensor& input, const at::Tensor& weight,
                                   const std::array<bool, 3>& mask) {
  const char* op = "linear_act_backward";
  check_tensors(op, {{"grad_output", grad_output}, {"output", output}, {"input", input}, {"weight", weight}});
  const Sizes<Int> x = sizes_of<Int>(input), w = sizes_of<Int>(weight), none{Int(0)};
  const Sizes<Int> y = linear_output_size(x, w);
  check_size(op, {"grad_output", grad_output}, y);
  check_size(op, {"output", output}, y);
  const auto dtype = input.scalar_type();
  return {new_tensor(input, mask[0] ? x : none, false, dtype),
          new_tensor(input, mask[1] || mask[2] ? w : none, false, dtype),
          new_tensor(input, mask[2] ? Sizes<Int>{w[0]} : none, false, dtype)};
}

Gradients3 linear_act_backward(const at::Tensor& grad_output, const at::Tensor& output,
                               const at::Tensor& input, const at::Tensor& weight, c10::string_view act,
                               std::array<bool, 3> mask, c10::string_view kernel) {
  auto [gx, gw, gb] = new_linear_act_backward<int64_t>(grad_output, output, input, weight, mask);
  const at::Tensor grad = rows_of(grad_output), y = rows_of(output), x = rows_of(input);
  LinearActBackwardArgs args;
  args.linear = linear_args(x, weight, y);
  args.linear.epilogue.act = act_of(act);
  args.grad_y = matrix_of(grad);
  if (mask[0]) args.grad_x = matrix_of(rows_of(gx));
  if (mask[1] || mask[2]) args.grad_w = matrix_of(gw);
  if (mask[2]) args.grad_b = gb.data_ptr();
  run(&Tables::linear_act_backward, args, input, kernel);
  return {gx, gw, gb};
}

Gradients3 linear_act_backward_meta(const at::Tensor& grad_output, const at::Tensor& output,
                                    const at::Tensor& input, const at::Tensor& weight, c10::string_view act,
                                    std::array<bool, 3> mask, c10::string_view) {
  act_of(act);
  return new_linear_act_backward<c10::SymInt>(grad_output, output, input, weight, mask);
}

void register_kernels(torch::Library& m) {
  m.impl("linear_act", linear_act);
  m.impl("linear_dgrad", linear_dgrad);
  m.impl("linear_wgrad", linear_wgrad);
  m.impl("linear_act_backward", linear_act_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("linear_act", linear_act_meta);
  m.impl("linear_dgrad", linear_dgrad_meta);
  m.impl("linear_wgrad", linear_wgrad_meta);
  m.impl("linear_act_backward", linear_act_backward_meta);
}

}  // namespace fastconv
