// SPDX-License-Identifier: MIT
// How work is cut, where the table has to know it too: it asks for the workspace that a kernel will
// use. A plan is a function of the shape alone.
#pragma once

#include <algorithm>

#include "core/args.h"

namespace fastconv::cpu {

// Pieces that conv_wgrad_igemm cuts the sum over batch and output positions into.
inline int64_t conv_wgrad_igemm_pieces(const ConvShape& s) {
  constexpr int64_t kLeastDepth = 768, kEnoughTasks = 32;
  const int64_t depth = s.N * s.out_cells();
  const int64_t blocks = s.groups * ((s.group_k() + 119) / 120) * ((s.group_c() * s.taps() + 191) / 192);
  return std::max<int64_t>(1, std::min(depth / kLeastDepth, kEnoughTasks / std::max<int64_t>(1, blocks)));
}

// The i-th of `count` parts of [0, total), which differ by one at most.
inline int64_t part_begin(int64_t i, int64_t count, int64_t total) {
  return total / count * i + std::min(i, total % count);
}

struct Rows {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// conv_lanes: its vectors hold up to 64 bytes, so kUnit images or fewer. A band of rows is as high as
// kBandBytes allow, and flat enough that there are some tasks to share out.
inline constexpr int64_t kUnit = 16, kVector = 64, kBandBytes = 1 << 20, kMostBandBytes = 1 << 25;

// In how many bands `rows` go, where a band of some rows takes bytes(rows).
template <class Bytes>
int64_t bands_of(const ConvShape& s, int64_t rows, const Bytes& bytes) {
  const double task_macs = s.macs() / double(std::max<int64_t>(s.N, 1)) * double(std::min(s.N, kUnit));
  const int64_t blocks = (s.N + kUnit - 1) / kUnit;
  int64_t bands = 1;
  while (bands < rows && (bytes((rows + bands - 1) / bands) > kBandBytes ||
                          (blocks * bands < 4 && task_macs / double(bands) > 4e6)))
    ++bands;
  return bands;
}

// Rough time of a task that computes `lanes` images of one band.
inline double lanes_task_us(const ConvShape& s, int64_t bands, int lanes) {
  return s.macs() / double(std::max<int64_t>(s.N, 1)) / double(bands) * lanes / (5e3 * lanes);
}

// 2x2/2 without padding.
inline bool is_tile(const Window& v) {
  return v.kernel.h == 2 && v.kernel.w == 2 && v.stride.h == 2 && v.stride.w == 2 && v.padding.h == 0 &&
         v.padding.w == 0;
}

struct LanesForward {
  const ConvShape& shape;
  Window window;
  bool pools_tile = false, pools_band = false;  // 2x2/2 windows in registers, others from the band
  int64_t rows, cols;                           // of the output
  int64_t bands, band_bytes;
  int64_t conv_rows;  // at most, for a band of outputs

  explicit LanesForward(const ConvArgs& a)
      : shape(a.shape), window(a.epilogue.pool), rows(a.shape.P), cols(a.shape.Q) {
    if (a.epilogue.pools()) {
      const Window& v = window;
      pools_tile = is_tile(v);
      pools_band = !pools_tile;
      rows = v.out.h, cols = v.out.w;
    }
    const int64_t outputs = a.epilogue.offsets.data ? 2 : 1;
    const auto bytes = [&](int64_t band) {
      const int64_t conv = most_conv_rows(band);
      return kVector * (shape.C * in_rows(conv) * in_cols() + shape.K * band * cols * outputs +
                        (pools_band ? shape.K * conv * shape.Q : 0));
    };
    bands = bands_of(shape, rows, bytes);
    band_bytes = bytes((rows + bands - 1) / bands);
    conv_rows = most_conv_rows((rows + bands - 1) / bands);
  }
  int64_t most_conv_rows(int64_t band) const {
    if (!pools_tile && !pools_band) return band;
    return std::min(shape.P, (band - 1) * window.stride.h + (window.kernel.h - 1) * window.dilation.h + 1);
  }
  int64_t in_rows(int64_t conv) const {
    return (conv - 1) * shape.stride.h + (shape.R - 1) * shape.dilation.h + 1;
  }
  int64_t in_cols() const { return (shape.Q - 1) * shape.stride.w + (shape.S - 1) * shape.dilation.w + 1; }
  Rows output_rows(int64_t band) const {
    return {part_begin(band, bands, rows), part_begin(band + 1, bands, rows)};
  }
  // Rows of the convolution that these rows of output need.
  Rows conv_rows_of(const Rows& y) const {
    if (!pools_tile && !pools_band) return y;
    const int64_t begin = y.begin * window.stride.h - window.padding.h;
    const int64_t end =
        (y.end - 1) * window.stride.h - window.padding.h + (window.kernel.h - 1) * window.dilation.h + 1;
    return {std::max<int64_t>(begin, 0), std::min(end, shape.P)};
  }
  double task_us(int lanes) const { return lanes_task_us(shape, bands, lanes); }
};

// What dgrad and wgrad keep of the gradient for each of its pixels: the gradient itself, and, of what
// follows the convolution, a gradient, a gate and an offset.
inline constexpr int64_t kGradientVectors = 4;

struct LanesDgrad {
  const ConvShape& shape;
  int64_t bands, rows_per_band, band_bytes;

