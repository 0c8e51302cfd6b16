// SPDX-License-Identifier: MIT
// How work is cut, where the table has to know it too: it asks for the workspace that a kernel will use. A
// plan is a function of the shape alone.
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

// Sums that a row-wise kernel keeps at hand; one that cannot cut its row rejects wider ones.
inline constexpr int64_t kStretch = 1024;

}  // namespace fastconv::cpu
