// SPDX-License-Identifier: MIT
// What chain_lanes works out before it touches a number: the bands between the stages, the tables that all
// tasks read, and how backward sums are cut. The table asks here for workspace.
#pragma once

#include "core/chain_args.h"
#include "cpu/lanes_plan.h"

namespace fastconv::cpu {

// Taps of a filter row that lanes_windows.inl takes.
inline constexpr int kMostWindowTaps = 5;

// The bands of a chain: x(i) is what stage i reads, with its padding around it. The last is what the last
// stage writes.
class ChainBands {
 public:
  explicit ChainBands(const ChainArgs& args) : a_(args) {
    for (int64_t i = 0; i < count(); ++i) {
      x_[i] = {stage(i).padded_h, stage(i).padded_w, shape(i).C};
      x_[i + 1] = {out(i).h, out(i).w, shape(i).K};
    }
  }

  int64_t count() const { return a_.count; }
  const ChainStage& stage(int64_t i) const { return a_.stages[i]; }
  const ConvArgs& conv(int64_t i) const { return a_.stages[i].conv; }
  const ConvShape& shape(int64_t i) const { return a_.stages[i].conv.shape; }
  bool is_linear(int64_t i) const { return stage(i).layer == Layer::linear; }
  int64_t features(int64_t i) const { return shape(i).C * shape(i).in_cells(); }

  const Band& x(int64_t i) const { return x_[i]; }
  int64_t top(int64_t i) const { return i < count() ? shape(i).padding.h : 0; }
  int64_t left(int64_t i) const { return i < count() ? shape(i).padding.w : 0; }
  bool is_padded(int64_t i) const {
    return i < count() && stage(i).padded_h * stage(i).padded_w > shape(i).in_cells();
  }
  Extent3 out(int64_t i) const {
    const ConvArgs& c = conv(i);
    return pools(i) ? c.epilogue.pool.out : Extent3{1, c.shape.P, c.shape.Q};
  }
  bool pools(int64_t i) const { return conv(i).epilogue.pools(); }
  bool pools_tile(int64_t i) const { return pools(i) && is_tile(conv(i).epilogue.pool); }
  bool pools_band(int64_t i) const { return pools(i) && !pools_tile(i); }
  // Whether the gradients go by windows (lanes_windows.inl), where all numbers are finite.
  bool by_windows(int64_t i) const {
    const ConvShape& s = shape(i);
    return pools_tile(i) && s.stride.is_one() && s.dilation.is_one() && s.S <= kMostWindowTaps;
  }
  // A convolution's own output.
  Band filtered(int64_t i) const { return {shape(i).P, shape(i).Q, shape(i).K}; }
  // The gradient there: the output pixels that it begins with, and its band. dgrad also reads around them.
  int64_t corner_h(int64_t i, bool dgrad) const {
    const ConvShape& s = shape(i);
    const int64_t first = first_reached(0, s.padding.h, s.R, s.dilation.h, s.stride.h);
    return dgrad ? std::min<int64_t>(0, first) : 0;
  }
  int64_t corner_w(int64_t i, bool dgrad) const {
    const ConvShape& s = shape(i);
    const int64_t first = first_reached(0, s.padding.w, s.S, s.dilation.w, s.stride.w);
    return dgrad ? std::min<int64_t>(0, first) : 0;
  }
  Band gradient(int64_t i, bool dgrad) const {
    if (!dgrad) return filtered(i);
    const ConvShape& s = shape(i);
    const LanesDgrad plan(conv(i));
    const int64_t rows =
        std::max(s.P, first_reached(0, s.padding.h, s.R, s.dilation.h, s.stride.h) + plan.gradient_rows(s.H));
    const int64_t cols =
        std::max(s.Q, first_reached(0, s.padding.w, s.S, s.dilation.w, s.stride.w) + plan.gradient_cols());
    return {rows - corner_h(i, true), cols - corner_w(i, true), s.K};
  }

  double macs_an_image() const {
    double macs = 0;
    for (int64_t i = 0; i < count(); ++i) macs += shape(i).macs();
    return macs / double(std::max<int64_t>(1, shape(0).N));
  }

