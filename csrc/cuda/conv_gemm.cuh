// SPDX-License-Identifier: MIT
// Convolution as implicit GEMM, a group a batch entry: the operands of a GEMM kernel (gemm.cuh). The im2col
// matrix exists only as that kernel's tile in shared memory.
//
//   pass    M                       N          K                       A                  B
//   fprop   batch * Z * P * Q       K/groups   C/groups * T * R * S    x, gathered        filter
//   dgrad   batch * D * H * W       C/groups   K/groups * T * R * S    grad_y, gathered   filter
//   wgrad   C/groups * T * R * S    K/groups   batch * Z * P * Q       x, gathered        grad_y
//
// A dgrad with a stride is one for each of its phases (plan.h), since an input meets only some of the taps.
//
// Reads and writes every layout and stride in place. A line and a step are places that were worked out once;
// an element costs their sum and the comparisons with the edges.
// Idea: Chetlur et al., "cuDNN", arXiv:1410.0759, section 3; CUTLASS, "Implicit GEMM Convolution".
#pragma once

#include "core/naive.h"
#include "cuda/divisor.h"
#include "cuda/gemm.cuh"

namespace fastconv::cuda {

// The table has seen to it that positions and offsets fit.
FASTCONV_HD inline int to_int(int64_t value) { return static_cast<int>(value); }

// A batch entry and position of a tensor; or a channel and position of a filter, which is a tap.
struct Cell {
  int n, d, h, w;
};

// Numbers the cells of [n, d, h, w].
struct CellOrder {
  Divisor d, h, w;

  CellOrder(int64_t d, int64_t h, int64_t w) : d(d), h(h), w(w) {}

  FASTCONV_HD Cell at(int i) const {
    Cell cell;
    cell.w = w.pop(i), cell.h = h.pop(i), cell.d = d.pop(i);
    cell.n = i;
    return cell;
  }
};

FASTCONV_HD inline int position_offset(const Cell& cell, const View& v) {
  return cell.d * to_int(v.d) + cell.h * to_int(v.h) + cell.w * to_int(v.w);
}
FASTCONV_HD inline int batch_offset(const Cell& cell, const View& v) {
  return cell.n * to_int(v.n) + position_offset(cell, v);
}
FASTCONV_HD inline int channel_offset(const Cell& cell, const View& v) {
  return cell.n * to_int(v.c) + position_offset(cell, v);
}

// Numbers the taps of `channels` filter planes: the channel fastest where it is contiguous in the gathered
// tensor.
struct TapOrder {
  CellOrder cells;
  Divisor channels;
  bool channel_fastest;

  TapOrder(const ConvShape& s, int64_t channels, bool channel_fastest)
      : cells(s.T, s.R, s.S), channels(channels), channel_fastest(channel_fastest) {}

  FASTCONV_HD Cell at(int i) const {
    if (!channel_fastest) return cells.at(i);
    const int channel = channels.pop(i);
    Cell tap = cells.at(i);
    tap.n = channel;
    return tap;
  }
};

// One end of a gather: a pixel's place and a tap's together give an element of the gathered tensor.
struct alignas(16) Place {
  int offset, d, h, w;
};

FASTCONV_HD inline bool inside(int at, int64_t extent) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(extent);
}

// x at an output pixel and a filter tap.
template <class Element>
struct InputGather {
  using Line = Place;
  using Step = Place;
  static constexpr int kAtOnce = 4;

  View x;
  ConvShape s;
  CellOrder pixels;
  TapOrder taps;
  Access access;

  InputGather(const ConvArgs& a, const Access& access)
      : x(a.x),
        s(a.shape),
        pixels(s.Z, s.P, s.Q),
        taps(s, s.group_c(), a.layout == Layout::channels_last),
        access(access) {}

  FASTCONV_HD bool along_k(bool) const { return access.along_k; }
  FASTCONV_HD Place pixel(int i) const {
    Cell o = pixels.at(i);
    o.d = o.d * to_int(s.stride.d) - to_int(s.padding.d);
    o.h = o.h * to_int(s.stride.h) - to_int(s.padding.h);
    o.w = o.w * to_int(s.stride.w) - to_int(s.padding.w);
    return {batch_offset(o, x), o.d, o.h, o.w};
  }
  FASTCONV_HD Place tap(int i) const {
    Cell f = taps.at(i);
    f.d *= to_int(s.dilation.d), f.h *= to_int(s.dilation.h), f.w *= to_int(s.dilation.w);
    return {channel_offset(f, x), f.d, f.h, f.w};
  }
  FASTCONV_HD Place in_group(int group, Place place) const {
    place.offset += group * to_int(s.group_c() * x.c);
    return place;
  }
  FASTCONV_HD const Element* find(const Place& a, const Place& b) const {
    const bool is_there = inside(a.d + b.d, s.D) && inside(a.h + b.h, s.H) && inside(a.w + b.w, s.W);
    return is_there ? static_cast<const Element*>(x.data) + (a.offset + b.offset) : nullptr;
  }
};

// An operand whose elements lie at a line's offset plus a step's.
template <class Element>
struct Plain {
  using Line = int;
  using Step = int;
  static constexpr int kAtOnce = 4;

  View view;
  ConvShape s;
  TapOrder taps;
  Access access;

  Plain(const ConvArgs& a, const View& view, int64_t channels, const Access& access)
      : view(view), s(a.shape), taps(s, channels, a.layout == Layout::channels_last), access(access) {}

  FASTCONV_HD bool along_k(bool) const { return access.along_k; }
  FASTCONV_HD const Element* find(int line, int step) const {
    return static_cast<const Element*>(view.data) + (line + step);
  }
};

