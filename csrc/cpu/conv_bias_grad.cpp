// SPDX-License-Identifier: MIT
// The bias half of wgrad, for every wgrad row but the naive one: the gradient summed over everything but its
// channel. Every 8 floats are added in float32, and what they sum up to in double.
//
//   pixels side by side    a task is a channel, with pixels in the vector lanes
//   channels side by side  a task is a block of 64 channels, in the lanes, and a piece of the pixels; pieces
//                          are added in a fixed order
//
// The floor is the time that reading takes.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "core/naive.h"
#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_bias_grad.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

namespace {

constexpr int kBlockVectors = 4;  // of elements in the compute type, that a task of channels has in its lanes
constexpr int64_t kMostPieces = 16, kLeastPixels = 512;  // of a piece

// Sums in the lanes of a vector of T. What additions of doubles round off is kept.
template <class T>
struct Sums {
  Vector<double> sum[sizeof(double) / sizeof(T)]{}, rest{};

  [[gnu::always_inline]] void add(Vector<T> v) {
    if constexpr (sizeof(T) == sizeof(double)) {
      const Vector<double> next = sum[0] + v, added = next - sum[0];
      rest += (sum[0] - (next - added)) + (v - added);
      sum[0] = next;
    } else {
      typedef T Half __attribute__((vector_size(kVectorBytes / 2)));
      Half halves[2];
      std::memcpy(halves, &v, sizeof v);
      sum[0] += __builtin_convertvector(halves[0], Vector<double>);
      sum[1] += __builtin_convertvector(halves[1], Vector<double>);
    }
  }
  // Adds lane i to out[i].
  template <class Element>
  void add_to(naive::Sum<Element>* out, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const double lane = sum[i / kLanes<double>][i % kLanes<double>];
      out[i] += lane;
      if (sizeof(T) == sizeof(double) && lane - lane == 0) out[i] += rest[i];
    }
  }
};

// Vectors that are added before their sum is: doubles keep all that is rounded off.
template <class T>
constexpr int kChain = sizeof(T) == sizeof(double) ? 1 : 8;

// Adds `count` elements that follow each other.
template <class T, class Element>
void add_run(const Element* from, int64_t count, Sums<T>& sums) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + kChain<T> * lanes <= count; i += kChain<T> * lanes) {
    Vector<T> chain = load<T>(from + i);
#pragma GCC unroll 8
    for (int j = 1; j < kChain<T>; ++j) chain += load<T>(from + i + j * lanes);
    sums.add(chain);
  }
  for (; i < count; i += lanes) sums.add(load_some<T>(from + i, count - i));
}

// The same for pixels of `vectors` vectors of channels, of which the last has `live`.
template <class T, int vectors, class Element>
void add_pixels(const Element* from, int64_t count, int64_t step, int64_t live, Sums<T>* sums) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += kChain<T>) {
    const int64_t size = std::min<int64_t>(kChain<T>, count - i);
    Vector<T> chain[vectors] = {};
    for (int64_t j = 0; j < size; ++j, from += step) {
#pragma GCC unroll 4
      for (int v = 0; v + 1 < vectors; ++v) chain[v] += load<T>(from + v * lanes);
      chain[vectors - 1] += load_some<T>(from + (vectors - 1) * lanes, live);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[v].add(chain[v]);
  }
}
template <class T, int most = kBlockVectors, class... Rest>
void some_pixels(int64_t vectors, const Rest&... rest) {
  if constexpr (most > 1) {
    if (vectors < most) return some_pixels<T, most - 1>(vectors, rest...);
  }
  add_pixels<T, most>(rest...);
}

// Calls f(row) for rows [begin, end) of pixels of a gradient, where row[0] belongs to channel k.
template <class Element, class F>
void each_row(const ConvArgs& a, int64_t k, int64_t begin, int64_t end, const F& f) {
  const ConvShape& s = a.shape;
  for (int64_t i = begin; i < end; ++i)
    f(static_cast<const Element*>(a.y.data) + i / (s.Z * s.P) * a.y.n + k * a.y.c + i / s.P % s.Z * a.y.d +
      i % s.P * a.y.h);
}

template <class Element>
void by_channels(const ConvArgs& a, int64_t rows) {
  using T = typename Compute<Element>::type;
  constexpr int64_t lanes = kLanes<T>, width = kBlockVectors * lanes;
  const ConvShape& s = a.shape;
  const int64_t blocks = (s.K + width - 1) / width;
  const int64_t pieces = std::clamp<int64_t>(std::min(rows, rows * s.Q / kLeastPixels), 1, kMostPieces);
  std::vector<naive::Sum<Element>> found(pieces * blocks * width);
  parallel_for(pieces * blocks, double(rows * s.Q * width / pieces) * 1e-4, [&](int64_t task) {
    const int64_t piece = task / blocks, first = task % blocks * width, count = std::min(width, s.K - first);
    const int64_t vectors = (count + lanes - 1) / lanes, live = count - (vectors - 1) * lanes;
    Sums<T> sums[kBlockVectors];
    each_row<Element>(a, first, rows * piece / pieces, rows * (piece + 1) / pieces,
                      [&](const Element* row) { some_pixels<T>(vectors, row, s.Q, a.y.w, live, &sums[0]); });
    for (int64_t v = 0; v < vectors; ++v) sums[v].add_to(found.data() + task * width + v * lanes, lanes);
  });
  for (int64_t k = 0; k < s.K; ++k) {
    naive::Sum<Element> sum;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += found[piece * blocks * width + k];
    static_cast<Element*>(a.bias_grad)[k] = narrow<Element>(sum);
  }
}

template <class Element>
void by_pixels(const ConvArgs& a, int64_t rows) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const bool whole = a.y.w == 1 && a.y.h == s.Q;  // planes are dense
  parallel_for(s.K, double(rows * s.Q) * 2e-4, [&](int64_t k) {
    Sums<T> sums;
    naive::Sum<Element> total, lanes[kLanes<T>];
    if (a.y.w != 1)
      each_row<Element>(a, k, 0, rows, [&](const Element* row) {
        for (int64_t q = 0; q < s.Q; ++q) total += naive::load(row[q * a.y.w]);
      });
    else if (whole)
      for (int64_t i = 0; i < rows; i += s.P)
        each_row<Element>(a, k, i, i + 1, [&](const Element* row) { add_run<T>(row, s.P * s.Q, sums); });
    else
      each_row<Element>(a, k, 0, rows, [&](const Element* row) { add_run<T>(row, s.Q, sums); });
    sums.add_to(lanes, kLanes<T>);
    for (const auto& lane : lanes) total += lane;
    static_cast<Element*>(a.bias_grad)[k] = narrow<Element>(total);
  });
}

}  // namespace

void conv_bias_grad(const ConvArgs& a) {
  if (!a.bias_grad) return;
  const int64_t rows = a.shape.N * a.shape.Z * a.shape.P;
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    a.y.c == 1 && a.y.w != 1 ? by_channels<Element>(a, rows) : by_pixels<Element>(a, rows);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
