// SPDX-License-Identifier: MIT
// Every pass straight from its definition, one output element a call. The naive row of each table, on
// both devices, is a loop over these functions; they take every stride, size and dtype, sum in double,
// and are the oracle of all other rows.
#pragma once

#include <cmath>

#include "core/args.h"

namespace fastconv::naive {

template <class T>
FASTCONV_HD inline const T& at(const View& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
  return static_cast<const T*>(v.data)[n * v.n + c * v.c + d * v.d + h * v.h + w * v.w];
}

template <class T>
FASTCONV_HD inline T& at_mut(const View& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
  return static_cast<T*>(v.data)[n * v.n + c * v.c + d * v.d + h * v.h + w * v.w];
}

FASTCONV_HD inline double load(float x) { return x; }
FASTCONV_HD inline double load(double x) { return x; }
FASTCONV_HD inline double load(Half x) { return static_cast<float>(x); }
FASTCONV_HD inline double load(BFloat16 x) { return static_cast<float>(x); }

// A running sum of numbers of type T, in double. double has nothing wider to be summed in, so its sum keeps
// what each addition rounds off (Knuth's TwoSum); an infinite sum stays infinite.
template <class T>
class Sum {
 public:
  FASTCONV_HD void operator+=(double x) { sum_ += x; }
  FASTCONV_HD operator double() const { return sum_; }

 private:
  double sum_ = 0;
};
template <>
class Sum<double> {
 public:
  FASTCONV_HD void operator+=(double x) {
    const double sum = sum_ + x, added = sum - sum_;
    rest_ += (sum_ - (sum - added)) + (x - added);
    sum_ = sum;
  }
  FASTCONV_HD operator double() const {
    const double sum = sum_ + rest_;
    return sum - sum == 0 ? sum : sum_;
  }

 private:
  double sum_ = 0, rest_ = 0;
};

// ReLU as torch has it: NaN passes through.
template <class Value>
FASTCONV_HD inline Value activate(Value value, Act act) {
  return act == Act::relu && value <= 0 ? Value(0) : value;
}

struct Index5 {
  int64_t n, c, d, h, w;
};

// The i-th of [n, c, d, h, w] elements in row-major order.
FASTCONV_HD inline Index5 unflatten(int64_t i, int64_t c, int64_t d, int64_t h, int64_t w) {
  Index5 at;
  at.w = i % w, i /= w;
  at.h = i % h, i /= h;
  at.d = i % d, i /= d;
  at.c = i % c;
  at.n = i / c;
  return at;
}

// y[n, k, z, p, q] = act(bias[k] + residual + sum over c, t, r, s of x[n, c, ...] * w[k, c, t, r, s])
template <class T>
FASTCONV_HD inline void conv_fprop(const ConvArgs& a, int64_t i) {
  const ConvShape& s = a.shape;
  const Index5 o = unflatten(i, s.K, s.Z, s.P, s.Q);
  const int64_t first_c = o.c / s.group_k() * s.group_c();
  Sum<T> sum;
  for (int64_t c = 0; c < s.group_c(); ++c)
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t d = o.d * s.stride.d - s.padding.d + t * s.dilation.d;
      if (d < 0 || d >= s.D) continue;
      for (int64_t r = 0; r < s.R; ++r) {
        const int64_t h = o.h * s.stride.h - s.padding.h + r * s.dilation.h;
        if (h < 0 || h >= s.H) continue;
        for (int64_t f = 0; f < s.S; ++f) {
          const int64_t w = o.w * s.stride.w - s.padding.w + f * s.dilation.w;
          if (w < 0 || w >= s.W) continue;
          sum += load(at<T>(a.x, o.n, first_c + c, d, h, w)) * load(at<T>(a.w, o.c, c, t, r, f));
        }
      }
    }
  const Epilogue& e = a.epilogue;
  if (e.bias) sum += load(static_cast<const T*>(e.bias)[o.c]);
  if (e.residual.data) sum += load(at<T>(e.residual, o.n, o.c, o.d, o.h, o.w));
  at_mut<T>(a.y, o.n, o.c, o.d, o.h, o.w) = narrow<T>(activate(double(sum), e.act));
}

// The output position that meets input position `in` at filter tap `tap`, or -1 if there is none.
FASTCONV_HD inline int64_t output_of(int64_t in, int64_t tap, int64_t stride, int64_t padding,
                                     int64_t dilation, int64_t out) {
  const int64_t scaled = in + padding - tap * dilation;
  if (scaled < 0 || scaled % stride != 0) return -1;
  return scaled / stride < out ? scaled / stride : -1;
}

