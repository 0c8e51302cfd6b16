// SPDX-License-Identifier: MIT
// How the direct convolutions are cut into blocks, as plain C++: the table plans in every build, the
// launchers follow the same plan. A plan depends on the shape alone. Cycles are predictions for one
// multiprocessor of an H200; they choose the plan, and the rows' costs are made of them.
#pragma once

#include <cmath>

#include "cuda/plan.h"

namespace fastconv::cuda {

inline constexpr int64_t kDirectThreads = 256;    // of a block, at most
inline constexpr int64_t kBackwardThreads = 192;  // where wgrad is in the kernel, which has more registers
inline constexpr int64_t kDirectFloats = 40 * 1024 / 4;  // of shared memory a block, at most
inline constexpr int64_t kDirectMultiprocessors = 132;
inline constexpr int64_t kWgradBlocks = 4 * kDirectMultiprocessors;

// A convolution of stride 1 as fprop computes it; dgrad is one, too, with the filter turned around.
struct DirectShape {
  int64_t n, groups, c, k;  // c, k: channels of a group
  int64_t p, q;             // pixels of an output plane; with a pool those that it reads
  int filter;               // as high as wide
  // A 3x3/2 pool follows: neighbouring blocks both compute the two rows, and columns, that their windows
  // meet.
  bool overlaps = false;
};

inline bool pools_2x2(const Epilogue& e) { return e.pools() && e.pool.kernel.h == 2; }
inline bool pools_3x3(const Epilogue& e) { return e.pools() && e.pool.kernel.h == 3; }

inline DirectShape direct_fprop(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const bool pools = a.epilogue.pools();
  return {s.N,
          s.groups,
          s.group_c(),
          s.group_k(),
          pools ? 2 * a.epilogue.pool.out.h : s.P,
          pools ? 2 * a.epilogue.pool.out.w : s.Q,
          static_cast<int>(s.R),
          pools_3x3(a.epilogue)};
}
inline DirectShape direct_dgrad(const ConvShape& s) {
  return {s.N, s.groups, s.group_k(), s.group_c(), s.H, s.W, static_cast<int>(s.R)};
}

// wgrad's: of the gradient's planes.
inline DirectShape direct_wgrad(const ConvShape& s) {
  return {s.N, s.groups, s.group_c(), s.group_k(), s.P, s.Q, static_cast<int>(s.R)};
}

// A tile of a tensor in shared memory, float [images][channels][h][pitch]. Rows begin in different banks and
// are aligned to 16 bytes.
struct DirectTile {
  int64_t images = 1, channels = 1, h = 1, w = 1;

  int64_t pitch() const { return 4 * (ceil_div(w, 4) | 1); }
  int64_t floats() const { return images * channels * h * pitch(); }
};

// The part of the output that a thread keeps in registers: 2 x Cols pixels of Channels channels.
template <int Cols, int Channels>
struct DirectPatch {
  static constexpr int kRows = 2, kCols = Cols, kChannels = Channels, kValues = kRows * kCols * kChannels;

  FASTCONV_HD static constexpr int at(int row, int col, int channel) {
    return (row * kCols + col) * kChannels + channel;
  }
};
using DirectPatch4x6 = DirectPatch<4, 6>;
using DirectPatch2x8 = DirectPatch<2, 8>;

inline constexpr int64_t kFewChannels = 4;
inline constexpr int kDirectSumsPad = 4;      // behind a thread's sums in shared memory, for the banks
inline constexpr int kDirectFilterPitch = 8;  // floats a tap in shared memory, at least a patch's channels

// Threads that share a patch where there are few of them: thread i sums over the input channels i, i +
// splits,
// ... A power of two. It fixes the order of the sums, so it must not depend on the patch.
inline int64_t direct_splits(const DirectShape& s) {
  constexpr int64_t kWarps = 16 * kDirectMultiprocessors, kWarpValues = 32 * 32;
  const int64_t warps = ceil_div(s.n * s.groups * s.k * s.p * s.q, kWarpValues);
  int64_t splits = 1;
  while (splits < kFewChannels && 2 * splits <= s.c && 2 * splits * warps <= kWarps) splits *= 2;
  return splits;
}

// What a block computes: k_tiles x images x rows x cols patches, over tile.channels input channels at a time.
struct DirectPlan {
  bool wide = false;      // DirectPatch4x6, else DirectPatch2x8
  bool overlaps = false;  // as its shape
  int64_t splits = 1;
  int64_t k_tiles = 1, images = 1, rows = 1, cols = 1;
  int64_t k_blocks = 1, image_blocks = 1, row_blocks = 1, col_blocks = 1;
  DirectTile tile;
  double cycles = HUGE_VAL;

