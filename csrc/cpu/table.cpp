// SPDX-License-Identifier: MIT
// The CPU kernel tables. A kernel is a file beside this one; here it gets a row, and
// above its table a declaration.
//
// Costs are microseconds on one core: work over the rate that the row reaches on its usual shapes, plus
// what a call costs before the first element. They only need to order the rows of one table. Rates were
// measured on a Xeon with AVX-512, those of the slab and depthwise rows against the others on a Zen 4; of
// AVX2, what elements cost beside the products on a Zen 4 without AVX-512.
#include "core/table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/composed.h"
#include "cpu/chain_plan.h"
#include "cpu/norm_plan.h"

namespace fastconv {

constexpr unsigned kAll = kAllDtypes, kAny = kAllLayouts;
constexpr int kPortable = static_cast<int>(Isa::portable);

static double conv_elements(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return double(s.N) * double(s.K * s.out_cells() + s.C * s.in_cells()) +
         double(s.K * s.group_c() * s.taps());
}

// Naive rows: about 0.5 multiply-adds a nanosecond, less where a term is bounds-checked.
static double conv_naive_cost(const ConvArgs& a) {
  return 0.5 + a.shape.macs() * 2e-3 + conv_elements(a) * 5e-3;
}
static double linear_elements(const LinearArgs& a) {
  return double(a.M) * double(a.K) + double(a.N) * double(a.K) + double(a.M) * double(a.N);
}
static double linear_naive_cost(const LinearArgs& a) {
  return 0.5 + a.macs() * 6e-4 + linear_elements(a) * 2e-3;
}
static double pool_naive_cost(const PoolArgs& a) {
  const double cells = double(a.N) * double(a.C) * double(a.D * a.H * a.W + a.window.out.cells());
  return 0.5 + cells * (1e-2 + 5e-3 * double(a.window.kernel.cells()));
}

// Multiply-adds a microsecond of the block GEMM, with packing.
constexpr double gemm_rate(Isa isa) { return isa == Isa::avx512 ? 30e3 : isa == Isa::avx2 ? 18e3 : 4e3; }

template <Isa isa>
static double conv_igemm_us(const ConvArgs& a, double macs) {
  const ConvShape& s = a.shape;
  const double packed = double(s.N) * double(s.out_cells()) * double(s.C * s.taps());
  return 3 + double(s.groups) * 0.5 + macs / gemm_rate(isa) + packed * 5e-4 + conv_elements(a) * 5e-4;
}
template <Isa isa>
static double conv_igemm_cost(const ConvArgs& a) {
  return conv_igemm_us<isa>(a, a.shape.macs());
}
// dgrad meets whole vectors of input channels.
template <Isa isa>
static double conv_dgrad_igemm_cost(const ConvArgs& a) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const int64_t channels = std::max<int64_t>(1, a.shape.group_c());
  return conv_igemm_us<isa>(
      a, a.shape.macs() / double(channels) * double((channels + lanes - 1) / lanes * lanes));
}
// The columns of the result fill whole vectors; the matrix that is not met row by row is packed.
template <Isa isa>
static double linear_gemm_us(int64_t m, int64_t n, int64_t k, double packed) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  constexpr double rate = isa == Isa::avx512 ? 72e3 : isa == Isa::avx2 ? 36e3 : 8e3;
  const double columns = double((n + lanes - 1) / lanes * lanes) + (n <= lanes ? lanes / 2 : 0);
  return 2 + double(m) * columns * double(k) / rate + packed * 2.2e-4;
}
template <Isa isa>
static double linear_fprop_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.M, a.N, a.K, double(a.N) * double(a.K));
}
template <Isa isa>
static double linear_dgrad_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.M, a.K, a.N, double(a.N) * double(a.K) * 0.2);
}
template <Isa isa>
static double linear_wgrad_gemm_cost(const LinearArgs& a) {
  return linear_gemm_us<isa>(a.N, a.K, a.M, double(a.M) * double(a.N + a.K) * 0.2);
}
// A tile of as many outputs as there are lanes, 4 rows by the rest, costs its start and end, then a step for
// each vector of features.
template <Isa isa>
static double linear_dot_cost(const LinearArgs& a) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  constexpr double step_us = isa == Isa::avx512 ? 2.6e-3 : isa == Isa::avx2 ? 1.6e-3 : 1.4e-3;
  const int64_t rows = std::min<int64_t>(a.M > 2 ? 4 : a.M, isa == Isa::portable ? 2 : 4);
  const int64_t columns = lanes / std::max<int64_t>(1, rows);
  const auto times = [](int64_t size, int64_t part) { return double((size + part - 1) / part); };
  const int64_t read_again = a.M * a.K;  // elements of x, for each column of tiles
  const double slower = read_again > 1 << 17 ? 2.5 : read_again > 1 << 13 ? 1.3 : 1;
  return 1 + slower * times(a.M, std::max<int64_t>(1, rows)) * times(a.N, columns) *
                 (0.04 + times(a.K, lanes) * step_us);
}
static int64_t linear_gemm_bytes(const LinearArgs& l, int64_t m, int64_t n, int64_t k, const Matrix& a,
                                 const Matrix& b) {
  return cpu::linear_gemm_elements(l.dtype, m, n, k, a, b) * (l.dtype == Dtype::f64 ? 8 : 4);
}
static int64_t linear_fprop_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.M, a.N, a.K, a.x, {nullptr, a.w.col, a.w.row});
}
static int64_t linear_dgrad_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.M, a.K, a.N, a.y, a.w);
}
static int64_t linear_wgrad_gemm_workspace(const LinearArgs& a) {
  return linear_gemm_bytes(a, a.N, a.K, a.M, {nullptr, a.y.col, a.y.row}, a.x);
}
template <Isa isa>
static double pool_rows_cost(const PoolArgs& a) {
  return 0.5 + pool_naive_cost(a) / (isa == Isa::avx512 ? 8 : isa == Isa::avx2 ? 6 : 4);
}