// gx[n, c, d, h, w] = sum over k, t, r, s of gy[n, k, ...] * w[k, c, t, r, s]
template <class T>
FASTCONV_HD inline void conv_dgrad(const ConvArgs& a, int64_t i) {
  const ConvShape& s = a.shape;
  const Index5 o = unflatten(i, s.C, s.D, s.H, s.W);
  const int64_t group = o.c / s.group_c(), first_k = group * s.group_k(), c = o.c - group * s.group_c();
  Sum<T> sum;
  for (int64_t k = first_k; k < first_k + s.group_k(); ++k)
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t z = output_of(o.d, t, s.stride.d, s.padding.d, s.dilation.d, s.Z);
      if (z < 0) continue;
      for (int64_t r = 0; r < s.R; ++r) {
        const int64_t p = output_of(o.h, r, s.stride.h, s.padding.h, s.dilation.h, s.P);
        if (p < 0) continue;
        for (int64_t f = 0; f < s.S; ++f) {
          const int64_t q = output_of(o.w, f, s.stride.w, s.padding.w, s.dilation.w, s.Q);
          if (q >= 0) sum += load(at<T>(a.y, o.n, k, z, p, q)) * load(at<T>(a.w, k, c, t, r, f));
        }
      }
    }
  at_mut<T>(a.x, o.n, o.c, o.d, o.h, o.w) = narrow<T>(sum);
}

// One summand of the wgrad of filter element (k, c, t, r, s): output position i of [n, z, p, q].
template <class T>
FASTCONV_HD inline double conv_wgrad_term(const ConvArgs& a, const Index5& f, int64_t i) {
  const ConvShape& s = a.shape;
  const Index5 o = unflatten(i, 1, s.Z, s.P, s.Q);
  const int64_t d = o.d * s.stride.d - s.padding.d + f.d * s.dilation.d;
  const int64_t h = o.h * s.stride.h - s.padding.h + f.h * s.dilation.h;
  const int64_t w = o.w * s.stride.w - s.padding.w + f.w * s.dilation.w;
  if (d < 0 || d >= s.D || h < 0 || h >= s.H || w < 0 || w >= s.W) return 0;
  const int64_t c = f.n / s.group_k() * s.group_c() + f.c;
  return load(at<T>(a.y, o.n, f.n, o.d, o.h, o.w)) * load(at<T>(a.x, o.n, c, d, h, w));
}

// The largest (last among NaN, else first among equals) of a window, and where in the window it lies.
struct Maximum {
  double value;
  int64_t offset;
};

// Where a window's first cell inside the input lies, in steps of the dilation.
FASTCONV_HD inline int64_t first_step(int64_t start, int64_t dilation) {
  return start < 0 ? (-start + dilation - 1) / dilation : 0;
}

template <class T>
FASTCONV_HD inline Maximum max_of_window(const PoolArgs& a, const Index5& o) {
  const Window& v = a.window;
  const int64_t d0 = o.d * v.stride.d - v.padding.d, h0 = o.h * v.stride.h - v.padding.h,
                w0 = o.w * v.stride.w - v.padding.w;
  const int64_t t0 = first_step(d0, v.dilation.d), r0 = first_step(h0, v.dilation.h),
                s0 = first_step(w0, v.dilation.w);
  Maximum best{-HUGE_VAL, (t0 * v.kernel.h + r0) * v.kernel.w + s0};
  for (int64_t t = t0; t < v.kernel.d && d0 + t * v.dilation.d < a.D; ++t)
    for (int64_t r = r0; r < v.kernel.h && h0 + r * v.dilation.h < a.H; ++r)
      for (int64_t s = s0; s < v.kernel.w && w0 + s * v.dilation.w < a.W; ++s) {
        const double value =
            load(at<T>(a.x, o.n, o.c, d0 + t * v.dilation.d, h0 + r * v.dilation.h, w0 + s * v.dilation.w));
        if (value > best.value || value != value) best = {value, (t * v.kernel.h + r) * v.kernel.w + s};
      }
  return best;
}

FASTCONV_HD inline void store_offset(const PoolArgs& a, const Index5& o, int64_t offset) {
  if (a.offset == Offset::u8)
    at_mut<uint8_t>(a.offsets, o.n, o.c, o.d, o.h, o.w) = static_cast<uint8_t>(offset);
  if (a.offset == Offset::i32)
    at_mut<int32_t>(a.offsets, o.n, o.c, o.d, o.h, o.w) = static_cast<int32_t>(offset);
}

