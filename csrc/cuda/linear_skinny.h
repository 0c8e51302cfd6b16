// SPDX-License-Identifier: MIT
// How the kernels of linear_skinny.cu cut their work into blocks and warps, for the table and the launchers.
#pragma once

#include "cuda/plan.h"

namespace fastconv::cuda {

inline constexpr int kSkinnyWarps = 8;           // of a block
inline constexpr int64_t kSkinnyGrid = 132 * 8;  // warps, below which sums are cut into pieces

// The tile of y that one warp of fprop computes.
template <int M, int N>
struct DotTile {
  static constexpr int kM = M, kN = N, kOutputs = M * N;
};
using DotTile1x4 = DotTile<1, 4>;
using DotTile8x4 = DotTile<8, 4>;

inline bool is_aligned(const Matrix& m, int64_t element_size, int64_t vector) {
  return m.col == 1 && m.row % vector == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(vector * element_size) == 0;
}

// `splits` warps share a tile and a sum over K; the others of a block take tiles beside it along N.
struct DotPlan {
  int vector;  // elements of K that a lane takes in one access
  int splits;
  int64_t m_tiles, n_blocks, steps;  // of K, for one warp

  int64_t blocks() const { return m_tiles * n_blocks; }
  int groups() const { return kSkinnyWarps / splits; }
};

template <class Tile>
DotPlan plan_dot(const LinearArgs& a) {
  DotPlan p;
  const int64_t size = dtype_size(a.dtype);
  p.vector = static_cast<int>(16 / size);
  if (a.K % p.vector || !is_aligned(a.x, size, p.vector) || !is_aligned(a.w, size, p.vector)) p.vector = 1;
  p.m_tiles = ceil_div(a.M, Tile::kM);
  const int64_t n_tiles = ceil_div(a.N, Tile::kN), steps = ceil_div(a.K, 32 * p.vector);
  p.splits = 1;
  while (p.splits < std::min<int64_t>(steps, kSkinnyWarps) && p.m_tiles * n_tiles * p.splits < kSkinnyGrid)
    p.splits *= 2;
  p.n_blocks = ceil_div(n_tiles, p.groups());
  p.steps = ceil_div(steps, p.splits);
  return p;
}

}  // namespace fastconv::cuda
