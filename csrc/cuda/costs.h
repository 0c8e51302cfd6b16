// SPDX-License-Identifier: MIT
// What CUDA rows reject, cost and need, for table.cpp.
//
// Costs are microseconds on an H200, predicted from its 132 multiprocessors of 128 float32 lanes at 1.7 GHz
// and a guess at the part of that which each kernel reaches: nothing is measured yet. They only need to
// order the rows of one table.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/composed.h"
#include "core/table.h"
#include "cuda/chain_fused.h"
#include "cuda/chain_fused_backward.h"
#include "cuda/conv_depthwise.h"
#include "cuda/conv_direct.h"
#include "cuda/linear_skinny.h"
#include "cuda/norm_slices.h"
#include "cuda/plan.h"

namespace fastconv::cuda {

constexpr unsigned kAll = kAllDtypes, kAny = kAllLayouts;
constexpr int kOldest = 75, kAmpere = 80, kHopper = 90;
constexpr unsigned kHalves = dtype_bit(Dtype::f16) | dtype_bit(Dtype::bf16);
constexpr unsigned kUpToFloat = kHalves | dtype_bit(Dtype::f32);
constexpr const char* kTooLarge = "does not take sizes or offsets beyond 32 bits";

constexpr double kLaunchUs = 3;
constexpr double kMultiprocessors = 132;
constexpr double kLaneMacsPerUs = 128 * 1.7e3;  // of one multiprocessor

// Naive rows, a thread an element of the result: about 50 instructions a term, and a thread waits 0.1 us for
// each; its own place, five divisions of 64 bits, and the rounding take as long as ten terms.
inline double naive_cost(double elements, int64_t terms) {
  constexpr double kTermsPerUs = kMultiprocessors * kLaneMacsPerUs / 50, kTermUs = 0.1, kElementTerms = 10;
  return kLaunchUs + (double(terms) + kElementTerms) * std::max(elements / kTermsPerUs, kTermUs);
}

inline double conv_fprop_naive_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return naive_cost(double(s.N * s.K) * double(s.out_cells()), s.group_c() * s.taps());
}
inline double conv_dgrad_naive_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return naive_cost(double(s.N * s.C) * double(s.in_cells()), s.group_k() * s.taps());
}
// 256 threads share a weight. Each term works out its own place: about four times the instructions.
inline double conv_wgrad_naive_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const double weights = double(s.K * s.group_c() * s.taps());
  return 3 * kLaunchUs + naive_cost(weights * 256, ceil_div(s.N * s.out_cells(), 256) * 4);
}
inline double linear_fprop_naive_cost(const LinearArgs& a) {
  return naive_cost(double(a.M) * double(a.N), a.K);
}
inline double linear_dgrad_naive_cost(const LinearArgs& a) {
  return naive_cost(double(a.M) * double(a.K), a.N);
}
inline double linear_wgrad_naive_cost(const LinearArgs& a) {
  return 3 * kLaunchUs + naive_cost(double(a.N) * double(a.K), a.M);
}
inline double pool_naive_cost(const PoolArgs& a) {
  const double cells = double(a.N * a.C) * double(a.D * a.H * a.W + a.window.out.cells());
  return naive_cost(cells, a.window.kernel.cells());
}

// Pooling rows move their bytes; the fraction of 4.8 TB/s that each reaches is a guess.
inline double pool_cost(const PoolArgs& a, double fraction) {
  constexpr double kBytesPerUs = 4.8e6;
  const double x = double(a.H * a.W), y = double(a.window.out.cells());
  const double y_bytes = double(dtype_size(a.dtype)) * (a.gate.data ? 2 : 1) +
                         (a.offset == Offset::none ? 0.0 : double(offset_size(a.offset)));
  const double bytes = double(a.N * a.C) * (x * double(dtype_size(a.dtype)) + y * y_bytes);
  return kLaunchUs + bytes / (kBytesPerUs * fraction);
}
inline double pool_runs_cost(const PoolArgs& a) { return pool_cost(a, 0.8); }
// By channels in vectors, else one by one.
inline double pool_pixels_cost(const PoolArgs& a) { return pool_cost(a, pool_channels(a) > 1 ? 0.7 : 0.3); }

