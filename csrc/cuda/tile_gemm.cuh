// SPDX-License-Identifier: MIT
// C[m, n] = sum over k of A[m, k] * B[k, n] in tiles, the operands behind functors (gemm.cuh), so that one
// loop serves every pass of convolution (implicit GEMM) and of linear.
//
//            n: kN        A block stages kTileK columns of A and rows of B in shared memory, fetches the
//        +---------+      next stage into registers meanwhile, and keeps kThreadM x kThreadN sums a thread
//   m:   | t t t t |      (t). Every kFold stages the sums are added to totals, which bounds the rounding
//   kM   | t t t t |      error of a long K. K may be cut into slices (plan.h): then partial sums go to
//        +---------+      workspace, and a second kernel adds them in order. No atomics.
//
// Lines and steps are worked out once, by one thread each, in shared memory.
#pragma once

#include "cuda/gemm.cuh"

namespace fastconv::cuda {

inline constexpr int kFold = 16;

// The part of an operand's tile, kExtent lines by kTileK steps, that one thread carries from global to shared
// memory.
template <class Operand, class Sum, int kExtent, int kThreads>
struct Share {
  static constexpr int kCount = kExtent * kTileK / kThreads;
  static_assert(kCount * kThreads == kExtent * kTileK && kThreads % kTileK == 0 && kThreads % kExtent == 0);

  Sum values[kCount];

  // Neighbouring threads take what is contiguous in memory.
  __device__ static int line(const Operand& operand, int i) {
    const int thread = threadIdx.x;
    return operand.access.along_k ? thread / kTileK + i * (kThreads / kTileK) : thread % kExtent;
  }
  __device__ static int step(const Operand& operand, int i) {
    const int thread = threadIdx.x;
    return operand.access.along_k ? thread % kTileK : thread / kExtent + i * (kThreads / kExtent);
  }

  // Zero beyond the first `step_count` steps. (A line beyond the operand repeats its last; nobody stores it.)
  __device__ void fetch(const Operand& operand, const typename Operand::Line* lines,
                        const typename Operand::Step* steps, int step_count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = step(operand, i);
      const auto* found = k < step_count ? operand.find(lines[line(operand, i)], steps[k]) : nullptr;
      values[i] = found ? Sum(*found) : Sum(0);
    }
  }

  template <int kPitch>
  __device__ void put(const Operand& operand, Sum (&tile)[kTileK][kPitch]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) tile[step(operand, i)][line(operand, i)] = values[i];
  }
};

// kCount neighbours from shared memory, at most 16 bytes an access.
template <int kCount, class Sum>
__device__ __forceinline__ void load_fragment(Sum (&fragment)[kCount], const Sum* row) {
  constexpr int kVector = kCount * sizeof(Sum) < 16 ? kCount : 16 / sizeof(Sum);
  struct alignas(kVector * sizeof(Sum)) Vector {
    Sum v[kVector];
  };
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    const Vector vector = ld<Vector>(row + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) fragment[i + j] = vector.v[j];
  }
}

template <class Tile, class Gemm>
__global__ void __launch_bounds__(Tile::kThreads, 1) tile_gemm_kernel(const GemmTask<Gemm> task) {
  using Sum = typename Gemm::Sum;
  using A = typename Gemm::A;
  using B = typename Gemm::B;
  constexpr int kM = Tile::kM, kN = Tile::kN, kThreadM = Tile::kThreadM, kThreadN = Tile::kThreadN;
  constexpr int kThreads = Tile::kThreads;
  constexpr int kPad = 16 / sizeof(Sum);  // rows start in different banks and stay aligned to 16 bytes
  FC_SHARED(Sum, a_tile, [kTileK][kM + kPad]);
  FC_SHARED(Sum, b_tile, [kTileK][kN + kPad]);
  FC_SHARED(typename A::Line, a_lines, [kM]);
  FC_SHARED(typename B::Line, b_lines, [kN]);
  FC_SHARED(typename A::Step, a_steps, [kTileK]);
  FC_SHARED(typename B::Step, b_steps, [kTileK]);

  const Gemm& gemm = task.gemm;
  const int thread = threadIdx.x;
  const GemmBlock block = gemm_block<Tile>(task);

  // What lies beyond the operand repeats its last line or step.
  const auto work_out_steps = [&](int k) {
    constexpr int kWarp = 32;  // one warp for A, the next for B
    const int last = task.k - 1;
    if (thread < kTileK) a_steps[thread] = gemm.a.step(k + thread < last ? k + thread : last);
    const int at = thread - kWarp;
    if (at >= 0 && at < kTileK) b_steps[at] = gemm.b.step(k + at < last ? k + at : last);
  };
  for (int i = thread; i < kM; i += kThreads)
    a_lines[i] = gemm.a.line(block.batch, block.m_begin + i < task.m ? block.m_begin + i : task.m - 1);
  for (int i = thread; i < kN; i += kThreads)
    b_lines[i] = gemm.b.line(block.batch, block.n_begin + i < task.n ? block.n_begin + i : task.n - 1);

  Share<A, Sum, kM, kThreads> a;
  Share<B, Sum, kN, kThreads> b;
  const auto fetch = [&](int k) {
    a.fetch(gemm.a, a_lines, a_steps, block.k_end - k);
    b.fetch(gemm.b, b_lines, b_steps, block.k_end - k);
  };
  const int thread_m = thread % (kM / kThreadM) * kThreadM, thread_n = thread / (kM / kThreadM) * kThreadN;
  Sum sums[kThreadM][kThreadN] = {}, totals[kThreadM][kThreadN] = {};

  if (block.k_begin < block.k_end) {
    work_out_steps(block.k_begin);
    __syncthreads();
    fetch(block.k_begin);
    __syncthreads();
  }
  for (int k = block.k_begin; k < block.k_end; k += kTileK) {
    const int next = k + kTileK;
    a.put(gemm.a, a_tile);
    b.put(gemm.b, b_tile);
    work_out_steps(next);
    __syncthreads();
    fetch(next);
#pragma unroll
    for (int kk = 0; kk < kTileK; ++kk) {
      Sum a_fragment[kThreadM], b_fragment[kThreadN];
      load_fragment(a_fragment, &a_tile[kk][thread_m]);
      load_fragment(b_fragment, &b_tile[kk][thread_n]);
#pragma unroll
      for (int i = 0; i < kThreadM; ++i)
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sums[i][j] += a_fragment[i] * b_fragment[j];
    }
    if ((next - block.k_begin) % (kFold * kTileK) == 0 || next >= block.k_end) {
#pragma unroll
      for (int i = 0; i < kThreadM; ++i)
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kThreadM; ++i)
#pragma unroll
    for (int j = 0; j < kThreadN; ++j)
      store_sum(task, block, block.m_begin + thread_m + i, block.n_begin + thread_n + j, totals[i][j]);
}

template <class Tile, class Gemm>
void tile_gemm(const Gemm& gemm, const GemmShape& shape, void* workspace, void* stream) {
  launch_gemm<Tile>(tile_gemm_kernel<Tile, Gemm>, 0, gemm, shape, workspace, stream);
}

}  // namespace fastconv::cuda
