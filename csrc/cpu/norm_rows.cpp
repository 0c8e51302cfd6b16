// SPDX-License-Identifier: MIT
// Batch-norm by the batch's own statistics, ReLU and 2x2/2 max-pool, or no pool, both passes in two steps.
//
//   forward   Sums x and its squares in double, counted from the channel's first element, so that a large
//             mean does not cancel. Then pools sign(scale) * (x - mean): what is greatest there is so behind
//             the affine map and the ReLU.
//   backward  Sums the gradients of the pooled elements, alone and times x - mean, x read at the offsets.
//             Then grad_x = scale * g + shift + slope * (x - mean), g the gradient at a maximum, else zero.
//
// Pixels lie in the lanes, or (channels_last) channels. A step goes through the tensors in the order of their
// elements, in pieces, whose sums are added in order. Of what the two steps move, a core with AVX-512 does
// 29 GB/s forward and 28-36 backward (12x12 planes: 15), channels_last 34 and 37; a copy in cache makes 70.
#ifndef FASTCONV_ISA

#include <cmath>

#include "core/naive.h"
#include "cpu/norm_plan.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/norm_rows.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/pool_rows.inl"

namespace {

#if defined(__x86_64__)
// All bits of the first `count` lanes, by which AVX2 masks.
template <class T, int... lane>
[[gnu::always_inline]] inline __m256i first_of(int64_t count, std::integer_sequence<int, lane...>) {
  const Vector<Lane<T>> lanes = {lane...};
  return (__m256i)(lanes < static_cast<Lane<T>>(std::min<int64_t>(count, kLanes<T>)));
}
template <class T>
[[gnu::always_inline]] inline __m256i first_of(int64_t count) {
  return first_of<T>(count, std::make_integer_sequence<int, kLanes<T>>{});
}
#endif

// load_lanes and store_lanes, but by AVX2's masks where it has them.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_first(const Element* from, int64_t count) {
  if (count >= kLanes<T>) return load<T>(from);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 32 && std::is_same_v<Element, float>)
    return (Vector<T>)_mm256_maskload_ps(from, first_of<T>(count));
  if constexpr (kVectorBytes == 32 && std::is_same_v<Element, double>)
    return (Vector<T>)_mm256_maskload_pd(from, first_of<T>(count));
#endif
  return load_lanes<T>(from, count);
}
template <class T, class Element>
[[gnu::always_inline]] inline void store_first(Vector<T> v, Element* to, int64_t count) {
  if (count >= kLanes<T>) return store<T>(v, to);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 32 && std::is_same_v<Element, float>)
    return _mm256_maskstore_ps(to, first_of<T>(count), (__m256)v);
  if constexpr (kVectorBytes == 32 && std::is_same_v<Element, double>)
    return _mm256_maskstore_pd(to, first_of<T>(count), (__m256d)v);
#endif
  store_lanes<T>(v, to, count);
}

// The i-th part of a vector, in double.
template <class T>
inline constexpr int kParts = sizeof(double) / sizeof(T);
template <class T, int i>
[[gnu::always_inline]] inline Vector<double> wide_part(Vector<T> v) {
  if constexpr (kParts<T> == 1) return v;
#if defined(__x86_64__)
  if constexpr (kParts<T> == 2 && kVectorBytes == 64)
    return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, i));
  if constexpr (kParts<T> == 2 && kVectorBytes == 32)
    return (Vector<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, i));
#endif
  Vector<double> part;
  for (int lane = 0; lane < kLanes<double>; ++lane) part[lane] = v[i * kLanes<double> + lane];
  return part;
}
// Calls f(std::integral_constant i) for each part.
template <class T, class F>
[[gnu::always_inline]] inline void each_part(const F& f) {
  f(std::integral_constant<int, 0>());
  if constexpr (kParts<T> == 2) f(std::integral_constant<int, 1>());
}

