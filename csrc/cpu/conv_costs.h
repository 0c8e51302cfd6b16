// SPDX-License-Identifier: MIT
// What a convolution's rows reject, cost and need, for table.cpp.
//
// Costs are microseconds on one core: work over the rate that the row reaches on its usual shapes, plus what
// a call costs before the first element. They only need to order the rows of one table. Rates were measured
// on a Xeon with AVX-512, those of the slab and depthwise rows against the others on a Zen 4; of AVX2, what
// elements cost beside the products on a Zen 4 without AVX-512.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/table.h"
#include "cpu/lanes_plan.h"
#include "cpu/plan.h"

namespace fastconv::cpu {

constexpr double by(Isa isa, double avx512, double avx2, double portable) {
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : portable;
}
template <Isa isa>  // of a vector
constexpr auto kFloats = static_cast<int64_t>(by(isa, 16, 8, 4));
inline int64_t compute_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }
template <Isa isa>
int64_t lanes_of(Dtype dtype) {
  return kFloats<isa> * 4 / compute_size(dtype);
}

inline double conv_elements(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return double(s.N) * double(s.K * s.out_cells() + s.C * s.in_cells()) +
         double(s.K * s.group_c() * s.taps());
}

// Naive rows: about 0.5 multiply-adds a nanosecond, less where a term is bounds-checked.
inline double conv_naive_cost(const ConvArgs& a) {
  return 0.5 + a.shape.macs() * 2e-3 + conv_elements(a) * 5e-3;
}

// Multiply-adds a microsecond of the block GEMM, with packing.
constexpr double gemm_rate(Isa isa) { return by(isa, 30e3, 18e3, 4e3); }

template <Isa isa>
double conv_igemm_us(const ConvArgs& a, double macs) {
  const ConvShape& s = a.shape;
  const double packed = double(s.N) * double(s.out_cells()) * double(s.C * s.taps());
  return 3 + double(s.groups) * 0.5 + macs / gemm_rate(isa) + packed * 5e-4 + conv_elements(a) * 5e-4;
}

template <Isa isa>
double conv_igemm_cost(const ConvArgs& a) {
  return conv_igemm_us<isa>(a, a.shape.macs());
}

// dgrad meets whole vectors of input channels.
template <Isa isa>
double conv_dgrad_igemm_cost(const ConvArgs& a) {
  constexpr int64_t lanes = kFloats<isa>;
  const int64_t channels = std::max<int64_t>(1, a.shape.group_c());
  return conv_igemm_us<isa>(
      a, a.shape.macs() / double(channels) * double((channels + lanes - 1) / lanes * lanes));
}

inline const char* does_not_pool(const ConvArgs& a) { return a.epilogue.pools() ? "does not pool" : nullptr; }

inline const char* conv_igemm_reject(const ConvArgs& a) {
  return a.epilogue.residual.data ? "does not add a residual" : does_not_pool(a);
}

inline int64_t conv_wgrad_igemm_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t pieces = conv_wgrad_igemm_pieces(s);
  return pieces > 1 ? pieces * s.K * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4) : 0;
}

// Slab rows copy each input channel once a tap for every block of output channels, and reuse little for few
// of these. Channels that lie side by side are transposed. `outputs` and `inputs` are channels of a group.
constexpr double slab_rate(Isa isa) { return by(isa, 80e3, 42e3, 14e3); }

inline double slab_elements(const ConvArgs& a, double element_us) {
  return conv_elements(a) * element_us * (a.layout == Layout::channels_last ? 2 : 1);
}

template <Isa isa>
double conv_slab_us(const ConvArgs& a, int64_t outputs, int64_t inputs) {
  const ConvShape& s = a.shape;
  constexpr int64_t enough = isa == Isa::avx512 ? 3 : 12;
  const double few = double(enough) / double(std::clamp<int64_t>(outputs, 1, enough));
  const double copied =
      double(s.N) * double(s.out_cells() * s.taps()) * double(s.groups * inputs * ((outputs + 255) / 256));
  return 3 + double(s.groups) * 2 + s.macs() * few / slab_rate(isa) + copied * 7e-5 +
         slab_elements(a, isa == Isa::avx512 ? 2e-4 : 4e-4);
}

template <Isa isa>
double conv_fprop_slab_cost(const ConvArgs& a) {
  return conv_slab_us<isa>(a, a.shape.group_k(), a.shape.group_c());
}

