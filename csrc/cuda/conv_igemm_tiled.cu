// SPDX-License-Identifier: MIT
// Convolution as implicit GEMM on plain arithmetic units, a group a batch entry; the loop is tile_gemm.cuh's.
// The im2col matrix exists only as the tile in shared memory.
//
//   pass    M                       N          K                       A                  B
//   fprop   batch * Z * P * Q       K/groups   C/groups * T * R * S    x, gathered        filter
//   dgrad   batch * D * H * W       C/groups   K/groups * T * R * S    grad_y, gathered   filter
//   wgrad   C/groups * T * R * S    K/groups   batch * Z * P * Q       x, gathered        grad_y
//
// Reads and writes every layout and stride in place. Sums in float32 (float64 for float64).
// Limits: what N lacks of the tile's width is wasted (grouped, depthwise); a strided dgrad multiplies zeros;
// zeros that pad meet the filter, so an infinite weight gives NaN there. The floor is the FMA rate.
// Idea: Chetlur et al., "cuDNN", arXiv:1410.0759, section 3; CUTLASS, "Implicit GEMM Convolution".
// Not yet run on a GPU.
#include "core/naive.h"
#include "cuda/bias_grad.h"
#include "cuda/tile_gemm.cuh"

namespace fastconv::cuda {

namespace {

// The table has seen to it that positions and offsets fit.
FASTCONV_HD int to_int(int64_t value) { return static_cast<int>(value); }

// A batch entry and position of a tensor; or a channel and position of a filter, which is a tap.
struct Cell {
  int n, d, h, w;
};

// The i-th of [n, d, h, w].
FASTCONV_HD Cell cell_at(int i, int64_t d, int64_t h, int64_t w) {
  const int D = to_int(d), H = to_int(h), W = to_int(w);
  Cell cell;
  cell.w = i % W, i /= W;
  cell.h = i % H, i /= H;
  cell.d = i % D;
  cell.n = i / D;
  return cell;
}

FASTCONV_HD int position_offset(const Cell& cell, const View& v) {
  return cell.d * to_int(v.d) + cell.h * to_int(v.h) + cell.w * to_int(v.w);
}
FASTCONV_HD int batch_offset(const Cell& cell, const View& v) {
  return cell.n * to_int(v.n) + position_offset(cell, v);
}
FASTCONV_HD int channel_offset(const Cell& cell, const View& v) {
  return cell.n * to_int(v.c) + position_offset(cell, v);
}

// How the taps of `channels` filter planes are numbered: the channel fastest where it is contiguous in the
// gathered tensor.
struct TapOrder {
  int channels;
  bool channel_fastest;

  FASTCONV_HD Cell at(int i, const ConvShape& s) const {
    if (!channel_fastest) return cell_at(i, s.T, s.R, s.S);
    Cell tap = cell_at(i / channels, s.T, s.R, s.S);
    tap.n = i % channels;
    return tap;
  }
};

// One end of a gather: a pixel's place and a tap's together give an element of the gathered tensor.
struct alignas(16) Place {
  int offset, d, h, w;
};

FASTCONV_HD bool inside(int at, int64_t extent) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(extent);
}

// x at an output pixel and a filter tap.
template <class Element>
struct InputGather {
  using Line = Place;
  using Step = Place;

  View x;
  ConvShape s;
  TapOrder taps;
  bool along_k;

  FASTCONV_HD Place pixel(int i) const {
    Cell o = cell_at(i, s.Z, s.P, s.Q);
    o.d = o.d * to_int(s.stride.d) - to_int(s.padding.d);
    o.h = o.h * to_int(s.stride.h) - to_int(s.padding.h);
    o.w = o.w * to_int(s.stride.w) - to_int(s.padding.w);
    return {batch_offset(o, x), o.d, o.h, o.w};
  }
  FASTCONV_HD Place tap(int i) const {
    Cell f = taps.at(i, s);
    f.d *= to_int(s.dilation.d), f.h *= to_int(s.dilation.h), f.w *= to_int(s.dilation.w);
    return {channel_offset(f, x), f.d, f.h, f.w};
  }
  FASTCONV_HD Place in_group(int group, Place place) const {
    place.offset += group * to_int(s.group_c() * x.c);
    return place;
  }
  FASTCONV_HD typename Compute<Element>::type load(const Place& a, const Place& b) const {
    if (!inside(a.d + b.d, s.D) || !inside(a.h + b.h, s.H) || !inside(a.w + b.w, s.W)) return 0;
    return static_cast<const Element*>(x.data)[a.offset + b.offset];
  }
};

// An operand whose elements lie at a line's offset plus a step's.
template <class Element>
struct Plain {
  using Line = int;
  using Step = int;

  View view;
  ConvShape s;
  TapOrder taps;
  bool along_k;

  FASTCONV_HD typename Compute<Element>::type load(int line, int step) const {
    return static_cast<const Element*>(view.data)[line + step];
  }
};

template <class Element>
struct Fprop {
  using Sum = typename Compute<Element>::type;

  struct A : InputGather<Element> {
    FASTCONV_HD Place line(int group, int m) const { return this->in_group(group, this->pixel(m)); }
    FASTCONV_HD Place step(int k) const { return this->tap(k); }
  };

  struct B : Plain<Element> {
    FASTCONV_HD int line(int group, int n) const {
      return (group * to_int(this->s.group_k()) + n) * to_int(this->view.n);
    }
    FASTCONV_HD int step(int k) const { return channel_offset(this->taps.at(k, this->s), this->view); }
  };

