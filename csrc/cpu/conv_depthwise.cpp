// SPDX-License-Identifier: MIT
// 2-D depthwise convolution (one input channel a group) with channels in the vector lanes.
//
// A task reads a patch of one block of channels into lanes (planes.inl; zero outside the image), where every
// layout, stride and dilation is the same loop over whole, aligned vectors, and writes its result back.
//
//   fprop  a tile is up to 8 output columns; a tap costs one weight vector and one load a column
//   dgrad  the same over the gradient, for each residue of the input position modulo the stride
//   wgrad  a tile is up to 9 taps: a pixel costs the gradient's load and one a tap. Chains of about 64 pixels
//          are added in double, pieces of the batch in a fixed order
//
// Channels side by side are read and written in place, where a tile is 7 output columns: what a row of 3, 5
// or 7 taps reads stays in registers, and 7 sums hide the latency of an addition. wgrad's tile is the same 7
// outputs; its sums of a row of taps are loaded and stored for each, and 64 channels take turns, so that
// memory is read in order.
//
// The floor is a multiply-add a cycle, 117 GFLOP/s on the Zen 4 core measured, and as much where each takes a
// load. In place 3x3 reaches 70 to 77, 7x7 100, other filters 38 to 59. Contiguous tensors are transposed
// twice, as much work as 8 to 16 taps: 3x3 reaches 22 to 40, 7x7 up to 68. On a Zen 5 core (256; busy) 3x3 of
// 64 channels of four 56x56 reaches 120 in place, wgrad 117, and 60 transposed, wgrad 75; 7x7 170, wgrad 194.
#ifndef FASTCONV_ISA

#include <algorithm>
#include <vector>

#include "core/naive.h"
#include "cpu/bias_grad.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/conv_depthwise.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/vectors.inl"

#include "cpu/planes.inl"

namespace {

constexpr int kTileColumns = 8, kTileTaps = 9;
constexpr int kPlaced = 7;  // columns of a tile in place: what images of 7 * 2^n pixels divide into
constexpr int64_t kPlacedChannels = 64;  // that wgrad sums up at once
constexpr int64_t kChain = 64;

// A tap of a filter: where it finds its elements, and its vector of weights.
struct Tap {
  int64_t offset, weight;
};

// What becomes of a sum: act(sum + bias).
template <class T>
struct Finish {
  Vector<T> bias{};
  bool adds = false, relu = false;

  [[gnu::always_inline]] Vector<T> operator()(Vector<T> v) const {
    if (adds) v += bias;
    return relu ? (v <= 0 ? Vector<T>{} : v) : v;
  }
};
template <class T, class Element>
Finish<T> finish_of(const Epilogue& e, int64_t first_k, int64_t live) {
  const auto* bias = static_cast<const Element*>(e.bias);
  return {bias ? load_some<T>(bias + first_k, live) : Vector<T>{}, bias != nullptr, e.act == Act::relu};
}

// Outputs next to each other: elements from one's input to the next one's, and from output to output.
template <class Step>
struct Steps {
  Step in;
  int64_t out;
};

// out[j] = finish(the sum over the taps of weight * x[offset + j]), for `columns` j in steps.
template <class T, int columns, class Step>
[[gnu::always_inline]] inline void tile(const T* x, const Steps<Step>& steps, const Tap* taps, int64_t count,
                                        const Vector<T>* weights, const Finish<T>& finish, T* out) {
  Vector<T> sums[columns] = {};
  for (int64_t t = 0; t < count; ++t) {
    const T* from = x + taps[t].offset;
    const Vector<T> weight = weights[taps[t].weight];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) sums[j] += weight * load<T>(from + j * steps.in);
  }
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) store<T>(finish(sums[j]), out + j * steps.out);
}
// The same for a run-time number of columns, up to kTileColumns.
template <class T, class Step, int columns = kTileColumns>
void some_columns(int64_t size, const T* x, const Steps<Step>& steps, const Tap* taps, int64_t count,
                  const Vector<T>* weights, const Finish<T>& finish, T* out) {
  if constexpr (columns > 1) {
    if (size < columns)
      return some_columns<T, Step, columns - 1>(size, x, steps, taps, count, weights, finish, out);
  }
  tile<T, columns>(x, steps, taps, count, weights, finish, out);
}

// Calls f(first, size) for tiles of columns [0, count). No tile is narrow: what is left goes in two.
template <class F>
void each_tile(int64_t count, const F& f) {
  constexpr int64_t most = kTileColumns;
  for (int64_t j = 0; j < count;) {
    const int64_t rest = count - j;
    const int64_t size = rest > most && rest < 2 * most ? (rest + 1) / 2 : std::min(rest, most);
    f(j, size);
    j += size;
  }
}