 private:
  const ChainArgs& a_;
  Band x_[kMostStages + 1] = {};
};

// Weights of a linear stage are read where they lie, if the features of an output follow each other.
inline bool chain_in_place(const ChainStage& s) { return s.conv.w.w == 1; }

// What a forward pass over a stage reads.
template <class T>
struct ChainForwardStage {
  T *weights = nullptr, *bias = nullptr;
  int32_t* taps = nullptr;
  PixelList list;
  Pixels pixels{};

  ChainForwardStage() = default;
  ChainForwardStage(Carver& carver, const ChainBands& bands, int64_t i) {
    const ConvShape& s = bands.shape(i);
    const bool linear = bands.is_linear(i);
    const int64_t weight_count = s.K * s.group_c() * s.taps();
    weights = carver.take<T>(linear && chain_in_place(bands.stage(i)) ? 0 : weight_count);
    bias = carver.take<T>(s.K);
    if (linear) return;
    taps = carver.take<int32_t>(s.group_c() * s.taps());
    list = PixelList(carver, s.P, s.Q);
  }
};

template <class T>
struct ChainForwardTables {
  ChainForwardStage<T> stages[kMostStages];

  ChainForwardTables(Carver& carver, const ChainBands& bands) {
    for (int64_t i = 0; i < bands.count(); ++i) stages[i] = ChainForwardStage<T>(carver, bands, i);
  }
};

// Which gradients backward makes, and where their sums lie: for each stage [K][row] for the weights, then [K]
// for the bias. Pieces of the batch have sums of their own, which add up in a fixed order.
struct ChainBackwardPlan {
  const ChainBackwardArgs& a;
  ChainBands bands;
  int64_t first;  // the first stage that has a gradient to give
  int64_t sums_at[kMostStages + 1] = {};
  int64_t units, pieces;

  explicit ChainBackwardPlan(const ChainBackwardArgs& args)
      : a(args), bands(args.chain), first(args.grad_x.data ? 0 : bands.count()) {
    for (int64_t i = bands.count() - 1; i >= 0; --i)
      if (wgrad(i)) first = std::min(first, i);
    for (int64_t i = 0; i < bands.count(); ++i)
      sums_at[i + 1] = sums_at[i] + (wgrad(i) ? bands.shape(i).K * (row(i) + 1) : 0);
    units = (bands.shape(0).N + kUnit - 1) / kUnit;
    // Adding a piece up takes about as long as two images of LeNet.
    constexpr int64_t kFewPieces = 4, kMostPieces = 16, kMostSums = 1 << 22;
    pieces = std::clamp(units / 2, std::min(units, kFewPieces), kMostPieces);
    pieces = std::max<int64_t>(1, std::min(pieces, kMostSums / std::max<int64_t>(1, sums())));
  }
  bool wgrad(int64_t i) const { return bands.stage(i).grad_w.data != nullptr; }
  bool dgrad(int64_t i) const { return i > first || (i == 0 && a.grad_x.data); }
  // Weights of one output, in a linear stage in whole vectors.
  int64_t row(int64_t i) const {
    if (!bands.is_linear(i)) return bands.shape(i).group_c() * bands.shape(i).taps();
    return (bands.features(i) + kMostLanes - 1) / kMostLanes * kMostLanes;
  }
  int64_t sums() const { return (sums_at[bands.count()] + kMostLanes - 1) / kMostLanes * kMostLanes; }
  int64_t unit(int64_t piece) const { return part_begin(piece, pieces, units); }
};

template <class T>
struct ChainBackwardStage {
  T *weights = nullptr, *zeros = nullptr;
  int32_t *taps = nullptr, *phase_taps = nullptr;
  PixelList wgrad;
  // By windows: their corners and places, the pixels near a corner, and tables of weights, which are finite.
  int32_t *corners = nullptr, *places = nullptr, *near = nullptr;
  T* tables = nullptr;
  bool finite = false;

