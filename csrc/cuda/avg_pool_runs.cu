// SPDX-License-Identifier: MIT
// Average pooling of a common window (PoolWindow: K x K, stride S, padding P) over planes whose rows lie
// without gaps (NCHW), cut as in max_pool_runs.cu: a thread owns a run of V outputs of a row, 16 bytes, and
// the S x S*V cells of x under it. Forward reads K rows of S vectors and writes one vector; backward reads
// the outputs whose windows reach into its cells, scales each by what its window counts, and writes S rows of
// S vectors.
//
// Forward divides; backward multiplies with the reciprocals of the rows and of the columns that a window
// counts, one of each a row and a column. Sums are in row-major order. No atomics; each cell is written once.
//
// Bytes: x once and y once; rows that two threads read come from a cache. Floor of [32, 64, 112, 112] 3x3/2
// in float32: 20 an output, 27 us at 4.8 TB/s, both passes; in 16 bits half of it. Not measured.
#include "cuda/pool.cuh"

namespace fastconv::cuda {

namespace {

template <class T, class Window, bool kWhole>
__device__ __forceinline__ void avg_pool_run(const PoolTask& t, const PoolPlace& at) {
  using Sum = typename Compute<T>::type;
  constexpr int K = Window::kKernel, S = Window::kStride, P = Window::kPadding, V = 16 / sizeof(T);
  constexpr int kSpan = (V - 1) * S + K;
  const int q0 = at.col * V, h0 = at.row * S - P;
  const T* x = t.x.plane<const T>(at.n, at.c);

  Sum sum[V] = {};
#pragma unroll
  for (int r = 0; r < K; ++r) {
    const int h = h0 + r;
    const bool inside = h >= 0 && h < t.in.h;
    Sum span[kSpan];
    load_span<kWhole, P, S * V>(span, x + (inside ? h : 0) * t.x.h, q0 * S, t.in.w, Sum(0));
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int s = 0; s < K; ++s) sum[i] += inside ? span[i * S + s] : Sum(0);
  }
  const int rows = counted_cells(t, h0, K, P, t.in.h);
#pragma unroll
  for (int i = 0; i < V; ++i)
    sum[i] /= Sum(t.divisor) * Sum(rows * counted_cells(t, (q0 + i) * S - P, K, P, t.in.w));
  store_cells(t.y.plane<T>(at.n, at.c) + at.row * t.y.h, q0, t.out.w, t.y_aligned, sum);
}

template <class T, class Window>
__global__ void __launch_bounds__(kPoolThreads, 1) avg_pool_runs_kernel(const PoolTask t) {
  constexpr int kOwn = Window::kStride * 16 / sizeof(T);
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  if (t.x_aligned && (at.col + 1) * kOwn <= t.in.w) {
    avg_pool_run<T, Window, true>(t, at);
  } else {
    avg_pool_run<T, Window, false>(t, at);
  }
}

template <class T, class Window, bool kWhole>
__device__ __forceinline__ void avg_pool_backward_run(const PoolTask& t, const PoolPlace& at) {
  using Sum = typename Compute<T>::type;
  constexpr int K = Window::kKernel, S = Window::kStride, P = Window::kPadding, V = 16 / sizeof(T);
  constexpr int kBefore = Window::kBefore, kAfter = Window::kAfter;
  constexpr int kSpan = kBefore + V + kAfter;
  const int q0 = at.col * V;
  const T* y = t.y.plane<const T>(at.n, at.c);

  Sum share[kSpan];  // of a window's gradient, along the width
#pragma unroll
  for (int j = 0; j < kSpan; ++j)
    share[j] = 1 / Sum(counted_cells(t, (q0 - kBefore + j) * S - P, K, P, t.in.w));

  Sum sum[S][S * V] = {};
#pragma unroll
  for (int i = 0; i <= kBefore + kAfter; ++i) {
    const int p = at.row - kBefore + i;
    const bool inside = p >= 0 && p < t.out.h;
    const Sum down = 1 / (Sum(t.divisor) * Sum(counted_cells(t, p * S - P, K, P, t.in.h)));
    Sum grad[kSpan];
    load_span<kWhole, kBefore, V>(grad, y + (inside ? p : 0) * t.y.h, q0, t.out.w, Sum(0));
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
      const Sum part = inside ? grad[j] * (down * share[j]) : Sum(0);
#pragma unroll
      for (int a = 0; a < S; ++a)
#pragma unroll
        for (int b = 0; b < S * V; ++b) {
          const int r = a + P + (kBefore - i) * S, s = b + P + (kBefore - j) * S;
          if (r >= 0 && r < K && s >= 0 && s < K) sum[a][b] += part;
        }
    }
  }
#pragma unroll
  for (int a = 0; a < S; ++a) {
    const int h = at.row * S + a;
    if (h < t.in.h) store_cells(t.x.plane<T>(at.n, at.c) + h * t.x.h, q0 * S, t.in.w, t.x_aligned, sum[a]);
  }
}

template <class T, class Window>
__global__ void __launch_bounds__(kPoolThreads, 1) avg_pool_backward_runs_kernel(const PoolTask t) {
  constexpr int V = 16 / sizeof(T);
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  if (t.y_aligned && (at.col + 1) * V <= t.out.w) {
    avg_pool_backward_run<T, Window, true>(t, at);
  } else {
    avg_pool_backward_run<T, Window, false>(t, at);
  }
}

}  // namespace

void avg_pool_runs(const PoolArgs& a, void*, void* stream) {
  with_pool_window(a.window, [&](auto window) {
    with_dtype(a.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      launch_pool(avg_pool_runs_kernel<T, decltype(window)>, runs_task(a, pool_runs_units(a)), stream);
    });
  });
}

void avg_pool_backward_runs(const PoolArgs& a, void*, void* stream) {
  with_pool_window(a.window, [&](auto window) {
    with_dtype(a.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      launch_pool(avg_pool_backward_runs_kernel<T, decltype(window)>,
                  runs_task(a, pool_backward_runs_units(a)), stream);
    });
  });
}

}  // namespace fastconv::cuda
