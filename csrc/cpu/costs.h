// SPDX-License-Identifier: MIT
// What the rows of the other operators reject, cost and need, for table.cpp; see conv_costs.h for the unit.
#pragma once

#include <cstring>

#include "cpu/chain_plan.h"
#include "cpu/conv_costs.h"
#include "cpu/norm_plan.h"

namespace fastconv::cpu {

// --- linear

inline double linear_elements(const LinearArgs& a) {
  return double(a.M) * double(a.K) + double(a.N) * double(a.K) + double(a.M) * double(a.N);
}

inline double linear_naive_cost(const LinearArgs& a) {
  return 0.5 + a.macs() * 6e-4 + linear_elements(a) * 2e-3;
}

// The columns of the result fill whole vectors; the matrix that is not met row by row is packed.
template <Isa isa>
double linear_gemm_us(int64_t m, int64_t n, int64_t k, double packed) {
  constexpr int64_t lanes = kFloats<isa>;
  constexpr double rate = by(isa, 72e3, 36e3, 8e3);
  const double columns = double((n + lanes - 1) / lanes * lanes) + (n <= lanes ? lanes / 2 : 0);
  return 2 + double(m) * columns * double(k) / rate + packed * 2.2e-4;
}

template <Isa isa>
double linear_fprop_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.M, a.N, a.K, double(a.N) * double(a.K) * 1.5);
}

template <Isa isa>
double linear_fprop_images_cost(const LinearArgs& a) {
  const double w = double(a.N) * double(a.K) * (linear_gemm_rows_in_place(a.dtype, a.K, a.w) ? 0.6 : 1.5);
  return linear_gemm_us<isa>(a.N, a.M, a.K, double(a.M) * double(a.K) + w);
}

template <Isa isa>
double linear_dgrad_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.M, a.K, a.N, double(a.N) * double(a.K) * 0.2);
}

template <Isa isa>
double linear_wgrad_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.N, a.K, a.M, double(a.M) * double(a.N + a.K) * 0.2);
}

// A tile of as many outputs as there are lanes, 4 rows by the rest, costs its start and end, then a step for
// each vector of features.
template <Isa isa>
double linear_dot_cost(const LinearArgs& a) {
  constexpr int64_t lanes = kFloats<isa>;
  constexpr double step_us = by(isa, 2.6e-3, 1.6e-3, 1.4e-3);
  const int64_t rows = std::min<int64_t>(a.M > 2 ? 4 : a.M, isa == Isa::portable ? 2 : 4);
  const int64_t columns = lanes / std::max<int64_t>(1, rows);
  const auto times = [](int64_t size, int64_t part) { return double((size + part - 1) / part); };
  const int64_t read_again = a.M * a.K;  // elements of x, for each column of tiles
  const double slower = read_again > 1 << 17 ? 2.5 : read_again > 1 << 13 ? 1.3 : 1;
  return 1 + slower * times(a.M, std::max<int64_t>(1, rows)) * times(a.N, columns) *
                 (0.04 + times(a.K, lanes) * step_us);
}

inline int64_t linear_gemm_bytes(const LinearArgs& l, int64_t m, int64_t n, int64_t k, const Matrix& a,
                                 const Matrix& b) {
  return linear_gemm_elements(l.dtype, m, n, k, a, b) * (l.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t linear_fprop_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.M, a.N, a.K, a.x, {nullptr, a.w.col, a.w.row});
}

inline int64_t linear_fprop_images_workspace(const LinearArgs& a) {
  if (linear_gemm_rows_in_place(a.dtype, a.K, a.w)) return 0;
  return a.K * (a.N + kMostLanes) * (a.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t linear_dgrad_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.M, a.K, a.N, a.y, a.w);
}

inline int64_t linear_wgrad_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.N, a.K, a.M, {nullptr, a.y.col, a.y.row}, a.x);
}

inline const char* linear_dot_reject(const LinearArgs& a) {
  if (a.x.col != 1 || a.w.col != 1) return "needs dense rows of input and weight";
  return a.K < 16 ? "needs rows of at least 16 features" : nullptr;
}

// --- pools

inline double pool_naive_cost(const PoolArgs& a) {
  const double cells = double(a.N) * double(a.C) * double(a.D * a.H * a.W + a.window.out.cells());
  return 0.5 + cells * (1e-2 + 5e-3 * double(a.window.kernel.cells()));
}

template <Isa isa>
double pool_rows_cost(const PoolArgs& a) {
  return 0.5 + pool_naive_cost(a) / (by(isa, 8, 6, 4));
}

inline const char* max_pool_rows_reject(const PoolArgs& a) {
  return max_pool_rows_fits(a.window)
             ? nullptr
             : "takes windows of up to 128 cells an axis, 256 rows and 1024 cells, and strides of up to 128";
}

