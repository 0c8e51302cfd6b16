// SPDX-License-Identifier: MIT
// Max-pool, both passes, a few instructions a vector from a copy.
//
//   rows      (NCHW and any strides) A band of one plane at a time, through scratch that stays in the
//             first cache. Forward reduces each input row along the width, once, then the reduced rows
//             along height and depth; there the rows follow each other without gaps, so that narrow
//             planes fill the lanes. Backward adds up, for each input row, what the windows over it
//             send, in the windows' order.
//   channels  (channels_last) The channels of a pixel in the lanes, the cells of its window in turn;
//             backward the windows over a pixel in turn.
//
// A row that ends amid a vector is stored whole where the rows after it follow: they overwrite what
// spills. Limits: the windows of plan.h. The floor is reading x and writing y and offsets once; on one
// AVX-512 core forward passes 10-20 GB/s of that, backward 5-13, less on planes below 14x14.
#ifndef FASTCONV_ISA

#include <limits>

#include "core/naive.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/max_pool_rows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

namespace {

constexpr int64_t kBandElements = 3072;  // of scratch that a band fills
constexpr int64_t kMostBands = 16;       // bands in flight, so that none is read right after it is written
constexpr double kElementUs = 1e-4;      // rough time of an element of the larger tensor

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
  int64_t begin, size;
};
inline Span part(int64_t index, int64_t size, int64_t total) {
  return {index * size, std::min(size, total - index * size)};
}

// The steps of a window axis that lie inside the input.
inline Span steps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = naive::first_step(start, dilation);
  const int64_t end = start < size ? std::min(kernel, ceil_div(size - start, dilation)) : 0;
  return {begin, std::max<int64_t>(0, end - begin)};
}

// Whether elements [n, c, d, h, w] follow each other without gaps.
bool is_dense(const View& v, int64_t images, int64_t channels, const Extent3& size) {
  const auto steps = [](int64_t stride, int64_t count, int64_t dense) {
    return count <= 1 || stride == dense;
  };
  return steps(v.w, size.w, 1) && steps(v.h, size.h, size.w) && steps(v.d, size.d, size.h * size.w) &&
         steps(v.c, channels, size.cells()) && steps(v.n, images, channels * size.cells());
}

template <class Element>
const Element* end_of(const View& v, int64_t n, int64_t c, const Extent3& size) {
  return &naive::at<Element>(v, n - 1, c - 1, size.d - 1, size.h - 1, size.w - 1) + 1;
}

// Stores `count` lanes `step` elements apart. Where the step is one, `room` elements may be overwritten.
template <class T, class Element>
[[gnu::always_inline]] inline void put(Vector<T> v, Element* to, int64_t step, int64_t count, int64_t room) {
  if (step == 1) return store_some<T>(v, to, room);
  for (int i = 0; i < kLanes<T> && i < count; ++i) to[i * step] = Element(v[i]);
}

// Pieces of a tensor along its height and width, in the order of the elements they hold.
struct Bands {
  int64_t C, D, H, W;     // of the tensor
  int64_t height, width;  // of a band; those at the ends may be smaller

  int64_t down() const { return ceil_div(H, height); }
  int64_t across() const { return ceil_div(W, width); }
  int64_t count(int64_t N) const { return N * C * D * down() * across(); }
};

struct Band {
  int64_t n, c, d;
  Span h, w;
};

inline Band band_at(const Bands& b, int64_t i) {
  const naive::Index5 at = naive::unflatten(i, b.C, b.D, b.down(), b.across());
  return {at.n, at.c, at.d, part(at.h, b.height, b.H), part(at.w, b.width, b.W)};
}

inline void next_band(const Bands& b, Band& band) {
  if (band.w.begin + b.width < b.W) {
    band.w = {band.w.begin + b.width, std::min(b.width, b.W - band.w.begin - b.width)};
    return;
  }
  band.w = {0, std::min(b.width, b.W)};
  if (band.h.begin + b.height < b.H) {
    band.h = {band.h.begin + b.height, std::min(b.height, b.H - band.h.begin - b.height)};
    return;
  }
  band.h = {0, std::min(b.height, b.H)};
  if (++band.d < b.D) return;
  band.d = 0;
  if (++band.c < b.C) return;
  band.c = 0, ++band.n;
}

// Where row h of a dense tensor starts, at a band that may be one past the last.
template <class Element>
const Element* dense_at(const View& v, int64_t channels, const Extent3& size, const Band& b, int64_t h) {
  return static_cast<const Element*>(v.data) +
         (((b.n * channels + b.c) * size.d + b.d) * size.h + h) * size.w;
}

// Runs two steps over the bands [begin, end), the second a few bands behind the first: first(band,
// slot) and second(band, slot), where slots count from zero.
template <class First, class Second>
void in_two_steps(const Bands& bands, int64_t begin, int64_t end, int64_t slots, const First& first,
                  const Second& second) {
  Band ahead = band_at(bands, begin), behind = ahead;
  for (int64_t i = begin; i < end; i += slots) {
    const int64_t count = std::min(slots, end - i);
    for (int64_t slot = 0; slot < count; ++slot, next_band(bands, ahead)) first(ahead, slot);
    for (int64_t slot = 0; slot < count; ++slot, next_band(bands, behind)) second(behind, slot);
  }
}

// Hands out the thread's scratch.
class Shelf {
 public:
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return piece;
  }

 private:
  char* next_ = static_cast<char*>(thread_scratch());
};

// --- forward, rows

// Takes a cell where it is greater (the first of equals stays) or NaN (the last takes over).
template <class T, bool with_offsets>
[[gnu::always_inline]] inline void take(Vector<T> value, Vector<Lane<T>> offset, Vector<T>& best,
                                        Vector<Lane<T>>& best_offset) {
  const auto better = (value > best) | (value != value);
  best = better ? value : best;
  if constexpr (with_offsets) best_offset = better ? offset : best_offset;
}

