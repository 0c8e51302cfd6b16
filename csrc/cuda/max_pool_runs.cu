// SPDX-License-Identifier: MIT
// Max-pool of a common window (PoolWindow: K x K, stride S, padding P) over planes whose rows lie without
// gaps (NCHW). A thread owns a run of V outputs of a row, 16 bytes, and the S x S*V cells of x under it:
//
//      P |  S*V: S vectors  | .   x: forward reads K rows of it, S vectors and the few cells on either side;
//     ---+------------------+--   backward writes S rows of S vectors
//        |  V: one vector   |     y: forward writes one vector; backward reads it, and the few outputs around
//                                 it whose windows reach into its cells
//
// All loops are unrolled, so everything stays in registers. Where a row or its last run is not a whole number
// of vectors, cells are accessed one by one. Backward looks at the windows in row-major order and adds a
// gradient where the offset names the cell. No atomics; each cell is written once.
//
// Bytes: x once and y (and offsets) once; rows that two threads read come from a cache. Floor of
// [32, 64, 112, 112] 3x3/2 at 4.8 TB/s, and of each warp the cycles that its bytes take (21 a cycle and
// multiprocessor) against those that its instructions take (of sm_90a's code, 4 a cycle):
//
//                    bytes an output   floor us   cycles: bytes   instructions
//     float32             20              27           119             72
//       with offsets      21              28           126             87
//       backward          21              28           126             85
//     bfloat16            10              13           119            140
//       with offsets      11              15           131            183
//       backward          11              15           131            195
//
// Not measured. Next: conversions of 16 bits in hardware (core/dtype.h has them as integer code, for float16
// about 8 instructions a value; cvt brings its three rows to 123, 148 and 137 cycles), then maxima of two
// values an instruction where offsets are not wanted (max.NaN.bf16x2, sm_80).
#include "cuda/pool.cuh"

