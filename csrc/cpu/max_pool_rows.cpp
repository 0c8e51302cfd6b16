// SPDX-License-Identifier: MIT
// Max-pool a row at a time: forward keeps the best value and offset of a stretch of outputs and passes once
// over it for each cell of the window; backward spreads the gradients of each covering output row into one
// input row, in a fixed order. A stretch runs along the channels where they lie next to each other
// (channels_last), along the width elsewhere.
//
// Limits: one pass a window cell; widths over kStretch in backward. The floor is reading x
// and writing y and offsets once.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <cmath>

#include "core/naive.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

#define FASTCONV_FILE "cpu/max_pool_rows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {
namespace {

// Steps [begin, end) of a window axis that lie inside the input.
struct Steps {
  int64_t begin, end;
};

inline Steps steps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = naive::first_step(start, dilation);
  const int64_t end = start < size ? (size - start + dilation - 1) / dilation : 0;
  return {begin, std::min(kernel, end)};
}

// best and offset over `count` outputs, where output i looks at cells[i * step]. T is float or double; its
// offsets match it in width, so that both go through the same vector lanes.
template <class T, class Offsets, class Element>
void update(const Element* cells, int64_t step, int64_t count, Offsets cell, T* best, Offsets* offset) {
  const auto pass = [&](auto distance) {
    for (int64_t i = 0; i < count; ++i) {
      const T value = T(cells[i * distance]);
      const bool take = value > best[i] || value != value;  // the first of equals, the last NaN
      best[i] = take ? value : best[i];
      offset[i] = take ? cell : offset[i];
    }
  };
  if (step == 1) return pass(std::integral_constant<int64_t, 1>{});
  if (step == 2) return pass(std::integral_constant<int64_t, 2>{});
  pass(step);
}

template <class Element>
void forward(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  using Offsets = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const Window& v = a.window;
  const bool along_c = a.x.c == 1;
  // A task is one stretch: (n, c, z, p) for stretches along the width, (n, z, p, q) along the channels.
  const int64_t lanes = along_c ? a.C : v.out.w, others = along_c ? v.out.w : a.C;
  const double task_us = double(lanes * v.kernel.cells()) * 5e-4 + 0.05;
  parallel_for(a.N * others * v.out.d * v.out.h, task_us, [&](int64_t task) {
    const int64_t other = task % others, p = task / others % v.out.h, z = task / (others * v.out.h) % v.out.d,
                  n = task / (others * v.out.h * v.out.d);
    const int64_t d0 = z * v.stride.d - v.padding.d, h0 = p * v.stride.h - v.padding.h;
    const Steps ts = steps_inside(d0, v.kernel.d, v.dilation.d, a.D),
                rs = steps_inside(h0, v.kernel.h, v.dilation.h, a.H);
    T best[kStretch];
    Offsets offset[kStretch];
    for (int64_t lane0 = 0; lane0 < lanes; lane0 += kStretch) {
      const int64_t count = std::min(kStretch, lanes - lane0);
      const int64_t q0 = along_c ? other : lane0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t w0 = (along_c ? q0 : q0 + i) * v.stride.w - v.padding.w;
        best[i] = -std::numeric_limits<T>::infinity();
        offset[i] = static_cast<Offsets>((ts.begin * v.kernel.h + rs.begin) * v.kernel.w +
                                         naive::first_step(w0, v.dilation.w));
      }
      for (int64_t t = ts.begin; t < ts.end; ++t)
        for (int64_t r = rs.begin; r < rs.end; ++r)
          for (int64_t s = 0; s < v.kernel.w; ++s) {
            const int64_t d = d0 + t * v.dilation.d, h = h0 + r * v.dilation.h;
            const int64_t w = q0 * v.stride.w - v.padding.w + s * v.dilation.w;
            const auto cell = static_cast<Offsets>((t * v.kernel.h + r) * v.kernel.w + s);
            if (along_c) {
              if (w < 0 || w >= a.W) continue;
              update<T>(&naive::at<Element>(a.x, n, lane0, d, h, w), int64_t{1}, count, cell, best, offset);
              continue;
            }
            const int64_t first = w < 0 ? std::min(count, (-w + v.stride.w - 1) / v.stride.w) : 0;
            const int64_t last = w < a.W ? std::min(count, (a.W - w + v.stride.w - 1) / v.stride.w) : 0;
            if (first >= last) continue;
            update<T>(&naive::at<Element>(a.x, n, other, d, h, w + first * v.stride.w), v.stride.w * a.x.w,
                      last - first, cell, best + first, offset + first);
          }
      const int64_t c0 = along_c ? lane0 : other, y_step = along_c ? a.y.c : a.y.w,
                    offset_step = along_c ? a.offsets.c : a.offsets.w;
      Element* y = &naive::at_mut<Element>(a.y, n, c0, z, p, q0);
      for (int64_t i = 0; i < count; ++i) y[i * y_step] = Element(best[i]);
      const auto put = [&](auto* out) {
        for (int64_t i = 0; i < count; ++i)
          out[i * offset_step] = static_cast<std::remove_pointer_t<decltype(out)>>(offset[i]);
      };
      if (a.offset == Offset::u8) put(&naive::at_mut<uint8_t>(a.offsets, n, c0, z, p, q0));
      if (a.offset == Offset::i32) put(&naive::at_mut<int32_t>(a.offsets, n, c0, z, p, q0));
    }
  });
}

template <class Element>
void backward(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  const Window& v = a.window;
  const double task_us = double(v.out.w * v.kernel.cells() + a.W) * 1e-3 + 0.05;
  parallel_for(a.N * a.C * a.D * a.H, task_us, [&](int64_t task) {
    const int64_t h = task % a.H, d = task / a.H % a.D, c = task / (a.H * a.D) % a.C,
                  n = task / (a.H * a.D * a.C);
    T sum[kStretch];
    std::fill(sum, sum + a.W, T(0));
    for (int64_t t = v.kernel.d - 1; t >= 0; --t) {
      const int64_t z = naive::output_of(d, t, v.stride.d, v.padding.d, v.dilation.d, v.out.d);
      if (z < 0) continue;
      for (int64_t r = v.kernel.h - 1; r >= 0; --r) {
        const int64_t p = naive::output_of(h, r, v.stride.h, v.padding.h, v.dilation.h, v.out.h);
        if (p < 0) continue;
        const int64_t first_cell = (t * v.kernel.h + r) * v.kernel.w;
        for (int64_t q = 0; q < v.out.w; ++q) {
          const naive::Index5 o{n, c, z, p, q};
          const int64_t s = naive::load_offset(a, o) - first_cell;
          if (s < 0 || s >= v.kernel.w) continue;
          const int64_t w = q * v.stride.w - v.padding.w + s * v.dilation.w;
          if (w < 0 || w >= a.W) continue;
          if (a.gate.data && naive::load(naive::at<Element>(a.gate, n, c, z, p, q)) <= 0) continue;
          sum[w] += T(naive::at<Element>(a.y, n, c, z, p, q));
        }
      }
    }
    Element* x = &naive::at_mut<Element>(a.x, n, c, d, h, 0);
    for (int64_t w = 0; w < a.W; ++w) x[w * a.x.w] = Element(sum[w]);
  });
}

}  // namespace

void max_pool_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(a); });
}

void max_pool_backward_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)>>(a); });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
