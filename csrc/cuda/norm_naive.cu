// SPDX-License-Identifier: MIT
// Batch-norm and ReLU from their definition, core/naive.h for each channel, one block each: its threads sum
// strided subsets, a tree adds them. Composed with max-pool's rows it takes every window.
//
// Limits: 64-bit index arithmetic; as many blocks as channels; if more than one is to share a multiprocessor,
// registers spill. The floor is one read of x and one write of y,
// backward of x, y and their gradients; it reads what the norm needs two and three times. Not yet run on a
// GPU.
#include <algorithm>

#include "core/naive.h"
#include "cuda/for_each.cuh"
#include "cuda/reduce.cuh"

namespace fastconv::cuda {

namespace {

// The threads of a block, for naive::norm_act.
struct Block {
  int64_t first = threadIdx.x, step = kReduceThreads;

  __device__ double sum(double value) const { return block_sum(value); }
};

template <class Element>
__global__ void __launch_bounds__(kReduceThreads, 1) norm_act_kernel(const NormArgs a) {
  for (int64_t c = blockIdx.x; c < a.C; c += gridDim.x) naive::norm_act<Element>(a, c, Block());
}

template <class Element>
__global__ void __launch_bounds__(kReduceThreads, 1) norm_act_backward_kernel(const NormBackwardArgs a) {
  for (int64_t c = blockIdx.x; c < a.norm.C; c += gridDim.x) naive::norm_act_backward<Element>(a, c, Block());
}

dim3 grid_of(const NormArgs& a) { return dim3(static_cast<unsigned>(std::min(a.C, kForEachMaxBlocks))); }

}  // namespace

void norm_act_pool_naive(const NormArgs& a, void*, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    launch(norm_act_kernel<std::remove_pointer_t<decltype(t)>>, grid_of(a), dim3(kReduceThreads), 0, stream,
           a);
  });
}

void norm_act_pool_backward_naive(const NormBackwardArgs& a, void*, void* stream) {
  with_dtype(a.norm.dtype, [&](auto* t) {
    launch(norm_act_backward_kernel<std::remove_pointer_t<decltype(t)>>, grid_of(a.norm),
           dim3(kReduceThreads), 0, stream, a);
  });
}

}  // namespace fastconv::cuda
