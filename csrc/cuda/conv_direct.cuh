// SPDX-License-Identifier: MIT
// What the direct convolutions share: tiles of tensors in shared memory, padded by zeros, and the block that
// convolves one. conv_direct.cu has the picture.
#pragma once

#include "core/naive.h"
#include "cuda/conv_direct.h"
#include "cuda/pool.cuh"

namespace fastconv::cuda {

// A tensor that is read into tiles: x itself, or the gradient at a convolution's output, which is made of
// that at the output of the ReLU and the pool behind it.
struct DirectSource {
  Planes x;
  Extent2 in;      // of x
  int vector = 1;  // elements along w that one access takes, where w is a multiple of it
  // Gradients only: x is zero where gate <= 0; behind a 2x2/2 or 3x3/2 pool an element belongs to the cell of
  // its window that `offsets` name.
  bool is_gradient = false;
  int window = 1, top = 0, left = 0;  // the pool's kernel and padding
  Planes gate, offsets;

  DirectSource() = default;
  DirectSource(const View& v, int64_t h, int64_t w, Dtype dtype) : x(v), in(Extent3{1, h, w}) {
    for (const int64_t each : {2, 4})
      if (v.w == 1 && is_aligned(v, &View::w, dtype_size(dtype), each)) vector = static_cast<int>(each);
  }

  // Of the block's output; a.grad_y is what is read.
  static DirectSource gradient(const ConvActPoolBackwardArgs& a) {
    const Epilogue& e = a.conv.epilogue;
    const ConvShape& s = a.conv.shape;
    DirectSource g(a.grad_y, e.pools() ? e.pool.out.h : s.P, e.pools() ? e.pool.out.w : s.Q, a.conv.dtype);
    g.window = static_cast<int>(e.pools() ? e.pool.kernel.h : 1);
    g.top = static_cast<int>(e.pool.padding.h), g.left = static_cast<int>(e.pool.padding.w);
    g.is_gradient = g.window > 1 || e.act == Act::relu;
    if (e.act == Act::relu) g.gate = Planes(a.conv.y);
    if (g.window > 1) g.offsets = Planes(e.offsets);
    return g;
  }
};

// A DirectTile, as a kernel fills it.
struct TileTask {
  int images, channels, h, w, pitch, floats;
  Divisor row_vectors, rows, planes;  // to fill it with x
  int gradient_h, gradient_w;         // gradients that may lie in it, behind no pool or a 2x2 pool
  Divisor gradient_cols, gradient_rows;

