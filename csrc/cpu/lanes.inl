// SPDX-License-Identifier: MIT
// Tensors with the batch in the vector lanes: element i of a vector belongs to image i of a block of kLanes
// images. Every loop over such data is a loop over whole, aligned vectors, whatever the widths and strides of
// the layer; the price is a transposition on the way in and one on the way out, about 0.1 ns an element.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/vectors.h and cpu/lanes_plan.h,
// one copy each; it has no include guard.

#include "cpu/vectors.inl"

namespace {

// kLanes consecutive elements as numbers; offsets are integers in memory.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_numbers(const Element* from) {
  if constexpr (std::is_integral_v<Element>)
    return __builtin_convertvector(load<Lane<T>>(from), Vector<T>);
  else
    return load<T>(from);
}
template <class T, class Element>
[[gnu::always_inline]] inline void store_numbers(Vector<T> v, Element* to) {
  if constexpr (std::is_integral_v<Element>)
    store<Lane<T>>(__builtin_convertvector(v, Vector<Lane<T>>), to);
  else
    store<T>(v, to);
}

// A piece of a band and the images it belongs to: `rows` x `cols` pixels of all channels, from pixel (h, w)
// of the tensor, which lie at (top, left) in the band.
struct Piece {
  int64_t image;  // the first of the block
  int live;       // images in the block; the lanes past them are zero, and are not stored
  int64_t h, w, rows, cols, top, left;
};

// Elements that follow each other in an image: `rows` times `length` of them. Element i of row r has vector
// to + r * row_step + i * step. The same again for `planes` channels, `plane` elements and one vector apart.
struct Run {
  int64_t from, rows, length;
  int64_t to, row_step, step;
  int64_t planes = 1, plane = 0;

  int64_t vector(int64_t e) const { return to + e / length * row_step + e % length * step; }
};

// Calls f(run) for the runs that make up a piece.
template <class F>
void each_run(const View& tensor, const Band& band, const Piece& p, const F& f) {
  const int64_t from = p.h * tensor.h + p.w * tensor.w, to = band.at(p.top, p.left);
  const int64_t channels = band.channels, pixel = band.pitch(), row = band.at(1, 0);
  const bool whole = p.cols == band.cols;
  if ((channels == 1 || tensor.c == 1) && (p.cols == 1 || tensor.w == channels)) {
    if (whole && (p.rows == 1 || tensor.h == p.cols * channels))
      return f(Run{from, p.rows * p.cols, channels, to, pixel, 1});
    for (int64_t h = 0; h < p.rows; ++h)
      f(Run{from + h * tensor.h, p.cols, channels, to + h * row, pixel, 1});
  } else if (p.cols == 1 || tensor.w == 1) {
    const bool dense = p.rows == 1 || tensor.h == p.cols;
    if (dense && whole && tensor.c == p.rows * p.cols && tensor.c < 4 * kVectorBytes)
      return f(Run{from, channels, tensor.c, to, 1, pixel});  // small planes, as one run
    if (dense) return f(Run{from, p.rows, p.cols, to, row, pixel, channels, tensor.c});
    for (int64_t h = 0; h < p.rows; ++h)
      f(Run{from + h * tensor.h, 1, p.cols, to + h * row, 0, pixel, channels, tensor.c});
  } else {
    for (int64_t h = 0; h < p.rows; ++h)
      for (int64_t w = 0; w < p.cols; ++w)
        f(Run{from + h * tensor.h + w * tensor.w, 1, 1, to + h * row + w * pixel, 0, 0, channels, tensor.c});
  }
}

// Walks a run kLanes elements at a time: f(element, vector of each of them). The last step may overlap
// the one before. Fewer than kLanes elements in all are left to g(element, vector), one by one.
template <int lanes, class F, class G>
[[gnu::always_inline]] inline void walk(const Run& run, const F& f, const G& g) {
  const int64_t total = run.rows * run.length;
  if (total < lanes) {
    for (int64_t plane = 0; plane < run.planes; ++plane)
      for (int64_t e = 0; e < total; ++e) g(run.from + e + plane * run.plane, run.vector(e) + plane);
    return;
  }
  for (int64_t plane = 0; plane < run.planes; ++plane) {
    int64_t row = run.to + plane, col = 0, at = row;
    for (int64_t e = 0; e < total; e += lanes) {
      if (e > total - lanes) {
        e = total - lanes;
        row = run.to + plane + e / run.length * run.row_step, col = e % run.length;
        at = row + col * run.step;
      }
      int64_t vectors[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        vectors[i] = at;
        at += run.step;
        if (++col == run.length) col = 0, at = row += run.row_step;
      }
      f(run.from + e + plane * run.plane, vectors);
    }
  }
}

// Reads a piece of a tensor into a band.
template <class T, class Element>
void to_lanes(const View& tensor, const Band& band, const Piece& p, Vector<T>* out) {
  constexpr int lanes = kLanes<T>;
  const Element* images = static_cast<const Element*>(tensor.data) + p.image * tensor.n;
  each_run(tensor, band, p, [&](const Run& run) {
    walk<lanes>(
        run,
        [&](int64_t e, const int64_t* at) {
          Vector<T> r[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i)
            r[i] = i < p.live ? load_numbers<T>(images + i * tensor.n + e) : Vector<T>{};
          transpose<T>(r);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) out[at[i]] = r[i];
        },
        [&](int64_t e, int64_t at) {
          alignas(kVectorBytes) T values[lanes] = {};
          for (int i = 0; i < p.live; ++i) values[i] = T(images[i * tensor.n + e]);
          out[at] = load<T>(values);
        });
  });
}

// Writes a piece of a band to a tensor.
template <class T, class Element>
void from_lanes(const View& tensor, const Band& band, const Piece& p, const Vector<T>* in) {
  constexpr int lanes = kLanes<T>;
  Element* images = static_cast<Element*>(tensor.data) + p.image * tensor.n;
  each_run(tensor, band, p, [&](const Run& run) {
    walk<lanes>(
        run,
        [&](int64_t e, const int64_t* at) {
          Vector<T> r[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) r[i] = in[at[i]];
          transpose<T>(r);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i)
            if (i < p.live) store_numbers<T>(r[i], images + i * tensor.n + e);
        },
        [&](int64_t e, int64_t at) {
          for (int i = 0; i < p.live; ++i) images[i * tensor.n + e] = Element(in[at][i]);
        });
  });
}

}  // namespace
