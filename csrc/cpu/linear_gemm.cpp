// SPDX-License-Identifier: MIT
// Linear as matrix products of strided matrices, bias and ReLU applied as a block is stored.
//
//   fprop  y[M, N]  = x[M, K] w[N, K]^T      dgrad  gx[M, K] = gy[M, N] w[N, K]
//   wgrad  gw[N, K] = gy[M, N]^T x[M, K]
//
//   gemm  The columns of the result in the lanes. The left matrix is read where it is, an element at a
//         time into every lane; the right one is packed into panels of kVectors vectors once a call,
//         unless its rows are dense and met few times. The micro-tile is that of gemm.inl; 192 steps of
//         the sum at a time keep a panel in the first cache.
//   images  (fprop) gemm of y^T = w x^T: the rows of x in the lanes. It packs x, and reads w where it is.
//   dot   (fprop of few rows) The sum in the lanes, both matrices where they are: a tile of as many
//         outputs as there are lanes, whose sums turn into one vector. It reads w once for four rows of
//         x.
//
// The floor is the fused multiply-add rate, and for few rows the reading of w. On one core of a Zen 4, which
// multiplies 110 GFLOP/s, fprop of 64 rows reaches 65-95 % of it in gemm with AVX-512, over 90 % in images:
// 71 and 104 GFLOP/s at 4096 x 4096, 97 and 103 at 784 x 256. dot reaches 90 % at 8 to 32 rows.
#ifndef FASTCONV_ISA

#include "core/naive.h"
#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/linear_gemm.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/gemm.inl"
#include "cpu/vectors.inl"

namespace {

// Columns of the result are counted in vectors; a panel has as many as any other, or one more.
struct Panels {
  int64_t vectors, count, least, wider;

  Panels(int64_t columns, int64_t lanes, int64_t most)
      : vectors((columns + lanes - 1) / lanes),
        count((vectors + most - 1) / most),
        least(vectors / count),
        wider(vectors % count) {}
  Span at(int64_t i) const { return {i * least + std::min(i, wider), least + (i < wider)}; }
};

template <class T>
using Kernel = void (*)(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                        T* c, int64_t c_row, bool accumulate);

template <class T, int rows, int vectors, bool unit_row>
void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, T* c,
          int64_t c_row, bool accumulate) {
  micro_kernel<T, rows, vectors>(depth, a, unit_row ? 1 : a_row, a_step, b, b_step, c, c_row, accumulate);
}

// The tile of a run-time size.
template <class T, bool unit_row, int vectors, int rows>
Kernel<T> tile_of_rows(int64_t count) {
  if constexpr (rows > 1) {
    if (count < rows) return tile_of_rows<T, unit_row, vectors, rows - 1>(count);
  }
  return tile<T, rows, vectors, unit_row>;
}
template <class T, bool unit_row, int rows, int vectors>
Kernel<T> tile_of(int64_t row_count, int64_t vector_count) {
  if constexpr (vectors > 1) {
    if (vector_count < vectors) return tile_of<T, unit_row, rows, vectors - 1>(row_count, vector_count);
  }
  return tile_of_rows<T, unit_row, vectors, rows>(row_count);
}

// Few rows leave room for more vectors.
constexpr int kFewRows = kVectorBytes == 64 ? 4 : 2, kManyVectors = kVectorBytes == 64 ? 6 : 4;

// A panel of b, `vectors` wide, from row `k0`: out[k][lane].
template <class T, class Element>
void pack_panel(const Matrix& b, int64_t k0, int64_t column, int64_t columns, int64_t depth, int64_t vectors,
                T* out) {
  constexpr int lanes = kLanes<T>;
  const auto* from = static_cast<const Element*>(b.data) + k0 * b.row + column * b.col;
  const int64_t width = vectors * lanes;
  if (b.col == 1) {
    for (int64_t k = 0; k < depth; ++k, from += b.row, out += width)
      for (int64_t i = 0; i < width; i += lanes) store<T>(load_some<T>(from + i, columns - i), out + i);
    return;
  }
  int64_t k = 0;
  if (b.row == 1)
    for (; k + lanes <= depth; k += lanes)
      for (int64_t i = 0; i < width; i += lanes) {
        Vector<T> r[lanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane)
          r[lane] = i + lane < columns ? load<T>(from + (i + lane) * b.col + k) : Vector<T>{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) store<T>(r[lane], out + (k + lane) * width + i);
      }
  for (; k < depth; ++k)
    for (int64_t i = 0; i < width; ++i)
      out[k * width + i] = i < columns ? T(from[i * b.col + k * b.row]) : T(0);
}

