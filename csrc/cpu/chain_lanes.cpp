// SPDX-License-Identifier: MIT
// A chain of convolutions and linear layers with the batch in the vector lanes (lanes.inl): a block of images
// goes through all stages, and back, in lanes. What lies between the stages stays in the second-level cache,
// or, for backward, in `saved` as it is.
//
//   convolutions  as in conv_lanes.cpp, on whole images
//   linear        y[outputs] = w[outputs, features] x[features], a tile of outputs by one vector of images;
//                 each weight is broadcast from where it lies. wgrad turns x so that features are in the
//                 lanes and broadcasts the gradient: a tile of outputs by vectors of features, summed over
//                 the images of a block.
//
// Pieces of the batch have sums of their own for the weights, which add up in a fixed order. LeNet's floor is
// 416,000 multiply-adds an image forward and 715,000 backward (about 300,000 by windows): 7.3, 12.4 and 5.2
// us on a Zen 4 core that does 57,000 a microsecond. Reached at 64 images: 7.7 us forward, 16.7 us
// backward, 10.9 us by windows.
#ifndef FASTCONV_ISA

#include <cstring>

#include "cpu/chain_plan.h"
#include "cpu/parallel.h"
#include "cpu/vectors.h"

#define FASTCONV_FILE "cpu/chain_lanes.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/gemm.inl"
#include "cpu/lanes_conv.inl"
#include "cpu/lanes_windows.inl"

namespace {

// Arrays of `saved`: bands of the i-th block, and their offsets in bytes.
template <class T>
Vector<T>* saved_output(const ChainArgs& a, const ChainBands& bands, int64_t i, int64_t block) {
  return static_cast<Vector<T>*>(
             static_cast<void*>(static_cast<char*>(a.saved) + bands.stage(i).saved_output)) +
         block * bands.x(i + 1).size();
}
template <class T>
uint8_t* saved_offsets(const ChainArgs& a, const ChainBands& bands, int64_t i, int64_t block) {
  return static_cast<uint8_t*>(a.saved) + bands.stage(i).saved_offsets +
         block * bands.x(i + 1).size() * kLanes<T>;
}

// Zeros in the lanes that hold no image.
template <class T>
void clear_dead_lanes(const Block<T>& block, int64_t size, Vector<T>* v) {
  if (block.live == kLanes<T>) return;
  Vector<Lane<T>> live;
  for (int i = 0; i < kLanes<T>; ++i) live[i] = i < block.live ? -1 : 0;
  for (int64_t i = 0; i < size; ++i) v[i] = (Vector<T>)((Vector<Lane<T>>)v[i] & live);
}

// --- products of a matrix in memory with lanes

constexpr int kOutputsByRow = kVectorBytes == 64 ? 8 : 6, kOutputsByColumn = kVectorBytes == 64 ? 16 : 12;

// y[j] (+)= sum over t of w[j * step + t] * x[t], or of w[t * step + j] * x[t].
template <class T, int outputs, bool by_row>
void product_tile(const T* w, int64_t step, int64_t count, const Vector<T>* x, Vector<T>* y,
                  bool accumulate) {
  constexpr int chains = by_row ? 2 : 1;
  Vector<T> sums[chains][outputs];
#pragma GCC unroll 2
  for (int c = 0; c < chains; ++c)
#pragma GCC unroll 16
    for (int j = 0; j < outputs; ++j) sums[c][j] = Vector<T>{};
  int64_t t = 0;
  for (; t + chains <= count; t += chains) {
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c) {
      const Vector<T> v = x[t + c];
#pragma GCC unroll 16
      for (int j = 0; j < outputs; ++j)
        sums[c][j] += (by_row ? w[j * step + t + c] : w[(t + c) * step + j]) * v;
    }
  }
  for (; t < count; ++t)
#pragma GCC unroll 16
    for (int j = 0; j < outputs; ++j) sums[0][j] += (by_row ? w[j * step + t] : w[t * step + j]) * x[t];
#pragma GCC unroll 16
  for (int j = 0; j < outputs; ++j) {
    Vector<T> sum = sums[0][j];
    if constexpr (chains == 2) sum += sums[1][j];
    y[j] = accumulate ? y[j] + sum : sum;
  }
}

