// SPDX-License-Identifier: MIT
// Depthwise convolution, one input channel a group: fprop with bias, residual and ReLU; and dgrad, which is a
// correlation of grad_y, for stride 2 one for each parity of the input's rows and columns, over the taps that
// reach it and no others.
//
//            w                   A thread owns 7 outputs (stride 2: 4) below each other in one column, of V
//     +--+--+--+                 channels: four where those lie side by side (channels_last), else one. It
//   h |  |x |  |   y: 7 outputs  keeps a column of the filter in registers and reads down the column of x
//     |  |x |  |     .           under it, each element once for up to R outputs. Then it takes the filter's
//     |  |x |  |     .           next column, whose elements other threads have brought into L1.
//
// Neighbouring threads own neighbouring channels, or columns where channels are apart. There are kernels for
// 3 and 5 rows of taps, stride 1 and 2, and for 7, stride 1; others (dilated along the rows, larger, dgrad's
// parities) read an element for each tap. Filters of the block's channels are in shared memory,
// [s][r][channel]. Nothing else is, and one barrier is all.
//
// MobileNetV2's [4, 64, 56, 56] 3x3 in float32: 6.4 MB, 14 MFLOP; floor 1.3 us at 4.8 TB/s, predicted 2 us
// without the launch; bfloat16 half of it. An output of a float32 row takes 0.38 cycles of memory (21 bytes a
// cycle and multiprocessor); 3x3 takes 0.14 of L1 and 0.2 of instructions, ConvNeXt's 7x7 0.6 of L1, where
// weights are a third in channels_last, and 0.6 of instructions. Not yet run on a GPU.
//
// Limits: zeros that pad meet the filter's rows, so an infinite weight gives NaN there. Next: two columns a
// thread for 7x7; float16 conversions in hardware (core/dtype.h has integer code); dilated rows that share.
#include "core/naive.h"
#include "cuda/conv_depthwise.cuh"

namespace fastconv::cuda {

namespace {

struct Correlation {
  DepthwiseAxis rows[kDepthwiseStrides], cols[kDepthwiseStrides];  // by residue
  Planes x, y, residual;
  const void* filter;
  int filter_k, filter_r, filter_s;
  const void* bias;
  bool relu;
  int channels, summed;  // of y; channels of x that one of y reads
  Divisor shared;        // channels of y that read one of x
  // the plan
  bool channels_first;
  int block_vectors, block_cols, block_rows, pitch, filters, filter_elements;
  Divisor vectors, by_cols, by_rows;                                           // threadIdx
  Divisor row_residues, col_residues, col_blocks, row_blocks, channel_blocks;  // blockIdx, then the image

