// SPDX-License-Identifier: MIT
// How a chain is cut into blocks, or clusters of blocks, of images, and what they keep in shared memory, as
// plain C++: the table plans in every build, the launcher follows the same plan. The order of a sum depends
// on the shape alone; the GPU only decides how many images and blocks work together.
#pragma once

#include "core/chain_args.h"
#include "cuda/conv_direct.h"

namespace fastconv::cuda {

inline constexpr int kFusedThreads = 256;
inline constexpr int kFusedWarps = kFusedThreads / 32;
inline constexpr int64_t kFusedStages = 12;       // of the kernel
inline constexpr int64_t kFusedImages = 16;       // of a block or cluster, at most
inline constexpr int64_t kFusedCluster = 8;       // blocks of a cluster, at most
inline constexpr int64_t kFusedFilter = 6 << 10;  // weights in shared memory, if one channel has no more

// Shared memory that one block may ask for.
inline int64_t most_shared_bytes(int level) {
  const bool is_ampere = level == 80 || level == 87, is_hopper = level >= 90 && level < 120;
  return (level < 80 ? 64 : is_ampere ? 163 : is_hopper ? 227 : 99) << 10;
}

// What a stage reads of one image: [channels][h][pitch] in shared memory. Around the image, whose first pixel
// lies at (top, left), are zeros.
struct FusedTile {
  int64_t channels = 1, h = 1, pitch = 1, top = 0, left = 0;

  int64_t size() const { return ceil_div(channels * h * pitch, 4) * 4; }
};

// A stage of the kernel: a convolution with its ReLU and a 2x2 pool; a pool with any other window; a linear
// layer.
enum class FusedKind : uint8_t { conv, pool, linear };

struct FusedStage {
  FusedKind kind = FusedKind::conv;
  const ConvArgs* conv = nullptr;  // that it is, or is a part of
  int64_t ends = -1;               // the stage of the chain whose output it makes; -1: a pool follows
  FusedTile x;
  // A convolution: patches of a plane, tiles of channels of a group, lanes that share the channels of a
  // patch, channels whose filter is in shared memory at a time.
  bool pools = false, wide = false;  // wide: DirectPatch4x6, else DirectPatch2x8
  int64_t rows = 0, cols = 0, tiles = 0, splits = 1, chunk = 0;

