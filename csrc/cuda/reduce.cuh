// SPDX-License-Identifier: MIT
// Sums over a block and over a warp whose order is fixed: the same bits on every run.
#pragma once

#include "cuda/platform.cuh"

namespace fastconv::cuda {

inline constexpr int kReduceThreads = 256;

// For every thread, the sum of `value` over a block of kReduceThreads as a binary tree. All threads call it.
__device__ inline double block_sum(double value) {
  FC_SHARED(double, partial, [kReduceThreads]);
  const int thread = threadIdx.x;
  partial[thread] = value;
  for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  __syncthreads();
  const double sum = partial[0];
  __syncthreads();  // before the next call writes
  return sum;
}

// kCount sums over a warp at once, in fewer shuffles than one by one. Lane l gets that of the values[i] with
// i = l / (32 / kCount). All lanes call it.
template <int kDistance = 16, int kCount, class Sum>
__device__ __forceinline__ Sum warp_sums(const Sum (&values)[kCount], int lane) {
  static_assert(kCount <= (kDistance ? 2 * kDistance : 1) && (kCount & (kCount - 1)) == 0);
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kDistance;
    Sum mine[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const Sum given = upper ? values[i] : values[i + kHalf];
      mine[i] = (upper ? values[i + kHalf] : values[i]) + __shfl_xor_sync(~0u, given, kDistance);
    }
    return warp_sums<kDistance / 2>(mine, lane);
  } else {
    Sum sum = values[0];
#pragma unroll
    for (int distance = kDistance; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  }
}

}  // namespace fastconv::cuda