  Correlation(const DepthwiseShape& s, const DepthwisePlan& p, const View& filter, const Epilogue& e,
              bool turned)
      : x(s.x),
        y(s.y),
        residual(e.residual),
        filter(filter.data),
        filter_k(static_cast<int>(filter.n)),
        filter_r(static_cast<int>(filter.h)),
        filter_s(static_cast<int>(filter.w)),
        bias(e.bias),
        relu(e.act == Act::relu),
        channels(static_cast<int>(s.channels)),
        summed(static_cast<int>(s.summed)),
        shared(s.shared),
        channels_first(p.channels_first),
        block_vectors(static_cast<int>(p.vectors)),
        block_cols(static_cast<int>(p.cols)),
        block_rows(static_cast<int>(p.rows)),
        pitch(static_cast<int>(p.pitch())),
        filters(static_cast<int>(p.filters)),
        filter_elements(static_cast<int>(s.taps * p.pitch() * p.filters)),
        vectors(p.vectors),
        by_cols(p.cols),
        by_rows(p.rows),
        row_residues(s.row_residues),
        col_residues(s.col_residues),
        col_blocks(p.col_blocks),
        row_blocks(p.row_blocks),
        channel_blocks(p.channel_blocks) {
    std::copy(s.rows, s.rows + kDepthwiseStrides, rows);
    std::copy(s.cols, s.cols + kDepthwiseStrides, cols);
    if (turned) {
      std::swap(residual.h, residual.w);
      std::swap(filter_r, filter_s);
    }
  }
};

// Filters of the block's channels from `first` on, as [col tap][row tap][channel], for each of the summed
// channels from j on. All threads call it; barriers must stand before and behind.
template <class T, class Sum>
__device__ __forceinline__ void fill_filters(Sum* shared, const Correlation& t, const DepthwiseAxis& rows,
                                             const DepthwiseAxis& cols, int first, int count, int j) {
  const int taps = rows.taps * cols.taps, channels = min(count, t.channels - first);
  const int filters = min(t.filters, t.summed - j);
  for (int i = threadIdx.x; i < taps * channels * filters; i += blockDim.x) {
    const int plane = i / taps, tap = i - plane * taps, r = tap / cols.taps, s = tap - r * cols.taps;
    const int channel = plane / filters, each = plane - channel * filters;
    const T* filter =
        static_cast<const T*>(t.filter) + int64_t((first + channel) * t.summed + j + each) * t.filter_k;
    shared[((each * cols.taps + s) * rows.taps + r) * t.pitch + channel] =
        filter[(rows.weight + r * rows.weight_step) * t.filter_r +
               (cols.weight + s * cols.weight_step) * t.filter_s];
  }
}

// kTaps rows of taps that follow each other and steps of kStep; 1 and 0: any.
template <class T, int V, int kTaps, int kStep>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) correlate_kernel(const Correlation t) {
  using Sum = typename Compute<T>::type;
  using Reach = DepthwiseReach<kTaps, kStep>;
  FC_DYN_SMEM(carve);
  Sum* filters = carve.take<Sum>(t.filter_elements);

  int n = blockIdx.x;
  const DepthwiseAxis& rows = t.rows[t.row_residues.pop(n)];
  const DepthwiseAxis& cols = t.cols[t.col_residues.pop(n)];
  const int col_block = t.col_blocks.pop(n), row_block = t.row_blocks.pop(n);
  const int first = t.channel_blocks.pop(n) * t.block_vectors * V;

  int unit = threadIdx.x, vector = 0;
  if (t.channels_first) vector = t.vectors.pop(unit);
  const int col = col_block * t.block_cols + t.by_cols.pop(unit);
  const int row = (row_block * t.block_rows + t.by_rows.pop(unit)) * Reach::kRows;
  if (!t.channels_first) vector = t.vectors.pop(unit);
  const int channel = first + vector * V;
  const bool works = unit == 0 && channel < t.channels && row < rows.outputs && col < cols.outputs;

  Sum sums[Reach::kRows][V] = {};
  for (int j = 0; j < t.summed; ++j) {
    const int filter = j % t.filters;
    if (filter == 0) {
      if (j > 0) __syncthreads();
      fill_filters<T>(filters, t, rows, cols, first, t.block_vectors * V, j);
      __syncthreads();
    }
    if (!works) continue;
    const Sum* taps = filters + filter * rows.taps * cols.taps * t.pitch + vector * V;
    const T* plane = t.x.plane<const T>(n, t.shared.divide(channel * t.summed + j));
#pragma unroll 1
    for (int s = 0; s < cols.taps; ++s) {
      const int w = col * cols.step + cols.first + s * cols.tap_step;
      if (w < 0 || w >= cols.inputs) continue;
#pragma unroll 1
      for (int r0 = 0; r0 < rows.taps; r0 += kTaps) {
        Sum weights[kTaps][V];
#pragma unroll
        for (int r = 0; r < kTaps; ++r) load_run(weights[r], taps + (s * rows.taps + r0 + r) * t.pitch);
        const int h0 = row * rows.step + rows.first + r0 * rows.tap_step;
#pragma unroll
        for (int i = 0; i < Reach::kInputs; ++i) {
          const int h = h0 + Reach::input(i, rows.step);
          T read[V] = {};
          if (h >= 0 && h < rows.inputs) load_run(read, plane + (h * t.x.h + w * t.x.w));
#pragma unroll
          for (int p = 0; p < Reach::kRows; ++p) {
            const int r = Reach::tap(i, p);
            if (r < 0 || r >= kTaps) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) sums[p][v] += Sum(read[v]) * weights[r][v];
          }
        }
      }
    }
  }
  if (!works) return;

  Sum bias[V] = {};
  if (t.bias) {
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] = static_cast<const T*>(t.bias)[channel + v];
  }
  const Act act = t.relu ? Act::relu : Act::none;
  const int w = cols.out_first + col * cols.out_step;
#pragma unroll
  for (int p = 0; p < Reach::kRows; ++p) {
    if (row + p >= rows.outputs) continue;
    const int h = rows.out_first + (row + p) * rows.out_step;
    T residual[V] = {};
    if (t.residual.data)
      load_run(residual, t.residual.plane<const T>(n, channel) + (h * t.residual.h + w * t.residual.w));
#pragma unroll
    for (int v = 0; v < V; ++v) sums[p][v] = naive::activate(sums[p][v] + bias[v] + Sum(residual[v]), act);
    store_run(t.y.plane<T>(n, channel) + (h * t.y.h + w * t.y.w), sums[p]);
  }
}

void correlate(DepthwiseShape s, const View& filter, const Epilogue& e, void* stream) {
  const bool turned = s.turns();
  if (turned) s.turn();
  const bool vectors = s.shared == 1 && s.summed == 1;
  const int64_t vector =
      !vectors ? 1 : depthwise_vector(s.channels, s.dtype, {s.x, s.y, e.residual.data ? e.residual : s.y});
  const DepthwisePlan plan = plan_depthwise(s, vector);
  if (plan.blocks(s) == 0) return;
  const Correlation t(s, plan, filter, e, turned);
  const bool shares = s.shares_rows();
  with_depthwise_kernel(
      s.dtype, plan.vector, shares ? s.rows[0].taps : 1, s.rows[0].step,
      [&](auto* element, auto v, auto taps, auto step) {
        using T = std::remove_pointer_t<decltype(element)>;
        launch(correlate_kernel<T, v(), taps(), step()>, dim3(static_cast<unsigned>(plan.blocks(s))),
               dim3(static_cast<unsigned>(plan.threads())),
               smem_take<typename Compute<T>::type>(0, static_cast<size_t>(t.filter_elements)), stream, t);
      });
}

}  // namespace

void conv_fprop_depthwise(const ConvArgs& a, void*, void* stream) {
  correlate(depthwise_fprop(a), a.w, a.epilogue, stream);
}

void conv_dgrad_depthwise(const ConvArgs& a, void*, void* stream) {
  correlate(depthwise_dgrad(a), a.w, Epilogue{}, stream);
}

}  // namespace fastconv::cuda