// Sums of a and of a * b in each lane, in double; those of double keep what each addition rounds off
// (TwoSum).
template <class T>
class Sums {
 public:
  [[gnu::always_inline]] void add(Vector<T> a, Vector<T> b) {
    each_part<T>([&](auto i) [[gnu::always_inline]] {
      const Vector<double> wide = wide_part<T, i>(a);
      add(i, wide, wide * wide_part<T, i>(b));
    });
  }
  // The same of a - start and its square.
  [[gnu::always_inline]] void add_distance(Vector<T> a, const Vector<double>* start) {
    each_part<T>([&](auto i) [[gnu::always_inline]] {
      const Vector<double> distance = wide_part<T, i>(a) - start[i];
      add(i, distance, distance * distance);
    });
  }
  // Over all lanes, added to one number.
  void add_up(double& plain_sum, double& product_sum) const {
    plain_sum += of_lanes(0), product_sum += of_lanes(1);
  }
  // A lane each.
  void add_to(double* plain_sums, double* product_sums) const {
    for (int i = 0; i < kParts<T>; ++i) {
      const int64_t at = i * kLanes<double>;
      store<double>(load<double>(plain_sums + at) + total(0, i), plain_sums + at);
      store<double>(load<double>(product_sums + at) + total(1, i), product_sums + at);
    }
  }

 private:
  [[gnu::always_inline]] void add(int i, Vector<double> plain, Vector<double> product) {
    add(sum_[0][i], rest_[0], plain), add(sum_[1][i], rest_[1], product);
  }
  [[gnu::always_inline]] static void add(Vector<double>& sum, Vector<double>& rest, Vector<double> x) {
    const Vector<double> before = sum;
    sum += x;
    if constexpr (kParts<T> == 1) {
      const Vector<double> added = sum - before;
      rest += (before - (sum - added)) + (x - added);
    }
  }
  double of_lanes(int which) const {
    Vector<double> sum = total(which, 0);
    if constexpr (kParts<T> == 2) sum += total(which, 1);
    double lanes[kLanes<double>];
    store<double>(sum, lanes);
    for (int half = kLanes<double> / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
  }
  // The rest of an infinite sum is NaN.
  Vector<double> total(int which, int i) const {
    return sum_[which][i] + (rest_[which] == rest_[which] ? rest_[which] : Vector<double>{});
  }

  Vector<double> sum_[2][kParts<T>] = {}, rest_[2] = {};
};

// A number of each channel: one for all lanes, or (step 1) one a lane.
template <class T>
[[gnu::always_inline]] inline Vector<T> of_channel(const T* table, int64_t step) {
  return step ? load<T>(table) : Vector<T>{} + *table;
}

// The numbers of each channel that the second step needs. Distances are from the mean as T has it, which is
// subtracted without rounding where x is near; what T can't hold of it is in `shift`.
template <class T>
struct ChannelTables {
  T *mean, *scale, *shift, *other;  // `other`: forward the sign of scale, backward the slope
  double *plain, *product;          // [pieces, channels]

  ChannelTables(void* workspace, const NormPlan& plan) {
    double* next = static_cast<double*>(workspace);
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    plain = take(plan.pieces * plan.channels), product = take(plan.pieces * plan.channels);
    for (T** table : {&mean, &scale, &shift, &other}) *table = reinterpret_cast<T*>(take(plan.channels));
  }
};

template <class T>
struct ChannelNumbers {
  Vector<T> mean, scale, shift, other;

  ChannelNumbers(const ChannelTables<T>& t, int64_t c, int64_t step)
      : mean(of_channel(t.mean + c, step)),
        scale(of_channel(t.scale + c, step)),
        shift(of_channel(t.shift + c, step)),
        other(of_channel(t.other + c, step)) {}
};

// Cells of a window that are loaded at once: one, or two rows of two. Where pixels are in the lanes, a vector
// holds that cell of each of its windows.
template <class T, int cells>
struct Cells {
  Vector<T> at[cells];
};

// A channel of an image, by windows.
template <class E>
struct Plane {
  E* base;
  int64_t h, w;

