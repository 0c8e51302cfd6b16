// SPDX-License-Identifier: MIT
// Average pooling of any window over planes, cut as in max_pool_pixels.cu: a thread owns one pixel, of y
// forward and of x backward, in V channels: as many as 16 bytes hold where channels lie next to each other
// (channels_last), else one. Neighbouring threads own neighbouring channels, then columns; where channels are
// apart, columns, then rows.
//
// Forward sums the window's cells inside the input in row-major order and divides. Backward gathers: each
// window over the pixel sends its gradient over its divisor. No atomics; each pixel is written once. What
// neighbouring threads read as well comes from a cache.
//
// Bytes: x once and y once. Floor of [32, 64, 112, 112] 3x3/2 in channels_last, both passes: 20 an output, 27
// us at 4.8 TB/s in float32; half of it in 16 bits. Not measured. Next: backward of common windows by blocks
// of pixels, as max-pool has it, so that a window is read once.
#include "cuda/pool.cuh"

namespace fastconv::cuda {

namespace {

template <class Sum>
__device__ __forceinline__ Sum divisor_of(const PoolTask& t, int p, int q) {
  return Sum(t.divisor) *
         Sum(counted_cells(t, p * t.stride.h - t.padding.h, t.kernel.h, t.padding.h, t.in.h) *
             counted_cells(t, q * t.stride.w - t.padding.w, t.kernel.w, t.padding.w, t.in.w));
}

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, 1) avg_pool_pixels_kernel(const PoolTask t) {
  using Sum = typename Compute<T>::type;
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  const int h0 = at.row * t.stride.h - t.padding.h, w0 = at.col * t.stride.w - t.padding.w;
  const int h_end = min(h0 + t.kernel.h, t.in.h), w_end = min(w0 + t.kernel.w, t.in.w);
  const T* x = t.x.plane<const T>(at.n, at.c * V);

  Sum sum[V] = {};
  for (int h = max(h0, 0); h < h_end; ++h)
    for (int w = max(w0, 0); w < w_end; ++w) {
      T cells[V];
      load_run(cells, x + (h * t.x.h + w * t.x.w));
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += Sum(cells[i]);
    }
  const Sum divisor = divisor_of<Sum>(t, at.row, at.col);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] /= divisor;
  store_run(t.y.plane<T>(at.n, at.c * V) + (at.row * t.y.h + at.col * t.y.w), sum);
}

template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads, 1) avg_pool_backward_pixels_kernel(const PoolTask t) {
  using Sum = typename Compute<T>::type;
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  // Windows [first, last] along an axis hold the pixel.
  const int padded_h = at.row + t.padding.h, padded_w = at.col + t.padding.w;
  const int last_p = min(t.stride_h.divide(padded_h), t.out.h - 1);
  const int last_q = min(t.stride_w.divide(padded_w), t.out.w - 1);
  const int first_p = t.stride_h.divide(max(padded_h - t.kernel.h + t.stride.h, 0));
  const int first_q = t.stride_w.divide(max(padded_w - t.kernel.w + t.stride.w, 0));
  const T* y = t.y.plane<const T>(at.n, at.c * V);

  Sum sum[V] = {};
  for (int p = first_p; p <= last_p; ++p)
    for (int q = first_q; q <= last_q; ++q) {
      T grad[V];
      load_run(grad, y + (p * t.y.h + q * t.y.w));
      const Sum share = 1 / divisor_of<Sum>(t, p, q);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += Sum(grad[i]) * share;
    }
  store_run(t.x.plane<T>(at.n, at.c * V) + (at.row * t.x.h + at.col * t.x.w), sum);
}

}  // namespace

void avg_pool_pixels(const PoolArgs& a, void*, void* stream) {
  const PoolTask task(a, pool_pixels_units(a, a.window.out));
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (pool_channels(a) == 1) return launch_pool(avg_pool_pixels_kernel<T, 1>, task, stream);
    launch_pool(avg_pool_pixels_kernel<T, 16 / sizeof(T)>, task, stream);
  });
}

void avg_pool_backward_pixels(const PoolArgs& a, void*, void* stream) {
  const PoolTask task(a, pool_pixels_units(a, {1, a.H, a.W}));
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (pool_channels(a) == 1) return launch_pool(avg_pool_backward_pixels_kernel<T, 1>, task, stream);
    launch_pool(avg_pool_backward_pixels_kernel<T, 16 / sizeof(T)>, task, stream);
  });
}

}  // namespace fastconv::cuda