// Rows of a as a tile: out[k][row].
template <class T, class Element>
void pack_rows(const Matrix& a, Span rows, int64_t depth, int64_t height, T* out) {
  const auto* from = static_cast<const Element*>(a.data) + rows.begin * a.row;
  const auto pack = [&](auto count, auto step) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < count; ++i) out[k * height + i] = T(from[k * a.col + i * step]);
  };
  if (a.row == 1 && rows.size == kRows)
    pack(std::integral_constant<int64_t, kRows>{}, std::integral_constant<int64_t, 1>{});
  else
    pack(rows.size, a.row);
}

// c[m, n] = act(bias[n] + sum over k of a[m, k] * b[k, n]); transposed: bias[m]
template <class Element, bool is_transposed = false>
void multiply(int64_t total_m, int64_t total_n, int64_t total_k, const Matrix& a, const Matrix& b,
              const Matrix& c, const Epilogue& epilogue, Dtype dtype, void* workspace) {
  using T = typename Compute<Element>::type;
  constexpr int lanes = kLanes<T>;
  if (total_m == 0 || total_n == 0) return;
  const bool b_in_place = linear_gemm_in_place(dtype, total_m, total_n, total_k, b),
             a_in_place = linear_gemm_rows_in_place(dtype, total_k, a);
  const bool few = total_m <= kFewRows;
  const int64_t height = few ? kFewRows : kRows;
  const Panels panels(
      total_n, lanes,
      std::min<int64_t>(few ? kManyVectors : kVectors, std::max<int64_t>(1, total_n / lanes)));
  // Another core's part of a packed x comes more slowly than packing it again.
  const bool b_shared = !is_transposed && linear_gemm_shares(total_m, b);
  T* packed_b = static_cast<T*>(workspace);  // panel after panel
  T* packed_a = packed_b + (b_shared ? total_k * panels.vectors * lanes : 0);
  if (b_shared)
    parallel_for(panels.count, double(total_k) * kVectors * lanes * 1e-4, [&](int64_t i) {
      const Span p = panels.at(i);
      pack_panel<T, Element>(b, 0, p.begin * lanes, std::min(p.size * lanes, total_n - p.begin * lanes),
                             total_k, p.size, packed_b + total_k * p.begin * lanes);
    });
  if (!a_in_place)
    parallel_for((total_m + height - 1) / height, double(total_k * height) * 2e-4, [&](int64_t i) {
      const Span rows = block_of(i, height, total_m);
      pack_rows<T, Element>(a, rows, total_k, height, packed_a + rows.begin * total_k);
    });

  const int64_t a_row = a_in_place ? a.row : 1, a_step = a_in_place ? a.col : height;
  const auto kernel_of = [&](int64_t rows, int64_t vectors) {
    if (few)
      return a_row == 1 ? tile_of<T, true, kFewRows, kManyVectors>(rows, vectors)
                        : tile_of<T, false, kFewRows, kManyVectors>(rows, vectors);
    return a_row == 1 ? tile_of<T, true, kRows, kVectors>(rows, vectors)
                      : tile_of<T, false, kRows, kVectors>(rows, vectors);
  };
  // Of a tile that is whole or the last, in a panel that is narrower or wider.
  const Kernel<T> kernels[2][2] = {
      {kernel_of(height, panels.least), kernel_of(height, panels.least + 1)},
      {kernel_of(total_m % height, panels.least), kernel_of(total_m % height, panels.least + 1)}};
  const auto* bias = static_cast<const Element*>(epilogue.bias);
  const bool plain = std::is_same_v<T, Element> && c.col == 1 && !bias && epilogue.act == Act::none;
  const int64_t steps = std::max<int64_t>(1, (total_k + kBlockK - 1) / kBlockK);
  const int64_t depth = std::max<int64_t>(1, (total_k + steps - 1) / steps);
  const auto block_times_panel = [&](Span m, int64_t panel) {
    const Span p = panels.at(panel);
    const int64_t width = p.size * lanes, column = p.begin * lanes,
                  columns = std::min(width, total_n - column);
    // A panel that is read in place and sticks out is moved back; what it shares with the one before is
    // dropped.
    const int64_t shift = b_in_place ? width - columns : 0;
    const int64_t b_step = b_in_place ? b.row : width;
    const bool direct = plain && columns == width;
    T* const scratch = direct && (b_in_place || b_shared) ? nullptr : static_cast<T*>(thread_scratch());
    T* out = direct ? static_cast<T*>(c.data) + m.begin * c.row + column : scratch;
    const int64_t out_row = direct ? c.row : width;
    const bool wider = p.size > panels.least;
    for (int64_t k = 0; k == 0 || k < total_k; k += depth) {
      const int64_t count = std::min(depth, total_k - k);
      const T* right = packed_b + total_k * column + k * width;
      if (b_in_place) {
        right = static_cast<const T*>(b.data) + k * b.row + column - shift;
      } else if (!b_shared) {
        T* panel_step = scratch + kLinearBlock * kVectors * lanes;
        pack_panel<T, Element>(b, k, column, columns, count, p.size, panel_step);
        right = panel_step;
      }
      for (int64_t i = 0; i < m.size; i += height) {
        const T* left = a_in_place ? static_cast<const T*>(a.data) + (m.begin + i) * a.row + k * a.col
                                   : packed_a + (m.begin + i) * total_k + k * height;
        kernels[i + height > m.size][wider](count, left, a_row, a_step, right, b_step, out + i * out_row,
                                            out_row, k > 0);
      }
    }
    if (direct) return;
    if constexpr (is_transposed) {  // a line of c is one of its columns
      for (int64_t j = 0; j < columns; ++j)
        with_step(c.row, [&](auto step) {
          Element* line = static_cast<Element*>(c.data) + (column + j) * c.col + m.begin * step;
          const T* sums = out + shift + j;
          for (int64_t i = 0; i < m.size; ++i)
            line[i * step] = Element(activated(sums[i * width], bias, m.begin + i, epilogue.act));
        });
      return;
    }
    for (int64_t i = 0; i < m.size; ++i)
      with_step(c.col, [&](auto step) {
        Element* line = static_cast<Element*>(c.data) + (m.begin + i) * c.row + column * step;
        const T* sums = out + i * width + shift;
        for (int64_t j = 0; j < columns; ++j)
          line[j * step] = Element(activated(sums[j], bias, column + j, epilogue.act));
      });
  };

  // A short sum is bound by its stores: whole rows of c one after the other. Else as many rows as leave
  // enough tasks to share out, equal parts, meet a panel of b, then the next.
  const bool whole_rows = total_k <= kFewLinear;
  const int64_t enough = whole_rows ? 16 : std::max<int64_t>(1, 6 / panels.count);
  const int64_t parts = std::max(enough, (total_m + kLinearBlock - 1) / kLinearBlock);
  const int64_t block = ((total_m + parts - 1) / parts + kRows - 1) / kRows * kRows;
  const int64_t blocks = (total_m + block - 1) / block;
  const double block_us =
      macs_us(double(block) * double(whole_rows ? total_n : kVectors * lanes) * double(total_k + 8));
  parallel_for(blocks * (whole_rows ? 1 : panels.count), block_us, [&](int64_t task) {
    if (!whole_rows)
      return block_times_panel(block_of(task / panels.count, block, total_m), task % panels.count);
    const Span m = block_of(task, block, total_m);
    for (int64_t i = 0; i < m.size; i += height)
      for (int64_t panel = 0; panel < panels.count; ++panel)
        block_times_panel({m.begin + i, std::min(height, m.size - i)}, panel);
  });
}