  Plane(const View& v, int64_t n, int64_t c)
      : base(static_cast<E*>(v.data) + n * v.n + c * v.c), h(v.h), w(v.w) {}
  [[gnu::always_inline]] E* at(int64_t p, int64_t q) const { return base + p * h + q * w; }
};

// Where a vector of windows lies: its first cell, `rows` and `columns` of cells (of all windows together
// where pixels are in the lanes, else of one), `lanes` of them in use.
template <class Element>
struct Place {
  Element* x;
  int64_t row_step, column_step, rows, columns, lanes;
};

template <class T, int cells, bool by_channels, class Element>
[[gnu::always_inline]] inline Cells<T, cells> load_cells(const Place<Element>& p) {
  Cells<T, cells> found = {};
  if constexpr (cells == 1) {
    found.at[0] = load_first<T>(p.x, p.lanes);
    return found;
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2 && cells == 4; ++r) {
    if (r >= p.rows) break;
    const auto* row = p.x + r * p.row_step;
    if constexpr (by_channels) {
      for (int s = 0; s < 2 && s < p.columns; ++s)
        found.at[2 * r + s] = load_first<T>(row + s * p.column_step, p.lanes);
    } else {
      const Vector<T> low = load_first<T>(row, p.columns),
                      high = load_first<T>(row + kLanes<T>, p.columns - kLanes<T>);
      found.at[2 * r] = alternate<T, false>(low, high), found.at[2 * r + 1] = alternate<T, true>(low, high);
    }
  }
  return found;
}

template <class T, int cells, bool by_channels, class Element>
[[gnu::always_inline]] inline void store_cells(const Cells<T, cells>& v, const Place<Element>& p) {
  if constexpr (cells == 1) return store_first<T>(v.at[0], p.x, p.lanes);
#pragma GCC unroll 2
  for (int r = 0; r < 2 && cells == 4; ++r) {
    if (r >= p.rows) break;
    auto* row = p.x + r * p.row_step;
    if constexpr (by_channels) {
      for (int s = 0; s < 2 && s < p.columns; ++s)
        store_first<T>(v.at[2 * r + s], row + s * p.column_step, p.lanes);
    } else {
      store_first<T>(interleave<T, false>(v.at[2 * r], v.at[2 * r + 1]), row, p.columns);
      store_first<T>(interleave<T, true>(v.at[2 * r], v.at[2 * r + 1]), row + kLanes<T>,
                     p.columns - kLanes<T>);
    }
  }
}

template <class Element, int cells, bool by_channels>
class Norm {
  using T = typename Compute<Element>::type;
  using Offsets = Vector<Lane<T>>;
  static constexpr int64_t kSide = cells == 1 ? 1 : 2;    // of a window
  static constexpr int64_t kStep = by_channels;           // of tables from lane to lane
  static constexpr int kRounds = kParts<T> == 1 ? 2 : 1;  // double has nothing wider to be summed in

 public:
  Norm(const NormArgs& a, const NormBackwardArgs* backward, void* workspace)
      : a_(a), b_(backward), plan_(a), t_(workspace, plan_), count_(double(a.N * a.cells())) {
    const auto dense = [&](const View& v) { return !v.data || a.H == 1 || v.h == a.W; };
    x_is_dense_ = dense(a.x);
    flat_ = !by_channels && cells == 1 && x_is_dense_ && dense(a.y) &&
            (!b_ || (dense(b_->grad_y) && dense(b_->grad_x)));
  }

  void forward() const {
    for (int round = 0; round < kRounds; ++round) {
      each_piece([&](int64_t piece) { sum_inputs(piece, round); });
      for (int64_t c = 0; c < a_.C; ++c) finish_statistics(c, round);
    }
    each_piece([&](int64_t piece) {
      each_lines(piece, false, [&](int64_t n, int64_t c, const Rows& rows) { pool_lines(n, c, rows); });
    });
  }

  void backward() const {
    each_piece([&](int64_t piece) { sum_gradients(piece); });
    for (int64_t c = 0; c < a_.C; ++c) finish_gradients(c);
    if (!b_->grad_x.data) return;
    each_piece([&](int64_t piece) {
      each_lines(piece, true, [&](int64_t n, int64_t c, const Rows& rows) { gradient_lines(n, c, rows); });
    });
  }

 private:
  template <class Body>
  void each_piece(const Body& body) const {
    parallel_for(plan_.pieces, count_ * double(a_.C) / double(plan_.pieces) * 2e-4, body);
  }

  // Rows of windows, or, where `whole`, also the last row of an odd height that no window has.
  int64_t line_rows(bool whole) const {
    if (flat_) return 1;
    return whole ? (a_.H + kSide - 1) / kSide : a_.window.out.h;
  }
  // Calls body(n, c, rows of windows) for all of a piece: with a plane at a time, or a row of all channels
  // from c = 0 on.
  template <class Body>
  void each_lines(int64_t piece, bool whole, const Body& body) const {
    const int64_t begin = part_begin(piece, plan_.pieces, plan_.lines),
                  end = part_begin(piece + 1, plan_.pieces, plan_.lines), rows = line_rows(whole);
    if constexpr (by_channels) {
      const int64_t each = (a_.H + kSide - 1) / kSide;
      for (int64_t i = begin; i < end; ++i)
        if (i % each < rows) body(i / each, 0, Rows{i % each, i % each + 1});
    } else {
      for (int64_t i = begin; i < end; ++i) body(i / a_.C, i % a_.C, Rows{0, rows});
    }
  }

