// SPDX-License-Identifier: MIT
// Gradient of a bias: bias_grad[k] = sum of y[n, k, z, p, q] over n, z, p, q, kept in double, for convolution
// and linear alike.
//
// First kernel: one block for each channel and slice of the rows (n, z, p, q); its threads sum strided
// subsets, a tree adds them. Second kernel: one thread a channel adds the slices in order. No atomics.
//
// Limits: reads along the rows, so a channels_last tensor is read in parts, once for every channel.
// The floor is one read of y. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/bias_grad.h"
#include "cuda/for_each.cuh"
#include "cuda/reduce.cuh"

namespace fastconv::cuda {

namespace {

struct BiasGrad {
  View y;
  int64_t N, K;
  Extent3 out;
  int64_t slices;
  double* partial;  // [slices, K]
  void* bias_grad;  // [K]
};

template <class Element>
__global__ void __launch_bounds__(kReduceThreads) sum_rows(const BiasGrad a) {
  const int64_t rows = a.N * a.out.cells(), slice_rows = ceil_div(rows, a.slices);
  for (int64_t task = blockIdx.x; task < a.slices * a.K; task += gridDim.x) {
    const int64_t k = task % a.K, begin = task / a.K * slice_rows;
    const int64_t end = begin + slice_rows < rows ? begin + slice_rows : rows;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kReduceThreads) {
      const naive::Index5 o = naive::unflatten(i, 1, a.out.d, a.out.h, a.out.w);
      sum += naive::load(naive::at<Element>(a.y, o.n, k, o.d, o.h, o.w));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) a.partial[task] = sum;
  }
}

template <class Element>
FASTCONV_HD void sum_slices(const BiasGrad& a, int64_t k) {
  double sum = 0;
  for (int64_t slice = 0; slice < a.slices; ++slice) sum += a.partial[slice * a.K + k];
  static_cast<Element*>(a.bias_grad)[k] = narrow<Element>(sum);
}

void bias_grad(Dtype dtype, const View& y, int64_t N, int64_t K, const Extent3& out, void* bias_grad,
               void* workspace, void* stream) {
  if (!bias_grad || K == 0) return;
  const int64_t slices = bias_grad_slices(N * out.cells());
  const BiasGrad a{y, N, K, out, slices, static_cast<double*>(workspace), bias_grad};
  const dim3 grid(static_cast<unsigned>(std::min(slices * K, kForEachMaxBlocks)));
  with_dtype(dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    launch(sum_rows<Element>, grid, dim3(kReduceThreads), 0, stream, a);
    for_each<BiasGrad, sum_slices<Element>>(a, K, stream);
  });
}

}  // namespace

void conv_bias_grad(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  bias_grad(a.dtype, a.y, s.N, s.K, {s.Z, s.P, s.Q}, a.bias_grad, workspace, stream);
}

void linear_bias_grad(const LinearArgs& a, void* workspace, void* stream) {
  const View y{a.y.data, a.y.row, a.y.col, 0, 0, 0};
  bias_grad(a.dtype, y, a.M, a.N, {1, 1, 1}, a.bias_grad, workspace, stream);
}

}  // namespace fastconv::cuda
