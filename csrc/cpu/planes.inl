// SPDX-License-Identifier: MIT
// Channels in the vector lanes: pixels of a tensor as vectors of channels, and back. Where channels lie side
// by side a pixel is one load; where pixels do, blocks of lanes x lanes are transposed in registers.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/vectors.inl, one copy each; it has
// no include guard.

namespace {

// The channels in the lanes of a block: where each begins, and how many there are. Lanes past them repeat the
// last one.
template <class T>
struct Channels {
  int64_t at[kLanes<T>];
  int live;
  bool dense;  // at[i] = at[0] + i

  // Channels of_lane(i) of a tensor, `live` of them.
  template <class OfLane>
  Channels(const View& tensor, int64_t count, const OfLane& of_lane)
      : live(static_cast<int>(std::min<int64_t>(kLanes<T>, count))), dense(tensor.c == 1) {
    for (int i = 0; i < kLanes<T>; ++i) {
      at[i] = of_lane(std::min(i, live - 1)) * tensor.c;
      dense &= i >= live || at[i] == at[0] + i;
    }
  }
};

// rows x cols pixels from pixel (h, w) of a tensor of height x width. In lanes they are `pixel` vectors
// apart, and rows follow each other.
struct Patch {
  int64_t height, width;
  int64_t h, w, rows, cols;
  int64_t pixel = 1;

  int64_t at(int64_t row, int64_t col) const { return (row * cols + col) * pixel; }
};

// Pixels that follow each other in memory, from element `from`: the first goes to vector `to`, and `gap` more
// vectors lie between rows of `length` pixels.
struct PixelRun {
  int64_t from, count, length, to, gap;
};

// Calls f(run) for the runs of the part rows x cols of a patch.
template <class F>
void pixel_runs(const View& tensor, const Patch& p, Rows rows, Rows cols, const F& f) {
  const int64_t from = (p.h + rows.begin) * tensor.h + (p.w + cols.begin) * tensor.w;
  const int64_t gap = (p.cols - cols.size()) * p.pixel, to = p.at(rows.begin, cols.begin);
  if (tensor.h == cols.size() * tensor.w)
    return f(PixelRun{from, rows.size() * cols.size(), cols.size(), to, gap});
  for (int64_t row = 0; row < rows.size(); ++row)
    f(PixelRun{from + row * tensor.h, cols.size(), cols.size(), to + row * p.at(1, 0), gap});
}

// Calls f(element, vector) for each pixel of a run.
template <class F>
[[gnu::always_inline]] inline void each_pixel(const PixelRun& run, int64_t step, int64_t pixel, const F& f) {
  int64_t to = run.to, col = 0;
  for (int64_t i = 0; i < run.count; ++i, to += pixel) {
    if (col++ == run.length) to += run.gap, col = 1;
    f(run.from + i * step, to);
  }
}

// Calls f(element, vectors) for each kLanes pixels of a run of at least so many; the last may overlap.
template <int lanes, class F>
[[gnu::always_inline]] inline void each_block(const PixelRun& run, int64_t pixel, const F& f) {
  int64_t to = run.to, col = 0;
  for (int64_t i = 0; i < run.count; i += lanes) {
    if (i > run.count - lanes) {
      i = run.count - lanes;
      const int64_t row = i / run.length;
      col = i % run.length, to = run.to + i * pixel + row * run.gap;
    }
    int64_t vectors[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j, to += pixel) {
      if (col++ == run.length) to += run.gap, col = 1;
      vectors[j] = to;
    }
    f(run.from + i, vectors);
  }
}

// The part of [at, at + size) inside [0, total), counted from `at`.
inline Rows inside(int64_t at, int64_t size, int64_t total) {
  const int64_t begin = std::clamp<int64_t>(-at, 0, size);
  return {begin, std::clamp(total - at, begin, size)};
}

// Reads a patch of one image; pixels outside the tensor are zero.
template <class T, class Element>
void patch_to_lanes(const Element* image, const View& tensor, const Channels<T>& channels, const Patch& p,
                    Vector<T>* out) {
  constexpr int lanes = kLanes<T>;
  const Rows rows = inside(p.h, p.rows, p.height), cols = inside(p.w, p.cols, p.width);
  for (int64_t row = 0; row < p.rows; ++row) {
    const bool outside = row < rows.begin || row >= rows.end;
    for (int64_t col = 0; col < (outside ? p.cols : cols.begin); ++col) out[p.at(row, col)] = Vector<T>{};
    for (int64_t col = cols.end; col < p.cols && !outside; ++col) out[p.at(row, col)] = Vector<T>{};
  }
  if (rows.size() <= 0 || cols.size() <= 0) return;
  pixel_runs(tensor, p, rows, cols, [&](const PixelRun& run) {
    if (channels.dense) {
      const Element* block = image + channels.at[0];
      if (channels.live == lanes)
        return each_pixel(run, tensor.w, p.pixel,
                          [&](int64_t e, int64_t to) { out[to] = load<T>(block + e); });
      return each_pixel(run, tensor.w, p.pixel,
                        [&](int64_t e, int64_t to) { out[to] = load_some<T>(block + e, channels.live); });
    }
    if (tensor.w == 1 && run.count >= lanes)
      return each_block<lanes>(run, p.pixel, [&](int64_t e, const int64_t* to) {
        Vector<T> r[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) r[i] = load<T>(image + channels.at[i] + e);
        transpose<T>(r);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) out[to[i]] = r[i];
      });
    each_pixel(run, tensor.w, p.pixel, [&](int64_t e, int64_t to) {
      alignas(kVectorBytes) T values[lanes];
      for (int i = 0; i < lanes; ++i) values[i] = T(image[channels.at[i] + e]);
      out[to] = load<T>(values);
    });
  });
}

// Writes a patch that lies inside the tensor to one image.
template <class T, class Element>
void patch_from_lanes(Element* image, const View& tensor, const Channels<T>& channels, const Patch& p,
                      const Vector<T>* in) {
  constexpr int lanes = kLanes<T>;
  pixel_runs(tensor, p, {0, p.rows}, {0, p.cols}, [&](const PixelRun& run) {
    if (channels.dense) {
      Element* block = image + channels.at[0];
      return each_pixel(run, tensor.w, p.pixel,
                        [&](int64_t e, int64_t from) { store_some<T>(in[from], block + e, channels.live); });
    }
    if (tensor.w == 1 && run.count >= lanes)
      return each_block<lanes>(run, p.pixel, [&](int64_t e, const int64_t* from) {
        Vector<T> r[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) r[i] = in[from[i]];
        transpose<T>(r);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          if (i < channels.live) store<T>(r[i], image + channels.at[i] + e);
      });
    each_pixel(run, tensor.w, p.pixel, [&](int64_t e, int64_t from) {
      for (int i = 0; i < channels.live; ++i) image[channels.at[i] + e] = Element(in[from][i]);
    });
  });
}

}  // namespace
