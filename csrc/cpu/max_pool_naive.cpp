// SPDX-License-Identifier: MIT
// Max-pool from its definition: one loop over the elements of the output, core/naive.h for each. The last row
// of the pooling tables and the oracle of all others.
#include "core/naive.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

namespace {

double element_us(const PoolArgs& a) { return 1e-2 + 5e-3 * double(a.window.kernel.cells()); }

int64_t outputs(const PoolArgs& a) { return a.N * a.C * a.window.out.cells(); }

}  // namespace

void max_pool_naive(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(outputs(a), element_us(a), [&](int64_t i) { naive::max_pool<Element>(a, i); });
  });
}

void max_pool_backward_naive(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.N * a.C * a.D * a.H * a.W, element_us(a),
                 [&](int64_t i) { naive::max_pool_backward<Element>(a, i); });
  });
}

void max_pool_gather_naive(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(outputs(a), 2e-2, [&](int64_t i) { naive::max_pool_gather<Element>(a, i); });
  });
}

void max_pool_indices_naive(const PoolArgs& a, void*, void*) {
  parallel_for(outputs(a), 2e-2, [&](int64_t i) { naive::max_pool_indices(a, i); });
}

}  // namespace fastconv::cpu
