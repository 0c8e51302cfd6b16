// SPDX-License-Identifier: MIT
#pragma once

#include "core/args.h"
#include "core/shape.h"

namespace fastconv {

// The problem that checked sizes describe (core/shape.h).
ConvShape conv_shape(const Sizes<int64_t>& input, const Sizes<int64_t>& weight, const Sizes<int64_t>& output,
                     const Sizes<int64_t>& stride, const Sizes<int64_t>& padding,
                     const Sizes<int64_t>& dilation, int64_t groups);

}  // namespace fastconv
