// SPDX-License-Identifier: MIT
// The bias half of wgrad, for every wgrad row: a.bias_grad[k] = the sum of a.y over everything but k, where
// it is wanted. `workspace` holds bias_grad_workspace (plan.h).
#pragma once

#include "core/args.h"

namespace fastconv::cuda {

void conv_bias_grad(const ConvArgs& a, void* workspace, void* stream);
void linear_bias_grad(const LinearArgs& a, void* workspace, void* stream);

}  // namespace fastconv::cuda