static const char* does_not_pool(const ConvArgs& a) { return a.epilogue.pools() ? "does not pool" : nullptr; }
static const char* conv_igemm_reject(const ConvArgs& a) {
  return a.epilogue.residual.data ? "does not add a residual" : does_not_pool(a);
}
static const char* max_pool_rows_reject(const PoolArgs& a) {
  return cpu::max_pool_rows_fits(a.window)
             ? nullptr
             : "takes windows of up to 128 cells an axis, 256 rows and 1024 cells, and strides of up to 128";
}
static const char* linear_dot_reject(const LinearArgs& a) {
  if (a.x.col != 1 || a.w.col != 1) return "needs dense rows of input and weight";
  return a.K < 16 ? "needs rows of at least 16 features" : nullptr;
}

static int64_t conv_wgrad_igemm_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t pieces = cpu::conv_wgrad_igemm_pieces(s);
  return pieces > 1 ? pieces * s.K * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4) : 0;
}

// Slab rows copy each input channel once a tap for every block of output channels, and reuse little for few
// of these. Channels that lie side by side are transposed. `outputs` and `inputs` are channels of a group.
constexpr double slab_rate(Isa isa) { return isa == Isa::avx512 ? 80e3 : isa == Isa::avx2 ? 42e3 : 14e3; }
static double slab_elements(const ConvArgs& a, double element_us) {
  return conv_elements(a) * element_us * (a.layout == Layout::channels_last ? 2 : 1);
}
template <Isa isa>
static double conv_slab_us(const ConvArgs& a, int64_t outputs, int64_t inputs) {
  const ConvShape& s = a.shape;
  constexpr int64_t enough = isa == Isa::avx512 ? 3 : 12;
  const double few = double(enough) / double(std::clamp<int64_t>(outputs, 1, enough));
  const double copied =
      double(s.N) * double(s.out_cells() * s.taps()) * double(s.groups * inputs * ((outputs + 255) / 256));
  return 3 + double(s.groups) * 2 + s.macs() * few / slab_rate(isa) + copied * 7e-5 +
         slab_elements(a, isa == Isa::avx512 ? 2e-4 : 4e-4);
}
template <Isa isa>
static double conv_fprop_slab_cost(const ConvArgs& a) {
  return conv_slab_us<isa>(a, a.shape.group_k(), a.shape.group_c());
}
template <Isa isa>
static double conv_dgrad_slab_cost(const ConvArgs& a) {
  return conv_slab_us<isa>(a, a.shape.group_c(), a.shape.group_k());
}
// wgrad has output channels in the lanes, and copies each input channel once.
template <Isa isa>
static double conv_wgrad_slab_cost(const ConvArgs& a) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const ConvShape& s = a.shape;
  const double vectors = double((s.group_k() + lanes - 1) / lanes);
  return 3 + double(s.groups) * 2 +
         s.macs() / double(std::max<int64_t>(1, s.group_k())) * vectors * lanes / slab_rate(isa) +
         slab_elements(a, isa == Isa::avx512 ? 3e-4 : 6e-4);
}
static const char* conv_slab_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0 ? "has no depth" : conv_igemm_reject(a);
}
// The filter of a group, its output channels in whole tiles of up to 8.
static int64_t conv_fprop_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_k() + 8) * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}
static int64_t conv_dgrad_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_c() + 8) * s.group_k() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

static int64_t conv_wgrad_slab_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const cpu::SlabWgrad plan(s);
  return plan.pieces * s.C * s.taps() * (s.group_k() + plan.kMostColumns) * (a.dtype == Dtype::f64 ? 8 : 4);
}

// Lines and pixels rows multiply up to `most` broadcast numbers by `vectors` vectors; tiles of few products
// wait for what they load.
static double few_products(int64_t broadcasts, int64_t most, int64_t vectors) {
  const int64_t tiles = std::max<int64_t>(1, (broadcasts + most - 1) / most);
  const double tile = double(std::max<int64_t>(1, broadcasts)) / double(tiles);
  return std::max(1.0, (tile + 4 * double(vectors)) / (tile * double(vectors)));
}
constexpr int64_t most_broadcasts(Isa isa) { return isa == Isa::avx512 ? 14 : 6; }
// Lines of pixels in the lanes: the last vector of each is a rest. A tile's end costs as much as a few
// elements of its depth; a deep slab leaves the first cache.
constexpr double lines_rate(Isa isa) { return isa == Isa::avx512 ? 88e3 : isa == Isa::avx2 ? 45e3 : 13e3; }
template <Isa isa>
static double conv_lines_us(const ConvArgs& a, int64_t cols, int64_t outputs, int64_t inputs,
                            int64_t input_rows) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const ConvShape& s = a.shape;
  const double whole = double((cols + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(1, cols));
  const double depth = double(std::max<int64_t>(1, inputs * s.taps()));
  const double few = few_products(outputs, most_broadcasts(isa), cols > lanes ? 2 : 1);
  return 3 + double(s.groups) * 2 + s.macs() * whole * few * (1 + 5 / depth + depth / 8e3) / lines_rate(isa) +
         conv_elements(a) * 5e-5 + double(s.N * s.groups * inputs * input_rows) * 1.2e-2;
}
template <Isa isa>
static double conv_fprop_lines_cost(const ConvArgs& a) {
  return conv_lines_us<isa>(a, a.shape.Q, a.shape.group_k(), a.shape.group_c(), a.shape.H);
}
template <Isa isa>
static double conv_dgrad_lines_cost(const ConvArgs& a) {
  return conv_lines_us<isa>(a, a.shape.W, a.shape.group_c(), a.shape.group_k(), a.shape.P);
}
static const char* conv_lines_reject(const ConvArgs& a, int64_t inputs, int64_t rows, int64_t columns) {
  if (a.layout != Layout::contiguous) return "needs pixels side by side";
  const char* reason = conv_slab_reject(a);
  if (reason) return reason;
  return double(rows) * double(columns) * double(inputs) * 8 > double(cpu::kMostBandBytes)
             ? "holds a band of the input: it takes over 32 MiB"
             : nullptr;
}
static const char* conv_fprop_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t rows = cpu::RowBands(s.N, s.P, s.Q).most_rows();
  return conv_lines_reject(a, s.group_c(), rows * s.stride.h + s.R * s.dilation.h,
                           (s.Q + 1) * s.stride.w + s.S * s.dilation.w);
}
static const char* conv_dgrad_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.stride.w != 1) return "takes strides of one along rows";
  const int64_t rows = cpu::RowBands(s.N, s.H / s.stride.h, s.W).most_rows();
  return conv_lines_reject(a, s.group_k(), rows + s.R * s.dilation.h, s.W + s.S * s.dilation.w);
}
// The filter of a group, and where its elements meet the input.
static int64_t conv_lines_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t numbers = s.group_k() * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
  return numbers + std::max(s.group_k(), s.group_c()) * s.taps() * int64_t(sizeof(int32_t));
}