// 256 threads share a channel, and pass over it three times. Terms as in wgrad.
inline double norm_naive_cost(const NormArgs& a) {
  return naive_cost(double(a.C) * 256, ceil_div(a.N * a.cells(), 256) * 3 * 4);
}
inline double norm_backward_naive_cost(const NormBackwardArgs& a) { return norm_naive_cost(a.norm); }
inline const char* norm_naive_reject(const NormArgs& a) { return a.pools() ? "does not pool" : nullptr; }
inline const char* norm_backward_naive_reject(const NormBackwardArgs& a) { return norm_naive_reject(a.norm); }

// Slices: one launch or three; bytes at 70 % of 4.8 TB/s.
inline const char* norm_slices_reject(const NormArgs& a, std::initializer_list<View> tensors) {
  if (const char* reason = norm_naive_reject(a)) return reason;
  for (const View& v : tensors)
    if (v.data && norm_cell_step(a, v) < 0) return "needs a channel's cells at even distances";
  return std::max(a.N * a.cells(), a.C) <= 1 << 30 ? nullptr : kTooLarge;
}
inline double norm_slices_cost(const NormArgs& a, const NormSlices& plan, int tensors) {
  constexpr double kBytesPerUs = 4.8e6 * 0.7, kWaitUs = 0.5, kUnitUs = 0.2;
  const double bytes = double(a.N * a.C) * double(a.cells()) * double(dtype_size(a.dtype)) * tensors;
  const double units = double(ceil_div(plan.slice_units, plan.lanes));
  return (plan.slices > 1 ? 3 : 1) * (kLaunchUs + kWaitUs) +
         std::max(bytes / kBytesPerUs * (plan.vector > 1 ? 1 : 2), units * kUnitUs);
}
inline const char* norm_slices_reject(const NormArgs& a) { return norm_slices_reject(a, {a.x, a.y}); }
inline double norm_slices_cost(const NormArgs& a) { return norm_slices_cost(a, plan_norm(a), 3); }
inline int64_t norm_slices_workspace(const NormArgs& a) { return plan_norm(a).workspace_bytes(a.C); }
inline const char* norm_backward_slices_reject(const NormBackwardArgs& a) {
  return norm_slices_reject(a.norm, {a.norm.x, a.norm.y, a.grad_y, a.grad_x});
}
inline double norm_backward_slices_cost(const NormBackwardArgs& a) {
  return norm_slices_cost(a.norm, plan_norm(a), a.norm.act == Act::none ? 5 : 7);
}
inline int64_t norm_backward_slices_workspace(const NormBackwardArgs& a) {
  return plan_norm(a).workspace_bytes(a.norm.C);
}

inline int64_t bias_workspace(const ConvArgs& a) {
  return bias_grad_workspace(a.shape.N * a.shape.out_cells(), a.shape.K);
}
inline int64_t bias_workspace(const LinearArgs& a) { return bias_grad_workspace(a.M, a.N); }

inline const char* does_not_pool(const ConvArgs& a) { return a.epilogue.pools() ? "does not pool" : nullptr; }

// Tiled rows: a stage of a tile takes its multiply-adds over the lanes, and at least the latency of global
// memory. The wide tile reaches 40 % of the lanes' rate, the narrow one, with more loads, 25 %.
template <class Tile>
double tiled_cost(const GemmShape& g, Dtype dtype) {
  constexpr double kStageLatencyUs = 1;
  const double fraction = Tile::kN >= 64 ? 0.4 : 0.25;
  const double macs = double(Tile::kM) * Tile::kN * kTileK * (dtype == Dtype::f64 ? 2 : 1);
  const GemmPlan plan = plan_gemm<Tile>(g);
  const double stages = double(ceil_div(std::min(g.k, plan.slice_k), kTileK));
  const double rounds = std::ceil(double(plan.blocks(g)) / kMultiprocessors);
  const double stage_us = std::max(rounds * macs / (kLaneMacsPerUs * fraction), kStageLatencyUs);
  return (plan.slices > 1 ? 2 : 1) * kLaunchUs + stages * stage_us;
}

// The offset of the last of so many elements.
inline int64_t reach(const View& v, int64_t n, int64_t c, const Extent3& e) {
  return (n - 1) * v.n + (c - 1) * v.c + (e.d - 1) * v.d + (e.h - 1) * v.h + (e.w - 1) * v.w;
}

// Whether the offset of every element and padded position is an int.
inline bool offsets_fit_int(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Extent3 padded{s.D + 2 * s.padding.d + s.T * s.dilation.d, s.H + 2 * s.padding.h + s.R * s.dilation.h,
                       s.W + 2 * s.padding.w + s.S * s.dilation.w};
  const Extent3 out{s.Z, s.P, s.Q}, filter{s.T, s.R, s.S};
  return std::max({reach(a.x, s.N, s.C, padded), reach(a.y, s.N, s.K, out),
                   reach(a.w, s.K, s.group_c(), filter), reach(a.epilogue.residual, s.N, s.K, out), padded.d,
                   padded.h, padded.w}) <= INT32_MAX;
}

