// SPDX-License-Identifier: MIT
// Linear from its definition: one loop over the elements of the output, core/naive.h for each. The last row
// of the linear tables and the oracle of all others.
#include "core/naive.h"
#include "cpu/bias_grad.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

namespace {

template <class Element>
void bias_grad(const LinearArgs& a) {
  parallel_for(a.N, double(a.M) * 1e-3, [&](int64_t n) {
    naive::Sum<Element> sum;
    for (int64_t m = 0; m < a.M; ++m) sum += naive::at2<Element>(a.y, m, n);
    static_cast<Element*>(a.bias_grad)[n] = narrow<Element>(sum);
  });
}

}  // namespace

void linear_fprop_naive(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.M * a.N, double(a.K) * 1e-3, [&](int64_t i) { naive::linear_fprop<Element>(a, i); });
  });
}

void linear_dgrad_naive(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.M * a.K, double(a.N) * 1e-3, [&](int64_t i) { naive::linear_dgrad<Element>(a, i); });
  });
}

void linear_wgrad_naive(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.N * a.K, double(a.M) * 1e-3, [&](int64_t i) { naive::linear_wgrad<Element>(a, i); });
  });
  linear_bias_grad(a);
}

void linear_bias_grad(const LinearArgs& a) {
  if (!a.bias_grad) return;
  with_dtype(a.dtype, [&](auto* t) { bias_grad<std::remove_pointer_t<decltype(t)>>(a); });
}

}  // namespace fastconv::cpu
