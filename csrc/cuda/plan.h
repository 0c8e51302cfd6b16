// SPDX-License-Identifier: MIT
// How work is cut into blocks, as plain C++: the table plans in every build, the launchers follow the same
// plan. A plan depends on the shape alone, so the order of a sum, and with it every bit, is the same on all
// devices.
#pragma once

#include <algorithm>
#include <numeric>

#include "core/args.h"

namespace fastconv::cuda {

FASTCONV_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tile of C that one block computes, and the part of it that one thread keeps in registers.
template <int M, int N, int ThreadM, int ThreadN>
struct Tile {
  static constexpr int kM = M, kN = N, kThreadM = ThreadM, kThreadN = ThreadN;
  static constexpr int kThreads = (M / ThreadM) * (N / ThreadN);
  static constexpr int64_t kFullGrid = 512;  // blocks that keep a large GPU busy
};
using Tile64x64 = Tile<64, 64, 4, 4>;
using Tile64x16 = Tile<64, 16, 4, 2>;

// The same for tensor cores: the part of it that one warp keeps. `Gathers`: also takes operands that do not
// come as aligned runs of 16 bytes.
template <int M, int N, int WarpM, int WarpN, bool Gathers>
struct MmaTile {
  static constexpr int kM = M, kN = N, kWarpM = WarpM, kWarpN = WarpN;
  static constexpr int kThreads = 32 * (M / WarpM) * (N / WarpN);
  static constexpr int64_t kFullGrid = 2048 / (kThreads / 32);  // as many warps as stay resident
  static constexpr bool kGathers = Gathers;
  static constexpr bool kTakesFloat =
      WarpM * WarpN <= 32 * 32;  // which has three sums for each of the others
  static constexpr bool kIsTf32 = false;
};
// For float32 alone, in one product of TF32 each.
template <class Tile>
struct InTf32 : Tile {
  static constexpr bool kIsTf32 = true;
};
using MmaTile128x128 = MmaTile<128, 128, 64, 32, false>;
using MmaTile128x64 = MmaTile<128, 64, 64, 32, false>;
using MmaTile64x64 = MmaTile<64, 64, 32, 32, true>;
using MmaTile128x32 = MmaTile<128, 32, 32, 32, true>;
using MmaTile128x128_tf32 = InTf32<MmaTile128x128>;
using MmaTile128x64_tf32 = InTf32<MmaTile128x64>;
using MmaTile64x64_tf32 = InTf32<MmaTile64x64>;
using MmaTile128x32_tf32 = InTf32<MmaTile128x32>;

inline constexpr int kTileK = 16;          // how much of K is in shared memory at a time
inline constexpr int kMmaRowBytes = 64;    // the same for tensor cores, in bytes
inline constexpr int64_t kSliceStep = 32;  // slices of K are as long as a multiple of this
inline constexpr int64_t kMinSlice = 256;  // of K, below which it is not cut further

// C[m, n] = sum over k of A[m, k] * B[k, n], for `batch` independent products.
struct GemmShape {
  int64_t m, n, k, batch;
};

// One axis of a phase (below): of x the inputs that are `first` modulo the stride, of w the taps that reach
// them. Where one does, the next is `step` further on.
inline void take_phase(int64_t first, int64_t& inputs, int64_t& taps, int64_t& stride, int64_t& padding,
                       int64_t& dilation, View& x, View& w, int64_t View::* along, Dtype dtype) {
  const auto take = [&](View& v, int64_t from, int64_t every) {
    const int64_t bytes = from * v.*along * dtype_size(dtype);
    v.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(v.data) + bytes);  // it may be null
    v.*along *= every;
  };
  const int64_t common = std::gcd(stride, dilation), step = stride / common;
  int64_t tap = 0;
  while (tap < std::min(step, taps) && (first + padding - tap * dilation) % stride != 0) ++tap;
  if (tap == std::min(step, taps)) tap = taps;  // none
  take(x, first, stride);
  take(w, tap, step);
  inputs = ceil_div(inputs - first, stride);
  taps = ceil_div(taps - tap, step);
  padding = (first + padding - tap * dilation) / stride;
  dilation /= common;
  stride = 1;
}