// Pixels rows read elements where they are and the filter in whole vectors of outputs. A tile's end costs as
// much as a few elements of its depth; what is padded or converted is copied first.
constexpr double pixels_rate(Isa isa) { return isa == Isa::avx512 ? 96e3 : isa == Isa::avx2 ? 47e3 : 13e3; }
template <Isa isa>
static double conv_pixels_us(const ConvArgs& a, int64_t cols, int64_t outputs, int64_t inputs) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const ConvShape& s = a.shape;
  const double whole = double((outputs + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(1, outputs));
  const double depth = double(std::max<int64_t>(1, inputs * s.taps()));
  const double few = few_products(cols, most_broadcasts(isa), outputs > lanes ? 2 : 1);
  return 3 + double(s.groups) + s.macs() * whole * few * (1 + 4 / depth) / pixels_rate(isa) +
         double(s.K * s.group_c() * s.taps()) * 3e-4 + conv_elements(a) * 6e-5;
}
template <Isa isa>
static double conv_fprop_pixels_cost(const ConvArgs& a) {
  return conv_pixels_us<isa>(a, a.shape.Q, a.shape.group_k(), a.shape.group_c());
}
template <Isa isa>
static double conv_dgrad_pixels_cost(const ConvArgs& a) {
  return conv_pixels_us<isa>(a, a.shape.W / a.shape.stride.w, a.shape.group_c(), a.shape.group_k());
}
static const char* conv_pixels_reject(const ConvArgs& a, int64_t inputs, int64_t row) {
  if (a.layout != Layout::channels_last) return "needs channels side by side";
  const char* reason = conv_slab_reject(a);
  if (reason) return reason;
  const ConvShape& s = a.shape;
  const int64_t rows = (s.R - 1) * s.dilation.h + 1, columns = row + (s.S - 1) * s.dilation.w;
  return double(rows) * double(columns) * double(inputs) * 8 > double(cpu::kMostBandBytes)
             ? "holds the input under a row of outputs: it takes over 32 MiB"
             : nullptr;
}
static const char* conv_fprop_pixels_reject(const ConvArgs& a) {
  return conv_pixels_reject(a, a.shape.group_c(), a.shape.Q * a.shape.stride.w);
}
static const char* conv_dgrad_pixels_reject(const ConvArgs& a) {
  return conv_pixels_reject(a, a.shape.group_k(), a.shape.Q);
}
// The filter of a group, its output channels in whole vectors.
static int64_t conv_fprop_pixels_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_k() + cpu::kUnit) * s.group_c() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}
static int64_t conv_dgrad_pixels_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.group_c() + cpu::kUnit) * s.group_k() * s.taps() * (a.dtype == Dtype::f64 ? 8 : 4);
}

// Winograd rows do 16 of 36 products, tiles of 2x2 outputs against vectors of output channels. For each tile
// vectors of channels are transformed, `on_input` on one side and `on_output` on the other, and transposed
// where pixels lie side by side; so is the filter. Few tiles wait for what they load. Measured on a Zen 5.
template <Isa isa>
static double conv_winograd_us(const ConvArgs& a, int64_t rows, int64_t cols, int64_t outputs, int64_t inputs,
                               double on_input = 1, double on_output = 1) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
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
static double conv_fprop_winograd_cost(const ConvArgs& a) {
  return conv_winograd_us<isa>(a, a.shape.P, a.shape.Q, a.shape.group_k(), a.shape.group_c());
}
template <Isa isa>
static double conv_dgrad_winograd_cost(const ConvArgs& a) {
  return conv_winograd_us<isa>(a, a.shape.H, a.shape.W, a.shape.group_c(), a.shape.group_k());
}
// Each block of channels meets all blocks of output channels; few channels are too few for a tile.
template <Isa isa>
static double conv_wgrad_winograd_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const cpu::WinogradWgrad plan(s);
  return conv_winograd_us<isa>(a, s.P, s.Q, s.group_k(), std::max<int64_t>(16, s.group_c()),
                               double(plan.output_blocks), double(plan.channel_blocks));
}
static const char* conv_winograd_reject(const ConvArgs& a, int64_t channels) {
  const ConvShape& s = a.shape;
  if (s.R != 3 || s.S != 3 || !s.stride.is_one() || !s.dilation.is_one())
    return "takes 3x3 filters with stride and dilation one";
  if (a.layout == Layout::strided) return "needs pixels or channels side by side";
  if (channels < 16) return "sums up at least 16 channels: of fewer, the transforms' rounding shows";
  return conv_slab_reject(a);
}
static const char* conv_fprop_winograd_reject(const ConvArgs& a) {
  return conv_winograd_reject(a, a.shape.group_c());
}
static const char* conv_dgrad_winograd_reject(const ConvArgs& a) {
  return conv_winograd_reject(a, a.shape.group_k());
}
static int64_t winograd_bytes(const ConvArgs& a, int64_t outputs, int64_t inputs) {
  return (outputs + 2 * cpu::kUnit) * inputs * 16 * (a.dtype == Dtype::f64 ? 8 : 4);
}
static int64_t conv_fprop_winograd_workspace(const ConvArgs& a) {
  return winograd_bytes(a, a.shape.group_k(), a.shape.group_c());
}
static int64_t conv_dgrad_winograd_workspace(const ConvArgs& a) {
  return winograd_bytes(a, a.shape.group_c(), a.shape.group_k());
}

