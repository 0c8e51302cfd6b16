// SPDX-License-Identifier: MIT
// Gradients of a linear layer of few rows, or few inputs and outputs.
//
//   C[i, j] = sum over r of A[i, r] B[r, j]                j: 32 lanes x 4 (float64: 2)
//                                                         +---------------------------+
//   dgrad  i = m  j = k  r = n  A = grad_y    B = w   i: 8 | a lane keeps 8 x 4 sums   |
//   wgrad  i = n  j = k  r = m  A = grad_y^T  B = x       +---------------------------+
//
// Warps of a block share out r and add their parts in order through shared memory. Of A each lane fetches one
// of 8 x 4 elements, shuffles hand them round, and the bias gradient sums them on the way, in double. Where
// y, the output of a ReLU, is not positive, A counts as zero. One launch can hold both gradients of a layer.
//
// Floor on an H200: one launch, about 3 us; both gradients of 64 x 784 x 512 take 1.8 us (FMAs). Predicted:
// 14 us. 96 registers, 41 KB of shared memory: two blocks a multiprocessor. Limits: few inputs leave few
// blocks. Not yet run on a GPU. Next: tensor cores for the 16-bit types.
#include "core/naive.h"
#include "cuda/linear_skinny.h"
#include "cuda/platform.cuh"

namespace fastconv::cuda {

namespace {

constexpr int kWarp = 32;

struct OuterTask {
  int rows = 0, cols = 0, terms = 0;
  int blocks = 0, j_tiles = 1;
  bool aligned = false;
  Matrix a, gate;        // row along i, col along r; a gate, or null
  Matrix b;              // row along r, col along j
  Matrix out;            // row along i, col along j
  void* sums = nullptr;  // [rows]: of A over r, or null
};

template <class Element>
constexpr int kVector = sizeof(Element) == 8 ? 2 : 4;

// The tile `block` of a task. All threads of the block call it.
template <class Element>
__device__ __forceinline__ void outer_tile(const OuterTask& task, int block) {
  using Sum = typename Compute<Element>::type;
  constexpr int kRows = kOuterRows, kV = kVector<Element>, kCols = kWarp * kV;
  constexpr int kTerms = kWarp / kRows;  // at a time
  constexpr int kPitch = kWarp + 8;      // lanes that read neighbours along j meet different banks
  struct alignas(kV * sizeof(Element)) Vector {
    Element v[kV];
  };
  FC_SHARED(Sum, partial, [kSkinnyWarps][kRows][kV][kPitch]);
  FC_SHARED(double, partial_sums, [kSkinnyWarps][kRows]);

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
    for (int v = 0; v < kV; ++v) partial[warp][i][v][lane] = sums[i][v];
#pragma unroll
  for (int distance = kRows; distance < kWarp; distance *= 2)
    row_sum += __shfl_xor_sync(~0u, row_sum, distance);
  if (ahead == 0) partial_sums[warp][mine] = row_sum;
  __syncthreads();
  for (int e = threadIdx.x; e < kRows * kCols; e += blockDim.x) {
    const int i = e / kCols, c = e % kCols, j = j_begin + c;
    if (i_begin + i >= task.rows || j >= task.cols) continue;
    const int v = task.aligned ? c % kV : c / kWarp, owner = task.aligned ? c / kV : c % kWarp;
    Sum sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[w][i][v][owner];
    static_cast<Element*>(task.out.data)[(i_begin + i) * task.out.row + j * task.out.col] =
        narrow<Element>(sum);
  }
  const int i = threadIdx.x;
  if (task.sums && j_begin == 0 && i < kRows && i_begin + i < task.rows) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial_sums[w][i];
    static_cast<Element*>(task.sums)[i_begin + i] = narrow<Element>(sum);
  }
}

// The blocks of one task, then those of another.
template <class Element>
__global__ void __launch_bounds__(kSkinnyWarps* kWarp, 2)
    linear_outer(const OuterTask first, const OuterTask second) {
  const int block = blockIdx.x;
  if (block < first.blocks) {
    outer_tile<Element>(first, block);
  } else {
    outer_tile<Element>(second, block - first.blocks);
  }
}

struct Planned {
  OuterTask task;
  int splits = 1;
};

Planned planned(const OuterShape& s, Dtype dtype, Matrix a, Matrix gate, Matrix out, void* sums = nullptr) {
  const OuterPlan plan = plan_outer(s, dtype);
  const OuterTask task{static_cast<int>(s.rows),
                       static_cast<int>(s.cols),
                       static_cast<int>(s.terms),
                       static_cast<int>(plan.blocks()),
                       static_cast<int>(plan.j_tiles),
                       plan.aligned,
                       a,
                       gate,
                       s.b,
                       out,
                       sums};
  return {task, plan.splits};
}

Matrix transposed(const Matrix& m) { return {m.data, m.col, m.row}; }

Planned dgrad(const LinearArgs& a, const Matrix& grad_y, const Matrix& gate, const Matrix& grad_x) {
  return planned(dgrad_outer(a), a.dtype, grad_y, gate, grad_x);
}
Planned wgrad(const LinearArgs& a, const Matrix& grad_y, const Matrix& gate, const Matrix& grad_w,
              void* grad_b) {
  return planned(wgrad_outer(a), a.dtype, transposed(grad_y), transposed(gate), grad_w, grad_b);
}

void launch_outer(Dtype dtype, const Planned& first, const Planned& second, void* stream) {
  const int blocks = first.task.blocks + second.task.blocks;
  if (blocks == 0) return;
  const int threads = std::max(first.splits, second.splits) * kWarp;
  with_dtype(dtype, [&](auto* t) {
    launch(linear_outer<std::remove_pointer_t<decltype(t)>>, dim3(static_cast<unsigned>(blocks)),
           dim3(static_cast<unsigned>(threads)), 0, stream, first.task, second.task);
  });
}

}  // namespace

void linear_dgrad_skinny(const LinearArgs& a, void*, void* stream) {
  launch_outer(a.dtype, dgrad(a, a.y, {}, a.x), {}, stream);
}

void linear_wgrad_skinny(const LinearArgs& a, void*, void* stream) {
  launch_outer(a.dtype, wgrad(a, a.y, {}, a.w, a.bias_grad), {}, stream);
}

void linear_act_backward_skinny(const LinearActBackwardArgs& args, void*, void* stream) {
  const LinearArgs& a = args.linear;
  const Matrix gate = a.epilogue.act == Act::relu ? a.y : Matrix{};
  Planned first, second;
  if (args.grad_x.data) first = dgrad(a, args.grad_y, gate, args.grad_x);
  if (args.grad_w.data) second = wgrad(a, args.grad_y, gate, args.grad_w, args.grad_b);
  launch_outer(a.dtype, first, second, stream);
}

}  // namespace fastconv::cuda
