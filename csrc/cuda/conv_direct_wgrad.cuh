// SPDX-License-Identifier: MIT
// The block of wgrad for few input channels; conv_direct_backward.cu has the picture.
#pragma once

#include "cuda/conv_direct.cuh"
#include "cuda/slices.cuh"

namespace fastconv::cuda {

struct WgradTask {
  DirectSource x, g;
  TileTask x_tile, g_tile;
  int n, c, k, p;  // images; channels of a group; rows of an output plane
  int pad_h, pad_w;
  float* partial;  // [slices][groups * k * c * F * F, then groups * k of the bias]
  int weights, biases;
  bool wants_bias;
  // the plan
  int k_tiles, rows, quads, lanes, chunks, slices, units, g_floats, scratch_pitch, blocks = 0, threads;
  Divisor k_blocks, groups;             // blockIdx, with the slices in front
  Divisor col_blocks, row_blocks;       // chunks, with the images in front
  Divisor by_lanes, channels, by_rows;  // threadIdx, with the k tiles in front; rows of a chunk

  WgradTask() = default;
  WgradTask(const DirectShape& s, const WgradPlan& p, const ConvArgs& a, const DirectSource& g,
            bool wants_bias, void* workspace)
      : x(a.x, a.shape.H, a.shape.W, a.dtype),
        g(g),
        x_tile(p.x, x),
        g_tile(p.g, g),
        n(static_cast<int>(s.n)),
        c(static_cast<int>(s.c)),
        k(static_cast<int>(s.k)),
        p(static_cast<int>(s.p)),
        pad_h(static_cast<int>(a.shape.padding.h)),
        pad_w(static_cast<int>(a.shape.padding.w)),
        partial(static_cast<float*>(workspace)),
        weights(static_cast<int>(s.groups * s.k * s.c) * s.filter * s.filter),
        biases(static_cast<int>(s.groups * s.k)),
        wants_bias(wants_bias),
        k_tiles(static_cast<int>(p.k_tiles)),
        rows(static_cast<int>(p.rows)),
        quads(static_cast<int>(p.quads)),
        lanes(static_cast<int>(p.lanes)),
        chunks(static_cast<int>(p.chunks())),
        slices(static_cast<int>(p.slices)),
        units(static_cast<int>(p.units(s))),
        g_floats(static_cast<int>(p.g_floats(s))),
        scratch_pitch(static_cast<int>(p.scratch_pitch(s))),
        blocks(static_cast<int>(p.blocks(s))),
        threads(static_cast<int>(p.threads(s))),
        k_blocks(p.k_blocks),
        groups(s.groups),
        col_blocks(p.col_blocks),
        row_blocks(p.row_blocks),
        by_lanes(p.lanes),
        channels(s.c),
        by_rows(p.rows) {}

  SliceSums<float> slice_sums(int filter, const View& grad_w, void* grad_b) const {
    const int pitch = weights + biases;
    return {partial, slices, pitch, grad_b ? pitch : weights, weights, c, filter, filter, grad_w, grad_b};
  }
};

// Adds one row of the output to the sums of a thread: x is the row of its channel under the filter's first
// row, g the row of its first output channel.
template <int F>
__device__ __forceinline__ void add_row(const WgradTask& t, const float* x, const float* g,
                                        float (&sums)[F][F][wgrad_channels(F)],
                                        float (&bias)[wgrad_channels(F)], bool adds_bias) {
  constexpr int kChannels = wgrad_channels(F), kSpan = 4 + F - 1;
  const int g_plane = t.g_tile.h * t.g_tile.pitch;
#pragma unroll 1
  for (int quad = 0; quad < t.quads; ++quad) {
    float grad[kChannels][4];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) load_shared<4>(grad[k], g + k * g_plane);
    if (adds_bias) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) bias[k] += (grad[k][0] + grad[k][1]) + (grad[k][2] + grad[k][3]);
    }
#pragma unroll
    for (int r = 0; r < F; ++r) {
      float span[kSpan];
      load_shared<4>(span, x + r * t.x_tile.pitch);
#pragma unroll
      for (int s = 0; s < F; ++s)
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[r][s][k] += span[s + i] * grad[k][i];
    }
    x += 4, g += 4;
  }
}