template <class T, bool by_row, int outputs = by_row ? kOutputsByRow : kOutputsByColumn, class... Rest>
void product_some(int64_t count, Rest... rest) {
  if constexpr (outputs > 1) {
    if (count < outputs) return product_some<T, by_row, outputs - 1>(count, rest...);
  }
  product_tile<T, outputs, by_row>(rest...);
}

// The same for any number of outputs; sums of kDepth terms add up.
template <class T, bool by_row>
void product(const T* w, int64_t step, int64_t outputs, int64_t terms, const Vector<T>* x, Vector<T>* y) {
  constexpr int64_t most = by_row ? kOutputsByRow : kOutputsByColumn;
  const int64_t tiles = (outputs + most - 1) / most;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t j = part_begin(i, tiles, outputs), count = part_begin(i + 1, tiles, outputs) - j;
    for (int64_t t = 0; t == 0 || t < terms; t += kDepth<T>)
      product_some<T, by_row>(count, w + (by_row ? j * step + t : t * step + j), step,
                              std::min(kDepth<T>, terms - t), x + t, y + j, t > 0);
  }
}

// A band's pixels as features: channel after channel.
template <class T>
const Vector<T>* flattened(const Band& band, const Vector<T>* x, Vector<T>* flat) {
  if (band.rows * band.cols == 1) return x;
  const int64_t cells = band.rows * band.cols;
  for (int64_t i = 0; i < cells; ++i)
    for (int64_t c = 0; c < band.channels; ++c) flat[c * cells + i] = x[i * band.pitch() + c];
  return flat;
}
template <class T>
void unflatten(const Band& band, const Vector<T>* flat, Vector<T>* x) {
  const int64_t cells = band.rows * band.cols;
  for (int64_t i = 0; i < cells; ++i)
    for (int64_t c = 0; c < band.channels; ++c) x[i * band.pitch() + c] = flat[c * cells + i];
}

// A linear stage's weights with features side by side: where they are, or as a copy.
template <class T>
const T* dense_weights(const ChainBands& bands, int64_t i, T* copy) {
  const View& w = bands.conv(i).w;
  const auto* from = static_cast<const T*>(w.data);
  if (chain_in_place(bands.stage(i))) return from;
  const int64_t features = bands.features(i);
  for (int64_t k = 0; k < bands.shape(i).K; ++k)
    for (int64_t t = 0; t < features; ++t) copy[k * features + t] = from[k * w.n + t * w.w];
  return copy;
}
int64_t weights_step(const ChainBands& bands, int64_t i) {
  return chain_in_place(bands.stage(i)) ? bands.conv(i).w.n : bands.features(i);
}

// --- forward

template <class T>
struct Forward {
  const ChainArgs& a;
  ChainBands bands;
  ChainForwardTables<T> tables;
  const T* weights[kMostStages];  // of linear stages

  Forward(const ChainArgs& args, Carver&& carver) : a(args), bands(args), tables(carver, bands) {
    for (int64_t i = 0; i < bands.count(); ++i) {
      ChainForwardStage<T>& stage = tables.stages[i];
      const ConvShape& s = bands.shape(i);
      const auto* bias = static_cast<const T*>(bands.conv(i).epilogue.bias);
      for (int64_t k = 0; k < s.K; ++k) stage.bias[k] = bias ? bias[k] : T(0);
      if (bands.is_linear(i)) {
        weights[i] = dense_weights<T>(bands, i, stage.weights);
        continue;
      }
      const Band x = bands.x(i), y = bands.x(i + 1);
      pack_filters<T, T>(s, bands.conv(i).w, x, stage.weights, stage.taps);
      // Where 2x2 pixels become one, all four have its place.
      const int64_t shrink = bands.pools_tile(i) ? 2 : 1;
      const int64_t rows = bands.pools_tile(i) ? 2 * bands.out(i).h : s.P;
      const int64_t cols = bands.pools_tile(i) ? 2 * bands.out(i).w : s.Q;
      const bool inside = bands.pools_band(i);
      const Band to = inside ? bands.filtered(i) : y;
      const int64_t top = inside ? 0 : bands.top(i + 1), left = inside ? 0 : bands.left(i + 1);
      Axis::rows(s).steps(
          0, rows, stage.list.rows, [&](int64_t h) { return x.at(h, 0); },
          [&](int64_t h) { return to.at(top + h / shrink, 0); });
      Axis::cols(s).steps(
          0, cols, stage.list.cols, [&](int64_t w) { return x.at(0, w); },
          [&](int64_t w) { return to.at(0, left + w / shrink); });
      stage.pixels = stage.list.tiles(rows, cols);
    }
  }

