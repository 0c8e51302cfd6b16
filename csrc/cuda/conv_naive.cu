// SPDX-License-Identifier: MIT
// Convolution from its definition, core/naive.h for each element. The last row of the convolution tables and
// the oracle of all others: every shape, stride, layout and dtype, sums in double.
//
// fprop, dgrad: one thread an output element. wgrad: one block a filter element; its threads sum strided
// subsets of the batch * Z * P * Q terms, a tree adds them. No atomics.
//
// Limits: 64-bit index arithmetic and double sums make it slow. Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/bias_grad.h"
#include "cuda/for_each.cuh"
#include "cuda/reduce.cuh"

namespace fastconv::cuda {

namespace {

template <class Element>
__global__ void __launch_bounds__(kReduceThreads) wgrad(const ConvArgs a) {
  const ConvShape& s = a.shape;
  const int64_t terms = s.N * s.out_cells(), weights = s.K * s.group_c() * s.taps();
  for (int64_t weight = blockIdx.x; weight < weights; weight += gridDim.x) {
    const naive::Index5 f = naive::unflatten(weight, s.group_c(), s.T, s.R, s.S);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < terms; i += kReduceThreads)
      sum += naive::conv_wgrad_term<Element>(a, f, i);
    sum = block_sum(sum);
    if (threadIdx.x == 0) naive::at_mut<Element>(a.w, f.n, f.c, f.d, f.h, f.w) = narrow<Element>(sum);
  }
}

}  // namespace

void conv_fprop_naive(const ConvArgs& a, void*, void* stream) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<ConvArgs, naive::conv_fprop<Element>>(a, s.N * s.K * s.out_cells(), stream);
  });
}

void conv_dgrad_naive(const ConvArgs& a, void*, void* stream) {
  const ConvShape& s = a.shape;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    for_each<ConvArgs, naive::conv_dgrad<Element>>(a, s.N * s.C * s.in_cells(), stream);
  });
}

void conv_wgrad_naive(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  const int64_t blocks = std::min(s.K * s.group_c() * s.taps(), kForEachMaxBlocks);
  if (blocks > 0)
    with_dtype(a.dtype, [&](auto* t) {
      launch(wgrad<std::remove_pointer_t<decltype(t)>>, dim3(static_cast<unsigned>(blocks)),
             dim3(kReduceThreads), 0, stream, a);
    });
  conv_bias_grad(a, workspace, stream);
}

}  // namespace fastconv::cuda