// Input rows, reduced along the width: output i of a row looks at line[i * step + tap[s]]. first[i] is
// the first of its cells that lies inside the input; those before it are -inf. `taps` is the window's
// width, or zero for any; where it is given and the step is two, the taps are neighbours.
template <class T, bool with_offsets, int step, int taps>
void reduce_width(const T* line, int64_t pitch, int64_t rows, const int64_t* tap, int64_t kernel,
                  const Lane<T>* first, int64_t count, T* best_out, Lane<T>* offset_out) {
  for (int64_t row = 0; row < rows; ++row, line += pitch, best_out += count, offset_out += count)
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const T* cells = line + i * step;
      const auto cell = [&](int64_t s) [[gnu::always_inline]] -> Vector<T> {
        if constexpr (step == 1) return load<T>(cells + tap[s]);
        const T* pairs = cells + (taps ? s / 2 * 2 : tap[s]);
        const Vector<T> a = load<T>(pairs), b = load<T>(pairs + kLanes<T>);
        return taps && s % 2 ? alternate<T, true>(a, b) : alternate<T, false>(a, b);
      };
      Vector<T> best = cell(0);
      Vector<Lane<T>> offset{};
      if constexpr (with_offsets) offset = load<Lane<T>>(first + i);
      if constexpr (taps > 0) {
#pragma GCC unroll 4
        for (int s = 1; s < taps; ++s)
          take<T, with_offsets>(cell(s), Vector<Lane<T>>{} + Lane<T>(s), best, offset);
      } else {
        for (int64_t s = 1; s < kernel; ++s)
          take<T, with_offsets>(cell(s), Vector<Lane<T>>{} + Lane<T>(s), best, offset);
      }
      store<T>(best, best_out + i);
      if constexpr (with_offsets) store<Lane<T>>(offset, offset_out + i);
    }
}

// Where the reduced rows of a window lie, and the number of each row's first cell.
struct RowTaps {
  const int64_t* at;
  const int64_t* number;
  int64_t count;
};

// Reduced rows to outputs. `taps` is the number of rows of a window, or zero for any.
template <class T, class Element, bool with_offsets, int taps>
void reduce_rows(const T* best_in, const Lane<T>* offset_in, const RowTaps& rows, int64_t count, int64_t room,
                 Element* y, int64_t y_step, void* offsets, Offset offset_type, int64_t offset_step) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vector<T> best = load<T>(best_in + rows.at[0] + i);
    Vector<Lane<T>> offset{};
    if constexpr (with_offsets) offset = load<Lane<T>>(offset_in + rows.at[0] + i);
    const auto row = [&](int64_t j) [[gnu::always_inline]] {
      Vector<Lane<T>> here{};
      if constexpr (with_offsets)
        here = load<Lane<T>>(offset_in + rows.at[j] + i) + static_cast<Lane<T>>(rows.number[j]);
      take<T, with_offsets>(load<T>(best_in + rows.at[j] + i), here, best, offset);
    };
    if constexpr (taps > 0) {
#pragma GCC unroll 4
      for (int j = 1; j < taps; ++j) row(j);
    } else {
      for (int64_t j = 1; j < rows.count; ++j) row(j);
    }
    put<T>(best, y + i * y_step, y_step, count - i, room - i);
    if constexpr (with_offsets) {
      if (offset_type == Offset::u8)
        put<Lane<T>>(offset, static_cast<uint8_t*>(offsets) + i * offset_step, offset_step, count - i,
                     room - i);
      else
        put<Lane<T>>(offset, static_cast<int32_t*>(offsets) + i * offset_step, offset_step, count - i,
                     room - i);
    }
  }
}

template <class Element, bool with_offsets>
class Forward {
  using T = typename Compute<Element>::type;
  using Offsets = Lane<T>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int64_t kLines = 8;
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();

 public:
  explicit Forward(const PoolArgs& a) : a_(a), v_(a.window) {
    // Tap r of output row p is row p + at of a class; row i of a class is input row i * stride + start.
    // Taps one stride apart share a class.
    const Extent3& k = v_.kernel;
    int64_t shared = 0;
    for (int64_t r = 0; r < k.h; ++r) {
      if (v_.dilation.h == 1 && r >= v_.stride.h) {
        class_of_[r] = class_of_[r - v_.stride.h], at_[r] = at_[r - v_.stride.h] + 1;
        ++more_[class_of_[r]], ++shared;
      } else {
        class_of_[r] = classes_, at_[r] = 0;
        start_[classes_] = static_cast<int32_t>(r * v_.dilation.h), more_[classes_++] = 0;
      }
    }
    const int64_t least = k.d * (classes_ + shared), columns = gathers() ? k.w : 1;
    bands_ = {a.C, v_.out.d, v_.out.h, v_.out.w, 1, v_.out.w};
    if (least * v_.out.w > kBandElements || columns * v_.out.w > kBandElements)
      bands_.width = std::min(
          v_.out.w, std::max<int64_t>(1, kBandElements / std::max(least, columns) / kWidth) * kWidth);
    const int64_t most = (kBandElements / bands_.width - k.d * shared) / (k.d * classes_);
    bands_.height = ceil_div(v_.out.h, ceil_div(v_.out.h, std::clamp<int64_t>(most, 1, v_.out.h)));
    slice_ = (classes_ * bands_.height + shared) * bands_.width + classes_ * kWidth;
    slots_ = std::clamp<int64_t>(kBandElements / (k.d * slice_), 1, kMostBands);
    line_ = gathers() ? k.w * (bands_.width + kWidth)
                      : bands_.width * v_.stride.w + k.w * v_.dilation.w + 2 * kWidth;

    const bool whole = bands_.width == v_.out.w;
    const auto rows_follow = [&](const View& v) { return v.w == 1 && (v_.out.h == 1 || v.h == v_.out.w); };
    flat_ = whole && rows_follow(a.y) && (!with_offsets || rows_follow(a.offsets));
    spills_ =
        flat_ && is_dense(a.y, a.N, a.C, v_.out) && (!with_offsets || is_dense(a.offsets, a.N, a.C, v_.out));
    in_place_ = std::is_same_v<T, Element> && a.x.w == 1 && !gathers() && v_.padding.w == 0 &&
                (v_.out.w - 1) * v_.stride.w + (k.w - 1) * v_.dilation.w < a.W;
    end_ = end_of<Element>(a.x, a.N, a.C, {a.D, a.H, a.W});
    if (v_.stride.w != 2) {
      reduce_ = k.w == 2   ? reduce_width<T, with_offsets, 1, 2>
                : k.w == 3 ? reduce_width<T, with_offsets, 1, 3>
                           : reduce_width<T, with_offsets, 1, 0>;
    } else {
      reduce_ = v_.dilation.w == 1 && k.w == 2   ? reduce_width<T, with_offsets, 2, 2>
                : v_.dilation.w == 1 && k.w == 3 ? reduce_width<T, with_offsets, 2, 3>
                                                 : reduce_width<T, with_offsets, 2, 0>;
    }
    const int64_t rows = k.d * k.h;
    merge_ = rows == 2   ? reduce_rows<T, Element, with_offsets, 2>
             : rows == 3 ? reduce_rows<T, Element, with_offsets, 3>
                         : reduce_rows<T, Element, with_offsets, 0>;
  }