// A row of outputs in lanes, `step` vectors apart in the input.
template <class T>
void row_in_lanes(int64_t size, const Vector<T>* x, int64_t step, const Tap* taps, int64_t count,
                  const Vector<T>* weights, const Finish<T>& finish, Vector<T>* out, int64_t out_step) {
  constexpr int64_t lanes = kLanes<T>;
  const auto run = [&](auto in) {
    const Steps<decltype(in)> steps{in, out_step * lanes};
    each_tile(size, [&](int64_t j, int64_t columns) {
      some_columns<T>(columns, reinterpret_cast<const T*>(x + j * step), steps, taps, count, weights, finish,
                      reinterpret_cast<T*>(out + j * out_step));
    });
  };
  if (step == 1) return run(std::integral_constant<int64_t, lanes>{});
  if (step == 2) return run(std::integral_constant<int64_t, 2 * lanes>{});
  run(step * lanes);
}

// One axis of a correlation: output i at tap t reads input i * step + at[t], which goes up with t.
struct Axis {
  int64_t outputs, inputs, step, taps;
  const int64_t* at;

  Rows inside(int64_t i) const {
    Rows valid{0, 0};
    for (int64_t t = 0; t < taps; ++t)
      if (i * step + at[t] >= 0 && i * step + at[t] < inputs) valid = {valid.size() ? valid.begin : t, t + 1};
    return valid;
  }
};

