// SPDX-License-Identifier: MIT
// Depthwise convolution (one input channel a group), a stretch at a time and without a
// GEMM, which would have one row.
//
//   contiguous     a stretch is an output row: one pass over it for each filter tap, the tap's weight in
//   every lane channels_last  a stretch is the channels of one pixel: one pass for each tap, weights
//   transposed to [tap, C] first
//
// wgrad sums a row, or one output row's pixels, in lanes, and adds the sums in double in a fixed order.
// Limits: widths and channel counts are cut into stretches of kStretch; wgrad in channels_last shares out
// channels only. The floor is reading x and writing y once: a 3x3 filter has 9 multiply-adds for 8 bytes.
#ifndef FASTCONV_ISA

#include <algorithm>

#include "core/naive.h"
#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

#define FASTCONV_FILE "cpu/conv_depthwise.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {
namespace {

// sum[i] += weight(i) * cells[i * step], count times.
template <class T, class Element, class Weight>
void accumulate(T* sum, int64_t count, const Element* cells, int64_t step, const Weight& weight) {
  const auto pass = [&](auto distance) {
    for (int64_t i = 0; i < count; ++i) sum[i] += weight(i) * T(cells[i * distance]);
  };
  if (step == 1) return pass(std::integral_constant<int64_t, 1>{});
  if (step == 2) return pass(std::integral_constant<int64_t, 2>{});
  pass(step);
}

// The outputs [begin, end) of `count` from `first` whose cells at tap `s` lie inside the width.
struct Range {
  int64_t begin, end;
};

inline Range inside(int64_t first, int64_t count, int64_t tap, int64_t stride, int64_t padding,
                    int64_t dilation, int64_t size) {
  const int64_t start = first * stride - padding + tap * dilation;
  const int64_t begin = start < 0 ? (-start + stride - 1) / stride : 0;
  const int64_t end = start < size ? (size - start + stride - 1) / stride : 0;
  return {std::min(begin, count), std::min(end, count)};
}

// Calls f(tap, d, h) for the taps along depth and height that output (z, p) reads inside the
// input, `tap` that of column 0.
template <class F>
void tap_rows(const ConvShape& s, int64_t z, int64_t p, const F& f) {
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t d = z * s.stride.d - s.padding.d + t * s.dilation.d;
      const int64_t h = p * s.stride.h - s.padding.h + r * s.dilation.h;
      if (d >= 0 && d < s.D && h >= 0 && h < s.H) f((t * s.R + r) * s.S, d, h);
    }
}

template <class Element>
const Element* filter_of(const ConvArgs& a, int64_t k, int64_t tap) {
  const ConvShape& s = a.shape;
  return &naive::at<Element>(a.w, k, 0, tap / (s.S * s.R), tap / s.S % s.R, tap % s.S);
}

template <class T, class Element>
T finish(T sum, const ConvArgs& a, int64_t k) {
  const auto* bias = static_cast<const Element*>(a.epilogue.bias);
  const T value = bias ? sum + T(bias[k]) : sum;
  return a.epilogue.act == Act::relu && value <= T(0) ? T(0) : value;
}

template <class Element>
void fprop_rows(const ConvArgs& a) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const double row_us = double(s.Q * s.taps()) * 1e-4 + 0.05;
  parallel_for(s.N * s.K * s.Z * s.P, row_us, [&](int64_t task) {
    const naive::Index5 o = naive::unflatten(task, s.K, s.Z, s.P, 1);
    for (int64_t q0 = 0; q0 < s.Q; q0 += kStretch) {
      T sum[kStretch];
      const int64_t count = std::min(kStretch, s.Q - q0);
      std::fill(sum, sum + count, T(0));
      tap_rows(s, o.d, o.h, [&](int64_t tap, int64_t d, int64_t h) {
        for (int64_t f = 0; f < s.S; ++f) {
          const Range in = inside(q0, count, f, s.stride.w, s.padding.w, s.dilation.w, s.W);
          if (in.begin >= in.end) continue;
          const int64_t w = (q0 + in.begin) * s.stride.w - s.padding.w + f * s.dilation.w;
          const T weight = T(*filter_of<Element>(a, o.c, tap + f));
          accumulate(sum + in.begin, in.end - in.begin,
                     &naive::at<Element>(a.x, o.n, o.c / s.group_k(), d, h, w), s.stride.w * a.x.w,
                     [&](int64_t) { return weight; });
        }
      });
      Element* y = &naive::at_mut<Element>(a.y, o.n, o.c, o.d, o.h, q0);
      for (int64_t i = 0; i < count; ++i) y[i * a.y.w] = Element(finish<T, Element>(sum[i], a, o.c));
    }
  });
}

// The filter as [tap, K], for stretches along the channels.
template <class Element, class T>
void transpose_filter(const ConvArgs& a, T* out) {
  const ConvShape& s = a.shape;
  for (int64_t tap = 0; tap < s.taps(); ++tap)
    for (int64_t k = 0; k < s.K; ++k) out[tap * s.K + k] = T(*filter_of<Element>(a, k, tap));
}