  void run() const {
    const int64_t count = bands_.count(a_.N);
    const double band_us = double(a_.N * a_.C * a_.D * a_.H * a_.W) / double(count) * kElementUs + 0.01;
    parallel_ranges(count, static_cast<int64_t>(10 / band_us),
                    [&](int64_t begin, int64_t end) { run(begin, end); });
  }

 private:
  // A thread's scratch, and what depends on a band's place across.
  struct Scratch {
    int64_t tap[kMostPoolColumns];
    int64_t begin;   // the band across for which line, first and taps are made
    T* line;         // input rows that are not read in place; -inf outside
    Offsets* first;  // for each output column, the first column of its window inside the input
    int64_t *row_at, *row_number;
    T* best;  // the reduced rows of each slot
    Offsets* offset;
  };

  // Wide strides gather each tap's cells in a line of their own.
  bool gathers() const { return v_.stride.w > 2; }

  void run(int64_t begin, int64_t end) const {
    const Extent3& k = v_.kernel;
    Shelf shelf;
    Scratch s;
    const int64_t width = bands_.width;
    s.begin = -1;
    s.line = shelf.take<T>(line_ * kLines + 2 * kWidth);
    s.first = shelf.take<Offsets>(width + kWidth);
    s.row_at = shelf.take<int64_t>(k.d * k.h);
    s.row_number = shelf.take<int64_t>(k.d * k.h);
    s.best = shelf.take<T>(slots_ * k.d * slice_);
    s.offset = shelf.take<Offsets>(slots_ * k.d * slice_);
    for (int64_t i = 0; i < k.w; ++i) s.tap[i] = gathers() ? i * (width + kWidth) : i * v_.dilation.w;

    const Band stop = band_at(bands_, end);
    const Element* y_stop = spills_ ? dense_at<Element>(a_.y, a_.C, v_.out, stop, stop.h.begin) : nullptr;
    in_two_steps(
        bands_, begin, end, slots_,
        [&](const Band& b, int64_t slot) {
          if (b.w.begin != s.begin) prepare(b, s);
          along_width(b, slot * k.d * slice_, s);
        },
        [&](const Band& b, int64_t slot) { along_height(b, slot * k.d * slice_, y_stop, s); });
  }

  void prepare(const Band& b, Scratch& s) const {
    s.begin = b.w.begin;
    std::fill(s.line, s.line + line_ * kLines, kLowest);
    for (int64_t q = 0; q < b.w.size + kWidth; ++q)
      s.first[q] = static_cast<Offsets>(
          naive::first_step((b.w.begin + q) * v_.stride.w - v_.padding.w, v_.dilation.w));
    for (int64_t t = 0; t < v_.kernel.d; ++t)
      for (int64_t r = 0; r < v_.kernel.h; ++r) {
        const int64_t j = t * v_.kernel.h + r;
        s.row_at[j] = t * slice_ + class_begin(class_of_[r]) + at_[r] * b.w.size;
        s.row_number[j] = j * v_.kernel.w;
      }
  }

  // Where a class lies in its slice.
  int64_t class_begin(int64_t which) const {
    int64_t begin = 0;
    for (int64_t i = 0; i < which; ++i) begin += (bands_.height + more_[i]) * bands_.width + kWidth;
    return begin;
  }

  void along_width(const Band& b, int64_t base, Scratch& s) const {
    for (int64_t t = 0; t < v_.kernel.d; ++t) {
      const int64_t d = b.d * v_.stride.d - v_.padding.d + t * v_.dilation.d;
      int64_t at = base + t * slice_;
      for (int32_t i = 0; i < classes_; ++i) {
        const int64_t h = b.h.begin * v_.stride.h - v_.padding.h + start_[i], rows = b.h.size + more_[i];
        const Span in = d < 0 || d >= a_.D ? Span{0, 0} : steps_inside(h, rows, v_.stride.h, a_.H);
        // In ascending order: the vectors of one row spill over the next.
        for (int64_t row = 0; row < rows; ++row) {
          if (row == in.begin && in.size > 0) {
            inside(&naive::at<Element>(a_.x, b.n, b.c, d, h + row * v_.stride.h, 0), in.size, b.w, s,
                   at + row * b.w.size);
            row += in.size - 1;
          } else {
            outside(d, h + row * v_.stride.h, b.w.size, s, at + row * b.w.size);
          }
        }
        at += (bands_.height + more_[i]) * bands_.width + kWidth;
      }
    }
  }

  // Reduces `rows` input rows, one stride apart, for output columns q.
  void inside(const Element* x, int64_t rows, Span q, const Scratch& s, int64_t to) const {
    const int64_t start = q.begin * v_.stride.w - v_.padding.w, step = v_.stride.h * a_.x.h;
    if constexpr (std::is_same_v<T, Element>) {
      const int64_t reach =
          ceil_div(q.size, kWidth) * kWidth * v_.stride.w + (v_.kernel.w - 1) * v_.dilation.w;
      int64_t whole = in_place_ ? rows : 0;
      while (whole > 0 && end_ - (x + start) < (whole - 1) * step + reach) --whole;
      reduce_(x + start, step, whole, s.tap, v_.kernel.w, s.first, q.size, s.best + to, s.offset + to);
      x += whole * step, rows -= whole, to += whole * q.size;
    }
    for (; rows > 0; x += kLines * step, rows -= kLines, to += kLines * q.size) {
      const int64_t count = std::min(rows, kLines);
      for (int64_t i = 0; i < count; ++i) copy(x + i * step, start, q.size, s, s.line + i * line_);
      reduce_(s.line, line_, count, s.tap, v_.kernel.w, s.first, q.size, s.best + to, s.offset + to);
    }
  }