  void operator()(int64_t index) const {
    const Block<T> block(index, bands.shape(0).N);
    const bool saves = a.saved != nullptr;
    auto at = in_scratch<ChainForwardArrays<Vector<T>>>(bands, saves);
    const ConvShape& s = bands.shape(0);
    read_band<T, T>(a.x, s.H, s.W, bands.x(0), -bands.top(0), -bands.left(0), block, at.x[0]);
    const Vector<T>* x = at.x[0];
    for (int64_t i = 0; i < bands.count(); ++i) {
      const bool keeps = saves && i + 1 < bands.count();
      Vector<T>* const y = keeps ? saved_output<T>(a, bands, i, index) : at.x[i + 1];
      const Band band = bands.x(i + 1);
      if (bands.is_padded(i + 1)) {
        const int64_t top = bands.top(i + 1), left = bands.left(i + 1);
        zero_frame(band, {top, top + bands.out(i).h}, {left, left + bands.out(i).w}, y);
      }
      if (bands.is_linear(i))
        linear(i, x, at.flat, y);
      else
        convolve(i, x, at, saves && bands.pools(i) ? at.offsets : nullptr, y);
      if (saves && bands.pools(i)) {
        uint8_t* const bytes = saved_offsets<T>(a, bands, i, index);
        for (int64_t j = 0; j < band.size(); ++j) store_numbers<T>(at.offsets[j], bytes + j * kLanes<T>);
      }
      if (keeps) clear_dead_lanes<T>(block, band.size(), y);
      x = y;
    }
    write_band<T, T>(a.y, bands.x(bands.count()), 0, block, x);
  }

 private:
  void linear(int64_t i, const Vector<T>* x, Vector<T>* flat, Vector<T>* y) const {
    const int64_t outputs = bands.shape(i).K;
    product<T, true>(weights[i], weights_step(bands, i), outputs, bands.features(i),
                     flattened<T>(bands.x(i), x, flat), y);
    for (int64_t k = 0; k < outputs; ++k)
      y[k] = activated<T>(y[k] + tables.stages[i].bias[k], bands.conv(i).epilogue.act);
  }
  void convolve(int64_t i, const Vector<T>* x, const ChainForwardArrays<Vector<T>>& at, Vector<T>* offsets,
                Vector<T>* y) const {
    const ChainForwardStage<T>& stage = tables.stages[i];
    const ConvShape& s = bands.shape(i);
    const Epilogue& e = bands.conv(i).epilogue;
    const bool tile = bands.pools_tile(i), band = bands.pools_band(i);
    correlate_groups<T>(s, stage.weights, stage.taps, x, stage.pixels,
                        {stage.bias, e.act, tile, band ? at.filtered : y, tile ? offsets : nullptr});
    if (!band) return;
    const Band to = bands.x(i + 1);
    const int64_t first = to.at(bands.top(i + 1), bands.left(i + 1));
    pool_band<T>(e.pool, bands.filtered(i), 0, s.P, s.Q, at.filtered, to, 0, e.pool.out.h, y + first,
                 offsets ? offsets + first : nullptr);
  }
};

template <class T>
void forward(const ChainArgs& a, void* workspace) {
  const Forward<T> pass(a, Carver(workspace));
  parallel_for(Block<T>::count(pass.bands.shape(0).N), pass.bands.macs_an_image() / 5e3, pass);
}

// --- backward

// c[rows][row_step] += gradient[rows][lanes] x[lanes][row_step], `vectors` of each row.
template <class T, int rows, int vectors>
void outer_tile(const Vector<T>* gradient, const T* x, T* c, int64_t step) {
  micro_kernel<T, rows, vectors>(kLanes<T>, reinterpret_cast<const T*>(gradient), kLanes<T>, 1, x, step, c,
                                 step, true);
}
template <class T, int rows, int vectors = kVectors, class... Rest>
void outer_vectors(int64_t vector_count, Rest... rest) {
  if constexpr (vectors > 1) {
    if (vector_count < vectors) return outer_vectors<T, rows, vectors - 1>(vector_count, rest...);
  }
  outer_tile<T, rows, vectors>(rest...);
}
template <class T, int rows = kRows, class... Rest>
void outer_some(int64_t row_count, int64_t vector_count, Rest... rest) {
  if constexpr (rows > 1) {
    if (row_count < rows) return outer_some<T, rows - 1>(row_count, vector_count, rest...);
  }
  outer_vectors<T, rows>(vector_count, rest...);
}

