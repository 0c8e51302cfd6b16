// SPDX-License-Identifier: MIT
// The second stage of a weight gradient: partial sums of the blocks' slices, added in order.
#pragma once

#include "core/args.h"
#include "cuda/plan.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

inline constexpr int kSliceElements = 32, kSliceParts = 16;  // threads: elements x parts of their slices

template <class Sum>
struct SliceSums {
  const Sum* partial;  // [slices][pitch]: the weights [k][c][r][s], then biases
  int slices, pitch, elements, weights;
  int c, r, s;  // of the filter
  View w;
  void* bias;

  FASTCONV_HD int blocks() const { return (elements + kSliceElements - 1) / kSliceElements; }
};

template <class T, class Sum>
__device__ __forceinline__ void add_slices_block(const SliceSums<Sum>& t, int block) {
  FC_SHARED(Sum, parts, [kSliceParts][kSliceElements]);
  const int column = threadIdx.x % kSliceElements, part = threadIdx.x / kSliceElements;
  const int i = block * kSliceElements + column;
  Sum sum = 0;
  if (i < t.elements) {
#pragma unroll 4
    for (int slice = part; slice < t.slices; slice += kSliceParts)
      sum += t.partial[int64_t(slice) * t.pitch + i];
  }
  parts[part][column] = sum;
  __syncthreads();
  if (part > 0 || i >= t.elements) return;
  sum = 0;
#pragma unroll
  for (int each = 0; each < kSliceParts; ++each) sum += parts[each][column];
  if (i >= t.weights) {
    static_cast<T*>(t.bias)[i - t.weights] = narrow<T>(sum);
    return;
  }
  const int s = i % t.s, r = i / t.s % t.r, plane = i / (t.s * t.r);
  static_cast<T*>(t.w.data)[plane / t.c * t.w.n + plane % t.c * t.w.c + r * t.w.h + s * t.w.w] =
      narrow<T>(sum);
}

template <class T, class Sum>
__global__ void __launch_bounds__(kSliceElements* kSliceParts) add_slices_kernel(const SliceSums<Sum> t) {
  add_slices_block<T>(t, static_cast<int>(blockIdx.x));
}

template <class T, class Sum>
void add_slices(const SliceSums<Sum>& t, void* stream) {
  launch(add_slices_kernel<T, Sum>, dim3(static_cast<unsigned>(t.blocks())),
         dim3(kSliceElements * kSliceParts), 0, stream, t);
}

}  // namespace fastconv::cuda
