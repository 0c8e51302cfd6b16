// SPDX-License-Identifier: MIT
// Slabs: the input rows of a block of channels that a block of outputs reads, as [channel][row][column] in
// the compute type, with zeros around the image. Columns are sorted by their residue modulo the stride, so
// that the inputs of neighbouring outputs at one tap lie side by side, whatever the layout, stride and
// padding.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/vectors.inl, one copy each; it has
// no include guard.

namespace {

struct Tap {
  int64_t h, w;    // from the first row and column that outputs read
  int64_t weight;  // offset in the filter
};

// A grid of outputs, and which inputs they read: output (p, q) at a tap reads row low_h + p * step_h + tap.h
// of its image, and the column likewise.
struct Grid {
  int64_t images, rows, cols;
  int64_t step_h, step_w, low_h, low_w;
  int64_t height, width;  // of the input
  int64_t span_h = 0, span_w = 0;
  const Tap* taps = nullptr;
  int64_t count = 0;

  void measure() {
    for (int64_t i = 0; i < count; ++i)
      span_h = std::max(span_h, taps[i].h + 1), span_w = std::max(span_w, taps[i].w + 1);
  }
  // No output reads outside the image.
  bool inside() const {
    return low_h >= 0 && low_w >= 0 && low_h + (rows - 1) * step_h + span_h <= height &&
           low_w + (cols - 1) * step_w + span_w <= width;
  }
};

// Consecutive rows of one image in a slab, from row `from` of the image.
struct Segment {
  int64_t image, from, rows, first;  // `first` row of the slab
};

// A slab's rows and columns; a channel is `size` elements.
struct SlabShape {
  int64_t residue, pitch, rows, size;  // of a residue's columns, of a row; rows in all

  SlabShape(const Grid& g, int64_t rows) : rows(rows) {
    residue = g.cols + (g.span_w - 1) / g.step_w;
    pitch = residue * g.step_w;
    size = rows * pitch;
  }
  int64_t tap(const Grid& g, const Tap& t) const {
    return t.h * pitch + t.w % g.step_w * residue + t.w / g.step_w;
  }
};

// Calls f(h, row of the slab) for the rows of a segment that some tap reads.
template <class F>
void slab_rows(const Grid& g, const Segment& segment, const F& f) {
  for (int64_t i = 0; i < segment.rows; ++i) {
    bool is_read = g.step_h == 1;
    for (int64_t t = 0; t < g.count && !is_read; ++t)
      is_read = i >= g.taps[t].h && (i - g.taps[t].h) % g.step_h == 0;
    if (is_read) f(segment.from + i, segment.first + i);
  }
}

// out[i] = in[i * step]
template <class T, class Element>
void copy_cells(const Element* in, int64_t step, int64_t count, T* out) {
  if (step == 1) {
    for (int64_t i = 0; i < count; i += kLanes<T>)
      store_some<T>(load_some<T>(in + i, count - i), out + i, count - i);
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(in[2 * i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = T(in[i * step]);
  }
}

// Channels side by side, one row of an image: blocks of lanes x lanes are transposed. A channel of `out` is
// `channel` elements from the next.
template <class T, class Element>
void transpose_row(const Element* in, int64_t pixel, int64_t width, int64_t channels, T* out,
                   int64_t channel) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t live = std::min<int64_t>(lanes, channels - c);
    for (int64_t w = 0; w < width; w += lanes) {
      if (width >= lanes) w = std::min(w, width - lanes);
      const int64_t count = std::min<int64_t>(lanes, width - w);
      Vector<T> r[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        r[i] = i < count ? load_some<T>(in + (w + i) * pixel + c, live) : Vector<T>{};
      transpose<T>(r);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (i < live) store_some<T>(r[i], out + (c + i) * channel + w, count);
    }
  }
}

// Reads `channels` channels into a slab that was zero. Cells beside the images stay as they are; so do rows
// above and below, which a slab that moves between bands has to `clear`.
template <class T, class Element>
void fill_slab(const Element* data, const View& view, const Grid& g, const SlabShape& shape,
               const Segment* segments, int64_t segment_count, int64_t channels, bool clear, T* out) {
  const int64_t end = g.low_w + (g.cols - 1) * g.step_w + g.span_w;  // of the columns that are read
  // Columns [begin, end) of each residue lie in the image.
  const auto columns = [&](int64_t residue) {
    const int64_t first = g.low_w + residue;
    const int64_t begin = first >= 0 ? 0 : (-first + g.step_w - 1) / g.step_w;
    const int64_t stop = std::min(g.width, end);
    return Rows{std::min(begin, shape.residue),
                first < stop ? std::min(shape.residue, (stop - first + g.step_w - 1) / g.step_w) : 0};
  };
  for (int64_t s = 0; s < segment_count; ++s)
    slab_rows(g, segments[s], [&](int64_t h, int64_t row) {
      if (h < 0 || h >= g.height) {
        for (int64_t c = 0; c < channels && clear; ++c)
          std::fill_n(out + c * shape.size + row * shape.pitch, shape.pitch, T(0));
        return;
      }
      const Element* line = data + segments[s].image * view.n + h * view.h;
      for (int64_t residue = 0; residue < g.step_w; ++residue) {
        const Rows in = columns(residue);
        if (in.size() <= 0) continue;
        T* to = out + row * shape.pitch + residue * shape.residue + in.begin;
        const Element* from = line + (g.low_w + residue + in.begin * g.step_w) * view.w;
        if (view.c == 1 && view.w != 1) {
          transpose_row<T>(from, g.step_w * view.w, in.size(), channels, to, shape.size);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c)
          copy_cells(from + c * view.c, g.step_w * view.w, in.size(), to + c * shape.size);
      }
    });
}

}  // namespace