Matrix transposed(const Matrix& m) { return {m.data, m.col, m.row}; }

// --- dot

// `rows` rows of x by lanes / rows rows of w; rows past the end are read again, and not stored.
template <class T, class Element, int rows>
void dot_tile(const LinearArgs& a, int64_t m0, int64_t n0) {
  constexpr int lanes = kLanes<T>, columns = lanes / rows;
  const Element *x[rows], *w[columns];
  for (int i = 0; i < rows; ++i)
    x[i] = static_cast<const Element*>(a.x.data) + std::min(m0 + i, a.M - 1) * a.x.row;
  for (int j = 0; j < columns; ++j)
    w[j] = static_cast<const Element*>(a.w.data) + std::min(n0 + j, a.N - 1) * a.w.row;
  Vector<T> sum[lanes], total{};
  // The last vector is moved back; what the one before has added is zero in both factors.
  Vector<Lane<T>> fresh;
  for (int i = 0; i < lanes; ++i) fresh[i] = i >= lanes - a.K % lanes ? -1 : 0;
  const auto read = [&](const Element* from, auto moved) [[gnu::always_inline]] -> Vector<T> {
    const Vector<T> v = load<T>(from);
    return moved ? (Vector<T>)((Vector<Lane<T>>)v & fresh) : v;
  };
  const auto add = [&](int64_t k, auto moved) [[gnu::always_inline]] {
    Vector<T> left[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) left[i] = read(x[i] + k, moved);
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) {
      const Vector<T> right = read(w[j] + k, moved);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) sum[i * columns + j] += left[i] * right;
    }
  };
  // Chains of additions are kept short, for the rounding.
  constexpr int64_t kChain = 64 * lanes;
  for (int64_t k = 0; k < a.K;) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) sum[i] = Vector<T>{};
    const int64_t end = std::min(k + kChain, a.K);
    for (; k + lanes <= end; k += lanes) add(k, std::false_type{});
    if (k < end) add(a.K - lanes, std::true_type{}), k = end;
    total += sums_of<T>(sum);
  }
  const int64_t live = std::min<int64_t>(columns, a.N - n0);
  if (const auto* bias = static_cast<const Element*>(a.epilogue.bias)) {
    alignas(kVectorBytes) T added[lanes];
    for (int i = 0; i < lanes; ++i) added[i] = T(bias[n0 + std::min<int64_t>(i % columns, live - 1)]);
    total += load<T>(added);
  }
  if (a.epilogue.act == Act::relu) total = total <= T(0) ? Vector<T>{} : total;
  Element out[lanes];
  store<T>(total, out);
  for (int i = 0; i < rows && m0 + i < a.M; ++i) {
    Element* y = static_cast<Element*>(a.y.data) + (m0 + i) * a.y.row + n0 * a.y.col;
    if (a.y.col == 1 && live == columns)
      std::memcpy(y, out + i * columns, columns * sizeof(Element));
    else
      for (int64_t j = 0; j < live; ++j) y[j * a.y.col] = out[i * columns + j];
  }
}