  // A row outside the input. Where a window's first row is one, and all of its cells are -inf, the
  // offset is that of its first cell inside.
  void outside(int64_t d, int64_t h, int64_t count, const Scratch& s, int64_t to) const {
    std::fill(s.best + to, s.best + to + count, kLowest);
    if constexpr (with_offsets) {
      const int64_t skipped =
          naive::first_step(d, v_.dilation.d) * v_.kernel.h + naive::first_step(h, v_.dilation.h);
      for (int64_t q = 0; q < count; ++q)
        s.offset[to + q] = static_cast<Offsets>(skipped * v_.kernel.w + s.first[q]);
    }
  }

  // The cells of one row that `count` windows from column `start` look at, as reduce_ reads them.
  void copy(const Element* row, int64_t start, int64_t count, const Scratch& s, T* line) const {
    if (gathers()) {
      for (int64_t i = 0; i < v_.kernel.w; ++i) {
        const int64_t w = start + i * v_.dilation.w;
        const Span in = steps_inside(w, count, v_.stride.w, a_.W);
        for (int64_t j = in.begin; j < in.begin + in.size; ++j)
          line[s.tap[i] + j] = T(row[(w + j * v_.stride.w) * a_.x.w]);
      }
      return;
    }
    const int64_t span = (count - 1) * v_.stride.w + (v_.kernel.w - 1) * v_.dilation.w + 1;
    const Span in = steps_inside(start, span, 1, a_.W);
    if (in.size == 0) return;
    row += (start + in.begin) * a_.x.w, line += in.begin;
    if (a_.x.w == 1 && end_ - row >= in.size + kWidth) {
      for (int64_t i = 0; i < in.size; i += kWidth) store<T>(load<T>(row + i), line + i);
      store<T>(Vector<T>{} + kLowest, line + in.size);
    } else {
      for (int64_t i = 0; i < in.size; ++i) line[i] = T(row[i * a_.x.w]);
    }
  }

  void along_height(const Band& b, int64_t base, const Element* y_stop, const Scratch& s) const {
    const RowTaps rows{s.row_at, s.row_number, v_.kernel.d * v_.kernel.h};
    const int64_t lines = flat_ ? 1 : b.h.size, count = flat_ ? b.h.size * b.w.size : b.w.size;
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t p = b.h.begin + i, from = base + i * b.w.size;
      Element* y = &naive::at_mut<Element>(a_.y, b.n, b.c, b.d, p, b.w.begin);
      void* offsets = nullptr;
      if (a_.offset == Offset::u8) offsets = &naive::at_mut<uint8_t>(a_.offsets, b.n, b.c, b.d, p, b.w.begin);
      if (a_.offset == Offset::i32)
        offsets = &naive::at_mut<int32_t>(a_.offsets, b.n, b.c, b.d, p, b.w.begin);
      merge_(s.best + from, s.offset + from, rows, count, spills_ ? y_stop - y : count, y, a_.y.w, offsets,
             a_.offset, a_.offsets.w);
    }
  }

  const PoolArgs& a_;
  const Window& v_;
  Bands bands_;
  int32_t classes_ = 0;
  int32_t start_[kMostPoolRows], more_[kMostPoolRows], class_of_[kMostPoolRows], at_[kMostPoolRows];
  int64_t slice_;  // reduced elements of one input depth of a band
  int64_t slots_, line_;
  bool flat_;      // a band's outputs follow each other in y and offsets
  bool spills_;    // and so do the bands
  bool in_place_;  // input rows can be read where they are, as long as that is not past the tensor
  const Element* end_;
  decltype(&reduce_width<T, with_offsets, 1, 0>) reduce_;
  decltype(&reduce_rows<T, Element, with_offsets, 0>) merge_;
};

// --- forward, channels

// The channels of one pixel: f(c, room) for vectors from channel c. Where the channels do not fill a
// vector, `room` says how many elements may be written; else it is that of a vector.
template <int lanes, class F>
[[gnu::always_inline]] inline void each_vector(int64_t channels, int64_t room, const F& f) {
  if (channels < lanes) return f(int64_t{0}, room);
  for (int64_t c = 0; c + lanes <= channels; c += lanes) f(c, int64_t{lanes});
  if (channels % lanes) f(channels - lanes, int64_t{lanes});
}

template <class Element, bool with_offsets>
void forward_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  const Window& v = a.window;
  const Element* end = end_of<Element>(a.x, a.N, a.C, {a.D, a.H, a.W});
  const double row_us = double(a.C * a.D * a.H * a.W) / double(v.out.d * v.out.h) * kElementUs + 0.02;
  parallel_ranges(a.N * v.out.d * v.out.h, static_cast<int64_t>(10 / row_us), [&](int64_t from, int64_t to) {
    Shelf shelf;
    int64_t* at = shelf.take<int64_t>(v.kernel.cells());
    Lane<T>* number = shelf.take<Lane<T>>(v.kernel.cells());
    for (int64_t row = from; row < to; ++row) {
      const int64_t p = row % v.out.h, z = row / v.out.h % v.out.d, n = row / (v.out.h * v.out.d);
      const int64_t d0 = z * v.stride.d - v.padding.d, h0 = p * v.stride.h - v.padding.h;
      const Span ts = steps_inside(d0, v.kernel.d, v.dilation.d, a.D),
                 rs = steps_inside(h0, v.kernel.h, v.dilation.h, a.H);
      Span listed{0, -1};
      int64_t cells = 0;
      for (int64_t q = 0; q < v.out.w; ++q) {
        const int64_t w0 = q * v.stride.w - v.padding.w;
        const Span ss = steps_inside(w0, v.kernel.w, v.dilation.w, a.W);
        if (ss.begin != listed.begin || ss.size != listed.size) {
          listed = ss, cells = 0;
          for (int64_t t = ts.begin; t < ts.begin + ts.size; ++t)
            for (int64_t r = rs.begin; r < rs.begin + rs.size; ++r)
              for (int64_t s = ss.begin; s < ss.begin + ss.size; ++s, ++cells) {
                at[cells] = t * v.dilation.d * a.x.d + r * v.dilation.h * a.x.h + s * v.dilation.w * a.x.w;
                number[cells] = static_cast<Lane<T>>((t * v.kernel.h + r) * v.kernel.w + s);
              }
        }
        const Element* x = &naive::at<Element>(a.x, n, 0, d0, h0, w0);
        if (cells == 0 || (a.C < kLanes<T> && end - x < at[cells - 1] + kLanes<T>)) {
          for (int64_t c = 0; c < a.C; ++c)
            naive::max_pool<Element>(a, (((n * a.C + c) * v.out.d + z) * v.out.h + p) * v.out.w + q);
          continue;
        }
        Element* y = &naive::at_mut<Element>(a.y, n, 0, z, p, q);
        const bool follow = a.y.w == a.C && (!with_offsets || a.offsets.w == a.C);
        each_vector<kLanes<T>>(a.C, follow ? (v.out.w - q) * a.C : a.C, [&](int64_t c, int64_t room) {
          Vector<T> best = load<T>(x + at[0] + c);
          Vector<Lane<T>> offset = Vector<Lane<T>>{} + number[0];
          for (int64_t i = 1; i < cells; ++i)
            take<T, with_offsets>(load<T>(x + at[i] + c), Vector<Lane<T>>{} + number[i], best, offset);
          store_some<T>(best, y + c, room);
          if constexpr (with_offsets) {
            if (a.offset == Offset::u8)
              store_some<Lane<T>>(offset, &naive::at_mut<uint8_t>(a.offsets, n, c, z, p, q), room);
            else
              store_some<Lane<T>>(offset, &naive::at_mut<int32_t>(a.offsets, n, c, z, p, q), room);
          }
        });
      }
    }
  });
}