static const char* conv_wgrad_winograd_reject(const ConvArgs& a) { return conv_winograd_reject(a, 16); }
static int64_t conv_wgrad_winograd_workspace(const ConvArgs& a) {
  const int64_t pieces = cpu::WinogradWgrad(a.shape).pieces;
  return std::max(pieces * winograd_bytes(a, a.shape.group_k(), a.shape.group_c()),
                  conv_wgrad_slab_workspace(a));
}

// Declares a kernel of one instruction set or of each, and makes the rows of the latter, the widest first.
#define KERNEL(Args, name)                               \
  namespace cpu {                                        \
  void name(const Args&, void* workspace, void* stream); \
  }
#define KERNEL_FOR_EACH_ISA(Args, name)                  \
  namespace cpu::portable {                              \
  void name(const Args&, void* workspace, void* stream); \
  }                                                      \
  namespace cpu::avx2 {                                  \
  void name(const Args&, void* workspace, void* stream); \
  }                                                      \
  namespace cpu::avx512 {                                \
  void name(const Args&, void* workspace, void* stream); \
  }
#define ROW_FOR(isa, file, name, reject, cost, workspace)                                     \
  {"cpu/" #name "_" #isa, file,      kAll,          kAny, static_cast<int>(Isa::isa), reject, \
   cost<Isa::isa>,        workspace, cpu::isa::name}
#if defined(__x86_64__)
#define ROWS_FOR_EACH_ISA(...) \
  ROW_FOR(avx512, __VA_ARGS__), ROW_FOR(avx2, __VA_ARGS__), ROW_FOR(portable, __VA_ARGS__)
#else
#define ROWS_FOR_EACH_ISA(...) ROW_FOR(portable, __VA_ARGS__)
#endif

// Depthwise rows meet whole vectors of channels; what they read and write is transposed or copied.
template <Isa isa>
static double conv_depthwise_us(const ConvArgs& a, int64_t channels, int64_t times) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const ConvShape& s = a.shape;
  const double blocks = double((channels + lanes - 1) / lanes * times);
  const double pixels = double(s.N) * double(s.out_cells() + s.in_cells()) / 2;
  return 2 + blocks * pixels * double(s.out_cells() * s.taps() + 10 * s.in_cells()) /
                 double(std::max<int64_t>(1, s.in_cells())) * 5e-4;
}
template <Isa isa>
static double conv_depthwise_cost(const ConvArgs& a) {
  return conv_depthwise_us<isa>(a, a.shape.K, 1);
}
// dgrad has input channels in the lanes, and meets each output channel of a group.
template <Isa isa>
static double conv_dgrad_depthwise_cost(const ConvArgs& a) {
  return conv_depthwise_us<isa>(a, a.shape.C, a.shape.group_k());
}
static const char* conv_depthwise_reject(const ConvArgs& a, const cpu::DepthwisePlan& plan) {
  const ConvShape& s = a.shape;
  if (s.group_c() != 1) return "has more than one input channel a group";
  if (s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0) return "has no depth";
  if (plan.band_bytes > cpu::kMostBandBytes) return "holds a band of 16 channels: it takes over 32 MiB";
  return conv_igemm_reject(a);
}
static const char* conv_depthwise_reject(const ConvArgs& a) {
  return conv_depthwise_reject(a, cpu::DepthwisePlan::fprop(a.shape));
}
static const char* conv_dgrad_depthwise_reject(const ConvArgs& a) {
  return conv_depthwise_reject(a, cpu::DepthwisePlan::dgrad(a.shape));
}
// Depthwise lines rows meet whole vectors of pixels; a plane costs what a few of them do. Measured on a Zen 5
// against the depthwise rows.
template <Isa isa>
static double conv_depthwise_lines_us(const ConvArgs& a, int64_t planes, int64_t rows, int64_t cols) {
  constexpr int64_t lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
  const double vectors = double(rows) * double((cols + lanes - 1) / lanes);
  return 2 + double(planes) * (0.05 + vectors * (2.4e-3 + double(a.shape.taps()) * 0.32e-3));
}
template <Isa isa>
static double conv_fprop_depthwise_lines_cost(const ConvArgs& a) {
  return conv_depthwise_lines_us<isa>(a, a.shape.N * a.shape.K, a.shape.P, a.shape.Q);
}
template <Isa isa>
static double conv_dgrad_depthwise_lines_cost(const ConvArgs& a) {
  return conv_depthwise_lines_us<isa>(a, a.shape.N * a.shape.C, a.shape.H, a.shape.W);
}
static const char* conv_fprop_depthwise_lines_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  if (s.group_c() != 1) return "has more than one input channel a group";
  if (s.R != s.S || (s.R != 3 && s.R != 5 && s.R != 7) || !s.stride.is_one() || !s.dilation.is_one())
    return "takes 3x3, 5x5 and 7x7 filters with stride and dilation one";
  if (a.layout != Layout::contiguous) return "needs pixels side by side";
  if (double(std::max(s.W, s.Q)) * 16 * 8 > double(cpu::kMostBandBytes))
    return "holds rows of the input: they take over 32 MiB";
  return conv_slab_reject(a);
}
static const char* conv_dgrad_depthwise_lines_reject(const ConvArgs& a) {
  return a.shape.group_k() > 1 ? "has more than one output channel a group"
                               : conv_fprop_depthwise_lines_reject(a);
}
static int64_t compute_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }
// The filter in lanes and the places of its rows and columns; for wgrad, sums in double.
static int64_t conv_depthwise_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return (s.K + cpu::kUnit * s.group_k()) * s.taps() * compute_size(a.dtype) +
         (s.R + s.S) * int64_t(sizeof(int64_t));
}
static int64_t conv_wgrad_depthwise_workspace(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t pieces = cpu::conv_wgrad_depthwise_pieces(s, s.N * cpu::DepthwisePlan::fprop(s).bands);
  return pieces * (s.K + cpu::kUnit) * s.taps() * int64_t(sizeof(double));
}