template <class Element>
void fprop_channels(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  T* filter = static_cast<T*>(workspace);
  transpose_filter<Element>(a, filter);
  const double row_us = double(s.Q * s.K * s.taps()) * 1e-4 + 0.05;
  parallel_for(s.N * s.Z * s.P, row_us, [&](int64_t task) {
    const naive::Index5 o = naive::unflatten(task, 1, s.Z, s.P, 1);
    for (int64_t q = 0; q < s.Q; ++q)
      for (int64_t k0 = 0; k0 < s.K; k0 += kStretch) {
        T sum[kStretch];
        const int64_t count = std::min(kStretch, s.K - k0);
        std::fill(sum, sum + count, T(0));
        tap_rows(s, o.d, o.h, [&](int64_t tap, int64_t d, int64_t h) {
          for (int64_t f = 0; f < s.S; ++f) {
            const int64_t w = q * s.stride.w - s.padding.w + f * s.dilation.w;
            if (w < 0 || w >= s.W) continue;
            const T* weights = filter + (tap + f) * s.K + k0;
            accumulate(sum, count, &naive::at<Element>(a.x, o.n, k0, d, h, w), int64_t{1},
                       [&](int64_t i) { return weights[i]; });
          }
        });
        Element* y = &naive::at_mut<Element>(a.y, o.n, k0, o.d, o.h, q);
        for (int64_t i = 0; i < count; ++i) y[i] = Element(finish<T, Element>(sum[i], a, k0 + i));
      }
  });
}

// Calls f(tap, z, p) for the taps along depth and height by which outputs (z, p) reach input (d, h).
template <class F>
void reaching_rows(const ConvShape& s, int64_t d, int64_t h, const F& f) {
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t z = naive::output_of(d, t, s.stride.d, s.padding.d, s.dilation.d, s.Z);
      const int64_t p = naive::output_of(h, r, s.stride.h, s.padding.h, s.dilation.h, s.P);
      if (z >= 0 && p >= 0) f((t * s.R + r) * s.S, z, p);
    }
}

// A row of gx keeps its sums at hand; each output row that reaches it adds its
// cells, one tap after the other.
template <class Element>
void dgrad_rows(const ConvArgs& a) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const double row_us = double(s.Q * s.taps() * s.group_k()) * 1e-4 + 0.05;
  parallel_for(s.N * s.C * s.D * s.H, row_us, [&](int64_t task) {
    const naive::Index5 o = naive::unflatten(task, s.C, s.D, s.H, 1);
    T sum[kStretch];
    std::fill(sum, sum + s.W, T(0));
    for (int64_t k = o.c * s.group_k(); k < (o.c + 1) * s.group_k(); ++k)
      reaching_rows(s, o.d, o.h, [&](int64_t tap, int64_t z, int64_t p) {
        for (int64_t f = 0; f < s.S; ++f) {
          const Range in = inside(0, s.Q, f, s.stride.w, s.padding.w, s.dilation.w, s.W);
          const T weight = T(*filter_of<Element>(a, k, tap + f));
          const Element* y = &naive::at<Element>(a.y, o.n, k, z, p, 0);
          T* into = sum - s.padding.w + f * s.dilation.w;
          const auto pass = [&](auto stride, auto step) {
            for (int64_t q = in.begin; q < in.end; ++q) into[q * stride] += weight * T(y[q * step]);
          };
          constexpr std::integral_constant<int64_t, 1> one;
          if (s.stride.w == 1 && a.y.w == 1) {
            pass(one, one);
          } else {
            pass(s.stride.w, a.y.w);
          }
        }
      });
    Element* x = &naive::at_mut<Element>(a.x, o.n, o.c, o.d, o.h, 0);
    for (int64_t w = 0; w < s.W; ++w) x[w * a.x.w] = Element(sum[w]);
  });
}

template <class Element>
void dgrad_channels(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  T* filter = static_cast<T*>(workspace);
  transpose_filter<Element>(a, filter);
  const double row_us = double(s.W * s.C * s.taps()) * 1e-4 + 0.05;
  parallel_for(s.N * s.D * s.H, row_us, [&](int64_t task) {
    const naive::Index5 o = naive::unflatten(task, 1, s.D, s.H, 1);
    for (int64_t w = 0; w < s.W; ++w)
      for (int64_t c0 = 0; c0 < s.C; c0 += kStretch) {
        T sum[kStretch];
        const int64_t count = std::min(kStretch, s.C - c0);
        std::fill(sum, sum + count, T(0));
        reaching_rows(s, o.d, o.h, [&](int64_t tap, int64_t z, int64_t p) {
          for (int64_t f = 0; f < s.S; ++f) {
            const int64_t q = naive::output_of(w, f, s.stride.w, s.padding.w, s.dilation.w, s.Q);
            if (q < 0) continue;
            const T* weights = filter + (tap + f) * s.K + c0;
            accumulate(sum, count, &naive::at<Element>(a.y, o.n, c0, z, p, q), int64_t{1},
                       [&](int64_t i) { return weights[i]; });
          }
        });
        Element* x = &naive::at_mut<Element>(a.x, o.n, c0, o.d, o.h, w);
        for (int64_t i = 0; i < count; ++i) x[i] = Element(sum[i]);
      }
  });
}