template <class Element, bool with_offsets>
void forward(const PoolArgs& a) {
  if (a.N * a.C * a.window.out.cells() == 0) return;
  if (a.C > 1 && a.x.c == 1 && a.y.c == 1 && (!with_offsets || a.offsets.c == 1))
    return forward_channels<Element, with_offsets>(a);
  Forward<Element, with_offsets>(a).run();
}

}  // namespace

void max_pool_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    a.offset == Offset::none ? forward<Element, false>(a) : forward<Element, true>(a);
  });
}

namespace {

// --- backward, rows

// An axis seen from the inputs: entries [begin[f], begin[f + 1]) are the taps that meet input positions
// i * stride + f, each at output i + shift, in ascending order of the outputs.
struct Meetings {
  int32_t begin[kMostPoolColumns + 1], tap[kMostPoolRows], shift[kMostPoolRows];
  int64_t least = 0, most = 0;  // of the shifts

  Meetings(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    int32_t count = 0;
    for (int64_t f = 0; f < stride; ++f) {
      begin[f] = count;
      for (int64_t s = kernel - 1; s >= 0; --s) {
        const int64_t scaled = f + padding - s * dilation;
        if (scaled % stride) continue;
        tap[count] = static_cast<int32_t>(s), shift[count++] = static_cast<int32_t>(scaled / stride);
        least = std::min(least, scaled / stride), most = std::max(most, scaled / stride);
      }
    }
    begin[stride] = count;
  }
};

// What a window's tap sends: the staged gradient `at` from the input cell, where the offset is `number`.
struct Source {
  int64_t at;
  int64_t number;
};

template <class T>
struct Staged {
  const T* grad;
  const Lane<T>* offset;

  // The sums that kLanes<T> neighbouring cells get.
  [[gnu::always_inline]] Vector<T> sum(const Source* sources, int64_t count, int64_t at) const {
    Vector<T> total{};
    for (int64_t i = 0; i < count; ++i) {
      const auto here = load<Lane<T>>(offset + sources[i].at + at) == static_cast<Lane<T>>(sources[i].number);
      total += here ? load<T>(grad + sources[i].at + at) : Vector<T>{};
    }
    return total;
  }
};

// Gradients, with the gate applied, and offsets of rows of outputs to scratch. `whole` vectors may be
// read where a row ends amid one.
template <class T, class Element, class Stored, bool gated, bool whole>
void stage_rows(const Element* y, int64_t y_pitch, const Element* gate, int64_t gate_pitch,
                const Stored* offsets, int64_t offset_pitch, int64_t rows, int64_t count, int64_t pitch,
                int64_t filler, T* grad, Lane<T>* offset) {
  constexpr int lanes = kLanes<T>;
  const Vector<Lane<T>> none = Vector<Lane<T>>{} - 1;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t room = whole ? lanes : count - i;
      Vector<T> g = load_some<T>(y + i, room);
      if constexpr (gated) g = load_some<T>(gate + i, room) <= T(0) ? Vector<T>{} : g;
      store<T>(g, grad + i);
      store<Lane<T>>(load_some<Lane<T>>(offsets + i, room), offset + i);
    }
    for (int64_t i = 0; i < filler; i += lanes) store<Lane<T>>(none, offset + count + i);
    y += y_pitch, offsets += offset_pitch, grad += pitch, offset += pitch;
    if constexpr (gated) gate += gate_pitch;
  }
}

// What the cells of a row get: even ones, and where the stride is two, odd ones.
struct Phase {
  const Source* sources[2];
  int64_t count[2];
};

// Rows [begin, end) of the inputs of a band, `x_pitch` apart; `phases` repeat down the rows. Strides
// one and two along the width; `whole` vectors may be written where a row ends amid one.
template <class T, class Element, int stride, bool whole>
void gather_rows(const Staged<T>& staged, int64_t pitch, const Phase* phases, int64_t phase_count,
                 int64_t begin, int64_t end, int64_t cells, Element* x, int64_t x_pitch) {
  constexpr int lanes = kLanes<T>;
  x += begin * x_pitch;
  int64_t g = begin % phase_count, from = begin / phase_count * pitch;
  const auto put = [&](Vector<T> v, int64_t i) [[gnu::always_inline]] {
    whole ? store<T>(v, x + i) : store_some<T>(v, x + i, cells - i);
  };
  for (int64_t row = begin; row < end; ++row, x += x_pitch) {
    const Phase& phase = phases[g];
    for (int64_t i = 0, at = from; i < cells; i += stride * lanes, at += lanes) {
      const Vector<T> a = staged.sum(phase.sources[0], phase.count[0], at);
      if constexpr (stride == 1) {
        put(a, i);
      } else {
        const Vector<T> b = staged.sum(phase.sources[1], phase.count[1], at);
        put(interleave<T, false>(a, b), i);
        put(interleave<T, true>(a, b), i + lanes);
      }
    }
    if (++g == phase_count) g = 0, from += pitch;
  }
}

