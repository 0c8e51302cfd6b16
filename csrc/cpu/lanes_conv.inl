// SPDX-License-Identifier: MIT
// Convolution of bands, ReLU and max-pool behind it, and their gradients: the pieces that conv_lanes.cpp and
// chain_lanes.cpp share. Their tiles are described in conv_lanes.cpp.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/lanes_plan.h and cpu/vectors.h,
// one copy each; it has no include guard.

#include "cpu/lanes.inl"

namespace {

// Sums in registers: 24 of 32 with AVX-512, 8 or 9 of 16 elsewhere.
constexpr int kChannels = kVectorBytes == 64 ? 6 : 2;
constexpr int kSums = kVectorBytes == 64 ? 24 : 9;
// Taps, or in wgrad pixels, that are summed one after the other; longer sums are sums of such sums, which
// round less. What wgrad reads for kPixels of one tile stays in the first-level cache. float64 is there to be
// exact.
template <class T>
constexpr int64_t kDepth = sizeof(T) == 8 ? 16 : 128;
template <class T>
constexpr int64_t kPixels = sizeof(T) == 8 ? 16 : 64;

// Arrays of a task, in the scratch of its thread.
template <class Arrays, class... Sizes>
Arrays in_scratch(const Sizes&... sizes) {
  Carver carver(thread_scratch(bytes_of<Arrays>(sizes...)));
  return Arrays(carver, sizes...);
}

// The i-th block of images.
template <class T>
struct Block {
  int64_t image;
  int live;

  Block(int64_t i, int64_t images)
      : image(i * kLanes<T>), live(static_cast<int>(std::min<int64_t>(kLanes<T>, images - image))) {}
  static int64_t count(int64_t images) { return (images + kLanes<T> - 1) / kLanes<T>; }
};

// --- bands

// Zeros in a band around the rectangle of rows and columns, as far as `margin` pixels away.
template <class V>
void zero_frame(const Band& band, const Rows& rows, const Rows& cols, V* out, int64_t margin = 1 << 30) {
  const int64_t left = std::max<int64_t>(0, cols.begin - margin);
  const int64_t right = std::min(band.cols, cols.end + margin);
  const bool whole = cols.begin <= left && cols.end >= right;
  const int64_t end = std::min(band.rows, rows.end + margin);
  for (int64_t h = std::max<int64_t>(0, rows.begin - margin); h < end; ++h) {
    if (h < rows.begin || h >= rows.end) {
      std::fill(out + band.at(h, left), out + band.at(h, right), V{});
    } else if (!whole) {
      std::fill(out + band.at(h, left), out + band.at(h, cols.begin), V{});
      std::fill(out + band.at(h, cols.end), out + band.at(h, right), V{});
    }
  }
}

// Reads pixels of a tensor of height x width into a band whose first pixel is (h, w) there; pixels outside
// the tensor are zero.
template <class T, class Element>
void read_band(const View& tensor, int64_t height, int64_t width, const Band& band, int64_t h, int64_t w,
               const Block<T>& block, Vector<T>* out) {
  const Rows rows = inside(h, band.rows, height), cols = inside(w, band.cols, width);
  zero_frame(band, rows, cols, out);
  if (rows.size() > 0 && cols.size() > 0)
    to_lanes<T, Element>(tensor, band,
                         {block.image, block.live, h + rows.begin, w + cols.begin, rows.size(), cols.size(),
                          rows.begin, cols.begin},
                         out);
}

// Writes a band of whole rows, from row h of the tensor.
template <class T, class Element>
void write_band(const View& tensor, const Band& band, int64_t h, const Block<T>& block, const Vector<T>* in) {
  from_lanes<T, Element>(tensor, band, {block.image, block.live, h, 0, band.rows, band.cols, 0, 0}, in);
}

// --- the tile of fprop and dgrad

// The vector `bytes` after another: tables hold distances in bytes, which an address takes as they are.
// Vectors of a band are aligned, those of a strip (conv_windows.cpp) are not.
template <class T>
[[gnu::always_inline]] inline Vector<T> vector_at(const Vector<T>* base, int64_t bytes) {
  return load<T>(reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes));
}
inline int32_t bytes_of(int64_t vectors) { return static_cast<int32_t>(vectors * kVectorBytes); }