// Sum of y[i] * x[i * step] in interleaved chains, folded in a fixed order.
template <class T, class Element>
T dot(const Element* y, int64_t y_step, const Element* x, int64_t x_step, int64_t count) {
  constexpr int kChains = 2 * kVectorBytes / sizeof(T);
  T chain[kChains] = {};
  const auto pass = [&](auto ys, auto xs) {
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains)
      for (int lane = 0; lane < kChains; ++lane) chain[lane] += T(y[(i + lane) * ys]) * T(x[(i + lane) * xs]);
    for (int lane = 0; i < count; ++i, ++lane) chain[lane] += T(y[i * ys]) * T(x[i * xs]);
  };
  constexpr std::integral_constant<int64_t, 1> one;
  if (y_step == 1 && x_step == 1) {
    pass(one, one);
  } else {
    pass(y_step, x_step);
  }
  T sum = 0;
  for (T value : chain) sum += value;
  return sum;
}

template <class Element>
void wgrad_rows(const ConvArgs& a) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const double tap_us = double(s.N * s.out_cells()) * 2e-4 + 0.05;
  parallel_for(s.K * s.T * s.R * s.S, tap_us, [&](int64_t task) {
    const naive::Index5 o = naive::unflatten(task, 1, s.T, s.R, s.S);  // n is the output channel
    const Range in = inside(0, s.Q, o.w, s.stride.w, s.padding.w, s.dilation.w, s.W);
    const int64_t w = in.begin * s.stride.w - s.padding.w + o.w * s.dilation.w;
    naive::Sum<Element> sum;
    for (int64_t n = 0; n < s.N && in.begin < in.end; ++n)
      for (int64_t z = 0; z < s.Z; ++z)
        for (int64_t p = 0; p < s.P; ++p) {
          const int64_t d = z * s.stride.d - s.padding.d + o.d * s.dilation.d;
          const int64_t h = p * s.stride.h - s.padding.h + o.h * s.dilation.h;
          if (d < 0 || d >= s.D || h < 0 || h >= s.H) continue;
          sum += dot<T>(&naive::at<Element>(a.y, n, o.n, z, p, in.begin), a.y.w,
                        &naive::at<Element>(a.x, n, o.n / s.group_k(), d, h, w), s.stride.w * a.x.w,
                        in.end - in.begin);
        }
    naive::at_mut<Element>(a.w, o.n, 0, o.d, o.h, o.w) = narrow<Element>(sum);
  });
}

template <class Element>
void wgrad_channels(const ConvArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int64_t kChannels = 64;
  const ConvShape& s = a.shape;
  const int64_t chunks = (s.K + kChannels - 1) / kChannels;
  const double task_us = double(s.N * s.out_cells() * kChannels) * 1e-4;
  parallel_for(chunks * s.taps(), task_us, [&](int64_t task) {
    const int64_t tap = task % s.taps(), k0 = task / s.taps() * kChannels,
                  count = std::min(kChannels, s.K - k0);
    const naive::Index5 o = naive::unflatten(tap, 1, s.T, s.R, s.S);
    const Range in = inside(0, s.Q, o.w, s.stride.w, s.padding.w, s.dilation.w, s.W);
    naive::Sum<Element> sum[kChannels];
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t z = 0; z < s.Z; ++z)
        for (int64_t p = 0; p < s.P; ++p) {
          const int64_t d = z * s.stride.d - s.padding.d + o.d * s.dilation.d;
          const int64_t h = p * s.stride.h - s.padding.h + o.h * s.dilation.h;
          if (d < 0 || d >= s.D || h < 0 || h >= s.H) continue;
          T row[kChannels] = {};
          for (int64_t q = in.begin; q < in.end; ++q) {
            const int64_t w = q * s.stride.w - s.padding.w + o.w * s.dilation.w;
            const Element* y = &naive::at<Element>(a.y, n, k0, z, p, q);
            accumulate(row, count, &naive::at<Element>(a.x, n, k0, d, h, w), int64_t{1},
                       [&](int64_t i) { return T(y[i]); });
          }
          for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
        }
    for (int64_t i = 0; i < count; ++i)
      naive::at_mut<Element>(a.w, k0 + i, 0, o.d, o.h, o.w) = narrow<Element>(sum[i]);
  });
}

// Stretches run along the channels where those lie next to each other and map one to one.
bool along_channels(const ConvArgs& a) {
  return a.shape.group_k() == 1 && a.x.c == 1 && a.y.c == 1 && a.x.w != 1;
}

}  // namespace

void conv_fprop_depthwise(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    along_channels(a) ? fprop_channels<Element>(a, workspace) : fprop_rows<Element>(a);
  });
}

void conv_dgrad_depthwise(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    along_channels(a) ? dgrad_channels<Element>(a, workspace) : dgrad_rows<Element>(a);
  });
}

void conv_wgrad_depthwise(const ConvArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    along_channels(a) ? wgrad_channels<Element>(a) : wgrad_rows<Element>(a);
  });
  conv_bias_grad(a);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