// `kPlaced` outputs of a row that read `lines` rows of the input, whose channels lie side by side: of each
// row `taps` neighbours, loaded once. x is what the first output's first tap meets; inputs `inside` exist.
template <class T>
struct Place {
  const T* x;
  int64_t line, pixel, lines;
  Rows inside;
};
template <class T, int taps, int step, bool border>
[[gnu::noinline]] void placed_tile(const Place<T>& from, const Vector<T>* weights, const Finish<T>& finish,
                                   T* out, int64_t out_step) {
  constexpr int inputs = (kPlaced - 1) * step + taps;
  Vector<T> sums[kPlaced] = {};
  const T* x = from.x;
  for (int64_t line = 0; line < (border ? from.lines : taps); ++line, x += from.line, weights += taps) {
    Vector<T> read[inputs];
#pragma GCC unroll 32
    for (int i = 0; i < inputs; ++i) {
      const bool exists = !border || (i >= from.inside.begin && i < from.inside.end);
      read[i] = exists ? load<T>(x + i * from.pixel) : Vector<T>{};
      keep(read[i]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t)
#pragma GCC unroll 8
      for (int j = 0; j < kPlaced; ++j) sums[j] += weights[t] * read[j * step + t];
  }
#pragma GCC unroll 8
  for (int j = 0; j < kPlaced; ++j) store<T>(finish(sums[j]), out + j * out_step);
}

// Blocks of channels side by side in input and output, which stay where they are.
template <class T, class FinishOf>
struct Blocks {
  View x;                    // of one image
  const Vector<T>* weights;  // [block][tap] vectors, `block_weights` in a block
  int64_t block_weights, count;
  const FinishOf& finish_of;
  T* y;  // the row of outputs
  int64_t y_step;

  const T* input(int64_t h, int64_t w) const { return static_cast<const T*>(x.data) + h * x.h + w * x.w; }
};

// A row of outputs in tiles of kPlaced, of which the last may overlap.
template <class T, int taps, int step, class FinishOf>
void placed_row(const Axis& rows, const Axis& cols, int64_t row, const Blocks<T, FinishOf>& blocks) {
  constexpr int64_t kAtOnce = 8;  // blocks
  constexpr int inputs = (kPlaced - 1) * step + taps;
  const Rows valid = rows.inside(row);
  const int64_t line = rows.taps > 1 ? rows.at[1] - rows.at[0] : 0;
  for (int64_t first = 0; first < blocks.count; first += kAtOnce)
    for (int64_t i = 0; i < cols.outputs; i += kPlaced) {
      i = std::min(i, cols.outputs - kPlaced);
      const int64_t w = i * step + cols.at[0];
      const Rows inside = {std::clamp<int64_t>(-w, 0, inputs),
                           std::clamp<int64_t>(cols.inputs - w, 0, inputs)};
      for (int64_t block = first; block < std::min(blocks.count, first + kAtOnce); ++block) {
        const int64_t channel = block * kLanes<T>;
        const Place<T> from{blocks.input(row * rows.step + rows.at[valid.begin], w) + channel,
                            line * blocks.x.h, blocks.x.w, valid.size(), inside};
        const Vector<T>* weights = blocks.weights + block * blocks.block_weights + valid.begin * taps;
        T* y = blocks.y + channel + i * blocks.y_step;
        if (inside.size() == inputs && valid.size() == taps) {
          placed_tile<T, taps, step, false>(from, weights, blocks.finish_of(block), y, blocks.y_step);
        } else {
          placed_tile<T, taps, step, true>(from, weights, blocks.finish_of(block), y, blocks.y_step);
        }
      }
    }
}

// The same for any filter: each output over the taps that lie inside.
template <class T, class FinishOf>
void row_in_place(const Axis& rows, const Axis& cols, int64_t row, const Blocks<T, FinishOf>& blocks,
                  Tap* taps) {
  const Rows valid = rows.inside(row);
  const auto columns = [&](int64_t first, int64_t size, const Rows& inside) {
    int64_t count = 0;
    for (int64_t r = valid.begin; r < valid.end; ++r)
      for (int64_t f = inside.begin; f < inside.end; ++f)
        taps[count++] = {
            (row * rows.step + rows.at[r]) * blocks.x.h + (first * cols.step + cols.at[f]) * blocks.x.w,
            r * cols.taps + f};
    const int64_t step = cols.step * blocks.x.w;
    each_tile(size, [&](int64_t j, int64_t tile_size) {
      for (int64_t block = 0; block < blocks.count; ++block)
        some_columns<T>(tile_size, blocks.input(0, 0) + block * kLanes<T> + j * step,
                        Steps<int64_t>{step, blocks.y_step}, taps, count,
                        blocks.weights + block * blocks.block_weights, blocks.finish_of(block),
                        blocks.y + block * kLanes<T> + (first + j) * blocks.y_step);
    });
  };
  for (int64_t i = 0; i < cols.outputs;) {
    const Rows inside = cols.inside(i);
    int64_t size = 1;
    for (; i + size < cols.outputs; ++size) {
      const Rows next = cols.inside(i + size);
      if (next.begin != inside.begin || next.end != inside.end) break;
    }
    columns(i, size, inside);
    i += size;
  }
}

// Whether there are functions for the row of a filter in place.
inline bool is_placed(const Axis& cols) {
  const bool dense = cols.taps > 1 && cols.at[1] - cols.at[0] == 1;
  return dense && cols.outputs >= kPlaced && cols.step <= 2 && cols.taps % 2 == 1 && cols.taps <= 7;
}
// f(taps, step), a function for the row of a filter in place; null where there is none.
template <class Function, class F>
Function of_placed(const Axis& cols, const F& f) {
  if (!is_placed(cols)) return nullptr;
  const auto of_step = [&](auto taps) -> Function {
    if (cols.step == 1) return f(taps, std::integral_constant<int, 1>{});
    return f(taps, std::integral_constant<int, 2>{});
  };
  switch (cols.taps) {
    case 3:
      return of_step(std::integral_constant<int, 3>{});
    case 5:
      return of_step(std::integral_constant<int, 5>{});
    case 7:
      return of_step(std::integral_constant<int, 7>{});
    default:
      return nullptr;
  }
}
template <class T, class FinishOf>
auto placed_row_of(const Axis& cols) {
  return of_placed<void (*)(const Axis&, const Axis&, int64_t, const Blocks<T, FinishOf>&)>(
      cols, [](auto taps, auto step) { return placed_row<T, taps, step, FinishOf>; });
}

// The filters of a block of channels in lanes, [tap] vectors, where lane i has output channel of_lane(i).
template <class T, class Element, class OfLane>
void filter_to_lanes(const ConvArgs& a, const OfLane& of_lane, Vector<T>* out) {
  const ConvShape& s = a.shape;
  const int64_t taps = s.R * s.S, end = s.K * taps;
  const auto* filter = static_cast<const Element*>(a.w.data);
  if (a.w.w == 1 && a.w.h == s.S && a.w.n == taps) {
    for (int64_t tap = 0; tap < taps; tap += kLanes<T>) {
      Vector<T> r[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        const int64_t at = of_lane(i) * taps + tap;
        r[i] = at + kLanes<T> <= end ? load<T>(filter + at)
                                     : load_some<T>(filter + at, std::min(taps - tap, end - at));
      }
      transpose<T>(r);
      std::copy(r, r + std::min<int64_t>(kLanes<T>, taps - tap), out + tap);
    }
    return;
  }
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int i = 0; i < kLanes<T>; ++i)
      out[tap][i] = T(filter[of_lane(i) * a.w.n + tap / s.S * a.w.h + tap % s.S * a.w.w]);
}

