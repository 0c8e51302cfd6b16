// SPDX-License-Identifier: MIT
// The gradients of a convolution of stride and dilation one behind which stands a max-pool of 2x2/2 windows.
// Of the four gradients of a window one is not zero, in each lane another. So a tap takes one multiply-add
// and one or two choices by lane, where lanes_conv.inl takes four multiply-adds:
//
//   wgrad   the input under the window is chosen by row, then by column; a tile is rows x cols taps of one
//           filter, summed over windows.
//   dgrad   an input pixel near the window takes a weight that is looked up: a vector holds the four weights
//           that a pixel may take, for as many pixels as there is room. A tile is pixels, summed over the
//           output channels.
//
// Zeros are left out, so that all numbers must be finite: 0 times infinity is NaN.
// Included after lanes_conv.inl; for AVX-512.

namespace {

// Of each row of pixels the channels that count: whether all numbers are finite.
template <class T>
bool all_finite(const Band& band, const Rows& rows, const Rows& cols, const Vector<T>* v) {
  Vector<T> sum{};
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = cols.begin; w < cols.end; ++w) {
      const Vector<T>* pixel = v + band.at(h, w);
      for (int64_t c = 0; c < band.channels; ++c) sum += pixel[c] - pixel[c];
    }
  for (int i = 0; i < kLanes<T>; ++i)
    if (sum[i] != 0) return false;
  return true;
}

// Windows of one stage: where each finds the corner of its input, and its gradient and offset.
struct Windows {
  int64_t count;
  const int32_t *corners, *places;
};

// totals[r * total_row + s * total_col] += sum over windows and lanes of gradient * x[corner + r * row + s *
// col].
template <class T, int rows, int cols>
void wgrad_window_tile(const Vector<T>* x, int64_t row, int64_t col, const Windows& windows,
                       const Vector<T>* gradient, const Vector<T>* offsets, T* totals, int64_t total_row,
                       int64_t total_col) {
  constexpr int groups = (rows * cols + kLanes<T> - 1) / kLanes<T>;
  Vector<T> sums[groups * kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < groups * kLanes<T>; ++i) sums[i] = Vector<T>{};
  for (int64_t i = 0; i < windows.count; ++i) {
    const Vector<T>* corner = x + windows.corners[i];
    const Vector<T> g = gradient[windows.places[i]], offset = offsets[windows.places[i]];
    const auto lower = offset >= T(2), right = (lower ? offset - T(2) : offset) >= T(1);
    Vector<T> above[cols + 1], below[cols + 1];
#pragma GCC unroll 8
    for (int s = 0; s <= cols; ++s) above[s] = corner[s * col];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      corner += row;
#pragma GCC unroll 8
      for (int s = 0; s <= cols; ++s) {
        below[s] = corner[s * col];
        above[s] = lower ? below[s] : above[s];
      }
#pragma GCC unroll 8
      for (int s = 0; s < cols; ++s) sums[r * cols + s] += g * (right ? above[s + 1] : above[s]);
#pragma GCC unroll 8
      for (int s = 0; s <= cols; ++s) above[s] = below[s];
    }
  }
  alignas(kVectorBytes) T values[groups * kLanes<T>];
#pragma GCC unroll 4
  for (int i = 0; i < groups; ++i) store<T>(sums_of<T>(sums + i * kLanes<T>), values + i * kLanes<T>);
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < cols; ++s) totals[r * total_row + s * total_col] += values[r * cols + s];
}

template <class T, int rows = 3, int cols = kMostWindowTaps, class... Rest>
void wgrad_window_some(int64_t row_count, int64_t col_count, Rest... rest) {
  if constexpr (cols > 1) {
    if (col_count < cols) return wgrad_window_some<T, rows, cols - 1>(row_count, col_count, rest...);
  }
  if constexpr (rows > 1) {
    if (row_count < rows) return wgrad_window_some<T, rows - 1, cols>(row_count, col_count, rest...);
  }
  wgrad_window_tile<T, rows, cols>(rest...);
}

// What wgrad_pixels of lanes_conv.inl does.
template <class T>
void wgrad_windows(const ConvShape& s, const Band& band, const Vector<T>* x, const Windows& windows,
                   const Vector<T>* gradient, const Vector<T>* offsets, bool bias, T* totals) {
  const int64_t C = s.group_c(), taps = C * s.taps();
  for (int64_t first = 0; first < windows.count; first += kPixels<T>) {
    const Windows some{std::min(kPixels<T>, windows.count - first), windows.corners + first,
                       windows.places + first};
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t k = c / C * s.group_k(); k < (c / C + 1) * s.group_k(); ++k)
        for (int64_t r = 0; r < s.R; r += 3)
          wgrad_window_some<T>(s.R - r, s.S, x + band.at(r, 0) + c, band.at(1, 0), band.pitch(), some,
                               gradient + k, offsets + k, totals + k * taps + r * s.S * C + c % C, s.S * C,
                               C);
    if (bias)
      sum_gradient<T>(gradient, s.K, {some.count, nullptr, some.places, nullptr}, totals + s.K * taps);
  }
}