FASTCONV_HD inline int64_t load_offset(const PoolArgs& a, const Index5& o) {
  if (a.offset == Offset::none) return 0;
  return a.offset == Offset::u8 ? int64_t(at<uint8_t>(a.offsets, o.n, o.c, o.d, o.h, o.w))
                                : int64_t(at<int32_t>(a.offsets, o.n, o.c, o.d, o.h, o.w));
}

template <class T>
FASTCONV_HD inline void max_pool(const PoolArgs& a, int64_t i) {
  const Extent3& out = a.window.out;
  const Index5 o = unflatten(i, a.C, out.d, out.h, out.w);
  const Maximum best = max_of_window<T>(a, o);
  at_mut<T>(a.y, o.n, o.c, o.d, o.h, o.w) = narrow<T>(best.value);
  store_offset(a, o, best.offset);
}

// The input position of window `o`'s maximum. Outside the input where a window holds no input at all.
FASTCONV_HD inline Index5 input_of(const PoolArgs& a, const Index5& o) {
  const Window& v = a.window;
  const Index5 cell = unflatten(load_offset(a, o), 1, v.kernel.d, v.kernel.h, v.kernel.w);
  return {o.n, o.c, o.d * v.stride.d - v.padding.d + cell.d * v.dilation.d,
          o.h * v.stride.h - v.padding.h + cell.h * v.dilation.h,
          o.w * v.stride.w - v.padding.w + cell.w * v.dilation.w};
}

// gx at one input position: the sum of gy over the windows whose maximum lies there, in
// row-major order of the windows.
template <class T>
FASTCONV_HD inline void max_pool_backward(const PoolArgs& a, int64_t i) {
  const Window& v = a.window;
  const Index5 at_x = unflatten(i, a.C, a.D, a.H, a.W);
  double sum = 0;
  for (int64_t t = v.kernel.d - 1; t >= 0; --t) {
    const int64_t z = output_of(at_x.d, t, v.stride.d, v.padding.d, v.dilation.d, v.out.d);
    if (z < 0) continue;
    for (int64_t r = v.kernel.h - 1; r >= 0; --r) {
      const int64_t p = output_of(at_x.h, r, v.stride.h, v.padding.h, v.dilation.h, v.out.h);
      if (p < 0) continue;
      for (int64_t s = v.kernel.w - 1; s >= 0; --s) {
        const int64_t q = output_of(at_x.w, s, v.stride.w, v.padding.w, v.dilation.w, v.out.w);
        if (q < 0) continue;
        const Index5 o{at_x.n, at_x.c, z, p, q};
        if (load_offset(a, o) != (t * v.kernel.h + r) * v.kernel.w + s) continue;
        if (a.gate.data && load(at<T>(a.gate, o.n, o.c, z, p, q)) <= 0) continue;
        sum += load(at<T>(a.y, o.n, o.c, z, p, q));
      }
    }
  }
  at_mut<T>(a.x, at_x.n, at_x.c, at_x.d, at_x.h, at_x.w) = narrow<T>(sum);
}

template <class T>
FASTCONV_HD inline void max_pool_gather(const PoolArgs& a, int64_t i) {
  const Extent3& out = a.window.out;
  const Index5 o = unflatten(i, a.C, out.d, out.h, out.w);
  const Index5 in = input_of(a, o);
  const bool inside = in.d >= 0 && in.d < a.D && in.h >= 0 && in.h < a.H && in.w >= 0 && in.w < a.W;
  at_mut<T>(a.y, o.n, o.c, o.d, o.h, o.w) = inside ? at<T>(a.x, in.n, in.c, in.d, in.h, in.w) : T(0.f);
}

FASTCONV_HD inline void max_pool_indices(const PoolArgs& a, int64_t i) {
  const Extent3& out = a.window.out;
  const Index5 o = unflatten(i, a.C, out.d, out.h, out.w);
  const Index5 in = input_of(a, o);
  at_mut<int64_t>(a.y, o.n, o.c, o.d, o.h, o.w) = (in.d * a.H + in.h) * a.W + in.w;
}

// How many cells of a window along one axis an average divides by, where it counts them: at least one.
template <class Int>
FASTCONV_HD inline Int counted(DivideBy by, Int start, Int kernel, Int padding, Int size) {
  const bool padded = by == DivideBy::padded_cells;
  const Int end = padded ? size + padding : size, begin = padded || start > 0 ? start : 0;
  const Int cells = (start + kernel < end ? start + kernel : end) - begin;
  return cells > 0 ? cells : 1;
}

