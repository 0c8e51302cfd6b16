// SPDX-License-Identifier: MIT
// What the fused chains share: a stage as their kernels are told of it, and its convolution over tiles in
// shared memory. chain_fused.cu has the picture.
#pragma once

#include "cuda/chain_fused.h"
#include "cuda/conv_direct.cuh"
#include "cuda/ptx.cuh"

namespace fastconv::cuda {

struct FusedStageTask {
  FusedKind kind;
  bool few_taps, wide, pools, relu;
  bool vectors;  // weights of a linear layer may be read in vectors
  const void *w, *bias;
  int w_group, w_k, w_c, w_r, w_s;     // offsets of weights
  int c, k;                            // channels of a group, or features and outputs
  int r, s;                            // taps of a filter, cells of a window
  int step_h, step_w;                  // from one output to the next
  int gap_h, gap_w;                    // from one tap to the next
  int top, left;                       // a pool's padding
  int p, q, pooled_w;                  // a convolution's output, a pool's input; with a pool its columns
  int units, splits;                   // patches, or values of a pool, of an image; lanes that share a patch
  int tiles_of_group, patch_channels;  // of output channels
  int chunk, filter;                   // channels in shared memory at a time, numbers of their filter
  int size, channel, pitch, corner;  // of x in shared memory: of an image, a channel, a row; the first pixel
  Divisor cols, rows, tiles, group;  // of the units
  Divisor filter_cols, filter_rows, filter_channels;
};

inline FusedStageTask fused_stage_task(const FusedStage& f, Dtype dtype) {
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  const ConvArgs& conv = *f.conv;
  const ConvShape& s = conv.shape;
  const Window& v = conv.epilogue.pool;
  const bool is_pool = f.kind == FusedKind::pool, is_linear = f.kind == FusedKind::linear;
  FusedStageTask t;
  t.kind = f.kind;
  t.few_taps = f.has_few_taps(), t.wide = f.wide, t.pools = f.pools, t.relu = conv.epilogue.act == Act::relu;
  t.w = conv.w.data, t.bias = conv.epilogue.bias;
  t.w_group = number(s.group_k() * conv.w.n);
  t.w_k = number(conv.w.n), t.w_c = number(conv.w.c), t.w_r = number(conv.w.h), t.w_s = number(conv.w.w);
  t.c = number(is_linear ? s.C * s.in_cells() : s.group_c()), t.k = number(s.group_k());
  t.r = number(is_pool ? v.kernel.h : s.R), t.s = number(is_pool ? v.kernel.w : s.S);
  t.step_h = number(is_pool ? v.stride.h : s.stride.h), t.step_w = number(is_pool ? v.stride.w : s.stride.w);
  t.gap_h = number(is_pool ? v.dilation.h : s.dilation.h);
  t.gap_w = number(is_pool ? v.dilation.w : s.dilation.w);
  t.top = number(v.padding.h), t.left = number(v.padding.w);
  t.p = number(s.P), t.q = number(s.Q), t.pooled_w = number(v.out.w);
  t.units = number(is_pool ? s.K * v.out.cells() : f.patches()), t.splits = number(f.splits);
  t.tiles_of_group = number(f.tiles), t.patch_channels = number(f.patch_channels());
  t.chunk = number(f.chunk), t.filter = number(f.filter());
  t.size = number(f.x.size()), t.channel = number(f.x.h * f.x.pitch), t.pitch = number(f.x.pitch);
  t.corner = number(f.x.top * f.x.pitch + f.x.left);
  t.cols = Divisor(is_pool ? v.out.w : f.cols), t.rows = Divisor(is_pool ? v.out.h : f.rows);
  t.tiles = Divisor(is_pool ? s.K : s.groups * f.tiles), t.group = Divisor(f.tiles);
  t.filter_cols = Divisor(s.S), t.filter_rows = Divisor(s.R), t.filter_channels = Divisor(f.chunk);
  const int64_t vector = dtype == Dtype::f64 ? 2 : 4, item = dtype_size(dtype);
  t.vectors = is_linear && conv.w.w == 1 && conv.w.n % vector == 0 && t.c % vector == 0 &&
              reinterpret_cast<uintptr_t>(conv.w.data) % static_cast<uintptr_t>(vector * item) == 0;
  return t;
}

// The blocks that work on the same images. They share out a stage's warps, one to each block in turn, and
// each has all that the next stage reads: values are put into the shared memory of every block.
template <bool kCluster>
struct FusedTeam {
  int rank = 0, blocks = 1;