  int64_t patches() const { return k_tiles * images * rows * cols; }
  int64_t threads() const { return ceil_div(splits * patches(), 32) * 32; }
  // The tile; when it is done with, the sums of all splits but the first, then what a 3x3 pool reads.
  int64_t tile_floats() const {
    const int64_t values = wide ? DirectPatch4x6::kValues : DirectPatch2x8::kValues;
    return std::max({tile.floats(), (splits - 1) * patches() * (values + kDirectSumsPad),
                     overlaps ? patches() * values : 0});
  }
  int64_t filter_floats(const DirectShape& s) const {
    return k_tiles * tile.channels * s.filter * s.filter * kDirectFilterPitch;
  }
  int64_t blocks(const DirectShape& s) const {
    return s.groups * k_blocks * image_blocks * row_blocks * col_blocks;
  }
  // Elements of the tiles that all blocks fill.
  double filled(const DirectShape& s) const {
    return double(blocks(s) * ceil_div(s.c, tile.channels)) * double(tile.floats());
  }
};

// The blocks of a launch as one multiprocessor sees them: `rounds` of them, `resident` at a time, as many as
// their registers and shared memory allow.
struct DirectRounds {
  int64_t rounds, resident;

  DirectRounds(int64_t blocks, int64_t threads, int64_t floats, int64_t most_threads)
      : rounds(std::max<int64_t>(1, ceil_div(blocks, kDirectMultiprocessors))),
        resident(std::min({rounds, kSharedBytes / (4 * floats + 1024), 2 * most_threads / threads})) {}

  // Four instructions a cycle, if there are warps enough; `warps` of a block have so many.
  double cycles(int64_t warps, double instructions) const {
    const double all = double(resident * warps);
    return double(rounds) * instructions / 4 / std::min({1.0, all / 4, 0.4 + all / 20});
  }

