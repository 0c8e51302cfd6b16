// SPDX-License-Identifier: MIT
// Convolution from its definition: one loop over the elements of the output, core/naive.h for each. The last
// row of the convolution tables and the oracle of all others.
#include <algorithm>
#include <type_traits>

#include "core/naive.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

namespace {

constexpr double kMacUs = 2e-3;

double element_us(double macs) { return 5e-3 + macs * kMacUs; }

template <class Element>
void wgrad(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t terms = s.N * s.out_cells();
  parallel_for(s.K * s.group_c() * s.taps(), element_us(double(terms)), [&](int64_t i) {
    const naive::Index5 f = naive::unflatten(i, s.group_c(), s.T, s.R, s.S);
    naive::Sum<Element> sum;
    for (int64_t term = 0; term < terms; ++term) sum += naive::conv_wgrad_term<Element>(a, f, term);
    naive::at_mut<Element>(a.w, f.n, f.c, f.d, f.h, f.w) = narrow<Element>(sum);
  });
}

template <class Element>
void bias_grad(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  parallel_for(s.K, double(s.N * s.out_cells()) * 5e-3, [&](int64_t k) {
    naive::Sum<Element> sum;
    for (int64_t i = 0; i < s.N * s.out_cells(); ++i) {
      const naive::Index5 y = naive::unflatten(i, 1, s.Z, s.P, s.Q);
      sum += naive::load(naive::at<Element>(a.y, y.n, k, y.d, y.h, y.w));
    }
    static_cast<Element*>(a.bias_grad)[k] = narrow<Element>(sum);
  });
}

}  // namespace

void conv_fprop_naive(const ConvArgs& a, void*, void*) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(s.N * s.K * s.out_cells(), element_us(double(s.group_c() * s.taps())),
                 [&](int64_t i) { naive::conv_fprop<Element>(a, i); });
  });
}

void conv_dgrad_naive(const ConvArgs& a, void*, void*) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(s.N * s.C * s.in_cells(), element_us(double(s.group_k() * s.taps())),
                 [&](int64_t i) { naive::conv_dgrad<Element>(a, i); });
  });
}

void conv_wgrad_naive(const ConvArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { wgrad<std::remove_pointer_t<decltype(t)>>(a); });
  if (!a.bias_grad) return;
  with_dtype(a.dtype, [&](auto* t) { bias_grad<std::remove_pointer_t<decltype(t)>>(a); });
}

}  // namespace fastconv::cpu