// What the sum of window `o` is divided by.
FASTCONV_HD inline double divisor_of(const PoolArgs& a, const Index5& o) {
  if (a.divide_by == DivideBy::number) return double(a.divisor);
  const Window& v = a.window;
  const auto along = [&](int64_t i, int64_t kernel, int64_t stride, int64_t padding, int64_t size) {
    return counted(a.divide_by, i * stride - padding, kernel, padding, size);
  };
  return double(along(o.d, v.kernel.d, v.stride.d, v.padding.d, a.D) *
                along(o.h, v.kernel.h, v.stride.h, v.padding.h, a.H) *
                along(o.w, v.kernel.w, v.stride.w, v.padding.w, a.W));
}

template <class T>
FASTCONV_HD inline void avg_pool(const PoolArgs& a, int64_t i) {
  const Window& v = a.window;
  const Index5 o = unflatten(i, a.C, v.out.d, v.out.h, v.out.w);
  const int64_t d0 = o.d * v.stride.d - v.padding.d, h0 = o.h * v.stride.h - v.padding.h,
                w0 = o.w * v.stride.w - v.padding.w;
  Sum<T> sum;
  for (int64_t d = d0 > 0 ? d0 : 0; d < d0 + v.kernel.d && d < a.D; ++d)
    for (int64_t h = h0 > 0 ? h0 : 0; h < h0 + v.kernel.h && h < a.H; ++h)
      for (int64_t w = w0 > 0 ? w0 : 0; w < w0 + v.kernel.w && w < a.W; ++w)
        sum += load(at<T>(a.x, o.n, o.c, d, h, w));
  at_mut<T>(a.y, o.n, o.c, o.d, o.h, o.w) = narrow<T>(double(sum) / divisor_of(a, o));
}

// gx at one input position: the sum of gy, each over its divisor, over the windows that hold it.
template <class T>
FASTCONV_HD inline void avg_pool_backward(const PoolArgs& a, int64_t i) {
  const Window& v = a.window;
  const Index5 at_x = unflatten(i, a.C, a.D, a.H, a.W);
  Sum<T> sum;
  for (int64_t t = v.kernel.d - 1; t >= 0; --t) {
    const int64_t z = output_of(at_x.d, t, v.stride.d, v.padding.d, 1, v.out.d);
    if (z < 0) continue;
    for (int64_t r = v.kernel.h - 1; r >= 0; --r) {
      const int64_t p = output_of(at_x.h, r, v.stride.h, v.padding.h, 1, v.out.h);
      if (p < 0) continue;
      for (int64_t s = v.kernel.w - 1; s >= 0; --s) {
        const int64_t q = output_of(at_x.w, s, v.stride.w, v.padding.w, 1, v.out.w);
        if (q < 0) continue;
        const Index5 o{at_x.n, at_x.c, z, p, q};
        sum += load(at<T>(a.y, o.n, o.c, z, p, q)) / divisor_of(a, o);
      }
    }
  }
  at_mut<T>(a.x, at_x.n, at_x.c, at_x.d, at_x.h, at_x.w) = narrow<T>(sum);
}

// Batch-norm, a channel a call, by a team of threads: each takes every `step`-th element from `first` on, and
// `sum` adds up over the team. This is a team of one.
struct Alone {
  int64_t first = 0, step = 1;

  double sum(double value) const { return value; }
};

FASTCONV_HD inline int64_t norm_count(const NormArgs& a) { return a.N * a.cells(); }

// The i-th element of channel c.
FASTCONV_HD inline Index5 norm_element(const NormArgs& a, int64_t c, int64_t i) {
  Index5 at = unflatten(i, 1, a.D, a.H, a.W);
  at.c = c;
  return at;
}
template <class T>
FASTCONV_HD inline double norm_load(const View& v, const Index5& i) {
  return load(at<T>(v, i.n, i.c, i.d, i.h, i.w));
}

template <class T>
FASTCONV_HD inline double norm_scale(const NormArgs& a, int64_t c, double invstd) {
  return a.weight ? load(static_cast<const T*>(a.weight)[c]) * invstd : invstd;
}

