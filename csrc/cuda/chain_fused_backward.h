// SPDX-License-Identifier: MIT
// How the gradients of a chain are cut into blocks, as plain C++: the table plans in every build, the
// launcher follows the same plan. The order of a sum depends on the shape alone.
#pragma once

#include "core/chain_calls.h"
#include "cuda/chain_fused.h"
#include "cuda/linear_skinny.h"

namespace fastconv::cuda {

inline constexpr int64_t kFusedGradients = 8;  // stages of a chain, at most
inline constexpr int64_t kFusedConvs = 4;      // of them convolutions
inline constexpr int kFusedColumns = 4 * 32;   // inputs of a linear layer that a warp takes, at most
inline constexpr int kFusedTerms = 8;          // of their sums that are loaded at a time
// Of shared memory, so that a multiprocessor has two blocks.
inline constexpr int64_t kDgradFloats = 112 * 1024 / 4;

// The input's gradient of a stage, as a stage forward that reads the output's gradient: a convolution by the
// filter turned around, or a product with the transposed matrix.
struct FusedDgrad {
  ConvArgs conv;
  FusedStage stage;
  int64_t parts = 1, terms = 0;  // of a linear layer: pieces of the sums, as long as this

  int64_t features() const { return conv.shape.K * conv.shape.out_cells(); }  // of the stage's input
  // Pieces of 512 terms at most, for the rounding error; and where there are few inputs as many as a block
  // has warps.
  void cut_sums() {
    const int64_t warps = std::max<int64_t>(1, kFusedWarps / ceil_div(features(), kFusedColumns));
    terms = ceil_div(conv.shape.C, std::max(warps, ceil_div(conv.shape.C, kOuterTerms)));
    terms = ceil_div(terms, kFusedTerms) * kFusedTerms;
    parts = ceil_div(conv.shape.C, terms);
  }
};

inline ConvArgs turned_around(const ChainStage& stage) {
  const ConvArgs& a = stage.conv;
  const ConvShape& s = a.shape;
  ConvArgs t;
  t.dtype = a.dtype, t.target = a.target;
  t.shape.N = s.N, t.shape.C = s.K;
  if (stage.layer == Layer::linear) {
    t.shape.K = s.C * s.in_cells();
    t.w = {a.w.data, a.w.w, a.w.n, 0, 0, 0};
    return t;
  }
  const int64_t last = (s.R - 1) * a.w.h + (s.S - 1) * a.w.w;
  const auto begin = reinterpret_cast<uintptr_t>(a.w.data);  // it may be a placeholder
  t.w = {reinterpret_cast<void*>(begin + static_cast<uintptr_t>(last * dtype_size(a.dtype))),
         a.w.c,
         a.w.n,
         0,
         -a.w.h,
         -a.w.w};
  t.shape.H = s.P, t.shape.W = s.Q, t.shape.P = s.H, t.shape.Q = s.W;
  t.shape.K = s.C, t.shape.R = s.R, t.shape.S = s.S, t.shape.groups = s.groups;
  t.shape.padding = {0, s.R - 1 - s.padding.h, s.S - 1 - s.padding.w};
  return t;
}

// As fused_cycles() counts, with sixteen instructions to hand a gradient on.
inline double fused_dgrad_cycles(const FusedDgrad& d, int64_t images, const DirectRounds& launch) {
  constexpr double kWait = 150, kHandOn = 16, kFill = 2;
  const auto each_thread = [&](double instructions) {
    return launch.cycles(kFusedWarps, kFusedWarps * instructions);
  };
  const double handed =
      each_thread(double(ceil_div(images * d.features(), kFusedThreads)) * (kHandOn + 2 * double(d.parts)));
  if (d.stage.kind == FusedKind::conv) return fused_cycles(d.stage, images, 1, launch) + handed;
  const int64_t rows = fused_rows(images);
  const int64_t warps = ceil_div(images, rows) * ceil_div(d.features(), kFusedColumns) * d.parts;
  const double steps = double(ceil_div(d.terms, kFusedTerms));
  const int64_t busy = std::min<int64_t>(warps, kFusedWarps);
  return each_thread(double(images * d.stage.x.size()) / kFusedThreads * kFill) +
         launch.cycles(busy, double(ceil_div(warps, kFusedWarps) * busy) * steps *
                                 std::max(double(rows * 4 * kFusedTerms) * 1.15, kWait)) +
         handed;
}

// The launch that computes the gradients at the outputs of all stages but the last, and that of x if it is
// wanted: as many images a block as have the fewest cycles. Of a chain of at most kFusedGradients stages.
struct FusedDgradPlan {
  int64_t count = 0;  // the last stage first
  FusedDgrad dgrads[kFusedGradients];
  int64_t images = 0;                                 // of a block; none: has not the memory for one
  int64_t buffers[2] = {0, 0}, sums = 0, filter = 0;  // numbers in shared memory, of an image and of a block
  double cycles = HUGE_VAL;