// Rows with the batch in the lanes compute whole vectors of images. A tile reuses what it loads for each of
// its output channels; `outputs` are those of a group.
template <Isa isa>
static double lanes_images(const ConvArgs& a) {
  constexpr int64_t bytes = isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16;
  const int64_t lanes = bytes / (a.dtype == Dtype::f64 ? 8 : 4);
  return double((a.shape.N + lanes - 1) / lanes * lanes) / double(std::max<int64_t>(a.shape.N, 1));
}
template <Isa isa>
static double lanes_macs_us(const ConvArgs& a, int64_t outputs) {
  constexpr double rate = isa == Isa::avx512 ? 70e3 : isa == Isa::avx2 ? 38e3 : 15e3;
  constexpr int64_t tile = isa == Isa::avx512 ? 3 : 2;
  return a.shape.macs() / rate * double(tile) / double(std::clamp<int64_t>(outputs, 1, tile));
}
template <Isa isa>
static double conv_lanes_us(const ConvArgs& a, int64_t outputs, double share) {
  const ConvShape& s = a.shape;
  const double activations = double(s.N) * double(s.K * s.out_cells() + s.C * s.in_cells());
  // Images change places with what lies side by side.
  const double sorted_us = isa == Isa::avx512 ? 1.5e-4 : a.layout == Layout::channels_last ? 3e-4 : 5e-4;
  return 3 + lanes_images<isa>(a) * (lanes_macs_us<isa>(a, outputs) / share + activations * sorted_us) +
         double(s.K * s.group_c() * s.taps()) * 5e-4;
}
template <Isa isa>
static double conv_fprop_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_k(), 1);
}
template <Isa isa>
static double conv_dgrad_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_c(), 1);
}
template <Isa isa>
static double conv_wgrad_lanes_cost(const ConvArgs& a) {
  return conv_lanes_us<isa>(a, a.shape.group_k(), 0.75);
}
template <Isa isa>
static double conv_backward_lanes_cost(const ConvActPoolBackwardArgs& a) {
  return conv_dgrad_lanes_cost<isa>(a.conv) + conv_wgrad_lanes_cost<isa>(a.conv);
}
template <class Plan>
static const char* conv_lanes_reject(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const Window& pool = a.epilogue.pool;
  if (s.D != 1 || s.T != 1 || s.Z != 1 || s.padding.d != 0) return "has no depth";
  if (a.epilogue.pools() && (pool.kernel.d != 1 || pool.padding.d != 0 || pool.out.d != 1))
    return "has no depth";
  if (a.epilogue.residual.data) return "does not add a residual";
  return Plan(a).band_bytes > cpu::kMostBandBytes ? "holds a band of 16 images: it takes over 32 MiB"
                                                  : nullptr;
}
static const char* conv_backward_lanes_reject(const ConvActPoolBackwardArgs& a) {
  const char* dgrad = conv_lanes_reject<cpu::LanesDgrad>(a.conv);
  return dgrad ? dgrad : conv_lanes_reject<cpu::LanesWgrad>(a.conv);
}
static const char* conv_fprop_lanes_reject(const ConvArgs& a) {
  const char* pools = does_not_pool(a);
  return pools ? pools : conv_lanes_reject<cpu::LanesForward>(a);
}
static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t filter_bytes(const ConvArgs& a, int64_t taps) {
  return padded(a.shape.K * a.shape.group_c() * a.shape.taps() * compute_size(a.dtype)) + padded(4 * taps);
}
static int64_t conv_fprop_lanes_workspace(const ConvArgs& a) {
  return filter_bytes(a, a.shape.group_c() * a.shape.taps()) + padded(a.shape.K * compute_size(a.dtype));
}
static int64_t conv_dgrad_lanes_workspace(const ConvArgs& a) {
  return filter_bytes(a, a.shape.group_k() * a.shape.taps()) +
         padded(a.shape.group_c() * compute_size(a.dtype));
}
static int64_t conv_wgrad_lanes_workspace(const ConvArgs& a) {
  const int64_t taps = a.shape.group_c() * a.shape.taps();
  return padded(cpu::LanesWgrad(a).pieces * a.shape.K * (taps + 1) * compute_size(a.dtype)) +
         padded(4 * taps);
}
static int64_t conv_backward_lanes_workspace(const ConvActPoolBackwardArgs& a) {
  return std::max(conv_dgrad_lanes_workspace(a.conv), conv_wgrad_lanes_workspace(a.conv));
}

KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_depthwise_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_pixels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_igemm)
KERNEL(ConvArgs, conv_fprop_naive)
constexpr Row<ConvArgs> kConvFprop[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_fprop_lanes, conv_fprop_lanes_reject, conv_fprop_lanes_cost,
                      conv_fprop_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_fprop_depthwise, conv_depthwise_reject,
                      conv_depthwise_cost, conv_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise_lines.cpp", conv_fprop_depthwise_lines,
                      conv_fprop_depthwise_lines_reject, conv_fprop_depthwise_lines_cost,
                      no_workspace<ConvArgs>),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_fprop_winograd, conv_fprop_winograd_reject,
                      conv_fprop_winograd_cost, conv_fprop_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_lines.cpp", conv_fprop_lines, conv_fprop_lines_reject, conv_fprop_lines_cost,
                      conv_lines_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_pixels.cpp", conv_fprop_pixels, conv_fprop_pixels_reject,
                      conv_fprop_pixels_cost, conv_fprop_pixels_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab.cpp", conv_fprop_slab, conv_slab_reject, conv_fprop_slab_cost,
                      conv_fprop_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_fprop_igemm, conv_igemm_reject, conv_igemm_cost,
                      no_workspace<ConvArgs>),
    {"cpu/conv_fprop_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, does_not_pool, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_fprop_naive},
};

KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_depthwise_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_pixels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_igemm)
KERNEL(ConvArgs, conv_dgrad_naive)
constexpr Row<ConvArgs> kConvDgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_dgrad_lanes, conv_lanes_reject<cpu::LanesDgrad>,
                      conv_dgrad_lanes_cost, conv_dgrad_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_dgrad_depthwise, conv_dgrad_depthwise_reject,
                      conv_dgrad_depthwise_cost, conv_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise_lines.cpp", conv_dgrad_depthwise_lines,
                      conv_dgrad_depthwise_lines_reject, conv_dgrad_depthwise_lines_cost,
                      no_workspace<ConvArgs>),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_dgrad_winograd, conv_dgrad_winograd_reject,
                      conv_dgrad_winograd_cost, conv_dgrad_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_lines.cpp", conv_dgrad_lines, conv_dgrad_lines_reject, conv_dgrad_lines_cost,
                      conv_lines_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_pixels.cpp", conv_dgrad_pixels, conv_dgrad_pixels_reject,
                      conv_dgrad_pixels_cost, conv_dgrad_pixels_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab.cpp", conv_dgrad_slab, conv_slab_reject, conv_dgrad_slab_cost,
                      conv_dgrad_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_dgrad_igemm, accept<ConvArgs>, conv_dgrad_igemm_cost,
                      no_workspace<ConvArgs>),
    {"cpu/conv_dgrad_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_dgrad_naive},
};

KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_igemm)
KERNEL(ConvArgs, conv_wgrad_naive)
constexpr Row<ConvArgs> kConvWgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_wgrad_lanes, conv_lanes_reject<cpu::LanesWgrad>,
                      conv_wgrad_lanes_cost, conv_wgrad_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_wgrad_depthwise, conv_depthwise_reject,
                      conv_depthwise_cost, conv_wgrad_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_wgrad_winograd, conv_wgrad_winograd_reject,
                      conv_wgrad_winograd_cost, conv_wgrad_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab_wgrad.cpp", conv_wgrad_slab, conv_slab_reject, conv_wgrad_slab_cost,
                      conv_wgrad_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_wgrad_igemm, accept<ConvArgs>, conv_igemm_cost,
                      conv_wgrad_igemm_workspace),
    {"cpu/conv_wgrad_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_wgrad_naive},
};

// Windows of a pool: what a strip holds is copied, element by element.
template <Isa isa>
static int64_t lanes_of(Dtype dtype) {
  return (isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16) / compute_size(dtype);
}
static double strips_us(const ConvArgs& a, const cpu::WindowStrip& strip) {
  const double count = std::ceil(double(a.epilogue.pool.out.h) / double(strip.rows)) * double(a.shape.N);
  return 1 + count * (0.2 + double(strip.size()) * 0.4e-3);
}
constexpr double window_rate(Isa isa) { return isa == Isa::avx512 ? 50e3 : isa == Isa::avx2 ? 25e3 : 10e3; }
template <Isa isa>
static double conv_windows_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t lanes = lanes_of<isa>(a.dtype);
  const Extent3& out = a.epilogue.pool.out;
  const double windows = double(s.N * out.h) * double((out.w + lanes - 1) / lanes * lanes);
  return strips_us(a, cpu::WindowStrip::windows(a, lanes)) +
         windows * 4 * double(s.K * s.group_c() * s.taps()) / window_rate(isa);
}
template <Isa isa>
static double conv_channels_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t lanes = lanes_of<isa>(a.dtype);
  const double channels = double(s.groups * ((s.group_k() + lanes - 1) / lanes * lanes));
  const double taps = double(s.group_c() * s.taps()),
               windows = double(s.N) * double(a.epilogue.pool.out.cells());
  return strips_us(a, cpu::WindowStrip::channels(a)) + channels * taps * 0.2e-3 +
         windows * double(s.K) * 0.5e-3 + windows * 4 * channels * taps / window_rate(isa);
}
static const char* conv_windows_reject(const ConvArgs& a) {
  if (!a.epilogue.pools() || !cpu::is_tile(a.epilogue.pool)) return "pools 2x2 windows of stride 2, unpadded";
  const char* reason = conv_lanes_reject<cpu::LanesForward>(a);
  if (reason) return reason;
  return cpu::WindowStrip::windows(a, 16).size() > cpu::kMostBandBytes / 8
             ? "holds the input under a row of windows: it takes over 32 MiB"
             : nullptr;
}
static int64_t window_workspace(const ConvArgs& a, int64_t lanes) {
  return a.dtype == Dtype::f64 ? cpu::bytes_of<cpu::WindowTables<double>>(a.shape, lanes)
                               : cpu::bytes_of<cpu::WindowTables<float>>(a.shape, lanes);
}
static int64_t conv_windows_workspace(const ConvArgs& a) { return window_workspace(a, 1); }
static int64_t conv_channels_workspace(const ConvArgs& a) {
  return window_workspace(a, 64 / compute_size(a.dtype));
}

KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_windows)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_channels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_lanes)
constexpr Row<ConvArgs> kConvActPool[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_act_pool_lanes, conv_lanes_reject<cpu::LanesForward>,
                      conv_fprop_lanes_cost, conv_fprop_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_windows.cpp", conv_act_pool_windows, conv_windows_reject, conv_windows_cost,
                      conv_windows_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_windows.cpp", conv_act_pool_channels, conv_windows_reject, conv_channels_cost,
                      conv_channels_workspace),
    {"cpu/conv_act_pool_composed", "core/composed.cpp", kAll, kAny, kPortable, accept<ConvArgs>,
     composed::conv_act_pool_cost, composed::conv_act_pool_workspace, composed::conv_act_pool},
};

KERNEL_FOR_EACH_ISA(ConvActPoolBackwardArgs, conv_act_pool_backward_lanes)
constexpr Row<ConvActPoolBackwardArgs> kConvActPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_act_pool_backward_lanes, conv_backward_lanes_reject,
                      conv_backward_lanes_cost, conv_backward_lanes_workspace),
    {"cpu/conv_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     accept<ConvActPoolBackwardArgs>, composed::conv_act_pool_backward_cost,
     composed::conv_act_pool_backward_workspace, composed::conv_act_pool_backward},
};