// Whether one int counts the threads, and each offset and padded position of a plane is one.
inline bool pool_fits_int(const PoolArgs& a, const PoolUnits& units) {
  const Window& v = a.window;
  const Extent3 in{1, a.H, a.W};
  return std::max({units.count(), reach(a.x, 1, 1, in), reach(a.y, 1, 1, v.out), reach(a.gate, 1, 1, v.out),
                   reach(a.offsets, 1, 1, v.out),
                   std::max(a.H, v.out.h * v.stride.h) + v.padding.h + v.kernel.h * v.dilation.h,
                   std::max(a.W, v.out.w * v.stride.w) + v.padding.w + v.kernel.w * v.dilation.w}) <=
         INT32_MAX - kPoolThreads;
}

template <bool backward>
const char* pool_pixels_reject(const PoolArgs& a) {
  const Window& v = a.window;
  if (a.D != 1 || v.kernel.d != 1 || v.padding.d != 0 || v.out.d != 1)
    return "does not pool along three axes";
  const Extent3 pixels = backward ? Extent3{1, a.H, a.W} : v.out;
  return pool_fits_int(a, pool_pixels_units(a, pixels)) ? nullptr : kTooLarge;
}

template <bool backward>
const char* pool_runs_reject(const PoolArgs& a) {
  if (const char* reason = pool_pixels_reject<backward>(a)) return reason;
  if (!with_pool_window(a.window, [](auto) {}))
    return "takes the windows 2x2/2, 3x3/1, 3x3/2 and 1x1/1 only, and of 2x2 without padding, of 3x3 with 1";
  for (const View& v : {a.x, a.y, a.offsets, a.gate})
    if (v.data && v.w != 1) return "needs rows without gaps";
  return pool_fits_int(a, backward ? pool_backward_runs_units(a) : pool_runs_units(a)) ? nullptr : kTooLarge;
}

inline const char* tiled_reject(const ConvArgs& a) {
  if (const char* reason = does_not_pool(a)) return reason;
  return offsets_fit_int(a) ? nullptr : kTooLarge;
}
inline const char* tiled_reject(const LinearArgs&) { return nullptr; }

template <class Tile, auto gemm, class Args>
const char* tiled_reject(const Args& a) {
  if (const char* reason = tiled_reject(a)) return reason;
  constexpr int64_t kMax = 1 << 30;  // leaves room for a last tile
  const GemmShape g = gemm(a);
  return std::max({g.m, g.n, g.k, g.batch, plan_gemm<Tile>(g).blocks(g)}) <= kMax ? nullptr : kTooLarge;
}

template <class Tile, auto gemm, class Args>
double tiled_cost(const Args& a) {
  return tiled_cost<Tile>(gemm(a), a.dtype);
}
template <class Tile, auto gemm, class Args>
int64_t tiled_workspace(const Args& a) {
  const GemmShape g = gemm(a);
  return plan_gemm<Tile>(g).workspace_bytes(g, a.dtype);
}

// Of what a pass reads and writes.
inline double tensor_bytes(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return double(dtype_size(a.dtype)) *
         (double(s.N * s.C) * double(s.in_cells()) + double(s.N * s.K) * double(s.out_cells()) +
          double(s.K * s.group_c() * s.taps()));
}
inline double tensor_bytes(const LinearArgs& a) {
  return double(dtype_size(a.dtype)) *
         (double(a.M) * double(a.K) + double(a.N) * double(a.K) + double(a.M) * double(a.N));
}
template <class Tile>
constexpr unsigned mma_dtypes = Tile::kIsTf32       ? dtype_bit(Dtype::f32)
                                : Tile::kTakesFloat ? kUpToFloat
                                                    : kHalves;
template <class Tile, auto gemm, auto access, class Args>
const char* mma_reject(const Args& a) {
  if (Tile::kIsTf32 && !a.tf32) return "multiplies in TF32, and full float32 is asked for";
  const GemmAccess runs = access(a);
  if (!Tile::kGathers && !(runs.a.vectors && runs.b.vectors)) return "reads aligned runs of 16 bytes only";
  return tiled_reject<Tile, gemm>(a);
}
template <class Tile, auto gemm, auto access, class Args>
double mma_cost(const Args& a) {
  return mma_cost<Tile>(gemm(a), access(a), a.dtype, tensor_bytes(a));
}
template <class Tile, auto gemm, auto access, class Args>
double mma_wgrad_cost(const Args& a) {
  return 2 * kLaunchUs + mma_cost<Tile, gemm, access>(a);
}

