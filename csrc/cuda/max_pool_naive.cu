// SPDX-License-Identifier: MIT
// Max-pool from its definition, core/naive.h for each element, one thread each: the last row of the pooling
// tables and the oracle of all others. Backward gathers: each input cell sums, in a fixed order, the windows
// whose maximum it is.
//
// Limits: 64-bit index arithmetic. The floor is one read of x and one write of y. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/for_each.cuh"

namespace fastconv::cuda {

namespace {

int64_t outputs(const PoolArgs& a) { return a.N * a.C * a.window.out.cells(); }

}  // namespace

void max_pool_naive(const PoolArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    for_each<PoolArgs, naive::max_pool<std::remove_pointer_t<decltype(t)>>>(a, outputs(a), stream);
  });
}

void max_pool_backward_naive(const PoolArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<PoolArgs, naive::max_pool_backward<Element>>(a, a.N * a.C * a.D * a.H * a.W, stream);
  });
}

void max_pool_gather_naive(const PoolArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    for_each<PoolArgs, naive::max_pool_gather<std::remove_pointer_t<decltype(t)>>>(a, outputs(a), stream);
  });
}

void max_pool_indices_naive(const PoolArgs& a, void*, void* stream) {
  for_each<PoolArgs, naive::max_pool_indices>(a, outputs(a), stream);
}

}  // namespace fastconv::cuda
