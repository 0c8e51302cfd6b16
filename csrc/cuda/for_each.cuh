// SPDX-License-Identifier: MIT
// The shape of every naive kernel: one thread an index, in a grid-stride loop over as many as there are.
#pragma once

#include "cuda/plan.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

inline constexpr int kForEachThreads = 256;
inline constexpr int64_t kForEachMaxBlocks = 1 << 16;

template <class Args, void (*body)(const Args&, int64_t)>
__global__ void __launch_bounds__(kForEachThreads, 1) for_each_kernel(const Args args, const int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * kForEachThreads;
  for (int64_t i = int64_t(blockIdx.x) * kForEachThreads + threadIdx.x; i < count; i += stride) body(args, i);
}

// Runs body(args, i) for each i in [0, count).
template <class Args, void (*body)(const Args&, int64_t)>
void for_each(const Args& args, int64_t count, void* stream) {
  if (count <= 0) return;
  const int64_t blocks = std::min(ceil_div(count, kForEachThreads), kForEachMaxBlocks);
  launch(for_each_kernel<Args, body>, dim3(static_cast<unsigned>(blocks)), dim3(kForEachThreads), 0, stream,
         args, count);
}

}  // namespace fastconv::cuda