  explicit LanesDgrad(const ConvArgs& a) : shape(a.shape) {
    const auto bytes = [&](int64_t band) {
      return kVector *
             (shape.C * band * shape.W + kGradientVectors * shape.K * gradient_rows(band) * gradient_cols());
    };
    bands = bands_of(shape, shape.H, bytes);
    rows_per_band = (shape.H + bands - 1) / bands;
    band_bytes = bytes(rows_per_band);
  }
  int64_t gradient_rows(int64_t band) const {
    return (band - 1 + (shape.R - 1) * shape.dilation.h) / shape.stride.h + 2;
  }
  int64_t gradient_cols() const {
    return (shape.W - 1 + (shape.S - 1) * shape.dilation.w) / shape.stride.w + 2;
  }
  Rows input_rows(int64_t band) const {
    return {part_begin(band, bands, shape.H), part_begin(band + 1, bands, shape.H)};
  }
  double task_us(int lanes) const { return lanes_task_us(shape, bands, lanes); }
};

struct LanesWgrad {
  const ConvShape& shape;
  int64_t bands, rows_per_band, band_bytes;
  int64_t units, pieces;  // a unit is a band of kUnit images

  explicit LanesWgrad(const ConvArgs& a) : shape(a.shape) {
    const auto bytes = [&](int64_t band) {
      return kVector * (shape.C * in_rows(band) * in_cols() + kGradientVectors * shape.K * band * shape.Q);
    };
    bands = bands_of(shape, shape.P, bytes);
    rows_per_band = (shape.P + bands - 1) / bands;
    band_bytes = bytes(rows_per_band);
    units = (shape.N + kUnit - 1) / kUnit * bands;
    constexpr int64_t kMostPieces = 16, kMostSums = 1 << 22;
    const int64_t sums = shape.K * (shape.group_c() * shape.taps() + 1);
    pieces = std::max<int64_t>(1, std::min({units, kMostPieces, kMostSums / std::max<int64_t>(1, sums)}));
  }
  int64_t in_rows(int64_t band) const {
    return (band - 1) * shape.stride.h + (shape.R - 1) * shape.dilation.h + 1;
  }
  int64_t in_cols() const { return (shape.Q - 1) * shape.stride.w + (shape.S - 1) * shape.dilation.w + 1; }
  Rows output_rows(int64_t band) const {
    return {part_begin(band, bands, shape.P), part_begin(band + 1, bands, shape.P)};
  }
  int64_t unit(int64_t piece) const { return part_begin(piece, pieces, units); }
  double piece_us() const { return shape.macs() / double(pieces) / 5e4; }
};

// conv_depthwise: a task is a block of channels and a band of rows that fits the second-level cache. `rows` x
// `cols` are what fprop and dgrad write, and what wgrad reads of the gradient; around them lies what is read.
struct DepthwisePlan {
  int64_t rows, cols, bands = 1;
  int64_t read_rows = 0, read_cols, planes;  // planes are read for each channel that is written
  int64_t band_bytes = 0;