// Blocks of channels, and pieces of the scratch of a task.
template <class T>
int64_t blocks_of(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T>;
}
template <class T>
struct Scratch {
  Vector<T>*read, *write;
  Tap* taps;

  Scratch(const DepthwisePlan& plan, int64_t taps) {
    const int64_t reads = plan.planes * plan.read_rows * plan.read_cols;
    const int64_t writes = (plan.rows + plan.bands - 1) / plan.bands * plan.cols;
    read = static_cast<Vector<T>*>(
        thread_scratch((reads + writes) * kVectorBytes + taps * int64_t(sizeof(Tap))));
    write = read + reads;
    this->taps = reinterpret_cast<Tap*>(write + writes);
  }
};

// Rough time of a task that meets `vectors` pixels in lanes at each of `taps`.
inline double task_us(int64_t vectors, int64_t taps) { return double(vectors) * (20 + double(taps)) / 2500; }

// Taps of a filter over a patch of the input.
template <class T>
void place_taps(const ConvShape& s, const DepthwisePlan& plan, Tap* taps) {
  for (int64_t i = 0; i < s.R * s.S; ++i)
    taps[i] = {(i / s.S * s.dilation.h * plan.read_cols + i % s.S * s.dilation.w) * kLanes<T>, i};
}

// Where the rows, then the columns of a filter meet the input of output 0.
inline void place_axes(const ConvShape& s, int64_t* at) {
  for (int64_t r = 0; r < s.R; ++r) at[r] = r * s.dilation.h - s.padding.h;
  for (int64_t f = 0; f < s.S; ++f) at[s.R + f] = f * s.dilation.w - s.padding.w;
}

// Blocks of channels that can stay where they are.
template <class T, class Element>
int64_t blocks_in_place(const ConvArgs& a) {
  const bool dense = a.shape.group_k() == 1 && a.x.c == 1 && a.y.c == 1;
  const bool mostly_border = a.shape.W < 2 * a.shape.S;
  return std::is_same_v<T, Element> && dense && !mostly_border ? a.shape.K / kLanes<T> : 0;
}
template <class T>
void rows_in_place(const Axis& rows, const Axis& cols, int64_t images, int64_t blocks, const View& x,
                   const Vector<T>* weights, int64_t block_weights, const View& y, const Epilogue& epilogue) {
  if (blocks == 0) return;
  const int64_t taps = rows.taps * cols.taps;
  const auto finish = [&](int64_t block) { return finish_of<T, T>(epilogue, block * kLanes<T>, kLanes<T>); };
  const auto placed_row = placed_row_of<T, decltype(finish)>(cols);
  parallel_for(images * rows.outputs, task_us(cols.outputs * blocks, taps), [&](int64_t i) {
    const int64_t n = i / rows.outputs, row = i % rows.outputs;
    View image = x;
    image.data = static_cast<T*>(x.data) + n * x.n;
    const Blocks<T, decltype(finish)> all{
        image, weights, block_weights, blocks, finish, static_cast<T*>(y.data) + n * y.n + row * y.h, y.w};
    if (placed_row) return placed_row(rows, cols, row, all);
    row_in_place<T>(rows, cols, row, all, static_cast<Tap*>(thread_scratch(taps * int64_t(sizeof(Tap)))));
  });
}

template <class Element>
void fprop(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const DepthwisePlan plan = DepthwisePlan::fprop(s);
  const int64_t taps = s.R * s.S, blocks = blocks_of<T>(s.K);
  auto* filter = static_cast<Vector<T>*>(workspace);
  for (int64_t block = 0; block < blocks; ++block)
    filter_to_lanes<T, Element>(
        a, [&](int i) { return std::min(block * kLanes<T> + i, s.K - 1); }, filter + block * taps);

  const int64_t in_place = blocks_in_place<T, Element>(a), copied = blocks - in_place;
  if constexpr (std::is_same_v<T, Element>) {
    auto* at = reinterpret_cast<int64_t*>(filter + blocks * taps);
    place_axes(s, at);
    rows_in_place<T>({s.P, s.H, s.stride.h, s.R, at}, {s.Q, s.W, s.stride.w, s.S, at + s.R}, s.N, in_place,
                     a.x, filter, taps, a.y, a.epilogue);
  }
  parallel_for(s.N * copied * plan.bands, task_us(plan.rows * plan.cols / plan.bands, taps), [&](int64_t i) {
    const int64_t n = i / plan.bands / copied, block = in_place + i / plan.bands % copied;
    const int64_t first = block * kLanes<T>;
    const Rows rows = plan.band(i % plan.bands);
    Scratch<T> scratch(plan, taps);
    place_taps<T>(s, plan, scratch.taps);

    const Patch in{s.H,
                   s.W,
                   rows.begin * s.stride.h - s.padding.h,
                   -s.padding.w,
                   (rows.size() - 1) * s.stride.h + (s.R - 1) * s.dilation.h + 1,
                   plan.read_cols};
    const Channels<T> from(a.x, s.K - first, [&](int lane) { return (first + lane) / s.group_k(); });
    patch_to_lanes<T>(static_cast<const Element*>(a.x.data) + n * a.x.n, a.x, from, in, scratch.read);
    const Channels<T> to(a.y, s.K - first, [&](int lane) { return first + lane; });
    const Finish<T> finish = finish_of<T, Element>(a.epilogue, first, to.live);
    for (int64_t row = 0; row < rows.size(); ++row)
      row_in_lanes<T>(s.Q, scratch.read + in.at(row * s.stride.h, 0), s.stride.w, scratch.taps, taps,
                      filter + block * taps, finish, scratch.write + row * s.Q, 1);
    patch_from_lanes<T>(static_cast<Element*>(a.y.data) + n * a.y.n, a.y, to,
                        {s.P, s.Q, rows.begin, 0, rows.size(), s.Q}, scratch.write);
  });
}

