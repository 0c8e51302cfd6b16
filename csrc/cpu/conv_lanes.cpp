// SPDX-License-Identifier: MIT
// 2-D convolution with the batch in the vector lanes (lanes.inl), alone or with ReLU and max-pool behind it,
// and its gradients with theirs in front.
//
//   fprop, dgrad  a tile is 2x2 output pixels x up to kChannels channels. Each tap costs one aligned load a
//                 pixel and one broadcast weight a channel: 10 loads for 24 fused multiply-adds. What a tap
//                 is (row, column, channel, stride, dilation) is an offset in a table; dgrad has a table for
//                 each residue of the input position modulo the stride. Taps in the zero padding are left
//                 out.
//   wgrad         a tile is taps x output channels, up to kSums of them, summed over the pixels of a band,
//   then
//                 over the lanes. Pieces of the batch add up in a fixed order.
//   max-pool      2x2/2 windows are the four pixels of a tile and never leave the registers; other windows
//   are
//                 taken from the band. backward spreads the pooled gradient over a band by its offsets.
//
// A task is a block of images and a band of rows that together fit the second-level cache. The floor is the
// fused multiply-add rate, 2 * lanes * 2 a cycle.
#ifndef FASTCONV_ISA

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_lanes.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/lanes.inl"

namespace {

// Sums in registers: 24 of 32 with AVX-512, 8 or 9 of 16 elsewhere.
constexpr int kPositions = 4, kChannels = kVectorBytes == 64 ? 6 : 2;
constexpr int kSums = kVectorBytes == 64 ? 24 : 9;
// Taps, or in wgrad pixels, that are summed one after the other; longer sums are sums of such sums, which
// round less. What wgrad reads for kPixels of one tile stays in the first-level cache. float64 is there to be
// exact.
template <class T>
constexpr int64_t kDepth = sizeof(T) == 8 ? 16 : 128;
template <class T>
constexpr int64_t kPixels = sizeof(T) == 8 ? 16 : 64;

// Takes arrays from a piece of memory, each aligned to a cache line; over no memory it only measures.
class Carver {
 public:
  explicit Carver(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    next_ += next_ ? bytes : 0;
    bytes_ += bytes;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* next_;
  int64_t bytes_ = 0;
};

// Arrays of a task, in the scratch of its thread.
template <class Arrays, class... Sizes>
Arrays in_scratch(const Sizes&... sizes) {
  Carver measure(nullptr);
  Arrays(measure, sizes...);
  Carver carver(thread_scratch(measure.bytes()));
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

// Zeros in a band outside the rectangle of rows and columns.
template <class V>
void zero_frame(const Band& band, const Rows& rows, const Rows& cols, V* out) {
  const bool whole = cols.begin <= 0 && cols.end >= band.cols;
  for (int64_t h = 0; h < band.rows; ++h) {
    if (h < rows.begin || h >= rows.end) {
      std::fill(out + band.at(h, 0), out + band.at(h + 1, 0), V{});
    } else if (!whole) {
      std::fill(out + band.at(h, 0), out + band.at(h, cols.begin), V{});
      std::fill(out + band.at(h, cols.end), out + band.at(h + 1, 0), V{});
    }
  }
}

// The part of [at, at + size) inside [0, total), counted from `at`.
inline Rows inside(int64_t at, int64_t size, int64_t total) {
  const int64_t begin = std::clamp<int64_t>(-at, 0, size);
  return {begin, std::clamp(total - at, begin, size)};
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

// Offsets are integers in memory and numbers in lanes.
template <class T>
void read_offsets(const ConvArgs& a, const Band& band, int64_t h, const Block<T>& block, Vector<T>* out) {
  const Window& v = a.epilogue.pool;
  if (offset_type(v.kernel.cells()) == Offset::u8)
    read_band<T, uint8_t>(a.epilogue.offsets, v.out.h, v.out.w, band, h, 0, block, out);
  else
    read_band<T, int32_t>(a.epilogue.offsets, v.out.h, v.out.w, band, h, 0, block, out);
}
template <class T>
void write_offsets(const ConvArgs& a, const Band& band, int64_t h, const Block<T>& block,
                   const Vector<T>* in) {
  if (offset_type(a.epilogue.pool.kernel.cells()) == Offset::u8)
    write_band<T, uint8_t>(a.epilogue.offsets, band, h, block, in);
  else
    write_band<T, int32_t>(a.epilogue.offsets, band, h, block, in);
}

// --- which pixels, and which taps

// The pixels of one axis of a grid: where each finds its first input, where its sum goes, and the taps that
// are not in the padding. Distances are vectors of a band.
struct Step {
  int64_t from, to;
  Rows taps;
};

// Of `count` taps those whose position(i) lies in [0, size); they follow each other.
template <class Position>
Rows taps_inside(int64_t count, int64_t size, const Position& position) {
  Rows taps{0, 0};
  for (int64_t i = 0; i < count; ++i)
    if (position(i) >= 0 && position(i) < size) taps = {taps.size() ? taps.begin : i, i + 1};
  return taps;
}

// Rows and columns of the taps that some pixel of a tile has.
struct Reach {
  Rows r, s;
};

struct Pixels {
  int64_t count;
  const int32_t *from, *to;
  const Reach* reach;  // of each tile of kPositions
};

// The pixels of a grid, four to a tile.
class PixelList {
 public:
  Step *rows, *cols;

  PixelList(Carver& carver, int64_t most_rows, int64_t most_cols)
      : rows(carver.take<Step>(most_rows)), cols(carver.take<Step>(most_cols)) {
    const int64_t most = most_rows * most_cols + kPositions;
    from_ = carver.take<int32_t>(most), to_ = carver.take<int32_t>(most);
    reach_ = carver.take<Reach>(most / kPositions);
  }

  // All pixels in tiles of 2x2. Pixels of an odd last column or row go together, and the last is repeated
  // until its tile is full.
  Pixels tiles(int64_t row_count, int64_t col_count) {
    count_ = 0;
    const int64_t even_rows = row_count & ~1, even_cols = col_count & ~1;
    for (int64_t h = 0; h < even_rows; h += 2)
      for (int64_t w = 0; w < even_cols; w += 2) {
        reach_[count_ / kPositions] = {join(rows[h].taps, rows[h + 1].taps),
                                       join(cols[w].taps, cols[w + 1].taps)};
        for (int j = 0; j < kPositions; ++j) place(rows[h + j / 2], cols[w + j % 2]);
      }
    for (int64_t h = 0; h < even_rows && even_cols < col_count; ++h) add(rows[h], cols[even_cols]);
    for (int64_t w = 0; w < col_count && even_rows < row_count; ++w) add(rows[even_rows], cols[w]);
    for (; count_ % kPositions; ++count_) from_[count_] = from_[count_ - 1], to_[count_] = to_[count_ - 1];
    return {count_, from_, to_, reach_};
  }
  // Some of them.
  Pixels some(int64_t first, int64_t count) const { return {count, from_ + first, to_ + first, nullptr}; }

 private:
  void place(const Step& row, const Step& col) {
    from_[count_] = static_cast<int32_t>(row.from + col.from);
    to_[count_++] = static_cast<int32_t>(row.to + col.to);
  }
  void add(const Step& row, const Step& col) {
    Reach& reach = reach_[count_ / kPositions];
    if (count_ % kPositions == 0) reach = {{0, 0}, {0, 0}};
    reach = {join(reach.r, row.taps), join(reach.s, col.taps)};
    place(row, col);
  }
  static Rows join(const Rows& a, const Rows& b) {
    if (a.size() == 0 || b.size() == 0) return a.size() ? a : b;
    return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }

  int64_t count_ = 0;
  int32_t *from_, *to_;
  Reach* reach_;
};

// --- the tile of fprop and dgrad

// The vector `bytes` after another: tables hold distances in bytes, which an address takes as they are.
template <class T>
[[gnu::always_inline]] inline Vector<T> vector_at(const Vector<T>* base, int64_t bytes) {
  return *reinterpret_cast<const Vector<T>*>(reinterpret_cast<const char*>(base) + bytes);
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
    typedef long long Words __attribute__((vector_size(kVectorBytes)));
    const Words is_nan = reinterpret_cast<Words>(all != all);
    long long any = 0;
    for (int i = 0; i < kVectorBytes / 8; ++i) any |= is_nan[i];
    return any != 0;
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

// Calls f(index, r, s, channel) for the taps of a filter in the order of a band.
template <class F>
void each_tap(int64_t R, int64_t S, int64_t channels, const F& f) {
  int64_t i = 0;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < S; ++s)
      for (int64_t c = 0; c < channels; ++c) f(i++, r, s, c);
}

template <class Element>
Element& weight_at(const View& w, int64_t k, int64_t c, int64_t r, int64_t s) {
  return static_cast<Element*>(w.data)[k * w.n + c * w.c + r * w.h + s * w.w];
}

// --- fprop, with what follows it

// Max-pool for any window: rows from p0 of height x width pixels into rows from h0.
template <class T>
void pool_band(const Window& v, const Band& in, int64_t p0, int64_t height, int64_t width, const Vector<T>* x,
               const Band& out, int64_t h0, Vector<T>* y, Vector<T>* offsets) {
  for (int64_t h = 0; h < out.rows; ++h)
    for (int64_t w = 0; w < out.cols; ++w) {
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

template <class T>
struct ForwardArrays {
  Vector<T>*x, *y, *offsets, *conv;
  PixelList pixels;

  ForwardArrays(Carver& carver, int64_t x_size, int64_t y_size, int64_t offsets_size, int64_t conv_size,
                int64_t rows, int64_t cols)
      : x(carver.take<Vector<T>>(x_size)),
        y(carver.take<Vector<T>>(y_size)),
        offsets(carver.take<Vector<T>>(offsets_size)),
        conv(carver.take<Vector<T>>(conv_size)),
        pixels(carver, rows, cols) {}
};

template <class Element>
void forward(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const Epilogue& e = a.epilogue;
  const LanesForward plan(a);
  const int64_t taps = s.group_c() * s.taps();
  const Band x_band{plan.in_rows(plan.conv_rows), plan.in_cols(), s.C};

  Carver carver(workspace);
  T* const weights = carver.take<T>(s.K * taps);
  T* const bias = carver.take<T>(s.K);
  int32_t* const offsets = carver.take<int32_t>(taps);
  const auto filter = [&](int64_t g) {
    return Filter<T>{s.group_k(), s.R, s.S, s.group_c(), offsets, weights + g * s.group_k() * taps};
  };
  for (int64_t k = 0; k < s.K; ++k) bias[k] = e.bias ? T(static_cast<const Element*>(e.bias)[k]) : T(0);
  each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
    offsets[t] = bytes_of(x_band.at(r * s.dilation.h, f * s.dilation.w) + c);
    for (int64_t g = 0; g < s.groups; ++g)
      filter(g).fill(weights + g * s.group_k() * taps, t, [&](int64_t k) {
        return T(weight_at<const Element>(a.w, g * s.group_k() + k, c, r, f));
      });
  });

  parallel_for(Block<T>::count(s.N) * plan.bands, plan.task_us(kLanes<T>), [&](int64_t task) {
    const Block<T> block(task / plan.bands, s.N);
    const Rows y = plan.output_rows(task % plan.bands), p = plan.conv_rows_of(y);
    const Band y_band{y.size(), plan.cols, s.K}, conv_band{p.size(), s.Q, s.K};
    auto at = in_scratch<ForwardArrays<T>>(x_band.size(), y_band.size(), e.offsets.data ? y_band.size() : 0,
                                           plan.pools_band ? conv_band.size() : 0, plan.conv_rows, s.Q);
    read_band<T, Element>(a.x, s.H, s.W, x_band, p.begin * s.stride.h - s.padding.h, -s.padding.w, block,
                          at.x);
    // Where 2x2 pixels become one, all four have its place.
    const int64_t shrink = plan.pools_tile ? 2 : 1;
    const int64_t rows = plan.pools_tile ? 2 * y.size() : p.size();
    const int64_t cols = plan.pools_tile ? 2 * plan.cols : s.Q;
    for (int64_t h = 0; h < rows; ++h) {
      const int64_t start = (p.begin + h) * s.stride.h - s.padding.h;
      at.pixels.rows[h] = {x_band.at(h * s.stride.h, 0), y_band.at(h / shrink, 0),
                           taps_inside(s.R, s.H, [&](int64_t r) { return start + r * s.dilation.h; })};
      if (plan.pools_band) at.pixels.rows[h].to = conv_band.at(h, 0);
    }
    for (int64_t w = 0; w < cols; ++w) {
      const int64_t start = w * s.stride.w - s.padding.w;
      at.pixels.cols[w] = {x_band.at(0, w * s.stride.w), y_band.at(0, w / shrink),
                           taps_inside(s.S, s.W, [&](int64_t r) { return start + r * s.dilation.w; })};
    }
    const Pixels pixels = at.pixels.tiles(rows, cols);
    Vector<T>* const sums = plan.pools_band ? at.conv : at.y;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t k = g * s.group_k();
      correlate<T>(filter(g), at.x + g * s.group_c(), pixels,
                   {bias + k, e.act, plan.pools_tile, sums + k,
                    plan.pools_tile && e.offsets.data ? at.offsets + k : nullptr});
    }
    if (plan.pools_band)
      pool_band<T>(e.pool, conv_band, p.begin, s.P, s.Q, at.conv, y_band, y.begin, at.y,
                   e.offsets.data ? at.offsets : nullptr);
    write_band<T, Element>(a.y, y_band, y.begin, block, at.y);
    if (e.offsets.data) write_offsets<T>(a, y_band, y.begin, block, at.offsets);
  });
}

// --- the gradient at the convolution's own output

// What it is made of: a gradient, and, where ReLU or max-pool follow the convolution, their output y and
// offsets.
struct Gradient {
  const ConvArgs& conv;
  View grad_y;
  bool gated, pooled;

  bool is_plain() const { return !gated && !pooled; }
  Window window() const {
    Window v = pooled ? conv.epilogue.pool : Window{};
    if (!pooled) v.out = {1, conv.shape.P, conv.shape.Q};
    return v;
  }
  // Rows of grad_y whose windows reach rows [p, p + rows).
  Rows sources(int64_t p, int64_t rows) const {
    const Window v = window();
    const int64_t last = p + rows - 1 + v.padding.h;
    const int64_t first = p + v.padding.h - (v.kernel.h - 1) * v.dilation.h + v.stride.h - 1;
    const int64_t begin = first < 0 ? 0 : first / v.stride.h;
    const int64_t end = last < 0 ? 0 : std::min(v.out.h, last / v.stride.h + 1);
    return {begin, std::max(begin, end)};
  }
  int64_t most_sources(int64_t rows) const {
    const Window v = window();
    return std::min(v.out.h, (rows - 1 + (v.kernel.h - 1) * v.dilation.h) / v.stride.h + 1);
  }
};

template <class T>
struct GradientArrays {
  Vector<T>*sum, *grad, *gate, *offsets;

  GradientArrays(Carver& carver, const Gradient& g, const Band& band)
      : sum(carver.take<Vector<T>>(band.size())) {
    const int64_t size = Band{g.most_sources(band.rows), g.window().out.w, band.channels}.size();
    grad = carver.take<Vector<T>>(g.is_plain() ? 0 : size);
    gate = carver.take<Vector<T>>(g.gated ? size : 0);
    offsets = carver.take<Vector<T>>(g.pooled ? size : 0);
  }
};

// Gradients of 2x2/2 windows go to one of four pixels each. Window (0, 0) begins at (top, left) in the band.
template <class T>
void spread_tiles(const Band& source, const GradientArrays<T>& at, const Band& band, int64_t top,
                  int64_t left) {
  zero_frame(band, {std::max<int64_t>(top, 0), top + 2 * source.rows}, {left, left + 2 * source.cols},
             at.sum);
  for (int64_t h = 0; h < source.rows; ++h)
    for (int64_t r = 0; r < 2; ++r) {
      if (top + 2 * h + r < 0 || top + 2 * h + r >= band.rows) continue;
      const Vector<T>*grad = at.grad + source.at(h, 0), *offsets = at.offsets + source.at(h, 0);
      for (int64_t w = 0; w < source.cols; ++w) {
        Vector<T>* const first = at.sum + band.at(top + 2 * h + r, left + 2 * w);
        Vector<T>* const second = first + band.pitch();
        for (int64_t k = 0; k < band.channels; ++k) {
          const Vector<T> value = grad[k], offset = offsets[k];
          first[k] = offset == T(2 * r) ? value : Vector<T>{};
          second[k] = offset == T(2 * r + 1) ? value : Vector<T>{};
        }
        grad += source.pitch(), offsets += source.pitch();
      }
    }
}

// The same for any window v; without offsets every pixel of a window gets its gradient.
template <class T>
void spread(const Window& v, bool by_offset, const Band& source, int64_t first, const GradientArrays<T>& at,
            const Band& band, int64_t p, int64_t q, int64_t height, int64_t width) {
  std::fill(at.sum, at.sum + band.size(), Vector<T>{});
  const Rows rows = inside(p, band.rows, height), cols = inside(q, band.cols, width);
  for (int64_t h = 0; h < source.rows; ++h)
    for (int64_t r = 0; r < v.kernel.h; ++r) {
      const int64_t row = (first + h) * v.stride.h - v.padding.h + r * v.dilation.h - p;
      if (row < rows.begin || row >= rows.end) continue;
      for (int64_t w = 0; w < source.cols; ++w)
        for (int64_t f = 0; f < v.kernel.w; ++f) {
          const int64_t col = w * v.stride.w - v.padding.w + f * v.dilation.w - q;
          if (col < cols.begin || col >= cols.end) continue;
          const Vector<T>*grad = at.grad + source.at(h, w), *offsets = at.offsets + source.at(h, w);
          Vector<T>* sum = at.sum + band.at(row, col);
          const T cell = T(r * v.kernel.w + f);
          for (int64_t k = 0; k < band.channels; ++k)
            sum[k] += by_offset ? (offsets[k] == cell ? grad[k] : Vector<T>{}) : grad[k];
        }
    }
}

// Reads the gradient at pixels (p, q) of the convolution's output, and those that follow, into a band; zero
// outside the output.
template <class T, class Element>
void read_gradient(const Gradient& g, const Band& band, int64_t p, int64_t q, const Block<T>& block,
                   const GradientArrays<T>& at) {
  const ConvShape& s = g.conv.shape;
  if (g.is_plain()) return read_band<T, Element>(g.grad_y, s.P, s.Q, band, p, q, block, at.sum);
  const Window v = g.window();
  const Rows rows = g.sources(p, band.rows);
  const Band source{rows.size(), v.out.w, s.K};
  read_band<T, Element>(g.grad_y, v.out.h, v.out.w, source, rows.begin, 0, block, at.grad);
  if (g.gated) {
    read_band<T, Element>(g.conv.y, v.out.h, v.out.w, source, rows.begin, 0, block, at.gate);
    for (int64_t i = 0; i < source.size(); ++i) at.grad[i] = at.gate[i] <= 0 ? Vector<T>{} : at.grad[i];
  }
  if (g.pooled) read_offsets<T>(g.conv, source, rows.begin, block, at.offsets);
  if (g.pooled && is_tile(v) && q <= 0 && q + band.cols >= s.Q)
    spread_tiles<T>(source, at, band, rows.begin * 2 - p, -q);
  else
    spread<T>(v, g.pooled, source, rows.begin, at, band, p, q, s.P, s.Q);
}

template <class T>
struct BackwardArrays {
  GradientArrays<T> gradient;
  Vector<T>* x;
  PixelList pixels;

  BackwardArrays(Carver& carver, const Gradient& g, const Band& band, int64_t x_size, int64_t rows,
                 int64_t cols)
      : gradient(carver, g, band), x(carver.take<Vector<T>>(x_size)), pixels(carver, rows, cols) {}
};

// --- dgrad

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Of the taps of one axis those that reach inputs i with (i + padding) % stride == phase. Tap number j of
// them reads the gradient at (i + padding - phase) / stride - shift(j).
struct PhaseAxis {
  int64_t phase, kernel, dilation, stride;

  bool has(int64_t r) const { return r * dilation % stride == phase; }
  int64_t shift_of(int64_t r) const { return (r * dilation - phase) / stride; }
  int64_t count() const {
    int64_t n = 0;
    for (int64_t r = 0; r < kernel; ++r) n += has(r);
    return n;
  }
  // Fills in the steps of the inputs [begin, end) of this phase, and returns how many there are. From p on,
  // `size` gradients lie in the band.
  template <class From, class To>
  int64_t steps(int64_t begin, int64_t end, int64_t padding, int64_t p, int64_t size, Step* steps,
                const From& from, const To& to) const {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      if ((i + padding) % stride != phase) continue;
      const int64_t base = (i + padding - phase) / stride;
      Rows taps{0, 0};
      for (int64_t r = 0, j = 0; r < kernel; ++r) {
        if (!has(r)) continue;
        const int64_t at = base - shift_of(r);
        if (at >= 0 && at < size) taps = {taps.size() ? taps.begin : j, j + 1};
        ++j;
      }
      steps[n++] = {from(base - p), to(i - begin), taps};
    }
    return n;
  }
};

template <class Element>
void dgrad(const Gradient& gradient, const View& grad_x, const View& w, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = gradient.conv.shape;
  const LanesDgrad plan(gradient.conv);
  const Band y_band{plan.gradient_rows(plan.rows_per_band), plan.gradient_cols(), s.K};

  // For each phase: the offsets of its taps, and its filters, group by group.
  Carver carver(workspace);
  T* const zeros = carver.take<T>(s.group_c());
  T* const all_weights = carver.take<T>(s.K * s.group_c() * s.taps());
  int32_t* const all_offsets = carver.take<int32_t>(s.group_k() * s.taps());
  const auto each_phase = [&](const auto& f) {
    T* weights = all_weights;
    int32_t* offsets = all_offsets;
    for (int64_t h = 0; h < s.stride.h; ++h)
      for (int64_t v = 0; v < s.stride.w; ++v) {
        const PhaseAxis rows{h, s.R, s.dilation.h, s.stride.h}, cols{v, s.S, s.dilation.w, s.stride.w};
        const Filter<T> filter{s.group_c(), rows.count(), cols.count(), s.group_k(), offsets, weights};
        f(rows, cols, filter, offsets, weights);
        offsets += filter.taps();
        weights += s.groups * filter.taps() * s.group_c();
      }
  };
  std::fill(zeros, zeros + s.group_c(), T(0));
  each_phase([&](const PhaseAxis& rows, const PhaseAxis& cols, const Filter<T>& filter, int32_t* offsets,
                 T* weights) {
    int64_t t = 0;
    each_tap(s.R, s.S, s.group_k(), [&](int64_t, int64_t r, int64_t f, int64_t k) {
      if (!rows.has(r) || !cols.has(f)) return;
      offsets[t] = bytes_of(k - y_band.at(rows.shift_of(r), cols.shift_of(f)));
      for (int64_t g = 0; g < s.groups; ++g)
        filter.fill(weights + g * filter.taps() * s.group_c(), t,
                    [&](int64_t c) { return T(weight_at<const Element>(w, g * s.group_k() + k, c, r, f)); });
      ++t;
    });
  });

  parallel_for(Block<T>::count(s.N) * plan.bands, plan.task_us(kLanes<T>), [&](int64_t task) {
    const Block<T> block(task / plan.bands, s.N);
    const Rows h = plan.input_rows(task % plan.bands);
    const Band x_band{h.size(), s.W, s.C};
    auto at = in_scratch<BackwardArrays<T>>(gradient, y_band, x_band.size(), h.size(), s.W);
    const int64_t p = floor_div(h.begin + s.padding.h - (s.R - 1) * s.dilation.h, s.stride.h);
    const int64_t q = floor_div(s.padding.w - (s.S - 1) * s.dilation.w, s.stride.w);
    read_gradient<T, Element>(gradient, y_band, p, q, block, at.gradient);
    each_phase([&](const PhaseAxis& rows, const PhaseAxis& cols, Filter<T> filter, int32_t*, T*) {
      const int64_t row_count = rows.steps(
          h.begin, h.end, s.padding.h, p, s.P, at.pixels.rows, [&](int64_t i) { return y_band.at(i, 0); },
          [&](int64_t i) { return x_band.at(i, 0); });
      const int64_t col_count = cols.steps(
          0, s.W, s.padding.w, q, s.Q, at.pixels.cols, [&](int64_t i) { return y_band.at(0, i); },
          [&](int64_t i) { return x_band.at(0, i); });
      if (row_count == 0 || col_count == 0) return;
      const Pixels pixels = at.pixels.tiles(row_count, col_count);
      for (int64_t g = 0; g < s.groups; ++g) {
        correlate<T>(filter, at.gradient.sum + g * s.group_k(), pixels,
                     {zeros, Act::none, false, at.x + g * s.group_c(), nullptr});
        filter.weights += filter.taps() * s.group_c();
      }
    });
    write_band<T, Element>(grad_x, x_band, h.begin, block, at.x);
  });
}

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

template <class Element>
void wgrad(const Gradient& gradient, const View& x, const View& grad_w, void* grad_b, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = gradient.conv.shape;
  const LanesWgrad plan(gradient.conv);
  const int64_t taps = s.group_c() * s.taps(), sums = s.K * (taps + 1);  // behind the filters the biases
  const Band x_band{plan.in_rows(plan.rows_per_band), plan.in_cols(), s.C};
  const Band y_band{plan.rows_per_band, s.Q, s.K};

  Carver carver(workspace);
  T* const pieces = carver.take<T>(plan.pieces * sums);
  int32_t* const offsets = carver.take<int32_t>(taps);
  each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
    offsets[t] = bytes_of(x_band.at(r * s.dilation.h, f * s.dilation.w) + c);
  });

