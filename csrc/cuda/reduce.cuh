// SPDX-License-Identifier: MIT
// A sum over a block whose order is fixed: the same bits on every run.
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

}  // namespace fastconv::cuda