// Mean and variance in two passes, then y[n, c, d, h, w] = act((x - mean) * scale + bias).
template <class T, class Team>
FASTCONV_D inline void norm_act(const NormArgs& a, int64_t c, const Team& team) {
  const int64_t count = norm_count(a);
  Sum<T> sum, squares;
  for (int64_t i = team.first; i < count; i += team.step) sum += norm_load<T>(a.x, norm_element(a, c, i));
  const double mean = team.sum(sum) / double(count);
  for (int64_t i = team.first; i < count; i += team.step) {
    const double distance = norm_load<T>(a.x, norm_element(a, c, i)) - mean;
    squares += distance * distance;
  }
  const double invstd = 1 / sqrt(team.sum(squares) / double(count) + a.eps);
  if (team.first == 0) a.mean[c] = mean, a.invstd[c] = invstd;
  const double scale = norm_scale<T>(a, c, invstd),
               bias = a.bias ? load(static_cast<const T*>(a.bias)[c]) : 0;
  for (int64_t i = team.first; i < count; i += team.step) {
    const Index5 o = norm_element(a, c, i);
    const double value = (norm_load<T>(a.x, o) - mean) * scale + bias;
    at_mut<T>(a.y, o.n, c, o.d, o.h, o.w) = narrow<T>(activate(value, a.act));
  }
}

// With g = grad_y where the act has passed and xhat = (x - mean) * invstd: grad_b = sum g, grad_w = sum g
// xhat, grad_x = scale * (g - grad_b / count - xhat * grad_w / count).
template <class T, class Team>
FASTCONV_D inline void norm_act_backward(const NormBackwardArgs& a, int64_t c, const Team& team) {
  const NormArgs& n = a.norm;
  const int64_t count = norm_count(n);
  const double mean = n.mean[c], invstd = n.invstd[c];
  const auto gradient = [&](const Index5& o) {
    const bool passed = n.act == Act::none || !(norm_load<T>(n.y, o) <= 0);
    return passed ? norm_load<T>(a.grad_y, o) : 0;
  };
  Sum<T> sum, products;
  for (int64_t i = team.first; i < count; i += team.step) {
    const Index5 o = norm_element(n, c, i);
    const double g = gradient(o);
    sum += g;
    products += g * ((norm_load<T>(n.x, o) - mean) * invstd);
  }
  const double grad_b = team.sum(sum), grad_w = team.sum(products);
  if (team.first == 0) {
    if (a.grad_b) static_cast<T*>(a.grad_b)[c] = narrow<T>(grad_b);
    if (a.grad_w) static_cast<T*>(a.grad_w)[c] = narrow<T>(grad_w);
  }
  if (!a.grad_x.data) return;
  const double scale = norm_scale<T>(n, c, invstd), by_b = grad_b / double(count),
               by_w = grad_w / double(count);
  for (int64_t i = team.first; i < count; i += team.step) {
    const Index5 o = norm_element(n, c, i);
    const double xhat = (norm_load<T>(n.x, o) - mean) * invstd;
    at_mut<T>(a.grad_x, o.n, c, o.d, o.h, o.w) = narrow<T>(scale * (gradient(o) - by_b - xhat * by_w));
  }
}

template <class T>
FASTCONV_HD inline double at2(const Matrix& m, int64_t row, int64_t col) {
  return load(static_cast<const T*>(m.data)[row * m.row + col * m.col]);
}

template <class T>
FASTCONV_HD inline void store2(const Matrix& m, int64_t row, int64_t col, double value) {
  static_cast<T*>(m.data)[row * m.row + col * m.col] = narrow<T>(value);
}

// y[m, n] = act(bias[n] + sum over k of x[m, k] * w[n, k])
template <class T>
FASTCONV_HD inline void linear_fprop(const LinearArgs& a, int64_t i) {
  const int64_t m = i / a.N, n = i % a.N;
  Sum<T> sum;
  for (int64_t k = 0; k < a.K; ++k) sum += at2<T>(a.x, m, k) * at2<T>(a.w, n, k);
  if (a.epilogue.bias) sum += load(static_cast<const T*>(a.epilogue.bias)[n]);
  store2<T>(a.y, m, n, activate(double(sum), a.epilogue.act));
}

// gx[m, k] = sum over n of gy[m, n] * w[n, k]
template <class T>
FASTCONV_HD inline void linear_dgrad(const LinearArgs& a, int64_t i) {
  const int64_t m = i / a.K, k = i % a.K;
  Sum<T> sum;
  for (int64_t n = 0; n < a.N; ++n) sum += at2<T>(a.y, m, n) * at2<T>(a.w, n, k);
  store2<T>(a.x, m, k, sum);
}

// gw[n, k] = sum over m of gy[m, n] * x[m, k]
template <class T>
FASTCONV_HD inline void linear_wgrad(const LinearArgs& a, int64_t i) {
  const int64_t n = i / a.K, k = i % a.K;
  Sum<T> sum;
  for (int64_t m = 0; m < a.M; ++m) sum += at2<T>(a.y, m, n) * at2<T>(a.x, m, k);
  store2<T>(a.w, n, k, sum);
}

}  // namespace fastconv::naive