template <Isa isa>
double conv_dgrad_slab_cost(const ConvArgs& a) {
  return conv_slab_us<isa>(a, a.shape.group_c(), a.shape.group_k());
}

// wgrad has output channels in the lanes, and copies each input channel once.
template <Isa isa>
double conv_wgrad_slab_cost(const ConvArgs& a) {
  constexpr int64_t lanes = kFloats<isa>;
  const ConvShape& s = a.shape;
  const double vectors = double((s.group_k() + lanes - 1) / lanes);
  return 3 + double(s.groups) * 2 +
         s.macs() / double(std::max<int64_t>(1, s.group_k())) * vectors * lanes / slab_rate(isa) +
         slab_elements(a, isa == Isa::avx512 ? 3e-4 : 6e-4);
}

inline const char* conv_slab_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0 ? "has no depth" : conv_igemm_reject(a);
}

// The filter of a group, its output channels in whole tiles of up to 8.
inline int64_t conv_fprop_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_k() + 8) * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t conv_dgrad_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_c() + 8) * s.group_k() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t conv_wgrad_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const SlabWgrad plan(s);
  return plan.pieces * s.C * s.taps() * (s.group_k() + plan.kMostColumns) * (a.dtype == Dtype::f64 ? 8 : 4);
}

// Lines and pixels rows multiply up to `most` broadcast numbers by `vectors` vectors; tiles of few products
// wait for what they load.
inline double few_products(int64_t broadcasts, int64_t most, int64_t vectors) {
  const int64_t tiles = std::max<int64_t>(1, (broadcasts + most - 1) / most);
  const double tile = double(std::max<int64_t>(1, broadcasts)) / double(tiles);
  return std::max(1.0, (tile + 4 * double(vectors)) / (tile * double(vectors)));
}

constexpr int64_t most_broadcasts(Isa isa) { return isa == Isa::avx512 ? 14 : 6; }

// Lines of pixels in the lanes: the last vector of each is a rest. A tile's end costs as much as a few
// elements of its depth; a deep slab leaves the first cache.
constexpr double lines_rate(Isa isa) { return by(isa, 88e3, 45e3, 13e3); }

template <Isa isa>
double conv_lines_us(const ConvArgs& a, int64_t cols, int64_t outputs, int64_t inputs, int64_t input_rows) {
  constexpr int64_t lanes = kFloats<isa>;
  const ConvShape& s = a.shape;
  const double whole = double((cols + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(1, cols));
  const double depth = double(std::max<int64_t>(1, inputs * s.taps()));
  const double few = few_products(outputs, most_broadcasts(isa), cols > lanes ? 2 : 1);
  return 3 + double(s.groups) * 2 + s.macs() * whole * few * (1 + 5 / depth + depth / 8e3) / lines_rate(isa) +
         conv_elements(a) * 5e-5 + double(s.N * s.groups * inputs * input_rows) * 1.2e-2;
}

template <Isa isa>
double conv_fprop_lines_cost(const ConvArgs& a) {
  return conv_lines_us<isa>(a, a.shape.Q, a.shape.group_k(), a.shape.group_c(), a.shape.H);
}

template <Isa isa>
double conv_dgrad_lines_cost(const ConvArgs& a) {
  return conv_lines_us<isa>(a, a.shape.W, a.shape.group_c(), a.shape.group_k(), a.shape.P);
}

inline const char* conv_lines_reject(const ConvArgs& a, int64_t inputs, int64_t rows, int64_t columns) {
  if (a.layout != Layout::contiguous) return "needs pixels side by side";
  const char* reason = conv_slab_reject(a);
  if (reason) return reason;
  return double(rows) * double(columns) * double(inputs) * 8 > double(kMostBandBytes)
             ? "holds a band of the input: it takes over 32 MiB"
             : nullptr;
}

inline const char* conv_fprop_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t rows = RowBands(s.N, s.P, s.Q).most_rows();
  return conv_lines_reject(a, s.group_c(), rows * s.stride.h + s.R * s.dilation.h,
                           (s.Q + 1) * s.stride.w + s.S * s.dilation.w);
}

inline const char* conv_dgrad_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.stride.w != 1) return "takes strides of one along rows";
  const int64_t rows = RowBands(s.N, s.H / s.stride.h, s.W).most_rows();
  return conv_lines_reject(a, s.group_k(), rows + s.R * s.dilation.h, s.W + s.S * s.dilation.w);
}