  const int64_t most_outputs = s.group_k() <= kOutputs ? kOutputs : kFewOutputs;
  const int64_t k_parts = (s.group_k() + most_outputs - 1) / most_outputs;
  // The widest part of the outputs says how many taps go with it.
  const int64_t widest = (s.group_k() + k_parts - 1) / std::max<int64_t>(1, k_parts);
  const int64_t t_most = taps_for(static_cast<int>(std::max<int64_t>(1, widest)));
  const int64_t t_parts = (taps + t_most - 1) / t_most;
  const auto add_band = [&](const Block<T>& block, const Rows& p, T* total) {
    auto at = in_scratch<BackwardArrays<T>>(gradient, y_band, x_band.size(), p.size(), s.Q);
    read_band<T, Element>(x, s.H, s.W, x_band, p.begin * s.stride.h - s.padding.h, -s.padding.w, block, at.x);
    read_gradient<T, Element>(gradient, y_band, p.begin, 0, block, at.gradient);
    for (int64_t h = 0; h < p.size(); ++h)
      at.pixels.rows[h] = {x_band.at(h * s.stride.h, 0), y_band.at(h, 0), {}};
    for (int64_t v = 0; v < s.Q; ++v) at.pixels.cols[v] = {x_band.at(0, v * s.stride.w), y_band.at(0, v), {}};
    at.pixels.tiles(p.size(), s.Q);
    for (int64_t i = 0; i < p.size() * s.Q; i += kPixels<T>) {
      const Pixels pixels = at.pixels.some(i, std::min(kPixels<T>, p.size() * s.Q - i));
      for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t j = 0; j < t_parts; ++j) {
          const int64_t t = part_begin(j, t_parts, taps), t_count = part_begin(j + 1, t_parts, taps) - t;
          for (int64_t part = 0; part < k_parts; ++part) {
            const int64_t first = part_begin(part, k_parts, s.group_k());
            const int64_t outputs = part_begin(part + 1, k_parts, s.group_k()) - first;
            const int64_t k = g * s.group_k() + first;
            wgrad_some<T>(outputs, t_count, at.x + g * s.group_c(), offsets + t, at.gradient.sum + k, pixels,
                          total + k * taps + t, taps);
          }
        }
      if (grad_b) sum_gradient<T>(at.gradient.sum, s.K, pixels, total + s.K * taps);
    }
  };
  parallel_for(plan.pieces, plan.piece_us(), [&](int64_t piece) {
    T* const total = pieces + piece * sums;
    std::fill(total, total + sums, T(0));
    for (int64_t unit = plan.unit(piece); unit < plan.unit(piece + 1); ++unit) {
      const int64_t image = unit / plan.bands * kUnit, end = std::min(s.N, image + kUnit);
      for (int64_t i = image; i < end; i += kLanes<T>)
        add_band(Block<T>(i / kLanes<T>, s.N), plan.output_rows(unit % plan.bands), total);
    }
  });

  const auto total_of = [&](int64_t i) {
    T sum = pieces[i];
    for (int64_t piece = 1; piece < plan.pieces; ++piece) sum += pieces[piece * sums + i];
    return Element(sum);
  };
  parallel_for(s.K, double(taps * plan.pieces) * 1e-3, [&](int64_t k) {
    each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
      weight_at<Element>(grad_w, k, c, r, f) = total_of(k * taps + t);
    });
    if (grad_b) static_cast<Element*>(grad_b)[k] = total_of(s.K * taps + k);
  });
}

Gradient plain(const ConvArgs& a) { return {a, a.y, false, false}; }

}  // namespace

void conv_fprop_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

void conv_act_pool_lanes(const ConvArgs& a, void* workspace, void* stream) {
  conv_fprop_lanes(a, workspace, stream);
}

void conv_dgrad_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype,
             [&](auto* t) { dgrad<std::remove_pointer_t<decltype(t)>>(plain(a), a.x, a.w, workspace); });
}

void conv_wgrad_lanes(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    wgrad<std::remove_pointer_t<decltype(t)>>(plain(a), a.x, a.w, a.bias_grad, workspace);
  });
}

void conv_act_pool_backward_lanes(const ConvActPoolBackwardArgs& a, void* workspace, void*) {
  const Gradient gradient{a.conv, a.grad_y, a.conv.epilogue.act == Act::relu, a.conv.epilogue.pools()};
  with_dtype(a.conv.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    if (a.grad_x.data) dgrad<Element>(gradient, a.grad_x, a.conv.w, workspace);
    if (a.grad_w.data) wgrad<Element>(gradient, a.conv.x, a.grad_w, a.grad_b, workspace);
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