// --- batch-norm

// Batch-norm reads x twice forward, and, with the gradients, twice backward.
inline double norm_elements(const NormArgs& a) { return double(a.N) * double(a.C) * double(a.cells()); }

inline double norm_naive_cost(const NormArgs& a) { return 0.5 + norm_elements(a) * 3e-2; }

inline const char* norm_naive_reject(const NormArgs& a) { return a.pools() ? "does not pool" : nullptr; }

inline const char* norm_backward_naive_reject(const NormBackwardArgs& a) { return norm_naive_reject(a.norm); }

template <Isa isa>
double norm_rows_cost(const NormArgs& a) {
  return 1 + norm_elements(a) * (by(isa, 4e-4, 6e-4, 12e-4));
}

template <Isa isa>
double norm_backward_rows_cost(const NormBackwardArgs& a) {
  return norm_rows_cost<isa>(a.norm);
}

inline const char* norm_rows_reject(const NormArgs& a) {
  if (a.D != 1 || a.window.kernel.d != 1 || a.window.out.d != 1) return "has no depth";
  if (a.pools() && !is_tile(a.window)) return "pools 2x2 windows of stride 2, unpadded, or none";
  const bool by_channels = NormPlan(a).by_channels;
  for (const View& v : {a.x, a.y, a.offsets})
    if (v.data && (by_channels ? v.c : v.w) != 1) return "needs dense rows, or else dense channels";
  return nullptr;
}

inline const char* norm_backward_rows_reject(const NormBackwardArgs& a) {
  const bool by_channels = NormPlan(a.norm).by_channels;
  for (const View& v : {a.grad_y, a.grad_x})
    if (v.data && (by_channels ? v.c : v.w) != 1) return "needs dense rows, or else dense channels";
  return norm_rows_reject(a.norm);
}

inline int64_t norm_rows_workspace(const NormArgs& a) { return NormPlan(a).workspace_bytes(); }

inline int64_t norm_backward_rows_workspace(const NormBackwardArgs& a) { return norm_rows_workspace(a.norm); }

inline double norm_backward_naive_cost(const NormBackwardArgs& a) { return norm_naive_cost(a.norm); }

// --- chains

// Of a chain only the input changes its layout; `share` is the part of the forward pass's rate.
template <Isa isa>
double chain_lanes_us(const ChainArgs& a, double share) {
  const ConvArgs& first = a.stages[0].conv;
  double us = double(first.shape.N * first.shape.C * first.shape.in_cells()) * 1.5e-4, weights = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const ConvShape& s = a.stages[i].conv.shape;
    us += lanes_macs_us<isa>(a.stages[i].conv, s.group_k()) / share;
    weights += double(s.K * s.group_c() * s.taps());
  }
  return 3 + lanes_images<isa>(first) * us + weights * 1e-4;
}

template <Isa isa>
double chain_lanes_cost(const ChainArgs& a) {
  return chain_lanes_us<isa>(a, 1);
}

template <Isa isa>
double chain_backward_lanes_cost(const ChainBackwardArgs& a) {
  return chain_lanes_us<isa>(a.chain, 0.4);
}

template <Isa>
const char* chain_lanes_reject(const ChainArgs& a) {
  for (int64_t i = 0; i < a.count; ++i)
    if (offset_type(a.stages[i].conv.epilogue.pool.kernel.cells()) != Offset::u8)
      return "keeps offsets in a byte: a window has over 255 cells";
  return chain_block_bytes(ChainBands(a)) > kMostBandBytes
             ? "holds 16 images of all stages: they take over 32 MiB"
             : nullptr;
}

template <Isa isa>
const char* chain_backward_lanes_reject(const ChainBackwardArgs& a) {
  constexpr const char* name = isa == Isa::avx512 ? "cpu/chain_lanes_avx512"
                               : isa == Isa::avx2 ? "cpu/chain_lanes_avx2"
                                                  : "cpu/chain_lanes_portable";
  return strcmp(a.forward, name) == 0 ? nullptr
                                      : "reads what the lanes of its own instruction set have saved";
}

template <template <class> class Tables, class Plan>
int64_t chain_lanes_bytes(Dtype dtype, const Plan& plan) {
  return dtype == Dtype::f64 ? bytes_of<Tables<double>>(plan) : bytes_of<Tables<float>>(plan);
}

inline int64_t chain_lanes_workspace(const ChainArgs& a) {
  return chain_lanes_bytes<ChainForwardTables>(a.dtype, ChainBands(a));
}

inline int64_t chain_backward_lanes_workspace(const ChainBackwardArgs& a) {
  return chain_lanes_bytes<ChainBackwardTables>(a.chain.dtype, ChainBackwardPlan(a));
}

}  // namespace fastconv::cpu
