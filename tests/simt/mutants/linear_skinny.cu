// SPDX-License-Identifier: MIT
// y[m, n] = sum over k of x[m, k] w[n, k]: two warps share out K in vectors, shuffles leave one of 2 x 4 sums
// in each lane, and the first warp adds the second's.
#include "mutants.h"

#include "cuda/reduce.cuh"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier,
  other_warp_not_added,
  lanes_overlap,
  tail_unguarded,
  row_unclamped,
  halves_swapped,
  every_lane_writes,
};

constexpr int kM = 2, kN = 4, kOutputs = kM * kN, kWarps = 2, kLanes = 32 / kOutputs;

template <Bug bug>
__global__ void __launch_bounds__(kWarps * 32) dot(const float* x, const float* w, float* y, int M, int K) {
  FC_SHARED(float, partial, [kWarps][kOutputs]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sums[kOutputs] = {};
  const int step = (bug == Bug::lanes_overlap ? 1 : kWarps) * 32 * 4;
  const int end = bug == Bug::tail_unguarded ? (K + step - 1) / step * step : K;
  for (int k = (warp * 32 + lane) * 4; k < end; k += step) {
    for (int i = 0; i < kM; ++i) {
      const int m = bug == Bug::row_unclamped || i < M ? i : M - 1;
      const float4 a = ld<float4>(x + m * K + k);
      for (int j = 0; j < kN; ++j) {
        const float4 b = ld<float4>(w + j * K + k);
        sums[i * kN + j] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
  }
  const float sum = cuda::warp_sums(sums, bug == Bug::halves_swapped ? lane ^ 16 : lane);
  const int output = lane / kLanes;
  if (bug == Bug::every_lane_writes || lane % kLanes == 0) partial[warp][output] = sum;
  if (bug != Bug::no_barrier) __syncthreads();
  if (warp != 0 || lane % kLanes != 0 || output / kN >= M) return;
  y[output] = sum + (bug == Bug::other_warp_not_added ? 0 : partial[1][output]);
}

template <Bug bug>
void run() {
  for (const auto& [M, K] : {std::pair{2, 516}, std::pair{1, 84}}) {
    Global<float> x(M * K, "x", Access::input), w(kN * K, "w", Access::input), y(M * kN, "y", Access::output);
    fill(x), fill(w);
    launch(dot<bug>, dim3(1), dim3(kWarps * 32), 0, nullptr, static_cast<float*>(x), static_cast<float*>(w),
           static_cast<float*>(y), M, K);
    finish();
    for (int i = 0; i < M * kN; ++i) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += double(x[i / kN * K + k]) * w[i % kN * K + k];
      expect_near(y[i], sum, 1e-4);
    }
  }
}

const Cases linear_skinny_cases{
    {"linear_skinny", nullptr, run<Bug::none>},
    {"linear_skinny: no barrier between the warps", "", run<Bug::no_barrier>},
    {"linear_skinny: the other warp's part is not added", "", run<Bug::other_warp_not_added>},
    {"linear_skinny: warps sum the same part of K", "", run<Bug::lanes_overlap>},
    {"linear_skinny: K beyond its end", "", run<Bug::tail_unguarded>},
    {"linear_skinny: a row beyond the last", "", run<Bug::row_unclamped>},
    {"linear_skinny: lanes keep the other half", "", run<Bug::halves_swapped>},
    {"linear_skinny: every lane writes the sum", "", run<Bug::every_lane_writes>},
};

}  // namespace
}  // namespace fastconv::simt