// A filter for a run of output channels. Its taps are rows x cols x depth input channels; weights are packed
// [part of the output channels][tap][channel].
template <class T>
struct Filter {
  int64_t channels, rows, cols, depth;
  const int32_t* offsets;  // of each tap, bytes in the input band
  const T* weights;

  int64_t taps() const { return rows * cols * depth; }
  int64_t parts() const { return (channels + kChannels - 1) / kChannels; }
  int64_t part(int64_t i) const { return part_begin(i, parts(), channels); }

  // Packs one tap's weights, weight(k), into `out`.
  template <class Weight>
  void fill(T* out, int64_t tap, const Weight& weight) const {
    for (int64_t i = 0; i < parts(); ++i) {
      const int64_t k = part(i), width = part(i + 1) - k;
      for (int64_t j = 0; j < width; ++j) out[k * taps() + tap * width + j] = weight(k + j);
    }
  }
};

template <class T>
[[gnu::always_inline]] inline bool has_nan(Vector<T> v) {
  typedef long long Words __attribute__((vector_size(kVectorBytes)));
  const Words is_nan = reinterpret_cast<Words>(v != v);
  long long any = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) any |= is_nan[i];
  return any != 0;
}

template <class T, int channels>
struct Tile {
  Vector<T> sums[channels][kPositions];

  [[gnu::always_inline]] void clear() {
#pragma GCC unroll 6
    for (int k = 0; k < channels; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) sums[k][j] = Vector<T>{};
  }
  // sums[k][j] += weights[tap][k] * x[j][tap], for each tap
  [[gnu::always_inline]] void add(const Vector<T>* const (&x)[kPositions], const int32_t* taps, int64_t count,
                                  const T* weights) {
    for (int64_t t = 0; t < count; ++t, weights += channels) {
      const int64_t tap = taps[t];
      const Vector<T> v0 = vector_at<T>(x[0], tap), v1 = vector_at<T>(x[1], tap),
                      v2 = vector_at<T>(x[2], tap), v3 = vector_at<T>(x[3], tap);
#pragma GCC unroll 6
      for (int k = 0; k < channels; ++k) {
        sums[k][0] += weights[k] * v0;
        sums[k][1] += weights[k] * v1;
        sums[k][2] += weights[k] * v2;
        sums[k][3] += weights[k] * v3;
      }
    }
  }
  [[gnu::always_inline]] void add(const Tile& other) {
#pragma GCC unroll 6
    for (int k = 0; k < channels; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) sums[k][j] += other.sums[k][j];
  }
  [[gnu::always_inline]] void add_bias(const T* bias) {
#pragma GCC unroll 6
    for (int k = 0; k < channels; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j) sums[k][j] += bias[k];
  }
  [[gnu::always_inline]] bool may_have_nan() const {
    Vector<T> all{};
#pragma GCC unroll 6
    for (int k = 0; k < channels; ++k) all += (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
    return has_nan<T>(all);
  }
};

// The sum over the taps that a tile reaches.
template <class T, int channels>
[[gnu::always_inline]] inline void sum_taps(const Filter<T>& f, const T* weights, const Reach& reach,
                                            const Vector<T>* const (&x)[kPositions],
                                            Tile<T, channels>& tile) {
  const int64_t row = f.cols * f.depth;
  const bool whole_rows = reach.s.size() == f.cols;
  const int64_t runs = whole_rows ? 1 : reach.r.size();
  const int64_t length = whole_rows ? reach.r.size() * row : reach.s.size() * f.depth;
  const int64_t first = reach.r.begin * row + reach.s.begin * f.depth;
  Tile<T, channels> total;
  bool has_total = false;
  int64_t room = kDepth<T>;
  tile.clear();
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t t = first + run * row, end = t + length; t < end;) {
      const int64_t count = std::min(room, end - t);
      tile.add(x, f.offsets + t, count, weights + t * channels);
      t += count, room -= count;
      if (room > 0) continue;
      if (has_total) tile.add(total);
      total = tile;
      tile.clear();
      has_total = true;
      room = kDepth<T>;
    }
  if (has_total) tile.add(total);
}