  __device__ FusedTeam() {
    if constexpr (kCluster) rank = cluster_rank(), blocks = cluster_size();
  }
  __device__ __forceinline__ void sync() const {
    if constexpr (kCluster) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  // Of the team's threads; neighbours in a warp are neighbours here.
  __device__ __forceinline__ int thread() const {
    const int warp = static_cast<int>(threadIdx.x) / 32 * blocks + rank;
    return warp * 32 + static_cast<int>(threadIdx.x) % 32;
  }
  __device__ __forceinline__ int threads() const { return blocks * kFusedThreads; }
  template <class V>
  __device__ __forceinline__ void put(V* to, V value) const {
    if constexpr (kCluster) {
      for (int each = 0; each < blocks; ++each) *cluster_shared(to, each) = value;
    } else {
      *to = value;
    }
  }
};

// Channels first_c, first_c + 1, ... of the filter: [group, tile][channel][tap][8].
template <class T, class Sum>
__device__ __forceinline__ void fill_fused_filter(Sum* filter, const FusedStageTask& t, int first_c) {
  const int channels = t.patch_channels;
#pragma unroll 4
  for (int i = threadIdx.x; i < t.filter; i += kFusedThreads) {
    int rest = i;
    const int s = t.filter_cols.pop(rest), r = t.filter_rows.pop(rest), c = t.filter_channels.pop(rest);
    const int j = rest % kDirectFilterPitch, tile = rest / kDirectFilterPitch, group = t.group.divide(tile);
    const int k = (tile - group * t.tiles_of_group) * channels + j;
    const int tap = (c * t.r + r) * t.s + s;
    const bool is_there = first_c + c < t.c && j < channels && k < t.k;
    filter[(tile * t.chunk * t.r * t.s + tap) * kDirectFilterPitch + j] =
        is_there ? Sum(static_cast<const T*>(
                       t.w)[group * t.w_group + k * t.w_k + (first_c + c) * t.w_c + r * t.w_r + s * t.w_s])
                 : Sum(0);
  }
}

// convolve() for any filter.
template <class Patch, class Sum>
__device__ __forceinline__ void convolve_taps(const Sum* x, const FusedStageTask& t, const Sum* filter,
                                              int first, int step, int channels,
                                              Sum (&sums)[Patch::kValues]) {
  for (int c = first; c < channels; c += step)
    for (int r = 0; r < t.r; ++r)
#pragma unroll 1
      for (int s = 0; s < t.s; ++s) {
        const Sum* corner = x + c * t.channel + r * t.gap_h * t.pitch + s * t.gap_w;
        Sum w[Patch::kChannels];
        load_run(w, filter + ((c * t.r + r) * t.s + s) * kDirectFilterPitch);
#pragma unroll
        for (int i = 0; i < Patch::kRows; ++i)
#pragma unroll
          for (int j = 0; j < Patch::kCols; ++j) {
            const Sum value = corner[i * t.step_h * t.pitch + j * t.step_w];
#pragma unroll
            for (int k = 0; k < Patch::kChannels; ++k) sums[Patch::at(i, j, k)] += value * w[k];
          }
      }
}

// Bias, ReLU, pool of a patch's sums, stored. (p, q) is its first pixel.
template <class T, class Patch, class Sum, class Output>
__device__ __forceinline__ void finish_patch(const FusedStageTask& t, const Output& y, int image, int group,
                                             int k, int p, int q, const Sum (&sums)[Patch::kValues]) {
#pragma unroll
  for (int j = 0; j < Patch::kChannels; ++j) {
    if (k + j >= t.k) continue;
    const int channel = group * t.k + k + j;
    const Sum bias = t.bias ? Sum(static_cast<const T*>(t.bias)[channel]) : Sum(0);
#pragma unroll
    for (int col = 0; col < Patch::kCols; col += 2) {
      Sum best = Sum(-HUGE_VAL);
      int cell = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2, w = col + i % 2;
        const Sum sum = sums[Patch::at(h, w, j)] + bias;
        const T value = narrow<T>(naive::activate(sum, t.relu ? Act::relu : Act::none));
        if (t.pools) {
          take_larger(Sum(value), i, true, best, cell);
        } else if (p + h < t.p && q + w < t.q) {
          y.put(image, channel, p + h, q + w, value);
        }
      }
      if (t.pools && (q + col) / 2 < t.pooled_w) y.put(image, channel, p / 2, (q + col) / 2, T(best), cell);
    }
  }
}

// F: the filter's extent, where convolve() takes it, or 0.
template <class T, int F, class Patch, class Sum, class Output>
__device__ __forceinline__ void convolve_images(const FusedStageTask& t, const Sum* x, Sum* filter, int live,
                                                const Output& y) {
  const int units = live * t.units * t.splits;
  for (int begin = 0; begin < units; begin += y.team.threads()) {
    int unit = begin + y.team.thread();
    const bool works = unit < units;
    const int split = unit % t.splits;
    unit /= t.splits;
    const int col = t.cols.pop(unit), row = t.rows.pop(unit), tile = t.tiles.pop(unit), image = unit;
    const int group = t.group.divide(tile);
    const Sum* corner = x + image * t.size + group * t.c * t.channel +
                        row * Patch::kRows * t.step_h * t.pitch + col * Patch::kCols * t.step_w;
    const Sum* taps = filter + tile * t.chunk * t.r * t.s * kDirectFilterPitch;
    Sum sums[Patch::kValues] = {};
    for (int c = 0; c == 0 || c < t.c; c += t.chunk) {
      if (begin == 0 || t.chunk < t.c) {
        if (begin + c > 0) __syncthreads();  // before the filter is replaced
        fill_fused_filter<T>(filter, t, c);
        __syncthreads();
      }
      const int channels = min(t.chunk, t.c - c);
      if (!works) continue;
      if constexpr (F > 0) {
        convolve<F, Patch>(corner + c * t.channel, t.channel, t.pitch, taps, split, t.splits, channels, sums);
      } else {
        convolve_taps<Patch>(corner + c * t.channel, t, taps, split, t.splits, channels, sums);
      }
    }
    for (int lanes = 1; lanes < t.splits; lanes *= 2)
#pragma unroll
      for (Sum& sum : sums) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (works && split == 0)
      finish_patch<T, Patch>(t, y, image, group, (tile - group * t.tiles_of_group) * Patch::kChannels,
                             row * Patch::kRows, col * Patch::kCols, sums);
  }
}

template <class T, class Sum, class Output>
__device__ __forceinline__ void convolve_images(const FusedStageTask& t, const Sum* x, Sum* filter, int live,
                                                const Output& y) {
  if constexpr (std::is_same_v<T, float>) {
    if (t.wide && t.r == 5) return convolve_images<T, 5, DirectPatch4x6>(t, x, filter, live, y);
    if (t.wide) return convolve_images<T, 3, DirectPatch4x6>(t, x, filter, live, y);
  }
  if constexpr (std::is_same_v<Sum, float>) {
    if (t.few_taps && t.r == 5) return convolve_images<T, 5, DirectPatch2x8>(t, x, filter, live, y);
    if (t.few_taps) return convolve_images<T, 3, DirectPatch2x8>(t, x, filter, live, y);
  }
  convolve_images<T, 0, DirectPatch2x8>(t, x, filter, live, y);
}

}  // namespace fastconv::cuda
