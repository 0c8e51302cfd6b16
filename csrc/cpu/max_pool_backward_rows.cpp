// SPDX-License-Identifier: MIT
// Max-pool, backward: every input cell is written once, with the sum of what the windows over it send, in the
// windows' order.
//
//   tiles     (common windows) The cells under a vector of outputs, of neighbouring columns or channels, in
//             registers: each window that reaches them is compared with its cell, then they are stored.
//   rows      (any strides and windows) The gradients and offsets of a band of one plane go through
//             scratch that stays in the first cache, and from there to each input row.
//   channels  (channels_last) The channels of a pixel in the lanes, the windows over it in turn.
//
// What a row's last vector spills, the rows after it overwrite. Limits: windows of plan.h. Of the floor, y
// and offsets read, x written once, an AVX-512 core does 15-33 GB/s (3x3/1: 9), a copy 16 to 70 (in cache).
#ifndef FASTCONV_ISA

#include "core/naive.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/max_pool_backward_rows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"
#include "cpu/pool_rows.inl"

namespace {

// --- rows

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

// --- tiles

// The sums of the Stride x Stride cells under each lane's output. window(i, j, grad, cell) fetches the
// gradients of the windows i rows below and j columns after, and the cells that get them; false: there are
// none.
template <class T, class Tile, class Window>
[[gnu::always_inline]] inline void sum_tile(Vector<T> (&sum)[Tile::kStride][Tile::kStride],
                                            const Window& window) {
  constexpr int K = Tile::kKernel, S = Tile::kStride, P = Tile::kPadding;
#pragma GCC unroll 3
  for (int i = -Tile::kBefore; i <= Tile::kAfter; ++i)
#pragma GCC unroll 3
    for (int j = -Tile::kBefore; j <= Tile::kAfter; ++j) {
      Vector<T> grad;
      Vector<Lane<T>> cell;
      if (!window(i, j, grad, cell)) continue;
#pragma GCC unroll 2
      for (int f = 0; f < S; ++f)
#pragma GCC unroll 2
        for (int g = 0; g < S; ++g) {
          const int r = f + P - i * S, s = g + P - j * S;
          if (r < 0 || r >= K || s < 0 || s >= K) continue;
          const Vector<T> part = cell == Lane<T>(r * K + s) ? grad : Vector<T>{};
          sum[f][g] = K == S ? part : sum[f][g] + part;
        }
    }
}

template <class T, bool gated, class Element>
[[gnu::always_inline]] inline void fetch(const Element* y, const Element* gate, const uint8_t* offsets,
                                         int64_t begin, int64_t end, Vector<T>& grad, Vector<Lane<T>>& cell) {
  grad = load_part<T>(y, begin, end);
  if constexpr (gated) grad = load_part<T>(gate, begin, end) <= T(0) ? Vector<T>{} : grad;
  cell = load_part<Lane<T>>(offsets, begin, end);
}

// Columns of outputs in the lanes.
template <class Element, class Tile, bool gated>
void tile_rows(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int S = Tile::kStride, lanes = kLanes<T>;
  const int64_t H = a.H, W = a.W, P = a.window.out.h, Q = a.window.out.w;
  const int64_t x_row = a.x.h, y_row = a.y.h, gate_row = a.gate.h, offset_row = a.offsets.h;
  const int64_t groups = ceil_div(H, S), columns = ceil_div(W, S);
  const double group_us = double(S * W) * kElementUs + 0.01;
  parallel_ranges(
      a.N * a.C * groups, static_cast<int64_t>(10 / group_us), [=, &a](int64_t begin, int64_t end) {
        for (int64_t next; begin < end; begin = next) {
          const int64_t plane = begin / groups, n = plane / a.C, c = plane % a.C, first = plane * groups;
          next = std::min(end, first + groups);
          const Element* y = &naive::at<Element>(a.y, n, c, 0, 0, 0);
          const Element* gate = gated ? &naive::at<Element>(a.gate, n, c, 0, 0, 0) : nullptr;
          const uint8_t* offsets = &naive::at<uint8_t>(a.offsets, n, c, 0, 0, 0);
          Element* x = &naive::at_mut<Element>(a.x, n, c, 0, 0, 0);
          for (int64_t p = begin - first; p < next - first; ++p)
            for (int64_t q = 0; q < columns; q += lanes) {
              Vector<T> sum[S][S] = {};
              const auto window = [&](auto whole, int i, int j, Vector<T>& grad,
                                      Vector<Lane<T>>& cell) [[gnu::always_inline]] {
                if (p + i < 0 || p + i >= P) return false;
                const int64_t from = whole ? 0 : -(q + j), to = whole ? lanes : Q - (q + j);
                fetch<T, gated>(y + (p + i) * y_row + q + j, gate + (p + i) * gate_row + q + j,
                                offsets + (p + i) * offset_row + q + j, from, to, grad, cell);
                return true;
              };
              if (q >= Tile::kBefore && q + lanes + Tile::kAfter <= Q) {
                sum_tile<T, Tile>(sum, [&](auto&... each) { return window(std::true_type{}, each...); });
              } else {
                sum_tile<T, Tile>(sum, [&](auto&... each) { return window(std::false_type{}, each...); });
              }
#pragma GCC unroll 2
              for (int f = 0; f < S; ++f) {
                if (p * S + f >= H) break;
                Element* to = x + (p * S + f) * x_row + q * S;
                const int64_t room = W - q * S;
                if constexpr (S == 1) {
                  store_lanes<T>(sum[f][0], to, room);
                } else {
                  store_lanes<T>(interleave<T, false>(sum[f][0], sum[f][1]), to, room);
                  if (room > lanes)
                    store_lanes<T>(interleave<T, true>(sum[f][0], sum[f][1]), to + lanes, room - lanes);
                }
              }
            }
        }
      });
}

// Channels of one output in the lanes.
template <class Element, class Tile, bool gated>
void tile_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int S = Tile::kStride, lanes = kLanes<T>;
  const View x_view = a.x, y_view = a.y, gate_view = a.gate, offset_view = a.offsets;
  const int64_t C = a.C, H = a.H, W = a.W, P = a.window.out.h, Q = a.window.out.w;
  const int64_t groups = ceil_div(H, S), columns = ceil_div(W, S);
  const double group_us = double(S * W * C) * kElementUs + 0.02;
  parallel_ranges(a.N * groups, static_cast<int64_t>(10 / group_us), [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t n = group / groups, p = group % groups;
      for (int64_t q = 0; q < columns; ++q) {
        const Element* y = &naive::at<Element>(y_view, n, 0, 0, p, q);
        const Element* gate = gated ? &naive::at<Element>(gate_view, n, 0, 0, p, q) : nullptr;
        const uint8_t* offsets = &naive::at<uint8_t>(offset_view, n, 0, 0, p, q);
        Element* x = &naive::at_mut<Element>(x_view, n, 0, 0, p * S, q * S);
        for (int64_t next = 0; next < C; next += lanes) {
          const int64_t c = std::clamp<int64_t>(C - lanes, 0, next);
          Vector<T> sum[S][S] = {};
          sum_tile<T, Tile>(sum, [&](int i, int j, Vector<T>& grad,
                                     Vector<Lane<T>>& cell) [[gnu::always_inline]] {
            if (p + i < 0 || p + i >= P || q + j < 0 || q + j >= Q) return false;
            fetch<T, gated>(y + i * y_view.h + j * y_view.w + c, gate + i * gate_view.h + j * gate_view.w + c,
                            offsets + i * offset_view.h + j * offset_view.w + c, 0, C - c, grad, cell);
            return true;
          });
#pragma GCC unroll 2
          for (int f = 0; f < S; ++f)
#pragma GCC unroll 2
            for (int g = 0; g < S; ++g)
              if (p * S + f < H && q * S + g < W)
                store_lanes<T>(sum[f][g], x + f * x_view.h + g * x_view.w + c, C - c);
        }
      }
    }
  });
}

// --- channels

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
  const bool done = with_tile(a, channels, [&](auto tile) {
    using Tile = decltype(tile);
    if (channels)
      return a.gate.data ? tile_channels<Element, Tile, true>(a) : tile_channels<Element, Tile, false>(a);
    a.gate.data ? tile_rows<Element, Tile, true>(a) : tile_rows<Element, Tile, false>(a);
  });
  if (done) return;
  if (!channels) return Backward<Element>(a).run();
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
