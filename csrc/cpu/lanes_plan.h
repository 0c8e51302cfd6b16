// SPDX-License-Identifier: MIT
// What kernels with the batch in the lanes (lanes_conv.inl) work out before they touch a number: where arrays
// lie, which pixels are computed, which taps each has.
#pragma once

#include <algorithm>

#include "cpu/plan.h"

namespace fastconv::cpu {

// Pixels of a tile of fprop and dgrad.
inline constexpr int kPositions = 4;

// Takes arrays from a piece of memory, each aligned to a cache line; over no memory it only measures.
class Carver {
 public:
  explicit Carver(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    next_ += next_ ? bytes : 0;
    bytes_ += bytes;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* next_;
  int64_t bytes_ = 0;
};

// Bytes of arrays that are made of a Carver and `sizes`.
template <class Arrays, class... Sizes>
int64_t bytes_of(const Sizes&... sizes) {
  Carver measure(nullptr);
  Arrays(measure, sizes...);
  return measure.bytes();
}

// Pixels of a block of images in lanes, the channels of a pixel side by side. Pixels are an odd number of
// vectors apart: neighbours must not fall into the same sets of a cache.
struct Band {
  int64_t rows, cols, channels;

  int64_t pitch() const { return channels | 1; }
  int64_t size() const { return rows * cols * pitch(); }
  int64_t at(int64_t h, int64_t w) const { return (h * cols + w) * pitch(); }
};

// The part of [at, at + size) inside [0, total), counted from `at`.
inline Rows inside(int64_t at, int64_t size, int64_t total) {
  const int64_t begin = std::clamp<int64_t>(-at, 0, size);
  return {begin, std::clamp(total - at, begin, size)};
}

// The pixels of one axis of a grid: where each finds its first input, where its sum goes, and the taps that
// are not in the padding. Distances are vectors of a band.
struct Step {
  int64_t from, to;
  Rows taps;
};

// Of `count` taps those whose position(i) lies in [0, size); they follow each other.
template <class Position>
Rows taps_inside(int64_t count, int64_t size, const Position& position) {
  Rows taps{0, 0};
  for (int64_t i = 0; i < count; ++i)
    if (position(i) >= 0 && position(i) < size) taps = {taps.size() ? taps.begin : i, i + 1};
  return taps;
}

// Rows and columns of the taps that some pixel of a tile has.
struct Reach {
  Rows r, s;
};

struct Pixels {
  int64_t count;
  const int32_t *from, *to;
  const Reach* reach;  // of each tile of kPositions
};

// The pixels of a grid, four to a tile.
class PixelList {
 public:
  Step *rows = nullptr, *cols = nullptr;

  PixelList() = default;
  PixelList(Carver& carver, int64_t most_rows, int64_t most_cols)
      : rows(carver.take<Step>(most_rows)), cols(carver.take<Step>(most_cols)) {
    const int64_t most = most_rows * most_cols + kPositions;
    from_ = carver.take<int32_t>(most), to_ = carver.take<int32_t>(most);
    reach_ = carver.take<Reach>(most / kPositions);
  }

  // All pixels in tiles of 2x2. Pixels of an odd last column or row go together, and the last is repeated
  // until its tile is full.
  Pixels tiles(int64_t row_count, int64_t col_count) {
    count_ = 0;
    const int64_t even_rows = row_count & ~1, even_cols = col_count & ~1;
    for (int64_t h = 0; h < even_rows; h += 2)
      for (int64_t w = 0; w < even_cols; w += 2) {
        reach_[count_ / kPositions] = {join(rows[h].taps, rows[h + 1].taps),
                                       join(cols[w].taps, cols[w + 1].taps)};
        for (int j = 0; j < kPositions; ++j) place(rows[h + j / 2], cols[w + j % 2]);
      }
    for (int64_t h = 0; h < even_rows && even_cols < col_count; ++h) add(rows[h], cols[even_cols]);
    for (int64_t w = 0; w < col_count && even_rows < row_count; ++w) add(rows[even_rows], cols[w]);
    for (; count_ % kPositions; ++count_) from_[count_] = from_[count_ - 1], to_[count_] = to_[count_ - 1];
    return {count_, from_, to_, reach_};
  }
  // Some of them.
  Pixels some(int64_t first, int64_t count) const { return {count, from_ + first, to_ + first, nullptr}; }

 private:
  void place(const Step& row, const Step& col) {
    from_[count_] = static_cast<int32_t>(row.from + col.from);
    to_[count_++] = static_cast<int32_t>(row.to + col.to);
  }
  void add(const Step& row, const Step& col) {
    Reach& reach = reach_[count_ / kPositions];
    if (count_ % kPositions == 0) reach = {{0, 0}, {0, 0}};
    reach = {join(reach.r, row.taps), join(reach.s, col.taps)};
    place(row, col);
  }
  static Rows join(const Rows& a, const Rows& b) {
    if (a.size() == 0 || b.size() == 0) return a.size() ? a : b;
    return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }

  int64_t count_ = 0;
  int32_t *from_ = nullptr, *to_ = nullptr;
  Reach* reach_ = nullptr;
};

// Calls f(index, r, s, channel) for the taps of a filter in the order of a band.
template <class F>
void each_tap(int64_t R, int64_t S, int64_t channels, const F& f) {
  int64_t i = 0;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < S; ++s)
      for (int64_t c = 0; c < channels; ++c) f(i++, r, s, c);
}

template <class Element>
Element& weight_at(const View& w, int64_t k, int64_t c, int64_t r, int64_t s) {
  return static_cast<Element*>(w.data)[k * w.n + c * w.c + r * w.h + s * w.w];
}

// The taps of one axis of a convolution.
struct Axis {
  int64_t kernel, stride, padding, dilation, size;

