// SPDX-License-Identifier: MIT
// A whole chain in one launch: a block takes a few images through all stages, and the next stage reads what
// it needs from its shared memory. In training each stage's output, and a pool's offsets, also go to `saved`.
//
//   x --> [buffer 0] --conv, ReLU, pool--> [buffer 1] --conv, ReLU, pool--> [buffer 0] --linear--> ... --> y
//
//   convolution  A thread sums a patch of 2x2 pixels by 8 channels, in float32 also of 2x4 by 6 where that is
//                less work, as in conv_direct.cu: 3x3 and 5x5 filters by its loops, others tap by tap. The
//                filter is in shared memory, a part of its channels at a time if it is large. Where a block
//                has too few patches, 2 or 4 neighbouring lanes share the channels of one, and shuffles add
//                their sums. A 2x2 pool is done in registers, any other window is a stage of its own.
//   linear       A warp sums 1 or 2 images by 8 outputs (of 16 bits by 4), or 4 or 8 by 4; its lanes share
//                out the features, as in linear_skinny.cu. Weights are read where they lie, from L2.
//
// Few images have a cluster of 2 to 8 blocks each (sm_90), which share out the patches and outputs of a stage
// and put each value into the shared memory of all: the blocks read different weights, so there are as many
// loads under way, and every block has what the next stage reads.
//
// Between the stages numbers are as wide as sums, but rounded to the element type, as if they were stored.
// The plan (chain_fused.h) takes as many images a block, 1 to 16, as have the fewest cycles and fit: LeNet at
// 32x32 in float32 needs 11.5 KB an image and 9.4 KB.
//
// LeNet on an H200, microseconds (833 kFLOP an image at 67 TFLOP/s; a block reads 247 KB of weights at 64
// bytes a cycle):
//     images                                  1    256    8192
//     floor, without launch                 2.3    3.2     102
//     predicted, with one launch             12     14     214
//     predicted, in clusters                8.8     15     294
//     stage by stage, with five launches     22     30     215
// 128 registers of 256 threads, two blocks a multiprocessor; in float64 and in clusters one. At 8192 images a
// quarter of the instructions is loads and epilogues of the convolutions, a sixth the linear layers' waits
// for weights. In a cluster one image waits for five meetings (1.2 us) and for the one warp of each block
// that conv1 gives work (1.3 us). Not yet run on a GPU. Next: smaller patches there; cp.async of the next
// stage's weights; tensor cores for 16 bits.
#include "cuda/chain_fused.cuh"
#include "cuda/reduce.cuh"

namespace fastconv::cuda {

namespace {

struct FusedForwardStage : FusedStageTask {
  Planes y, offsets;  // in global memory, or null
};

struct FusedTask {
  int count, n, images;
  int buffer[2], filter;  // numbers in shared memory
  Planes x;
  int in_c, in_h, in_w;
  Divisor in_cols, in_rows, in_channels;  // of the first stage's x in shared memory
  FusedForwardStage stages[kFusedStages];

  FusedTask(const ChainArgs& a, const FusedPlan& plan)
      : count(static_cast<int>(plan.count)),
        n(static_cast<int>(a.stages[0].conv.shape.N)),
        images(static_cast<int>(plan.images)),
        filter(static_cast<int>(plan.filter)),
        x(a.x),
        in_c(static_cast<int>(plan.stages[0].x.channels)),
        in_h(static_cast<int>(a.stages[0].conv.shape.H)),
        in_w(static_cast<int>(a.stages[0].conv.shape.W)),
        in_cols(plan.stages[0].x.pitch),
        in_rows(plan.stages[0].x.h),
        in_channels(plan.stages[0].x.channels) {
    for (int i = 0; i < 2; ++i) buffer[i] = static_cast<int>(plan.images * plan.buffers[i]);
    for (int i = 0; i < count; ++i) {
      stages[i] = {fused_stage_task(plan.stages[i], a.dtype)};
      const int64_t ends = plan.stages[i].ends;
      if (ends < 0) continue;
      stages[i].y = Planes(ends + 1 == a.count ? a.y : saved_output(a, ends));
      stages[i].offsets = Planes(saved_offsets(a, ends));
    }
  }
};
static_assert(sizeof(FusedTask) <= 4096, "the parameters of a kernel");

// Where a stage writes: the shared memory that the next one reads, global memory, or both.
template <class T, class Sum, bool kCluster>
struct FusedOutput {
  FusedTeam<kCluster> team;
  const FusedForwardStage &stage, &next;
  int first_n;
  Sum* data;  // or null