// Element e of [units][kCount] over the lanes, in order; scratch: [lanes][units][pitch].
template <int kCount, class Write>
__device__ __forceinline__ void add_lanes(const float* scratch, const WgradTask& t, const Write& write) {
  for (int i = threadIdx.x; i < t.units * kCount; i += blockDim.x) {
    const int unit = i / kCount, e = i % kCount;
    float sum = 0;
    for (int lane = 0; lane < t.lanes; ++lane) sum += scratch[(lane * t.units + unit) * t.scratch_pitch + e];
    write(unit, e, sum);
  }
}

// `kOverlaps`: a 3x3 pool may follow.
template <class T, int F, bool kOverlaps>
__device__ __forceinline__ void wgrad_block(const WgradTask& t, int block, float* x_tile, float* g_tile) {
  constexpr int kChannels = wgrad_channels(F);
  const int k_block = t.k_blocks.pop(block), group = t.groups.pop(block), slice = block;
  const int first_k = k_block * t.k_tiles * kChannels;

  int unit = threadIdx.x;
  const int lane = t.by_lanes.pop(unit);
  const bool works = unit < t.units;
  const int c = works ? unit - t.channels.divide(unit) * t.c : 0,
            k_tile = works ? t.channels.divide(unit) : 0;

  float sums[F][F][kChannels] = {}, bias[kChannels] = {};
  for (int chunk = slice; chunk < t.chunks; chunk += t.slices) {
    int image_block = chunk;
    const int first_q = t.col_blocks.pop(image_block) * t.quads * 4;
    const int first_p = t.row_blocks.pop(image_block) * t.rows, first_n = image_block * t.x_tile.images;
    const int images = min(t.x_tile.images, t.n - first_n);
    if (chunk != slice) __syncthreads();
    fill_tile<T, 2, false>(x_tile, t.x, t.x_tile,
                           {first_n, group * t.c, first_p - t.pad_h, first_q - t.pad_w, images, t.c});
    fill_tile<T, 2, kOverlaps>(g_tile, t.g, t.g_tile,
                               {first_n, group * t.k + first_k, first_p, first_q, images, t.k - first_k});
    __syncthreads();
    if (!works) continue;
    for (int i = lane; i < images * t.rows; i += t.lanes) {
      const int image = t.by_rows.divide(i), row = i - image * t.rows;
      if (first_p + row >= t.p) continue;
      add_row<F>(
          t, x_tile + ((image * t.c + c) * t.x_tile.h + row) * t.x_tile.pitch,
          g_tile + ((image * t.g_tile.channels + k_tile * kChannels) * t.g_tile.h + row) * t.g_tile.pitch,
          sums, bias, t.wants_bias && c == 0);
    }
  }

  // The lanes' sums, a row of the filter at a time, where the gradients were.
  float* partial = t.partial + int64_t(slice) * (t.weights + t.biases);
  float* mine = g_tile + (lane * t.units + unit) * t.scratch_pitch;
#pragma unroll
  for (int r = 0; r < F; ++r) {
    __syncthreads();
    if (works) {
#pragma unroll
      for (int s = 0; s < F; ++s)
#pragma unroll
        for (int k = 0; k < kChannels; ++k) mine[k * F + s] = sums[r][s][k];
    }
    __syncthreads();
    add_lanes<kChannels * F>(g_tile, t, [&](int unit, int e, float sum) {
      const int tile = t.channels.divide(unit), c = unit - tile * t.c, k = first_k + tile * kChannels + e / F;
      if (k < t.k) partial[(((group * t.k + k) * t.c + c) * F + r) * F + e % F] = sum;
    });
  }
  if (!t.wants_bias) return;
  __syncthreads();
  if (works) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) mine[k] = bias[k];
  }
  __syncthreads();
  add_lanes<kChannels>(g_tile, t, [&](int unit, int e, float sum) {
    const int tile = t.channels.divide(unit), k = first_k + tile * kChannels + e;
    if (unit == tile * t.c && k < t.k) partial[t.weights + group * t.k + k] = sum;
  });
}

}  // namespace fastconv::cuda
