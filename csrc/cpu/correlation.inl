// SPDX-License-Identifier: MIT
// What the forward pass and the input gradient of a convolution have in common: correlations over a grid of
// outputs (slab.inl), one for each group, and for a gradient one for each residue of the position in the
// input modulo the stride, so that strided layers meet only the taps that reach them.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/slab.inl, one copy each; it has no
// include guard.

namespace {

// One correlation: outputs of a grid, each the sum over `channels` and taps.
template <class Element>
struct Correlation {
  Grid grid;
  int64_t outputs, channels;
  const Element* x;
  View x_view;
  Element* y;
  View y_view;  // strides between neighbouring outputs of the grid
  const Element* filter;
  int64_t filter_output, filter_channel;  // strides of the filter
  const Element* bias;                    // of the first output, or null
  Act act;

  int64_t depth() const { return channels * grid.count; }
  // Whether a row of the filter is what the micro-kernel reads.
  bool filter_in_place() const {
    if (!std::is_same_v<typename Compute<Element>::type, Element> || filter_output == 1) return false;
    for (int64_t i = 0; i < grid.count; ++i)
      if (grid.taps[i].weight != i) return false;
    return filter_channel == grid.count;
  }
  int64_t pixels() const { return grid.images * grid.rows * grid.cols; }
};

// Calls f(correlation) for each group.
template <class Element, class F>
void fprop_correlations(const ConvArgs& a, const F& f) {
  const ConvShape& s = a.shape;
  std::vector<Tap> taps;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t f = 0; f < s.S; ++f)
      taps.push_back({r * s.dilation.h, f * s.dilation.w, r * a.w.h + f * a.w.w});
  Grid grid{s.N, s.P, s.Q, s.stride.h, s.stride.w, -s.padding.h, -s.padding.w, s.H, s.W};
  grid.taps = taps.data(), grid.count = s.R * s.S;
  grid.measure();
  const auto* bias = static_cast<const Element*>(a.epilogue.bias);
  for (int64_t group = 0; group < s.groups; ++group) {
    const int64_t k = group * s.group_k();
    f(Correlation<Element>{grid, s.group_k(), s.group_c(),
                           static_cast<const Element*>(a.x.data) + group * s.group_c() * a.x.c, a.x,
                           static_cast<Element*>(a.y.data) + k * a.y.c, a.y,
                           static_cast<const Element*>(a.w.data) + k * a.w.n, a.w.n, a.w.c,
                           bias ? bias + k : nullptr, a.epilogue.act});
  }
}

// Along one axis: the taps by which outputs reach the input positions that are `residue` modulo the stride,
// and how far from position / stride these outputs lie.
struct Reach {
  int64_t tap, at;
};
inline std::vector<Reach> reaching(int64_t residue, int64_t filter, int64_t stride, int64_t padding,
                                   int64_t dilation) {
  std::vector<Reach> found;
  for (int64_t t = 0; t < filter; ++t) {
    const int64_t scaled = residue + padding - t * dilation;
    if (scaled % stride == 0) found.push_back({t, scaled / stride});
  }
  return found;
}

// Calls f(correlation) for each residue of the position in the input modulo the stride, and each group.
template <class Element, class F>
void dgrad_correlations(const ConvArgs& a, const F& f) {
  const ConvShape& s = a.shape;
  for (int64_t h = 0; h < std::min(s.stride.h, s.H); ++h)
    for (int64_t w = 0; w < std::min(s.stride.w, s.W); ++w) {
      const auto rows = reaching(h, s.R, s.stride.h, s.padding.h, s.dilation.h);
      const auto cols = reaching(w, s.S, s.stride.w, s.padding.w, s.dilation.w);
      const int64_t low_h = rows.empty() ? 0 : rows.back().at, low_w = cols.empty() ? 0 : cols.back().at;
      std::vector<Tap> taps;
      for (const Reach& r : rows)
        for (const Reach& c : cols)
          taps.push_back({r.at - low_h, c.at - low_w, r.tap * a.w.h + c.tap * a.w.w});
      Grid grid{s.N,
                (s.H - h + s.stride.h - 1) / s.stride.h,
                (s.W - w + s.stride.w - 1) / s.stride.w,
                1,
                1,
                low_h,
                low_w,
                s.P,
                s.Q};
      grid.taps = taps.data(), grid.count = static_cast<int64_t>(taps.size());
      grid.measure();
      View x = a.x;
      x.h *= s.stride.h, x.w *= s.stride.w;
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t k = group * s.group_k(), c = group * s.group_c();
        f(Correlation<Element>{
            grid, s.group_c(), s.group_k(), static_cast<const Element*>(a.y.data) + k * a.y.c, a.y,
            static_cast<Element*>(a.x.data) + c * a.x.c + h * a.x.h + w * a.x.w, x,
            static_cast<const Element*>(a.w.data) + k * a.w.n, a.w.c, a.w.n, nullptr, Act::none});
      }
    }
}

}  // namespace