template <class T>
[[gnu::always_inline]] inline Vector<T> activated(Vector<T> v, Act act) {
  return act == Act::relu ? (v <= 0 ? Vector<T>{} : v) : v;
}

// One candidate of a window: the first of equals stays, NaN wins, the last NaN most.
template <class T>
[[gnu::always_inline]] inline void take_larger(Vector<T> v, T cell, Vector<T>& best, Vector<T>& offset) {
  const auto take = (v > best) | (v != v);
  best = take ? v : best;
  offset = take ? Vector<T>{} + cell : offset;
}

// What becomes of sums: y[to + k] = act(sum + bias[k]), or the maximum of each tile of these.
template <class T>
struct Finish {
  const T* bias;
  Act act;
  bool pools;  // four pixels into one
  Vector<T>* y;
  Vector<T>* offsets;  // like y, or null

  // The maximum of the four pixels of a tile, where none is NaN. ReLU and maximum change places: it is zero
  // where no pixel is positive, and then the first of them is taken.
  [[gnu::always_inline]] void pool(const Vector<T> (&v)[kPositions], int64_t at) const {
    const auto right = v[1] > v[0], below_right = v[3] > v[2];
    const Vector<T> above = right ? v[1] : v[0], below = below_right ? v[3] : v[2];
    const auto lower = below > above;
    const Vector<T> best = lower ? below : above;
    y[at] = activated<T>(best, act);
    if (!offsets) return;
    const Vector<T> one = Vector<T>{} + T(1), two = one + one, three = two + one;
    const Vector<T> offset = lower ? (below_right ? three : two) : (right ? one : Vector<T>{});
    offsets[at] = act == Act::relu ? (best <= 0 ? Vector<T>{} : offset) : offset;
  }
  // The same, where there may be NaN.
  void pool_nan(const Vector<T> (&v)[kPositions], int64_t at) const {
    Vector<T> best = activated<T>(v[0], act), offset{};
    for (int j = 1; j < kPositions; ++j) take_larger<T>(activated<T>(v[j], act), T(j), best, offset);
    y[at] = best;
    if (offsets) offsets[at] = offset;
  }
};

// The output channels from k on, `channels` of them, at all pixels.
template <class T, int channels>
void correlate_channels(const Filter<T>& f, int64_t k0, const Vector<T>* x, const Pixels& pixels,
                        const Finish<T>& finish) {
  const T* weights = f.weights + k0 * f.taps();
  for (int64_t i = 0; i < pixels.count; i += kPositions) {
    const int32_t *from = pixels.from + i, *to = pixels.to + i;
    Tile<T, channels> tile;
    sum_taps<T, channels>(f, weights, pixels.reach[i / kPositions],
                          {x + from[0], x + from[1], x + from[2], x + from[3]}, tile);
    tile.add_bias(finish.bias + k0);
    if (!finish.pools) {
#pragma GCC unroll 4
      for (int j = 0; j < kPositions; ++j)
#pragma GCC unroll 6
        for (int k = 0; k < channels; ++k)
          finish.y[to[j] + k0 + k] = activated<T>(tile.sums[k][j], finish.act);
    } else if (tile.may_have_nan()) {
#pragma GCC unroll 6
      for (int k = 0; k < channels; ++k) finish.pool_nan(tile.sums[k], to[0] + k0 + k);
    } else {
#pragma GCC unroll 6
      for (int k = 0; k < channels; ++k) finish.pool(tile.sums[k], to[0] + k0 + k);
    }
  }
}