  // Calls body(c) for the first channel of each vector of them, or for the one.
  template <class Body>
  [[gnu::always_inline]] void each_block(int64_t c, const Body& body) const {
    if constexpr (!by_channels) return body(c);
    for (int64_t k = 0; k < a_.C; k += kLanes<T>) body(k);
  }

  // Calls body(place, p, q) for the vectors of rows of windows of `v`; (p, q) is the first window. Where
  // `whole`, also those of the last column of an odd width.
  template <class E, class Body>
  [[gnu::always_inline]] void each_window(const View& v, int64_t n, int64_t c, const Rows& lines, bool whole,
                                          const Body& body) const {
    const int64_t width = flat_ ? a_.cells() : a_.W;
    const int64_t used = whole || cells == 1 ? width : a_.window.out.w * kSide;
    const int64_t row_step = v.h, column_step = v.w, channels = a_.C - c, height = a_.H;
    E* row = static_cast<E*>(v.data) + n * v.n + c * v.c + lines.begin * kSide * row_step;
    for (int64_t p = lines.begin; p < lines.end; ++p, row += kSide * row_step) {
      const int64_t rows = std::min(kSide, height - p * kSide);
      if constexpr (by_channels) {
        E* x = row;
        for (int64_t w = 0; w < used; w += kSide, x += kSide * column_step)
          body(Place<E>{x, row_step, column_step, rows, std::min(kSide, width - w), channels}, p, w / kSide);
      } else {
        for (int64_t w = 0; w < used; w += kSide * kLanes<T>)
          body(Place<E>{row + w, row_step, 1, rows, width - w, width - w}, p, w / kSide);
      }
    }
  }

  // How many lanes a vector of windows from (p, q) on has in use.
  struct Outputs {
    int64_t rows, columns, channels;

    [[gnu::always_inline]] int64_t operator()(int64_t p, int64_t q) const {
      if (p >= rows) return 0;
      return !by_channels ? columns - q : q < columns ? channels : 0;
    }
  };
  Outputs outputs_from(int64_t c) const {
    if (flat_) return {1, a_.cells(), 1};
    return {a_.window.out.h, a_.window.out.w, a_.C - c};
  }

  // --- forward

  // Where the sums of a channel start: at its first element, or the mean of the round before; at zero where
  // that is infinite or NaN.
  double start_of(int64_t c, int round) const {
    if (a_.N == 0) return 0;
    const double start = round ? a_.mean[c] : naive::load(naive::at<Element>(a_.x, 0, c, 0, 0, 0));
    return start - start == 0 ? start : 0;
  }

  // A piece's sums, which begin at zero.
  double* piece_sums(double* all, int64_t piece) const {
    double* sums = all + piece * plan_.channels;
    std::fill(sums, sums + plan_.channels, 0);
    return sums;
  }
  // Adds a vector's sums to those of its channel, or its channels.
  [[gnu::always_inline]] static void collect(const Sums<T>& sums, double* plain, double* product) {
    if constexpr (by_channels)
      sums.add_to(plain, product);
    else
      sums.add_up(*plain, *product);
  }

  void sum_inputs(int64_t piece, int round) const {
    double *plain = piece_sums(t_.plain, piece), *product = piece_sums(t_.product, piece);
    double* starts = static_cast<double*>(thread_scratch(plan_.channels * int64_t(sizeof(double))));
    for (int64_t c = 0; c < plan_.channels; ++c) starts[c] = c < a_.C ? start_of(c, round) : 0;
    each_lines(piece, true, [&](int64_t n, int64_t c, const Rows& lines) {
      each_block(c, [&](int64_t k) {
        Vector<double> start[kParts<T>];
        for (int i = 0; i < kParts<T>; ++i)
          start[i] = of_channel(starts + k + kStep * i * kLanes<double>, kStep);
        Sums<T> sums;
        if constexpr (by_channels) {
          const int64_t lanes = a_.C - k, step = a_.x.w;
          for (int64_t r = lines.begin * kSide; r < std::min(a_.H, lines.end * kSide); ++r) {
            const Element* x = &naive::at<Element>(a_.x, n, k, 0, r, 0);
            for (int64_t w = 0; w < a_.W; ++w, x += step) sums.add_distance(load_first<T>(x, lanes), start);
          }
        } else {
          const int64_t rows = x_is_dense_ ? 1 : a_.H, length = a_.cells() / rows;
          for (int64_t r = 0; r < rows; ++r) {
            const Element* x = &naive::at<Element>(a_.x, n, k, 0, r, 0);
            int64_t i = 0;
            for (; i + kLanes<T> <= length; i += kLanes<T>) sums.add_distance(load<T>(x + i), start);
            for (; i < length; ++i) {
              const double distance = naive::load(x[i]) - starts[k];
              plain[k] += distance, product[k] += distance * distance;
            }
          }
        }
        collect(sums, plain + k, product + k);
      });
    });
  }

