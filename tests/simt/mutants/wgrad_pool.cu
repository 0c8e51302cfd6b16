// SPDX-License-Identifier: MIT
// Weight gradient of a 3x3 convolution of one channel to two, behind which stand a ReLU and a 2x2 max-pool.
// A block adds up the images of its slice: each pooled gradient goes to its cell in a tile of zeros; a thread
// sums over one row for one output channel. Then the rows' sums are added through shared memory, and the
// slices' by a second kernel.
#include <algorithm>

#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier_before_refill,
  no_barrier_before_scatter,
  no_barrier_before_sums,
  no_barrier_before_scratch,
  no_barrier_after_scratch,
  zeros_once,
  no_gate,
  transposed_cell,
  unguarded_slice,
  scratch_overrun,
  sums_cleared,
  slice_left_out,
};

constexpr int kK = 2, kR = 3, kP = 8, kH = kP + kR - 1, kPooled = kP / 2;
constexpr int kPitch = 12, kTaps = kR * kR, kThreads = kK * kP, kSlices = 3;

template <Bug bug>
__global__ void __launch_bounds__(kThreads) sum_images(const float* x, const float* y, const float* grad_y,
                                                       const uint8_t* offsets, float* partial, int images) {
  FC_SHARED(float, x_tile, [kH][kPitch]);
  FC_SHARED(float, g_tile, [kK * kP * kPitch]);
  const int thread = threadIdx.x, k = thread / kP, row = thread % kP, slice = blockIdx.x;

  float sums[kTaps] = {};
  for (int n = slice; n < (bug == Bug::unguarded_slice ? images + 1 : images); n += kSlices) {
    const bool is_first = n == slice;
    if (!is_first && bug != Bug::no_barrier_before_refill) __syncthreads();
    for (int i = thread; i < kH * kH; i += kThreads) x_tile[i / kH][i % kH] = x[n * kH * kH + i];
    if (is_first || bug != Bug::zeros_once)
      for (int i = thread; i < kK * kP * kPitch; i += kThreads) g_tile[i] = 0;
    if (bug != Bug::no_barrier_before_scatter) __syncthreads();
    for (int i = thread; i < kK * kPooled * kPooled; i += kThreads) {
      const int at = n * kK * kPooled * kPooled + i, cell = offsets[at];
      if (y[at] <= 0 && bug != Bug::no_gate) continue;
      const int p = 2 * (i / kPooled) + (bug == Bug::transposed_cell ? cell % 2 : cell / 2);
      const int q = 2 * (i % kPooled) + (bug == Bug::transposed_cell ? cell / 2 : cell % 2);
      g_tile[p * kPitch + q] = grad_y[at];
    }
    if (bug != Bug::no_barrier_before_sums) __syncthreads();
    if (bug == Bug::sums_cleared)
      for (float& sum : sums) sum = 0;
    for (int q = 0; q < kP; q += 4) {
      const float4 g = ld<float4>(g_tile + (k * kP + row) * kPitch + q);
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* v = &x_tile[row + tap / kR][q + tap % kR];
        sums[tap] += v[0] * g.x + v[1] * g.y + v[2] * g.z + v[3] * g.w;
      }
    }
  }

  if (bug != Bug::no_barrier_before_scratch) __syncthreads();
  const int pitch = bug == Bug::scratch_overrun ? kPitch + 1 : kTaps;
  for (int tap = 0; tap < kTaps; ++tap) g_tile[thread * pitch + tap] = sums[tap];
  if (bug != Bug::no_barrier_after_scratch) __syncthreads();
  for (int i = thread; i < kK * kTaps; i += kThreads) {
    float sum = 0;
    for (int p = 0; p < kP; ++p) sum += g_tile[(i / kTaps * kP + p) * pitch + i % kTaps];
    partial[slice * kK * kTaps + i] = sum;
  }
}

template <Bug bug>
__global__ void add_slices(const float* partial, float* grad) {
  float sum = 0;
  for (int slice = 0; slice < kSlices - (bug == Bug::slice_left_out); ++slice)
    sum += partial[slice * kK * kTaps + threadIdx.x];
  grad[threadIdx.x] = sum;
}

template <Bug bug>
void run() {
  constexpr int kImages = 5, kCells = kK * kPooled * kPooled;
  Global<float> x(kImages * kH * kH, "x", Access::input), y(kImages * kCells, "y", Access::input);
  Global<float> grad_y(kImages * kCells, "grad_y", Access::input);
  Global<uint8_t> offsets(kImages * kCells, "offsets", Access::input);
  Global<float> partial(kSlices * kK * kTaps, "workspace", Access::scratch);
  Global<float> grad(kK * kTaps, "grad", Access::output);
  fill(x), fill(y), fill(grad_y);
  std::rotate(y.values.begin(), y.values.begin() + 7, y.values.end());
  for (int i = 0; i < kImages * kCells; ++i) offsets.values[i] = static_cast<uint8_t>(i * 7 / 3 % 4);
  launch(sum_images<bug>, dim3(kSlices), dim3(kThreads), 0, nullptr, static_cast<float*>(x),
         static_cast<float*>(y), static_cast<float*>(grad_y), static_cast<uint8_t*>(offsets),
         static_cast<float*>(partial), kImages);
  launch(add_slices<bug>, dim3(1), dim3(kK * kTaps), 0, nullptr, static_cast<float*>(partial),
         static_cast<float*>(grad));
  finish();
  for (int i = 0; i < kK * kTaps; ++i) {
    double sum = 0;
    for (int at = 0; at < kImages * kCells; ++at) {
      if (y[at] <= 0 || at % kCells / (kPooled * kPooled) != i / kTaps) continue;
      const int h = 2 * (at / kPooled % kPooled) + offsets[at] / 2 + i % kTaps / kR;
      const int w = 2 * (at % kPooled) + offsets[at] % 2 + i % kR;
      sum += static_cast<double>(grad_y[at]) * x[at / kCells * kH * kH + h * kH + w];
    }
    expect_near(grad[i], sum, 1e-4);
  }
}

const Cases wgrad_pool_cases{
    {"wgrad pool", nullptr, run<Bug::none>},
    {"wgrad pool: no barrier before the next image", "", run<Bug::no_barrier_before_refill>},
    {"wgrad pool: no barrier between zeros and gradients", "", run<Bug::no_barrier_before_scatter>},
    {"wgrad pool: no barrier before the sums", "", run<Bug::no_barrier_before_sums>},
    {"wgrad pool: scratch over a tile still in use", "", run<Bug::no_barrier_before_scratch>},
    {"wgrad pool: no barrier before the rows are added", "", run<Bug::no_barrier_after_scratch>},
    {"wgrad pool: zeros for the first image only", "", run<Bug::zeros_once>},
    {"wgrad pool: no gate", "", run<Bug::no_gate>},
    {"wgrad pool: row and column of the cell swapped", "", run<Bug::transposed_cell>},
    {"wgrad pool: an image too many", "", run<Bug::unguarded_slice>},
    {"wgrad pool: scratch larger than the tile", "", run<Bug::scratch_overrun>},
    {"wgrad pool: sums cleared for each image", "", run<Bug::sums_cleared>},
    {"wgrad pool: last slice left out", "", run<Bug::slice_left_out>},
};

}  // namespace
}  // namespace fastconv::simt