// A dgrad with a stride is one of stride 1 for each of its phases: calls f with each. Its inputs lie apart by
// the stride, its taps are those that reach them, if any; grad_y is the whole.
template <class F>
void each_dgrad_phase(const ConvArgs& a, const F& f) {
  const ConvShape& s = a.shape;
  for (int64_t d = 0; d < std::min(s.stride.d, s.D); ++d)
    for (int64_t h = 0; h < std::min(s.stride.h, s.H); ++h)
      for (int64_t w = 0; w < std::min(s.stride.w, s.W); ++w) {
        ConvArgs phase = a;
        ConvShape& p = phase.shape;
        const auto take = [&](int64_t first, int64_t& inputs, int64_t& taps, int64_t Extent3::* axis,
                              int64_t View::* along) {
          take_phase(first, inputs, taps, p.stride.*axis, p.padding.*axis, p.dilation.*axis, phase.x, phase.w,
                     along, a.dtype);
        };
        take(d, p.D, p.T, &Extent3::d, &View::d);
        take(h, p.H, p.R, &Extent3::h, &View::h);
        take(w, p.W, p.S, &Extent3::w, &View::w);
        f(phase);
      }
}

inline GemmShape conv_fprop_gemm(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return {s.N * s.out_cells(), s.group_k(), s.group_c() * s.taps(), s.groups};
}
// Of a phase; that of a strided dgrad is larger than each of its phases'.
inline GemmShape conv_dgrad_gemm(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return {s.N * s.in_cells(), s.group_c(), s.group_k() * s.taps(), s.groups};
}
inline GemmShape conv_wgrad_gemm(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return {s.group_c() * s.taps(), s.group_k(), s.N * s.out_cells(), s.groups};
}
inline GemmShape linear_fprop_gemm(const LinearArgs& a) { return {a.N, a.M, a.K, 1}; }
inline GemmShape linear_dgrad_gemm(const LinearArgs& a) { return {a.K, a.M, a.N, 1}; }
inline GemmShape linear_wgrad_gemm(const LinearArgs& a) { return {a.K, a.N, a.M, 1}; }

// K is cut into slices where the tiles alone are too few; the slices' sums are added in order by a second
// kernel.
struct GemmPlan {
  int64_t m_tiles, n_tiles, slices, slice_k;

  int64_t blocks(const GemmShape& g) const { return m_tiles * n_tiles * g.batch * slices; }
  int64_t workspace_bytes(const GemmShape& g, Dtype dtype) const {
    return slices > 1 ? slices * g.batch * g.m * g.n * (dtype == Dtype::f64 ? 8 : 4) : 0;
  }
};

template <class Tile>
GemmPlan plan_gemm(const GemmShape& g) {
  GemmPlan p;
  p.m_tiles = ceil_div(g.m, Tile::kM);
  p.n_tiles = ceil_div(g.n, Tile::kN);
  const int64_t tiles = std::max<int64_t>(1, p.m_tiles * p.n_tiles * g.batch);
  const int64_t wanted = std::max<int64_t>(1, std::min(Tile::kFullGrid / tiles, g.k / kMinSlice));
  p.slice_k = std::max<int64_t>(kSliceStep, ceil_div(ceil_div(g.k, wanted), kSliceStep) * kSliceStep);
  p.slices = std::max<int64_t>(1, ceil_div(g.k, p.slice_k));
  return p;
}

// Whether vectors of so many elements are aligned that begin at multiples of that along an axis of stride 1.
inline bool is_aligned(const View& v, int64_t View::* along, int64_t element_size, int64_t vector) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data));
  bool aligned = address % std::min<int64_t>(16, vector * element_size) == 0;
  for (const auto stride : {&View::n, &View::c, &View::d, &View::h, &View::w})
    aligned = aligned && (stride == along || v.*stride % vector == 0);
  return aligned;
}

// How a GEMM kernel reads an operand: whether neighbours along K are neighbours in memory, or else neighbours
// across K; and whether they come as aligned runs of 16 bytes, none of which reaches beyond the operand.
struct Access {
  bool along_k, vectors;
};
struct GemmAccess {
  Access a, b;
};

inline int64_t vector_elements(Dtype dtype) { return 16 / dtype_size(dtype); }