template <class T>
struct Backward {
  const ChainBackwardArgs& b;
  const ChainArgs& a;
  ChainBackwardPlan plan;
  const ChainBands& bands;
  ChainBackwardTables<T> tables;
  const T* weights[kMostStages];  // of linear stages

  Backward(const ChainBackwardArgs& args, Carver&& carver)
      : b(args), a(args.chain), plan(args), bands(plan.bands), tables(carver, plan) {
    for (int64_t i = plan.first; i < bands.count(); ++i) {
      ChainBackwardStage<T>& stage = tables.stages[i];
      const ConvShape& s = bands.shape(i);
      if (bands.is_linear(i)) {
        if (plan.dgrad(i)) weights[i] = dense_weights<T>(bands, i, stage.weights);
        continue;
      }
      const Band x = bands.x(i), gradient = bands.gradient(i, plan.dgrad(i));
      const int64_t p = bands.corner_h(i, plan.dgrad(i)), q = bands.corner_w(i, plan.dgrad(i));
      std::fill(stage.zeros, stage.zeros + s.group_c(), T(0));
      if (plan.dgrad(i))
        PhaseFilters<T>{s, stage.weights, stage.phase_taps}.template pack<T>(bands.conv(i).w, gradient);
      each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
        stage.taps[t] = bytes_of(x.at(r * s.dilation.h, f * s.dilation.w) + c);
      });
      Axis::rows(s).steps(
          0, s.P, stage.wgrad.rows, [&](int64_t h) { return x.at(h, 0); },
          [&](int64_t h) { return gradient.at(h - p, 0); });
      Axis::cols(s).steps(
          0, s.Q, stage.wgrad.cols, [&](int64_t w) { return x.at(0, w); },
          [&](int64_t w) { return gradient.at(0, w - q); });
      stage.wgrad.tiles(s.P, s.Q);
      if (kVectorBytes == 64 && bands.by_windows(i)) prepare_windows(i, stage);
    }
  }

  // The gradients of one block of images, the weights' added to sums.
  void operator()(int64_t index, T* sums) const {
    const Block<T> block(index, bands.shape(0).N);
    auto at = in_scratch<ChainBackwardArrays<Vector<T>>>(plan);
    Vector<T>*grad = at.grad[0], *next = at.grad[1];
    const int64_t last = bands.count() - 1;
    const Band y = bands.x(last + 1);
    read_band<T, T>(b.grad_y, y.rows, y.cols, y, 0, 0, block, grad);
    if (plan.first == 0 && plan.wgrad(0)) {
      const ConvShape& s = bands.shape(0);
      read_band<T, T>(a.x, s.H, s.W, bands.x(0), -bands.top(0), -bands.left(0), block, at.x);
    }
    for (int64_t i = last; i >= plan.first; --i) {
      const int64_t size = bands.x(i + 1).size();
      if (bands.conv(i).epilogue.act == Act::relu) {
        if (i == last) read_band<T, T>(a.y, y.rows, y.cols, y, 0, 0, block, at.y);
        const Vector<T>* gate = i == last ? at.y : saved_output<T>(a, bands, i, index);
        for (int64_t j = 0; j < size; ++j) grad[j] = gate[j] <= 0 ? Vector<T>{} : grad[j];
      }
      clear_dead_lanes<T>(block, size, grad);
      const Vector<T>* x = i == 0 ? at.x : saved_output<T>(a, bands, i - 1, index);
      bands.is_linear(i) ? linear(i, x, grad, at, next, sums) : convolve(i, index, x, grad, at, next, sums);
      std::swap(grad, next);
    }
    if (!b.grad_x.data) return;
    const ConvShape& s = bands.shape(0);
    from_lanes<T, T>(b.grad_x, bands.x(0),
                     {block.image, block.live, 0, 0, s.H, s.W, bands.top(0), bands.left(0)}, grad);
  }

  // Adds the pieces up and stores the gradients of stage i's k-th output.
  void store_sums(int64_t i, int64_t k) const {
    const ConvShape& s = bands.shape(i);
    const View& w = bands.stage(i).grad_w;
    const int64_t row = plan.row(i);
    T* const first = tables.pieces + plan.sums_at[i];
    const auto add_pieces = [&](int64_t begin, int64_t count) {
      for (int64_t piece = 1; piece < plan.pieces; ++piece)
        for (int64_t j = begin; j < begin + count; ++j) first[j] += first[piece * plan.sums() + j];
    };
    add_pieces(k * row, row);
    add_pieces(s.K * row + k, 1);
    if (bands.is_linear(i)) {
      for (int64_t t = 0; t < bands.features(i); ++t)
        static_cast<T*>(w.data)[k * w.n + t * w.w] = first[k * row + t];
    } else {
      each_tap(s.R, s.S, s.group_c(), [&](int64_t t, int64_t r, int64_t f, int64_t c) {
        weight_at<T>(w, k, c, r, f) = first[k * row + t];
      });
    }
    if (void* grad_b = bands.stage(i).grad_b) static_cast<T*>(grad_b)[k] = first[s.K * row + k];
  }

 private:
  void prepare_windows(int64_t i, ChainBackwardStage<T>& stage) const {
    const ConvShape& s = bands.shape(i);
    const Band &x = bands.x(i), &y = bands.x(i + 1);
    const Extent3 out = bands.out(i);
    for (int64_t h = 0, n = 0; h < out.h; ++h)
      for (int64_t w = 0; w < out.w; ++w, ++n) {
        stage.corners[n] = static_cast<int32_t>(x.at(2 * h, 2 * w));
        stage.places[n] = static_cast<int32_t>(y.at(bands.top(i + 1) + h, bands.left(i + 1) + w));
      }
    for (int64_t r = 0, n = 0; r <= s.R; ++r)
      for (int64_t f = 0; f <= s.S; ++f) stage.near[n++] = static_cast<int32_t>(x.at(r, f));
    stage.finite = !plan.dgrad(i) || WindowWeights<T>{s, stage.tables}.pack(bands.conv(i).w);
  }

  // How far around 2x2 windows the passes read: tiles of 2x2 pixels have taps in common that reach one pixel
  // too far for some; others may reach anywhere.
  int64_t margin(int64_t i) const {
    const ConvShape& s = bands.shape(i);
    const Extent3 out = bands.out(i);
    const bool whole_tiles = s.stride.is_one() && s.H % 2 == 0 && s.W % 2 == 0;
    return whole_tiles ? 1 + std::max(s.P - 2 * out.h, s.Q - 2 * out.w) : std::max(s.P + s.H, s.Q + s.W);
  }

  void linear(int64_t i, const Vector<T>* x, const Vector<T>* grad, const ChainBackwardArrays<Vector<T>>& at,
              Vector<T>* grad_x, T* sums) const {
    const Band band = bands.x(i);
    const int64_t outputs = bands.shape(i).K, features = bands.features(i), row = plan.row(i);
    if (plan.wgrad(i)) {
      T* const total = sums + plan.sums_at[i];
      T* const rows = reinterpret_cast<T*>(at.rows);
      for (int j = 0; j < kLanes<T>; ++j) std::fill(rows + j * row + features, rows + (j + 1) * row, T(0));
      const int64_t cells = band.rows * band.cols;
      from_lanes<T, T>({rows, row, cells, 0, band.cols, 1}, band,
                       {0, kLanes<T>, 0, 0, band.rows, band.cols, 0, 0}, x);
      const int64_t vectors = (features + kLanes<T> - 1) / kLanes<T>;
      for (int64_t v = 0; v < vectors; v += kVectors)
        for (int64_t k = 0; k < outputs; k += kRows)
          outer_some<T>(outputs - k, vectors - v, grad + k, rows + v * kLanes<T>,
                        total + k * row + v * kLanes<T>, row);
      if (bands.stage(i).grad_b) {
        const int32_t here = 0;
        sum_gradient<T>(grad, outputs, {1, nullptr, &here, nullptr}, total + outputs * row);
      }
    }
    if (!plan.dgrad(i)) return;
    Vector<T>* const flat = band.rows * band.cols == 1 ? grad_x : at.flat;
    product<T, false>(weights[i], weights_step(bands, i), features, outputs, grad, flat);
    if (flat != grad_x) unflatten<T>(band, flat, grad_x);
  }

  void convolve(int64_t i, int64_t index, const Vector<T>* x, const Vector<T>* grad,
                ChainBackwardArrays<Vector<T>>& at, Vector<T>* grad_x, T* sums) const {
    const ChainBackwardStage<T>& stage = tables.stages[i];
    const ConvShape& s = bands.shape(i);
    const Band y = bands.x(i + 1), band = bands.gradient(i, plan.dgrad(i));
    const int64_t p = bands.corner_h(i, plan.dgrad(i)), q = bands.corner_w(i, plan.dgrad(i)),
                  first = y.at(bands.top(i + 1), bands.left(i + 1));
    if (bands.pools(i)) {
      const uint8_t* const bytes = saved_offsets<T>(a, bands, i, index);
      for (int64_t j = 0; j < y.size(); ++j) at.offsets[j] = load_numbers<T>(bytes + j * kLanes<T>);
    }
    const Extent3 out = bands.out(i);
    if constexpr (kVectorBytes == 64) {
      const Band& from = bands.x(i);
      const int64_t top = bands.top(i + 1), left = bands.left(i + 1);
      if (stage.finite && all_finite<T>(y, {top, top + out.h}, {left, left + out.w}, grad) &&
          all_finite<T>(from, {0, from.rows}, {0, from.cols}, x)) {
        const Windows windows{out.cells(), stage.corners, stage.places};
        if (plan.wgrad(i))
          wgrad_windows<T>(s, from, x, windows, grad, at.offsets, bands.stage(i).grad_b != nullptr,
                           sums + plan.sums_at[i]);
        if (plan.dgrad(i))
          dgrad_windows<T>({s, stage.tables}, from, windows, stage.near, grad, at.offsets, grad_x);
        return;
      }
    }
    const Unpool<T> unpool{y, out.h, out.w, grad + first, bands.pools(i) ? at.offsets + first : nullptr};
    if (bands.pools_tile(i)) {
      zero_frame(band, {-p, 2 * out.h - p}, {-q, 2 * out.w - q}, at.sum, margin(i));
      spread_tiles<T>(unpool, band, -p, -q, at.sum);
    } else {
      Window window = bands.pools(i) ? bands.conv(i).epilogue.pool : Window{};
      spread<T>(window, 0, unpool, band, p, q, s.P, s.Q, at.sum);
    }
    if (plan.wgrad(i))
      wgrad_pixels<T>(s, x, stage.taps, at.sum, stage.wgrad, s.P * s.Q, bands.stage(i).grad_b != nullptr,
                      sums + plan.sums_at[i]);
    if (!plan.dgrad(i)) return;
    const Band to = bands.x(i);
    PhaseFilters<T>{s, stage.weights, stage.phase_taps}.correlate_rows(
        {0, s.H}, p, q, band, at.sum, stage.zeros, at.dgrad,
        [&](int64_t h) { return to.at(h + bands.top(i), 0); },
        [&](int64_t w) { return to.at(0, w + bands.left(i)); }, grad_x);
  }
};

