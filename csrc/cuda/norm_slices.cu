// SPDX-License-Identifier: MIT
// Batch-norm by the batch's own statistics and ReLU, forward and backward, in three launches: partial sums of
// slices of a channel; what follows from them, a thread a channel; and the elements. One launch does it all
// where a channel has one slice.
//
//   forward   the sums of x - s and of its square, s the channel's first value; then y. A variance is their
//             difference: as s is one of the values, it loses at most log2(count) bits of double
//   backward  the sums of g = grad_y, where the ReLU has passed it, and of g (x - mean); then grad_x
//
// Squares are summed in double; other sums of four units in float32, then in double. Lanes are added as a
// binary tree, slices in order. No atomics. Threads access 16 bytes along the cells of a channel, or in
// channels_last up to four channels.
//
// Bytes: x twice and y once; backward x, y and grad_y twice and grad_x once. FashionCNN's first norm,
// [64, 32, 28, 28] in float32, both passes: 19 and 45 MB, floor 4 and 9 us at 4.8 TB/s, predicted 6 and 13
// without the launches; half of it in 16 bits. Not yet run on a GPU.
// Next: 2x2 max-pool with the elements; a channel's values kept in shared memory between the stages.
#include "core/naive.h"
#include "cuda/for_each.cuh"
#include "cuda/norm_slices.h"
#include "cuda/pool.cuh"

namespace fastconv::cuda {

namespace {

// A tensor [N, C, cells].
struct Cells {
  void* data;
  int64_t n, c, step;

  Cells(const NormArgs& a, const View& v) : data(v.data), n(v.n), c(v.c), step(norm_cell_step(a, v)) {}

  template <class T>
  __device__ T* at(int in, int ic, int cell) const {
    return static_cast<T*>(data) + in * n + ic * c + cell * step;
  }
};

struct NormTask {
  NormArgs norm;
  Cells x, y, g, grad_x;  // backward: the last two
  double* partial;        // [slices][2][channels]
  double* shares;         // backward: [2][channels], the sums over the number of values
  void *grad_w = nullptr, *grad_b = nullptr;
  int channels, block_channels, cells, units, slice_units, slices, lanes;
  Divisor vectors, channel_blocks, by_cells;
  NormSlices plan;

  NormTask(const NormArgs& a, const NormSlices& p, void* workspace, const View& g = {},
           const View& grad_x = {})
      : norm(a),
        x(a, a.x),
        y(a, a.y),
        g(a, g),
        grad_x(a, grad_x),
        partial(static_cast<double*>(workspace)),
        shares(partial + p.slices * 2 * a.C),
        channels(static_cast<int>(a.C)),
        block_channels(static_cast<int>(p.vectors * (p.by_channels ? p.vector : 1))),
        cells(static_cast<int>(p.cells)),
        units(static_cast<int>(p.units)),
        slice_units(static_cast<int>(p.slice_units)),
        slices(static_cast<int>(p.slices)),
        lanes(static_cast<int>(p.lanes)),
        vectors(p.vectors),
        channel_blocks(p.channel_blocks),
        by_cells(p.cells),
        plan(p) {}
};

// What a thread owns: kChannels channels from c on, and its first unit of the slice.
template <int V, bool kByChannels>
struct NormPlace {
  static constexpr int kChannels = kByChannels ? V : 1;
  int lane, vector, slice, c;

  __device__ explicit NormPlace(const NormTask& t) {
    lane = threadIdx.x;
    vector = t.vectors.pop(lane);
    slice = blockIdx.x;
    c = t.channel_blocks.pop(slice) * t.block_channels + vector * kChannels;
  }
  // Calls f(image, cell) for each unit.
  template <class F>
  __device__ __forceinline__ void each(const NormTask& t, const F& f) const {
    if (c >= t.channels) return;
    const int end = min((slice + 1) * t.slice_units, t.units);
#pragma unroll 4
    for (int i = slice * t.slice_units + lane; i < end; i += t.lanes) {
      int n = i;
      const int cell = t.by_cells.pop(n) * (kByChannels ? 1 : V);
      f(n, cell);
    }
  }
};

template <class T>
__device__ __forceinline__ double first_value(const NormTask& t, int c) {
  return t.units > 0 ? double(*t.x.at<const T>(0, c, 0)) : 0;
}

// The gradient behind the ReLU.
template <class T, class Sum, int V>
__device__ __forceinline__ void load_gradient(Sum (&g)[V], const NormTask& t, int n, int c, int cell) {
  T read[V], y[V];
  load_run(read, t.g.at<const T>(n, c, cell));
#pragma unroll
  for (int v = 0; v < V; ++v) g[v] = Sum(read[v]);
  if (t.norm.act == Act::none) return;
  load_run(y, t.y.at<const T>(n, c, cell));
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (Sum(y[v]) <= 0) g[v] = 0;
}

// A number as the sum of two of a narrower type.
template <class Sum>
struct Split {
  Sum high, low;