  // Adds up the pieces' sums of a channel.
  double add_up(const double* sums, int64_t c) const {
    double sum = 0;
    for (int64_t piece = 0; piece < plan_.pieces; ++piece) sum += sums[piece * plan_.channels + c];
    return sum;
  }

  void finish_statistics(int64_t c, int round) const {
    const double plain = add_up(t_.plain, c), product = add_up(t_.product, c), from_start = plain / count_;
    const double variance = product / count_ - from_start * from_start;
    const double mean = start_of(c, round) + from_start;
    const double invstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + a_.eps);
    a_.mean[c] = mean, a_.invstd[c] = invstd;
    const double scale = naive::norm_scale<Element>(a_, c, invstd);
    t_.mean[c] = static_cast<T>(mean);
    t_.scale[c] = static_cast<T>(std::fabs(scale));
    t_.other[c] = static_cast<T>(scale > 0 ? 1 : scale < 0 ? -1 : 0 * scale);
    const double bias = a_.bias ? naive::load(static_cast<const Element*>(a_.bias)[c]) : 0;
    t_.shift[c] = static_cast<T>(bias - (mean - double(t_.mean[c])) * scale);
  }

  // The greatest of a window's cells: the first of equals, the last of NaN.
  static void take(Vector<T> value, int cell, Vector<T>& best, Offsets& offset) {
    const auto better = (value > best) | (value != value);
    best = better ? value : best;
    offset = better ? Offsets{} + cell : offset;
  }

  void pool_lines(int64_t n, int64_t c, const Rows& lines) const {
    const bool relu = a_.act == Act::relu;
    each_block(c, [&](int64_t k) [[gnu::always_inline]] {
      const ChannelNumbers<T> each(t_, k, kStep);
      const Outputs outputs = outputs_from(k);
      const Plane<Element> y(a_.y, n, k);
      const Plane<uint8_t> offsets(a_.offsets, n, k);
      const auto pool = [&](const auto& place, int64_t p, int64_t q) [[gnu::always_inline]] {
        const auto x = load_cells<T, cells, by_channels>(place);
        Vector<T> best = each.other * (x.at[0] - each.mean);
        Offsets offset{};
#pragma GCC unroll 3
        for (int i = 1; i < cells; ++i) take(each.other * (x.at[i] - each.mean), i, best, offset);
        Vector<T> value = each.scale * best + each.shift;
        if (relu) value = value <= 0 ? Vector<T>{} : value;
        const int64_t count = outputs(p, q);
        store_first<T>(value, y.at(p, q), count);
        if constexpr (cells > 1) store_first<Lane<T>>(offset, offsets.at(p, q), count);
      };
      each_window<const Element>(a_.x, n, k, lines, false, pool);
    });
  }

  // --- backward

  // What backward reads of a channel's windows.
  struct Gradients {
    Plane<const Element> grad, y;
    Plane<const uint8_t> offsets;
    bool relu;

    // The gradient behind the act, zero in lanes that have none.
    [[gnu::always_inline]] Vector<T> at(int64_t p, int64_t q, int64_t count) const {
      const Vector<T> g = load_first<T>(grad.at(p, q), count);
      if (!relu) return g;
      return load_first<T>(y.at(p, q), count) <= 0 ? Vector<T>{} : g;
    }
    [[gnu::always_inline]] Offsets offset(int64_t p, int64_t q, int64_t count) const {
      if constexpr (cells == 1) return Offsets{};
      return load_first<Lane<T>>(offsets.at(p, q), count);
    }
  };
  Gradients gradients(int64_t n, int64_t c) const {
    return {{b_->grad_y, n, c}, {a_.y, n, c}, {a_.offsets, n, c}, a_.act == Act::relu};
  }

