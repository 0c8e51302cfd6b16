// SPDX-License-Identifier: MIT
// What the pooling operators share.
#pragma once

#include "glue/tensor.h"

namespace fastconv {

// The window that checked sizes describe (core/shape.h).
Window window_of(const Sizes<int64_t>& output, const Sizes<int64_t>& kernel, const Sizes<int64_t>& stride,
                 const Sizes<int64_t>& padding, const Sizes<int64_t>& dilation);

template <class Int>
struct WindowAttributes {
  const char* op;  // for messages
  Sizes<Int> kernel, stride, padding, dilation;
  bool ceil_mode;

  Sizes<Int> output_size(const Sizes<Int>& input) const {
    return pool_output_size(op, input, kernel, stride, padding, dilation, ceil_mode);
  }
};

// x and y are the large and the pooled tensor; either may be the one written.
PoolArgs pool_args(const at::Tensor& x, const at::Tensor& y, at::IntArrayRef input_size,
                   const WindowAttributes<int64_t>& a);

}  // namespace fastconv
