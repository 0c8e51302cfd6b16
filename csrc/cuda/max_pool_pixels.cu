// SPDX-License-Identifier: MIT
// Max-pool of any window over planes. A thread owns one pixel, of y forward and of x backward, in V channels:
// as many as 16 bytes hold where channels lie next to each other (channels_last), else one. Neighbouring
// threads own neighbouring channels, then columns; where channels are apart, columns, then rows.
//
// Forward reads the window's cells. Those outside the input read its edge and are not taken, so there are no
// branches between the loads. Backward gathers: the windows that cover a pixel are looked at in row-major
// order, and those whose offset names the pixel are summed. Of a common window (PoolWindow), a thread owns
// the S x S pixels under an output instead: each window that it reads serves several. No atomics; each pixel
// is written once. What neighbouring threads read as well comes from a cache.
//
// Bytes: x once and y (and offsets) once. Floor of [32, 64, 112, 112] 3x3/2 with one-byte offsets, in
// channels_last: 21 an output, 28 us at 4.8 TB/s in float32; 11 and 15 us in 16 bits; both passes. Of a warp,
// bytes take 126 cycles in float32, and instructions (of sm_90a's code) 95 forward and 97 backward; in
// bfloat16 131 against 179 and 223. Not measured.
//
// Next: conversions of 16 bits in hardware (core/dtype.h has them as integer code; cvt brings backward to
// 170).
#include "cuda/pool.cuh"

namespace fastconv::cuda {

namespace {

// Forward. K is the window's extent where it is square and common, else 0. O is the offsets' type or void.
template <class T, class O, int V, int K>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_pixels_kernel(const PoolTask t) {
  using Sum = typename Compute<T>::type;
  constexpr int kUnroll = K ? K : 1;
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  const int kernel_h = K ? K : t.kernel.h, kernel_w = K ? K : t.kernel.w;
  const int h0 = at.row * t.stride.h - t.padding.h, w0 = at.col * t.stride.w - t.padding.w;
  const int first_r = h0 < 0 ? t.dilation_h.divide(t.dilation.h - 1 - h0) : 0;
  const int first_s = w0 < 0 ? t.dilation_w.divide(t.dilation.w - 1 - w0) : 0;
  const T* x = t.x.plane<const T>(at.n, at.c * V);

  Sum best[V];
  int offset[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    best[i] = -Sum(HUGE_VAL);
    offset[i] = first_r * kernel_w + first_s;
  }
#pragma unroll kUnroll
  for (int r = 0; r < kernel_h; ++r) {
    const int h = h0 + r * t.dilation.h, edge_h = min(max(h, 0), t.in.h - 1);
#pragma unroll kUnroll
    for (int s = 0; s < kernel_w; ++s) {
      const int w = w0 + s * t.dilation.w, edge_w = min(max(w, 0), t.in.w - 1);
      T cells[V];
      load_run(cells, x + (edge_h * t.x.h + edge_w * t.x.w));
#pragma unroll
      for (int i = 0; i < V; ++i)
        take_larger(Sum(cells[i]), r * kernel_w + s, h == edge_h && w == edge_w, best[i], offset[i]);
    }
  }
  store_run(t.y.plane<T>(at.n, at.c * V) + (at.row * t.y.h + at.col * t.y.w), best);
  if constexpr (!std::is_void_v<O>)
    store_run(t.offsets.plane<O>(at.n, at.c * V) + (at.row * t.offsets.h + at.col * t.offsets.w), offset);
}

// A window along one axis and the pixel's step in it.
struct Cover {
  int window, step;
  bool covers;  // else `window` is some window that there is