 private:
  static constexpr int64_t kSharedBytes = 220 * 1024;
};
// `instructions`: of all warps of a block.
inline double direct_cycles(int64_t blocks, int64_t threads, int64_t floats, int64_t most_threads,
                            double instructions) {
  return DirectRounds(blocks, threads, floats, most_threads).cycles(threads / 32, instructions);
}

template <class Patch>
void improve_direct_plan(const DirectShape& s, int64_t most_threads, DirectPlan& best) {
  const int64_t patch_rows = ceil_div(s.p, Patch::kRows), overlap = s.overlaps ? 2 : 0;
  const int64_t k_tiles = ceil_div(s.k, Patch::kChannels);
  DirectPlan p;
  p.wide = Patch::kCols == 4, p.overlaps = s.overlaps;
  p.splits = direct_splits(s);
  const double taps = double(ceil_div(s.c, p.splits) * s.filter * s.filter);
  p.col_blocks = ceil_div(s.q, 32 * Patch::kCols - overlap);
  p.cols = ceil_div(ceil_div(s.q, p.col_blocks) + overlap, Patch::kCols);
  const auto consider = [&](int64_t images, int64_t channels) {
    p.images = images;
    p.image_blocks = ceil_div(s.n, images);
    p.tile = {images, channels, p.rows * Patch::kRows + s.filter - 1, p.cols * Patch::kCols + s.filter - 1};
    const int64_t floats = p.tile_floats() + p.filter_floats(s);
    if (p.splits * p.patches() > most_threads || floats > kDirectFloats) return false;
    // A thread: its multiply-adds, loads and the like for a seventh more; ten instructions to finish a value,
    // twice as many before a 3x3 pool. The block: six instructions an element to fill shared memory, and a
    // wait each time.
    constexpr double kWait = 150;
    const double finish = s.overlaps ? 20 : 10;
    const double warps = double(p.threads() / 32), fills = double(ceil_div(s.c, channels));
    const double instructions = warps * (Patch::kValues * (taps * 1.15 + finish) + fills * kWait) +
                                fills * double(p.tile.floats() + p.filter_floats(s)) / 32 * 6;
    p.cycles = direct_cycles(p.blocks(s), p.threads(), floats, most_threads, instructions);
    if (p.cycles < best.cycles) best = p;
    return true;
  };
  const auto consider_rows = [&](int64_t channels) {
    int fitting = 0;
    for (int64_t pieces = 1; pieces < 2 * patch_rows && fitting < 2; pieces *= 2) {
      const int64_t rows = ceil_div(patch_rows, pieces);
      p.rows = rows + overlap / 2;
      p.row_blocks = ceil_div(patch_rows, rows);
      if (!consider(1, channels)) continue;
      ++fitting;
      if (p.row_blocks > 1 || p.col_blocks > 1) continue;
      const int64_t room = (kDirectFloats - p.filter_floats(s)) / p.tile_floats();
      const int64_t most = std::min({s.n, most_threads / (p.splits * p.patches()), room});
      for (const int64_t images : {most / 2, most})
        if (images > 1) consider(images, channels);
    }
  };
  for (int64_t pieces = 1;; pieces *= 2) {
    p.k_tiles = ceil_div(k_tiles, pieces);
    p.k_blocks = ceil_div(k_tiles, p.k_tiles);
    consider_rows(s.c);
    if (s.c > kFewChannels) consider_rows(kFewChannels);  // a row of patches of these always fits
    if (p.k_tiles <= 1) break;
  }
}

// The plan with the fewest cycles.
template <class... Patches>
DirectPlan plan_direct(const DirectShape& s, int64_t most_threads) {
  DirectPlan best;
  (improve_direct_plan<Patches>(s, most_threads, best), ...);
  return best;
}
inline DirectPlan plan_direct(const DirectShape& s) {
  return plan_direct<DirectPatch4x6, DirectPatch2x8>(s, kDirectThreads);
}
// dgrad in one kernel with wgrad, which leaves it fewer registers and one kind of patch; worth it where that
// costs less than another launch.
inline DirectPlan plan_joined_dgrad(const DirectShape& s) {
  return plan_direct<DirectPatch2x8>(s, kBackwardThreads);
}
inline bool dgrad_joins_wgrad(const DirectShape& s) {
  constexpr double kLaunchCycles = 3 * 1.7e3;
  return plan_joined_dgrad(s).cycles - plan_direct(s).cycles < kLaunchCycles;
}

// wgrad: output channels whose taps (of one input channel) a thread keeps in registers.
FASTCONV_HD constexpr int wgrad_channels(int filter) { return filter == 5 ? 3 : 8; }

// A block sums over `rows` output rows of 4 * `quads` columns of `images` at a time, a chunk; slice i of the
// `slices` takes the chunks i, i + slices, ...; its threads are k_tiles x input channels x lanes, and lane j
// takes the rows j, j + lanes, ... of the chunk.
struct WgradPlan {
  int64_t k_tiles = 1, images = 1, rows = 1, quads = 1, lanes = 1;
  int64_t k_blocks = 1, image_blocks = 1, row_blocks = 1, col_blocks = 1, slices = 1;
  DirectTile x, g;
  double cycles = HUGE_VAL;

