// SPDX-License-Identifier: MIT
// wgrad for few input channels, stride 1, filters 3x3 and 5x5, with the bias gradient; alone, or fused:
// behind a ReLU and a 2x2/2 or 3x3/2 max-pool, and with dgrad (conv_direct.cuh's block) in the same launch.
//
//   gradient tile     x tile, with halo    A block holds rows of some images in shared memory, and a thread
//     +-----------+   +--------------+     all taps of one input channel and 3 (5x5) or 8 (3x3) output
//   k | g g g g . | c | x x x x x .. |     channels in registers. It walks along its rows, four columns at a
//     +-----------+   +--------------+     time: a vector of g for each output channel, two of x for each
//        row + r: the rows of x under g    row of the filter.
//
// A gradient behind a 2x2 pool goes to the cell that its offset names, in a tile of zeros; behind a 3x3 pool
// an element of the tile looks at the up to four windows that it is in. The gradient at the convolution's
// output is never stored. The threads' sums are added by rows, then over the lanes through shared memory, to
// one partial sum a block; a second kernel adds the blocks' in order. No atomics.
//
// LeNet in float32 on an H200, microseconds without launches, as in conv_direct.cu:
//                          MFLOP    KB   floor at 256, 8192     predicted
//     conv1, ReLU, pool     0.24    14       0.9    29         3.6     76
//     conv2, ReLU, pool     0.48   8.7       1.8    59         4.8    127
// Where it loses: 18 of 16 channels, 12 of 10 columns (conv2), 56 of 64 threads (conv1). At most 168
// registers and 40 KB a block of at most 192 threads: 12 warps a multiprocessor, each with 75 sums under way.
// Not yet run on a GPU. Next: a pool's gradients in vectors, two cells a thread; tensor cores for 16 bits.
#include "cuda/conv_direct_wgrad.cuh"

namespace fastconv::cuda {

namespace {

struct BackwardTask {
  WgradTask wgrad;
  DirectTask dgrad;
  int blocks = 0, threads = 0;
  int first_floats = 0, second_floats = 0;  // of shared memory: the tile of x, that of the gradient; or
                                            // the tile of the gradient, the filter
  // `d` may have no blocks.
  BackwardTask(const WgradTask& w, const DirectTask& d) : wgrad(w), dgrad(d) {
    grow(w.blocks, w.threads, w.x_tile.floats, w.g_floats);
    if (d.blocks) grow(d.blocks, d.threads, d.tile_floats, d.filter_floats);
  }

  void grow(int more_blocks, int least_threads, int first, int second) {
    blocks += more_blocks;
    threads = std::max(threads, least_threads);
    first_floats = std::max(first_floats, first), second_floats = std::max(second_floats, second);
  }
};

// wgrad and dgrad side by side: neither needs the other. The first blocks are wgrad's.
template <class T, int F>
__global__ void __launch_bounds__(kBackwardThreads, 2) conv_backward_direct_kernel(const BackwardTask t) {
  FC_DYN_SMEM(shared);
  float* first = shared.take<float>(t.first_floats);
  float* second = shared.take<float>(t.second_floats);
  const int block = blockIdx.x;
  if (block < t.wgrad.blocks)
    wgrad_block<T, F, true>(t.wgrad, block, first, second);
  else
    convolve_block<T, F, DirectPatch2x8, false>(t.dgrad, block - t.wgrad.blocks, first, second);
}

// Writes those of grad_x and grad_w that have data; reads a.x and a.w.
void conv_backward(const ConvArgs& a, const DirectSource& g, const View& grad_x, const View& grad_w,
                   void* grad_b, void* workspace, void* stream) {
  const DirectShape wgrad_shape = direct_wgrad(a.shape), dgrad_shape = direct_dgrad(a.shape);
  const bool joins = grad_x.data && grad_w.data && dgrad_joins_wgrad(dgrad_shape);
  if (grad_x.data && !joins) {
    const DirectPlan plan = plan_direct(dgrad_shape);
    launch_direct(a, direct_dgrad_task(a, plan, g, grad_x), plan.wide, stream);
  }
  if (!grad_w.data) return;
  const WgradTask wgrad(wgrad_shape, plan_wgrad(wgrad_shape), a, g, grad_b != nullptr, workspace);
  DirectTask dgrad = direct_dgrad_task(a, joins ? plan_joined_dgrad(dgrad_shape) : DirectPlan(), g, grad_x);
  if (!joins) dgrad.blocks = 0;
  const BackwardTask t(wgrad, dgrad);
  with_dtype_and_filter(a, [&](auto* element, auto extent) {
    using T = std::remove_pointer_t<decltype(element)>;
    const size_t bytes = smem_take<float>(smem_take<float>(0, static_cast<size_t>(t.first_floats)),
                                          static_cast<size_t>(t.second_floats));
    launch(conv_backward_direct_kernel<T, extent()>, dim3(static_cast<unsigned>(t.blocks)),
           dim3(static_cast<unsigned>(t.threads)), bytes, stream, t);
    add_slices<T>(wgrad.slice_sums(extent(), grad_w, grad_b), stream);
  });
}

}  // namespace

void conv_wgrad_direct(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  conv_backward(a, DirectSource(a.y, s.P, s.Q, a.dtype), View{}, a.w, a.bias_grad, workspace, stream);
}

void conv_act_pool_backward_direct(const ConvActPoolBackwardArgs& a, void* workspace, void* stream) {
  conv_backward(a.conv, DirectSource::gradient(a), a.grad_x, a.grad_w, a.grad_b, workspace, stream);
}

}  // namespace fastconv::cuda