// Runs of `channels` of a tensor, or of a filter, of extents `e` whose channels are neighbours.
inline bool channels_in_vectors(const View& v, int64_t channels, const Extent3& e, Dtype dtype) {
  const int64_t vector = vector_elements(dtype);
  const View used{v.data, v.n, v.c, e.d == 1 ? 0 : v.d, e.h == 1 ? 0 : v.h, e.w == 1 ? 0 : v.w};
  return v.c == 1 && channels % vector == 0 && is_aligned(used, &View::c, dtype_size(dtype), vector);
}
// Runs of the positions of a plane without gaps.
inline bool planes_in_vectors(const View& v, const Extent3& e, Dtype dtype) {
  const int64_t vector = vector_elements(dtype);
  const View planes{v.data, v.n, v.c, 0, 0, 0};
  return v.w == 1 && (e.h == 1 || v.h == e.w) && (e.d == 1 || v.d == e.h * e.w) && e.cells() % vector == 0 &&
         is_aligned(planes, &View::w, dtype_size(dtype), vector);
}
// Runs of the taps of an output channel's filters, which lie without gaps.
inline bool taps_in_vectors(const View& v, const ConvShape& s, Dtype dtype) {
  const int64_t vector = vector_elements(dtype);
  const View filters{v.data, v.n, 0, 0, 0, 0};
  return v.w == 1 && (s.R == 1 || v.h == s.S) && (s.T == 1 || v.d == s.R * s.S) &&
         (s.group_c() == 1 || v.c == s.taps()) && s.group_c() * s.taps() % vector == 0 &&
         is_aligned(filters, &View::w, dtype_size(dtype), vector);
}

// A 1x1 convolution that reads each position once is a GEMM, and reads runs of positions.
inline bool is_pointwise(const ConvShape& s) {
  return s.taps() == 1 && s.stride.is_one() && s.Z == s.D && s.P == s.H && s.Q == s.W && s.padding.d == 0 &&
         s.padding.h == 0 && s.padding.w == 0;
}

inline GemmAccess conv_fprop_access(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Extent3 in{s.D, s.H, s.W}, filter{s.T, s.R, s.S};
  const bool channels_last = a.layout == Layout::channels_last;
  const bool by_channels = channels_last || s.taps() == 1;
  return {{channels_last, channels_last ? channels_in_vectors(a.x, s.group_c(), in, a.dtype)
                                        : is_pointwise(s) && planes_in_vectors(a.x, in, a.dtype)},
          {true, by_channels ? channels_in_vectors(a.w, s.group_c(), filter, a.dtype)
                             : taps_in_vectors(a.w, s, a.dtype)}};
}
inline GemmAccess conv_dgrad_access(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Extent3 out{s.Z, s.P, s.Q}, filter{s.T, s.R, s.S};
  const bool channels_last = a.layout == Layout::channels_last;
  return {{channels_last, channels_last ? channels_in_vectors(a.y, s.group_k(), out, a.dtype)
                                        : is_pointwise(s) && planes_in_vectors(a.y, out, a.dtype)},
          {a.w.c != 1, channels_in_vectors(a.w, s.group_c(), filter, a.dtype)}};
}
inline GemmAccess conv_wgrad_access(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Extent3 in{s.D, s.H, s.W}, out{s.Z, s.P, s.Q};
  const bool channels_last = a.layout == Layout::channels_last;
  if (channels_last)
    return {{false, channels_in_vectors(a.x, s.group_c(), in, a.dtype)},
            {false, channels_in_vectors(a.y, s.group_k(), out, a.dtype)}};
  return {{true, is_pointwise(s) && planes_in_vectors(a.x, in, a.dtype)},
          {true, planes_in_vectors(a.y, out, a.dtype)}};
}

