// SPDX-License-Identifier: MIT
// Depthwise 3x3 convolution of channels in vectors of four, where a thread owns outputs below each other in a
// column, filters are in shared memory, and the weight gradient's lanes are added through it; and dgrad of
// stride 2 along one axis, a block for each parity.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier_after_fill,
  no_barrier_before_refill,
  row_unguarded,
  column_unguarded,
  outputs_unguarded,
  pitch_unaligned,
  shares_wrong_row,
  filter_turned,
  no_barrier_before_lanes,
  lane_left_out,
  lanes_overlap,
  last_unit_unguarded,
  parities_swapped,
  parity_unwritten,
  even_tap_missing,
};

constexpr int kC = 8, kV = 4, kRows = 3, kTaps = 3, kH = 8, kW = 5, kThreads = 32, kImages = 2;
constexpr int kPatches = (kH + kRows - 1) / kRows, kElements = kH * kW * kC;

// x, y: [n][h][w][c]; filters: [c][r][s]. One block; padding 1.
template <Bug bug>
__global__ void __launch_bounds__(kThreads) fprop(const float* x, const float* filter, float* y) {
  constexpr int kPitch = bug == Bug::pitch_unaligned ? kC + 1 : kC + 4;
  FC_SHARED(float, filters, [kTaps * kTaps * kPitch]);
  const int vector = threadIdx.x % (kC / kV), unit = threadIdx.x / (kC / kV);
  for (int n = 0; n < kImages; ++n) {
    if (n > 0 && bug != Bug::no_barrier_before_refill) __syncthreads();
    for (int i = threadIdx.x; i < kC * kTaps * kTaps; i += kThreads) {
      const int r = i % 9 / 3, s = i % 3;
      filters[(bug == Bug::filter_turned ? r * 3 + s : s * 3 + r) * kPitch + i / 9] = filter[i];
    }
    if (bug != Bug::no_barrier_after_fill) __syncthreads();
    for (int i = unit; i < kPatches * kW; i += kThreads / (kC / kV)) {
      const int row = i / kW * kRows, col = i % kW;
      float sums[kRows][kV] = {};
      for (int s = 0; s < kTaps; ++s) {
        const int w = col + s - 1;
        if (w < 0 || (w >= kW && bug != Bug::column_unguarded)) continue;
        for (int j = 0; j < kRows + kTaps - 1; ++j) {
          const int h = row + j - 1;
          if (h < 0 || (h >= kH && bug != Bug::row_unguarded)) continue;
          const float4 read = ld<float4>(x + ((n * kH + h) * kW + w) * kC + vector * kV);
          for (int p = 0; p < kRows; ++p) {
            const int r = j - p - (bug == Bug::shares_wrong_row && p > 1);
            if (r < 0 || r >= kTaps) continue;
            const float4 weight = ld<float4>(filters + (s * 3 + r) * kPitch + vector * kV);
            sums[p][0] += read.x * weight.x, sums[p][1] += read.y * weight.y;
            sums[p][2] += read.z * weight.z, sums[p][3] += read.w * weight.w;
          }
        }
      }
      for (int p = 0; p < kRows; ++p)
        if (row + p < kH || bug == Bug::outputs_unguarded)
          st<float4>(y + ((n * kH + row + p) * kW + col) * kC + vector * kV,
                     make_float4(sums[p][0], sums[p][1], sums[p][2], sums[p][3]));
    }
  }
}

// The weight gradient of the filter's middle column, a block a channel; units are a column of an image.
constexpr int kUnits = kImages * kW;

template <Bug bug>
__global__ void __launch_bounds__(kThreads) wgrad(const float* x, const float* g, float* grad) {
  constexpr int kLanes = 4;
  FC_SHARED(float, parts, [kLanes * kTaps]);
  const int lane = threadIdx.x, c = blockIdx.x;
  float sums[kTaps] = {};
  const int units = bug == Bug::last_unit_unguarded ? kUnits + 1 : kUnits;
  if (lane < kLanes)
    for (int i = lane; i < units; i += bug == Bug::lanes_overlap ? kLanes - 1 : kLanes)
      for (int h = 0; h < kH; ++h)
        for (int p = h - 1; p <= h + 1; ++p)
          if (p >= 0 && p < kH)
            sums[h - p + 1] += x[(i / kW * kH * kW + h * kW + i % kW) * kC + c] *
                               g[(i / kW * kH * kW + p * kW + i % kW) * kC + c];
  if (lane < kLanes)
    for (int r = 0; r < kTaps; ++r) parts[lane * kTaps + r] = sums[r];
  if (bug != Bug::no_barrier_before_lanes) __syncthreads();
  for (int r = threadIdx.x; r < kTaps; r += kThreads) {
    float sum = 0;
    for (int each = bug == Bug::lane_left_out; each < kLanes; ++each) sum += parts[each * kTaps + r];
    grad[c * kTaps + r] = sum;
  }
}

// Along one axis, stride 2, padding 1: grad_x[w] = sum of grad_y[q] filter[w + 1 - 2 q]. Even w meet tap 1,
// odd ones taps 2 and 0.
constexpr int kLong = 13, kOut = 7;