  int64_t chunks() const { return image_blocks * row_blocks * col_blocks; }
  int64_t units(const DirectShape& s) const { return k_tiles * s.c; }
  int64_t threads(const DirectShape& s) const { return ceil_div(units(s) * lanes, 32) * 32; }
  int64_t blocks(const DirectShape& s) const { return s.groups * k_blocks * slices; }
  // Elements of the gradient's tiles that all blocks fill.
  double filled(const DirectShape& s) const {
    return double(s.groups * k_blocks * chunks()) * double(g.floats());
  }
  // What a row of the filter has of sums in a thread; odd, for the banks.
  static int64_t scratch_pitch(const DirectShape& s) { return (s.filter * wgrad_channels(s.filter)) | 1; }
  // The gradient's tile, or the threads' sums, when the tile is done with.
  int64_t g_floats(const DirectShape& s) const {
    return std::max(g.floats(), units(s) * lanes * scratch_pitch(s));
  }
  static int64_t slice_floats(const DirectShape& s) {
    return s.groups * s.k * (s.c * s.filter * s.filter + 1);  // and the bias gradient
  }
  int64_t workspace_bytes(const DirectShape& s) const { return slices * slice_floats(s) * 4; }
};

inline WgradPlan plan_wgrad(const DirectShape& s) {
  const int channels = wgrad_channels(s.filter);
  const int64_t k_tiles = ceil_div(s.k, channels), quads = ceil_div(s.q, 4);
  const double sums = double(s.filter * s.filter * channels);
  WgradPlan p, best;
  const auto consider = [&](int64_t images) {
    p.images = images;
    p.image_blocks = ceil_div(s.n, images);
    const int64_t most = kBackwardThreads / p.units(s), rows = images * p.rows;
    if (most == 0) return false;
    p.lanes = ceil_div(rows, ceil_div(rows, most));
    p.x = {images, s.c, p.rows + s.filter - 1, 4 * p.quads + s.filter - 1};
    p.g = {images, p.k_tiles * channels, p.rows, 4 * p.quads};
    const int64_t floats = p.x.floats() + p.g_floats(s);
    if (floats > kDirectFloats) return false;
    const int64_t most_slices = std::max<int64_t>(1, kWgradBlocks / (s.groups * p.k_blocks));
    const int64_t slice_chunks = std::max<int64_t>(1, ceil_div(p.chunks(), most_slices));
    p.slices = std::max<int64_t>(1, ceil_div(p.chunks(), slice_chunks));
    // A thread: its multiply-adds, loads and the like for a tenth more, six instructions to add up a sum. The
    // block: eight instructions an element to fill shared memory, and a wait each time.
    constexpr double kWait = 150;
    const double warps = double(p.threads(s) / 32);
    const double chunk = warps * (double(ceil_div(rows, p.lanes) * p.quads) * 4 * sums * 1.1 + kWait) +
                         double(p.x.floats() + p.g.floats()) / 32 * 8;
    const double instructions = double(slice_chunks) * chunk + warps * sums * 6;
    p.cycles = direct_cycles(p.blocks(s), p.threads(s), floats, kBackwardThreads, instructions);
    if (p.cycles < best.cycles) best = p;
    return true;
  };
  const auto consider_rows = [&] {
    int fitting = 0;
    for (int64_t pieces = 1; pieces <= s.p && fitting < 2; pieces *= 2) {
      p.rows = ceil_div(ceil_div(s.p, pieces), 2) * 2;  // even: a pool's window is in one chunk
      p.row_blocks = ceil_div(s.p, p.rows);
      if (!consider(1)) continue;
      ++fitting;
      if (p.row_blocks > 1 || p.col_blocks > 1) continue;
      const int64_t most = std::min(s.n, kDirectFloats / (p.x.floats() + p.g_floats(s)));
      for (const int64_t images : {std::min<int64_t>(most, 2), most})
        if (images > 1) consider(images);
    }
  };
  for (int64_t k_pieces = 1;; k_pieces *= 2) {
    p.k_tiles = ceil_div(k_tiles, k_pieces);
    p.k_blocks = ceil_div(k_tiles, p.k_tiles);
    for (int64_t pieces = 1; pieces == 1 || ceil_div(quads, pieces) >= 2; pieces *= 2) {
      p.quads = ceil_div(quads, pieces);
      p.col_blocks = ceil_div(quads, p.quads);
      consider_rows();
    }
    if (p.k_tiles <= 1) break;
  }
  return best;
}

}  // namespace fastconv::cuda
