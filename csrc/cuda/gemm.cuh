// SPDX-License-Identifier: MIT
// What the GEMM kernels share: the task they are given, the part of it that a block computes, and the second
// kernel, which adds the slices of K in order.
//
// A Gemm has Element, Sum, `A a`, `B b` and `write(batch, m, n, sum)`. An operand has `Line line(batch, m)`
// (for B, n): what is fixed along k; `Step step(k)`: what is fixed along m; `const Element* find(Line,
// Step)`: where the element lies, or null for zero; `Access access` (plan.h); `bool along_k(in_runs)`, which
// is access.along_k, but known to the compiler where the pass or runs of 16 bytes decide it; and kAtOnce: how
// many runs a thread may look for together without running out of registers.
#pragma once

#include "core/dtype.h"
#include "cuda/for_each.cuh"
#include "cuda/plan.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

template <class Gemm>
struct GemmTask {
  Gemm gemm;
  int m = 0, n = 0, k = 0, batch = 0;
  int m_tiles = 0, n_tiles = 0, slices = 0, slice_k = 0;
  typename Gemm::Sum* partial = nullptr;  // [slices, batch, n, m], or null: there is one slice
};

struct GemmBlock {
  int m_begin, n_begin, batch, slice, k_begin, k_end;
};

// Blocks that follow each other share a tile of A.
template <class Tile, class Gemm>
__device__ GemmBlock gemm_block(const GemmTask<Gemm>& task) {
  GemmBlock b;
  int block = blockIdx.x;
  b.n_begin = block % task.n_tiles * Tile::kN;
  block /= task.n_tiles;
  b.m_begin = block % task.m_tiles * Tile::kM;
  block /= task.m_tiles;
  b.batch = block % task.batch, b.slice = block / task.batch;
  b.k_begin = b.slice * task.slice_k;
  b.k_end = task.k - b.k_begin < task.slice_k ? task.k : b.k_begin + task.slice_k;
  return b;
}

// Writes what a block has summed up for (m, n), or nothing beyond the matrix.
template <class Gemm>
__device__ void store_sum(const GemmTask<Gemm>& task, const GemmBlock& b, int m, int n,
                          typename Gemm::Sum sum) {
  if (m >= task.m || n >= task.n) return;
  if (task.partial) {
    task.partial[((int64_t(b.slice) * task.batch + b.batch) * task.n + n) * task.m + m] = sum;
  } else {
    task.gemm.write(b.batch, m, n, sum);
  }
}

// Adds the slices of element i of [batch, n, m].
template <class Gemm>
FASTCONV_HD void add_slices(const GemmTask<Gemm>& task, int64_t i) {
  const int64_t elements = int64_t(task.batch) * task.n * task.m;
  typename Gemm::Sum sum = 0;
  for (int slice = 0; slice < task.slices; ++slice) sum += task.partial[slice * elements + i];
  const int m = static_cast<int>(i % task.m);
  i /= task.m;
  task.gemm.write(static_cast<int>(i / task.n), m, static_cast<int>(i % task.n), sum);
}

// `workspace` holds what the plan asks for; the table has seen to it that extents and blocks fit an int.
template <class Tile, class Gemm>
void launch_gemm(void (*kernel)(GemmTask<Gemm>), size_t shared_bytes, const Gemm& gemm,
                 const GemmShape& shape, void* workspace, void* stream) {
  const GemmPlan plan = plan_gemm<Tile>(shape);
  const int64_t blocks = plan.blocks(shape);
  if (blocks == 0) return;
  GemmTask<Gemm> task{gemm};
  task.m = static_cast<int>(shape.m), task.n = static_cast<int>(shape.n), task.k = static_cast<int>(shape.k);
  task.batch = static_cast<int>(shape.batch);
  task.m_tiles = static_cast<int>(plan.m_tiles), task.n_tiles = static_cast<int>(plan.n_tiles);
  task.slices = static_cast<int>(plan.slices), task.slice_k = static_cast<int>(plan.slice_k);
  task.partial = plan.slices > 1 ? static_cast<typename Gemm::Sum*>(workspace) : nullptr;
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads), shared_bytes, stream, task);
  if (task.partial) for_each<GemmTask<Gemm>, add_slices<Gemm>>(task, shape.batch * shape.n * shape.m, stream);
}

}  // namespace fastconv::cuda