// dgrad: a GEMM for each phase.
inline double sum_of_phases(const ConvArgs& a, double (*cost)(const ConvArgs&)) {
  double sum = 0;
  each_dgrad_phase(a, [&](const ConvArgs& phase) { sum += cost(phase); });
  return sum;
}
template <class Tile, auto gemm, class Args>
double tiled_dgrad_cost(const Args& a) {
  return sum_of_phases(a, tiled_cost<Tile, gemm, Args>);
}
template <class Tile, auto gemm, auto access, class Args>
double mma_dgrad_cost(const Args& a) {
  return sum_of_phases(a, mma_cost<Tile, gemm, access, Args>);
}
template <class Tile, auto gemm, class Args>
int64_t tiled_dgrad_workspace(const Args& a) {
  int64_t most = 0;
  each_dgrad_phase(a,
                   [&](const ConvArgs& phase) { most = std::max(most, tiled_workspace<Tile, gemm>(phase)); });
  return most;
}

// wgrad: two more kernels sum the bias gradient, in the workspace that the weight gradient no longer needs.
template <class Tile, auto gemm, class Args>
double tiled_wgrad_cost(const Args& a) {
  return 2 * kLaunchUs + tiled_cost<Tile, gemm>(a);
}
template <class Tile, auto gemm, class Args>
int64_t tiled_wgrad_workspace(const Args& a) {
  return std::max(tiled_workspace<Tile, gemm>(a), bias_workspace(a));
}

// Rows for tensor cores. mma.sync reaches half of what an H200 multiplies; of that the wide tile reaches 80
// %, the others, with more loads for each product, less. Elements that come one by one take about ten
// instructions each. What the blocks read comes from L2; and with three tiles of K under way, the next is
// there after a third of the latency.
template <class Tile>
double mma_cost(const GemmShape& g, const GemmAccess& access, Dtype dtype, double bytes) {
  constexpr double kMmaMacsPerUs = 1024 * 1.7e3, kGatheredPerUs = 10 * 1.7e3, kL2BytesPerUs = 5.5e6;
  constexpr double kBytesPerUs = 4.8e6 * 0.7, kFillUs = 1, kStageLatencyUs = 0.35;
  constexpr int kTile = Tile::kM * Tile::kN;
  constexpr double kFraction = kTile >= 128 * 128  ? 0.8
                               : kTile >= 128 * 64 ? 0.7
                               : Tile::kN >= 64    ? 0.6
                                                   : 0.45;
  const double k = kMmaRowBytes / double(dtype_size(dtype));
  const GemmPlan plan = plan_gemm<Tile>(g);
  const double blocks = double(plan.blocks(g));
  const double stages = std::ceil(double(std::min(g.k, plan.slice_k)) / k);
  const double gathered = (access.a.vectors ? 0.0 : Tile::kM * k) + (access.b.vectors ? 0.0 : Tile::kN * k);
  const double rounds = std::ceil(blocks / kMultiprocessors);
  const double products = Tile::kIsTf32 ? 2 : dtype == Dtype::f32 ? 6 : 1;
  const double busy_us =
      products * Tile::kM * Tile::kN * k / (kMmaMacsPerUs * kFraction) + gathered / kGatheredPerUs;
  const double lines = double(std::min<int64_t>(g.m, Tile::kM) + std::min<int64_t>(g.n, Tile::kN));
  const double l2_us = blocks * lines * kMmaRowBytes / kL2BytesPerUs;
  return (plan.slices > 1 ? 2 : 1) * kLaunchUs + kFillUs +
         std::max(stages * std::max({rounds * busy_us, l2_us, kStageLatencyUs}), bytes / kBytesPerUs);
}

// Skinny rows: a step waits for L2; or L2 moves what the blocks read, 32 bytes for an element alone; or the
// lanes reach half of their rate, without vectors 15 %.
inline double skinny_cost(double warps, double steps, double bytes, double macs, bool vectors, bool dense) {
  constexpr double kStepUs = 0.5, kL2BytesPerUs = 5.5e6, kResidentWarps = 16;
  const double rate = kMultiprocessors * kLaneMacsPerUs * (vectors ? 0.5 : 0.15);
  return kLaunchUs + std::max({std::ceil(warps / (kMultiprocessors * kResidentWarps)) * steps * kStepUs,
                               bytes * (dense ? 1 : 8) / kL2BytesPerUs, macs / rate});
}

