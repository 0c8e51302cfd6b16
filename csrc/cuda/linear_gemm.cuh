// SPDX-License-Identifier: MIT
// Linear as a GEMM (gemm.cuh). GEMM M runs along the rows of what is written, so that stores are contiguous.
// In LinearArgs' letters (y[M, N] = x[M, K] w[N, K]^T):
//
//   fprop  M = N   N = M   K = K     A = w     B = x
//   dgrad  M = K   N = M   K = N     A = w^T   B = grad_y
//   wgrad  M = K   N = N   K = M     A = x^T   B = grad_y
//
// Takes every stride.
#pragma once

#include "core/naive.h"
#include "cuda/gemm.cuh"

namespace fastconv::cuda {

template <class T>
struct LinearGemm {
  using Element = T;
  using Sum = typename Compute<Element>::type;

  struct Operand {
    using Line = int64_t;
    using Step = int64_t;
    static constexpr int kAtOnce = 4;

    const Element* data;
    int64_t line_stride, step_stride;
    Access access;

    Operand(const void* data, int64_t line_stride, int64_t step_stride, const Access& access)
        : data(static_cast<const Element*>(data)),
          line_stride(line_stride),
          step_stride(step_stride),
          access(access) {}

    FASTCONV_HD bool along_k(bool) const { return access.along_k; }
    FASTCONV_HD int64_t line(int, int i) const { return i * line_stride; }
    FASTCONV_HD int64_t step(int k) const { return k * step_stride; }
    FASTCONV_HD const Element* find(int64_t line, int64_t step) const { return data + (line + step); }
  };
  using A = Operand;
  using B = Operand;

  A a;
  B b;
  Matrix out;                  // row along n, col along m
  const void* bias = nullptr;  // along m
  Act act = Act::none;

  FASTCONV_HD void write(int, int m, int n, Sum sum) const {
    if (bias) sum += static_cast<Sum>(static_cast<const Element*>(bias)[m]);
    static_cast<Element*>(out.data)[n * out.row + m * out.col] = narrow<Element>(naive::activate(sum, act));
  }
};

template <class T>
LinearGemm<T> linear_fprop(const LinearArgs& a) {
  const GemmAccess access = linear_fprop_access(a);
  return {{a.w.data, a.w.row, a.w.col, access.a},
          {a.x.data, a.x.row, a.x.col, access.b},
          a.y,
          a.epilogue.bias,
          a.epilogue.act};
}
template <class T>
LinearGemm<T> linear_dgrad(const LinearArgs& a) {
  const GemmAccess access = linear_dgrad_access(a);
  return {{a.w.data, a.w.col, a.w.row, access.a}, {a.y.data, a.y.row, a.y.col, access.b}, a.x};
}
template <class T>
LinearGemm<T> linear_wgrad(const LinearArgs& a) {
  const GemmAccess access = linear_wgrad_access(a);
  return {{a.x.data, a.x.col, a.x.row, access.a}, {a.y.data, a.y.col, a.y.row, access.b}, a.w};
}

}  // namespace fastconv::cuda
