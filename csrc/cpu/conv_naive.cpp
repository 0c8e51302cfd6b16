// SPDX-License-Identifier: MIT
// Convolution from its definition: one loop over the elements of the output, core/naive.h for each. The last
// row of the convolution tables and the oracle of all others.
#include <algorithm>
#include <type_traits>

#include "core/naive.h"
#include "cpu/bias_grad.h"
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

// Calls f(row) for each row of pixels of a gradient, where row[0] belongs to channel k.
template <class Element, class F>
void each_row(const ConvArgs& a, int64_t k, const F& f) {
  const ConvShape& s = a.shape;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t z = 0; z < s.Z; ++z)
      for (int64_t p = 0; p < s.P; ++p) f(&naive::at<Element>(a.y, n, k, z, p, 0));
}

// Sums in kLanes interleaved chains, so that one addition need not wait for the last.
template <class Element, class Step>
double row_sum(const ConvArgs& a, int64_t k, Step step) {
  constexpr int kLanes = 8;
  naive::Sum<Element> lanes[kLanes];
  each_row<Element>(a, k, [&](const Element* row) {
    int64_t q = 0;
    for (; q + kLanes <= a.shape.Q; q += kLanes)
      for (int i = 0; i < kLanes; ++i) lanes[i] += naive::load(row[(q + i) * step]);
    for (int i = 0; q < a.shape.Q; ++q, ++i) lanes[i] += naive::load(row[q * step]);
  });
  naive::Sum<Element> sum;
  for (const auto& lane : lanes) sum += lane;
  return sum;
}

template <class Element>
void bias_grad(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  auto* out = static_cast<Element*>(a.bias_grad);
  const double pixels = double(s.N * s.out_cells());
  if (a.y.c != 1 || a.y.w == 1)
    return parallel_for(s.K, pixels * 5e-4, [&](int64_t k) {
      const double sum = a.y.w == 1 ? row_sum<Element>(a, k, std::integral_constant<int64_t, 1>{})
                                    : row_sum<Element>(a, k, a.y.w);
      out[k] = narrow<Element>(sum);
    });
  // Channels side by side: long runs of each pixel, so that memory is read in order.
  constexpr int64_t kChannels = 128;
  parallel_for((s.K + kChannels - 1) / kChannels, pixels * kChannels * 5e-4, [&](int64_t block) {
    const int64_t first = block * kChannels, count = std::min(kChannels, s.K - first);
    naive::Sum<Element> sums[kChannels];
    each_row<Element>(a, first, [&](const Element* row) {
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t i = 0; i < count; ++i) sums[i] += naive::load(row[q * a.y.w + i]);
    });
    for (int64_t i = 0; i < count; ++i) out[first + i] = narrow<Element>(sums[i]);
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
  conv_bias_grad(a);
}

void conv_bias_grad(const ConvArgs& a) {
  if (!a.bias_grad) return;
  with_dtype(a.dtype, [&](auto* t) { bias_grad<std::remove_pointer_t<decltype(t)>>(a); });
}

}  // namespace fastconv::cpu