template <class Element, int rows>
void dot(const LinearArgs& a) {
  using T = typename Compute<Element>::type;
  constexpr int columns = kLanes<T> / rows;
  const double tile_us = macs_us(double(a.M) * columns * a.K) + 0.02;
  parallel_for((a.N + columns - 1) / columns, tile_us, [&](int64_t n) {
    for (int64_t m = 0; m < a.M; m += rows) dot_tile<T, Element, rows>(a, m, n * columns);
  });
}

template <class Element>
void dot(const LinearArgs& a) {
  if (a.M == 1) return dot<Element, 1>(a);
  if constexpr (kVectorBytes > 16) {
    if (a.M > 2) return dot<Element, 4>(a);
  }
  dot<Element, 2>(a);
}

// --- the bias's half of wgrad

template <class Element>
void bias_grad(const LinearArgs& a) {
  constexpr int64_t kColumns = 16;
  parallel_for((a.N + kColumns - 1) / kColumns, double(a.M) * kColumns * 3e-4, [&](int64_t task) {
    const Span n = block_of(task, kColumns, a.N);
    const auto* first = static_cast<const Element*>(a.y.data) + n.begin;
    const auto add = [&](auto count) {
      naive::Sum<Element> sums[kColumns];
      for (int64_t m = 0; m < a.M; ++m)
        for (int64_t j = 0; j < count; ++j) sums[j] += naive::load(first[m * a.y.row + j]);
      for (int64_t j = 0; j < count; ++j)
        static_cast<Element*>(a.bias_grad)[n.begin + j] = narrow<Element>(sums[j]);
    };
    n.size == kColumns ? add(std::integral_constant<int64_t, kColumns>{}) : add(n.size);
  });
}

}  // namespace

void linear_fprop_gemm(const LinearArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>>(a.M, a.N, a.K, a.x, transposed(a.w), a.y, a.epilogue,
                                                 a.dtype, workspace);
  });
}

void linear_fprop_images(const LinearArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>, true>(a.N, a.M, a.K, a.w, transposed(a.x), transposed(a.y),
                                                       a.epilogue, a.dtype, workspace);
  });
}

void linear_fprop_dot(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) { dot<std::remove_pointer_t<decltype(t)>>(a); });
}

void linear_dgrad_gemm(const LinearArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>>(a.M, a.K, a.N, a.y, a.w, a.x, Epilogue{}, a.dtype,
                                                 workspace);
  });
}

void linear_wgrad_gemm(const LinearArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    multiply<Element>(a.N, a.K, a.M, transposed(a.y), a.x, a.w, Epilogue{}, a.dtype, workspace);
    if (a.bias_grad) a.y.col == 1 ? bias_grad<Element>(a) : linear_bias_grad(a);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