namespace fastconv::cuda {

namespace {

template <class T, class O, class Window, bool kWhole>
__device__ __forceinline__ void max_pool_run(const PoolTask& t, const PoolPlace& at) {
  using Sum = typename Compute<T>::type;
  constexpr int K = Window::kKernel, S = Window::kStride, P = Window::kPadding, V = 16 / sizeof(T);
  constexpr int kSpan = (V - 1) * S + K;
  const int q0 = at.col * V, h0 = at.row * S - P;
  const T* x = t.x.plane<const T>(at.n, at.c);

  Sum best[V];
  int offset[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    best[i] = -Sum(HUGE_VAL);
    offset[i] = max(-h0, 0) * K + max(P - (q0 + i) * S, 0);  // the first cell inside the input
  }
#pragma unroll
  for (int r = 0; r < K; ++r) {
    const int h = h0 + r;
    const bool inside = h >= 0 && h < t.in.h;
    Sum span[kSpan];
    load_span<kWhole, P, S * V>(span, x + (inside ? h : 0) * t.x.h, q0 * S, t.in.w, -Sum(HUGE_VAL));
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int s = 0; s < K; ++s) take_larger(span[i * S + s], r * K + s, inside, best[i], offset[i]);
  }
  store_cells(t.y.plane<T>(at.n, at.c) + at.row * t.y.h, q0, t.out.w, t.y_aligned, best);
  if constexpr (!std::is_void_v<O>)
    store_cells(t.offsets.plane<O>(at.n, at.c) + at.row * t.offsets.h, q0, t.out.w, t.y_aligned, offset);
}

template <class T, class O, class Window>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_runs_kernel(const PoolTask t) {
  constexpr int kOwn = Window::kStride * 16 / sizeof(T);
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  if (t.x_aligned && (at.col + 1) * kOwn <= t.in.w) {
    max_pool_run<T, O, Window, true>(t, at);
  } else {
    max_pool_run<T, O, Window, false>(t, at);
  }
}

template <class T, class O, class Window, bool kWhole>
__device__ __forceinline__ void max_pool_backward_run(const PoolTask& t, const PoolPlace& at) {
  using Sum = typename Compute<T>::type;
  constexpr int K = Window::kKernel, S = Window::kStride, P = Window::kPadding, V = 16 / sizeof(T);
  constexpr int kBefore = Window::kBefore, kAfter = Window::kAfter;
  constexpr int kSpan = kBefore + V + kAfter;
  const int q0 = at.col * V;
  const T* y = t.y.plane<const T>(at.n, at.c);
  const T* gate = t.gate.data ? t.gate.plane<const T>(at.n, at.c) : nullptr;

  Sum sum[S][S * V] = {};
#pragma unroll
  for (int i = 0; i <= kBefore + kAfter; ++i) {
    const int p = at.row - kBefore + i;
    const bool inside = p >= 0 && p < t.out.h;
    const int row = inside ? p : 0;
    Sum grad[kSpan];
    load_span<kWhole, kBefore, V>(grad, y + row * t.y.h, q0, t.out.w, Sum(0));
    int cell[kSpan] = {};  // of each window, whose maximum it is; -1: nobody gets the gradient
    if constexpr (!std::is_void_v<O>) {
      const O* offsets = t.offsets.plane<const O>(at.n, at.c);
      load_span<kWhole, kBefore, V>(cell, offsets + row * t.offsets.h, q0, t.out.w, -1);
    }
    if (gate) {
      Sum gates[kSpan];
      load_span<kWhole, kBefore, V>(gates, gate + row * t.gate.h, q0, t.out.w, Sum(0));
#pragma unroll
      for (int j = 0; j < kSpan; ++j)
        if (gates[j] <= 0) cell[j] = -1;
    }
#pragma unroll
    for (int j = 0; j < kSpan; ++j)
#pragma unroll
      for (int a = 0; a < S; ++a)
#pragma unroll
        for (int b = 0; b < S * V; ++b) {
          const int r = a + P + (kBefore - i) * S, s = b + P + (kBefore - j) * S;
          if (r < 0 || r >= K || s < 0 || s >= K) continue;
          if (inside && cell[j] == r * K + s) sum[a][b] += grad[j];
        }
  }
#pragma unroll
  for (int a = 0; a < S; ++a) {
    const int h = at.row * S + a;
    if (h < t.in.h) store_cells(t.x.plane<T>(at.n, at.c) + h * t.x.h, q0 * S, t.in.w, t.x_aligned, sum[a]);
  }
}

template <class T, class O, class Window>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_backward_runs_kernel(const PoolTask t) {
  constexpr int V = 16 / sizeof(T);
  const int unit = static_cast<int>(blockIdx.x * kPoolThreads + threadIdx.x);
  if (unit >= t.units) return;
  const PoolPlace at = t.place(unit);
  if (t.y_aligned && (at.col + 1) * V <= t.out.w) {
    max_pool_backward_run<T, O, Window, true>(t, at);
  } else {
    max_pool_backward_run<T, O, Window, false>(t, at);
  }
}

}  // namespace

void max_pool_runs(const PoolArgs& a, void*, void* stream) {
  with_pool_window(a.window, [&](auto window) {
    with_dtype(a.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      const PoolTask task = runs_task(a, pool_runs_units(a));
      if (a.offset == Offset::none)
        return launch_pool(max_pool_runs_kernel<T, void, decltype(window)>, task, stream);
      launch_pool(max_pool_runs_kernel<T, uint8_t, decltype(window)>, task, stream);
    });
  });
}

void max_pool_backward_runs(const PoolArgs& a, void*, void* stream) {
  with_pool_window(a.window, [&](auto window) {
    with_dtype(a.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      using O = std::conditional_t<decltype(window)::kKernel == 1, void, uint8_t>;  // one cell has no choice
      launch_pool(max_pool_backward_runs_kernel<T, O, decltype(window)>,
                  runs_task(a, pool_backward_runs_units(a)), stream);
    });
  });
}

}  // namespace fastconv::cuda
