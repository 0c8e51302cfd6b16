// SPDX-License-Identifier: MIT
// Batch-norm of channels_last images in slices: sums of the distances from a channel's first value and of
// their squares, added over the lanes as a tree and over the slices in order; then the elements. One launch
// where there is one slice.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier_in_tree,
  tree_too_short,
  no_barrier_before_elements,
  lanes_overlap,
  units_unguarded,
  slice_left_out,
  one_partial_for_all_slices,
  shift_forgotten,
  shift_of_slice,
  not_divided,
};

constexpr int kC = 8, kThreads = 64, kLanes = kThreads / kC, kMostSlices = 4;

struct Task {
  const float* x;
  float* y;
  float *partial, *mean, *scale;  // [slices][2][channels]; [channels]
  int units, slice_units, slices;
};

template <Bug bug>
__device__ void finish_channel(const Task& t, int c, float sum, float squares) {
  const float count = static_cast<float>(t.units), distance = bug == Bug::not_divided ? sum : sum / count;
  t.mean[c] = distance + (bug == Bug::shift_forgotten ? 0 : t.x[c]);
  t.scale[c] = 1 / std::sqrt(squares / count - distance * distance + 1e-5f);
}

template <Bug bug>
__global__ void __launch_bounds__(kThreads) norm(const Task t, bool sums, bool elements) {
  FC_SHARED(float, parts, [2][kThreads]);
  const int thread = threadIdx.x, c = thread % kC, lane = thread / kC, slice = blockIdx.x;
  const int begin = slice * t.slice_units, last = begin + t.slice_units;
  const int end = last < t.units || bug == Bug::units_unguarded ? last : t.units;
  if (sums) {
    const float shift = t.x[(bug == Bug::shift_of_slice ? begin : 0) * kC + c];
    float sum = 0, squares = 0;
    for (int i = begin + lane; i < end; i += bug == Bug::lanes_overlap ? kLanes - 1 : kLanes) {
      const float distance = t.x[i * kC + c] - shift;
      sum += distance, squares += distance * distance;
    }
    parts[0][thread] = sum, parts[1][thread] = squares;
    for (int half = kThreads / 2; half >= (bug == Bug::tree_too_short ? 2 * kC : kC); half /= 2) {
      if (bug != Bug::no_barrier_in_tree) __syncthreads();
      if (thread < half)
        for (int i = 0; i < 2; ++i) parts[i][thread] += parts[i][thread + half];
    }
    if (lane == 0 && t.slices == 1) finish_channel<bug>(t, c, parts[0][c], parts[1][c]);
    if (lane == 0 && t.slices > 1) {
      float* partial = t.partial + (bug == Bug::one_partial_for_all_slices ? 0 : slice * 2 * kC);
      partial[c] = parts[0][c], partial[kC + c] = parts[1][c];
    }
    if (bug != Bug::no_barrier_before_elements) __syncthreads();
  }
  if (!elements) return;
  for (int i = begin + lane; i < end; i += kLanes)
    t.y[i * kC + c] = (t.x[i * kC + c] - t.mean[c]) * t.scale[c];
}

template <Bug bug>
__global__ void add_slices(const Task t) {
  float sum = 0, squares = 0;
  for (int slice = 0; slice < t.slices - (bug == Bug::slice_left_out); ++slice) {
    sum += t.partial[slice * 2 * kC + threadIdx.x];
    squares += t.partial[(slice * 2 + 1) * kC + threadIdx.x];
  }
  finish_channel<bug>(t, threadIdx.x, sum, squares);
}

template <Bug bug>
void run() {
  for (const int slices : {1, kMostSlices}) {
    const int units = 37;
    Global<float> x(units * kC, "x", Access::input), y(units * kC, "y", Access::output);
    Global<float> partial(kMostSlices * 2 * kC, "partial", Access::scratch),
        mean(kC, "mean", Access::scratch);
    Global<float> scale(kC, "scale", Access::scratch);
    fill(x);
    const Task t{x, y, partial, mean, scale, units, (units + slices - 1) / slices, slices};
    launch(norm<bug>, dim3(slices), dim3(kThreads), 0, nullptr, t, true, slices == 1);
    if (slices > 1) {
      launch(add_slices<bug>, dim3(1), dim3(kC), 0, nullptr, t);
      launch(norm<bug>, dim3(slices), dim3(kThreads), 0, nullptr, t, false, true);
    }
    finish();
    for (int c = 0; c < kC; ++c) {
      double sum = 0, squares = 0;
      for (int i = 0; i < units; ++i) sum += x[i * kC + c];
      for (int i = 0; i < units; ++i) squares += std::pow(x[i * kC + c] - sum / units, 2);
      for (int i = 0; i < units; ++i)
        expect_near(y[i * kC + c], (x[i * kC + c] - sum / units) / std::sqrt(squares / units + 1e-5), 1e-4);
    }
  }
}

const Cases norm_slices_cases{
    {"norm_slices", nullptr, run<Bug::none>},
    {"norm_slices: no barrier in the tree", "", run<Bug::no_barrier_in_tree>},
    {"norm_slices: the tree ends too soon", "", run<Bug::tree_too_short>},
    {"norm_slices: no barrier before the elements", "", run<Bug::no_barrier_before_elements>},
    {"norm_slices: lanes share a unit", "", run<Bug::lanes_overlap>},
    {"norm_slices: units beyond the last", "", run<Bug::units_unguarded>},
    {"norm_slices: a slice is not added", "", run<Bug::slice_left_out>},
    {"norm_slices: all slices write one partial sum", "", run<Bug::one_partial_for_all_slices>},
    {"norm_slices: mean without its shift", "", run<Bug::shift_forgotten>},
    {"norm_slices: each slice has its own shift", "", run<Bug::shift_of_slice>},
    {"norm_slices: a sum for a mean", "", run<Bug::not_divided>},
};

}  // namespace
}  // namespace fastconv::simt