template <class T>
void backward(const ChainBackwardArgs& b, void* workspace) {
  const Backward<T> pass(b, Carver(workspace));
  const ChainBackwardPlan& plan = pass.plan;
  const ChainBands& bands = pass.bands;
  const int64_t blocks = Block<T>::count(bands.shape(0).N), blocks_a_unit = kUnit / kLanes<T>;
  parallel_for(plan.pieces, bands.macs_an_image() * double(plan.units * kUnit / plan.pieces) / 3e4,
               [&](int64_t piece) {
                 T* const sums = pass.tables.pieces + piece * plan.sums();
                 std::fill(sums, sums + plan.sums(), T(0));
                 const int64_t end = std::min(blocks, plan.unit(piece + 1) * blocks_a_unit);
                 for (int64_t i = plan.unit(piece) * blocks_a_unit; i < end; ++i) pass(i, sums);
               });
  for (int64_t i = plan.first; i < bands.count(); ++i)
    if (plan.wgrad(i))
      parallel_for(bands.shape(i).K, double(plan.row(i) * plan.pieces) * 2e-4,
                   [&](int64_t k) { pass.store_sums(i, k); });
}

}  // namespace

void chain_lanes(const ChainArgs& a, void* workspace, void*) {
  a.dtype == Dtype::f64 ? forward<double>(a, workspace) : forward<float>(a, workspace);
}

void chain_backward_lanes(const ChainBackwardArgs& a, void* workspace, void*) {
  a.chain.dtype == Dtype::f64 ? backward<double>(a, workspace) : backward<float>(a, workspace);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