// The same for a run-time number of channels, 1 to kChannels.
template <class T, int channels = kChannels>
void correlate_some(int64_t count, const Filter<T>& f, int64_t k0, const Vector<T>* x, const Pixels& pixels,
                    const Finish<T>& finish) {
  if constexpr (channels > 1) {
    if (count < channels) return correlate_some<T, channels - 1>(count, f, k0, x, pixels, finish);
  }
  correlate_channels<T, channels>(f, k0, x, pixels, finish);
}

template <class T>
void correlate(const Filter<T>& f, const Vector<T>* x, const Pixels& pixels, const Finish<T>& finish) {
  for (int64_t i = 0; i < f.parts(); ++i)
    correlate_some<T>(f.part(i + 1) - f.part(i), f, f.part(i), x, pixels, finish);
}

// Max-pool for any window: rows from p0 of height x width pixels into `rows` from h0.
template <class T>
void pool_band(const Window& v, const Band& in, int64_t p0, int64_t height, int64_t width, const Vector<T>* x,
               const Band& out, int64_t h0, int64_t rows, Vector<T>* y, Vector<T>* offsets) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t w = 0; w < v.out.w; ++w) {
      const int64_t at = out.at(h, w);
      bool first = true;
      for (int64_t r = 0; r < v.kernel.h; ++r)
        for (int64_t s = 0; s < v.kernel.w; ++s) {
          const int64_t p = (h0 + h) * v.stride.h - v.padding.h + r * v.dilation.h;
          const int64_t q = w * v.stride.w - v.padding.w + s * v.dilation.w;
          if (p < 0 || p >= height || q < 0 || q >= width) continue;
          const Vector<T>* pixel = x + in.at(p - p0, q);
          const T cell = T(r * v.kernel.w + s);
          for (int64_t k = 0; k < out.channels; ++k) {
            Vector<T> best = y[at + k], offset = offsets ? offsets[at + k] : Vector<T>{};
            if (first)
              best = pixel[k], offset = Vector<T>{} + cell;
            else
              take_larger<T>(pixel[k], cell, best, offset);
            y[at + k] = best;
            if (offsets) offsets[at + k] = offset;
          }
          first = false;
        }
    }
}

// Gradients at the output of a max-pool, rows x cols of them in a band, and the offsets beside them; without
// offsets, at the output of what has none.
template <class T>
struct Unpool {
  Band source;
  int64_t rows, cols;
  const Vector<T>*grad, *offsets;
};

// Gradients of 2x2/2 windows go to one of four pixels each. Window (0, 0) begins at (top, left) in the band.
template <class T>
void spread_tiles(const Unpool<T>& u, const Band& band, int64_t top, int64_t left, Vector<T>* sum) {
  for (int64_t h = 0; h < u.rows; ++h)
    for (int64_t r = 0; r < 2; ++r) {
      if (top + 2 * h + r < 0 || top + 2 * h + r >= band.rows) continue;
      const Vector<T>*grad = u.grad + u.source.at(h, 0), *offsets = u.offsets + u.source.at(h, 0);
      for (int64_t w = 0; w < u.cols; ++w) {
        Vector<T>* const first = sum + band.at(top + 2 * h + r, left + 2 * w);
        Vector<T>* const second = first + band.pitch();
        for (int64_t k = 0; k < band.channels; ++k) {
          const Vector<T> value = grad[k], offset = offsets[k];
          first[k] = offset == T(2 * r) ? value : Vector<T>{};
          second[k] = offset == T(2 * r + 1) ? value : Vector<T>{};
        }
        grad += u.source.pitch(), offsets += u.source.pitch();
      }
    }
}

