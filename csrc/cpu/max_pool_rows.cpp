// SPDX-License-Identifier: MIT
// Max-pool a stretch of outputs at a time: along the channels where they lie next to each other
// (channels_last), along the width elsewhere.
//
//   forward   keeps the stretch's best values and offsets, and passes over it once for each window cell
//   backward  along the width, adds the covering output rows to one input row, in a fixed order;
//             along the channels, gathers each pixel from the windows that cover it
//
// Limits: one pass a window cell; widths over kStretch in backward. The floor is reading x and writing y and
// offsets once.
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

// Adds an output row's gradients to the input row whose cells of the windows begin at first_cell. Without
// offsets a window has one cell.
template <class Element, class Offsets, class T>
void spread_row(const PoolArgs& a, const Offsets* offsets, int64_t first_cell, const Element* y,
                const Element* gate, T* sum) {
  const Window& v = a.window;
  for (int64_t s = 0; s < v.kernel.w; ++s) {
    const int64_t w0 = s * v.dilation.w - v.padding.w;
    const int64_t first = w0 < 0 ? (-w0 + v.stride.w - 1) / v.stride.w : 0;
    const int64_t last = w0 < a.W ? std::min(v.out.w, (a.W - w0 + v.stride.w - 1) / v.stride.w) : 0;
    for (int64_t q = first; q < last; ++q) {
      const bool here = !offsets || offsets[q * a.offsets.w] == first_cell + s;
      const bool open = !gate || !(T(gate[q * a.gate.w]) <= T(0));
      sum[q * v.stride.w + w0] += here && open ? T(y[q * a.y.w]) : T(0);
    }
  }
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
        const Element* gate = a.gate.data ? &naive::at<Element>(a.gate, n, c, z, p, 0) : nullptr;
        const int64_t first_cell = (t * v.kernel.h + r) * v.kernel.w;
        const auto spread = [&](const auto* offsets) {
          spread_row(a, offsets, first_cell, &naive::at<Element>(a.y, n, c, z, p, 0), gate, sum);
        };
        if (a.offset == Offset::i32) {
          spread(&naive::at<int32_t>(a.offsets, n, c, z, p, 0));
        } else {
          spread(a.offset == Offset::u8 ? &naive::at<uint8_t>(a.offsets, n, c, z, p, 0) : nullptr);
        }
      }
    }
    Element* x = &naive::at_mut<Element>(a.x, n, c, d, h, 0);
    for (int64_t w = 0; w < a.W; ++w) x[w * a.x.w] = Element(sum[w]);
  });
}

// The same along the channels: a pixel gathers from the windows that cover it, all channels at a time.
template <class Element, class Offsets>
void backward_channels(const PoolArgs& a) {
  using T = typename Compute<Element>::type;
  const Window& v = a.window;
  const double task_us = double(a.W * a.C * v.kernel.cells()) * 5e-4 + 0.05;
  parallel_for(a.N * a.D * a.H, task_us, [&](int64_t task) {
    const int64_t h = task % a.H, d = task / a.H % a.D, n = task / (a.H * a.D);
    for (int64_t w = 0; w < a.W; ++w)
      for (int64_t c0 = 0; c0 < a.C; c0 += kStretch) {
        T sum[kStretch];
        const int64_t count = std::min(kStretch, a.C - c0);
        std::fill(sum, sum + count, T(0));
        for (int64_t cell = v.kernel.cells() - 1; cell >= 0; --cell) {
          const naive::Index5 tap = naive::unflatten(cell, 1, v.kernel.d, v.kernel.h, v.kernel.w);
          const int64_t z = naive::output_of(d, tap.d, v.stride.d, v.padding.d, v.dilation.d, v.out.d);
          const int64_t p = naive::output_of(h, tap.h, v.stride.h, v.padding.h, v.dilation.h, v.out.h);
          const int64_t q = naive::output_of(w, tap.w, v.stride.w, v.padding.w, v.dilation.w, v.out.w);
          if (z < 0 || p < 0 || q < 0) continue;
          const Offsets* offset = &naive::at<Offsets>(a.offsets, n, c0, z, p, q);
          const Element* y = &naive::at<Element>(a.y, n, c0, z, p, q);
          const auto here = static_cast<Offsets>(cell);
          if (a.gate.data) {
            const Element* gate = &naive::at<Element>(a.gate, n, c0, z, p, q);
            for (int64_t i = 0; i < count; ++i)
              sum[i] += offset[i] == here && !(T(gate[i]) <= T(0)) ? T(y[i]) : T(0);
          } else {
            for (int64_t i = 0; i < count; ++i) sum[i] += offset[i] == here ? T(y[i]) : T(0);
          }
        }
        Element* x = &naive::at_mut<Element>(a.x, n, c0, d, h, w);
        for (int64_t i = 0; i < count; ++i) x[i] = Element(sum[i]);
      }
  });
}

// Whether the channels of every tensor lie next to each other, and are enough for the lanes.
bool along_channels(const PoolArgs& a) {
  return a.C >= 16 && a.x.c == 1 && a.y.c == 1 && a.offset != Offset::none && a.offsets.c == 1 &&
         (!a.gate.data || a.gate.c == 1);
}

}  // namespace

void max_pool_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(a); });
}

void max_pool_backward_rows(const PoolArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    if (!along_channels(a)) return backward<Element>(a);
    a.offset == Offset::u8 ? backward_channels<Element, uint8_t>(a) : backward_channels<Element, int32_t>(a);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
