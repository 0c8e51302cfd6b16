// SPDX-License-Identifier: MIT
// The block of the skinny linear gradients; linear_skinny_backward.cu has the picture.
#pragma once

#include "core/naive.h"
#include "cuda/linear_skinny.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

constexpr int kWarp = 32;

struct OuterTask {
  int rows = 0, cols = 0, terms = 0;
  int blocks = 0, j_tiles = 1;
  int splits = 1;  // warps of a block
  bool aligned = false;
  Matrix a, gate;        // row along i, col along r; a gate, or null
  Matrix b;              // row along r, col along j
  Matrix out;            // row along i, col along j
  void* sums = nullptr;  // [rows]: of A over r, or null

  OuterTask() = default;
  OuterTask(const OuterShape& s, Dtype dtype, Matrix a, Matrix gate, Matrix out, void* sums = nullptr)
      : rows(static_cast<int>(s.rows)),
        cols(static_cast<int>(s.cols)),
        terms(static_cast<int>(s.terms)),
        a(a),
        gate(gate),
        b(s.b),
        out(out),
        sums(sums) {
    const OuterPlan plan = plan_outer(s, dtype);
    blocks = static_cast<int>(plan.blocks()), j_tiles = static_cast<int>(plan.j_tiles);
    splits = plan.splits, aligned = plan.aligned;
  }

  static OuterTask dgrad(const LinearActBackwardArgs& a) {
    return {dgrad_outer(a.linear), a.linear.dtype, a.grad_y, gate_of(a.linear), a.grad_x};
  }
  static OuterTask wgrad(const LinearActBackwardArgs& a) {
    return {wgrad_outer(a.linear),         a.linear.dtype, transposed(a.grad_y),
            transposed(gate_of(a.linear)), a.grad_w,       a.grad_b};
  }

 private:
  static Matrix gate_of(const LinearArgs& a) { return a.epilogue.act == Act::relu ? a.y : Matrix{}; }
  static Matrix transposed(const Matrix& m) { return {m.data, m.col, m.row}; }
};

template <class Element>
constexpr int kOuterVector = sizeof(Element) == 8 ? 2 : 4;

// What the warps of a block add up in shared memory.
template <class Element>
struct OuterScratch {
  static constexpr int kPitch = kWarp + 8;  // lanes that read neighbours along j meet different banks

  typename Compute<Element>::type partial[kSkinnyWarps][kOuterRows][kOuterVector<Element>][kPitch];
  double sums[kSkinnyWarps][kOuterRows];
};

// The tile `block` of a task. All threads of the block call it.
template <class Element>
__device__ __forceinline__ void outer_tile(const OuterTask& task, int block, OuterScratch<Element>& scratch) {
  using Sum = typename Compute<Element>::type;
  constexpr int kRows = kOuterRows, kV = kOuterVector<Element>, kCols = kWarp * kV;
  constexpr int kTerms = kWarp / kRows;  // at a time
  struct alignas(kV * sizeof(Element)) Vector {
    Element v[kV];
  };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int i_begin = block / task.j_tiles * kRows, j_begin = block % task.j_tiles * kCols;
  const int slice = (task.terms + warps - 1) / warps;
  const int r_begin = warp * slice, r_end = min(r_begin + slice, task.terms);

  // A lane fetches the element of A in row `mine` and of term r + ahead; shuffles hand all 32 round. Rows and
  // columns beyond the last repeat it; nobody stores them.
  const int mine = lane % kRows, ahead = lane / kRows, row = min(i_begin + mine, task.rows - 1);
  const Element* a = static_cast<const Element*>(task.a.data) + row * task.a.row;
  const Element* gate = static_cast<const Element*>(task.gate.data) + row * task.gate.row;
  const Element* b = static_cast<const Element*>(task.b.data);
  int64_t columns[kV];
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    const int j = j_begin + (task.aligned ? lane * kV + v : lane + v * kWarp);
    columns[v] = min(j, task.aligned ? task.cols - kV + v : task.cols - 1) * task.b.col;
  }

  Sum sums[kRows][kV] = {};
  double row_sum = 0;
  for (int r = r_begin; r < r_end; r += kTerms) {
    Sum fetched = 0;
    if (const int term = r + ahead; term < r_end) {
      fetched = a[term * task.a.col];
      if (task.gate.data && static_cast<Sum>(gate[term * task.gate.col]) <= 0) fetched = 0;
    }
    row_sum += fetched;
    Vector rows[kTerms] = {};
#pragma unroll
    for (int u = 0; u < kTerms; ++u) {
      if (r + u >= r_end) continue;
      if (task.aligned) {
        rows[u] = ld<Vector>(b + (r + u) * task.b.row + columns[0]);
      } else {
#pragma unroll
        for (int v = 0; v < kV; ++v) rows[u].v[v] = b[(r + u) * task.b.row + columns[v]];
      }
    }
#pragma unroll
    for (int u = 0; u < kTerms; ++u)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Sum factor = __shfl_sync(~0u, fetched, u * kRows + i);
#pragma unroll
        for (int v = 0; v < kV; ++v) sums[i][v] += factor * static_cast<Sum>(rows[u].v[v]);
      }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int v = 0; v < kV; ++v) scratch.partial[warp][i][v][lane] = sums[i][v];
#pragma unroll
  for (int distance = kRows; distance < kWarp; distance *= 2)
    row_sum += __shfl_xor_sync(~0u, row_sum, distance);
  if (ahead == 0) scratch.sums[warp][mine] = row_sum;
  __syncthreads();
  for (int e = threadIdx.x; e < kRows * kCols; e += blockDim.x) {
    const int i = e / kCols, c = e % kCols, j = j_begin + c;
    if (i_begin + i >= task.rows || j >= task.cols) continue;
    const int v = task.aligned ? c % kV : c / kWarp, owner = task.aligned ? c / kV : c % kWarp;
    Sum sum = 0;
    for (int w = 0; w < warps; ++w) sum += scratch.partial[w][i][v][owner];
    static_cast<Element*>(task.out.data)[(i_begin + i) * task.out.row + j * task.out.col] =
        narrow<Element>(sum);
  }
  const int i = threadIdx.x;
  if (task.sums && j_begin == 0 && i < kRows && i_begin + i < task.rows) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += scratch.sums[w][i];
    static_cast<Element*>(task.sums)[i_begin + i] = narrow<Element>(sum);
  }
}

}  // namespace fastconv::cuda