  __device__ Cover(int i, int padded, int stride, int kernel, int dilation, const Divisor& by_dilation,
                   int out) {
    const int distance = padded - i * stride;
    step = by_dilation.divide(distance);
    covers = i >= 0 && i < out && step < kernel && step * dilation == distance;
    window = covers ? i : 0;
  }
};

// The gradient of a window in V channels, and the cell that gets it: -1 where nobody does.
template <class O, int V, class Sum, class T>
__device__ __forceinline__ void load_window(const PoolTask& t, const PoolPlace& at, int p, int q, bool inside,
                                            T (&grad)[V], int (&cell)[V]) {
  load_run(grad, t.y.plane<const T>(at.n, at.c * V) + (p * t.y.h + q * t.y.w));
#pragma unroll
  for (int i = 0; i < V; ++i) cell[i] = inside ? 0 : -1;
  if constexpr (!std::is_void_v<O>) {
    O offsets[V];
    load_run(offsets, t.offsets.plane<const O>(at.n, at.c * V) + (p * t.offsets.h + q * t.offsets.w));
#pragma unroll
    for (int i = 0; i < V; ++i) cell[i] = inside ? static_cast<int>(offsets[i]) : -1;
  }
  if (t.gate.data) {
    T gates[V];
    load_run(gates, t.gate.plane<const T>(at.n, at.c * V) + (p * t.gate.h + q * t.gate.w));
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (Sum(gates[i]) <= 0) cell[i] = -1;
  }
}

// Backward of any window.
template <class T, class O, int V>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_backward_pixels_kernel(const PoolTask t) {
  using Sum = typename Compute<T>::type;
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  const int across_h = t.dilation.h * (t.kernel.h - 1) / t.stride.h + 1;  // windows that may cover the pixel
  const int across_w = t.dilation.w * (t.kernel.w - 1) / t.stride.w + 1;
  const int padded_h = at.row + t.padding.h, padded_w = at.col + t.padding.w;
  const int last_p = t.stride_h.divide(padded_h), last_q = t.stride_w.divide(padded_w);

  Sum sum[V] = {};
  for (int i = last_p - across_h + 1; i <= last_p; ++i) {
    const Cover p(i, padded_h, t.stride.h, t.kernel.h, t.dilation.h, t.dilation_h, t.out.h);
    for (int j = last_q - across_w + 1; j <= last_q; ++j) {
      const Cover q(j, padded_w, t.stride.w, t.kernel.w, t.dilation.w, t.dilation_w, t.out.w);
      T grad[V];
      int cell[V];
      load_window<O, V, Sum>(t, at, p.window, q.window, p.covers && q.covers, grad, cell);
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (cell[k] == p.step * t.kernel.w + q.step) sum[k] += Sum(grad[k]);
    }
  }
  store_run(t.x.plane<T>(at.n, at.c * V) + (at.row * t.x.h + at.col * t.x.w), sum);
}

// Backward of a common window: a thread owns the S x S pixels under an output, so that it reads a window for
// all of them at once.
template <class T, class O, class Window>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_backward_blocks_kernel(const PoolTask t) {
  using Sum = typename Compute<T>::type;
  constexpr int K = Window::kKernel, S = Window::kStride, P = Window::kPadding, V = 16 / sizeof(T);
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);

  Sum sum[S][S][V] = {};
#pragma unroll
  for (int i = -Window::kBefore; i <= Window::kAfter; ++i)
#pragma unroll
    for (int j = -Window::kBefore; j <= Window::kAfter; ++j) {
      const int p = at.row + i, q = at.col + j;
      const bool inside = p >= 0 && p < t.out.h && q >= 0 && q < t.out.w;
      T grad[V];
      int cell[V];
      load_window<O, V, Sum>(t, at, inside ? p : 0, inside ? q : 0, inside, grad, cell);
#pragma unroll
      for (int a = 0; a < S; ++a)
#pragma unroll
        for (int b = 0; b < S; ++b) {
          const int r = a + P - i * S, s = b + P - j * S;
          if (r < 0 || r >= K || s < 0 || s >= K) continue;
#pragma unroll
          for (int k = 0; k < V; ++k)
            if (cell[k] == r * K + s) sum[a][b][k] += Sum(grad[k]);
        }
    }
#pragma unroll
  for (int a = 0; a < S; ++a)
#pragma unroll
    for (int b = 0; b < S; ++b) {
      const int h = at.row * S + a, w = at.col * S + b;
      if (h < t.in.h && w < t.in.w)
        store_run(t.x.plane<T>(at.n, at.c * V) + (h * t.x.h + w * t.x.w), sum[a][b]);
    }
}

}  // namespace

void max_pool_pixels(const PoolArgs& a, void*, void* stream) {
  const PoolTask task(a, pool_pixels_units(a, a.window.out));
  const int64_t channels = pool_channels(a);
  const Extent3& k = a.window.kernel;
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int V = 16 / sizeof(T);
    with_offset(a.offset, [&](auto* offset) {
      using O = std::remove_pointer_t<decltype(offset)>;
      if (channels == 1) return launch_pool(max_pool_pixels_kernel<T, O, 1, 0>, task, stream);
      if constexpr (!std::is_same_v<O, int32_t>) {
        if (k.h == 2 && k.w == 2) return launch_pool(max_pool_pixels_kernel<T, O, V, 2>, task, stream);
        if (k.h == 3 && k.w == 3) return launch_pool(max_pool_pixels_kernel<T, O, V, 3>, task, stream);
      }
      launch_pool(max_pool_pixels_kernel<T, O, V, 0>, task, stream);
    });
  });
}

void max_pool_backward_pixels(const PoolArgs& a, void*, void* stream) {
  const Extent3 in{1, a.H, a.W}, &stride = a.window.stride;
  const bool by_vectors = pool_channels(a) > 1;
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto blocks = [&](auto window) {
      using O = std::conditional_t<decltype(window)::kKernel == 1, void, uint8_t>;  // one cell has no choice
      const Extent3 tiles{1, ceil_div(in.h, stride.h), ceil_div(in.w, stride.w)};
      const PoolTask task(a, pool_pixels_units(a, tiles));
      launch_pool(max_pool_backward_blocks_kernel<T, O, decltype(window)>, task, stream);
    };
    if (by_vectors && with_pool_window(a.window, blocks)) return;
    const PoolTask task(a, pool_pixels_units(a, in));
    with_offset(a.offset, [&](auto* offset) {
      using O = std::remove_pointer_t<decltype(offset)>;
      if (by_vectors) return launch_pool(max_pool_backward_pixels_kernel<T, O, 16 / sizeof(T)>, task, stream);
      launch_pool(max_pool_backward_pixels_kernel<T, O, 1>, task, stream);
    });
  });
}

}  // namespace fastconv::cuda