  static Axis rows(const ConvShape& s) { return {s.R, s.stride.h, s.padding.h, s.dilation.h, s.H}; }
  static Axis cols(const ConvShape& s) { return {s.S, s.stride.w, s.padding.w, s.dilation.w, s.W}; }
  // Fills in the steps of the outputs [first, first + count), the first of which reads the band's first
  // pixel.
  template <class From, class To>
  void steps(int64_t first, int64_t count, Step* steps, const From& from, const To& to) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = (first + i) * stride - padding;
      steps[i] = {from(i * stride), to(i),
                  taps_inside(kernel, size, [&](int64_t r) { return start + r * dilation; })};
    }
  }
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Of the taps of one axis those that reach inputs i with (i + padding) % stride == phase. Tap number j of
// them reads the gradient at (i + padding - phase) / stride - shift(j).
struct PhaseAxis {
  int64_t phase, kernel, dilation, stride;

  bool has(int64_t r) const { return r * dilation % stride == phase; }
  int64_t shift_of(int64_t r) const { return (r * dilation - phase) / stride; }
  int64_t count() const {
    int64_t n = 0;
    for (int64_t r = 0; r < kernel; ++r) n += has(r);
    return n;
  }
  // Fills in the steps of the inputs [begin, end) of this phase, and returns how many there are. From p on,
  // `size` gradients lie in the band.
  template <class From, class To>
  int64_t steps(int64_t begin, int64_t end, int64_t padding, int64_t p, int64_t size, Step* steps,
                const From& from, const To& to) const {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      if ((i + padding) % stride != phase) continue;
      const int64_t base = (i + padding - phase) / stride;
      Rows taps{0, 0};
      for (int64_t r = 0, j = 0; r < kernel; ++r) {
        if (!has(r)) continue;
        const int64_t at = base - shift_of(r);
        if (at >= 0 && at < size) taps = {taps.size() ? taps.begin : j, j + 1};
        ++j;
      }
      steps[n++] = {from(base - p), to(i - begin), taps};
    }
    return n;
  }
};

// The first output row, or column, that an input from `begin` on reaches.
inline int64_t first_reached(int64_t begin, int64_t padding, int64_t kernel, int64_t dilation,
                             int64_t stride) {
  return floor_div(begin + padding - (kernel - 1) * dilation, stride);
}

// conv_windows: the input under some rows of 2x2 windows of outputs, as [channel][row][phase][element]. The
// elements of a phase are `step` columns apart, those of the next phase one column further.
struct WindowStrip {
  int64_t step, phases, length;
  int64_t rows, in_rows;  // of windows, at most; of the input under them
  int64_t planes;         // channels

  // A step from window to window: element i is read by lane i. The right pixels of the windows find their
  // first phase `stride` further than the left ones, and so each of their taps.
  static WindowStrip windows(const ConvArgs& a, int64_t lanes) {
    const int64_t step = 2 * a.shape.stride.w;
    const int64_t reach = (a.epilogue.pool.out.w + lanes - 1) / lanes * lanes + last(a.shape) / step;
    return {a, step, 3 * a.shape.stride.w, (reach + lanes - 1) / lanes * lanes};
  }
  // A step from pixel to pixel.
  static WindowStrip channels(const ConvArgs& a) {
    const int64_t step = a.shape.stride.w;
    return {a, step, step, 2 * a.epilogue.pool.out.w + last(a.shape) / step};
  }

  int64_t pitch() const { return phases * length; }
  int64_t plane() const { return in_rows * pitch(); }
  int64_t size() const { return planes * plane(); }
  // Where a tap finds the first element of a row.
  int64_t tap(const ConvShape& s, int64_t c, int64_t r, int64_t f) const {
    const int64_t col = f * s.dilation.w;
    return c * plane() + r * s.dilation.h * pitch() + col % step * length + col / step;
  }

 private:
  // A task has as many rows as take about 20 us and half a second-level cache.
  WindowStrip(const ConvArgs& a, int64_t step, int64_t phases, int64_t length)
      : step(step), phases(phases), length(length), planes(a.shape.C) {
    const ConvShape& s = a.shape;
    const int64_t out_h = std::max<int64_t>(1, a.epilogue.pool.out.h);
    const double row_us = s.macs() / double(std::max<int64_t>(1, s.N) * out_h) / 5e4;
    const auto bytes = [&](int64_t count) { return 8 * s.C * pitch() * in_rows_of(s, count); };
    rows = std::clamp<int64_t>(static_cast<int64_t>(20 / std::max(row_us, 1e-3)), 1, out_h);
    while (rows > 1 && bytes(rows) > kBandBytes) rows = (rows + 1) / 2;
    in_rows = in_rows_of(s, rows);
  }
  static int64_t in_rows_of(const ConvShape& s, int64_t rows) {
    return (2 * rows - 1) * s.stride.h + (s.R - 1) * s.dilation.h + 1;
  }
  static int64_t last(const ConvShape& s) { return (s.S - 1) * s.dilation.w; }
};

// What all tasks read; output channels in `lanes` lanes.
template <class T>
struct WindowTables {
  T *weights, *bias;
  int32_t* taps;
  PixelList list;

  WindowTables(Carver& carver, const ConvShape& s, int64_t lanes)
      : weights(
            carver.take<T>(s.groups * ((s.group_k() + lanes - 1) / lanes * lanes) * s.group_c() * s.taps())),
        bias(carver.take<T>(s.K)),
        taps(carver.take<int32_t>(s.group_c() * s.taps())),
        list(carver, 2, 2) {}
};

}  // namespace fastconv::cpu