template <class T>
struct Fprop {
  using Element = T;
  using Sum = typename Compute<Element>::type;

  struct A : InputGather<Element> {
    using InputGather<Element>::InputGather;
    FASTCONV_HD Place line(int group, int m) const { return this->in_group(group, this->pixel(m)); }
    FASTCONV_HD Place step(int k) const { return this->tap(k); }
  };

  struct B : Plain<Element> {
    using Plain<Element>::Plain;
    FASTCONV_HD bool along_k(bool) const { return true; }
    FASTCONV_HD int line(int group, int n) const {
      return (group * to_int(this->s.group_k()) + n) * to_int(this->view.n);
    }
    FASTCONV_HD int step(int k) const { return channel_offset(this->taps.at(k), this->view); }
  };

  A a;
  B b;
  View y;
  Epilogue epilogue;

  explicit Fprop(const ConvArgs& args)
      : a(args, conv_fprop_access(args).a),
        b(args, args.w, args.shape.group_c(), conv_fprop_access(args).b),
        y(args.y),
        epilogue(args.epilogue) {}

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const Cell o = a.pixels.at(m);
    const int64_t k = group * a.s.group_k() + n;
    const View& residual = epilogue.residual;
    if (epilogue.bias) sum += static_cast<const Element*>(epilogue.bias)[k];
    if (residual.data)
      sum += static_cast<const Element*>(residual.data)[batch_offset(o, residual) + k * residual.c];
    static_cast<Element*>(y.data)[batch_offset(o, y) + k * y.c] =
        narrow<Element>(naive::activate(sum, epilogue.act));
  }
};

template <class T>
struct Dgrad {
  using Element = T;
  using Sum = typename Compute<Element>::type;

  // grad_y where an input pixel meets a filter tap; the stride is 1.
  struct A {
    using Line = Place;
    using Step = Place;
    static constexpr int kAtOnce = 1;

    View y;
    ConvShape s;
    CellOrder pixels;
    TapOrder taps;
    Access access;

    A(const ConvArgs& a, const Access& access)
        : y(a.y),
          s(a.shape),
          pixels(s.D, s.H, s.W),
          taps(s, s.group_k(), a.layout == Layout::channels_last),
          access(access) {}

    FASTCONV_HD bool along_k(bool) const { return access.along_k; }
    FASTCONV_HD Place line(int group, int m) const {
      const Cell i = pixels.at(m);
      return {i.n * to_int(y.n) + group * to_int(s.group_k() * y.c), i.d + to_int(s.padding.d),
              i.h + to_int(s.padding.h), i.w + to_int(s.padding.w)};
    }
    FASTCONV_HD Place step(int k) const {
      const Cell f = taps.at(k);
      return {f.n * to_int(y.c), f.d * to_int(s.dilation.d), f.h * to_int(s.dilation.h),
              f.w * to_int(s.dilation.w)};
    }
    FASTCONV_HD const Element* find(const Place& pixel, const Place& tap) const {
      const Cell o{0, pixel.d - tap.d, pixel.h - tap.h, pixel.w - tap.w};
      if (!inside(o.d, s.Z) || !inside(o.h, s.P) || !inside(o.w, s.Q)) return nullptr;
      return static_cast<const Element*>(y.data) + (pixel.offset + tap.offset + position_offset(o, y));
    }
  };

  struct B : Plain<Element> {
    using Plain<Element>::Plain;
    static constexpr int kAtOnce = 1;

    FASTCONV_HD bool along_k(bool in_runs) const { return !in_runs && this->access.along_k; }
    FASTCONV_HD int line(int group, int n) const {
      return group * to_int(this->s.group_k() * this->view.n) + n * to_int(this->view.c);
    }
    FASTCONV_HD int step(int k) const { return batch_offset(this->taps.at(k), this->view); }
  };

  A a;
  B b;
  View x;

  explicit Dgrad(const ConvArgs& args)
      : a(args, conv_dgrad_access(args).a),
        b(args, args.w, args.shape.group_k(), conv_dgrad_access(args).b),
        x(args.x) {}

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const int64_t c = group * a.s.group_c() + n;
    static_cast<Element*>(x.data)[batch_offset(a.pixels.at(m), x) + c * x.c] = narrow<Element>(sum);
  }
};

template <class T>
struct Wgrad {
  using Element = T;
  using Sum = typename Compute<Element>::type;

  struct A : InputGather<Element> {
    using InputGather<Element>::InputGather;
    FASTCONV_HD Place line(int group, int m) const { return this->in_group(group, this->tap(m)); }
    FASTCONV_HD Place step(int k) const { return this->pixel(k); }
  };

  struct B : Plain<Element> {
    CellOrder pixels;

    B(const ConvArgs& a, const Access& access)
        : Plain<Element>(a, a.y, a.shape.group_c(), access), pixels(a.shape.Z, a.shape.P, a.shape.Q) {}

    FASTCONV_HD int line(int group, int n) const {
      return (group * to_int(this->s.group_k()) + n) * to_int(this->view.c);
    }
    FASTCONV_HD int step(int k) const { return batch_offset(pixels.at(k), this->view); }
  };

  A a;
  B b;
  View w;

  explicit Wgrad(const ConvArgs& args)
      : a(args, conv_wgrad_access(args).a), b(args, conv_wgrad_access(args).b), w(args.w) {}

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const int64_t k = group * a.s.group_k() + n;
    static_cast<Element*>(w.data)[channel_offset(a.taps.at(m), w) + k * w.n] = narrow<Element>(sum);
  }
};

}  // namespace fastconv::cuda
