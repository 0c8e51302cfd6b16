// SPDX-License-Identifier: MIT
// How norm_rows cuts its work, which the table has to know too: it asks for the workspace. A plan is a
// function of the shape and the layout alone.
#pragma once

#include <algorithm>

#include "core/args.h"

namespace fastconv::cpu {

struct NormPlan {
  bool by_channels;  // in the lanes; else pixels are
  bool pools;        // 2x2/2; else nothing pools
  int64_t lines;     // planes, or rows of windows of all channels
  int64_t pieces;    // that the lines go in
  int64_t channels;  // the length of arrays in workspace, of all channels and a vector more

  explicit NormPlan(const NormArgs& a)
      : by_channels(a.x.c == 1 && a.C > 1), pools(a.pools()), channels(a.C + 16) {
    constexpr int64_t kEnoughTasks = 16;
    lines = a.N * (!by_channels ? a.C : pools ? (a.H + 1) / 2 : a.H);
    pieces = std::clamp<int64_t>(lines, 1, kEnoughTasks);
  }
  // Two sums of each piece, then what is made of them: kTables numbers a channel.
  static constexpr int64_t kTables = 4;
  int64_t workspace_bytes() const {
    return (2 * pieces + kTables) * channels * static_cast<int64_t>(sizeof(double));
  }
};

}  // namespace fastconv::cpu
