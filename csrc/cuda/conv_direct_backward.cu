// SPDX-License-Identifier: MIT
// wgrad for few input channels, stride 1, filters 3x3 and 5x5, with the bias gradient; alone, or fused:
// behind a ReLU and a 2x2 max-pool, and with dgrad (conv_direct.cuh's block) in the same launch.
//
//   gradient tile     x tile, with halo    A block holds rows of some images in shared memory, and a thread
//     +-----------+   +--------------+     all taps of one input channel and 3 (5x5) or 8 (3x3) output
//   k | g g g g . | c | x x x x x .. |     channels in registers. It walks along its rows, four columns at a
//     +-----------+   +--------------+     time: a vector of g for each output channel, two of x for each
//        row + r: the rows of x under g    row of the filter.
//
// A gradient behind a pool goes to the cell that its offset names, in a tile of zeros: the gradient at the
// convolution's output is never stored. The threads' sums are added by rows, then over the lanes through
// shared memory, to one partial sum a block; a second kernel adds the blocks' in order. No atomics.
//
// LeNet in float32 on an H200, microseconds without launches, as in conv_direct.cu:
//                          MFLOP    KB   floor at 256, 8192     predicted
//     conv1, ReLU, pool     0.24    14       0.9    29         3.6     76
//     conv2, ReLU, pool     0.48   8.7       1.8    59         4.8    127
// Where it loses: 18 of 16 channels, 12 of 10 columns (conv2), 56 of 64 threads (conv1). At most 168
// registers and 40 KB a block of at most 192 threads: 12 warps a multiprocessor, each with 75 sums under way.
// Not yet run on a GPU. Next: a pool's gradients in vectors, two cells a thread; tensor cores for 16 bits.
#include "cuda/conv_direct.cuh"
#include "cuda/slices.cuh"

namespace fastconv::cuda {

namespace {

struct WgradTask {
  DirectSource x, g;
  TileTask x_tile, g_tile;
  int n, c, k, p;  // images; channels of a group; rows of an output plane
  int pad_h, pad_w;
  float* partial;  // [slices][groups * k * c * F * F, then groups * k of the bias]
  int weights, biases;
  bool wants_bias;
  // the plan
  int k_tiles, rows, quads, lanes, chunks, slices, units, g_floats, scratch_pitch, blocks, threads;
  Divisor k_blocks, groups;             // blockIdx, with the slices in front
  Divisor col_blocks, row_blocks;       // chunks, with the images in front
  Divisor by_lanes, channels, by_rows;  // threadIdx, with the k tiles in front; rows of a chunk

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

template <class T, int F>
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
    fill_tile<T, 2>(x_tile, t.x, t.x_tile,
                    {first_n, group * t.c, first_p - t.pad_h, first_q - t.pad_w, images, t.c});
    fill_tile<T, 2>(g_tile, t.g, t.g_tile,
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

struct BackwardTask {
  WgradTask wgrad;
  DirectTask dgrad;
  int blocks = 0, threads = 0;
  int first_floats = 0, second_floats = 0;  // of shared memory: the tile of x, that of the gradient; or
                                            // the tile of the gradient, the filter
  // `d` may have no blocks.
  BackwardTask(const WgradTask& w, const DirectTask& d) : wgrad(w), dgrad(d) {
    grow(w.blocks, w.threads, w.x_tile.floats, w.g_floats);
    if (d.blocks) grow(d.blocks, d.threads, d.tile_floats, d.filter_floats);
  }

  void grow(int more_blocks, int least_threads, int first, int second) {
    blocks += more_blocks;
    threads = std::max(threads, least_threads);
    first_floats = std::max(first_floats, first), second_floats = std::max(second_floats, second);
  }
};

// wgrad and dgrad side by side: neither needs the other. The first blocks are wgrad's.
template <class T, int F>
__global__ void __launch_bounds__(kBackwardThreads, 2) conv_backward_direct_kernel(const BackwardTask t) {
  FC_DYN_SMEM(shared);
  float* first = shared.take<float>(t.first_floats);
  float* second = shared.take<float>(t.second_floats);
  const int block = blockIdx.x;
  if (block < t.wgrad.blocks)
    wgrad_block<T, F>(t.wgrad, block, first, second);
  else
    convolve_block<T, F, DirectPatch2x8>(t.dgrad, block - t.wgrad.blocks, first, second);
}

// Writes those of grad_x and grad_w that have data; reads a.x and a.w.
void conv_backward(const ConvArgs& a, const DirectSource& g, const View& grad_x, const View& grad_w,
                   void* grad_b, void* workspace, void* stream) {
  const DirectShape wgrad_shape = direct_wgrad(a.shape), dgrad_shape = direct_dgrad(a.shape);
  const bool joins = grad_x.data && grad_w.data && dgrad_joins_wgrad(dgrad_shape);
  if (grad_x.data && !joins) {
    const DirectPlan plan = plan_direct(dgrad_shape);
    launch_direct(a, direct_dgrad_task(a, plan, g, grad_x), plan.wide, stream);
  }
  if (!grad_w.data) return;
  const WgradTask wgrad(wgrad_shape, plan_wgrad(wgrad_shape), a, g, grad_b != nullptr, workspace);
  DirectTask dgrad = direct_dgrad_task(a, joins ? plan_joined_dgrad(dgrad_shape) : DirectPlan(), g, grad_x);
  if (!joins) dgrad.blocks = 0;
  const BackwardTask t(wgrad, dgrad);
  with_dtype_and_filter(a, [&](auto* element, auto extent) {
    using T = std::remove_pointer_t<decltype(element)>;
    const size_t bytes = smem_take<float>(smem_take<float>(0, static_cast<size_t>(t.first_floats)),
                                          static_cast<size_t>(t.second_floats));
    launch(conv_backward_direct_kernel<T, extent()>, dim3(static_cast<unsigned>(t.blocks)),
           dim3(static_cast<unsigned>(t.threads)), bytes, stream, t);
    const int pitch = wgrad.weights + wgrad.biases, elements = grad_b ? pitch : wgrad.weights;
    add_slices<T>(SliceSums<float>{wgrad.partial, wgrad.slices, pitch, elements, wgrad.weights, wgrad.c,
                                   extent(), extent(), grad_w, grad_b},
                  stream);
  });
}

}  // namespace

void conv_wgrad_direct(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  conv_backward(a, DirectSource(a.y, s.P, s.Q, a.dtype), View{}, a.w, a.bias_grad, workspace, stream);
}

void conv_act_pool_backward_direct(const ConvActPoolBackwardArgs& a, void* workspace, void* stream) {
  conv_backward(a.conv, DirectSource::gradient(a), a.grad_x, a.grad_w, a.grad_b, workspace, stream);
}

}  // namespace fastconv::cuda
