// SPDX-License-Identifier: MIT
// Linear as a GEMM on plain arithmetic units; the loop is tile_gemm.cuh's. GEMM M runs along the rows of what
// is written, so that stores are contiguous. In LinearArgs' letters (y[M, N] = x[M, K] w[N, K]^T):
//
//   fprop  M = N   N = M   K = K     A = w     B = x
//   dgrad  M = K   N = M   K = N     A = w^T   B = grad_y
//   wgrad  M = K   N = N   K = M     A = x^T   B = grad_y
//
// Takes every stride. Sums in float32 (float64 for float64). Limits: few rows leave most of a GPU idle.
// The floor is the FMA rate, or one read of the weights. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/bias_grad.h"
#include "cuda/tile_gemm.cuh"

namespace fastconv::cuda {

namespace {

template <class Element>
struct Linear {
  using Sum = typename Compute<Element>::type;

  struct Operand {
    using Line = int64_t;
    using Step = int64_t;

    const Element* data;
    int64_t line_stride, step_stride;
    bool along_k;

    Operand(const void* data, int64_t line_stride, int64_t step_stride)
        : data(static_cast<const Element*>(data)),
          line_stride(line_stride),
          step_stride(step_stride),
          along_k(step_stride == 1) {}

    FASTCONV_HD int64_t line(int, int i) const { return i * line_stride; }
    FASTCONV_HD int64_t step(int k) const { return k * step_stride; }
    FASTCONV_HD Sum load(int64_t line, int64_t step) const { return data[line + step]; }
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

}  // namespace

template <class Tile>
void linear_fprop_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Linear<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{
        {a.w.data, a.w.row, a.w.col}, {a.x.data, a.x.row, a.x.col}, a.y, a.epilogue.bias, a.epilogue.act};
    tile_gemm<Tile>(gemm, linear_fprop_gemm(a), workspace, stream);
  });
}

template <class Tile>
void linear_dgrad_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Linear<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{{a.w.data, a.w.col, a.w.row}, {a.y.data, a.y.row, a.y.col}, a.x};
    tile_gemm<Tile>(gemm, linear_dgrad_gemm(a), workspace, stream);
  });
}

template <class Tile>
void linear_wgrad_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Linear<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{{a.x.data, a.x.col, a.x.row}, {a.y.data, a.y.col, a.y.row}, a.w};
    tile_gemm<Tile>(gemm, linear_wgrad_gemm(a), workspace, stream);
  });
  linear_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                         \
  template void linear_fprop_tiled<Tile>(const LinearArgs&, void*, void*); \
  template void linear_dgrad_tiled<Tile>(const LinearArgs&, void*, void*); \
  template void linear_wgrad_tiled<Tile>(const LinearArgs&, void*, void*);
FASTCONV_INSTANTIATE(Tile64x64)
FASTCONV_INSTANTIATE(Tile64x16)
#undef FASTCONV_INSTANTIATE

}  // namespace fastconv::cuda