  __device__ explicit Split(double value = 0)
      : high(static_cast<Sum>(value)), low(static_cast<Sum>(value - double(high))) {}
  __device__ Sum distance(Sum x) const { return (x - high) - low; }
};

// The sums of a slice, of channel at.c + k and sum i in parts[i * kChannels + k][at.vector], for lane 0. All
// threads call it.
template <class T, int V, bool kByChannels, bool kBackward>
__device__ __forceinline__ void norm_sums(const NormTask& t, const NormPlace<V, kByChannels>& at,
                                          double (*parts)[kNormThreads]) {
  using Sum = typename Compute<T>::type;
  constexpr int kChannels = NormPlace<V, kByChannels>::kChannels, kChain = 4;

  Split<Sum> from[kChannels];
  if (at.c < t.channels)
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      from[k] = Split<Sum>(kBackward ? t.norm.mean[at.c + k] : first_value<T>(t, at.c + k));
  double sums[2][kChannels] = {};
  Sum chain[2][kChannels] = {};
  int links = 0;
  const auto end_chain = [&] {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i][k] += double(chain[i][k]), chain[i][k] = 0;
  };
  at.each(t, [&](int n, int cell) {
    T x[V];
    load_run(x, t.x.at<const T>(n, at.c, cell));
    Sum g[V];
    if constexpr (kBackward) load_gradient<T>(g, t, n, at.c, cell);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = kByChannels ? v : 0;
      const Sum distance = from[k].distance(Sum(x[v])), value = kBackward ? g[v] : distance;
      chain[0][k] += value;
      if constexpr (kBackward)
        chain[1][k] += value * distance;
      else
        sums[1][k] += double(distance) * double(distance);
    }
    if (++links % kChain == 0) end_chain();
  });
  end_chain();

  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2 * kChannels; ++i) parts[i][thread] = sums[i / kChannels][i % kChannels];
  for (int half = kNormThreads / 2; half >= kNormThreads / t.lanes; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
#pragma unroll
    for (int i = 0; i < 2 * kChannels; ++i) parts[i][thread] += parts[i][thread + half];
  }
}

// What follows from the sums of a channel.
template <class T, bool kBackward>
__device__ __forceinline__ void norm_channel(const NormTask& t, int c, double first, double second) {
  const double count = double(naive::norm_count(t.norm));
  if constexpr (kBackward) {
    second *= t.norm.invstd[c];
    if (t.grad_b) static_cast<T*>(t.grad_b)[c] = narrow<T>(first);
    if (t.grad_w) static_cast<T*>(t.grad_w)[c] = narrow<T>(second);
    t.shares[c] = first / count;
    t.shares[t.channels + c] = second / count;
  } else {
    first /= count;
    const double variance = second / count - first * first;
    t.norm.mean[c] = first_value<T>(t, c) + first;
    t.norm.invstd[c] = 1 / sqrt((variance < 0 ? 0 : variance) + t.norm.eps);
  }
}

// The slices' sums, in order.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kNormThreads) norm_channels_kernel(const NormTask t) {
  const int c = static_cast<int>(blockIdx.x * kNormThreads + threadIdx.x);
  if (c >= t.channels) return;
  double first = 0, second = 0;
  for (int slice = 0; slice < t.slices; ++slice) {
    first += t.partial[slice * 2 * t.channels + c];
    second += t.partial[(slice * 2 + 1) * t.channels + c];
  }
  norm_channel<T, kBackward>(t, c, first, second);
}

