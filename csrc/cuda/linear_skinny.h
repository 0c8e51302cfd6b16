// SPDX-License-Identifier: MIT
// How linear_skinny.cu and linear_skinny_backward.cu cut their work into blocks and warps, for the table and
// the launchers.
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

// dgrad and wgrad, C[i, j] = sum over r of A[i, r] * B[r, j]: a block computes kOuterRows by 32 * vector of
// C, `splits` warps share out r.
struct OuterShape {
  int64_t rows, cols, terms;  // of i, j, r
  Matrix b;                   // row along r, col along j
};
inline OuterShape dgrad_outer(const LinearArgs& a) { return {a.M, a.K, a.N, a.w}; }
inline OuterShape wgrad_outer(const LinearArgs& a) { return {a.N, a.K, a.M, a.x}; }

inline constexpr int kOuterRows = 8;
inline constexpr int64_t kOuterTerms = 512;  // that one warp sums at most, for the rounding error

struct OuterPlan {
  int vector;    // neighbours along j that a lane owns
  bool aligned;  // and loads in one access
  int splits;
  int64_t i_tiles, j_tiles;

  int64_t blocks() const { return i_tiles * j_tiles; }
};

inline OuterPlan plan_outer(const OuterShape& s, Dtype dtype) {
  OuterPlan p;
  p.vector = dtype == Dtype::f64 ? 2 : 4;
  p.aligned = s.cols % p.vector == 0 && is_aligned(s.b, dtype_size(dtype), p.vector);
  p.i_tiles = ceil_div(s.rows, kOuterRows);
  p.j_tiles = ceil_div(s.cols, 32 * p.vector);
  p.splits = 1;
  while (p.splits < kSkinnyWarps && (s.terms > kOuterTerms * p.splits ||
                                     (s.terms > 8 * p.splits && p.blocks() * p.splits < kSkinnyGrid)))
    p.splits *= 2;
  return p;
}

}  // namespace fastconv::cuda