  static DepthwisePlan fprop(const ConvShape& s) {
    return {s.P, s.Q, (s.Q - 1) * s.stride.w + (s.S - 1) * s.dilation.w + 1, 1,
            [&](int64_t band) { return (band - 1) * s.stride.h + (s.R - 1) * s.dilation.h + 1; }};
  }
  static DepthwisePlan dgrad(const ConvShape& s) {
    return {s.H, s.W, (s.W - 1 + (s.S - 1) * s.dilation.w) / s.stride.w + 2, s.group_k(),
            [&](int64_t band) { return (band - 1 + (s.R - 1) * s.dilation.h) / s.stride.h + 2; }};
  }
  Rows band(int64_t i) const { return {part_begin(i, bands, rows), part_begin(i + 1, bands, rows)}; }

 private:
  template <class ReadRows>
  DepthwisePlan(int64_t rows, int64_t cols, int64_t read_cols, int64_t planes, const ReadRows& read)
      : rows(rows), cols(cols), read_cols(read_cols), planes(planes) {
    constexpr int64_t kBytes = 3 << 17;
    for (;; ++bands) {
      const int64_t band = (rows + bands - 1) / bands;
      read_rows = read(band);
      band_bytes = kVector * (planes * read_rows * read_cols + band * cols);
      if (band_bytes <= kBytes || bands >= rows) return;
    }
  }
};

// conv_lines: a task is a band of about kBandPixels outputs of an image, or less where tasks are few.
struct RowBands {
  int64_t rows, count;

  RowBands(int64_t images, int64_t rows, int64_t cols) : rows(rows) {
    constexpr int64_t kBandPixels = 448, kEnoughTasks = 8;
    const int64_t enough = (kEnoughTasks + images - 1) / std::max<int64_t>(1, images);
    count = std::clamp<int64_t>(std::max(rows * cols / kBandPixels, enough), 1, std::max<int64_t>(1, rows));
  }
  Rows band(int64_t i) const { return {part_begin(i, count, rows), part_begin(i + 1, count, rows)}; }
  int64_t most_rows() const { return (rows + count - 1) / count; }
};

// conv_wgrad_slab: blocks of input channels x blocks of output channels x pieces of units, bands of an image
// of about kBandPixels outputs. Each piece has sums of its own, so that pieces come last.
struct SlabWgrad {
  // Output channels of a micro-tile; a block is a multiple of them.
  static constexpr int64_t kMostColumns = 48;

  int64_t rows, bands, units, channels, blocks, output_blocks, pieces;

  explicit SlabWgrad(const ConvShape& s) : rows(s.P) {
    constexpr int64_t kBandPixels = 256, kBlockRows = 288, kEnoughTasks = 16, kMostSums = 1 << 21;
    constexpr int64_t kLeastColumns = 4;  // of micro-tiles in a block
    bands = std::clamp<int64_t>((s.P * s.Q + kBandPixels - 1) / kBandPixels, 1, s.P);
    units = s.N * bands;
    channels = std::min((kBlockRows / s.taps() + kUnit) / kUnit * kUnit, s.group_c());
    blocks = (s.group_c() + channels - 1) / channels;
    const int64_t sums = s.groups * s.group_c() * s.taps() * (s.group_k() + kMostColumns);
    const int64_t enough = kEnoughTasks / (s.groups * blocks);
    pieces = std::max<int64_t>(1, std::min({units, enough, kMostSums / std::max<int64_t>(1, sums)}));
    output_blocks = std::max<int64_t>(1, std::min(columns(s) / kLeastColumns, enough / pieces));
  }
  Rows band(int64_t i) const { return {part_begin(i, bands, rows), part_begin(i + 1, bands, rows)}; }
  int64_t rows_per_band() const { return (rows + bands - 1) / bands; }
  // The output channels of a block.
  Rows outputs(const ConvShape& s, int64_t block) const {
    return {part_begin(block, output_blocks, columns(s)) * kMostColumns,
            std::min(s.group_k(), part_begin(block + 1, output_blocks, columns(s)) * kMostColumns)};
  }

