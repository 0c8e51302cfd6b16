// SPDX-License-Identifier: MIT
// Average pooling from its definition: one loop over the elements of the output, core/naive.h for each. The
// last row of its tables and the oracle of all others.
#include "core/naive.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

namespace {

double element_us(const PoolArgs& a) { return 1e-2 + 5e-3 * double(a.window.kernel.cells()); }

}  // namespace

void avg_pool_naive(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.N * a.C * a.window.out.cells(), element_us(a),
                 [&](int64_t i) { naive::avg_pool<Element>(a, i); });
  });
}

void avg_pool_backward_naive(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.N * a.C * a.D * a.H * a.W, element_us(a),
                 [&](int64_t i) { naive::avg_pool_backward<Element>(a, i); });
  });
}

}  // namespace fastconv::cpu