// Along one axis: the taps by which outputs reach the input positions that are `residue` modulo the stride.
struct Reaching {
  int64_t first = 0, step = 1, count = 0;

  Reaching(int64_t residue, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
    for (int64_t t = filter - 1; t >= 0; --t) {
      if ((residue + padding - t * dilation) % stride != 0) continue;
      if (count == 0) first = t;
      if (count == 1) step = t - first;
      ++count;
    }
  }
};

template <class Element>
void dgrad(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const DepthwisePlan plan = DepthwisePlan::dgrad(s);
  const int64_t taps = s.R * s.S, all_taps = s.group_k() * taps, blocks = blocks_of<T>(s.C);
  auto* filter = static_cast<Vector<T>*>(workspace);  // [block, output channel of the group, residue's taps]
  // The taps of a residue follow each other; f(row residue, column residue, rows, columns, first tap).
  const auto each_residue = [&](const auto& f) {
    int64_t first = 0;
    for (int64_t h = 0; h < s.stride.h; ++h)
      for (int64_t w = 0; w < s.stride.w; ++w) {
        const Reaching r(h, s.R, s.stride.h, s.padding.h, s.dilation.h);
        const Reaching c(w, s.S, s.stride.w, s.padding.w, s.dilation.w);
        f(h, w, r, c, first);
        first += s.group_k() * r.count * c.count;
      }
  };
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < s.group_k(); ++j) {
      auto* lanes = static_cast<Vector<T>*>(thread_scratch(taps * kVectorBytes));
      filter_to_lanes<T, Element>(
          a, [&](int i) { return std::min(block * kLanes<T> + i, s.C - 1) * s.group_k() + j; }, lanes);
      each_residue([&](int64_t, int64_t, const Reaching& r, const Reaching& c, int64_t first) {
        Vector<T>* out = filter + block * all_taps + first + j * r.count * c.count;
        for (int64_t i = 0; i < r.count; ++i)
          for (int64_t k = 0; k < c.count; ++k)
            *out++ = lanes[(r.first + i * r.step) * s.S + c.first + k * c.step];
      });
    }

  const int64_t in_place = blocks_in_place<T, Element>(a), copied = blocks - in_place;
  if constexpr (std::is_same_v<T, Element>) {
    auto* at = reinterpret_cast<int64_t*>(filter + blocks * all_taps);
    each_residue([&](int64_t h, int64_t w, const Reaching& r, const Reaching& c, int64_t first) {
      if (h >= s.H || w >= s.W) return;
      for (int64_t t = 0; t < r.count; ++t)
        at[t] = (h + s.padding.h - (r.first + t * r.step) * s.dilation.h) / s.stride.h;
      for (int64_t t = 0; t < c.count; ++t)
        at[r.count + t] = (w + s.padding.w - (c.first + t * c.step) * s.dilation.w) / s.stride.w;
      View x = a.x;
      x.data = static_cast<T*>(x.data) + h * x.h + w * x.w;
      x.h *= s.stride.h, x.w *= s.stride.w;
      rows_in_place<T>({(s.H - h + s.stride.h - 1) / s.stride.h, s.P, 1, r.count, at},
                       {(s.W - w + s.stride.w - 1) / s.stride.w, s.Q, 1, c.count, at + r.count}, s.N,
                       in_place, a.y, filter + first, all_taps, x, Epilogue{});
    });
  }

  // The first output that may reach a row or column of the input.
  const auto lowest = [](int64_t at, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t low = at + padding - (filter - 1) * dilation;
    return low >= 0 ? low / stride : -((-low + stride - 1) / stride);
  };
  parallel_for(s.N * copied * plan.bands, task_us(plan.rows * plan.cols / plan.bands, taps), [&](int64_t i) {
    const int64_t n = i / plan.bands / copied, block = in_place + i / plan.bands % copied;
    const int64_t first = block * kLanes<T>;
    const Rows rows = plan.band(i % plan.bands);
    Scratch<T> scratch(plan, all_taps);
    const Patch in{s.P,
                   s.Q,
                   lowest(rows.begin, s.R, s.stride.h, s.padding.h, s.dilation.h),
                   lowest(0, s.S, s.stride.w, s.padding.w, s.dilation.w),
                   plan.read_rows,
                   plan.read_cols};
    const int64_t plane = in.at(plan.read_rows, 0);
    for (int64_t j = 0; j < s.group_k(); ++j) {
      const Channels<T> from(a.y, s.C - first, [&](int lane) { return (first + lane) * s.group_k() + j; });
      patch_to_lanes<T>(static_cast<const Element*>(a.y.data) + n * a.y.n, a.y, from, in,
                        scratch.read + j * plane);
    }
    each_residue([&](int64_t h, int64_t w, const Reaching& r, const Reaching& c, int64_t first_tap) {
      const int64_t skipped = (s.stride.h - (rows.begin - h) % s.stride.h) % s.stride.h;
      const int64_t begin = rows.begin >= h ? rows.begin + skipped : h;
      if (begin >= rows.end || w >= s.W) return;
      Tap* tap = scratch.taps;
      for (int64_t j = 0; j < s.group_k(); ++j)
        for (int64_t t = 0; t < r.count; ++t)
          for (int64_t u = 0; u < c.count; ++u) {
            const int64_t row = (begin + s.padding.h - (r.first + t * r.step) * s.dilation.h) / s.stride.h;
            const int64_t col = (w + s.padding.w - (c.first + u * c.step) * s.dilation.w) / s.stride.w;
            *tap = {(j * plane + in.at(row - in.h, col - in.w)) * kLanes<T>, tap - scratch.taps};
            ++tap;
          }
      const int64_t columns = (s.W - w + s.stride.w - 1) / s.stride.w;
      for (int64_t row = begin, k = 0; row < rows.end; row += s.stride.h, ++k)
        row_in_lanes<T>(columns, scratch.read + in.at(k, 0), 1, scratch.taps, tap - scratch.taps,
                        filter + block * all_taps + first_tap, Finish<T>{},
                        scratch.write + (row - rows.begin) * s.W + w, s.stride.w);
    });
    const Channels<T> to(a.x, s.C - first, [&](int lane) { return first + lane; });
    patch_from_lanes<T>(static_cast<Element*>(a.x.data) + n * a.x.n, a.x, to,
                        {s.H, s.W, rows.begin, 0, rows.size(), s.W}, scratch.write);
  });
}