 private:
  static int64_t columns(const ConvShape& s) { return (s.group_k() + kMostColumns - 1) / kMostColumns; }
};

// conv_wgrad_winograd: blocks of channels and of output channels x pieces of the tiles, which are met in
// blocks.
struct WinogradWgrad {
  static constexpr int64_t kTiles = 48, kChannels = 64, kOutputs = 128;

  int64_t tile_rows, tile_cols, tiles, blocks, channel_blocks, output_blocks, pieces;

  explicit WinogradWgrad(const ConvShape& s)
      : tile_rows((s.P + 1) / 2),
        tile_cols((s.Q + 1) / 2),
        tiles(s.N * tile_rows * tile_cols),
        blocks((tiles + kTiles - 1) / kTiles),
        channel_blocks((s.group_c() + kChannels - 1) / kChannels),
        output_blocks((s.group_k() + kOutputs - 1) / kOutputs) {
    constexpr int64_t kEnoughTasks = 16, kLeastTasks = 8, kMostSums = 1 << 18;
    const int64_t tasks = std::max<int64_t>(1, channel_blocks * output_blocks);
    const int64_t fit = kMostSums / std::max<int64_t>(1, 16 * s.group_c() * s.group_k());
    pieces = std::min(blocks, std::clamp<int64_t>(fit, (kLeastTasks + tasks - 1) / tasks,
                                                  (kEnoughTasks + tasks - 1) / tasks));
  }
  int64_t tasks() const { return channel_blocks * output_blocks * pieces; }
};

// Pieces that conv_wgrad_depthwise cuts its units, bands of an image, into.
inline int64_t conv_wgrad_depthwise_pieces(const ConvShape& s, int64_t units) {
  constexpr int64_t kEnoughTasks = 32, kChannels = 64;
  const int64_t blocks = (s.K + kChannels - 1) / kChannels;
  return std::max<int64_t>(1, std::min(units, kEnoughTasks / std::max<int64_t>(1, blocks)));
}

// How linear_gemm forms c[m, n] = sum over k of a[m, k] b[k, n]. Elements that are met few times are
// read where they are, and so is an a whose rows are dense.
inline constexpr int64_t kFewLinear = 16, kMostLanes = 16;

inline bool linear_gemm_in_place(Dtype dtype, int64_t m, int64_t n, int64_t k, const Matrix& b) {
  return dtype_size(dtype) >= 4 && b.col == 1 && n >= kMostLanes && (m <= kFewLinear || k <= kFewLinear);
}
inline bool linear_gemm_rows_in_place(Dtype dtype, int64_t k, const Matrix& a) {
  return dtype_size(dtype) >= 4 && (a.col == 1 || k <= kFewLinear);
}

// Whether b is packed once, for all tasks: where it has to be transposed, and several tasks meet it.
inline constexpr int64_t kLinearBlock = 240;
inline bool linear_gemm_shares(int64_t m, const Matrix& b) { return b.col != 1 && m > kLinearBlock; }

// Elements of its workspace: b in panels of whole vectors and a in tiles.
inline int64_t linear_gemm_elements(Dtype dtype, int64_t m, int64_t n, int64_t k, const Matrix& a,
                                    const Matrix& b) {
  return (linear_gemm_shares(m, b) ? k * (n + kMostLanes) : 0) +
         (linear_gemm_rows_in_place(dtype, k, a) ? 0 : k * (m + kMostLanes));
}

// What max_pool_rows keeps tables for.
inline constexpr int64_t kMostPoolColumns = 128, kMostPoolRows = 256, kMostPoolCells = 1024;

inline bool max_pool_rows_fits(const Window& v) {
  const auto span = [](int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; };
  const int64_t columns = span(v.kernel.w, v.dilation.w), lines = span(v.kernel.h, v.dilation.h),
                planes = span(v.kernel.d, v.dilation.d);
  return columns <= kMostPoolColumns && lines <= kMostPoolColumns && planes <= kMostPoolColumns &&
         lines * planes <= kMostPoolRows && v.kernel.cells() <= kMostPoolCells &&
         v.stride.w <= kMostPoolColumns && v.stride.h <= kMostPoolColumns && v.stride.d <= kMostPoolColumns;
}

}  // namespace fastconv::cpu