  void sum_gradients(int64_t piece) const {
    double *plain = piece_sums(t_.plain, piece), *product = piece_sums(t_.product, piece);
    each_lines(piece, false, [&](int64_t n, int64_t c, const Rows& lines) {
      each_block(c, [&](int64_t k) [[gnu::always_inline]] {
        const Vector<T> mean = mean_of(k);
        const Outputs outputs = outputs_from(k);
        const Gradients from = gradients(n, k);
        Sums<T> sums;
        const auto sum = [&](const auto& place, int64_t p, int64_t q) [[gnu::always_inline]] {
          const int64_t count = outputs(p, q);
          const auto x = load_cells<T, cells, by_channels>(place);
          const Offsets offset = from.offset(p, q, count);
          Vector<T> at_offset = x.at[0];
#pragma GCC unroll 3
          for (int i = 1; i < cells; ++i) at_offset = offset == i ? x.at[i] : at_offset;
          sums.add(from.at(p, q, count), at_offset - mean);
        };
        each_window<const Element>(a_.x, n, k, lines, false, sum);
        collect(sums, plain + k, product + k);
      });
    });
  }

  // The mean as T has it, of each lane.
  [[gnu::always_inline]] Vector<T> mean_of(int64_t k) const {
    if constexpr (!by_channels) return Vector<T>{} + static_cast<T>(a_.mean[k]);
    Vector<T> mean{};
    for (int64_t i = 0; i < std::min<int64_t>(kLanes<T>, a_.C - k); ++i)
      mean[i] = static_cast<T>(a_.mean[k + i]);
    return mean;
  }

  void finish_gradients(int64_t c) const {
    const double invstd = a_.invstd[c], scale = naive::norm_scale<Element>(a_, c, invstd);
    t_.mean[c] = static_cast<T>(a_.mean[c]);
    const double rest = a_.mean[c] - double(t_.mean[c]);
    const double grad_b = add_up(t_.plain, c);
    const double grad_w = invstd * (add_up(t_.product, c) - rest * grad_b);
    if (b_->grad_b) static_cast<Element*>(b_->grad_b)[c] = narrow<Element>(grad_b);
    if (b_->grad_w) static_cast<Element*>(b_->grad_w)[c] = narrow<Element>(grad_w);
    const double slope = -scale * invstd * grad_w / count_;
    t_.scale[c] = static_cast<T>(scale);
    t_.other[c] = static_cast<T>(slope);
    t_.shift[c] = static_cast<T>(-scale * grad_b / count_ - rest * slope);
  }

  void gradient_lines(int64_t n, int64_t c, const Rows& lines) const {
    each_block(c, [&](int64_t k) [[gnu::always_inline]] {
      const ChannelNumbers<T> each(t_, k, kStep);
      const Outputs outputs = outputs_from(k);
      const Gradients from = gradients(n, k);
      const Plane<Element> to(b_->grad_x, n, k);
      const auto write = [&](const auto& place, int64_t p, int64_t q) [[gnu::always_inline]] {
        const int64_t count = outputs(p, q);
        auto x = load_cells<T, cells, by_channels>(place);
        Vector<T> g{};
        Offsets offset{};
        if (count > 0) g = each.scale * from.at(p, q, count), offset = from.offset(p, q, count);
#pragma GCC unroll 4
        for (int i = 0; i < cells; ++i) {
          const Vector<T> here = cells == 1 ? g : offset == i ? g : Vector<T>{};
          x.at[i] = here + (each.shift + each.other * (x.at[i] - each.mean));
        }
        const Place<Element> written = {
            to.at(kSide * p, kSide * q), to.h, to.w, place.rows, place.columns, place.lanes};
        store_cells<T, cells, by_channels>(x, written);
      };
      each_window<const Element>(a_.x, n, k, lines, true, write);
    });
  }

  const NormArgs& a_;
  const NormBackwardArgs* b_;
  const NormPlan plan_;
  const ChannelTables<T> t_;
  const double count_;
  bool x_is_dense_, flat_;  // planes are one row each; of all tensors, and nothing pools
};

template <class F>
void with_norm(const NormArgs& a, const NormBackwardArgs* b, void* workspace, const F& f) {
  const NormPlan plan(a);
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    if (plan.by_channels && plan.pools) return f(Norm<Element, 4, true>(a, b, workspace));
    if (plan.by_channels) return f(Norm<Element, 1, true>(a, b, workspace));
    if (plan.pools) return f(Norm<Element, 4, false>(a, b, workspace));
    f(Norm<Element, 1, false>(a, b, workspace));
  });
}

}  // namespace

void norm_act_pool_rows(const NormArgs& a, void* workspace, void*) {
  with_norm(a, nullptr, workspace, [](auto&& norm) { norm.forward(); });
}

void norm_act_pool_backward_rows(const NormBackwardArgs& a, void* workspace, void*) {
  with_norm(a.norm, &a, workspace, [](auto&& norm) { norm.backward(); });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