// The filter of a group, and where its elements meet the input.
inline int64_t conv_lines_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t numbers = s.group_k() * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
  return numbers + std::max(s.group_k(), s.group_c()) * s.taps() * int64_t(sizeof(int32_t));
}

// Pixels rows read elements where they are and the filter in whole vectors of outputs. A tile's end costs as
// much as a few elements of its depth; what is padded or converted is copied first.
constexpr double pixels_rate(Isa isa) { return by(isa, 96e3, 47e3, 13e3); }

template <Isa isa>
double conv_pixels_us(const ConvArgs& a, int64_t cols, int64_t outputs, int64_t inputs) {
  constexpr int64_t lanes = kFloats<isa>;
  const ConvShape& s = a.shape;
  const double whole = double((outputs + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(1, outputs));
  const double depth = double(std::max<int64_t>(1, inputs * s.taps()));
  const double few = few_products(cols, most_broadcasts(isa), outputs > lanes ? 2 : 1);
  return 3 + double(s.groups) + s.macs() * whole * few * (1 + 4 / depth) / pixels_rate(isa) +
         double(s.K * s.group_c() * s.taps()) * 3e-4 + conv_elements(a) * 6e-5;
}

template <Isa isa>
double conv_fprop_pixels_cost(const ConvArgs& a) {
  return conv_pixels_us<isa>(a, a.shape.Q, a.shape.group_k(), a.shape.group_c());
}

template <Isa isa>
double conv_dgrad_pixels_cost(const ConvArgs& a) {
  return conv_pixels_us<isa>(a, a.shape.W / a.shape.stride.w, a.shape.group_c(), a.shape.group_k());
}

inline const char* conv_pixels_reject(const ConvArgs& a, int64_t inputs, int64_t row) {
  if (a.layout != Layout::channels_last) return "needs channels side by side";
  const char* reason = conv_slab_reject(a);
  if (reason) return reason;
  const ConvShape& s = a.shape;
  const int64_t rows = (s.R - 1) * s.dilation.h + 1, columns = row + (s.S - 1) * s.dilation.w;
  return double(rows) * double(columns) * double(inputs) * 8 > double(kMostBandBytes)
             ? "holds the input under a row of outputs: it takes over 32 MiB"
             : nullptr;
}

inline const char* conv_fprop_pixels_reject(const ConvArgs& a) {
  return conv_pixels_reject(a, a.shape.group_c(), a.shape.Q * a.shape.stride.w);
}

inline const char* conv_dgrad_pixels_reject(const ConvArgs& a) {
  return conv_pixels_reject(a, a.shape.group_k(), a.shape.Q);
}

// The filter of a group, its output channels in whole vectors.
inline int64_t conv_fprop_pixels_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_k() + kUnit) * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t conv_dgrad_pixels_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_c() + kUnit) * s.group_k() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

// Winograd rows do 16 of 36 products, tiles of 2x2 outputs against vectors of output channels. For each tile
// vectors of channels are transformed, `on_input` on one side and `on_output` on the other, and transposed
// where pixels lie side by side; so is the filter. Few tiles wait for what they load. Measured on a Zen 5.
template <Isa isa>
double conv_winograd_us(const ConvArgs& a, int64_t rows, int64_t cols, int64_t outputs, int64_t inputs,
                        double on_input = 1, double on_output = 1) {
  constexpr int64_t lanes = kFloats<isa>;
  constexpr double vector_us = 16e-3, filter_us = 4e-3 * 16 / lanes;
  const ConvShape& s = a.shape;
  const auto vectors = [](int64_t channels) { return double((channels + lanes - 1) / lanes); };
  const double tiles = double(s.N * ((rows + 1) / 2) * ((cols + 1) / 2));
  const double products = std::max(tiles, 12.0) * 16 * vectors(outputs) * lanes * double(inputs);
  const double transforms = tiles * (vectors(inputs) * on_input + vectors(outputs) * on_output);
  return 4 + double(s.groups) * (products / pixels_rate(isa) +
                                 transforms * vector_us * (a.layout == Layout::channels_last ? 1 : 1.6) +
                                 double(outputs * inputs) * filter_us);
}

template <Isa isa>
double conv_fprop_winograd_cost(const ConvArgs& a) {
  return conv_winograd_us<isa>(a, a.shape.P, a.shape.Q, a.shape.group_k(), a.shape.group_c());
}

