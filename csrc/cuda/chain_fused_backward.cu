// SPDX-License-Identifier: MIT
// The gradients of a whole chain in three launches, where its stages have few channels or features:
//
//   dgrads    A block takes a few images from the last stage to the first. The gradient at a stage's output
//             goes behind its ReLU and its pool into a tile of zeros in shared memory, and a convolution by
//             the filter turned around (chain_fused.cuh), or a product with the transposed matrix, makes that
//             at its input; which is also stored.
//   wgrads    All stages' side by side, in one launch for each size of filter: blocks of
//             conv_direct_wgrad.cuh and linear_outer.cuh, each with its stage's stored gradient.
//   sums      The parts of all convolutions' wgrads, added in order (slices.cuh).
//
//   grad_y --> [tile 0] --linear--> [sums] --> [tile 1] --linear--> [sums] --> [tile 0] --conv--> ...
//                                         \--> stored                     \--> stored
//
// In a product with the transposed matrix a lane sums 1 to 8 images by 4 neighbouring columns, from weights
// where they lie, in L2; where there are few columns warps share out the rows, and their parts are added when
// the gradient is handed on. The stored gradients are rounded to the element type, and so are those in the
// tiles.
//
// LeNet at 28x28 without the gradient of x on an H200, float32, microseconds (1.9 MFLOP an image, half of it
// zeros of conv2's gradient, at 67 TFLOP/s; weights from L2 as in chain_fused.cu):
//     images                                     1     64    256   1024
//     floor, without launches                  2.3    2.3    7.3     29
//     predicted, with three launches            21     23     31     78
//     stage by stage, with seven or eight       33     39     58    145
// Three quarters of the first launch is conv2's, whose tile of zeros fills shared memory: a block needs 28 KB
// an image and 13 KB. 128 registers of 256 threads there, 168 of 192 in the second, two blocks a
// multiprocessor. Not yet run on a GPU. Next: few images over clusters of blocks; wgrads of a stage as soon
// as its gradient is stored (programmatic launch); tensor cores for 16 bits.
#include "cuda/chain_fused_backward.h"

#include "cuda/chain_fused.cuh"
#include "cuda/conv_direct_wgrad.cuh"
#include "cuda/linear_outer.cuh"

namespace fastconv::cuda {

namespace {

constexpr size_t kMostParameters = 4096;  // bytes of a kernel's

// The gradient at a stage's output, and the tile that it enters at the convolution's own output.
struct FusedGradient {
  Planes grad, gate, offsets;  // in global memory, or null
  int units = 0;               // of an image
  Divisor cols, rows, channels;
  bool enters = false;
  int size = 0, channel = 0, pitch = 0, corner = 0, step = 1;  // of the tile; from one window to the next

  FusedGradient() = default;
  FusedGradient(const View& grad, int64_t C, const Extent3& out)
      : grad(grad), units(static_cast<int>(C * out.cells())), cols(out.w), rows(out.h), channels(C) {}

  void enter(const ConvArgs& forward, const FusedTile& tile) {
    const Epilogue& e = forward.epilogue;
    enters = true;
    if (e.act == Act::relu) gate = Planes(forward.y);
    offsets = Planes(e.offsets);
    step = e.pools() ? 2 : 1;
    size = static_cast<int>(tile.size()), channel = static_cast<int>(tile.h * tile.pitch);
    pitch = static_cast<int>(tile.pitch), corner = static_cast<int>(tile.top * tile.pitch + tile.left);
  }
};

struct FusedDgradStage {
  FusedStageTask stage;
  int parts, terms;
};

struct FusedDgradTask {
  int count, n, images;
  int buffers[2], sums, filter;                  // numbers in shared memory
  FusedGradient gradients[kFusedGradients + 1];  // the last stage's first
  FusedDgradStage stages[kFusedGradients];