// Input rows of a band are counted in groups of one stride, so that the windows over row `g` of each
// group are the same but for a shift; columns likewise.
template <class Element>
class Backward {
  using T = typename Compute<Element>::type;
  using Offsets = Lane<T>;
  static constexpr int kWidth = kLanes<T>;

 public:
  explicit Backward(const PoolArgs& a)
      : a_(a),
        v_(a.window),
        td_(v_.kernel.d, v_.stride.d, v_.padding.d, v_.dilation.d),
        th_(v_.kernel.h, v_.stride.h, v_.padding.h, v_.dilation.h),
        tw_(v_.kernel.w, v_.stride.w, v_.padding.w, v_.dilation.w) {
    const int64_t groups = ceil_div(a.H, v_.stride.h), columns = ceil_div(a.W, v_.stride.w);
    const int64_t over = tw_.most - tw_.least, depths = td_.most - td_.least + 1;
    const int64_t least = depths * (th_.most - th_.least + 1);
    bands_ = {a.C, a.D, groups, columns, 1, columns};
    if (least * (columns + over) > kBandElements)
      bands_.width = std::min(columns, std::max<int64_t>(1, kBandElements / least / kWidth) * kWidth);
    pitch_ = bands_.width + over;
    const int64_t most = kBandElements / pitch_ / depths - (th_.most - th_.least);
    bands_.height = ceil_div(groups, ceil_div(groups, std::clamp<int64_t>(most, 1, groups)));
    slice_ = (bands_.height + th_.most - th_.least) * pitch_;
    slot_ = depths * slice_ + over + 3 * kWidth;
    slots_ = std::clamp<int64_t>(kBandElements / slot_, 1, kMostBands);
    vectors_ = a.x.w == 1 && v_.stride.w <= 2;
    spills_ = vectors_ && bands_.width == columns && is_dense(a.x, a.N, a.C, {a.D, a.H, a.W});
  }

  void run() const {
    const int64_t count = bands_.count(a_.N);
    const double band_us = double(a_.N * a_.C * a_.D * a_.H * a_.W) / double(count) * kElementUs + 0.01;
    parallel_ranges(count, static_cast<int64_t>(10 / band_us),
                    [&](int64_t begin, int64_t end) { run(begin, end); });
  }

 private:
  // The gradients and offsets of a band's windows, rows `pitch_` apart; no window has offset -1.
  struct Scratch {
    T* grad;
    Offsets* offset;
    T* line;
    int64_t depth;  // that phases and sources are made for
    Phase phases[kMostPoolColumns];
    Source sources[kMostPoolCells];
  };

  void run(int64_t begin, int64_t end) const {
    Shelf shelf;
    Scratch s;
    s.grad = shelf.take<T>(slots_ * slot_);
    s.offset = shelf.take<Offsets>(slots_ * slot_);
    s.line = shelf.take<T>(bands_.width + kWidth);
    s.depth = -1;
    const Band stop = band_at(bands_, end);
    const Element* x_stop =
        spills_ ? dense_at<Element>(a_.x, a_.C, {a_.D, a_.H, a_.W}, stop, stop.h.begin * v_.stride.h)
                : nullptr;
    in_two_steps(
        bands_, begin, end, slots_, [&](const Band& b, int64_t slot) { stage(b, slot * slot_, s); },
        [&](const Band& b, int64_t slot) { gather(b, slot * slot_, x_stop, s); });
  }

  // Output depths over the band.
  Span depths(const Band& b) const {
    const int64_t i = b.d / v_.stride.d, begin = std::max<int64_t>(0, i + td_.least);
    return {begin, std::max<int64_t>(0, std::min(v_.out.d, i + td_.most + 1) - begin)};
  }

  void stage(const Band& b, int64_t base, const Scratch& s) const {
    const Span zs = depths(b);
    const int64_t q0 = b.w.begin + tw_.least, p0 = b.h.begin + th_.least;
    const int64_t rows = b.h.size + th_.most - th_.least;
    const int64_t lead = std::clamp<int64_t>(-q0, 0, pitch_);
    const int64_t count = std::clamp<int64_t>(v_.out.w - (q0 + lead), 0, pitch_ - lead);
    const Span in = steps_inside(p0, rows, 1, v_.out.h);
    for (int64_t z = 0; z < zs.size; ++z) {
      Offsets* offset = s.offset + base + z * slice_;
      T* grad = s.grad + base + z * slice_;
      if (in.size == 0 || count == 0) {
        fill(offset, rows * pitch_);
        continue;
      }
      fill(offset, in.begin * pitch_ + lead);
      copy_rows(b, zs.begin + z, {p0 + in.begin, in.size}, {q0 + lead, count},
                grad + in.begin * pitch_ + lead, offset + in.begin * pitch_ + lead);
      fill(offset + (in.begin + in.size) * pitch_, (rows - in.begin - in.size) * pitch_);
    }
  }

  static void fill(Offsets* offset, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store<Offsets>(Vector<Offsets>{} - 1, offset + i);
  }

  void copy_rows(const Band& b, int64_t z, Span p, Span q, T* grad, Offsets* offset) const {
    if (a_.offset == Offset::u8) return copy_rows<uint8_t>(b, z, p, q, grad, offset);
    if (a_.offset == Offset::i32) return copy_rows<int32_t>(b, z, p, q, grad, offset);
    // A window of one cell.
    for (int64_t i = 0; i < p.size; ++i)
      for (int64_t j = 0; j < q.size + (i + 1 < p.size ? pitch_ - q.size : kWidth); ++j)
        offset[i * pitch_ + j] = j < q.size ? 0 : -1;
    copy_grads(b, z, p, q, grad);
  }

  void copy_grads(const Band& b, int64_t z, Span p, Span q, T* grad) const {
    for (int64_t i = 0; i < p.size; ++i) {
      const Element* y = &naive::at<Element>(a_.y, b.n, b.c, z, p.begin + i, q.begin);
      for (int64_t j = 0; j < q.size; ++j) grad[i * pitch_ + j] = T(y[j * a_.y.w]);
      if (!a_.gate.data) continue;
      const Element* gate = &naive::at<Element>(a_.gate, b.n, b.c, z, p.begin + i, q.begin);
      for (int64_t j = 0; j < q.size; ++j)
        if (T(gate[j * a_.gate.w]) <= T(0)) grad[i * pitch_ + j] = T(0);
    }
  }