// The weights that the (R + 1) x (S + 1) input pixels under a window may take: four a pixel, one for each
// offset. tables[c][k of c's group][pixels, so many a vector].
template <class T>
struct WindowWeights {
  static constexpr int kCells = kLanes<T> / 4;  // pixels a vector
  const ConvShape& s;
  T* tables;

  int64_t pixels() const { return (s.R + 1) * (s.S + 1); }
  int64_t vectors() const { return (pixels() + kCells - 1) / kCells; }
  // Whether all weights are finite.
  bool pack(const View& w) const {
    const int64_t row = vectors() * kLanes<T>;
    T sum = 0;
    std::fill(tables, tables + s.K * s.group_c() * row, T(0));
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t k = 0; k < s.group_k(); ++k) {
        T* const table = tables + (c * s.group_k() + k) * row;
        each_tap(s.R, s.S, 1, [&](int64_t, int64_t r, int64_t f, int64_t) {
          const int64_t group = c / s.group_c();
          const T weight = weight_at<const T>(w, group * s.group_k() + k, c % s.group_c(), r, f);
          sum += weight - weight;
          for (int64_t offset = 0; offset < 4; ++offset)
            table[((r + offset / 2) * (s.S + 1) + f + offset % 2) * 4 + offset] = weight;
        });
      }
    return sum == 0;
  }
};

// x[places[i]] += sum over outputs of gradient * weight of pixel i.
template <class T, int vectors>
void dgrad_window_tile(const Vector<T>* tables, int64_t step, int64_t outputs, const Vector<T>* gradient,
                       const Vector<T>* offsets, const int32_t* places, int64_t pixels, Vector<T>* x) {
  constexpr int cells = WindowWeights<T>::kCells;
  Vector<T> sums[vectors][cells];
#pragma GCC unroll 8
  for (int m = 0; m < vectors; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < cells; ++i) sums[m][i] = Vector<T>{};
  for (int64_t k = 0; k < outputs; ++k) {
    const Vector<Lane<T>> offset = __builtin_convertvector(offsets[k], Vector<Lane<T>>);
    const Vector<T>* table = tables + k * step;
#pragma GCC unroll 8
    for (int m = 0; m < vectors; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < cells; ++i) sums[m][i] += gradient[k] * __builtin_shuffle(table[m], offset + 4 * i);
  }
#pragma GCC unroll 8
  for (int m = 0; m < vectors; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < cells; ++i)
      if (m * cells + i < pixels) x[places[m * cells + i]] += sums[m][i];
}
template <class T, int vectors = 5, class... Rest>
void dgrad_window_some(int64_t count, Rest... rest) {
  if constexpr (vectors > 1) {
    if (count < vectors) return dgrad_window_some<T, vectors - 1>(count, rest...);
  }
  dgrad_window_tile<T, vectors>(rest...);
}

// x, a band of the input with its padding, = the gradient there. `near` are the places of the pixels of a
// window, counted from its corner.
template <class T>
void dgrad_windows(const WindowWeights<T>& t, const Band& band, const Windows& windows, const int32_t* near,
                   const Vector<T>* gradient, const Vector<T>* offsets, Vector<T>* x) {
  const ConvShape& s = t.s;
  const auto* tables = static_cast<const Vector<T>*>(static_cast<const void*>(t.tables));
  const int64_t vectors = t.vectors(), parts = (vectors + 4) / 5;
  std::fill(x, x + band.size(), Vector<T>{});
  for (int64_t c = 0; c < s.C; ++c) {
    const int64_t k = c / s.group_c() * s.group_k();
    for (int64_t i = 0; i < windows.count; ++i)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t m = part_begin(part, parts, vectors), count = part_begin(part + 1, parts, vectors) - m;
        const int64_t first = m * WindowWeights<T>::kCells, place = windows.places[i] + k;
        dgrad_window_some<T>(count, tables + c * s.group_k() * vectors + m, vectors, s.group_k(),
                             gradient + place, offsets + place, near + first, t.pixels() - first,
                             x + windows.corners[i] + c);
      }
  }
}

}  // namespace
