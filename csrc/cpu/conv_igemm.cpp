// SPDX-License-Identifier: MIT
// 2-D and 3-D convolution as implicit GEMM: the im2col matrix exists only as the panel being packed.
//
//   fprop  M = K/groups, N = batch * Z * P * Q, K = C/groups * T * R * S
//   dgrad  M = C/groups, N = batch * D * H * W, K = K/groups * taps; one GEMM for each residue of the input
//   position
//          modulo the stride, so that strided layers meet only the taps that reach them
//   wgrad  M = K/groups, N = C/groups * T * R * S, K = batch * Z * P * Q, cut into pieces of fixed size whose
//   partial
//          sums are added in order
//
// Reads and writes every layout and stride in place. Idea: Chetlur et al., "cuDNN", arXiv:1410.0759,
// section 3. Limits: few output channels leave micro-tile rows unused, and packing is scalar where the inner
// stride is not one. The floor is the fused multiply-add rate, 2 * vector lanes * 2 a cycle.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <cstring>

#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

#define FASTCONV_FILE "cpu/conv_igemm.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/gemm.inl"

namespace {

// One k of an implicit GEMM: a channel and a filter tap.
struct Tap {
  int64_t source;   // offset of the channel in the gathered tensor
  int64_t weight;   // offset of (channel, tap) in the filter
  int64_t d, h, w;  // position = column * step + (d, h, w)
};

// A matrix whose columns are positions (n, i.d, i.h, i.w) and whose rows are taps;
// cells outside the tensor are zero.
template <class Element>
struct Gather {
  const Element* data;
  View stride;      // of the gathered tensor
  Extent3 size;     // of the gathered tensor
  Extent3 columns;  // positions along each axis
  Extent3 step;     // distance in the tensor between neighbouring columns

  // Splits columns [n.begin, n.begin + n.size) into runs along w: f(first column of
  // the run, its size, n, d, h, w).
  template <class F>
  void runs(Span n, const F& f) const {
    int64_t rest = n.begin;
    int64_t w = rest % columns.w;
    rest /= columns.w;
    int64_t h = rest % columns.h;
    rest /= columns.h;
    int64_t d = rest % columns.d, image = rest / columns.d;
    for (int64_t done = 0; done < n.size;) {
      const int64_t size = std::min(columns.w - w, n.size - done);
      f(done, size, image, d, h, w);
      done += size;
      w = 0;
      if (++h == columns.h) {
        h = 0;
        if (++d == columns.d) d = 0, ++image;
      }
    }
  }

  // The part [first, last) of a run of `size` columns from column w whose cells at
  // tap offset `shift` lie inside.
  Span inside(int64_t w, int64_t size, int64_t shift) const {
    const int64_t start = w * step.w + shift, s = step.w;
    const int64_t room = this->size.w - start;
    const int64_t first = std::min(size, start >= 0 ? 0 : (s == 1 ? -start : (-start + s - 1) / s));
    const int64_t last = std::min(size, room <= 0 ? 0 : (s == 1 ? room : (room + s - 1) / s));
    return {first, std::max<int64_t>(0, last - first)};
  }

  // The first cell of a run at a tap, or null where the whole row lies outside.
  const Element* row(const Tap& tap, int64_t n, int64_t d, int64_t h, int64_t w) const {
    const int64_t at_d = d * step.d + tap.d, at_h = h * step.h + tap.h, at_w = w * step.w + tap.w;
    if (at_d < 0 || at_d >= size.d || at_h < 0 || at_h >= size.h) return nullptr;
    return data + n * stride.n + tap.source + at_d * stride.d + at_h * stride.h + at_w * stride.w;
  }

  // Taps down, columns across: panels[column / kColumns][tap][column % kColumns].
  template <class T>
  void pack_columns(Span n, const Tap* taps, int64_t depth, T* out) const {
    constexpr int width = Simd<T>::kColumns;
    const int64_t stride_w = step.w * stride.w;
    for (int64_t column = 0; column < n.size; column += width, out += width * depth) {
      const Span panel{n.begin + column, std::min<int64_t>(width, n.size - column)};
      runs(panel, [&](int64_t first, int64_t size, int64_t image, int64_t d, int64_t h, int64_t w) {
        for (int64_t k = 0; k < depth; ++k) {
          T* line = out + k * width + first;
          const Element* cells = row(taps[k], image, d, h, w);
          const Span valid = cells ? inside(w, size, taps[k].w) : Span{0, 0};
          int64_t i = 0;
          for (; i < valid.begin; ++i) line[i] = T(0);
          const int64_t end = valid.begin + valid.size;
          if (stride_w == 1) {
            for (; i < end; ++i) line[i] = T(cells[i]);
          } else {
            for (; i < end; ++i) line[i] = T(cells[i * stride_w]);
          }
          for (; i < size; ++i) line[i] = T(0);
        }
      });
      for (int64_t k = 0; k < depth && panel.size < width; ++k)
        std::fill(out + k * width + panel.size, out + (k + 1) * width, T(0));
    }
  }