template <Bug bug>
__global__ void __launch_bounds__(kThreads) dgrad(const float* g, const float* filter, float* grad_x) {
  const int parity = bug == Bug::parity_unwritten ? 0 : blockIdx.x % 2, w = 2 * threadIdx.x + parity;
  if (w >= kLong || (bug == Bug::parity_unwritten && blockIdx.x)) return;
  const int taps = 1 + (bug == Bug::parities_swapped ? 1 - parity : parity);
  float sum = 0;
  for (int t = 0; t < taps; ++t) {
    const int tap = taps == 1 ? 1 : 2 - 2 * t, q = (w + 1 - tap) / 2;
    if (bug == Bug::even_tap_missing && tap == 0) continue;
    if (q >= 0 && q < kOut) sum += g[q] * filter[tap];
  }
  grad_x[w] = sum;
}

template <Bug bug>
void run_fprop() {
  Global<float> x(kImages * kElements, "x", Access::input), filter(kC * 9, "filter", Access::input);
  Global<float> y(kImages * kElements, "y", Access::output);
  fill(x), fill(filter);
  launch(fprop<bug>, dim3(1), dim3(kThreads), 0, nullptr, static_cast<float*>(x), static_cast<float*>(filter),
         static_cast<float*>(y));
  finish();
  for (int i = 0; i < kImages * kElements; ++i) {
    const int c = i % kC, col = i / kC % kW, row = i / kC / kW % kH, n = i / kElements;
    double sum = 0;
    for (int tap = 0; tap < 9; ++tap) {
      const int h = row + tap / 3 - 1, w = col + tap % 3 - 1;
      if (h >= 0 && h < kH && w >= 0 && w < kW)
        sum += double(x[((n * kH + h) * kW + w) * kC + c]) * filter[c * 9 + tap];
    }
    expect_near(y[i], sum, 1e-4);
  }
}

template <Bug bug>
void run_wgrad() {
  Global<float> x(kImages * kElements, "x", Access::input), g(kImages * kElements, "g", Access::input);
  Global<float> grad(kC * kTaps, "grad", Access::output);
  fill(x), fill(g, 0.5f);
  launch(wgrad<bug>, dim3(kC), dim3(kThreads), 0, nullptr, static_cast<float*>(x), static_cast<float*>(g),
         static_cast<float*>(grad));
  finish();
  for (int i = 0; i < kC * kTaps; ++i) {
    double sum = 0;
    for (int at = i / kTaps; at < kImages * kElements; at += kC) {
      const int p = at / kC / kW % kH, h = p + i % kTaps - 1;
      if (h >= 0 && h < kH) sum += double(g[at]) * x[at + (h - p) * kW * kC];
    }
    expect_near(grad[i], sum, 1e-3);
  }
}

template <Bug bug>
void run_dgrad() {
  Global<float> g(kOut, "g", Access::input), filter(kTaps, "filter", Access::input);
  Global<float> grad_x(kLong, "grad_x", Access::output);
  fill(g), fill(filter);
  launch(dgrad<bug>, dim3(2), dim3(kThreads), 0, nullptr, static_cast<float*>(g), static_cast<float*>(filter),
         static_cast<float*>(grad_x));
  finish();
  for (int w = 0; w < kLong; ++w) {
    double sum = 0;
    for (int q = 0; q < kOut; ++q)
      if (const int tap = w + 1 - 2 * q; tap >= 0 && tap < kTaps) sum += double(g[q]) * filter[tap];
    expect_near(grad_x[w], sum, 1e-4);
  }
}

const Cases depthwise_cases{
    {"depthwise", nullptr, run_fprop<Bug::none>},
    {"depthwise: no barrier after the filters", "", run_fprop<Bug::no_barrier_after_fill>},
    {"depthwise: no barrier before the next filters", "", run_fprop<Bug::no_barrier_before_refill>},
    {"depthwise: rows beyond the last", "", run_fprop<Bug::row_unguarded>},
    {"depthwise: columns beyond the last", "", run_fprop<Bug::column_unguarded>},
    {"depthwise: outputs beyond the last", "", run_fprop<Bug::outputs_unguarded>},
    {"depthwise: filters that are not aligned", "", run_fprop<Bug::pitch_unaligned>},
    {"depthwise: an output takes its neighbour's tap", "", run_fprop<Bug::shares_wrong_row>},
    {"depthwise: filter on its side", "", run_fprop<Bug::filter_turned>},
    {"depthwise_wgrad", nullptr, run_wgrad<Bug::none>},
    {"depthwise_wgrad: no barrier before the lanes' sums", "", run_wgrad<Bug::no_barrier_before_lanes>},
    {"depthwise_wgrad: a lane is not added", "", run_wgrad<Bug::lane_left_out>},
    {"depthwise_wgrad: lanes share a unit", "", run_wgrad<Bug::lanes_overlap>},
    {"depthwise_wgrad: a unit beyond the last", "", run_wgrad<Bug::last_unit_unguarded>},
    {"depthwise_dgrad", nullptr, run_dgrad<Bug::none>},
    {"depthwise_dgrad: taps of the other parity", "", run_dgrad<Bug::parities_swapped>},
    {"depthwise_dgrad: a parity is not written", "", run_dgrad<Bug::parity_unwritten>},
    {"depthwise_dgrad: a tap is not added", "", run_dgrad<Bug::even_tap_missing>},
};

}  // namespace
}  // namespace fastconv::simt