template <class T, int V, bool kByChannels, bool kBackward>
__device__ __forceinline__ void norm_elements(const NormTask& t, const NormPlace<V, kByChannels>& at) {
  using Sum = typename Compute<T>::type;
  constexpr int kChannels = NormPlace<V, kByChannels>::kChannels;
  if (at.c >= t.channels) return;
  // y = distance * scale + bias; grad_x = g * scale + distance * by_x + bias.
  Split<Sum> mean[kChannels];
  Sum scale[kChannels], bias[kChannels], by_x[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int c = at.c + k;
    const double invstd = t.norm.invstd[c], factor = naive::norm_scale<T>(t.norm, c, invstd);
    mean[k] = Split<Sum>(t.norm.mean[c]);
    scale[k] = static_cast<Sum>(factor);
    if constexpr (kBackward) {
      bias[k] = static_cast<Sum>(-factor * t.shares[c]);
      by_x[k] = static_cast<Sum>(-factor * invstd * t.shares[t.channels + c]);
    } else {
      bias[k] = t.norm.bias ? Sum(static_cast<const T*>(t.norm.bias)[c]) : Sum(0);
    }
  }
  at.each(t, [&](int n, int cell) {
    T x[V];
    load_run(x, t.x.at<const T>(n, at.c, cell));
    Sum values[V];
    if constexpr (kBackward) load_gradient<T>(values, t, n, at.c, cell);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = kByChannels ? v : 0;
      const Sum distance = mean[k].distance(Sum(x[v]));
      if constexpr (kBackward) {
        values[v] = values[v] * scale[k] + (distance * by_x[k] + bias[k]);
      } else {
        values[v] = naive::activate(distance * scale[k] + bias[k], t.norm.act);
      }
    }
    store_run((kBackward ? t.grad_x : t.y).template at<T>(n, at.c, cell), values);
  });
}

template <class T, int V, bool kByChannels, bool kBackward>
__global__ void __launch_bounds__(kNormThreads, 2) norm_kernel(const NormTask t, bool sums, bool elements) {
  using Place = NormPlace<V, kByChannels>;
  constexpr int kChannels = Place::kChannels;
  const Place at(t);
  if (sums) {
    FC_SHARED(double, parts, [2 * kChannels][kNormThreads]);
    norm_sums<T, V, kByChannels, kBackward>(t, at, parts);
    if (at.lane == 0 && at.c < t.channels) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const double first = parts[k][at.vector], second = parts[kChannels + k][at.vector];
        if (t.slices == 1) {
          norm_channel<T, kBackward>(t, at.c + k, first, second);
        } else {
          t.partial[at.slice * 2 * t.channels + at.c + k] = first;
          t.partial[(at.slice * 2 + 1) * t.channels + at.c + k] = second;
        }
      }
    }
    __syncthreads();
  }
  if (elements) norm_elements<T, V, kByChannels, kBackward>(t, at);
}

template <class T, int V, bool kByChannels, bool kBackward>
void launch_norm(const NormTask& t, void* stream) {
  const dim3 grid(static_cast<unsigned>(t.plan.blocks())), block(kNormThreads);
  const auto kernel = norm_kernel<T, V, kByChannels, kBackward>;
  const bool elements = !kBackward || t.grad_x.data;
  launch(kernel, grid, block, 0, stream, t, true, elements && t.slices == 1);
  if (t.slices == 1) return;
  launch(norm_channels_kernel<T, kBackward>, dim3(static_cast<unsigned>(ceil_div(t.channels, kNormThreads))),
         block, 0, stream, t);
  if (elements) launch(kernel, grid, block, 0, stream, t, false, true);
}

template <bool kBackward>
void launch_norm(const NormTask& t, void* stream) {
  if (t.channels == 0) return;
  with_dtype(t.norm.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr int kCells = 16 / sizeof(T), kChannels = kCells < 4 ? kCells : 4;
    if (t.plan.vector == 1) return launch_norm<T, 1, false, kBackward>(t, stream);
    if (t.plan.by_channels) return launch_norm<T, kChannels, true, kBackward>(t, stream);
    launch_norm<T, kCells, false, kBackward>(t, stream);
  });
}

}  // namespace

void norm_act_pool_slices(const NormArgs& a, void* workspace, void* stream) {
  launch_norm<false>(NormTask(a, plan_norm(a), workspace), stream);
}

void norm_act_pool_backward_slices(const NormBackwardArgs& a, void* workspace, void* stream) {
  NormTask t(a.norm, plan_norm(a), workspace, a.grad_y, a.grad_x);
  t.grad_w = a.grad_w, t.grad_b = a.grad_b;
  launch_norm<true>(t, stream);
}

}  // namespace fastconv::cuda