  template <class Stored>
  void copy_rows(const Band& b, int64_t z, Span p, Span q, T* grad, Offsets* offset) const {
    const int64_t filler = pitch_ - q.size;
    const auto* offsets = &naive::at<Stored>(a_.offsets, b.n, b.c, z, p.begin, q.begin);
    if (a_.y.w != 1 || a_.offsets.w != 1 || (a_.gate.data && a_.gate.w != 1)) {
      for (int64_t i = 0; i < p.size; ++i) {
        for (int64_t j = 0; j < q.size; ++j)
          offset[i * pitch_ + j] = static_cast<Offsets>(offsets[i * a_.offsets.h + j * a_.offsets.w]);
        fill(offset + i * pitch_ + q.size, filler);
      }
      return copy_grads(b, z, p, q, grad);
    }
    const auto* y = &naive::at<Element>(a_.y, b.n, b.c, z, p.begin, q.begin);
    const auto* gate = a_.gate.data ? &naive::at<Element>(a_.gate, b.n, b.c, z, p.begin, q.begin) : nullptr;
    // Reading past a row is fine inside the tensors.
    const int64_t reach = ceil_div(q.size, kWidth) * kWidth;
    const auto readable = [&](const auto* from, const View& v) {
      using Read = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
      const int64_t left = end_of<Read>(v, a_.N, a_.C, v_.out) - from;
      return left < reach ? 0 : v.h == 0 ? p.size : (left - reach) / v.h + 1;
    };
    int64_t whole = std::min({p.size, readable(y, a_.y), readable(offsets, a_.offsets)});
    if (gate) whole = std::min(whole, readable(gate, a_.gate));
    const auto copy = [&](auto gated) {
      stage_rows<T, Element, Stored, gated, true>(y, a_.y.h, gate, a_.gate.h, offsets, a_.offsets.h, whole,
                                                  q.size, pitch_, filler, grad, offset);
      stage_rows<T, Element, Stored, gated, false>(y + whole * a_.y.h, a_.y.h, gate + whole * a_.gate.h,
                                                   a_.gate.h, offsets + whole * a_.offsets.h, a_.offsets.h,
                                                   p.size - whole, q.size, pitch_, filler,
                                                   grad + whole * pitch_, offset + whole * pitch_);
    };
    gate ? copy(std::true_type{}) : copy(std::false_type{});
  }

  // Where column f of each stride of row g finds what it gets.
  int64_t sources(const Band& b, int64_t g, int64_t f, Source* out) const {
    const Span zs = depths(b);
    const int64_t fd = b.d % v_.stride.d;
    int64_t count = 0;
    for (int32_t i = td_.begin[fd]; i < td_.begin[fd + 1]; ++i) {
      const int64_t z = b.d / v_.stride.d + td_.shift[i] - zs.begin;
      if (z < 0 || z >= zs.size) continue;
      for (int32_t j = th_.begin[g]; j < th_.begin[g + 1]; ++j)
        for (int32_t k = tw_.begin[f]; k < tw_.begin[f + 1]; ++k)
          out[count++] = {z * slice_ + (th_.shift[j] - th_.least) * pitch_ + tw_.shift[k] - tw_.least,
                          (td_.tap[i] * v_.kernel.h + th_.tap[j]) * v_.kernel.w + tw_.tap[k]};
    }
    return count;
  }

  void gather(const Band& b, int64_t base, const Element* x_stop, Scratch& s) const {
    const Staged<T> staged{s.grad + base, s.offset + base};
    const int64_t h = b.h.begin * v_.stride.h, w = b.w.begin * v_.stride.w;
    const int64_t rows = std::min(a_.H - h, b.h.size * v_.stride.h),
                  cells = std::min(a_.W - w, b.w.size * v_.stride.w);
    Element* x = &naive::at_mut<Element>(a_.x, b.n, b.c, b.d, h, w);
    if (!vectors_) {
      Source* found = s.sources;
      for (int64_t g = 0; g < std::min(v_.stride.h, rows); ++g)
        for (int64_t f = 0; f < std::min(v_.stride.w, cells); ++f) {
          const int64_t count = sources(b, g, f, found);
          for (int64_t i = 0; i * v_.stride.h + g < rows; ++i) {
            for (int64_t j = 0; j < b.w.size; j += kWidth)
              store<T>(staged.sum(found, count, i * pitch_ + j), s.line + j);
            for (int64_t j = 0; j * v_.stride.w + f < cells; ++j)
              x[(i * v_.stride.h + g) * a_.x.h + (j * v_.stride.w + f) * a_.x.w] = Element(s.line[j]);
          }
        }
      return;
    }
    if (s.depth != b.d) {
      s.depth = b.d;
      Source* next = s.sources;
      for (int64_t g = 0; g < std::min(v_.stride.h, a_.H); ++g)
        for (int64_t f = 0; f < v_.stride.w; ++f) {
          s.phases[g].sources[f] = next;
          s.phases[g].count[f] = sources(b, g, f, next);
          next += s.phases[g].count[f];
        }
    }
    const Phase* phases = s.phases;
    const int64_t phase_count = v_.stride.h, vector = v_.stride.w * kWidth;
    const int64_t room = x_stop - x - ceil_div(cells, vector) * vector;
    int64_t whole = spills_ && room >= 0 ? rows : 0;
    while (whole > 0 && room < (whole - 1) * a_.x.h) --whole;
    if (v_.stride.w == 1) {
      gather_rows<T, Element, 1, true>(staged, pitch_, phases, phase_count, 0, whole, cells, x, a_.x.h);
      gather_rows<T, Element, 1, false>(staged, pitch_, phases, phase_count, whole, rows, cells, x, a_.x.h);
    } else {
      gather_rows<T, Element, 2, true>(staged, pitch_, phases, phase_count, 0, whole, cells, x, a_.x.h);
      gather_rows<T, Element, 2, false>(staged, pitch_, phases, phase_count, whole, rows, cells, x, a_.x.h);
    }
  }

  const PoolArgs& a_;
  const Window& v_;
  const Meetings td_, th_, tw_;
  Bands bands_;                   // in strides
  int64_t pitch_, slice_, slot_;  // staged elements of a row, a depth, a band
  int64_t slots_;
  bool vectors_;  // whether rows are written in vectors
  bool spills_;   // and the rows of all bands follow each other
};

// --- backward, channels