template <class Tile>
const char* linear_fprop_skinny_reject(const LinearArgs& a) {
  constexpr int64_t kMax = 1 << 30;
  return std::max({a.M, a.N, a.K, plan_dot<Tile>(a).blocks()}) <= kMax ? nullptr : kTooLarge;
}
template <class Tile>
double linear_fprop_skinny_cost(const LinearArgs& a) {
  const DotPlan p = plan_dot<Tile>(a);
  const double tiles = double(p.blocks()) * p.groups(), terms = double(a.K) * (a.dtype == Dtype::f64 ? 2 : 1);
  const double rows = double(p.blocks()) * (Tile::kM + Tile::kN * p.groups());
  return skinny_cost(double(p.blocks() * kSkinnyWarps), double(p.steps),
                     rows * double(a.K * dtype_size(a.dtype)), tiles * Tile::kOutputs * terms, p.vector > 1,
                     a.x.col == 1 && a.w.col == 1);
}

inline const char* outer_reject(const OuterShape& s, Dtype dtype) {
  constexpr int64_t kMax = 1 << 30;
  if (s.cols == 0) return "needs inputs";
  if (s.terms > kOuterTerms * kSkinnyWarps) return "sums at most 4096 terms";
  return std::max({s.rows, s.cols, plan_outer(s, dtype).blocks()}) <= kMax ? nullptr : kTooLarge;
}
// A step is four terms.
inline double outer_cost(const OuterShape& s, Dtype dtype) {
  const OuterPlan p = plan_outer(s, dtype);
  const double cols = 32.0 * p.vector, terms = double(p.blocks()) * double(s.terms);
  return skinny_cost(double(p.blocks() * p.splits), double(ceil_div(s.terms, 4 * p.splits)),
                     terms * (cols + kOuterRows) * double(dtype_size(dtype)),
                     terms * cols * kOuterRows * (dtype == Dtype::f64 ? 2 : 1), p.aligned, s.b.col == 1);
}
template <auto outer>
const char* outer_reject(const LinearArgs& a) {
  return outer_reject(outer(a), a.dtype);
}
template <auto outer>
double outer_cost(const LinearArgs& a) {
  return outer_cost(outer(a), a.dtype);
}
// Both gradients in one launch.
inline const char* linear_act_backward_skinny_reject(const LinearActBackwardArgs& a) {
  const char* reason = outer_reject<dgrad_outer>(a.linear);
  return reason ? reason : outer_reject<wgrad_outer>(a.linear);
}
inline double linear_act_backward_skinny_cost(const LinearActBackwardArgs& a) {
  return outer_cost<dgrad_outer>(a.linear) + outer_cost<wgrad_outer>(a.linear) - kLaunchUs;
}

// Direct rows, of the small convolutions.
constexpr int64_t kDirectMost = 1 << 30;  // leaves room for a last block

// What all passes need.
inline const char* direct_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.D != 1 || s.T != 1 || s.Z != 1) return "does not convolve along three axes";
  if (s.R != s.S || (s.R != 3 && s.R != 5)) return "takes filters 3x3 and 5x5 only";
  if (!s.stride.is_one() || !s.dilation.is_one()) return "takes stride 1 and dilation 1 only";
  return s.N <= kDirectMost && offsets_fit_int(a) ? nullptr : kTooLarge;
}

inline const char* few_channels_reject(const ConvArgs& a) {
  if (const char* reason = direct_reject(a)) return reason;
  return a.shape.group_c() <= 16 ? nullptr : "takes at most 16 input channels";
}
inline const char* conv_dgrad_direct_reject(const ConvArgs& a) {
  if (const char* reason = direct_reject(a)) return reason;
  return a.shape.group_k() * a.shape.taps() <= 512 ? nullptr : "adds up at most 512 products";
}

inline const char* direct_pool_reject(const Epilogue& e) {
  const Window& v = e.pool;
  const bool is_3x3 = v.kernel.h == 3 && v.kernel.w == 3 && v.stride.h == 2 && v.stride.w == 2 &&
                      v.padding.h <= 1 && v.padding.w <= 1 && v.dilation.is_one();
  return !e.pools() || is_2x2(v) || is_3x3
             ? nullptr
             : "pools 2x2/2 without padding and 3x3/2 with padding up to 1 only";
}

