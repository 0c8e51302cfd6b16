// SPDX-License-Identifier: MIT
// wgrad of depthwise convolution, one input channel a group, with the bias gradient.
//
// A thread owns a column of the filter's taps (one tap where conv_depthwise.cu has no kernel for its rows) in
// V channels, as there. It walks over its units: 7 gradients (stride 2: 4) below each other, which it keeps
// in registers while it reads down the column of x under them, each element once for up to R taps.
//
//   block    channel vectors x columns of taps x lanes: the lanes take the units of a slice in turn, and add
//            their sums through shared memory, in order, to one partial sum a slice
//   second   a kernel that adds the slices' sums in order (slices.cuh). No atomics
//
// Neighbouring lanes read neighbouring columns of a plane, or where channels lie side by side, neighbouring
// vectors of channels. Which lane and slice has a unit depends on the shape and the layout alone.
//
// MobileNetV2's [4, 64, 56, 56] 3x3 in float32: 6.4 MB, floor 1.3 us at 4.8 TB/s, predicted 3 us without the
// launches. A pixel takes 0.38 cycles of memory (21 bytes a cycle and multiprocessor) and 0.21 of L1, with
// 7x7 0.63 of L1. Not yet run on a GPU. Next: the threads of a column's neighbours read the same gradients;
// a thread with two columns would read them once.
#include "cuda/conv_depthwise.cuh"
#include "cuda/slices.cuh"

namespace fastconv::cuda {

namespace {

struct DepthwiseWgrad {
  Planes x, g;  // g: the gradient
  Extent2 in, out, stride, padding, dilation;
  Divisor shared;              // filters that read one channel of x
  void* partial;               // [slices][k * taps, then k of the bias]
  int k, columns, cols, taps;  // cols: columns of taps of the filter's width; taps of a filter
  bool wants_bias;
  // the plan
  bool channels_first;
  int block_vectors, block_columns, lanes, units, slice_units;
  Divisor vectors, by_columns, by_lanes;  // threadIdx
  Divisor channel_blocks, column_blocks;  // blockIdx, then the slice
  Divisor unit_cols, unit_rows, by_cols;  // a unit; a column

