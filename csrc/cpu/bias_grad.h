// SPDX-License-Identifier: MIT
// The bias half of wgrad, for every wgrad row: a.bias_grad[k] = the sum of a.y over everything but k, where
// it is wanted.
#pragma once

#include "core/args.h"

namespace fastconv::cpu {

void conv_bias_grad(const ConvArgs& a);      // conv_naive.cpp
void linear_bias_grad(const LinearArgs& a);  // linear_naive.cpp

}  // namespace fastconv::cpu