inline const char* conv_act_pool_direct_reject(const ConvArgs& a) {
  if (a.epilogue.residual.data) return "does not add a residual";
  if (const char* reason = direct_pool_reject(a.epilogue)) return reason;
  return few_channels_reject(a);
}
inline const char* conv_fprop_direct_reject(const ConvArgs& a) {
  if (const char* reason = does_not_pool(a)) return reason;
  return conv_act_pool_direct_reject(a);
}

// The longer of a plan's cycles and the time of its bytes, behind a first fill of shared memory.
inline double direct_cost(double cycles, double bytes) {
  constexpr double kFillUs = 1, kCyclesPerUs = 1.7e3, kBytesPerUs = 4.8e6 * 0.7;
  return kLaunchUs + kFillUs + std::max(cycles / kCyclesPerUs, bytes / kBytesPerUs);
}
inline double input_bytes(const ConvArgs& a) {
  return double(a.shape.N * a.shape.C) * double(a.shape.H * a.shape.W) * double(dtype_size(a.dtype));
}
// Of y, or of y and offsets behind a pool.
inline double output_bytes(const ConvArgs& a) {
  const Epilogue& e = a.epilogue;
  const int64_t cells = e.pools() ? e.pool.out.cells() : a.shape.out_cells();
  return double(a.shape.N * a.shape.K) * double(cells) * double(dtype_size(a.dtype) + (e.pools() ? 1 : 0));
}
inline double conv_fprop_direct_cost(const ConvArgs& a) {
  return direct_cost(plan_direct(direct_fprop(a)).cycles, input_bytes(a) + output_bytes(a));
}
inline double conv_dgrad_direct_cost(const ConvArgs& a) {
  return direct_cost(plan_direct(direct_dgrad(a.shape)).cycles, input_bytes(a) + output_bytes(a));
}

inline const char* conv_wgrad_direct_reject(const ConvArgs& a) {
  if (const char* reason = few_channels_reject(a)) return reason;
  const ConvShape& s = a.shape;
  const int64_t floats = WgradPlan::slice_floats(direct_wgrad(s));
  return std::max(s.N * s.out_cells(), floats) <= kDirectMost ? nullptr : kTooLarge;
}
inline double conv_wgrad_direct_cost(const ConvArgs& a) {
  const double cycles = plan_wgrad(direct_wgrad(a.shape)).cycles;
  return kLaunchUs + direct_cost(cycles, input_bytes(a) + output_bytes(a));
}
inline int64_t conv_wgrad_direct_workspace(const ConvArgs& a) {
  const DirectShape shape = direct_wgrad(a.shape);
  return plan_wgrad(shape).workspace_bytes(shape);
}

inline const char* conv_act_pool_backward_direct_reject(const ConvActPoolBackwardArgs& a) {
  if (const char* reason = direct_pool_reject(a.conv.epilogue)) return reason;
  if (a.wants_x())
    if (const char* reason = conv_dgrad_direct_reject(a.conv)) return reason;
  return a.wants_w() ? conv_wgrad_direct_reject(a.conv) : nullptr;
}
inline double conv_act_pool_backward_direct_cost(const ConvActPoolBackwardArgs& a) {
  const ConvArgs& conv = a.conv;
  const double bytes = input_bytes(conv) + 2 * output_bytes(conv);
  double us = 0, cycles = 0, filled = 0;
  if (a.wants_x()) {
    const DirectShape shape = direct_dgrad(conv.shape);
    const bool joins = a.wants_w() && dgrad_joins_wgrad(shape);
    const DirectPlan plan = joins ? plan_joined_dgrad(shape) : plan_direct(shape);
    cycles += plan.cycles, filled += plan.filled(shape);
    us += a.wants_w() && !joins ? kLaunchUs : 0;
  }
  if (a.wants_w()) {
    const DirectShape shape = direct_wgrad(conv.shape);
    const WgradPlan plan = plan_wgrad(shape);
    cycles += plan.cycles, filled += plan.filled(shape);
    us += kLaunchUs;
  }
  // Behind a 3x3 pool an element of a tile takes 32 instructions more, a warp 32 elements: it looks at
  // windows.
  if (pools_3x3(conv.epilogue)) cycles += filled / 4 / kDirectMultiprocessors;
  return us + direct_cost(cycles, (a.wants_x() + a.wants_w()) * bytes);
}
inline int64_t conv_act_pool_backward_direct_workspace(const ConvActPoolBackwardArgs& a) {
  return a.wants_w() ? conv_wgrad_direct_workspace(a.conv) : 0;
}

