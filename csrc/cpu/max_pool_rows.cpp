// SPDX-License-Identifier: MIT
// Max-pool, forward, a few instructions a vector from a copy.
//
//   tiles     (NCHW, common windows) The windows of a vector of outputs in registers.
//   rows      (any strides and windows) A band of one plane at a time, through scratch that stays in the
//             first cache: each input row is reduced along the width, once, then the reduced rows
//             along height and depth; there the rows follow each other without gaps, so that narrow
//             planes fill the lanes.
//   channels  (channels_last) The channels of a pixel in the lanes, the cells of its window in turn.
//
// What a row's last vector spills, the rows after it overwrite. Limits: windows of plan.h. Of the floor, x
// read, y and offsets written once, an AVX-512 core does 12-24 GB/s (3x3/1: 6), a copy 16 to 70 (in cache).
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

#include "cpu/pool_rows.inl"

namespace {

// --- rows

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

// --- tiles

// Lanes [begin, end) of the vector that would lie at `from`; the others are -inf.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_inside(const Element* from, int64_t begin, int64_t end) {
  if (begin <= 0 && end >= kLanes<T>) return load<T>(from);
  Lane<T> numbers[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = i;
  const Vector<Lane<T>> lane = load<Lane<T>>(numbers);
  const auto bound = [](int64_t i) { return static_cast<Lane<T>>(std::clamp<int64_t>(i, 0, kLanes<T>)); };
  const Vector<T> lowest = Vector<T>{} - std::numeric_limits<T>::infinity();
  return (lane >= bound(begin)) & (lane < bound(end)) ? load_part<T>(from, begin, end) : lowest;
}

template <class Element, bool with_offsets, class Tile>
void forward_tiles(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int K = Tile::kKernel, S = Tile::kStride, P = Tile::kPadding, lanes = kLanes<T>;
  const int64_t H = a.H, W = a.W, Q = a.window.out.w, rows = a.window.out.h;
  const int64_t x_row = a.x.h, y_row = a.y.h, offset_row = a.offsets.h;
  const double row_us = double(S * W) * kElementUs + 0.01;
  parallel_ranges(a.N * a.C * rows, static_cast<int64_t>(10 / row_us), [=, &a](int64_t begin, int64_t end) {
    for (int64_t next; begin < end; begin = next) {
      const int64_t plane = begin / rows, n = plane / a.C, c = plane % a.C, first = plane * rows;
      next = std::min(end, first + rows);
      const Element* x = &naive::at<Element>(a.x, n, c, 0, 0, 0);
      Element* y = &naive::at_mut<Element>(a.y, n, c, 0, 0, 0);
      uint8_t* offsets = with_offsets ? &naive::at_mut<uint8_t>(a.offsets, n, c, 0, 0, 0) : nullptr;
      for (int64_t p = begin - first; p < next - first; ++p) {
        const int64_t h = p * S - P;
        for (int64_t q = 0; q < Q; q += lanes) {
          Vector<T> best = Vector<T>{} - std::numeric_limits<T>::infinity();
          Vector<Lane<T>> offset = Vector<Lane<T>>{} + Lane<T>(h < 0 ? -h * K : 0);
          if (q == 0) offset[0] += P;  // the first cell inside the input
#pragma GCC unroll 3
          for (int r = 0; r < K; ++r) {
            if (h + r < 0 || h + r >= H) continue;
            const Element* cells = x + (h + r) * x_row;
            const auto look = [&](Vector<T> value, int s) [[gnu::always_inline]] {
              take<T, with_offsets>(value, Vector<Lane<T>>{} + Lane<T>(r * K + s), best, offset);
            };
#pragma GCC unroll 3
            for (int s = 0; s < K; s += S) {
              const int64_t w = q * S - P + s;
              const Vector<T> low = load_inside<T>(cells + w, -w, W - w);
              if constexpr (S == 1) {
                look(low, s);
              } else {
                const Vector<T> high = load_inside<T>(cells + w + lanes, 0, W - w - lanes);
                look(alternate<T, false>(low, high), s);
                if (s + 1 < K) look(alternate<T, true>(low, high), s + 1);
              }
            }
          }
          store_lanes<T>(best, y + p * y_row + q, Q - q);
          if constexpr (with_offsets) store_lanes<Lane<T>>(offset, offsets + p * offset_row + q, Q - q);
        }
      }
    }
  });
}

// --- channels

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
  const bool done =
      with_tile(a, false, [&](auto tile) { forward_tiles<Element, with_offsets, decltype(tile)>(a); });
  if (!done) Forward<Element, with_offsets>(a).run();
}

}  // namespace

void max_pool_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    a.offset == Offset::none ? forward<Element, false>(a) : forward<Element, true>(a);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
