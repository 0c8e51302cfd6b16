// SPDX-License-Identifier: MIT
// Bias gradient of 16 channels_last channels in two stages: each block sums a slice of the rows into
// workspace, then one block adds the slices in order.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  shuffle_from_absent_lanes,
  shuffle_too_narrow,
  no_barrier_between_warps,
  one_partial_for_all_blocks,
  unguarded_rows,
  slice_not_summed,
  slice_never_written,
  add_to_output,
  lane_out_of_mask,
};

constexpr int kK = 16, kThreads = 128, kSlices = 4;

template <Bug bug>
__global__ void __launch_bounds__(kThreads) sum_rows(const float* gy, float* partial, int rows) {
  FC_SHARED(float, of_warp, [kThreads / 32][kK]);
  const int thread = threadIdx.x, lane = thread % 32, k = thread % kK;
  float sum = 0;
  const int last = bug == Bug::unguarded_rows ? rows + kThreads / kK : rows;
  for (int m = blockIdx.x * (kThreads / kK) + thread / kK; m < last; m += kSlices * (kThreads / kK))
    sum += gy[m * kK + k];
  if (bug == Bug::shuffle_from_absent_lanes) {
    if (lane < 16) sum += __shfl_down_sync(0x0000ffffu, sum, 16);
  } else {
    sum += __shfl_down_sync(bug == Bug::lane_out_of_mask ? 0x7fffffffu : ~0u, sum, 16,
                            bug == Bug::shuffle_too_narrow ? 16 : 32);
  }
  if (lane < 16) of_warp[thread / 32][k] = sum;
  if (bug != Bug::no_barrier_between_warps) __syncthreads();
  if (thread >= kK) return;
  float total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += of_warp[i][thread];
  if (bug == Bug::slice_never_written && blockIdx.x == kSlices - 1) return;
  partial[(bug == Bug::one_partial_for_all_blocks ? 0 : blockIdx.x * kK) + thread] = total;
}

template <Bug bug>
__global__ void sum_slices(const float* partial, float* grad) {
  float sum = bug == Bug::add_to_output ? grad[threadIdx.x] : 0;
  for (int i = 0; i < kSlices - (bug == Bug::slice_not_summed); ++i) sum += partial[i * kK + threadIdx.x];
  grad[threadIdx.x] = sum;
}

template <Bug bug>
void run() {
  for (const int rows : {800, 13}) {
    Global<float> gy(rows * kK, "gy", Access::input), partial(kSlices * kK, "workspace", Access::scratch);
    Global<float> grad(kK, "grad", Access::output);
    fill(gy);
    launch(sum_rows<bug>, dim3(kSlices), dim3(kThreads), 0, nullptr, static_cast<float*>(gy),
           static_cast<float*>(partial), rows);
    launch(sum_slices<bug>, dim3(1), dim3(kK), 0, nullptr, static_cast<float*>(partial),
           static_cast<float*>(grad));
    finish();
    for (int k = 0; k < kK; ++k) {
      double sum = 0;
      for (int m = 0; m < rows; ++m) sum += gy[m * kK + k];
      expect_near(grad[k], sum, 1e-4);
    }
  }
}

const Cases bias_grad_cases{
    {"bias_grad", nullptr, run<Bug::none>},
    {"bias_grad: shuffle from lanes that take no part", "", run<Bug::shuffle_from_absent_lanes>},
    {"bias_grad: shuffle within half a warp", "", run<Bug::shuffle_too_narrow>},
    {"bias_grad: a lane that its mask leaves out", "", run<Bug::lane_out_of_mask>},
    {"bias_grad: no barrier between the warps", "", run<Bug::no_barrier_between_warps>},
    {"bias_grad: all blocks write one partial sum", "", run<Bug::one_partial_for_all_blocks>},
    {"bias_grad: rows beyond the last", "", run<Bug::unguarded_rows>},
    {"bias_grad: a slice that is not summed", "", run<Bug::slice_not_summed>},
    {"bias_grad: a slice that is never written", "", run<Bug::slice_never_written>},
    {"bias_grad: adds to its output", "", run<Bug::add_to_output>},
};

}  // namespace
}  // namespace fastconv::simt