template <Isa isa>
double conv_dgrad_winograd_cost(const ConvArgs& a) {
  return conv_winograd_us<isa>(a, a.shape.H, a.shape.W, a.shape.group_c(), a.shape.group_k());
}

// Each block of channels meets all blocks of output channels; few channels are too few for a tile.
template <Isa isa>
double conv_wgrad_winograd_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const WinogradWgrad plan(s);
  return conv_winograd_us<isa>(a, s.P, s.Q, s.group_k(), std::max<int64_t>(16, s.group_c()),
                               double(plan.output_blocks), double(plan.channel_blocks));
}

inline const char* conv_winograd_reject(const ConvArgs& a, int64_t channels) {
  const ConvShape& s = a.shape;
  if (s.R != 3 || s.S != 3 || !s.stride.is_one() || !s.dilation.is_one())
    return "takes 3x3 filters with stride and dilation one";
  if (a.layout == Layout::strided) return "needs pixels or channels side by side";
  if (channels < 16) return "sums up at least 16 channels: of fewer, the transforms' rounding shows";
  return conv_slab_reject(a);
}

inline const char* conv_fprop_winograd_reject(const ConvArgs& a) {
  return conv_winograd_reject(a, a.shape.group_c());
}

inline const char* conv_dgrad_winograd_reject(const ConvArgs& a) {
  return conv_winograd_reject(a, a.shape.group_k());
}

inline int64_t winograd_bytes(const ConvArgs& a, int64_t outputs, int64_t inputs) {
  return (outputs + 2 * kUnit) * inputs * 16 * (a.dtype == Dtype::f64 ? 8 : 4);
}

inline int64_t conv_fprop_winograd_workspace(const ConvArgs& a) {
  return winograd_bytes(a, a.shape.group_k(), a.shape.group_c());
}

inline int64_t conv_dgrad_winograd_workspace(const ConvArgs& a) {
  return winograd_bytes(a, a.shape.group_c(), a.shape.group_k());
}

inline const char* conv_wgrad_winograd_reject(const ConvArgs& a) { return conv_winograd_reject(a, 16); }

inline int64_t conv_wgrad_winograd_workspace(const ConvArgs& a) {
  const int64_t pieces = WinogradWgrad(a.shape).pieces;
  return std::max(pieces * winograd_bytes(a, a.shape.group_k(), a.shape.group_c()),
                  conv_wgrad_slab_workspace(a));
}

// Depthwise rows meet whole vectors of channels; what they read and write is transposed or copied.
template <Isa isa>
double conv_depthwise_us(const ConvArgs& a, int64_t channels, int64_t times) {
  constexpr int64_t lanes = kFloats<isa>;
  const ConvShape& s = a.shape;
  const double blocks = double((channels + lanes - 1) / lanes * times);
  const double pixels = double(s.N) * double(s.out_cells() + s.in_cells()) / 2;
  return 2 + blocks * pixels * double(s.out_cells() * s.taps() + 10 * s.in_cells()) /
                 double(std::max<int64_t>(1, s.in_cells())) * 5e-4;
}

template <Isa isa>
double conv_depthwise_cost(const ConvArgs& a) {
  return conv_depthwise_us<isa>(a, a.shape.K, 1);
}

// dgrad has input channels in the lanes, and meets each output channel of a group.
template <Isa isa>
double conv_dgrad_depthwise_cost(const ConvArgs& a) {
  return conv_depthwise_us<isa>(a, a.shape.C, a.shape.group_k());
}

inline const char* conv_depthwise_reject(const ConvArgs& a, const DepthwisePlan& plan) {
  const ConvShape& s = a.shape;
  if (s.group_c() != 1) return "has more than one input channel a group";
  if (s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0) return "has no depth";
  if (plan.band_bytes > kMostBandBytes) return "holds a band of 16 channels: it takes over 32 MiB";
  return conv_igemm_reject(a);
}

inline const char* conv_depthwise_reject(const ConvArgs& a) {
  return conv_depthwise_reject(a, DepthwisePlan::fprop(a.shape));
}

inline const char* conv_dgrad_depthwise_reject(const ConvArgs& a) {
  return conv_depthwise_reject(a, DepthwisePlan::dgrad(a.shape));
}