// Depthwise rows.
inline const char* depthwise_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.D != 1 || s.T != 1 || s.Z != 1) return "does not convolve along three axes";
  if (s.group_c() != 1) return "takes one input channel a group only";
  if (s.taps() > kDepthwiseTaps) return "takes at most 1024 taps";
  return std::max({s.N, s.K * (s.taps() + 1), s.N * s.out_cells()}) <= kDirectMost && offsets_fit_int(a)
             ? nullptr
             : kTooLarge;
}

inline const char* conv_fprop_depthwise_reject(const ConvArgs& a) {
  if (const char* reason = does_not_pool(a)) return reason;
  return depthwise_reject(a);
}
inline const char* conv_dgrad_depthwise_reject(const ConvArgs& a) {
  if (const char* reason = depthwise_reject(a)) return reason;
  return std::max(a.shape.stride.h, a.shape.stride.w) <= kDepthwiseStrides ? nullptr
                                                                           : "takes strides up to 4";
}

// The longest of: memory; L1 and instructions, for so many outputs (of a sum over `summed` channels), each of
// which loads so many inputs and `taps` / 7 weights; and a thread's steps, each of which waits for L1.
inline double depthwise_cost(const ConvArgs& a, double outputs, int64_t vector, double loads, double taps,
                             double steps) {
  constexpr double kCyclesPerUs = 1.7e3, kBytesPerUs = 4.8e6 * 0.8, kStepUs = 0.05, kFillUs = 1, kRows = 7;
  const double loaded = vector > 1 ? double(dtype_size(a.dtype)) / 128 : double(a.shape.stride.w) / 32;
  const double l1 = loads * loaded + taps / kRows / 32;
  const double instructions =
      (loads * (vector > 1 ? 2 : 4) + taps * (a.dtype == Dtype::f64 ? 2 : 1) + 10) / 128;
  const double cycles = outputs * std::max(l1, instructions) / kMultiprocessors;
  return kLaunchUs + kFillUs +
         std::max({(input_bytes(a) + output_bytes(a)) / kBytesPerUs, cycles / kCyclesPerUs, steps * kStepUs});
}

// Inputs that an output loads: a row of taps at a time where a thread's outputs share them.
inline double depthwise_loads(const DepthwiseAxis& rows, double taps) {
  if (!depthwise_shares_rows(rows)) return taps;
  const int thread_rows = depthwise_thread_rows(rows.step);
  return taps / rows.taps * ((thread_rows - 1) * rows.step + rows.taps) / thread_rows;
}

inline double depthwise_cost(const ConvArgs& a, DepthwiseShape s) {
  if (s.turns()) s.turn();
  const double taps = double(s.taps * s.summed) / double(s.row_residues * s.col_residues);
  const double loads = s.shares_rows() ? depthwise_loads(s.rows[0], taps) : taps;
  const double steps = s.shares_rows() ? taps / s.rows[0].taps : taps;
  const double outputs = double(s.n * s.channels) * double(s.rows[0].outputs * s.row_residues) *
                         double(s.cols[0].outputs * s.col_residues);
  const int64_t vector =
      s.shared == 1 && s.summed == 1 ? depthwise_vector(s.channels, s.dtype, {s.x, s.y}) : 1;
  return depthwise_cost(a, outputs, vector, loads, taps, steps);
}
inline double conv_fprop_depthwise_cost(const ConvArgs& a) { return depthwise_cost(a, depthwise_fprop(a)); }
inline double conv_dgrad_depthwise_cost(const ConvArgs& a) { return depthwise_cost(a, depthwise_dgrad(a)); }

// A gradient is loaded for each column of taps.
inline double conv_wgrad_depthwise_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const DepthwiseWgradPlan p = plan_depthwise_wgrad(a);
  const DepthwiseAxis rows = depthwise_fprop_axis(s.H, s.P, p.column_taps, s.stride.h, 0, 1);
  const double taps = double(s.taps()), loads = taps / double(p.column_taps) + depthwise_loads(rows, taps);
  const double outputs = double(s.N * s.K) * double(s.out_cells());
  return kLaunchUs +
         depthwise_cost(a, outputs, p.vector, loads, taps, double(ceil_div(p.slice_units, p.lanes) * p.rows));
}
inline int64_t conv_wgrad_depthwise_workspace(const ConvArgs& a) {
  return plan_depthwise_wgrad(a).workspace_bytes(a);
}

