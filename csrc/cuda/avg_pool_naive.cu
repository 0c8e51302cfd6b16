// SPDX-License-Identifier: MIT
// Average pooling from its definition, core/naive.h for each element, one thread each: the last row of its
// tables and the oracle of all others. Backward gathers: each input cell sums, in a fixed order, what the
// windows over it send.
//
// Limits: 64-bit index arithmetic. The floor is one read of x and one write of y. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/for_each.cuh"

namespace fastconv::cuda {

void avg_pool_naive(const PoolArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<PoolArgs, naive::avg_pool<Element>>(a, a.N * a.C * a.window.out.cells(), stream);
  });
}

void avg_pool_backward_naive(const PoolArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<PoolArgs, naive::avg_pool_backward<Element>>(a, a.N * a.C * a.D * a.H * a.W, stream);
  });
}

}  // namespace fastconv::cuda