  DepthwiseWgrad(const ConvArgs& a, const DepthwiseWgradPlan& p, void* workspace)
      : x(a.x),
        g(a.y),
        in(Extent3{1, a.shape.H, a.shape.W}),
        out(Extent3{1, a.shape.P, a.shape.Q}),
        stride(a.shape.stride),
        padding(a.shape.padding),
        dilation(a.shape.dilation),
        shared(a.shape.group_k()),
        partial(workspace),
        k(static_cast<int>(a.shape.K)),
        columns(static_cast<int>(a.shape.taps() / p.column_taps)),
        cols(static_cast<int>(a.shape.S)),
        taps(static_cast<int>(a.shape.taps())),
        wants_bias(a.bias_grad != nullptr),
        channels_first(p.channels_first),
        block_vectors(static_cast<int>(p.vectors)),
        block_columns(static_cast<int>(p.columns)),
        lanes(static_cast<int>(p.lanes)),
        units(static_cast<int>(p.units)),
        slice_units(static_cast<int>(p.slice_units)),
        vectors(p.vectors),
        by_columns(p.columns),
        by_lanes(p.lanes),
        channel_blocks(p.channel_blocks),
        column_blocks(p.column_blocks),
        unit_cols(a.shape.Q),
        unit_rows(p.patches),
        by_cols(a.shape.S) {}
};

template <class T, int V, int kTaps, int kStep>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) depthwise_wgrad_kernel(const DepthwiseWgrad t) {
  using Sum = typename Compute<T>::type;
  using Reach = DepthwiseReach<kTaps, kStep>;
  FC_DYN_SMEM(carve);
  const int channels = t.block_vectors * V, lane_pitch = (t.block_columns * kTaps + 1) * channels;
  Sum* parts = carve.take<Sum>(t.lanes * lane_pitch);  // [lane][column][tap, then one bias][channel]

  int slice = blockIdx.x;
  const int first_k = t.channel_blocks.pop(slice) * channels;
  const int first_column = t.column_blocks.pop(slice) * t.block_columns;

  int rest = threadIdx.x, vector = 0;
  if (t.channels_first) vector = t.vectors.pop(rest);
  const int lane = t.by_lanes.pop(rest), column = t.by_columns.pop(rest);
  if (!t.channels_first) vector = t.vectors.pop(rest);
  const bool exists = rest == 0;
  const int k = first_k + vector * V, my_column = first_column + column;
  const bool works = exists && k < t.k && my_column < t.columns;
  const bool sums_bias = t.wants_bias && my_column == 0;

  Sum sums[kTaps][V] = {}, bias[V] = {};
  if (works) {
    int s = my_column;
    const int first_w = t.by_cols.pop(s) * t.dilation.w - t.padding.w;
    const int first_h = s * kTaps * t.dilation.h - t.padding.h;
    const int c = t.shared.divide(k), end = min((slice + 1) * t.slice_units, t.units);
#pragma unroll 1
    for (int i = slice * t.slice_units + lane; i < end; i += t.lanes) {
      int n = i;
      const int q = t.unit_cols.pop(n), p0 = t.unit_rows.pop(n) * Reach::kRows;
      const T* g = t.g.plane<const T>(n, k) + q * t.g.w;
      Sum grad[Reach::kRows][V];
#pragma unroll
      for (int p = 0; p < Reach::kRows; ++p) {
        T read[V] = {};
        if (p0 + p < t.out.h) load_run(read, g + (p0 + p) * t.g.h);
#pragma unroll
        for (int v = 0; v < V; ++v) grad[p][v] = Sum(read[v]);
      }
      if (sums_bias) {
#pragma unroll
        for (int p = 0; p < Reach::kRows; ++p)
#pragma unroll
          for (int v = 0; v < V; ++v) bias[v] += grad[p][v];
      }
      const int w = q * t.stride.w + first_w, h0 = p0 * t.stride.h + first_h;
      if (w < 0 || w >= t.in.w) continue;
      const T* x = t.x.plane<const T>(n, c) + w * t.x.w;
#pragma unroll
      for (int j = 0; j < Reach::kInputs; ++j) {
        const int h = h0 + Reach::input(j, t.stride.h);
        T read[V] = {};
        if (h >= 0 && h < t.in.h) load_run(read, x + h * t.x.h);
#pragma unroll
        for (int p = 0; p < Reach::kRows; ++p) {
          const int r = Reach::tap(j, p);
          if (r < 0 || r >= kTaps) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sums[r][v] += Sum(read[v]) * grad[p][v];
        }
      }
    }
  }

  if (exists) {
    Sum* mine = parts + lane * lane_pitch + vector * V;
#pragma unroll
    for (int r = 0; r < kTaps; ++r) store_run(mine + (column * kTaps + r) * channels, sums[r]);
    if (column == 0) store_run(mine + t.block_columns * kTaps * channels, bias);
  }
  __syncthreads();
  Sum* partial = static_cast<Sum*>(t.partial) + int64_t(slice) * (t.k * t.taps + t.k);
  for (int i = threadIdx.x; i < lane_pitch; i += blockDim.x) {
    const int of_k = first_k + i % channels, tap = i / channels;
    int s = first_column + tap / kTaps;
    const bool is_bias = tap == t.block_columns * kTaps;
    if (of_k >= t.k || (is_bias ? first_column > 0 : s >= t.columns)) continue;
    Sum sum = 0;
    for (int each = 0; each < t.lanes; ++each) sum += parts[each * lane_pitch + i];
    const int col = t.by_cols.pop(s), row = s * kTaps + tap % kTaps;
    partial[is_bias ? t.k * t.taps + of_k : of_k * t.taps + row * t.cols + col] = sum;
  }
}

}  // namespace

void conv_wgrad_depthwise(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  const DepthwiseWgradPlan plan = plan_depthwise_wgrad(a);
  const DepthwiseWgrad t(a, plan, workspace);
  with_depthwise_kernel(
      a.dtype, plan.vector, plan.column_taps, s.stride.h, [&](auto* element, auto v, auto taps, auto step) {
        using T = std::remove_pointer_t<decltype(element)>;
        using Sum = typename Compute<T>::type;
        const int64_t elements = plan.lanes * (plan.columns * plan.column_taps + 1) * plan.vectors * v();
        launch(depthwise_wgrad_kernel<T, v(), taps(), step()>, dim3(static_cast<unsigned>(plan.blocks())),
               dim3(static_cast<unsigned>(plan.threads())), smem_take<Sum>(0, static_cast<size_t>(elements)),
               stream, t);
        const int weights = t.k * t.taps, pitch = weights + t.k;
        add_slices<T>(SliceSums<Sum>{static_cast<const Sum*>(workspace), static_cast<int>(plan.slices), pitch,
                                     a.bias_grad ? pitch : weights, weights, 1, static_cast<int>(s.R),
                                     static_cast<int>(s.S), a.w, a.bias_grad},
                      stream);
      });
}

}  // namespace fastconv::cuda