  // Columns down, taps across: panels[tap / kColumns][column][tap % kColumns].
  template <class T>
  void pack_taps(Span n, const Tap* taps, int64_t count, T* out) const {
    constexpr int width = Simd<T>::kColumns;
    const int64_t stride_w = step.w * stride.w;
    for (int64_t tap0 = 0; tap0 < count; tap0 += width, out += width * n.size) {
      const int64_t used = std::min<int64_t>(width, count - tap0);
      if (used < width) std::fill(out, out + width * n.size, T(0));
      runs(n, [&](int64_t first, int64_t size, int64_t image, int64_t d, int64_t h, int64_t w) {
        for (int64_t lane = 0; lane < used; ++lane) {
          T* line = out + first * width + lane;
          const Tap& tap = taps[tap0 + lane];
          const Element* cells = row(tap, image, d, h, w);
          const Span valid = cells ? inside(w, size, tap.w) : Span{0, 0};
          int64_t i = 0;
          for (; i < valid.begin; ++i) line[i * width] = T(0);
          for (; i < valid.begin + valid.size; ++i) line[i * width] = T(cells[i * stride_w]);
          for (; i < size; ++i) line[i * width] = T(0);
        }
      });
    }
  }
};

// Where a finished block goes: rows are channels, columns the positions of a
// Gather, spread by `step` from `data`.
template <class Element>
struct Scatter {
  Element* data;
  View stride;
  Extent3 step;
  const Element* bias;  // of the group's first row, or null
  Act act;

  template <class T, class Columns>
  void store(Span m, Span n, const T* c, const Columns& columns) const {
    const int64_t stride_w = step.w * stride.w;
    columns.runs(n, [&](int64_t first, int64_t size, int64_t image, int64_t d, int64_t h, int64_t w) {
      Element* run = data + image * stride.n + d * step.d * stride.d + h * step.h * stride.h + w * stride_w;
      const auto value = [&](int64_t i, int64_t column) {
        return activated(c[i * kBlockN + first + column], bias, m.begin + i, act);
      };
      if (stride.c == 1) {
        for (int64_t column = 0; column < size; ++column)
          for (int64_t i = 0; i < m.size; ++i)
            run[m.begin + i + column * stride_w] = Element(value(i, column));
        return;
      }
      for (int64_t i = 0; i < m.size; ++i)
        with_step(stride_w, [&](auto step) {
          Element* line = run + (m.begin + i) * stride.c;
          for (int64_t column = 0; column < size; ++column) line[column * step] = Element(value(i, column));
        });
    });
  }
};

// out = filter x gather, block by block. tap(k) gives the k-th row of the gathered matrix; a row of the
// filter is `row_stride` elements from the next.
template <class T, class Element, class TapOf>
void filter_times_gather(const Element* filter, int64_t row_stride, int64_t total_m, int64_t total_k,
                         int64_t batch, const Gather<Element>& gather, const TapOf& tap_of,
                         const Scatter<Element>& scatter) {
  const int64_t total_n = batch * gather.columns.cells();
  if (total_m == 0 || total_n == 0) return;
  const Blocks blocks = Blocks::of<T>(total_m, total_n, total_k, 1);
  const int64_t count_m = blocks.count_m(total_m);
  const double block_us = macs_us(double(blocks.m) * blocks.n * (total_k + 8));
  parallel_for(count_m * blocks.count_n(total_n), block_us, [&](int64_t task) {
    Tap taps[kBlockK];
    const auto pack_a = [&](Span m, Span k, T* out) {
      for (int64_t i = 0; i < k.size; ++i) taps[i] = tap_of(k.begin + i);
      for (int64_t row = 0; row < m.size; row += kRows, out += kRows * k.size) {
        const int64_t used = std::min<int64_t>(kRows, m.size - row);
        if (used < kRows) std::fill(out, out + kRows * k.size, T(0));
        for (int64_t r = 0; r < used; ++r) {
          const Element* weights = filter + (m.begin + row + r) * row_stride;
          for (int64_t i = 0; i < k.size; ++i) out[i * kRows + r] = T(weights[taps[i].weight]);
        }
      }
    };
    const auto pack_b = [&](Span n, Span k, T* out) { gather.pack_columns(n, taps, k.size, out); };
    const auto store = [&](Span m, Span n, const T* c) { scatter.store(m, n, c, gather); };
    gemm_block<T>(block_of(task % count_m, blocks.m, total_m), block_of(task / count_m, blocks.n, total_n),
                  {0, total_k}, pack_a, pack_b, store);
  });
}

// The tap of index i in [channels, T, R, S] order, for reading x.
inline Tap tap_of_input(const ConvArgs& a, int64_t i) {
  const ConvShape& s = a.shape;
  const int64_t f = i % s.S, r = i / s.S % s.R, t = i / (s.S * s.R) % s.T, c = i / s.taps();
  return {c * a.x.c, c * a.w.c + t * a.w.d + r * a.w.h + f * a.w.w, t * s.dilation.d - s.padding.d,
          r * s.dilation.h - s.padding.h, f * s.dilation.w - s.padding.w};
}

template <class Element>
Gather<Element> gather_input(const ConvArgs& a, int64_t group) {
  const ConvShape& s = a.shape;
  return {static_cast<const Element*>(a.x.data) + group * s.group_c() * a.x.c,
          a.x,
          {s.D, s.H, s.W},
          {s.Z, s.P, s.Q},
          s.stride};
}

template <class Element>
void fprop(const ConvArgs& a) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  for (int64_t group = 0; group < s.groups; ++group) {
    const int64_t first_k = group * s.group_k();
    const auto* bias = static_cast<const Element*>(a.epilogue.bias);
    const Scatter<Element> scatter{static_cast<Element*>(a.y.data) + first_k * a.y.c, a.y, Extent3{},
                                   bias ? bias + first_k : nullptr, a.epilogue.act};
    filter_times_gather<T>(
        static_cast<const Element*>(a.w.data) + first_k * a.w.n, a.w.n, s.group_k(), s.group_c() * s.taps(),
        s.N, gather_input<Element>(a, group), [&](int64_t i) { return tap_of_input(a, i); }, scatter);
  }
}