  FusedDgradTask(const ChainBackwardArgs& b, const FusedDgradPlan& plan, const ChainCalls& calls)
      : count(static_cast<int>(plan.count)),
        n(static_cast<int>(b.chain.stages[0].conv.shape.N)),
        images(static_cast<int>(plan.images)),
        sums(static_cast<int>(plan.images * plan.sums)),
        filter(static_cast<int>(plan.filter)) {
    const ChainArgs& a = b.chain;
    for (int i = 0; i < 2; ++i) buffers[i] = static_cast<int>(plan.images * plan.buffers[i]);
    for (int each = 0; each <= count; ++each) {
      const int64_t i = a.count - 1 - each;  // whose output it is
      const ConvShape& x = a.stages[0].conv.shape;
      if (i < 0 && !calls.is_conv(0)) {
        gradients[each] = FusedGradient(b.grad_x, x.C * x.in_cells(), Extent3{});
      } else if (i < 0) {
        gradients[each] = FusedGradient(b.grad_x, x.C, {1, x.H, x.W});
      } else {
        gradients[each] = FusedGradient(calls.grad_y(b, i), a.stages[i].conv.shape.K, chain_extent(a, i));
      }
      if (each == count) break;
      const FusedDgrad& d = plan.dgrads[each];
      gradients[each].enter(calls.conv(i), d.stage.x);
      stages[each] = {fused_stage_task(d.stage, a.dtype), static_cast<int>(d.parts),
                      static_cast<int>(d.terms)};
      FusedStageTask& t = stages[each].stage;
      const View& w = a.stages[i].conv.w;
      t.w_group = static_cast<int>(a.stages[i].conv.shape.group_k() * w.n);
      t.vectors = d.conv.w.n == 1 && t.k % 4 == 0 && d.conv.w.c % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(w.data) % static_cast<uintptr_t>(4 * dtype_size(a.dtype)) == 0;
    }
  }
};
static_assert(sizeof(FusedDgradTask) <= kMostParameters);

// From grad_y, or from the sums of `parts`, to global memory, and into the tile.
template <class T>
__device__ __forceinline__ void hand_on(const FusedGradient& g, const float* sums, int parts, int pitch,
                                        float* tile, int first_n, int live) {
  constexpr int kAhead = 4;
  const int count = live * g.units;
  for (int begin = threadIdx.x; begin < count; begin += kAhead * kFusedThreads) {
    T value[kAhead] = {};
    T* stored[kAhead] = {};
    int place[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = begin + a * kFusedThreads;
      place[a] = -1;
      if (i >= count) continue;
      int image = i;
      const int w = g.cols.pop(image), h = g.rows.pop(image), c = g.channels.pop(image);
      const int n = first_n + image;
      if (sums) {
        float sum = 0;
        for (int part = 0; part < parts; ++part) sum += sums[part * pitch + i];
        value[a] = narrow<T>(sum);
        if (g.grad.data) stored[a] = g.grad.plane<T>(n, c) + h * g.grad.h + w * g.grad.w;
      } else {
        value[a] = g.grad.plane<const T>(n, c)[h * g.grad.h + w * g.grad.w];
      }
      if (!g.enters) continue;
      const int cell =
          g.offsets.data ? g.offsets.plane<const uint8_t>(n, c)[h * g.offsets.h + w * g.offsets.w] : 0;
      if (g.gate.data && g.gate.plane<const T>(n, c)[h * g.gate.h + w * g.gate.w] <= T(0.f)) continue;
      place[a] = g.corner + image * g.size + c * g.channel + (h * g.step + cell / 2) * g.pitch + w * g.step +
                 cell % 2;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (stored[a]) *stored[a] = value[a];
      if (place[a] >= 0) tile[place[a]] = float(value[a]);
    }
  }
}

// Where a convolution puts its sums: dense planes.
template <class T>
struct FusedSums {
  FusedTeam<false> team;
  float* data;
  int image, plane, row;