// The same for any window v; without offsets every pixel of a window gets its gradient. The band begins at
// pixel (p, q) of height x width.
template <class T>
void spread(const Window& v, int64_t first, const Unpool<T>& u, const Band& band, int64_t p, int64_t q,
            int64_t height, int64_t width, Vector<T>* out) {
  std::fill(out, out + band.size(), Vector<T>{});
  const Rows rows = inside(p, band.rows, height), cols = inside(q, band.cols, width);
  for (int64_t h = 0; h < u.rows; ++h)
    for (int64_t r = 0; r < v.kernel.h; ++r) {
      const int64_t row = (first + h) * v.stride.h - v.padding.h + r * v.dilation.h - p;
      if (row < rows.begin || row >= rows.end) continue;
      for (int64_t w = 0; w < u.cols; ++w)
        for (int64_t f = 0; f < v.kernel.w; ++f) {
          const int64_t col = w * v.stride.w - v.padding.w + f * v.dilation.w - q;
          if (col < cols.begin || col >= cols.end) continue;
          const Vector<T>* grad = u.grad + u.source.at(h, w);
          const Vector<T>* offsets = u.offsets ? u.offsets + u.source.at(h, w) : nullptr;
          Vector<T>* sum = out + band.at(row, col);
          const T cell = T(r * v.kernel.w + f);
          for (int64_t k = 0; k < band.channels; ++k)
            sum[k] += offsets ? (offsets[k] == cell ? grad[k] : Vector<T>{}) : grad[k];
        }
    }
}

// --- the filters of the passes

// The filters of a forward pass over bands like `x`: taps in the order of each_tap, group after group.
template <class T, class Element>
void pack_filters(const ConvShape& s, const View& w, const Band& x, T* weights, int32_t* offsets) {
  const int64_t taps = s.group_c() * s.taps();
  each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
    offsets[t] = bytes_of(x.at(r * s.dilation.h, f * s.dilation.w) + c);
    for (int64_t g = 0; g < s.groups; ++g) {
      T* const out = weights + g * s.group_k() * taps;
      Filter<T>{s.group_k(), s.R, s.S, s.group_c(), offsets, out}.fill(
          out, t, [&](int64_t k) { return T(weight_at<const Element>(w, g * s.group_k() + k, c, r, f)); });
    }
  });
}

// sums = the forward pass over the pixels of a band.
template <class T>
void correlate_groups(const ConvShape& s, const T* weights, const int32_t* offsets, const Vector<T>* x,
                      const Pixels& pixels, Finish<T> finish) {
  for (int64_t g = 0; g < s.groups; ++g) {
    correlate<T>({s.group_k(), s.R, s.S, s.group_c(), offsets, weights}, x + g * s.group_c(), pixels, finish);
    weights += s.group_k() * s.group_c() * s.taps();
    finish.bias += s.group_k(), finish.y += s.group_k();
    if (finish.offsets) finish.offsets += s.group_k();
  }
}

// dgrad's filters over bands like `y`: for each residue of the input position modulo the stride those taps
// that reach it. `weights` and `offsets` have room for all.
template <class T>
struct PhaseFilters {
  const ConvShape& s;
  T* weights;
  int32_t* offsets;

