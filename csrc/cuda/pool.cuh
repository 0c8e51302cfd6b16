// SPDX-License-Identifier: MIT
// What the pooling kernels share: the task they are given, which unit of it a thread owns, vectors of memory,
// what an average divides by.
#pragma once

#include <math.h>
#include <type_traits>

#include "core/naive.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

struct Extent2 {
  int h = 1, w = 1;

  Extent2() = default;
  explicit Extent2(const Extent3& e) : h(static_cast<int>(e.h)), w(static_cast<int>(e.w)) {}
};

// A tensor [N, C, H, W]. Its planes may lie anywhere; inside of one, offsets are ints.
struct Planes {
  void* data = nullptr;
  int64_t n = 0, c = 0;
  int h = 0, w = 0;

  Planes() = default;
  explicit Planes(const View& v)
      : data(v.data), n(v.n), c(v.c), h(static_cast<int>(v.h)), w(static_cast<int>(v.w)) {}

  template <class T>
  __device__ T* plane(int in, int ic) const {
    return static_cast<T*>(data) + in * n + ic * c;
  }
};

struct PoolPlace {
  int n, c, row, col;
};

struct PoolTask {
  int units;
  bool channels_first;  // neighbouring threads own neighbouring channels, not columns
  Divisor channels, rows, cols;
  Planes x, y, offsets, gate;
  Extent2 in, out, kernel, stride, padding, dilation;
  Divisor stride_h, stride_w, dilation_h, dilation_w;
  DivideBy divide_by;
  double divisor;                             // of DivideBy::number, else one
  bool x_aligned = false, y_aligned = false;  // may be accessed in vectors; y: with its offsets and gate

  PoolTask(const PoolArgs& a, const PoolUnits& u)
      : units(static_cast<int>(u.count())),
        channels_first(u.channels_first),
        channels(u.channels),
        rows(u.rows),
        cols(u.cols),
        x(a.x),
        y(a.y),
        offsets(a.offsets),
        gate(a.gate),
        in(Extent3{1, a.H, a.W}),
        out(a.window.out),
        kernel(a.window.kernel),
        stride(a.window.stride),
        padding(a.window.padding),
        dilation(a.window.dilation),
        stride_h(a.window.stride.h),
        stride_w(a.window.stride.w),
        dilation_h(a.window.dilation.h),
        dilation_w(a.window.dilation.w),
        divide_by(a.divide_by),
        divisor(a.divide_by == DivideBy::number ? double(a.divisor) : 1) {}

  __device__ PoolPlace place(int unit) const {
    PoolPlace at;
    if (channels_first) at.c = channels.pop(unit);
    at.col = cols.pop(unit);
    at.row = rows.pop(unit);
    if (!channels_first) at.c = channels.pop(unit);
    at.n = unit;
    return at;
  }
};

inline void launch_pool(void (*kernel)(PoolTask), const PoolTask& task, void* stream) {
  if (task.units > 0)
    launch(kernel, dim3(static_cast<unsigned>(ceil_div(task.units, kPoolThreads))), dim3(kPoolThreads), 0,
           stream, task);
}

// Calls f with a null pointer of the type of the offsets, of void where there are none.
template <class F>
void with_offset(Offset offset, F&& f) {
  if (offset == Offset::none) return f(static_cast<void*>(nullptr));
  if (offset == Offset::u8) return f(static_cast<uint8_t*>(nullptr));
  f(static_cast<int32_t*>(nullptr));
}

// At most 16 bytes of a run of kCount elements.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) PoolVector {
  static constexpr int kElements = kCount * sizeof(T) < 16 ? kCount : 16 / sizeof(T);
  T v[kElements];
};

template <class T, int kCount>
__device__ __forceinline__ void load_run(T (&run)[kCount], const T* p) {
  using Vector = PoolVector<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += Vector::kElements) {
    const Vector vector = ld<Vector>(p + i);
#pragma unroll
    for (int j = 0; j < Vector::kElements; ++j) run[i + j] = vector.v[j];
  }
}

template <class T, int kCount, class Value>
__device__ __forceinline__ void store_run(T* p, const Value (&run)[kCount]) {
  using Vector = PoolVector<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += Vector::kElements) {
    Vector vector;
#pragma unroll
    for (int j = 0; j < Vector::kElements; ++j) vector.v[j] = T(run[i + j]);
    st<Vector>(p + i, vector);
  }
}

// Cells [own - kLeft, own - kLeft + kSpan) of a row of `extent`; `outside` where there is none. kWhole: the
// vectors [own, own + kOwn) are aligned and inside.
template <bool kWhole, int kLeft, int kOwn, int kSpan, class T, class Value>
__device__ __forceinline__ void load_span(Value (&span)[kSpan], const T* row, int own, int extent,
                                          Value outside) {
  T vectors[kOwn];
  if constexpr (kWhole) load_run(vectors, row + own);
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    const int at = own - kLeft + i;
    const bool is_own = i >= kLeft && i < kLeft + kOwn;
    if (kWhole && is_own) {
      span[i] = Value(vectors[i - kLeft]);
    } else {
      span[i] = at >= 0 && at < extent ? Value(row[at]) : outside;
    }
  }
}

template <class T, int kOwn, class Value>
__device__ __forceinline__ void store_cells(T* row, int own, int extent, bool aligned,
                                            const Value (&values)[kOwn]) {
  if (aligned && own + kOwn <= extent) return store_run(row + own, values);
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (own + i < extent) row[own + i] = T(values[i]);
}

// The task of a kernel whose threads own runs of a row.
inline PoolTask runs_task(const PoolArgs& a, const PoolUnits& units) {
  PoolTask task(a, units);
  const int64_t vector = 16 / dtype_size(a.dtype);
  task.x_aligned = is_aligned(a.x, &View::w, dtype_size(a.dtype), vector);
  task.y_aligned = is_aligned(a.y, &View::w, dtype_size(a.dtype), vector) &&
                   is_aligned(a.offsets, &View::w, offset_size(a.offset), vector) &&
                   is_aligned(a.gate, &View::w, dtype_size(a.dtype), vector);
  return task;
}

// Cells that an average divides by along one axis, of the window that begins at `start`; one where it divides
// by a number.
__device__ __forceinline__ int counted_cells(const PoolTask& t, int start, int kernel, int padding,
                                             int size) {
  return t.divide_by == DivideBy::number ? 1 : naive::counted(t.divide_by, start, kernel, padding, size);
}

// Takes a cell of the window where it beats the maximum so far: NaN always does, an equal value does not.
template <class Sum>
__device__ __forceinline__ void take_larger(Sum value, int cell, bool inside, Sum& best, int& offset) {
  if (inside && (value > best || value != value)) {
    best = value;
    offset = cell;
  }
}

}  // namespace fastconv::cuda