  int64_t patch_cols() const { return wide ? DirectPatch4x6::kCols : DirectPatch2x8::kCols; }
  int64_t patch_channels() const { return wide ? DirectPatch4x6::kChannels : DirectPatch2x8::kChannels; }
  int64_t patch_values() const { return wide ? DirectPatch4x6::kValues : DirectPatch2x8::kValues; }
  int64_t patches() const { return conv->shape.groups * tiles * rows * cols; }
  int64_t filter() const {
    return conv->shape.groups * tiles * chunk * conv->shape.taps() * kDirectFilterPitch;
  }
  Extent3 filtered() const {  // before the pool
    return {1, conv->shape.P, conv->shape.Q};
  }
  bool has_few_taps() const {  // as convolve() takes them
    const ConvShape& s = conv->shape;
    return s.R == s.S && (s.R == 3 || s.R == 5) && s.stride.is_one() && s.dilation.is_one();
  }
};

inline bool is_2x2(const Window& v) {
  return v.kernel.h == 2 && v.kernel.w == 2 && v.stride.h == 2 && v.stride.w == 2 && v.padding.h == 0 &&
         v.padding.w == 0 && v.dilation.is_one();
}

// `most_images`: that a block may take.
inline FusedStage fused_conv(const ConvArgs& conv, int64_t most_images = kFusedImages / 2) {
  const ConvShape& s = conv.shape;
  const Epilogue& e = conv.epilogue;
  FusedStage f;
  f.conv = &conv;
  f.pools = e.pools() && is_2x2(e.pool);
  const int64_t images = std::clamp<int64_t>(ceil_div(s.N, kDirectMultiprocessors), 1, most_images);
  const auto cut = [&](bool wide) {  // returns what a thread sums
    f.wide = wide;
    f.rows = f.pools ? e.pool.out.h : ceil_div(s.P, 2);
    f.cols = ceil_div(f.pools ? 2 * e.pool.out.w : s.Q, f.patch_cols());
    f.tiles = ceil_div(s.group_k(), f.patch_channels());
    f.splits = 1;  // more where a block of few images has too few patches
    while (f.splits < kFewChannels && 2 * f.splits <= s.group_c() &&
           2 * f.splits * images * f.patches() <= kFusedThreads)
      f.splits *= 2;
    return ceil_div(images * f.patches(), kFusedThreads) * f.patch_values() * ceil_div(s.group_c(), f.splits);
  };
  const int64_t values = cut(false);
  if (conv.dtype == Dtype::f32 && f.has_few_taps() && cut(true) >= values) cut(false);
  f.chunk = std::max<int64_t>(1, s.group_c());
  while (f.chunk > 1 && f.filter() > kFusedFilter) f.chunk = ceil_div(f.chunk, 2);
  const auto reach = [](int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
    return (outputs - 1) * stride + (taps - 1) * dilation + 1;
  };
  DirectTile tile;
  tile.w = std::max(reach(f.cols * f.patch_cols(), s.stride.w, s.S, s.dilation.w), s.padding.w + s.W);
  f.x = {s.C, std::max(reach(f.rows * 2, s.stride.h, s.R, s.dilation.h), s.padding.h + s.H), tile.pitch(),
         s.padding.h, s.padding.w};
  return f;
}
inline FusedStage fused_pool(const ConvArgs& conv) {
  FusedStage f;
  f.kind = FusedKind::pool, f.conv = &conv;
  f.x = {conv.shape.K, conv.shape.P, conv.shape.Q};
  return f;
}
inline FusedStage fused_linear(const ConvArgs& conv) {
  FusedStage f;
  f.kind = FusedKind::linear, f.conv = &conv;
  f.x = {conv.shape.C, conv.shape.H, conv.shape.W};
  return f;
}

// Images, and outputs, that a warp takes at a time in a linear layer. Conversions of 16 bits need registers.
FASTCONV_HD inline int fused_rows(int64_t images) {
  return images > 4 ? 8 : images > 2 ? 4 : images > 1 ? 2 : 1;
}
FASTCONV_HD constexpr int fused_outputs(int64_t rows, int64_t element_size) {
  return rows > 2 || element_size == 2 ? 4 : 8;
}

// Cycles of a stage for `images`, which so many blocks share, as conv_direct.h counts them: a thread's
// multiply-adds, loads and the like for a seventh more; ten instructions to finish a value, one for each
// block to hand it on, six to fill an element of shared memory, and a wait for memory or for other blocks.
inline double fused_cycles(const FusedStage& f, int64_t images, int64_t blocks, const DirectRounds& launch) {
  constexpr double kWait = 150, kFill = 6, kFinish = 10, kMeet = 400;
  const double put = blocks > 1 ? double(blocks) : 0;
  const ConvShape& s = f.conv->shape;
  const auto each_thread = [&](double instructions) {
    return launch.cycles(kFusedWarps, kFusedWarps * instructions);
  };
  // Each warp of all blocks has so many instructions.
  const auto each_warp = [&](int64_t warps, double instructions) {
    const int64_t of_block = ceil_div(warps, blocks), busy = std::min<int64_t>(of_block, kFusedWarps);
    return launch.cycles(busy, double(ceil_div(of_block, kFusedWarps) * busy) * instructions);
  };
  double cycles = each_thread(double(images * f.x.size()) / kFusedThreads * kFill);
  if (blocks > 1) cycles += double(launch.rounds) * kMeet;
  if (f.kind == FusedKind::pool) {
    const Window& v = f.conv->epilogue.pool;
    const int64_t warps = ceil_div(images * s.K * v.out.cells(), 32);
    return cycles + each_warp(warps, double(v.kernel.cells()) * 6 + put);
  }
  if (f.kind == FusedKind::conv) {
    const int64_t warps = ceil_div(images * f.patches() * f.splits, 32);
    const double taps = double(ceil_div(s.group_c(), f.splits) * s.taps());
    const double chunks = double(ceil_div(s.group_c(), f.chunk));
    const double fills = chunks > 1 ? double(ceil_div(warps, kFusedWarps * blocks)) * chunks : 1;
    return cycles + each_warp(warps, double(f.patch_values()) * (taps * 1.15 + kFinish + put)) +
           fills * each_thread(double(f.filter()) / kFusedThreads * kFill + kWait);
  }
  constexpr int64_t kVector = 4;
  const int64_t rows = fused_rows(images), outputs = fused_outputs(rows, dtype_size(f.conv->dtype)),
                features = s.C * s.in_cells();
  const double steps = double(ceil_div(features, 32 * kVector));
  // Other warps' work hides the wait for weights, or the wait hides the work.
  return cycles + each_warp(ceil_div(images, rows) * ceil_div(s.K, outputs),
                            steps * std::max(double(rows * outputs * kVector) * 1.15, kWait) + 60 + put);
}

struct FusedPlan {
  int64_t count = 0;  // of the kernel's stages; more than kFusedStages: too many
  FusedStage stages[kFusedStages];
  int64_t images = 0;                       // of a block or cluster; none: has not the memory for one
  int64_t blocks = 1;                       // of a cluster
  int64_t buffers[2] = {0, 0}, filter = 0;  // numbers in shared memory, of an image and of a block
  double cycles = HUGE_VAL;