// totals[t] += the sum over `rows` rows of `cols` pixels of gradient * x[place of t], for `taps` t.
struct Walk {
  int64_t rows, cols, row, step;  // of x: vectors from a row to the next, and from a column
};
template <class T, int taps>
[[gnu::always_inline]] inline void sum_pixels(const Vector<T>* gradient, const Vector<T>* x,
                                              const Tap* places, const Walk& walk,
                                              double (*totals)[kLanes<T>]) {
  Vector<T> sums[taps] = {};
  const Vector<T>* from[taps];
#pragma GCC unroll 16
  for (int t = 0; t < taps; ++t) from[t] = x + places[t].offset / kLanes<T>;
  for (int64_t row = 0; row < walk.rows; ++row) {
    for (int64_t at = row * walk.row, end = at + walk.cols * walk.step; at < end; at += walk.step) {
      const Vector<T> g = *gradient++;
#pragma GCC unroll 16
      for (int t = 0; t < taps; ++t) sums[t] += g * from[t][at];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < taps; ++t)
    for (int i = 0; i < kLanes<T>; ++i) totals[t][i] += sums[t][i];
}
template <class T, int taps = kTileTaps>
void sum_pixels_of(int64_t count, const Vector<T>* gradient, const Vector<T>* x, const Tap* places,
                   const Walk& walk, double (*totals)[kLanes<T>]) {
  if constexpr (taps > 1) {
    if (count < taps) return sum_pixels_of<T, taps - 1>(count, gradient, x, places, walk, totals);
  }
  sum_pixels<T, taps>(gradient, x, places, walk, totals);
}

// Adds to sums[tap] what kPlaced outputs of a row give, of which those before `first` do not count.
template <class T, int taps, int step, bool border>
[[gnu::noinline]] void placed_sums(const Place<T>& from, const T* gradient, int64_t pixel, int64_t first,
                                   Vector<T>* sums) {
  constexpr int inputs = (kPlaced - 1) * step + taps;
  Vector<T> g[kPlaced];
#pragma GCC unroll 8
  for (int j = 0; j < kPlaced; ++j)
    g[j] = !border || j >= first ? load<T>(gradient + j * pixel) : Vector<T>{};
  const T* x = from.x;
  for (int64_t line = 0; line < (border ? from.lines : taps); ++line, x += from.line, sums += taps) {
    Vector<T> read[inputs];
#pragma GCC unroll 32
    for (int i = 0; i < inputs; ++i) {
      const bool exists = !border || (i >= from.inside.begin && i < from.inside.end);
      read[i] = exists ? load<T>(x + i * from.pixel) : Vector<T>{};
      keep(read[i]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      Vector<T> sum = sums[t];
#pragma GCC unroll 8
      for (int j = 0; j < kPlaced; ++j) sum += g[j] * read[j * step + t];
      sums[t] = sum;
    }
  }
}

// The same for a row of outputs and blocks of channels; sums of a block are `block_sums` vectors.
template <class T>
struct Planes {
  View x, gradient;  // of one image and the first block
  int64_t blocks, block_sums;
};
template <class T, int taps, int step>
void placed_sums_row(const Axis& rows, const Axis& cols, int64_t row, const Planes<T>& planes,
                     Vector<T>* sums) {
  constexpr int inputs = (kPlaced - 1) * step + taps;
  const Rows valid = rows.inside(row);
  const int64_t line = rows.taps > 1 ? rows.at[1] - rows.at[0] : 0;
  const View &x = planes.x, &gradient = planes.gradient;
  for (int64_t next = 0; next < cols.outputs; next += kPlaced) {
    const int64_t i = std::min(next, cols.outputs - kPlaced), w = i * step + cols.at[0];
    const Rows inside = {std::clamp<int64_t>(-w, 0, inputs), std::clamp<int64_t>(cols.inputs - w, 0, inputs)};
    const bool border = i != next || inside.size() != inputs || valid.size() != taps;
    const auto add = border ? placed_sums<T, taps, step, true> : placed_sums<T, taps, step, false>;
    for (int64_t block = 0; block < planes.blocks; ++block)
      add({static_cast<const T*>(x.data) + (row * rows.step + rows.at[valid.begin]) * x.h + w * x.w +
               block * kLanes<T>,
           line * x.h, x.w, valid.size(), inside},
          static_cast<const T*>(gradient.data) + row * gradient.h + i * gradient.w + block * kLanes<T>,
          gradient.w, next - i, sums + block * planes.block_sums + valid.begin * taps);
  }
}

// Adds the sums over output rows [begin, end) of all images to totals[block][tap].
template <class T>
void sums_in_place(const ConvArgs& a, const Axis& rows, const Axis& cols, int64_t first, int64_t blocks,
                   const Rows& units, double (*totals)[kLanes<T>]) {
  const auto row_of = of_placed<void (*)(const Axis&, const Axis&, int64_t, const Planes<T>&, Vector<T>*)>(
      cols, [](auto taps, auto step) { return placed_sums_row<T, taps, step>; });
  const int64_t taps = rows.taps * cols.taps, count = blocks * taps;
  auto* const sums = static_cast<Vector<T>*>(thread_scratch(count * kVectorBytes));
  const int64_t chain = std::max<int64_t>(1, kChain / std::max<int64_t>(1, cols.outputs));
  for (int64_t unit = units.begin; unit < units.end;) {
    std::fill(sums, sums + count, Vector<T>{});
    for (int64_t i = 0; i < chain && unit < units.end; ++i, ++unit) {
      const int64_t n = unit / rows.outputs;
      Planes<T> planes{a.x, a.y, blocks, taps};
      planes.x.data = static_cast<T*>(a.x.data) + n * a.x.n + first;
      planes.gradient.data = static_cast<T*>(a.y.data) + n * a.y.n + first;
      row_of(rows, cols, unit % rows.outputs, planes, sums);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < kLanes<T>; ++l) totals[i][l] += sums[i][l];
  }
}

template <class Element>
void wgrad(const ConvArgs& a, void* workspace) {
  using T = typename Compute<Element>::type;
  const ConvShape& s = a.shape;
  const DepthwisePlan plan = DepthwisePlan::fprop(s);
  const int64_t taps = s.R * s.S, blocks = blocks_of<T>(s.K), units = s.N * plan.bands,
                pieces = conv_wgrad_depthwise_pieces(s, units);
  using Totals = double (*)[kLanes<T>];
  auto* all_totals = static_cast<Totals>(workspace);  // [piece, block, tap]

  std::vector<int64_t> at(s.R + s.S);
  place_axes(s, at.data());
  const Axis rows{s.P, s.H, s.stride.h, s.R, at.data()}, cols{s.Q, s.W, s.stride.w, s.S, at.data() + s.R};
  const int64_t in_place = is_placed(cols) ? blocks_in_place<T, Element>(a) : 0, copied = blocks - in_place;
  if constexpr (std::is_same_v<T, Element>) {
    constexpr int64_t at_once = kPlacedChannels / kLanes<T>;
    const int64_t groups = (in_place + at_once - 1) / at_once;
    parallel_for(groups * pieces, task_us(s.N * s.P * s.Q * at_once / pieces, taps), [&](int64_t task) {
      const int64_t piece = task / groups, block = task % groups * at_once;
      const int64_t count = std::min(at_once, in_place - block);
      Totals totals = all_totals + (piece * blocks + block) * taps;
      std::fill(totals[0], totals[count * taps], 0.0);
      sums_in_place<T>(a, rows, cols, block * kLanes<T>, count,
                       {part_begin(piece, pieces, s.N * s.P), part_begin(piece + 1, pieces, s.N * s.P)},
                       totals);
    });
  }
  const double piece_us = task_us(s.N * plan.rows * plan.cols / pieces, taps);
  parallel_for(pieces * copied, piece_us, [&](int64_t task) {
    const int64_t block = in_place + task % copied, piece = task / copied, first = block * kLanes<T>;
    Totals totals = all_totals + (piece * blocks + block) * taps;
    std::fill(totals[0], totals[taps], 0.0);
    Scratch<T> scratch(plan, taps);
    place_taps<T>(s, plan, scratch.taps);
    const Channels<T> of_x(a.x, s.K - first, [&](int lane) { return (first + lane) / s.group_k(); });
    const Channels<T> of_y(a.y, s.K - first, [&](int lane) { return first + lane; });

    for (int64_t unit = part_begin(piece, pieces, units); unit < part_begin(piece + 1, pieces, units);
         ++unit) {
      const int64_t n = unit / plan.bands;
      const Rows rows = plan.band(unit % plan.bands);
      const Patch in{s.H,
                     s.W,
                     rows.begin * s.stride.h - s.padding.h,
                     -s.padding.w,
                     (rows.size() - 1) * s.stride.h + (s.R - 1) * s.dilation.h + 1,
                     plan.read_cols};
      patch_to_lanes<T>(static_cast<const Element*>(a.x.data) + n * a.x.n, a.x, of_x, in, scratch.read);
      patch_to_lanes<T>(static_cast<const Element*>(a.y.data) + n * a.y.n, a.y, of_y,
                        {s.P, s.Q, rows.begin, 0, rows.size(), s.Q}, scratch.write);
      const int64_t chain = std::max<int64_t>(1, kChain / std::max<int64_t>(1, s.Q));
      for (int64_t row = 0; row < rows.size(); row += chain) {
        const Walk walk{std::min(chain, rows.size() - row), s.Q, in.at(s.stride.h, 0), s.stride.w};
        for (int64_t tap = 0; tap < taps; tap += kTileTaps)
          sum_pixels_of<T>(std::min<int64_t>(kTileTaps, taps - tap), scratch.write + row * s.Q,
                           scratch.read + in.at(row * s.stride.h, 0), scratch.taps + tap, walk, totals + tap);
      }
    }
  });
  for (int64_t k = 0; k < s.K; ++k)
    for (int64_t tap = 0; tap < taps; ++tap) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece)
        sum += all_totals[(piece * blocks + k / kLanes<T>)*taps + tap][k % kLanes<T>];
      naive::at_mut<Element>(a.w, k, 0, 0, tap / s.S, tap % s.S) = narrow<Element>(sum);
    }
}

}  // namespace

void conv_fprop_depthwise(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { fprop<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

void conv_dgrad_depthwise(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { dgrad<std::remove_pointer_t<decltype(t)>>(a, workspace); });
}

void conv_wgrad_depthwise(const ConvArgs& a, void* workspace, void*) {
  with_dtype(a.dtype, [&](auto* t) { wgrad<std::remove_pointer_t<decltype(t)>>(a, workspace); });
  conv_bias_grad(a);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