  __device__ __forceinline__ void put(int n, int k, int h, int w, T value, int = 0) const {
    data[n * image + k * plane + h * row + w] = float(value);
  }
};

// kM images by kVector columns a lane.
template <class T, int kM, int kVector>
__device__ __forceinline__ void multiply_transposed(const FusedDgradStage& s, const float* x, int live,
                                                    float* sums, int pitch) {
  using Weights = PoolVector<T, kVector>;
  const FusedStageTask& t = s.stage;
  const int lane = threadIdx.x % 32;
  const int m_tiles = (live + kM - 1) / kM, n_tiles = (t.k + 32 * kVector - 1) / (32 * kVector);
  for (int tile = threadIdx.x / 32; tile < m_tiles * n_tiles * s.parts; tile += kFusedWarps) {
    const int m_begin = tile % m_tiles * kM, column = (tile / m_tiles % n_tiles * 32 + lane) * kVector;
    const int part = tile / (m_tiles * n_tiles), end = min((part + 1) * s.terms, t.c);
    if (column >= t.k) continue;
    int rows[kM];  // those beyond the last repeat it; nobody stores their sums
#pragma unroll
    for (int i = 0; i < kM; ++i) rows[i] = min(m_begin + i, live - 1) * t.size;
    float mine[kM][kVector] = {};
    for (int r = part * s.terms; r < end; r += kFusedTerms) {
      Weights w[kFusedTerms] = {};
#pragma unroll
      for (int u = 0; u < kFusedTerms; ++u)
        if (r + u < end) w[u] = ld<Weights>(static_cast<const T*>(t.w) + (r + u) * t.w_c + column * t.w_k);
#pragma unroll
      for (int u = 0; u < kFusedTerms; u += 4) {
        if (r + u >= end) continue;  // behind the last row are zeros, up to a multiple of four
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          float values[4];
          load_shared<4>(values, x + rows[i] + r + u);
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int v = 0; v < kVector; ++v) mine[i][v] += values[j] * float(w[u + j].v[v]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        if (m_begin + i < live) sums[part * pitch + (m_begin + i) * t.k + column + v] = mine[i][v];
  }
}

template <class T, int kM = 8>
__device__ __forceinline__ void multiply_transposed(const FusedDgradStage& s, const float* x, int images,
                                                    int live, float* sums, int pitch) {
  if constexpr (kM > 1)
    if (fused_rows(images) < kM) return multiply_transposed<T, kM / 2>(s, x, images, live, sums, pitch);
  if (s.stage.vectors) return multiply_transposed<T, kM, 4>(s, x, live, sums, pitch);
  multiply_transposed<T, kM, 1>(s, x, live, sums, pitch);
}

template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2)
    chain_dgrad_kernel(const __grid_constant__ FusedDgradTask t) {
  FC_DYN_SMEM(shared);
  float* tile = shared.take<float>(t.buffers[0]);
  float* next = shared.take<float>(t.buffers[1]);
  float* sums = shared.take<float>(t.sums);
  float* filter = shared.take<float>(t.filter);
  const int first_n = static_cast<int>(blockIdx.x) * t.images, live = min(t.images, t.n - first_n);
  const auto clear = [&](float* tile, const FusedGradient& g) {
    const float zeros[4] = {};
    for (int i = threadIdx.x; i < live * g.size / 4; i += kFusedThreads) store_run(tile + 4 * i, zeros);
  };
  clear(tile, t.gradients[0]);
  __syncthreads();
  hand_on<T>(t.gradients[0], nullptr, 0, 0, tile, first_n, live);
  for (int i = 0; i < t.count; ++i) {
    const FusedDgradStage& s = t.stages[i];
    const FusedGradient& reached = t.gradients[i + 1];
    const int pitch = live * reached.units;
    __syncthreads();
    clear(next, reached);
    if (s.stage.kind == FusedKind::linear) {
      multiply_transposed<T>(s, tile, t.images, live, sums, pitch);
    } else {
      const FusedSums<T> y{{}, sums, reached.units, s.stage.p * s.stage.q, s.stage.q};
      convolve_images<T>(s.stage, tile, filter, live, y);
    }
    __syncthreads();
    hand_on<T>(reached, sums, s.parts, pitch, next, first_n, live);
    float* const read = tile;
    tile = next;
    next = read;
  }
}

// Stages' wgrads: the blocks of convolutions by filters of one size, then those of linear layers.
struct FusedWgradTask {
  int convs = 0, linears = 0, blocks = 0, threads = kWarp;
  int x_floats = 0, g_floats = 0;  // of shared memory
  WgradTask conv[kFusedConvs];
  OuterTask linear[kFusedGradients];

  void add(const WgradTask& t) {
    conv[convs++] = t;
    blocks += t.blocks, threads = std::max(threads, t.threads);
    x_floats = std::max(x_floats, t.x_tile.floats), g_floats = std::max(g_floats, t.g_floats);
  }
  void add(const OuterTask& t) {
    linear[linears++] = t;
    blocks += t.blocks, threads = std::max(threads, std::min(t.splits * kWarp, int(kBackwardThreads)));
  }
};
static_assert(sizeof(FusedWgradTask) <= kMostParameters);

template <class T, int F>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    chain_wgrad_kernel(const __grid_constant__ FusedWgradTask t) {
  FC_DYN_SMEM(shared);
  float* x = shared.take<float>(t.x_floats);
  float* g = shared.take<float>(t.g_floats);
  int block = blockIdx.x;
#pragma unroll
  for (int i = 0; i < kFusedConvs; ++i) {  // unrolled, a task's numbers need no registers
    const WgradTask& conv = t.conv[i];
    if (block < conv.blocks) return wgrad_block<T, F, false>(conv, block, x, g);
    block -= conv.blocks;
  }
  for (int i = 0; i < t.linears; ++i) {
    const OuterTask& linear = t.linear[i];
    if (block < linear.blocks) return outer_tile<T>(linear, block, *reinterpret_cast<OuterScratch<T>*>(x));
    block -= linear.blocks;
  }
}

// The second stages of all convolutions' wgrads.
struct FusedSlices {
  int convs = 0, blocks = 0;
  SliceSums<float> sums[kFusedConvs];

  void add(const SliceSums<float>& t) { sums[convs++] = t, blocks += t.blocks(); }
};

template <class T>
__global__ void __launch_bounds__(kSliceElements* kSliceParts)
    chain_slices_kernel(const __grid_constant__ FusedSlices t) {
  int block = blockIdx.x;
  for (int i = 0; i < t.convs; ++i) {
    if (block < t.sums[i].blocks()) return add_slices_block<T>(t.sums[i], block);
    block -= t.sums[i].blocks();
  }
}

template <class T, int F>
void launch_wgrads(FusedWgradTask t, void* stream) {
  if (t.blocks == 0) return;
  if (t.linears > 0) t.x_floats = std::max(t.x_floats, int(sizeof(OuterScratch<T>) / 4) - t.g_floats);
  const size_t bytes =
      smem_take<float>(smem_take<float>(0, static_cast<size_t>(t.x_floats)), static_cast<size_t>(t.g_floats));
  launch(chain_wgrad_kernel<T, F>, dim3(static_cast<unsigned>(t.blocks)),
         dim3(static_cast<unsigned>(t.threads)), bytes, stream, t);
}

}  // namespace

void chain_backward_fused(const ChainBackwardArgs& b, void* workspace, void* stream) {
  const ChainArgs& a = b.chain;
  const int64_t n = a.stages[0].conv.shape.N;
  const FusedGradientSlots slots(a, workspace);
  const ChainCalls& calls = slots.calls;
  const FusedDgradPlan plan(b);

  FusedWgradTask wgrads[2];  // of filters 3x3, 5x5
  FusedSlices slices;
  for (int64_t i = 0; i < a.count; ++i) {
    if (!a.stages[i].grad_w.data || !calls.is_conv(i)) continue;
    const ConvActPoolBackwardArgs conv = calls.conv_backward(b, i);
    const DirectShape shape = direct_wgrad(conv.conv.shape);
    const WgradTask task(shape, plan_wgrad(shape), conv.conv, DirectSource::gradient(conv),
                         conv.grad_b != nullptr, slots.parts_of(i));
    wgrads[shape.filter == 5].add(task);
    slices.add(task.slice_sums(shape.filter, conv.grad_w, conv.grad_b));
  }
  FusedWgradTask& launched = wgrads[wgrads[1].convs > 0];  // in any case, or by linear layers alone
  for (int64_t i = 0; i < a.count; ++i)
    if (a.stages[i].grad_w.data && !calls.is_conv(i))
      launched.add(OuterTask::wgrad(calls.linear_backward(b, i)));

  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.count > 0 && n > 0)
        launch(chain_dgrad_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, plan.images))),
               dim3(kFusedThreads), static_cast<size_t>(plan.shared_bytes(plan.images)), stream,
               FusedDgradTask(b, plan, calls));
      launch_wgrads<T, 5>(wgrads[1], stream);
      launch_wgrads<T, 3>(wgrads[0], stream);
      if (slices.blocks > 0)
        launch(chain_slices_kernel<T>, dim3(static_cast<unsigned>(slices.blocks)),
               dim3(kSliceElements * kSliceParts), 0, stream, slices);
    }
  });
}

}  // namespace fastconv::cuda