  // Calls f(rows, cols, filter of the first group, offsets, weights) for each residue.
  template <class F>
  void each(const F& f) const {
    T* w = weights;
    int32_t* o = offsets;
    for (int64_t h = 0; h < s.stride.h; ++h)
      for (int64_t v = 0; v < s.stride.w; ++v) {
        const PhaseAxis rows{h, s.R, s.dilation.h, s.stride.h}, cols{v, s.S, s.dilation.w, s.stride.w};
        const Filter<T> filter{s.group_c(), rows.count(), cols.count(), s.group_k(), o, w};
        f(rows, cols, filter, o, w);
        o += filter.taps();
        w += s.groups * filter.taps() * s.group_c();
      }
  }
  template <class Element>
  void pack(const View& w, const Band& y) const {
    each([&](const PhaseAxis& rows, const PhaseAxis& cols, const Filter<T>& filter, int32_t* offset, T* out) {
      int64_t t = 0;
      each_tap(s.R, s.S, s.group_k(), [&](int64_t, int64_t r, int64_t f, int64_t k) {
        if (!rows.has(r) || !cols.has(f)) return;
        offset[t] = bytes_of(k - y.at(rows.shift_of(r), cols.shift_of(f)));
        for (int64_t g = 0; g < s.groups; ++g)
          filter.fill(out + g * filter.taps() * s.group_c(), t, [&](int64_t c) {
            return T(weight_at<const Element>(w, g * s.group_k() + k, c, r, f));
          });
        ++t;
      });
    });
  }
  // The gradient at input rows `h`, from that at the outputs whose pixel (p, q) is the band's first. to_row
  // and to_col say where the input's pixels lie in x.
  template <class ToRow, class ToCol>
  void correlate_rows(const Rows& h, int64_t p, int64_t q, const Band& y, const Vector<T>* gradient,
                      const T* zeros, PixelList& list, const ToRow& to_row, const ToCol& to_col,
                      Vector<T>* x) const {
    each([&](const PhaseAxis& rows, const PhaseAxis& cols, Filter<T> filter, int32_t*, T*) {
      const int64_t row_count = rows.steps(
          h.begin, h.end, s.padding.h, p, s.P, list.rows, [&](int64_t i) { return y.at(i, 0); }, to_row);
      const int64_t col_count =
          cols.steps(0, s.W, s.padding.w, q, s.Q, list.cols, [&](int64_t i) { return y.at(0, i); }, to_col);
      if (row_count == 0 || col_count == 0) return;
      const Pixels pixels = list.tiles(row_count, col_count);
      for (int64_t g = 0; g < s.groups; ++g) {
        correlate<T>(filter, gradient + g * s.group_k(), pixels,
                     {zeros, Act::none, false, x + g * s.group_c(), nullptr});
        filter.weights += filter.taps() * s.group_c();
      }
    });
  }
};

// --- wgrad

// totals[k][t] += sum over pixels and lanes of gradient[to + k] * x[from + offsets[t]].
template <class T, int outputs, int taps>
void wgrad_tile(const Vector<T>* x, const int32_t* offsets, const Vector<T>* gradient, const Pixels& pixels,
                T* totals, int64_t row) {
  constexpr int groups = (taps * outputs + kLanes<T> - 1) / kLanes<T>;
  Vector<T> sums[groups * kLanes<T>];
  const Vector<T>* tap[taps];
#pragma GCC unroll 24
  for (int i = 0; i < groups * kLanes<T>; ++i) sums[i] = Vector<T>{};
#pragma GCC unroll 6
  for (int t = 0; t < taps; ++t) tap[t] = x + offsets[t] / kVectorBytes;
  for (int64_t i = 0; i < pixels.count; ++i) {
    const int64_t from = bytes_of(pixels.from[i]);
    const Vector<T>* g = gradient + pixels.to[i];
    Vector<T> v[taps];
#pragma GCC unroll 6
    for (int t = 0; t < taps; ++t) v[t] = vector_at<T>(tap[t], from);
#pragma GCC unroll 6
    for (int k = 0; k < outputs; ++k) {
      const Vector<T> gk = g[k];
#pragma GCC unroll 6
      for (int t = 0; t < taps; ++t) sums[k * taps + t] += gk * v[t];
    }
  }
  alignas(kVectorBytes) T values[groups * kLanes<T>];
#pragma GCC unroll 6
  for (int i = 0; i < groups; ++i) store<T>(sums_of<T>(sums + i * kLanes<T>), values + i * kLanes<T>);
  for (int k = 0; k < outputs; ++k)
    for (int t = 0; t < taps; ++t) totals[k * row + t] += values[k * taps + t];
}