// Of a matrix [lines, k].
inline Access matrix_access(const void* data, int64_t line_stride, int64_t k_stride, int64_t lines, int64_t k,
                            Dtype dtype) {
  const int64_t vector = vector_elements(dtype);
  const bool along_k = k_stride == 1;
  const View v{const_cast<void*>(data), along_k ? line_stride : k_stride, 0, 0, 0, 0};
  const bool dense = along_k || line_stride == 1;
  return {along_k,
          dense && (along_k ? k : lines) % vector == 0 && is_aligned(v, &View::w, dtype_size(dtype), vector)};
}
inline GemmAccess linear_fprop_access(const LinearArgs& a) {
  return {matrix_access(a.w.data, a.w.row, a.w.col, a.N, a.K, a.dtype),
          matrix_access(a.x.data, a.x.row, a.x.col, a.M, a.K, a.dtype)};
}
inline GemmAccess linear_dgrad_access(const LinearArgs& a) {
  return {matrix_access(a.w.data, a.w.col, a.w.row, a.K, a.N, a.dtype),
          matrix_access(a.y.data, a.y.row, a.y.col, a.M, a.N, a.dtype)};
}
inline GemmAccess linear_wgrad_access(const LinearArgs& a) {
  return {matrix_access(a.x.data, a.x.col, a.x.row, a.K, a.M, a.dtype),
          matrix_access(a.y.data, a.y.col, a.y.row, a.N, a.M, a.dtype)};
}

// A bias gradient sums `rows` values for each of `channels`: in slices of the rows, then over the slices, in
// double.
inline int64_t bias_grad_slices(int64_t rows) { return std::clamp<int64_t>(rows / 4096, 1, 64); }
inline int64_t bias_grad_workspace(int64_t rows, int64_t channels) {
  return bias_grad_slices(rows) * channels * static_cast<int64_t>(sizeof(double));
}

inline constexpr int kPoolThreads = 256;

// The units that pooling kernels own, one a thread: `channels` by `rows` by `cols` of each image.
struct PoolUnits {
  int64_t n, channels, rows, cols;
  bool channels_first;  // neighbours own neighbouring channels

  int64_t count() const { return n * channels * rows * cols; }
};

inline int64_t offset_size(Offset offset) { return offset == Offset::i32 ? 4 : 1; }

// Channels that a thread owns which owns a pixel: 16 bytes of them, or one.
inline int64_t pool_channels(const PoolArgs& a) {
  const int64_t size = dtype_size(a.dtype), vector = 16 / size;
  const auto fits = [&](const View& v, int64_t element_size) {
    return !v.data || (v.c == 1 && is_aligned(v, &View::c, element_size, vector));
  };
  return a.C % vector == 0 && a.x.c == 1 && a.y.c == 1 && fits(a.x, size) && fits(a.y, size) &&
                 fits(a.gate, size) && fits(a.offsets, offset_size(a.offset))
             ? vector
             : 1;
}
inline PoolUnits pool_pixels_units(const PoolArgs& a, const Extent3& pixels) {
  return {a.N, a.C / pool_channels(a), pixels.h, pixels.w, a.x.c == 1};
}

// The windows that have kernels of their own: as high as wide, steps and paddings alike.
template <int Kernel, int Stride, int Padding>
struct PoolWindow {
  static constexpr int kKernel = Kernel, kStride = Stride, kPadding = Padding;
  // Windows before and after an output that reach into the `Stride` cells under it, along one axis.
  static constexpr int kBefore = (Kernel - 1 - Padding) / Stride, kAfter = (Stride - 1 + Padding) / Stride;

  static bool is(const Window& v) {
    return v.kernel.h == Kernel && v.kernel.w == Kernel && v.stride.h == Stride && v.stride.w == Stride &&
           v.padding.h == Padding && v.padding.w == Padding &&
           (Kernel == 1 || (v.dilation.h == 1 && v.dilation.w == 1));
  }
};

// Calls f with the PoolWindow that `v` is. False: it is none.
template <class F>
bool with_pool_window(const Window& v, F&& f) {
  const auto call = [&](auto window) { return window.is(v) && (f(window), true); };
  return call(PoolWindow<1, 1, 0>()) || call(PoolWindow<2, 2, 0>()) || call(PoolWindow<3, 2, 0>()) ||
         call(PoolWindow<3, 2, 1>()) || call(PoolWindow<3, 1, 1>());
}

inline PoolUnits pool_runs_units(const PoolArgs& a) {
  return {a.N, a.C, a.window.out.h, ceil_div(a.window.out.w, 16 / dtype_size(a.dtype)), false};
}
inline PoolUnits pool_backward_runs_units(const PoolArgs& a) {
  const Extent3& s = a.window.stride;
  return {a.N, a.C, ceil_div(a.H, s.h), ceil_div(a.W, s.w * 16 / dtype_size(a.dtype)), false};
}

}  // namespace fastconv::cuda
