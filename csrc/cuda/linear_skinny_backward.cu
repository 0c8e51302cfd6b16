// SPDX-License-Identifier: MIT
// Gradients of a linear layer of few rows, or few inputs and outputs.
//
//   C[i, j] = sum over r of A[i, r] B[r, j]                j: 32 lanes x 4 (float64: 2)
//                                                         +---------------------------+
//   dgrad  i = m  j = k  r = n  A = grad_y    B = w   i: 8 | a lane keeps 8 x 4 sums   |
//   wgrad  i = n  j = k  r = m  A = grad_y^T  B = x       +---------------------------+
//
// Warps of a block share out r and add their parts in order through shared memory. Of A each lane fetches one
// of 8 x 4 elements, shuffles hand them round, and the bias gradient sums them on the way, in double. Where
// y, the output of a ReLU, is not positive, A counts as zero. One launch can hold both gradients of a layer.
//
// Floor on an H200: one launch, about 3 us; both gradients of 64 x 784 x 512 take 1.8 us (FMAs). Predicted:
// 14 us. 96 registers, 41 KB of shared memory: two blocks a multiprocessor. Limits: few inputs leave few
// blocks. Not yet run on a GPU. Next: tensor cores for the 16-bit types.
#include "cuda/linear_outer.cuh"

namespace fastconv::cuda {

namespace {

// The blocks of one task, then those of another.
template <class Element>
__global__ void __launch_bounds__(kSkinnyWarps* kWarp, 2)
    linear_outer(const OuterTask first, const OuterTask second) {
  FC_SHARED(OuterScratch<Element>, scratch, [1]);
  const int block = blockIdx.x;
  if (block < first.blocks) {
    outer_tile<Element>(first, block, scratch[0]);
  } else {
    outer_tile<Element>(second, block - first.blocks, scratch[0]);
  }
}

void launch_outer(Dtype dtype, const OuterTask& first, const OuterTask& second, void* stream) {
  const int blocks = first.blocks + second.blocks;
  if (blocks == 0) return;
  const int threads = std::max(first.splits, second.splits) * kWarp;
  with_dtype(dtype, [&](auto* t) {
    launch(linear_outer<std::remove_pointer_t<decltype(t)>>, dim3(static_cast<unsigned>(blocks)),
           dim3(static_cast<unsigned>(threads)), 0, stream, first, second);
  });
}

}  // namespace

void linear_dgrad_skinny(const LinearArgs& a, void*, void* stream) {
  launch_outer(a.dtype, OuterTask(dgrad_outer(a), a.dtype, a.y, {}, a.x), {}, stream);
}

void linear_wgrad_skinny(const LinearArgs& a, void*, void* stream) {
  const Matrix grad_y{a.y.data, a.y.col, a.y.row};
  launch_outer(a.dtype, OuterTask(wgrad_outer(a), a.dtype, grad_y, {}, a.w, a.bias_grad), {}, stream);
}

void linear_act_backward_skinny(const LinearActBackwardArgs& a, void*, void* stream) {
  OuterTask first, second;
  if (a.grad_x.data) first = OuterTask::dgrad(a);
  if (a.grad_w.data) second = OuterTask::wgrad(a);
  launch_outer(a.linear.dtype, first, second, stream);
}

}  // namespace fastconv::cuda