  A a;
  B b;
  View y;
  Epilogue epilogue;

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const ConvShape& s = a.s;
    const Cell o = cell_at(m, s.Z, s.P, s.Q);
    const int64_t k = group * s.group_k() + n;
    const View& residual = epilogue.residual;
    if (epilogue.bias) sum += static_cast<const Element*>(epilogue.bias)[k];
    if (residual.data)
      sum += static_cast<const Element*>(residual.data)[batch_offset(o, residual) + k * residual.c];
    static_cast<Element*>(y.data)[batch_offset(o, y) + k * y.c] =
        narrow<Element>(naive::activate(sum, epilogue.act));
  }
};

template <class Element>
struct Dgrad {
  using Sum = typename Compute<Element>::type;

  // grad_y where an input pixel meets a filter tap.
  struct A {
    using Line = Place;
    using Step = Place;

    View y;
    ConvShape s;
    TapOrder taps;
    bool along_k;

    FASTCONV_HD Place line(int group, int m) const {
      const Cell i = cell_at(m, s.D, s.H, s.W);
      return {i.n * to_int(y.n) + group * to_int(s.group_k() * y.c), i.d + to_int(s.padding.d),
              i.h + to_int(s.padding.h), i.w + to_int(s.padding.w)};
    }
    FASTCONV_HD Place step(int k) const {
      const Cell f = taps.at(k, s);
      return {f.n * to_int(y.c), f.d * to_int(s.dilation.d), f.h * to_int(s.dilation.h),
              f.w * to_int(s.dilation.w)};
    }
    // Divides by the stride; false where no output position lies there.
    FASTCONV_HD static bool divide(int& at, int64_t stride, int64_t out) {
      const int by = to_int(stride), whole = by == 1 ? at : at / by;
      const bool exact = whole * by == at;
      at = whole;
      return exact && inside(whole, out);
    }
    FASTCONV_HD Sum load(const Place& pixel, const Place& tap) const {
      Cell o{0, pixel.d - tap.d, pixel.h - tap.h, pixel.w - tap.w};
      if (!divide(o.d, s.stride.d, s.Z) || !divide(o.h, s.stride.h, s.P) || !divide(o.w, s.stride.w, s.Q))
        return 0;
      return static_cast<const Element*>(y.data)[pixel.offset + tap.offset + position_offset(o, y)];
    }
  };

  struct B : Plain<Element> {
    FASTCONV_HD int line(int group, int n) const {
      return group * to_int(this->s.group_k() * this->view.n) + n * to_int(this->view.c);
    }
    FASTCONV_HD int step(int k) const { return batch_offset(this->taps.at(k, this->s), this->view); }
  };

  A a;
  B b;
  View x;

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const ConvShape& s = a.s;
    const int64_t c = group * s.group_c() + n;
    static_cast<Element*>(x.data)[batch_offset(cell_at(m, s.D, s.H, s.W), x) + c * x.c] =
        narrow<Element>(sum);
  }
};

template <class Element>
struct Wgrad {
  using Sum = typename Compute<Element>::type;

  struct A : InputGather<Element> {
    FASTCONV_HD Place line(int group, int m) const { return this->in_group(group, this->tap(m)); }
    FASTCONV_HD Place step(int k) const { return this->pixel(k); }
  };

  struct B : Plain<Element> {
    FASTCONV_HD int line(int group, int n) const {
      return (group * to_int(this->s.group_k()) + n) * to_int(this->view.c);
    }
    FASTCONV_HD int step(int k) const {
      return batch_offset(cell_at(k, this->s.Z, this->s.P, this->s.Q), this->view);
    }
  };

  A a;
  B b;
  View w;

  FASTCONV_HD void write(int group, int m, int n, Sum sum) const {
    const int64_t k = group * a.s.group_k() + n;
    static_cast<Element*>(w.data)[channel_offset(a.taps.at(m, a.s), w) + k * w.n] = narrow<Element>(sum);
  }
};

}  // namespace

template <class Tile>
void conv_fprop_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  const bool channels_last = a.layout == Layout::channels_last;
  const TapOrder taps{static_cast<int>(s.group_c()), channels_last};
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Fprop<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{{{a.x, s, taps, channels_last}}, {{a.w, s, taps, true}}, a.y, a.epilogue};
    tile_gemm<Tile>(gemm, conv_fprop_gemm(a), workspace, stream);
  });
}

template <class Tile>
void conv_dgrad_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  const bool channels_last = a.layout == Layout::channels_last;
  const TapOrder taps{static_cast<int>(s.group_k()), channels_last};
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Dgrad<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{{a.y, s, taps, channels_last}, {{a.w, s, taps, a.w.c != 1}}, a.x};
    tile_gemm<Tile>(gemm, conv_dgrad_gemm(a), workspace, stream);
  });
}

template <class Tile>
void conv_wgrad_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  const ConvShape& s = a.shape;
  const bool channels_last = a.layout == Layout::channels_last;
  const TapOrder taps{static_cast<int>(s.group_c()), channels_last};
  with_dtype(a.dtype, [&](auto* t) {
    using Gemm = Wgrad<std::remove_pointer_t<decltype(t)>>;
    const Gemm gemm{{{a.x, s, taps, !channels_last}}, {{a.y, s, taps, !channels_last}}, a.w};
    tile_gemm<Tile>(gemm, conv_wgrad_gemm(a), workspace, stream);
  });
  conv_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                           \
  template void conv_fprop_igemm_tiled<Tile>(const ConvArgs&, void*, void*); \
  template void conv_dgrad_igemm_tiled<Tile>(const ConvArgs&, void*, void*); \
  template void conv_wgrad_igemm_tiled<Tile>(const ConvArgs&, void*, void*);
FASTCONV_INSTANTIATE(Tile64x64)
FASTCONV_INSTANTIATE(Tile64x16)
#undef FASTCONV_INSTANTIATE

}  // namespace fastconv::cuda