  // `cell` is that of a pool's window.
  __device__ __forceinline__ void put(int image, int k, int h, int w, T value, int cell = 0) const {
    if (data) team.put(data + (image * next.size + k * next.channel + h * next.pitch + w), Sum(value));
    const Planes &y = stage.y, &offsets = stage.offsets;
    if (y.data) y.plane<T>(first_n + image, k)[h * y.h + w * y.w] = value;
    if (offsets.data)
      offsets.plane<uint8_t>(first_n + image, k)[h * offsets.h + w * offsets.w] = static_cast<uint8_t>(cell);
  }
};

template <class T, class Sum>
__device__ __forceinline__ void fill_input(Sum* x, const FusedTask& t, int first_n, int live) {
  const FusedStageTask& s = t.stages[0];
  const int top = s.corner / s.pitch, left = s.corner - top * s.pitch;
  const int image = t.in_c * s.channel;
#pragma unroll 4
  for (int i = threadIdx.x; i < live * image; i += kFusedThreads) {
    int rest = i;
    const int w = t.in_cols.pop(rest) - left, h = t.in_rows.pop(rest) - top, c = t.in_channels.pop(rest);
    const bool inside = w >= 0 && w < t.in_w && h >= 0 && h < t.in_h;
    x[i + rest * (s.size - image)] =
        inside ? Sum(t.x.plane<const T>(first_n + rest, c)[h * t.x.h + w * t.x.w]) : Sum(0);
  }
}

template <class T, class Sum, class Output>
__device__ __forceinline__ void pool_images(const FusedStageTask& t, const Sum* x, int live,
                                            const Output& y) {
  for (int each = y.team.thread(); each < live * t.units; each += y.team.threads()) {
    int image = each;
    const int w = t.cols.pop(image), h = t.rows.pop(image), k = t.tiles.pop(image);
    const Sum* plane = x + image * t.size + k * t.channel;
    Sum best = Sum(-HUGE_VAL);
    int cell = -1;
    for (int r = 0; r < t.r; ++r)
      for (int s = 0; s < t.s; ++s) {
        const int in_h = h * t.step_h - t.top + r * t.gap_h, in_w = w * t.step_w - t.left + s * t.gap_w;
        if (in_h < 0 || in_h >= t.p || in_w < 0 || in_w >= t.q) continue;
        if (cell < 0) cell = r * t.s + s;  // though it were -inf
        take_larger(plane[in_h * t.pitch + in_w], r * t.s + s, true, best, cell);
      }
    y.put(image, k, h, w, T(best), cell);
  }
}

// kM images by kN outputs a warp.
template <class T, int kM, int kVector, class Sum, class Output>
__device__ __forceinline__ void multiply_images(const FusedStageTask& t, const Sum* x, int live,
                                                const Output& y) {
  constexpr int kN = fused_outputs(kM, sizeof(T));
  constexpr int kLanes = 32 / (kM * kN);  // that hold the same sum in the end
  using Weights = PoolVector<T, kVector>;
  using Values = PoolVector<Sum, kVector>;
  const int lane = threadIdx.x % 32;
  const int m_tiles = (live + kM - 1) / kM, tiles = m_tiles * ((t.k + kN - 1) / kN);
  for (int tile = y.team.thread() / 32; tile < tiles; tile += y.team.threads() / 32) {
    const int n_begin = tile / m_tiles * kN, m_begin = tile % m_tiles * kM;
    // Rows beyond the last repeat it; nobody stores their sums.
    int rows[kM], outputs[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) rows[i] = min(m_begin + i, live - 1) * t.size;
#pragma unroll
    for (int j = 0; j < kN; ++j) outputs[j] = min(n_begin + j, t.k - 1) * t.w_k;
    Sum sums[kM * kN] = {};
    for (int c = lane * kVector; c < t.c; c += 32 * kVector) {
      Weights w[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) w[j] = ld<Weights>(static_cast<const T*>(t.w) + outputs[j] + c * t.w_s);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const Values values = ld<Values>(x + rows[i] + c);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
#pragma unroll
          for (int j = 0; j < kN; ++j) sums[i * kN + j] += values.v[v] * Sum(w[j].v[v]);
      }
    }
    Sum sum = warp_sums(sums, lane);
    const int output = lane / kLanes, m = m_begin + output / kN, n = n_begin + output % kN;
    if (lane % kLanes != 0 || m >= live || n >= t.k) continue;
    if (t.bias) sum += Sum(static_cast<const T*>(t.bias)[n]);
    y.put(m, n, 0, 0, narrow<T>(naive::activate(sum, t.relu ? Act::relu : Act::none)));
  }
}

template <class T, int kM = 8, class Sum, class Output>
__device__ __forceinline__ void multiply(const FusedStageTask& t, const Sum* x, int images, int live,
                                         const Output& y) {
  if constexpr (kM > 1)
    if (fused_rows(images) < kM) return multiply<T, kM / 2>(t, x, images, live, y);
  if (t.vectors) return multiply_images<T, kM, static_cast<int>(16 / sizeof(Sum))>(t, x, live, y);
  multiply_images<T, kM, 1>(t, x, live, y);
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kFusedThreads, sizeof(T) == 8 || kCluster ? 1 : 2)
    chain_fused_kernel(const __grid_constant__ FusedTask t) {
  using Sum = typename Compute<T>::type;
  FC_DYN_SMEM(shared);
  Sum* x = shared.take<Sum>(t.buffer[0]);
  Sum* next = shared.take<Sum>(t.buffer[1]);
  Sum* filter = shared.take<Sum>(t.filter);
  const FusedTeam<kCluster> team;
  const int first_n = static_cast<int>(blockIdx.x) / team.blocks * t.images;
  const int live = min(t.images, t.n - first_n);
  fill_input<T>(x, t, first_n, live);
  for (int i = 0; i < t.count; ++i) {
    const FusedForwardStage& s = t.stages[i];
    const bool is_last = i + 1 == t.count;
    const FusedForwardStage& reader = t.stages[is_last ? i : i + 1];
    team.sync();
    if (!is_last && reader.kind == FusedKind::conv) {  // reads around what this stage writes
      for (int j = threadIdx.x; j < live * reader.size; j += kFusedThreads) next[j] = 0;
      team.sync();
    }
    const FusedOutput<T, Sum, kCluster> y{team, s, reader, first_n, is_last ? nullptr : next + reader.corner};
    if (s.kind == FusedKind::linear) {
      multiply<T>(s, x, t.images, live, y);
    } else if (s.kind == FusedKind::pool) {
      pool_images<T>(s, x, live, y);
    } else {
      convolve_images<T>(s, x, filter, live, y);
    }
    Sum* const read = x;
    x = next;
    next = read;
  }
}

template <bool kCluster>
void launch_fused(const ChainArgs& a, void* stream) {
  const int64_t n = a.stages[0].conv.shape.N;
  if (n == 0) return;
  const FusedPlan plan = plan_fused(a, kCluster);
  const Grid grid(dim3(static_cast<unsigned>(ceil_div(n, plan.images) * plan.blocks)),
                  static_cast<unsigned>(plan.blocks));
  with_dtype(a.dtype, [&](auto* element) {
    launch(chain_fused_kernel<std::remove_pointer_t<decltype(element)>, kCluster>, grid, dim3(kFusedThreads),
           static_cast<size_t>(plan.shared_bytes(plan.images, a.dtype)), stream, FusedTask(a, plan));
  });
}

}  // namespace

void chain_fused(const ChainArgs& a, void*, void* stream) { launch_fused<false>(a, stream); }

void chain_fused_cluster(const ChainArgs& a, void*, void* stream) { launch_fused<true>(a, stream); }

}  // namespace fastconv::cuda