// Depthwise lines rows meet whole vectors of pixels; a plane costs what a few of them do. Measured on a Zen 5
// against the depthwise rows.
template <Isa isa>
double conv_depthwise_lines_us(const ConvArgs& a, int64_t planes, int64_t rows, int64_t cols) {
  constexpr int64_t lanes = kFloats<isa>;
  const double vectors = double(rows) * double((cols + lanes - 1) / lanes);
  return 2 + double(planes) * (0.05 + vectors * (2.4e-3 + double(a.shape.taps()) * 0.32e-3));
}

template <Isa isa>
double conv_fprop_depthwise_lines_cost(const ConvArgs& a) {
  return conv_depthwise_lines_us<isa>(a, a.shape.N * a.shape.K, a.shape.P, a.shape.Q);
}

template <Isa isa>
double conv_dgrad_depthwise_lines_cost(const ConvArgs& a) {
  return conv_depthwise_lines_us<isa>(a, a.shape.N * a.shape.C, a.shape.H, a.shape.W);
}

inline const char* conv_fprop_depthwise_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.group_c() != 1) return "has more than one input channel a group";
  if (s.R != s.S || (s.R != 3 && s.R != 5 && s.R != 7) || !s.stride.is_one() || !s.dilation.is_one())
    return "takes 3x3, 5x5 and 7x7 filters with stride and dilation one";
  if (a.layout != Layout::contiguous) return "needs pixels side by side";
  if (double(std::max(s.W, s.Q)) * 16 * 8 > double(kMostBandBytes))
    return "holds rows of the input: they take over 32 MiB";
  return conv_slab_reject(a);
}

inline const char* conv_dgrad_depthwise_lines_reject(const ConvArgs& a) {
  return a.shape.group_k() > 1 ? "has more than one output channel a group"
                               : conv_fprop_depthwise_lines_reject(a);
}

// The filter in lanes and the places of its rows and columns; for wgrad, sums in double.
inline int64_t conv_depthwise_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.K + kUnit * s.group_k()) * s.taps() * compute_size(a.dtype) +
         (s.R + s.S) * int64_t(sizeof(int64_t));
}

inline int64_t conv_wgrad_depthwise_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t pieces = conv_wgrad_depthwise_pieces(s, s.N * DepthwisePlan::fprop(s).bands);
  return pieces * (s.K + kUnit) * s.taps() * int64_t(sizeof(double));
}

// Rows with the batch in the lanes compute whole vectors of images. A tile reuses what it loads for each of
// its output channels; `outputs` are those of a group.
template <Isa isa>
double lanes_images(const ConvArgs& a) {
  const int64_t lanes = lanes_of<isa>(a.dtype);
  return double((a.shape.N + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(a.shape.N, 1));
}

template <Isa isa>
double lanes_macs_us(const ConvArgs& a, int64_t outputs) {
  constexpr double rate = by(isa, 70e3, 38e3, 15e3);
  constexpr int64_t tile = isa == Isa::avx512 ? 3 : 2;
  return a.shape.macs() / rate * double(tile) / double(std::clamp<int64_t>(outputs, 1, tile));
}

template <Isa isa>
double conv_lanes_us(const ConvArgs& a, int64_t outputs, double share) {
  const ConvShape& s = a.shape;
  const double activations = double(s.N) * double(s.K * s.out_cells() + s.C * s.in_cells());
  // Images change places with what lies side by side.
  const double sorted_us = isa == Isa::avx512 ? 1.5e-4 : a.layout == Layout::channels_last ? 3e-4 : 5e-4;
  return 3 + lanes_images<isa>(a) * (lanes_macs_us<isa>(a, outputs) / share + activations * sorted_us) +
         double(s.K * s.group_c() * s.taps()) * 5e-4;
}

template <Isa isa>
double conv_fprop_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_k(), 1);
}

template <Isa isa>
double conv_dgrad_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_c(), 1);
}

template <Isa isa>
double conv_wgrad_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_k(), 0.75);
}

template <Isa isa>
double conv_backward_lanes_cost(const ConvActPoolBackwardArgs& a) {
  return conv_dgrad_lanes_cost<isa>(a.conv) + conv_wgrad_lanes_cost<isa>(a.conv);
}

