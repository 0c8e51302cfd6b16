// SPDX-License-Identifier: MIT
// Convolution of one channel to six, 5x5, then ReLU and a 2x2 max-pool with offsets, contiguous float32. One
// block: an 8x16 tile of the pooled output of one image; one thread: one pooled pixel with all six channels.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier,
  barrier_after_return,
  misaligned_vector,
  unguarded_halo_read,
  shared_overrun,
  uninitialised_padding,
  unguarded_write,
  unwritten_offsets,
  overlapping_blocks,
  write_to_input,
  wrong_output_stride,
  last_of_equal_maxima,
  no_relu,
  negative_index,
};

constexpr int kK = 6, kR = 5, kTileP = 8, kTileQ = 16, kThreads = kTileP * kTileQ;
constexpr int kTileH = 2 * kTileP + kR - 1, kTileW = 2 * kTileQ + kR - 1;

template <Bug bug>
__global__ void __launch_bounds__(kThreads)
    conv_pool(float* x, const float* w, const float* bias, float* y, uint8_t* offsets, int H, int W) {
  constexpr int kPaddedK = bug == Bug::misaligned_vector ? 6 : 8;
  FC_SHARED(float, tile, [kTileH][kTileW]);
  FC_SHARED(float, filter, [kR * kR][kPaddedK]);
  const int thread = threadIdx.x, n = blockIdx.z;
  const int P = (H - kR + 1) / 2, Q = (W - kR + 1) / 2;
  const int p0 = blockIdx.y * (bug == Bug::overlapping_blocks ? kTileP - 1 : kTileP),
            q0 = blockIdx.x * kTileQ;
  float* image = x + n * H * W;

  for (int i = thread; i < kTileH * kTileW; i += kThreads) {
    const int r = i / kTileW, c = i % kTileW, h = 2 * p0 + r, v = 2 * q0 + c;
    if (bug == Bug::unguarded_halo_read)
      tile[r][c] = image[h * W + v];
    else if (bug == Bug::negative_index)
      tile[r][c] = h < H && v < W ? image[h * W + v - (r == 0 && c == 0)] : 0;
    else
      tile[r][c] = h < H && v < W ? image[h * W + v] : 0;
  }
  for (int i = thread; i < kR * kR * kPaddedK; i += kThreads) {
    const int tap = i / kPaddedK, k = i % kPaddedK;
    if (k < kK)
      filter[tap][k] = w[k * kR * kR + tap];
    else if (bug != Bug::uninitialised_padding)
      filter[tap][k] = 0;
  }
  if (bug == Bug::shared_overrun && thread < kTileW) (&tile[0][0])[kTileH * kTileW + thread] = 0;
  const int p = p0 + thread / kTileQ, q = q0 + thread % kTileQ;
  if (bug == Bug::barrier_after_return && (p >= P || q >= Q)) return;
  if (bug != Bug::no_barrier) __syncthreads();

  float sums[4][8] = {};
  for (int r = 0; r < kR; ++r)
    for (int s = 0; s < kR; ++s)
      for (int half = 0; half < 2; ++half) {
        const float4 f = ld<float4>(&filter[r * kR + s][4 * half]);
        for (int cell = 0; cell < 4; ++cell) {
          const float v = tile[2 * (thread / kTileQ) + cell / 2 + r][2 * (thread % kTileQ) + cell % 2 + s];
          float* sum = &sums[cell][4 * half];
          sum[0] += v * f.x, sum[1] += v * f.y, sum[2] += v * f.z, sum[3] += v * f.w;
        }
      }

  if (bug != Bug::unguarded_write && (p >= P || q >= Q)) return;
  for (int k = 0; k < kK; ++k) {
    float best = sums[0][k];
    int offset = 0;
    for (int cell = 1; cell < 4; ++cell)
      if (bug == Bug::last_of_equal_maxima ? sums[cell][k] >= best : sums[cell][k] > best)
        best = sums[cell][k], offset = cell;
    best += bias[k];
    const int at = ((n * kK + k) * P + p) * (bug == Bug::wrong_output_stride ? Q + 1 : Q) + q;
    y[at] = best > 0 || bug == Bug::no_relu ? best : 0;
    if (bug != Bug::unwritten_offsets || k > 0) offsets[at] = static_cast<uint8_t>(offset);
  }
  if (bug == Bug::write_to_input) image[p * W + q] = 0;
}

template <Bug bug>
void run() {
  for (const auto& [N, H, W] : {std::tuple{2, 32, 32}, std::tuple{1, 27, 41}}) {
    const int P = (H - kR + 1) / 2, Q = (W - kR + 1) / 2;
    Global<float> x(N * H * W, "x", Access::input), w(kK * kR * kR, "w", Access::input),
        bias(kK, "bias", Access::input);
    Global<float> y(N * kK * P * Q, "y", Access::output);
    Global<uint8_t> offsets(N * kK * P * Q, "offsets", Access::output);
    fill(x), fill(w), fill(bias);
    std::fill_n(x.values.begin(), 8 * W, 0.0f);  // where all maxima are equal
    launch(conv_pool<bug>, dim3((Q + kTileQ - 1) / kTileQ, (P + kTileP - 1) / kTileP, N), dim3(kThreads), 0,
           nullptr, static_cast<float*>(x), static_cast<float*>(w), static_cast<float*>(bias),
           static_cast<float*>(y), static_cast<uint8_t*>(offsets), H, W);
    finish();
    for (int i = 0; i < N * kK * P * Q; ++i) {
      const int n = i / (kK * P * Q), k = i / (P * Q) % kK, p = i / Q % P, q = i % Q;
      double best = -INFINITY;
      int offset = 0;
      for (int cell = 0; cell < 4; ++cell) {
        double sum = 0;
        for (int r = 0; r < kR; ++r)
          for (int s = 0; s < kR; ++s)
            sum += static_cast<double>(x[(n * H + 2 * p + cell / 2 + r) * W + 2 * q + cell % 2 + s]) *
                   w[(k * kR + r) * kR + s];
        if (sum > best + 1e-6) best = sum, offset = cell;
      }
      expect_near(y[i], std::max(0.0, best + bias[k]), 1e-5);
      expect(offsets[i] == offset, "an offset");
    }
  }
}

const Cases conv_pool_cases{
    {"conv_pool", nullptr, run<Bug::none>},
    {"conv_pool: no barrier between fill and use", "", run<Bug::no_barrier>},
    {"conv_pool: return before a barrier", "", run<Bug::barrier_after_return>},
    {"conv_pool: misaligned float4", "", run<Bug::misaligned_vector>},
    {"conv_pool: halo read without a guard", "", run<Bug::unguarded_halo_read>},
    {"conv_pool: input read one element early", "", run<Bug::negative_index>},
    {"conv_pool: one row past a shared array", "", run<Bug::shared_overrun>},
    {"conv_pool: padding of a shared array never written", "", run<Bug::uninitialised_padding>},
    {"conv_pool: write without a guard", "", run<Bug::unguarded_write>},
    {"conv_pool: an output that is not written", "", run<Bug::unwritten_offsets>},
    {"conv_pool: blocks that overlap by a row", "", run<Bug::overlapping_blocks>},
    {"conv_pool: write to an input", "", run<Bug::write_to_input>},
    {"conv_pool: wrong row stride of the output", "", run<Bug::wrong_output_stride>},
    {"conv_pool: last of equal maxima", "", run<Bug::last_of_equal_maxima>},
    {"conv_pool: no ReLU", "", run<Bug::no_relu>},
};

}  // namespace
}  // namespace fastconv::simt