// Along one axis, for input positions that are `residue` modulo the stride: the taps that reach
// them, first, first + step, ...
struct ReachingTaps {
  int64_t first, step, count;
};

inline ReachingTaps taps_reaching(int64_t residue, int64_t filter, int64_t stride, int64_t padding,
                                  int64_t dilation) {
  ReachingTaps taps{0, 0, 0};
  for (int64_t t = 0; t < filter; ++t) {
    if ((residue + padding - t * dilation) % stride != 0) continue;
    if (taps.count == 0) taps.first = t;
    if (taps.count == 1) taps.step = t - taps.first;
    ++taps.count;
  }
  return taps;
}

template <class Element>
void dgrad_residue(const ConvArgs& a, int64_t group, Extent3 residue) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const ReachingTaps td = taps_reaching(residue.d, s.T, s.stride.d, s.padding.d, s.dilation.d);
  const ReachingTaps th = taps_reaching(residue.h, s.R, s.stride.h, s.padding.h, s.dilation.h);
  const ReachingTaps tw = taps_reaching(residue.w, s.S, s.stride.w, s.padding.w, s.dilation.w);
  const auto positions = [](int64_t size, int64_t from, int64_t stride) {
    return (size - from + stride - 1) / stride;
  };

  const int64_t first_k = group * s.group_k(), first_c = group * s.group_c();
  const Gather<Element> gather{static_cast<const Element*>(a.y.data) + first_k * a.y.c,
                               a.y,
                               {s.Z, s.P, s.Q},
                               {positions(s.D, residue.d, s.stride.d), positions(s.H, residue.h, s.stride.h),
                                positions(s.W, residue.w, s.stride.w)},
                               Extent3{}};
  const Scatter<Element> scatter{static_cast<Element*>(a.x.data) + first_c * a.x.c + residue.d * a.x.d +
                                     residue.h * a.x.h + residue.w * a.x.w,
                                 a.x, s.stride, nullptr, Act::none};
  const auto tap_of = [&](int64_t i) -> Tap {
    const int64_t f = tw.first + i % tw.count * tw.step, r = th.first + i / tw.count % th.count * th.step,
                  t = td.first + i / (tw.count * th.count) % td.count * td.step,
                  k = i / (tw.count * th.count * td.count);
    return {k * a.y.c, k * a.w.n + t * a.w.d + r * a.w.h + f * a.w.w,
            (residue.d + s.padding.d - t * s.dilation.d) / s.stride.d,
            (residue.h + s.padding.h - r * s.dilation.h) / s.stride.h,
            (residue.w + s.padding.w - f * s.dilation.w) / s.stride.w};
  };
  filter_times_gather<T>(static_cast<const Element*>(a.w.data) + first_k * a.w.n, a.w.c, s.group_c(),
                         s.group_k() * td.count * th.count * tw.count, s.N, gather, tap_of, scatter);
}