template <class Plan>
const char* conv_lanes_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Window& pool = a.epilogue.pool;
  if (s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0) return "has no depth";
  if (a.epilogue.pools() && (pool.kernel.d != 1 || pool.padding.d != 0 || pool.out.d != 1))
    return "has no depth";
  if (a.epilogue.residual.data) return "does not add a residual";
  return Plan(a).band_bytes > kMostBandBytes ? "holds a band of 16 images: it takes over 32 MiB" : nullptr;
}

inline const char* conv_backward_lanes_reject(const ConvActPoolBackwardArgs& a) {
  const char* dgrad = conv_lanes_reject<LanesDgrad>(a.conv);
  return dgrad ? dgrad : conv_lanes_reject<LanesWgrad>(a.conv);
}

inline const char* conv_fprop_lanes_reject(const ConvArgs& a) {
  const char* pools = does_not_pool(a);
  return pools ? pools : conv_lanes_reject<LanesForward>(a);
}

inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline int64_t filter_bytes(const ConvArgs& a, int64_t taps) {
  return padded(a.shape.K * a.shape.group_c() * a.shape.taps() * compute_size(a.dtype)) + padded(4 * taps);
}

inline int64_t conv_fprop_lanes_workspace(const ConvArgs& a) {
  return filter_bytes(a, a.shape.group_c() * a.shape.taps()) + padded(a.shape.K * compute_size(a.dtype));
}

inline int64_t conv_dgrad_lanes_workspace(const ConvArgs& a) {
  return filter_bytes(a, a.shape.group_k() * a.shape.taps()) +
         padded(a.shape.group_c() * compute_size(a.dtype));
}

inline int64_t conv_wgrad_lanes_workspace(const ConvArgs& a) {
  const int64_t taps = a.shape.group_c() * a.shape.taps();
  return padded(LanesWgrad(a).pieces * a.shape.K * (taps + 1) * compute_size(a.dtype)) + padded(4 * taps);
}

inline int64_t conv_backward_lanes_workspace(const ConvActPoolBackwardArgs& a) {
  return std::max(conv_dgrad_lanes_workspace(a.conv), conv_wgrad_lanes_workspace(a.conv));
}

// Windows of a pool: what a strip holds is copied, element by element.
inline double strips_us(const ConvArgs& a, const WindowStrip& strip) {
  const double count = std::ceil(double(a.epilogue.pool.out.h) / double(strip.rows)) * double(a.shape.N);
  return 1 + count * (0.2 + double(strip.size()) * 0.4e-3);
}

constexpr double window_rate(Isa isa) { return by(isa, 50e3, 25e3, 10e3); }

template <Isa isa>
double conv_windows_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t lanes = lanes_of<isa>(a.dtype);
  const Extent3& out = a.epilogue.pool.out;
  const double windows = double(s.N * out.h) * double((out.w + lanes - 1) / lanes * lanes);
  return strips_us(a, WindowStrip::windows(a, lanes)) +
         windows * 4 * double(s.K * s.group_c() * s.taps()) / window_rate(isa);
}

template <Isa isa>
double conv_channels_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t lanes = lanes_of<isa>(a.dtype);
  const double channels = double(s.groups * ((s.group_k() + lanes - 1) / lanes * lanes));
  const double taps = double(s.group_c() * s.taps()),
               windows = double(s.N) * double(a.epilogue.pool.out.cells());
  return strips_us(a, WindowStrip::channels(a)) + channels * taps * 0.2e-3 + windows * double(s.K) * 0.5e-3 +
         windows * 4 * channels * taps / window_rate(isa);
}

inline const char* conv_windows_reject(const ConvArgs& a) {
  if (!a.epilogue.pools() || !is_tile(a.epilogue.pool)) return "pools 2x2 windows of stride 2, unpadded";
  const char* reason = conv_lanes_reject<LanesForward>(a);
  if (reason) return reason;
  return WindowStrip::windows(a, 16).size() > kMostBandBytes / 8
             ? "holds the input under a row of windows: it takes over 32 MiB"
             : nullptr;
}

inline int64_t window_workspace(const ConvArgs& a, int64_t lanes) {
  return a.dtype == Dtype::f64 ? bytes_of<WindowTables<double>>(a.shape, lanes)
                               : bytes_of<WindowTables<float>>(a.shape, lanes);
}

inline int64_t conv_windows_workspace(const ConvArgs& a) { return window_workspace(a, 1); }

inline int64_t conv_channels_workspace(const ConvArgs& a) {
  return window_workspace(a, 64 / compute_size(a.dtype));
}

}  // namespace fastconv::cpu