  TileTask() = default;
  TileTask(const DirectTile& t, const DirectSource& source)
      : images(static_cast<int>(t.images)),
        channels(static_cast<int>(t.channels)),
        h(static_cast<int>(t.h)),
        w(static_cast<int>(t.w)),
        pitch(static_cast<int>(t.pitch())),
        floats(static_cast<int>(t.floats())),
        row_vectors(t.pitch() / 4),
        rows(t.h),
        planes(t.channels),
        gradient_h(source.window > 1 ? h / 2 + 1 : h),
        gradient_w(source.window > 1 ? w / 2 + 1 : w),
        gradient_cols(gradient_w),
        gradient_rows(gradient_h) {}
};

// The corner of a tile: image, channel, row and column; rows and columns may lie outside.
struct TilePlace {
  int n, c, h, w;
  int images, channels;  // that are there; the rest of the tile is zero
};

// Four neighbours of a row, zero outside of it.
template <class T>
__device__ __forceinline__ void load_four(float (&v)[4], const T* row, int w, int stride, int extent,
                                          int vector) {
  if (vector == 4 && w % 4 == 0 && w >= 0 && w + 4 <= extent) {
    T run[4];
    load_run(run, row + w);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = run[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const int first = w + i;
    if (vector >= 2 && w % 2 == 0 && first >= 0 && first + 2 <= extent) {
      T run[2];
      load_run(run, row + first);
      v[i] = run[0], v[i + 1] = run[1];
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (first + j >= 0 && first + j < extent) v[i + j] = row[(first + j) * stride];
    }
  }
}

template <class T, int kAhead>
__device__ __forceinline__ void fill_with_input(float* tile, const DirectSource& s, const TileTask& t,
                                                const TilePlace& at) {
  const int threads = blockDim.x, vectors = t.floats / 4;
  for (int begin = threadIdx.x; begin < vectors; begin += kAhead * threads) {
    float v[kAhead][4] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      int i = begin + a * threads;
      if (i >= vectors) continue;
      const int w = at.w + 4 * t.row_vectors.pop(i), h = at.h + t.rows.pop(i), c = t.planes.pop(i);
      if (h < 0 || h >= s.in.h || c >= at.channels || i >= at.images) continue;
      load_four(v[a], s.x.plane<const T>(at.n + i, at.c + c) + h * s.x.h, w, s.x.w, s.in.w, s.vector);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (begin + a * threads < vectors) store_run(tile + 4 * (begin + a * threads), v[a]);
  }
}

// Each gradient goes to one element; its window's others stay zero.
template <class T>
__device__ __forceinline__ void fill_with_gradient(float* tile, const DirectSource& s, const TileTask& t,
                                                   const TilePlace& at) {
  const int threads = blockDim.x, step = s.window;
  const int gradients = t.images * t.channels * t.gradient_h * t.gradient_w;
  const int first_h = (at.h - (at.h & (step - 1))) / step, first_w = (at.w - (at.w & (step - 1))) / step;
  const float zeros[4] = {};
  for (int i = threadIdx.x; i < t.floats / 4; i += threads) store_run(tile + 4 * i, zeros);
  __syncthreads();
  for (int each = threadIdx.x; each < gradients; each += threads) {
    int i = each;
    const int w = first_w + t.gradient_cols.pop(i), h = first_h + t.gradient_rows.pop(i);
    const int c = t.planes.pop(i), n = at.n + i;
    if (h < 0 || h >= s.in.h || w < 0 || w >= s.in.w || c >= at.channels || i >= at.images) continue;
    const float value = s.x.plane<const T>(n, at.c + c)[h * s.x.h + w * s.x.w];
    if (s.gate.data && s.gate.plane<const T>(n, at.c + c)[h * s.gate.h + w * s.gate.w] <= T(0.f)) continue;
    const int cell =
        step > 1 ? s.offsets.plane<const uint8_t>(n, at.c + c)[h * s.offsets.h + w * s.offsets.w] : 0;
    const int row = step * h + cell / 2 - at.h, col = step * w + cell % 2 - at.w;
    if (row >= 0 && row < t.h && col >= 0 && col < t.w)
      tile[((i * t.channels + c) * t.h + row) * t.pitch + col] = value;
  }
}

// Behind a 3x3/2 pool up to four windows meet in an element, each of which may name it.
template <class T>
__device__ __forceinline__ void fill_with_overlaps(float* tile, const DirectSource& s, const TileTask& t,
                                                   const TilePlace& at) {
  for (int each = threadIdx.x; each < t.floats; each += blockDim.x) {
    int i = each / 4;
    const int col = at.w + s.left + 4 * t.row_vectors.pop(i) + each % 4;
    const int row = at.h + s.top + t.rows.pop(i), c = t.planes.pop(i);
    float sum = 0;
    if (c < at.channels && i < at.images) {
      const T* x = s.x.plane<const T>(at.n + i, at.c + c);
      const T* gate = s.gate.plane<const T>(at.n + i, at.c + c);
      const uint8_t* offsets = s.offsets.plane<const uint8_t>(at.n + i, at.c + c);
      for (int h = max((row - 1) / 2, 0); h <= row / 2 && h < s.in.h; ++h)
        for (int w = max((col - 1) / 2, 0); w <= col / 2 && w < s.in.w; ++w) {
          const int cell = (row - 2 * h) * 3 + col - 2 * w;
          if (row < 0 || col < 0 || offsets[h * s.offsets.h + w * s.offsets.w] != cell) continue;
          if (s.gate.data && gate[h * s.gate.h + w * s.gate.w] <= T(0.f)) continue;
          sum += float(x[h * s.x.h + w * s.x.w]);
        }
    }
    tile[each] = sum;
  }
}

// All threads call it; a barrier must follow. A thread has kAhead loads of x under way. `kOverlaps`: a 3x3
// pool may be behind s.
template <class T, int kAhead, bool kOverlaps = true>
__device__ __forceinline__ void fill_tile(float* tile, const DirectSource& s, const TileTask& t,
                                          const TilePlace& at) {
  if constexpr (kOverlaps)
    if (s.window == 3) return fill_with_overlaps<T>(tile, s, t, at);
  if (s.is_gradient) return fill_with_gradient<T>(tile, s, t, at);
  fill_with_input<T, kAhead>(tile, s, t, at);
}

// kCount neighbours from shared memory by accesses of at most kVector.
template <int kVector, int kCount>
__device__ __forceinline__ void load_shared(float (&v)[kCount], const float* p) {
  static_assert(kVector == 4 || kVector == 2);
  constexpr int kFours = kVector == 4 ? kCount / 4 * 4 : 0;
#pragma unroll
  for (int i = 0; i < kFours; i += 4) {
    const float4 four = ld<float4>(p + i);
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
  }
#pragma unroll
  for (int i = kFours; i < kCount; i += 2) {
    const float2 two = ld<float2>(p + i);
    v[i] = two.x, v[i + 1] = two.y;
  }
}

// The filter of a DirectShape: offset of output channel k, input channel c, row r, column s.
struct DirectFilter {
  const void* data;
  int group, k, c, r, s;
};

struct DirectTask {
  DirectSource x;
  TileTask tile;
  DirectFilter filter;
  int n, c, k;  // images; channels of a group
  int p, q;     // pixels of an output plane, with a pool those that it reads
  int pad_h, pad_w;
  const void* bias;  // or null
  bool relu, pools, overlaps;
  bool y_vectors;  // y, and offsets, may be written in vectors
  Planes y, offsets;
  // the plan
  int blocks, threads, patches, splits;
  int tile_floats, filter_floats;
  Divisor k_blocks, col_blocks, row_blocks, image_blocks;  // blockIdx, with the groups in front
  Divisor cols, rows, images, k_tiles;                     // threadIdx, with the splits in front
  int block_k, block_cols, block_rows;                     // from one block to the next: channels, pixels
  Divisor taps;                                            // of a k tile in shared memory
  // A 3x3 pool: its output and padding; what of the convolution a block has in shared memory, a channel
  // [h][w]; what it makes of that.
  int pooled_h = 0, pooled_w = 0, top = 0, left = 0, filtered_h = 0, filtered_w = 0;
  Divisor pooled_cols, pooled_rows, pooled_channels;

  DirectTask(const DirectShape& s, const DirectPlan& p, const DirectSource& x, Dtype dtype, const View& y,
             const Epilogue& e = {})
      : x(x),
        tile(p.tile, x),
        n(static_cast<int>(s.n)),
        c(static_cast<int>(s.c)),
        k(static_cast<int>(s.k)),
        p(static_cast<int>(s.p)),
        q(static_cast<int>(s.q)),
        bias(e.bias),
        relu(e.act == Act::relu),
        pools(pools_2x2(e)),
        overlaps(s.overlaps),
        y(y),
        offsets(e.offsets),
        blocks(static_cast<int>(p.blocks(s))),
        threads(static_cast<int>(p.threads())),
        patches(static_cast<int>(p.patches())),
        splits(static_cast<int>(p.splits)),
        tile_floats(static_cast<int>(p.tile_floats())),
        filter_floats(static_cast<int>(p.filter_floats(s))),
        k_blocks(p.k_blocks),
        col_blocks(p.col_blocks),
        row_blocks(p.row_blocks),
        image_blocks(p.image_blocks),
        cols(p.cols),
        rows(p.rows),
        images(p.images),
        k_tiles(p.k_tiles),
        block_k(static_cast<int>(p.k_tiles) *
                (p.wide ? DirectPatch4x6::kChannels : DirectPatch2x8::kChannels)),
        block_cols(static_cast<int>(p.cols) * (p.wide ? DirectPatch4x6::kCols : DirectPatch2x8::kCols)),
        block_rows(static_cast<int>(p.rows) * 2),
        taps(p.tile.channels * s.filter * s.filter) {
    const int64_t run = (p.wide ? DirectPatch4x6::kCols : DirectPatch2x8::kCols) / (pools ? 2 : 1);
    y_vectors = y.w == 1 && is_aligned(y, &View::w, dtype_size(dtype), run);
    if (e.offsets.data) y_vectors = y_vectors && e.offsets.w == 1 && is_aligned(e.offsets, &View::w, 1, run);
    if (!overlaps) return;
    pooled_h = static_cast<int>(e.pool.out.h), pooled_w = static_cast<int>(e.pool.out.w);
    top = static_cast<int>(e.pool.padding.h), left = static_cast<int>(e.pool.padding.w);
    filtered_h = block_rows, filtered_w = block_cols;
    block_rows -= 2, block_cols -= 2;
    pooled_rows = Divisor(block_rows / 2), pooled_cols = Divisor(block_cols / 2);
    pooled_channels = Divisor(block_k);
  }

  size_t shared_bytes() const {
    return smem_take<float>(smem_take<float>(0, static_cast<size_t>(tile_floats)),
                            static_cast<size_t>(filter_floats));
  }
};

// The filter over tile.channels channels from first_c on: [k tile][tap][kDirectFilterPitch], zero beyond the
// group's channels.
template <class T, int F, class Patch>
__device__ __forceinline__ void fill_filter(float* filter, const DirectTask& t, int group, int first_k,
                                            int first_c) {
  const T* w = static_cast<const T*>(t.filter.data) + group * t.filter.group;
  for (int i = threadIdx.x; i < t.filter_floats; i += blockDim.x) {
    const int j = i % kDirectFilterPitch;
    int tap = i / kDirectFilterPitch;
    const int tile = t.taps.divide(tap), k = first_k + tile * Patch::kChannels + j;
    tap -= tile * t.tile.channels * F * F;
    const int c = first_c + tap / (F * F), r = tap / F % F, s = tap % F;
    filter[i] = j < Patch::kChannels && k < t.k && c < t.c
                    ? float(w[k * t.filter.k + c * t.filter.c + r * t.filter.r + s * t.filter.s])
                    : 0;
  }
}

// Adds channels first, first + step, ... to the sums of a patch; x is its corner in the tile, whose channels
// and rows begin so many numbers apart.
template <int F, class Patch>
__device__ __forceinline__ void convolve(const float* x, int channel, int pitch, const float* filter,
                                         int first, int step, int channels, float (&sums)[Patch::kValues]) {
  constexpr int kSpan = Patch::kCols + F - 1;
  for (int c = first; c < channels; c += step) {
    const float* row = x + c * channel;
    const float* taps = filter + c * F * F * kDirectFilterPitch;
#pragma unroll 1
    for (int r = 0; r < F; ++r) {
      float span[Patch::kRows][kSpan];
#pragma unroll
      for (int i = 0; i < Patch::kRows; ++i) load_shared<Patch::kCols>(span[i], row + i * pitch);
#pragma unroll
      for (int s = 0; s < F; ++s) {
        float w[Patch::kChannels];
        load_shared<4>(w, taps + s * kDirectFilterPitch);
#pragma unroll
        for (int i = 0; i < Patch::kRows; ++i)
#pragma unroll
          for (int j = 0; j < Patch::kCols; ++j)
#pragma unroll
            for (int k = 0; k < Patch::kChannels; ++k) sums[Patch::at(i, j, k)] += span[i][j + s] * w[k];
      }
      row += pitch;
      taps += F * kDirectFilterPitch;
    }
  }
}

// Writes kCount neighbours of a row, as far as they lie inside.
template <class T, int kCount, class Value>
__device__ __forceinline__ void store_inside(T* row, int w, int stride, int extent, bool vectors,
                                             const Value (&values)[kCount]) {
  if (vectors && w + kCount <= extent) return store_run(row + w, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (w + i < extent) row[(w + i) * stride] = T(values[i]);
}

// Bias, ReLU, pool of a patch's sums of channel k, stored. (p, q) is its first pixel.
template <class T, class Patch>
__device__ __forceinline__ void finish(const DirectTask& t, int n, int k, int p, int q,
                                       const float (&sums)[Patch::kRows][Patch::kCols]) {
  const float bias = t.bias ? float(static_cast<const T*>(t.bias)[k]) : 0;
  const Act act = t.relu ? Act::relu : Act::none;
  float values[Patch::kRows][Patch::kCols];
#pragma unroll
  for (int i = 0; i < Patch::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Patch::kCols; ++j) values[i][j] = naive::activate(sums[i][j] + bias, act);
  T* y = t.y.plane<T>(n, k);
  if (!t.pools) {
#pragma unroll
    for (int i = 0; i < Patch::kRows; ++i)
      if (p + i < t.p) store_inside(y + (p + i) * t.y.h, q, t.y.w, t.q, t.y_vectors, values[i]);
    return;
  }
  constexpr int kPooled = Patch::kCols / 2;
  float best[kPooled];
  int offset[kPooled];
#pragma unroll
  for (int j = 0; j < kPooled; ++j) {
    best[j] = -HUGE_VALF, offset[j] = 0;
#pragma unroll
    for (int cell = 0; cell < 4; ++cell) {
      const float value = narrow<T>(values[cell / 2][2 * j + cell % 2]);  // equal where the stored are
      take_larger(value, cell, true, best[j], offset[j]);
    }
  }
  const int h = p / 2, w = q / 2;
  store_inside(y + h * t.y.h, w, t.y.w, t.q / 2, t.y_vectors, best);
  if (t.offsets.data)
    store_inside(t.offsets.plane<uint8_t>(n, k) + h * t.offsets.h, w, t.offsets.w, t.q / 2, t.y_vectors,
                 offset);
}

// The place of a thread's patch in its block, and of the block.
struct DirectPlace {
  bool works;
  int image, k_tile, row, col;             // patches
  int first_n, first_k, first_p, first_q;  // the block's corner
};

// The same behind a 3x3/2 pool, whose windows meet several patches: by way of shared memory, where the tile
// was. All threads call it.
template <class T, class Patch>
__device__ __forceinline__ void finish_overlaps(const DirectTask& t, float* filtered, const DirectPlace& at,
                                                int group, const float (&sums)[Patch::kValues]) {
  const Act act = t.relu ? Act::relu : Act::none;
  __syncthreads();
  if (at.works) {
#pragma unroll
    for (int j = 0; j < Patch::kChannels; ++j) {
      const int channel = at.k_tile * Patch::kChannels + j, k = group * t.k + at.first_k + channel;
      if (at.first_k + channel >= t.k) continue;
      const float bias = t.bias ? float(static_cast<const T*>(t.bias)[k]) : 0;
      float* corner = filtered + (at.image * t.block_k + channel) * t.filtered_h * t.filtered_w +
                      at.row * Patch::kRows * t.filtered_w + at.col * Patch::kCols;
#pragma unroll
      for (int r = 0; r < Patch::kRows; ++r)
#pragma unroll
        for (int s = 0; s < Patch::kCols; ++s)
          corner[r * t.filtered_w + s] =
              float(narrow<T>(naive::activate(sums[Patch::at(r, s, j)] + bias, act)));
    }
  }
  __syncthreads();
  const int outputs = t.tile.images * t.block_k * t.block_rows * t.block_cols / 4;
  for (int each = threadIdx.x; each < outputs; each += blockDim.x) {
    int image = each;
    const int col = t.pooled_cols.pop(image), row = t.pooled_rows.pop(image);
    const int channel = t.pooled_channels.pop(image), n = at.first_n + image;
    const int h = (at.first_p + t.top) / 2 + row, w = (at.first_q + t.left) / 2 + col;
    if (n >= t.n || at.first_k + channel >= t.k || h >= t.pooled_h || w >= t.pooled_w) continue;
    const float* window =
        filtered + ((image * t.block_k + channel) * t.filtered_h + 2 * row) * t.filtered_w + 2 * col;
    float best = -HUGE_VALF;
    int best_cell = -1;
#pragma unroll
    for (int cell = 0; cell < 9; ++cell) {
      const int p = at.first_p + 2 * row + cell / 3, q = at.first_q + 2 * col + cell % 3;
      if (p < 0 || p >= t.p || q < 0 || q >= t.q) continue;
      if (best_cell < 0) best_cell = cell;  // though it were -inf
      take_larger(window[cell / 3 * t.filtered_w + cell % 3], cell, true, best, best_cell);
    }
    const int k = group * t.k + at.first_k + channel;
    t.y.plane<T>(n, k)[h * t.y.h + w * t.y.w] = T(best);
    if (t.offsets.data)
      t.offsets.plane<uint8_t>(n, k)[h * t.offsets.h + w * t.offsets.w] = static_cast<uint8_t>(best_cell);
  }
}

// Adds the sums of the threads that share a patch to those of the first, in order. All threads call it.
template <class Patch>
__device__ __forceinline__ void add_splits(const DirectTask& t, float* scratch, int split, bool works,
                                           float (&sums)[Patch::kValues]) {
  constexpr int kPitch = Patch::kValues + kDirectSumsPad;
  float* others = scratch + (static_cast<int>(threadIdx.x) - t.patches) * kPitch;  // of split 1 or more
  __syncthreads();
  if (works && split > 0) store_run(others, sums);
  __syncthreads();
  if (!works || split > 0) return;
  for (int other = 1; other < t.splits; ++other) {
    others += t.patches * kPitch;
#pragma unroll
    for (int i = 0; i < Patch::kValues; i += 4) {
      float four[4];
      load_shared<4>(four, others + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i + j] += four[j];
    }
  }
}

// One block of the convolution; all its threads call it. `kOverlaps`: a 3x3 pool may follow.
template <class T, int F, class Patch, bool kOverlaps>
__device__ __forceinline__ void convolve_block(const DirectTask& t, int block, float* tile, float* filter) {
  const int k_block = t.k_blocks.pop(block), col_block = t.col_blocks.pop(block);
  const int row_block = t.row_blocks.pop(block), image_block = t.image_blocks.pop(block), group = block;
  const int first_k = k_block * t.block_k, first_n = image_block * t.tile.images;
  const int first_p = row_block * t.block_rows - t.top, first_q = col_block * t.block_cols - t.left;

  int unit = threadIdx.x;
  const int col = t.cols.pop(unit), row = t.rows.pop(unit), image = t.images.pop(unit);
  const int k_tile = t.k_tiles.pop(unit), split = unit;
  const int p = first_p + row * Patch::kRows, q = first_q + col * Patch::kCols, n = first_n + image;
  const int k = first_k + k_tile * Patch::kChannels;
  const bool works = split < t.splits && n < t.n && p < t.p && q < t.q && k < t.k;
  const float* corner =
      tile + (image * t.tile.channels * t.tile.h + row * Patch::kRows) * t.tile.pitch + col * Patch::kCols;
  const float* my_filter = filter + k_tile * t.tile.channels * F * F * kDirectFilterPitch;

  float sums[Patch::kValues] = {};
  for (int c = 0; c < t.c; c += t.tile.channels) {
    const int channels = min(t.tile.channels, t.c - c);
    if (c > 0) __syncthreads();
    fill_filter<T, F, Patch>(filter, t, group, first_k, c);
    fill_tile<T, 2>(tile, t.x, t.tile,
                    {first_n, group * t.c + c, first_p - t.pad_h, first_q - t.pad_w,
                     min(t.tile.images, t.n - first_n), channels});
    __syncthreads();
    if (works)
      convolve<F, Patch>(corner, t.tile.h * t.tile.pitch, t.tile.pitch, my_filter, split, t.splits, channels,
                         sums);
  }
  if (t.splits > 1) add_splits<Patch>(t, tile, split, works, sums);
  if constexpr (kOverlaps)
    if (t.overlaps)
      return finish_overlaps<T, Patch>(
          t, tile, {works && split == 0, image, k_tile, row, col, first_n, first_k, first_p, first_q}, group,
          sums);
  if (!works || split > 0) return;
#pragma unroll
  for (int j = 0; j < Patch::kChannels; ++j) {
    if (k + j >= t.k) continue;
    float of_channel[Patch::kRows][Patch::kCols];
#pragma unroll
    for (int r = 0; r < Patch::kRows; ++r)
#pragma unroll
      for (int s = 0; s < Patch::kCols; ++s) of_channel[r][s] = sums[Patch::at(r, s, j)];
    finish<T, Patch>(t, n, group * t.k + k + j, p, q, of_channel);
  }
}

// dgrad of stride 1 as a convolution of the gradient x with the filter turned around; y is grad_x.
inline DirectTask direct_dgrad_task(const ConvArgs& a, const DirectPlan& plan, const DirectSource& x,
                                    const View& grad_x) {
  const ConvShape& s = a.shape;
  DirectTask t(direct_dgrad(s), plan, x, a.dtype, grad_x);
  const int64_t item = dtype_size(a.dtype), last = (s.R - 1) * a.w.h + (s.S - 1) * a.w.w;
  t.filter = {static_cast<const char*>(a.w.data) + last * item,
              static_cast<int>(s.group_k() * a.w.n),
              static_cast<int>(a.w.c),
              static_cast<int>(a.w.n),
              static_cast<int>(-a.w.h),
              static_cast<int>(-a.w.w)};
  t.pad_h = static_cast<int>(s.R - 1 - s.padding.h);
  t.pad_w = static_cast<int>(s.S - 1 - s.padding.w);
  return t;
}

// Launches one (conv_direct.cu); `wide` is the plan's.
void launch_direct(const ConvArgs& a, const DirectTask& t, bool wide, void* stream);

// Calls f(null pointer of the element type, integral_constant of the filter's extent).
template <class F>
void with_dtype_and_filter(const ConvArgs& a, F&& f) {
  with_dtype(a.dtype, [&](auto* element) {
    if constexpr (!std::is_same_v<decltype(element), double*>) {
      if (a.shape.R == 5) return f(element, std::integral_constant<int, 5>());
      f(element, std::integral_constant<int, 3>());
    }
  });
}

}  // namespace fastconv::cuda