  int64_t shared_bytes(int64_t images, Dtype dtype) const {
    return (images * (buffers[0] + buffers[1]) + filter) * (dtype == Dtype::f64 ? 8 : 4);
  }

  void add(const FusedStage& f) {
    if (count++ >= kFusedStages) return;
    stages[count - 1] = f;
    int64_t& buffer = buffers[(count - 1) % 2];
    buffer = std::max(buffer, f.x.size());
    if (f.kind == FusedKind::conv) filter = std::max(filter, f.filter());
  }
};

// As many images a block as have the fewest cycles; or a cluster, of as many blocks.
inline FusedPlan plan_fused(const ChainArgs& a, bool in_clusters) {
  FusedPlan p;
  for (int64_t i = 0; i < a.count; ++i) {
    const ConvArgs& conv = a.stages[i].conv;
    const bool pools_apart = conv.epilogue.pools() && !is_2x2(conv.epilogue.pool);
    FusedStage f = a.stages[i].layer == Layer::conv ? fused_conv(conv) : fused_linear(conv);
    if (!pools_apart) f.ends = i;
    p.add(f);
    if (!pools_apart) continue;
    f = fused_pool(conv);
    f.ends = i;
    p.add(f);
  }
  if (p.count > kFusedStages) return p;
  const int64_t n = a.stages[0].conv.shape.N;
  const auto consider = [&](int64_t images, int64_t blocks) {
    constexpr int64_t kMostBlocks = 1 << 30;
    const int64_t bytes = p.shared_bytes(images, a.dtype), grid = ceil_div(n, images) * blocks;
    if (bytes > most_shared_bytes(a.target.level) || grid > kMostBlocks) return;
    const DirectRounds launch(grid, kFusedThreads, bytes / 4, kFusedThreads / (in_clusters ? 2 : 1));
    double cycles = 0;
    for (int64_t i = 0; i < p.count; ++i) cycles += fused_cycles(p.stages[i], images, blocks, launch);
    if (a.dtype == Dtype::f64) cycles *= 2;
    if (p.images == 0 || cycles < p.cycles) p.images = images, p.blocks = blocks, p.cycles = cycles;
  };
  for (int64_t images = 1; images <= std::clamp<int64_t>(n, 1, kFusedImages); ++images)
    for (int64_t blocks = in_clusters ? 2 : 1; blocks <= (in_clusters ? kFusedCluster : 1); blocks *= 2)
      consider(images, blocks);
  return p;
}

}  // namespace fastconv::cuda