  ChainBackwardStage() = default;
  ChainBackwardStage(Carver& carver, const ChainBackwardPlan& plan, int64_t i) {
    const ConvShape& s = plan.bands.shape(i);
    const bool linear = plan.bands.is_linear(i);
    const bool packs = plan.dgrad(i) && !(linear && chain_in_place(plan.bands.stage(i)));
    weights = carver.take<T>(packs ? s.K * s.group_c() * s.taps() : 0);
    if (linear) return;
    zeros = carver.take<T>(s.group_c());
    taps = carver.take<int32_t>(s.group_c() * s.taps());
    phase_taps = carver.take<int32_t>(s.group_k() * s.taps());
    wgrad = PixelList(carver, s.P, s.Q);
    if (!plan.bands.by_windows(i)) return;
    corners = carver.take<int32_t>(plan.bands.out(i).cells());
    places = carver.take<int32_t>(plan.bands.out(i).cells());
    near = carver.take<int32_t>((s.R + 1) * (s.S + 1));
    tables = carver.take<T>(s.K * s.group_c() * ((s.R + 1) * (s.S + 1) + kMostLanes) * 4);
  }
};

template <class T>
struct ChainBackwardTables {
  ChainBackwardStage<T> stages[kMostStages];
  T* pieces;

  ChainBackwardTables(Carver& carver, const ChainBackwardPlan& plan) {
    for (int64_t i = plan.first; i < plan.bands.count(); ++i)
      stages[i] = ChainBackwardStage<T>(carver, plan, i);
    pieces = carver.take<T>(plan.pieces * plan.sums());
  }
};

// Vectors that a thread has at hand for a block of images; V is a vector.
template <class V>
struct ChainForwardArrays {
  V* x[kMostStages + 1] = {};  // like ChainBands::x; null where `saved` has it
  V *offsets, *filtered, *flat;

  ChainForwardArrays(Carver& carver, const ChainBands& bands, bool saves) {
    int64_t most_offsets = 0, most_filtered = 0, most_flat = 0;
    for (int64_t i = 0; i <= bands.count(); ++i) {
      const bool saved = saves && i > 0 && i < bands.count();
      x[i] = carver.take<V>(saved ? 0 : bands.x(i).size());
      if (i == bands.count()) break;
      if (saves && bands.pools(i)) most_offsets = std::max(most_offsets, bands.x(i + 1).size());
      if (bands.pools_band(i)) most_filtered = std::max(most_filtered, bands.filtered(i).size());
      if (bands.is_linear(i)) most_flat = std::max(most_flat, bands.features(i));
    }
    offsets = carver.take<V>(most_offsets);
    filtered = carver.take<V>(most_filtered);
    flat = carver.take<V>(most_flat);
  }
};

template <class V>
struct ChainBackwardArrays {
  V *grad[2], *offsets, *sum, *x, *y, *flat, *rows;
  PixelList dgrad;

  ChainBackwardArrays(Carver& carver, const ChainBackwardPlan& plan) {
    const ChainBands& bands = plan.bands;
    int64_t most = 0, most_offsets = 0, most_sum = 0, most_flat = 0, most_h = 0, most_w = 0;
    for (int64_t i = plan.first; i < bands.count(); ++i) {
      most = std::max({most, bands.x(i).size(), bands.x(i + 1).size()});
      if (bands.is_linear(i)) {
        most_flat = std::max(most_flat, bands.features(i) + kMostLanes);
        continue;
      }
      if (bands.pools(i)) most_offsets = std::max(most_offsets, bands.x(i + 1).size());
      most_sum = std::max(most_sum, bands.gradient(i, plan.dgrad(i)).size());
      if (plan.dgrad(i))
        most_h = std::max(most_h, bands.shape(i).H), most_w = std::max(most_w, bands.shape(i).W);
    }
    for (V*& each : grad) each = carver.take<V>(most);
    offsets = carver.take<V>(most_offsets);
    sum = carver.take<V>(most_sum);
    x = carver.take<V>(bands.x(0).size());
    y = carver.take<V>(bands.x(bands.count()).size());
    flat = carver.take<V>(most_flat);
    rows = carver.take<V>(most_flat);
    dgrad = PixelList(carver, most_h, most_w);
  }
};

// About what a block of kUnit images takes, forward and back.
inline int64_t chain_block_bytes(const ChainBands& bands) {
  int64_t vectors = 0;
  for (int64_t i = 0; i <= bands.count(); ++i) {
    vectors += bands.x(i).size();
    if (i < bands.count() && !bands.is_linear(i)) vectors += bands.gradient(i, i > 0).size();
  }
  return vectors * kVector;
}

}  // namespace fastconv::cpu
