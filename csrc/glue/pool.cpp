// SPDX-License-Identifier: MIT
#include "glue/pool.h"

#include "glue/device.h"

namespace fastconv {

Window window_of(const Sizes<int64_t>& output, const Sizes<int64_t>& kernel, const Sizes<int64_t>& stride,
                 const Sizes<int64_t>& padding, const Sizes<int64_t>& dilation) {
  return {extent3(kernel), extent3(stride), extent3(padding, 0), extent3(dilation),
          extent3(at::IntArrayRef(output).slice(2))};
}

PoolArgs pool_args(const at::Tensor& x, const at::Tensor& y, at::IntArrayRef input_size,
                   const WindowAttributes<int64_t>& a) {
  PoolArgs args;
  const Extent3 in = extent3(input_size.slice(2));
  args.target = target_of(y.device());
  args.layout = layout_of({x, y});
  args.N = input_size[0], args.C = input_size[1], args.D = in.d, args.H = in.h, args.W = in.w;
  args.window = window_of(y.sizes().vec(), a.kernel, a.stride, a.padding, a.dilation);
  args.dtype = dtype_of(x);
  args.x = view_of(x), args.y = view_of(y);
  return args;
}

}  // namespace fastconv
