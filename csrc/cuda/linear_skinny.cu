// SPDX-License-Identifier: MIT
// Linear where a tiled GEMM leaves most of a GPU idle: few rows, or few inputs and outputs. No operand is
// staged in shared memory; what warps of a block read in common comes from the L1 cache.
//
// fprop: y[m, n] = act(sum over k of x[m, k] w[n, k] + bias[n])
//
//          n: kN          A warp owns a tile of y. Its lanes share out K, 16 bytes of each row of x and w at
//        +-------+        a time, and keep kM x kN sums each; shuffles add the lanes' so that every lane ends
//   m:   | lanes |        with one output. Where tiles are few, 2, 4 or 8 warps share out K as well, and add
//   kM   | over k|        their parts in order. All orders depend on the shape alone.
//        +-------+
//
// Floor on an H200: one launch, about 3 us; the work of 64 x 784 x 512 takes 0.8 us (FMAs), of 1 x 2304 x 600
// 1.2 us (one read of w). Predicted: 6.5 and 4.5 us. Limits: x is read from L2 by each block. Not yet run on
// a GPU. 128 registers in float32, 1 KB of shared memory. Next: tensor cores for the 16-bit types.
#include "cuda/linear_skinny.h"

#include "core/naive.h"
#include "cuda/platform.cuh"
#include "cuda/reduce.cuh"

namespace fastconv::cuda {

namespace {

constexpr int kWarp = 32, kThreads = kSkinnyWarps * kWarp;

template <class Element, int kCount>
struct alignas(kCount * sizeof(Element)) Vector {
  Element v[kCount];
};

struct DotTask {
  int M, N, K;
  int m_tiles, splits;
  Matrix x, w, y;
  const void* bias;  // [N], or null
  Act act;
};

template <class Element, class Tile, int kVector>
__global__ void __launch_bounds__(kThreads, 1) linear_dot(const DotTask task) {
  using Sum = typename Compute<Element>::type;
  using Vector = Vector<Element, kVector>;
  constexpr int kM = Tile::kM, kN = Tile::kN;
  constexpr int kLanes = kWarp / Tile::kOutputs;  // that hold the same output in the end
  FC_SHARED(Sum, partial, [kSkinnyWarps][Tile::kOutputs]);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = warp % task.splits, group = warp / task.splits;
  const int block = blockIdx.x, groups = kSkinnyWarps / task.splits;
  const int m_begin = block % task.m_tiles * kM, n_begin = (block / task.m_tiles * groups + group) * kN;

  // Rows beyond the last repeat it; nobody stores their sums.
  const Element *x[kM], *w[kN];
#pragma unroll
  for (int i = 0; i < kM; ++i)
    x[i] = static_cast<const Element*>(task.x.data) + min(m_begin + i, task.M - 1) * task.x.row;
#pragma unroll
  for (int j = 0; j < kN; ++j)
    w[j] = static_cast<const Element*>(task.w.data) + min(n_begin + j, task.N - 1) * task.w.row;

  Sum sums[Tile::kOutputs] = {};
  const int k_end = n_begin < task.N ? task.K : 0;
  for (int k = (split * kWarp + lane) * kVector; k < k_end; k += task.splits * kWarp * kVector) {
    Vector a[kM], b[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) a[i] = ld<Vector>(x[i] + (kVector > 1 ? k : k * task.x.col));
#pragma unroll
    for (int j = 0; j < kN; ++j) b[j] = ld<Vector>(w[j] + (kVector > 1 ? k : k * task.w.col));
#pragma unroll
    for (int v = 0; v < kVector; ++v)
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
          sums[i * kN + j] += static_cast<Sum>(a[i].v[v]) * static_cast<Sum>(b[j].v[v]);
  }

  Sum sum = warp_sums(sums, lane);
  const int output = lane / kLanes;
  if (lane % kLanes == 0) partial[warp][output] = sum;
  __syncthreads();
  const int m = m_begin + output / kN, n = n_begin + output % kN;
  if (split != 0 || lane % kLanes != 0 || m >= task.M || n >= task.N) return;
  for (int i = 1; i < task.splits; ++i) sum += partial[warp + i][output];
  if (task.bias) sum += static_cast<Sum>(static_cast<const Element*>(task.bias)[n]);
  static_cast<Element*>(task.y.data)[m * task.y.row + n * task.y.col] =
      narrow<Element>(naive::activate(sum, task.act));
}

}  // namespace

template <class Tile>
void linear_fprop_skinny(const LinearArgs& a, void*, void* stream) {
  const DotPlan plan = plan_dot<Tile>(a);
  if (plan.blocks() == 0) return;
  const DotTask task{static_cast<int>(a.M),
                     static_cast<int>(a.N),
                     static_cast<int>(a.K),
                     static_cast<int>(plan.m_tiles),
                     plan.splits,
                     a.x,
                     a.w,
                     a.y,
                     a.epilogue.bias,
                     a.epilogue.act};
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    const auto kernel = plan.vector > 1 ? linear_dot<Element, Tile, static_cast<int>(16 / sizeof(Element))>
                                        : linear_dot<Element, Tile, 1>;
    launch(kernel, dim3(static_cast<unsigned>(plan.blocks())), dim3(kThreads), 0, stream, task);
  });
}

template void linear_fprop_skinny<DotTile1x4>(const LinearArgs&, void*, void*);
template void linear_fprop_skinny<DotTile8x4>(const LinearArgs&, void*, void*);

}  // namespace fastconv::cuda
