// SPDX-License-Identifier: MIT
// Linear from its definition, core/naive.h for each element, one thread each. The last row of the linear
// tables and the oracle of all others: every stride and dtype, sums in double.
//
// Limits: each operand is read again for every output. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/bias_grad.h"
#include "cuda/for_each.cuh"

namespace fastconv::cuda {

void linear_fprop_naive(const LinearArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<LinearArgs, naive::linear_fprop<Element>>(a, a.M * a.N, stream);
  });
}

void linear_dgrad_naive(const LinearArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<LinearArgs, naive::linear_dgrad<Element>>(a, a.M * a.K, stream);
  });
}

void linear_wgrad_naive(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<LinearArgs, naive::linear_wgrad<Element>>(a, a.N * a.K, stream);
  });
  linear_bias_grad(a, workspace, stream);
}

}  // namespace fastconv::cuda