  FusedDgradPlan(const FusedDgradPlan&) = delete;  // its stages point to its convolutions
  explicit FusedDgradPlan(const ChainBackwardArgs& b) {
    const ChainArgs& a = b.chain;
    const int64_t first = ChainCalls(a, nullptr, 1).first_backward(b) + (b.grad_x.data ? 0 : 1);
    for (int64_t i = a.count - 1; i >= first; --i) {
      FusedDgrad& d = dgrads[count];
      d.conv = turned_around(a.stages[i]);
      if (a.stages[i].layer == Layer::conv) {
        const FusedStage whole = fused_conv(d.conv);
        const int64_t room = kDgradFloats - whole.filter(), image = whole.x.size() + d.features();
        d.stage = fused_conv(d.conv, std::clamp<int64_t>(room / image, 1, kFusedImages));
        filter = std::max(filter, d.stage.filter());
      } else {
        d.stage = fused_linear(d.conv);
        d.cut_sums();
      }
      int64_t& buffer = buffers[count++ % 2];
      buffer = std::max(buffer, d.stage.x.size());
      sums = std::max(sums, ceil_div(d.parts * d.features(), 4) * 4);
    }
    const int64_t n = a.stages[0].conv.shape.N;
    for (int64_t each = 1; each <= std::clamp<int64_t>(n, 1, kFusedImages); ++each) {
      const int64_t bytes = shared_bytes(each);
      if (bytes > most_shared_bytes(a.target.level)) break;
      const DirectRounds launch(ceil_div(n, each), kFusedThreads, bytes / 4, kFusedThreads);
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += fused_dgrad_cycles(dgrads[i], each, launch);
      if (images == 0 || sum < cycles) images = each, cycles = sum;
    }
  }

  int64_t shared_bytes(int64_t images) const {
    return (images * (buffers[0] + buffers[1] + sums) + filter) * 4;
  }
};

// What the launches leave for each other: the gradients at the stages' outputs, then the parts of each
// convolution's weight gradient.
struct FusedGradientSlots {
  ChainCalls calls;
  int64_t parts[kFusedGradients], bytes;  // of a stage: where they begin

  FusedGradientSlots(const ChainArgs& a, void* workspace)
      : calls(a, workspace, a.count), bytes(calls.slot_bytes()) {
    for (int64_t i = 0; i < a.count; ++i) {
      parts[i] = bytes - calls.slot_bytes();
      if (!calls.is_conv(i) || !a.stages[i].grad_w.data) continue;
      const DirectShape shape = direct_wgrad(a.stages[i].conv.shape);
      bytes += ceil_div(plan_wgrad(shape).workspace_bytes(shape), 64) * 64;
    }
  }
  void* parts_of(int64_t i) const { return static_cast<char*>(calls.rest()) + parts[i]; }
};

}  // namespace fastconv::cuda