KERNEL_FOR_EACH_ISA(PoolArgs, max_pool_rows)
KERNEL(PoolArgs, max_pool_naive)
constexpr Row<PoolArgs> kMaxPool[] = {
    ROWS_FOR_EACH_ISA("cpu/max_pool_rows.cpp", max_pool_rows, max_pool_rows_reject, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/max_pool_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, max_pool_backward_rows)
KERNEL(PoolArgs, max_pool_backward_naive)
constexpr Row<PoolArgs> kMaxPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/max_pool_backward_rows.cpp", max_pool_backward_rows, max_pool_rows_reject,
                      pool_rows_cost, no_workspace<PoolArgs>),
    {"cpu/max_pool_backward_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_backward_naive},
};

KERNEL(PoolArgs, max_pool_gather_naive)
constexpr Row<PoolArgs> kMaxPoolGather[] = {
    {"cpu/max_pool_gather_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_gather_naive},
};

KERNEL(PoolArgs, max_pool_indices_naive)
constexpr Row<PoolArgs> kMaxPoolIndices[] = {
    {"cpu/max_pool_indices_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_indices_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, avg_pool_rows)
KERNEL(PoolArgs, avg_pool_naive)
constexpr Row<PoolArgs> kAvgPool[] = {
    ROWS_FOR_EACH_ISA("cpu/avg_pool_rows.cpp", avg_pool_rows, accept<PoolArgs>, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/avg_pool_naive", "cpu/avg_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, cpu::avg_pool_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, avg_pool_backward_rows)
KERNEL(PoolArgs, avg_pool_backward_naive)
constexpr Row<PoolArgs> kAvgPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/avg_pool_rows.cpp", avg_pool_backward_rows, accept<PoolArgs>, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/avg_pool_backward_naive", "cpu/avg_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::avg_pool_backward_naive},
};

// Batch-norm reads x twice forward, and, with the gradients, twice backward.
static double norm_elements(const NormArgs& a) { return double(a.N) * double(a.C) * double(a.cells()); }
static double norm_naive_cost(const NormArgs& a) { return 0.5 + norm_elements(a) * 3e-2; }
static const char* norm_naive_reject(const NormArgs& a) { return a.pools() ? "does not pool" : nullptr; }
static const char* norm_backward_naive_reject(const NormBackwardArgs& a) { return norm_naive_reject(a.norm); }
template <Isa isa>
static double norm_rows_cost(const NormArgs& a) {
  return 1 + norm_elements(a) * (isa == Isa::avx512 ? 4e-4 : isa == Isa::avx2 ? 6e-4 : 12e-4);
}
template <Isa isa>
static double norm_backward_rows_cost(const NormBackwardArgs& a) {
  return norm_rows_cost<isa>(a.norm);
}
static const char* norm_rows_reject(const NormArgs& a) {
  if (a.D != 1 || a.window.kernel.d != 1 || a.window.out.d != 1) return "has no depth";
  if (a.pools() && !cpu::is_tile(a.window)) return "pools 2x2 windows of stride 2, unpadded, or none";
  const bool by_channels = cpu::NormPlan(a).by_channels;
  for (const View& v : {a.x, a.y, a.offsets})
    if (v.data && (by_channels ? v.c : v.w) != 1) return "needs dense rows, or else dense channels";
  return nullptr;
}
static const char* norm_backward_rows_reject(const NormBackwardArgs& a) {
  const bool by_channels = cpu::NormPlan(a.norm).by_channels;
  for (const View& v : {a.grad_y, a.grad_x})
    if (v.data && (by_channels ? v.c : v.w) != 1) return "needs dense rows, or else dense channels";
  return norm_rows_reject(a.norm);
}
static int64_t norm_rows_workspace(const NormArgs& a) { return cpu::NormPlan(a).workspace_bytes(); }
static int64_t norm_backward_rows_workspace(const NormBackwardArgs& a) { return norm_rows_workspace(a.norm); }
static double norm_backward_naive_cost(const NormBackwardArgs& a) { return norm_naive_cost(a.norm); }

KERNEL_FOR_EACH_ISA(NormArgs, norm_act_pool_rows)
KERNEL(NormArgs, norm_act_pool_naive)
constexpr Row<NormArgs> kNormActPool[] = {
    ROWS_FOR_EACH_ISA("cpu/norm_rows.cpp", norm_act_pool_rows, norm_rows_reject, norm_rows_cost,
                      norm_rows_workspace),
    {"cpu/norm_act_pool_naive", "cpu/norm_naive.cpp", kAll, kAny, kPortable, norm_naive_reject,
     norm_naive_cost, no_workspace<NormArgs>, cpu::norm_act_pool_naive},
    {"cpu/norm_act_pool_composed", "core/composed.cpp", kAll, kAny, kPortable, composed::norm_act_pool_reject,
     composed::norm_act_pool_cost, composed::norm_act_pool_workspace, composed::norm_act_pool},
};

KERNEL_FOR_EACH_ISA(NormBackwardArgs, norm_act_pool_backward_rows)
KERNEL(NormBackwardArgs, norm_act_pool_backward_naive)
constexpr Row<NormBackwardArgs> kNormActPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/norm_rows.cpp", norm_act_pool_backward_rows, norm_backward_rows_reject,
                      norm_backward_rows_cost, norm_backward_rows_workspace),
    {"cpu/norm_act_pool_backward_naive", "cpu/norm_naive.cpp", kAll, kAny, kPortable,
     norm_backward_naive_reject, norm_backward_naive_cost, no_workspace<NormBackwardArgs>,
     cpu::norm_act_pool_backward_naive},
    {"cpu/norm_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     composed::norm_act_pool_backward_reject, composed::norm_act_pool_backward_cost,
     composed::norm_act_pool_backward_workspace, composed::norm_act_pool_backward},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_fprop_dot)
KERNEL_FOR_EACH_ISA(LinearArgs, linear_fprop_gemm)
KERNEL(LinearArgs, linear_fprop_naive)
constexpr Row<LinearArgs> kLinearFprop[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_fprop_dot, linear_dot_reject, linear_dot_cost,
                      no_workspace<LinearArgs>),
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_fprop_gemm, accept<LinearArgs>, linear_fprop_gemm_cost,
                      linear_fprop_gemm_workspace),
    {"cpu/linear_fprop_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_fprop_naive},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_dgrad_gemm)
KERNEL(LinearArgs, linear_dgrad_naive)
constexpr Row<LinearArgs> kLinearDgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_dgrad_gemm, accept<LinearArgs>, linear_dgrad_gemm_cost,
                      linear_dgrad_gemm_workspace),
    {"cpu/linear_dgrad_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_dgrad_naive},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_wgrad_gemm)
KERNEL(LinearArgs, linear_wgrad_naive)
constexpr Row<LinearArgs> kLinearWgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_wgrad_gemm, accept<LinearArgs>, linear_wgrad_gemm_cost,
                      linear_wgrad_gemm_workspace),
    {"cpu/linear_wgrad_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_wgrad_naive},
};

