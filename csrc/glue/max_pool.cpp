// SPDX-License-Identifier: MIT
// Max-pool: fastconv::max_pool, max_pool_backward, max_pool_gather (the gradient of
// the gradient), max_pool_indices.
#include <torch/library.h>

#include "glue/pool.h"
#include "glue/run.h"

namespace fastconv {

namespace {

template <class Int, class IntArrayRef>
WindowAttributes<Int> attributes(IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                 IntArrayRef dilation, bool ceil_mode) {
  return {max_pool_name(kernel.size()), kernel.vec(), stride.vec(), padding.vec(), dilation.vec(), ceil_mode};
}

PoolArgs max_pool_args(const at::Tensor& x, const at::Tensor& y, const at::Tensor& offsets,
                       at::IntArrayRef input_size, const WindowAttributes<int64_t>& a) {
  PoolArgs args = pool_args(x, y, input_size, a);
  if (offsets.dim() > 1) {
    args.offsets = view_of(offsets);
    args.offset = offset_type(args.window.kernel.cells());
  }
  return args;
}

// --- forward

using Pooled = std::tuple<at::Tensor, at::Tensor>;

template <class Int>
Pooled new_max_pool(const at::Tensor& input, const WindowAttributes<Int>& a, bool save_offsets) {
  check_tensors(a.op, {{"input", input}});
  const Sizes<Int> output = a.output_size(sizes_of<Int>(input));
  const bool channels_last = is_channels_last(input);
  return {
      new_tensor(input, output, channels_last, input.scalar_type()),
      new_tensor(input, save_offsets ? output : Sizes<Int>{Int(0)}, channels_last, offset_dtype(a.kernel))};
}

Pooled max_pool(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode, bool save_offsets,
                c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, dilation, ceil_mode);
  auto [y, offsets] = new_max_pool(input, a, save_offsets);
  run(&Tables::max_pool, max_pool_args(input, y, offsets, input.sizes(), a), input, kernel);
  return {y, offsets};
}

Pooled max_pool_meta(const at::Tensor& input, c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                     c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool ceil_mode,
                     bool save_offsets, c10::string_view) {
  return new_max_pool(input, attributes<c10::SymInt>(kernel_size, stride, padding, dilation, ceil_mode),
                      save_offsets);
}

// --- backward

template <class Int>
at::Tensor new_max_pool_backward(const at::Tensor& grad_output, const at::Tensor& offsets,
                                 const Sizes<Int>& input_size, const WindowAttributes<Int>& a) {
  const char* op = "max_pool_backward";
  check_tensors(op, {{"grad_output", grad_output}});
  const Sizes<Int> output = a.output_size(input_size);
  check_size(op, {"grad_output", grad_output}, output);
  check_offsets(op, offsets, grad_output, output, a.kernel);
  return new_tensor(grad_output, input_size, is_channels_last(offsets), grad_output.scalar_type());
}

at::Tensor max_pool_backward(const at::Tensor& grad_output, const at::Tensor& offsets,
                             at::IntArrayRef input_size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode,
                             c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, dilation, ceil_mode);
  const at::Tensor x = new_max_pool_backward(grad_output, offsets, input_size.vec(), a);
  run(&Tables::max_pool_backward, max_pool_args(x, grad_output, offsets, input_size, a), grad_output, kernel);
  return x;
}

at::Tensor max_pool_backward_meta(const at::Tensor& grad_output, const at::Tensor& offsets,
                                  c10::SymIntArrayRef input_size, c10::SymIntArrayRef kernel_size,
                                  c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                  c10::SymIntArrayRef dilation, bool ceil_mode, c10::string_view) {
  return new_max_pool_backward(grad_output, offsets, input_size.vec(),
                               attributes<c10::SymInt>(kernel_size, stride, padding, dilation, ceil_mode));
}

// --- gather

template <class Int>
at::Tensor new_max_pool_gather(const at::Tensor& input, const at::Tensor& offsets,
                               const WindowAttributes<Int>& a) {
  const char* op = "max_pool_gather";
  check_tensors(op, {{"input", input}});
  const Sizes<Int> output = a.output_size(sizes_of<Int>(input));
  check_offsets(op, offsets, input, output, a.kernel);
  return new_tensor(input, output, is_channels_last(offsets), input.scalar_type());
}

at::Tensor max_pool_gather(const at::Tensor& input, const at::Tensor& offsets, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                           bool ceil_mode, c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, dilation, ceil_mode);
  const at::Tensor y = new_max_pool_gather(input, offsets, a);
  run(&Tables::max_pool_gather, max_pool_args(input, y, offsets, input.sizes(), a), input, kernel);
  return y;
}

at::Tensor max_pool_gather_meta(const at::Tensor& input, const at::Tensor& offsets,
                                c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool ceil_mode,
                                c10::string_view) {
  return new_max_pool_gather(input, offsets,
                             attributes<c10::SymInt>(kernel_size, stride, padding, dilation, ceil_mode));
}

// --- indices

template <class Int>
at::Tensor new_max_pool_indices(const at::Tensor& offsets, const Sizes<Int>& input_size,
                                const WindowAttributes<Int>& a) {
  check_offsets("max_pool_indices", offsets, offsets, a.output_size(input_size), a.kernel);
  return new_tensor(offsets, sizes_of<Int>(offsets), is_channels_last(offsets), at::kLong);
}

at::Tensor max_pool_indices(const at::Tensor& offsets, at::IntArrayRef input_size,
                            at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, bool ceil_mode, c10::string_view kernel) {
  const auto a = attributes<int64_t>(kernel_size, stride, padding, dilation, ceil_mode);
  const at::Tensor indices = new_max_pool_indices(offsets, input_size.vec(), a);
  run(&Tables::max_pool_indices, max_pool_args(offsets, indices, offsets, input_size, a), offsets, kernel);
  return indices;
}

at::Tensor max_pool_indices_meta(const at::Tensor& offsets, c10::SymIntArrayRef input_size,
                                 c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                 c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool ceil_mode,
                                 c10::string_view) {
  return new_max_pool_indices(offsets, input_size.vec(),
                              attributes<c10::SymInt>(kernel_size, stride, padding, dilation, ceil_mode));
}

void register_kernels(torch::Library& m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_backward", max_pool_backward);
  m.impl("max_pool_gather", max_pool_gather);
  m.impl("max_pool_indices", max_pool_indices);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("max_pool", max_pool_meta);
  m.impl("max_pool_backward", max_pool_backward_meta);
  m.impl("max_pool_gather", max_pool_gather_meta);
  m.impl("max_pool_indices", max_pool_indices_meta);
}

}  // namespace fastconv