template <class Element>
void dgrad(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t d = 0; d < std::min(s.stride.d, s.D); ++d)
      for (int64_t h = 0; h < std::min(s.stride.h, s.H); ++h)
        for (int64_t w = 0; w < std::min(s.stride.w, s.W); ++w) dgrad_residue<Element>(a, group, {d, h, w});
}

template <class Element>
void wgrad(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const int64_t total_m = s.group_k(), total_n = s.group_c() * s.taps(), total_k = s.N * s.out_cells();
  const int64_t pieces = conv_wgrad_igemm_pieces(s), depth = (total_k + pieces - 1) / pieces;
  // Sums over a batch are long, and a chain of float additions loses with its length: chains are kept short.
  constexpr int64_t kChain = 64;
  const Blocks blocks = Blocks::of<T>(total_m, total_n, depth, pieces * s.groups);
  const int64_t count_m = blocks.count_m(total_m), count_n = blocks.count_n(total_n);
  T* partial = static_cast<T*>(workspace);  // [pieces, K, total_n], where there is more than one piece
  auto* out = static_cast<Element*>(a.w.data);
  const auto place = [&](int64_t k, int64_t n) -> Element& {
    return out[k * a.w.n + tap_of_input(a, n).weight];
  };

  const double block_us = macs_us(double(blocks.m) * blocks.n * (depth + 8));
  parallel_for(s.groups * pieces * count_m * count_n, block_us, [&](int64_t task) {
    const int64_t block_m = task % count_m, block_n = task / count_m % count_n,
                  piece = task / (count_m * count_n) % pieces, group = task / (count_m * count_n * pieces);
    const int64_t first_k = group * s.group_k();
    const Gather<Element> input = gather_input<Element>(a, group);
    // The gradient gathered by a 1x1 filter: its "taps" are the output channels.
    const Gather<Element> gradient{
        static_cast<const Element*>(a.y.data), a.y, {s.Z, s.P, s.Q}, {s.Z, s.P, s.Q}, Extent3{}};
    const auto pack_a = [&](Span m, Span k, T* panels) {
      for (int64_t row = 0; row < m.size; row += kRows, panels += kRows * k.size) {
        const int64_t used = std::min<int64_t>(kRows, m.size - row);
        if (used < kRows) std::fill(panels, panels + kRows * k.size, T(0));
        gradient.runs(k, [&](int64_t first, int64_t size, int64_t n, int64_t z, int64_t p, int64_t q) {
          for (int64_t r = 0; r < used; ++r) {
            const Tap channel{(first_k + m.begin + row + r) * a.y.c, 0, 0, 0, 0};
            const Element* cells = gradient.row(channel, n, z, p, q);
            for (int64_t i = 0; i < size; ++i) panels[(first + i) * kRows + r] = T(cells[i * a.y.w]);
          }
        });
      }
    };
    const auto pack_b = [&](Span n, Span k, T* panels) {
      Tap taps[kBlockN];
      for (int64_t i = 0; i < n.size; ++i) taps[i] = tap_of_input(a, n.begin + i);
      input.pack_taps(k, taps, n.size, panels);
    };
    const auto store = [&](Span m, Span n, const T* c) {
      for (int64_t i = 0; i < m.size; ++i)
        for (int64_t j = 0; j < n.size; ++j) {
          const int64_t k = first_k + m.begin + i;
          const T value = c[i * kBlockN + j];
          if (pieces > 1) {
            partial[(piece * s.K + k) * total_n + n.begin + j] = value;
          } else {
            place(k, n.begin + j) = Element(value);
          }
        }
    };
    const int64_t begin = std::min(piece * depth, total_k);
    gemm_block<T>(block_of(block_m, blocks.m, total_m), block_of(block_n, blocks.n, total_n),
                  {begin, std::min(depth, total_k - begin)}, pack_a, pack_b, store, kChain);
  });
  if (pieces == 1) return;
  parallel_for(s.K * total_n, pieces * 2e-3, [&](int64_t i) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += double(partial[piece * s.K * total_n + i]);
    place(i / total_n, i % total_n) = narrow<Element>(sum);
  });
}

}  // namespace

void conv_fprop_igemm(const ConvArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { fprop<std::remove_pointer_t<decltype(t)>>(a); });
}

void conv_dgrad_igemm(const ConvArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { dgrad<std::remove_pointer_t<decltype(t)>>(a); });
}

void conv_wgrad_igemm(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { wgrad<std::remove_pointer_t<decltype(t)>>(a, workspace); });
  conv_bias_grad(a);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
