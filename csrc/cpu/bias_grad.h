// SPDX-License-Identifier: MIT
// The bias half of wgrad: a.bias_grad[k] = the sum of a.y over everything but k, where it is wanted. Rows of
// an instruction set find its own.
#pragma once

#include "core/args.h"

namespace fastconv::cpu {

namespace portable {
void conv_bias_grad(const ConvArgs& a);
}
namespace avx2 {
void conv_bias_grad(const ConvArgs& a);
}
namespace avx512 {
void conv_bias_grad(const ConvArgs& a);
}
void linear_bias_grad(const LinearArgs& a);  // linear_naive.cpp

}  // namespace fastconv::cpu