constexpr Row<LinearActBackwardArgs> kLinearActBackward[] = {
    {"cpu/linear_act_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     accept<LinearActBackwardArgs>, composed::linear_act_backward_cost,
     composed::linear_act_backward_workspace, composed::linear_act_backward},
};

// Of a chain only the input changes its layout; `share` is the part of the forward pass's rate.
template <Isa isa>
static double chain_lanes_us(const ChainArgs& a, double share) {
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
static double chain_lanes_cost(const ChainArgs& a) {
  return chain_lanes_us<isa>(a, 1);
}
template <Isa isa>
static double chain_backward_lanes_cost(const ChainBackwardArgs& a) {
  return chain_lanes_us<isa>(a.chain, 0.4);
}
template <Isa>
static const char* chain_lanes_reject(const ChainArgs& a) {
  for (int64_t i = 0; i < a.count; ++i)
    if (offset_type(a.stages[i].conv.epilogue.pool.kernel.cells()) != Offset::u8)
      return "keeps offsets in a byte: a window has over 255 cells";
  return cpu::chain_block_bytes(cpu::ChainBands(a)) > cpu::kMostBandBytes
             ? "holds 16 images of all stages: they take over 32 MiB"
             : nullptr;
}
template <Isa isa>
static const char* chain_backward_lanes_reject(const ChainBackwardArgs& a) {
  constexpr const char* name = isa == Isa::avx512 ? "cpu/chain_lanes_avx512"
                               : isa == Isa::avx2 ? "cpu/chain_lanes_avx2"
                                                  : "cpu/chain_lanes_portable";
  return strcmp(a.forward, name) == 0 ? nullptr
                                      : "reads what the lanes of its own instruction set have saved";
}
template <template <class> class Tables, class Plan>
static int64_t chain_lanes_bytes(Dtype dtype, const Plan& plan) {
  return dtype == Dtype::f64 ? cpu::bytes_of<Tables<double>>(plan) : cpu::bytes_of<Tables<float>>(plan);
}
static int64_t chain_lanes_workspace(const ChainArgs& a) {
  return chain_lanes_bytes<cpu::ChainForwardTables>(a.dtype, cpu::ChainBands(a));
}
static int64_t chain_backward_lanes_workspace(const ChainBackwardArgs& a) {
  return chain_lanes_bytes<cpu::ChainBackwardTables>(a.chain.dtype, cpu::ChainBackwardPlan(a));
}

// Rows of the chain: they save numbers as they compute with them.
#define CHAIN_ROW_FOR(isa, name)                  \
  {"cpu/" #name "_" #isa,                         \
   "cpu/chain_lanes.cpp",                         \
   dtype_bit(Dtype::f32) | dtype_bit(Dtype::f64), \
   kAny,                                          \
   static_cast<int>(Isa::isa),                    \
   name##_reject<Isa::isa>,                       \
   name##_cost<Isa::isa>,                         \
   name##_workspace,                              \
   cpu::isa::name}
#if defined(__x86_64__)
#define CHAIN_ROWS_FOR_EACH_ISA(name) \
  CHAIN_ROW_FOR(avx512, name), CHAIN_ROW_FOR(avx2, name), CHAIN_ROW_FOR(portable, name)
#else
#define CHAIN_ROWS_FOR_EACH_ISA(name) CHAIN_ROW_FOR(portable, name)
#endif

KERNEL_FOR_EACH_ISA(ChainArgs, chain_lanes)
constexpr Row<ChainArgs> kChain[] = {
    CHAIN_ROWS_FOR_EACH_ISA(chain_lanes),
    {"cpu/chain_composed", "core/composed_chain.cpp", kAll, kAny, kPortable, accept<ChainArgs>,
     composed::chain_cost, composed::chain_workspace, composed::chain},
};

KERNEL_FOR_EACH_ISA(ChainBackwardArgs, chain_backward_lanes)
constexpr Row<ChainBackwardArgs> kChainBackward[] = {
    CHAIN_ROWS_FOR_EACH_ISA(chain_backward_lanes),
    {"cpu/chain_backward_composed", "core/composed_chain.cpp", kAll, kAny, kPortable,
     composed::chain_backward_reject, composed::chain_backward_cost, composed::chain_backward_workspace,
     composed::chain_backward},
};

const Tables cpu::tables = {
    table_of(kConvFprop),           table_of(kConvDgrad),
    table_of(kConvWgrad),           table_of(kConvActPool),
    table_of(kConvActPoolBackward), table_of(kMaxPool),
    table_of(kMaxPoolBackward),     table_of(kMaxPoolGather),
    table_of(kMaxPoolIndices),      table_of(kAvgPool),
    table_of(kAvgPoolBackward),     table_of(kNormActPool),
    table_of(kNormActPoolBackward), table_of(kLinearFprop),
    table_of(kLinearDgrad),         table_of(kLinearWgrad),
    table_of(kLinearActBackward),   table_of(kChain),
    table_of(kChainBackward),
};

}  // namespace fastconv
