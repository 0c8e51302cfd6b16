// SPDX-License-Identifier: MIT
// What the depthwise kernels share: which rows of the input the rows of a thread meet, and the choice of a
// kernel for it. conv_depthwise.cu has the picture.
#pragma once

#include "cuda/conv_depthwise.h"
#include "cuda/pool.cuh"

namespace fastconv::cuda {

// A column of kTaps taps under a thread's outputs, which are kStep inputs apart; 0: one tap, any step.
template <int kTaps, int kStep>
struct DepthwiseReach {
  static_assert(kStep > 0 || kTaps == 1);
  static constexpr int kRows = depthwise_thread_rows(kStep);
  static constexpr int kInputs = kStep ? (kRows - 1) * kStep + kTaps : kRows;

  // The i-th input that they meet.
  FASTCONV_HD static int input(int i, int step) { return kStep ? i : i * step; }
  // The tap by which output p meets it, if that lies in [0, kTaps).
  FASTCONV_HD static constexpr int tap(int i, int p) { return kStep ? i - p * kStep : (i == p ? 0 : -1); }
};

// Calls f(null pointer of the element type, channels of a thread, taps, step), the last three as constants;
// where `taps` is 1, step is 0.
template <class F>
void with_depthwise_kernel(Dtype dtype, int64_t vector, int64_t taps, int64_t step, F&& f) {
  using One = std::integral_constant<int, 1>;
  with_dtype(dtype, [&](auto* element) {
    constexpr bool is_double = std::is_same_v<decltype(element), double*>;  // one kernel is enough
    const auto with_vector = [&](auto v) {
      if constexpr (!is_double) {
        const auto two = std::integral_constant<int, 2>();
        const auto three = std::integral_constant<int, 3>();
        const auto five = std::integral_constant<int, 5>();
        if (taps == 3) return step == 2 ? f(element, v, three, two) : f(element, v, three, One());
        if (taps == 5) return step == 2 ? f(element, v, five, two) : f(element, v, five, One());
        if (taps == 7) return f(element, v, std::integral_constant<int, 7>(), One());
      }
      f(element, v, One(), std::integral_constant<int, 0>());
    };
    if constexpr (!is_double)
      if (vector > 1) return with_vector(std::integral_constant<int, kDepthwiseVector>());
    with_vector(One());
  });
}

}  // namespace fastconv::cuda
