// SPDX-License-Identifier: MIT
// Average pooling: fastconv::avg_pool and avg_pool_backward, each the gradient of the other.
#include <torch/library.h>

#include "glue/pool.h"
#include "glue/run.h"

namespace fastconv {

namespace {

template <class Int, class IntArrayRef>
WindowAttributes<Int> attributes(IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                                 std::optional<int64_t> divisor_override) {
  const char* op = avg_pool_name(kernel.size());
  TORCH_CHECK(divisor_override != 0, op, ": divisor_override must not be 0, got 0");
  return {op, kernel.vec(), stride.vec(), padding.vec(), Sizes<Int>(kernel.size(), Int(1)), ceil_mode};
}

void divide_by(PoolArgs& args, bool count_include_pad, std::optional<int64_t> divisor_override) {
  args.divide_by = count_include_pad ? DivideBy::padded_cells : DivideBy::input_cells;
  if (divisor_override) args.divide_by = DivideBy::number, args.divisor = *divisor_override;
}

// --- forward

template <class Int>
at::Tensor new_avg_pool(const at::Tensor& input, const WindowAttributes<Int>& a) {
  check_tensors(a.op, {{"input", input}});
  return new_tensor(input, a.output_size(sizes_of<Int>(input)), is_channels_last(input), input.scalar_type());
}

at::Tensor avg_pool(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                    at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                    std::optional<int64_t> divisor_override, c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, ceil_mode, divisor_override);
  const at::Tensor y = new_avg_pool(input, a);
  PoolArgs args = pool_args(input, y, input.sizes(), a);
  divide_by(args, count_include_pad, divisor_override);
  run(&Tables::avg_pool, args, input, kernel);
  return y;
}

at::Tensor avg_pool_meta(const at::Tensor& input, c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                         c10::SymIntArrayRef padding, bool ceil_mode, bool,
                         std::optional<int64_t> divisor_override, c10::string_view) {
  return new_avg_pool(input,
                      attributes<c10::SymInt>(kernel_size, stride, padding, ceil_mode, divisor_override));
}

// --- backward

template <class Int>
at::Tensor new_avg_pool_backward(const at::Tensor& grad_output, const Sizes<Int>& input_size,
                                 const WindowAttributes<Int>& a, bool channels_last) {
  const char* op = "avg_pool_backward";
  check_tensors(op, {{"grad_output", grad_output}});
  check_size(op, {"grad_output", grad_output}, a.output_size(input_size));
  return new_tensor(grad_output, input_size, channels_last, grad_output.scalar_type());
}

at::Tensor avg_pool_backward(const at::Tensor& grad_output, at::IntArrayRef input_size,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                             bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                             bool channels_last, c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, ceil_mode, divisor_override);
  const at::Tensor x = new_avg_pool_backward(grad_output, input_size.vec(), a, channels_last);
  PoolArgs args = pool_args(x, grad_output, input_size, a);
  divide_by(args, count_include_pad, divisor_override);
  run(&Tables::avg_pool_backward, args, grad_output, kernel);
  return x;
}

at::Tensor avg_pool_backward_meta(const at::Tensor& grad_output, c10::SymIntArrayRef input_size,
                                  c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                  c10::SymIntArrayRef padding, bool ceil_mode, bool,
                                  std::optional<int64_t> divisor_override, bool channels_last,
                                  c10::string_view) {
  return new_avg_pool_backward(
      grad_output, input_size.vec(),
      attributes<c10::SymInt>(kernel_size, stride, padding, ceil_mode, divisor_override), channels_last);
}

void register_kernels(torch::Library& m) {
  m.impl("avg_pool", avg_pool);
  m.impl("avg_pool_backward", avg_pool_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("avg_pool", avg_pool_meta);
  m.impl("avg_pool_backward", avg_pool_backward_meta);
}

}  // namespace fastconv