template <bool in_clusters>
const char* chain_fused_reject(const ChainArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    const ConvArgs& conv = a.stages[i].conv;
    if (!offsets_fit_int(conv)) return kTooLarge;
    if (offset_type(conv.epilogue.pool.kernel.cells()) != Offset::u8)
      return "keeps offsets in a byte: a window has over 255 cells";
  }
  const ConvShape& x = a.stages[0].conv.shape;
  const Extent3 in{1, x.H, x.W}, out{1, a.y.h ? x.H : 1, a.y.w ? x.W : 1};
  if (std::max({x.N, reach(a.x, 1, 1, in), reach(a.y, 1, 1, out)}) > kDirectMost) return kTooLarge;
  const FusedPlan plan = plan_fused(a, in_clusters);
  if (plan.count > kFusedStages) return "takes at most 12 stages, pools other than 2x2/2 among them";
  return plan.images ? nullptr : "needs more shared memory than a block can have";
}
template <bool in_clusters>
double chain_fused_cost(const ChainArgs& a) {
  const ConvArgs &first = a.stages[0].conv, &last = a.stages[a.count - 1].conv;
  double bytes = input_bytes(first) + output_bytes(last);
  for (int64_t i = 0; a.saved && i + 1 < a.count; ++i) bytes += output_bytes(a.stages[i].conv);
  return direct_cost(plan_fused(a, in_clusters).cycles, bytes);
}

inline const char* chain_backward_fused_reject(const ChainBackwardArgs& b) {
  if (const char* reason = composed::chain_backward_reject(b)) return reason;
  const ChainArgs& a = b.chain;
  int64_t convs = 0;
  for (int64_t i = 0; i < a.count; ++i) convs += a.stages[i].layer == Layer::conv;
  if (a.count > kFusedGradients || convs > kFusedConvs)
    return "takes at most 8 stages, 4 of them convolutions";
  const ChainCalls calls(a, nullptr, a.count);
  for (int64_t i = calls.first_backward(b); i < a.count; ++i) {
    if (calls.is_conv(i)) {
      const ConvActPoolBackwardArgs conv = calls.conv_backward(b, i);
      if (const char* reason = conv_act_pool_backward_direct_reject(conv)) return reason;
      const ConvShape& s = conv.conv.shape;
      if (conv.conv.epilogue.pools() && !is_2x2(conv.conv.epilogue.pool))
        return "pools 2x2/2 without padding only";
      if (conv.grad_x.data && std::max(s.padding.h, s.padding.w) >= s.R)
        return "takes padding smaller than the filter only";
      continue;
    }
    const LinearActBackwardArgs linear = calls.linear_backward(b, i);
    if (const char* reason = linear_act_backward_skinny_reject(linear)) return reason;
    const LinearArgs& s = linear.linear;
    if (s.M > kOuterTerms * kBackwardThreads / 32) return "sums over at most 3072 images";
    if (s.N * std::abs(s.w.row) + s.K * std::abs(s.w.col) > kDirectMost) return kTooLarge;
  }
  const FusedDgradPlan plan(b);
  return plan.count == 0 || plan.images ? nullptr : "needs more shared memory than a block can have";
}
inline double chain_backward_fused_cost(const ChainBackwardArgs& b) {
  const FusedDgradPlan plan(b);
  double bytes = 0, wgrad_bytes = 0, cycles = 0, linear_us = 0;
  bool slices = false;
  ChainCalls(b.chain, nullptr, b.chain.count).each_backward(b, [&](const auto& args) {
    if constexpr (std::is_same_v<std::decay_t<decltype(args)>, ConvActPoolBackwardArgs>) {
      bytes += 2 * output_bytes(args.conv);
      if (!args.grad_w.data) return;
      wgrad_bytes += input_bytes(args.conv) + 2 * output_bytes(args.conv);
      cycles += plan_wgrad(direct_wgrad(args.conv.shape)).cycles;
      slices = true;
    } else if (args.grad_w.data) {
      linear_us = std::max(linear_us, outer_cost<wgrad_outer>(args.linear));
    }
  });
  // Linear layers wait for memory while convolutions compute.
  return (slices ? kLaunchUs : 0) + (plan.count > 0 ? direct_cost(plan.cycles, bytes) : 0) +
         std::max(linear_us, direct_cost(cycles, wgrad_bytes));
}
inline int64_t chain_backward_fused_workspace(const ChainBackwardArgs& b) {
  return FusedGradientSlots(b.chain, nullptr).bytes;
}

}  // namespace fastconv::cuda
