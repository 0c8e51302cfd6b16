// SPDX-License-Identifier: MIT
// Direct convolution for few channels, stride 1, filters 3x3 and 5x5: fprop with bias, ReLU and a 2x2/2
// or 3x3/2 max-pool, and dgrad, which is the same with the filter turned around (conv_direct.cuh has the
// block).
//
//   tile of x, with halo      A block holds a tile of x (rows of several images, some or all channels, padded
//   +--------------------+    by zeros) and one of the filter, [taps][8 channels], in shared memory. A thread
//   | p p p p  .  .      |    sums a patch (p) of 2x4 pixels by 6 channels, or of 2x2 by 8, in registers: for
//   | p p p p            |    each channel and row of the filter it loads the two rows of its patch once, and
//   |  .     .     .     |    each weight once, which all its pixels share.
//   +--------------------+
//
// A 2x2 pool's window lies in one patch, so the output before the pool is never stored. A 3x3 pool's meets up
// to four: their values go through shared memory, where the tile was, and neighbouring blocks both compute
// the two rows and columns that their windows meet. 16-bit elements become float32 in the tile. The plan
// (conv_direct.h) weighs how threads, blocks and shared memory are filled.
//
// LeNet in float32 on an H200 (67 TFLOP/s, 4.8 TB/s), microseconds without launch; predicted is the plan's
// count of instructions at four a cycle, 1.7 GHz and the occupancy of its blocks:
//                                 MFLOP    KB   floor at 256, 8192      predicted
//     conv1, ReLU, pool (28x28)    0.24   9.0       0.9    29          2.9     68
//     conv2, ReLU, pool (14x14)    0.48   6.7       1.8    59          5.0     95
//     dgrad of conv2 (with zeros)  0.94   6.3       3.6   115          9.0    226
// 3 to 16 channels of 32x32 by 5x5 and a 3x3/2 pool, 64 images: 9.6 predicted, 5.6 with a 2x2 pool, 11 stage
// by stage with a second launch. Shared memory moves half of the bytes that it can. Up to 128 registers and
// 40 KB a block of at most 256 threads: 16 warps a multiprocessor. Where a small batch has too few patches,
// up to four threads share one, each with its channels. Not yet run on a GPU. Next: fills behind the sums
// (cp.async); 16-bit conversions in hardware; tensor cores for 16 bits.
#include "cuda/conv_direct.cuh"

namespace fastconv::cuda {

namespace {

template <class T, int F, class Patch>
__global__ void __launch_bounds__(kDirectThreads, 2) conv_direct_kernel(const DirectTask t) {
  FC_DYN_SMEM(shared);
  float* tile = shared.take<float>(t.tile_floats);
  float* filter = shared.take<float>(t.filter_floats);
  convolve_block<T, F, Patch, true>(t, blockIdx.x, tile, filter);
}

template <class Patch>
void launch_patch(const ConvArgs& a, const DirectTask& t, void* stream) {
  with_dtype_and_filter(a, [&](auto* element, auto extent) {
    using T = std::remove_pointer_t<decltype(element)>;
    launch(conv_direct_kernel<T, extent(), Patch>, dim3(static_cast<unsigned>(t.blocks)),
           dim3(static_cast<unsigned>(t.threads)), t.shared_bytes(), stream, t);
  });
}

}  // namespace

void launch_direct(const ConvArgs& a, const DirectTask& t, bool wide, void* stream) {
  if (t.blocks == 0) return;
  if (wide) return launch_patch<DirectPatch4x6>(a, t, stream);
  launch_patch<DirectPatch2x8>(a, t, stream);
}

void conv_act_pool_direct(const ConvArgs& a, void*, void* stream) {
  const ConvShape& s = a.shape;
  const DirectShape shape = direct_fprop(a);
  const DirectPlan plan = plan_direct(shape);
  DirectTask t(shape, plan, DirectSource(a.x, s.H, s.W, a.dtype), a.dtype, a.y, a.epilogue);
  t.filter = {a.w.data,
              static_cast<int>(s.group_k() * a.w.n),
              static_cast<int>(a.w.n),
              static_cast<int>(a.w.c),
              static_cast<int>(a.w.h),
              static_cast<int>(a.w.w)};
  t.pad_h = static_cast<int>(s.padding.h), t.pad_w = static_cast<int>(s.padding.w);
  if (t.overlaps) t.p = static_cast<int>(s.P), t.q = static_cast<int>(s.Q);
  launch_direct(a, t, plan.wide, stream);
}

void conv_fprop_direct(const ConvArgs& a, void* workspace, void* stream) {
  conv_act_pool_direct(a, workspace, stream);
}

void conv_dgrad_direct(const ConvArgs& a, void*, void* stream) {
  const DirectPlan plan = plan_direct(direct_dgrad(a.shape));
  const DirectSource grad_y(a.y, a.shape.P, a.shape.Q, a.dtype);
  launch_direct(a, direct_dgrad_task(a, plan, grad_y, a.x), plan.wide, stream);
}

}  // namespace fastconv::cuda