template <class Element, class Stored, bool gated>
void backward_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int kWidth = kLanes<T>;
  const Window& v = a.window;
  const Meetings td(v.kernel.d, v.stride.d, v.padding.d, v.dilation.d),
      th(v.kernel.h, v.stride.h, v.padding.h, v.dilation.h),
      tw(v.kernel.w, v.stride.w, v.padding.w, v.dilation.w);
  const auto* grads = static_cast<const Element*>(a.y.data);
  const auto* gates = static_cast<const Element*>(a.gate.data);
  const auto* offsets = static_cast<const Stored*>(a.offsets.data);
  // Few channels do not fill a vector: it reads on into the next pixel, inside the tensors.
  const Element *grads_end = end_of<Element>(a.y, a.N, a.C, v.out),
                *gates_end = end_of<Element>(a.gate, a.N, a.C, v.out);
  const Stored* offsets_end = end_of<Stored>(a.offsets, a.N, a.C, v.out);
  const double row_us = double(a.W * a.C) * kElementUs + 0.02;
  parallel_ranges(a.N * a.D * a.H, static_cast<int64_t>(10 / row_us), [&](int64_t from, int64_t to) {
    struct Source {  // a window over the pixel
      const Element *grad, *gate;
      const Stored* offset;
      Lane<T> number;
    };
    Shelf shelf;
    Source* sources = shelf.take<Source>(v.kernel.cells());
    for (int64_t row = from; row < to; ++row) {
      const int64_t h = row % a.H, d = row / a.H % a.D, n = row / (a.H * a.D);
      const int64_t fd = d % v.stride.d, fh = h % v.stride.h;
      for (int64_t w = 0, fw = 0, i_w = 0; w < a.W; ++w, ++fw) {
        if (fw == v.stride.w) fw = 0, ++i_w;
        Source* next = sources;
        bool inside = true;
        for (int32_t i = td.begin[fd]; i < td.begin[fd + 1]; ++i) {
          const int64_t z = d / v.stride.d + td.shift[i];
          if (z < 0 || z >= v.out.d) continue;
          for (int32_t j = th.begin[fh]; j < th.begin[fh + 1]; ++j) {
            const int64_t p = h / v.stride.h + th.shift[j];
            if (p < 0 || p >= v.out.h) continue;
            for (int32_t k = tw.begin[fw]; k < tw.begin[fw + 1]; ++k) {
              const int64_t q = i_w + tw.shift[k];
              if (q < 0 || q >= v.out.w) continue;
              *next = {grads + n * a.y.n + z * a.y.d + p * a.y.h + q * a.y.w,
                       gates + n * a.gate.n + z * a.gate.d + p * a.gate.h + q * a.gate.w,
                       offsets + n * a.offsets.n + z * a.offsets.d + p * a.offsets.h + q * a.offsets.w,
                       static_cast<Lane<T>>((td.tap[i] * v.kernel.h + th.tap[j]) * v.kernel.w + tw.tap[k])};
              inside = inside && grads_end - next->grad >= kWidth && offsets_end - next->offset >= kWidth &&
                       (!gated || gates_end - next->gate >= kWidth);
              ++next;
            }
          }
        }
        Element* x = &naive::at_mut<Element>(a.x, n, 0, d, h, w);
        each_vector<kWidth>(a.C, a.x.w == a.C ? (a.W - w) * a.C : a.C, [&](int64_t c, int64_t room) {
          const int64_t readable = inside ? kWidth : std::min<int64_t>(kWidth, a.C);
          Vector<T> total{};
          for (const Source* s = sources; s != next; ++s) {
            Vector<T> grad = load_some<T>(s->grad + c, readable);
            if constexpr (gated) grad = load_some<T>(s->gate + c, readable) <= T(0) ? Vector<T>{} : grad;
            total += load_some<Lane<T>>(s->offset + c, readable) == s->number ? grad : Vector<T>{};
          }
          store_some<T>(total, x + c, room);
        });
      }
    }
  });
}

// Nothing pools: x is y where the gate is open, element by element.
template <class Element>
void through_gate(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t kPiece = 4096;
  const int64_t total = a.N * a.C * a.D * a.H * a.W;
  const auto *y = static_cast<const Element*>(a.y.data), *gate = static_cast<const Element*>(a.gate.data);
  auto* x = static_cast<Element*>(a.x.data);
  parallel_for(ceil_div(total, kPiece), kPiece * kElementUs, [&](int64_t task) {
    const Span piece = part(task, kPiece, total);
    for (int64_t i = piece.begin; i < piece.begin + piece.size; i += kLanes<T>) {
      const int64_t rest = piece.begin + piece.size - i;
      const Vector<T> shut_at = load_some<T>(gate + i, rest);
      store_some<T>(shut_at <= T(0) ? Vector<T>{} : load_some<T>(y + i, rest), x + i, rest);
    }
  });
}

// Whether two tensors of x's size keep their elements in the same places.
bool same_places(const PoolArgs& a, const View& v, const View& u) {
  return (a.N == 1 || v.n == u.n) && (a.C == 1 || v.c == u.c) && (a.D == 1 || v.d == u.d) &&
         (a.H == 1 || v.h == u.h) && (a.W == 1 || v.w == u.w);
}

template <class Element>
void backward(const PoolArgs& a) {
  if (a.N * a.C * a.D * a.H * a.W == 0) return;
  const Element* x = static_cast<const Element*>(a.x.data);
  const Extent3 size{a.D, a.H, a.W};
  if (a.offset == Offset::none && a.gate.data && same_places(a, a.x, a.y) && same_places(a, a.x, a.gate) &&
      end_of<Element>(a.x, a.N, a.C, size) - x == a.N * a.C * size.cells())
    return through_gate<Element>(a);
  const bool channels = a.C > 1 && a.x.c == 1 && a.y.c == 1 && a.offset != Offset::none && a.offsets.c == 1 &&
                        (!a.gate.data || a.gate.c == 1);
  if (!channels || a.window.out.cells() == 0) return Backward<Element>(a).run();
  if (a.offset == Offset::u8)
    a.gate.data ? backward_channels<Element, uint8_t, true>(a)
                : backward_channels<Element, uint8_t, false>(a);
  else
    a.gate.data ? backward_channels<Element, int32_t, true>(a)
                : backward_channels<Element, int32_t, false>(a);
}

}  // namespace

void max_pool_backward_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)>>(a); });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