// The most outputs of a tile, and the taps that go with so many.
constexpr int kOutputs = kVectorBytes == 64 ? 6 : 3, kFewOutputs = kVectorBytes == 64 ? 4 : 3;
constexpr int taps_for(int outputs) { return std::min(6, kSums / outputs); }

// The same for run-time numbers of outputs and taps.
template <class T, int outputs = kOutputs, int taps = taps_for(kOutputs), class... Rest>
void wgrad_some(int64_t output_count, int64_t tap_count, Rest... rest) {
  if constexpr (outputs > 1) {
    if (output_count < outputs)
      return wgrad_some<T, outputs - 1, taps_for(outputs - 1)>(output_count, tap_count, rest...);
  }
  if constexpr (taps > 1) {
    if (tap_count < taps) return wgrad_some<T, outputs, taps - 1>(output_count, tap_count, rest...);
  }
  wgrad_tile<T, outputs, taps>(rest...);
}

// totals[k] += the gradient over some pixels and all lanes, `channels` of them; in sums of few pixels, since
// a single image has a single lane.
template <class T>
void sum_gradient(const Vector<T>* gradient, int64_t channels, const Pixels& pixels, T* totals) {
  constexpr int most = 8 < kLanes<T> ? 8 : kLanes<T>;
  constexpr int64_t few = kPixels<T> / 4;
  for (int64_t k = 0; k < channels; k += most) {
    const int64_t count = std::min<int64_t>(most, channels - k);
    Vector<T> sums[kLanes<T>] = {};
    for (int64_t first = 0; first < pixels.count; first += few) {
      const int64_t end = std::min(first + few, pixels.count);
      Vector<T> part[most] = {};
      if (count == most) {
        for (int64_t i = first; i < end; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < most; ++j) part[j] += gradient[pixels.to[i] + k + j];
      } else {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t i = first; i < end; ++i) part[j] += gradient[pixels.to[i] + k + j];
      }
      for (int j = 0; j < most; ++j) sums[j] += part[j];
    }
    const Vector<T> sum = sums_of<T>(sums);
    for (int64_t j = 0; j < count; ++j) totals[k + j] += sum[j];
  }
}

// totals[k][t] += the gradient of the weights over pixels of a band, group by group; behind the filters the
// biases, where they are wanted.
template <class T>
void wgrad_pixels(const ConvShape& s, const Vector<T>* x, const int32_t* offsets, const Vector<T>* gradient,
                  const PixelList& list, int64_t count, bool bias, T* totals) {
  const int64_t taps = s.group_c() * s.taps();
  const int64_t most_outputs = s.group_k() <= kOutputs ? kOutputs : kFewOutputs;
  const int64_t k_parts = (s.group_k() + most_outputs - 1) / most_outputs;
  // The widest part of the outputs says how many taps go with it.
  const int64_t widest = (s.group_k() + k_parts - 1) / std::max<int64_t>(1, k_parts);
  const int64_t t_most = taps_for(static_cast<int>(std::max<int64_t>(1, widest)));
  const int64_t t_parts = (taps + t_most - 1) / t_most;
  for (int64_t i = 0; i < count; i += kPixels<T>) {
    const Pixels pixels = list.some(i, std::min(kPixels<T>, count - i));
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t j = 0; j < t_parts; ++j) {
        const int64_t t = part_begin(j, t_parts, taps), t_count = part_begin(j + 1, t_parts, taps) - t;
        for (int64_t part = 0; part < k_parts; ++part) {
          const int64_t first = part_begin(part, k_parts, s.group_k());
          const int64_t outputs = part_begin(part + 1, k_parts, s.group_k()) - first;
          const int64_t k = g * s.group_k() + first;
          wgrad_some<T>(outputs, t_count, x + g * s.group_c(), offsets + t, gradient + k, pixels,
                        totals + k * taps + t, taps);
        }
      }
    if (bias) sum_gradient<T>(gradient, s.K, pixels, totals + s.K * taps);
  }
}

}  // namespace
