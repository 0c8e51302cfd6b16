// SPDX-License-Identifier: MIT
// The implicit GEMM of igemm.cu on a Hopper warpgroup: pixels gathered by cp.async into the order of wgmma's
// core matrices (8 rows of 16 bytes), all weights brought in by one bulk copy from a buffer packed in that
// order.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_proxy_fence,
  no_wgmma_fence,
  no_wgmma_wait,
  no_mbarrier_wait,
  no_barrier_after_init,
  no_init,
  strides_swapped,
  too_many_bytes_announced,
  two_arrivals_expected,
  wrong_phase,
};

constexpr int kM = 64, kN = 16, kStep = 64, kChunks = kStep / 8, kThreads = 128, kR = 5, kC = 8;
constexpr int kSteps = (kR * kR + kChunks - 1) / kChunks, kWeightBytes = kSteps * kChunks * kN * 16;

template <Bug bug>
__global__ void __launch_bounds__(kThreads)
    wgmma(const BFloat16* x, const BFloat16* packed, float* y, int pixels, int H, int W) {
  FC_DYN_SMEM(shared);
  unsigned char* a = shared.take<unsigned char>(2 * kM * kStep * 2, 128);
  unsigned char* b = shared.take<unsigned char>(kWeightBytes, 128);
  uint64_t* bar = shared.take<uint64_t>(1);
  const int thread = threadIdx.x, P = H - kR + 1, Q = W - kR + 1, m0 = blockIdx.x * kM;
  if (thread == 0) {
    if (bug != Bug::no_init) mbar_init(bar, bug == Bug::two_arrivals_expected ? 2 : 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, kWeightBytes + (bug == Bug::too_many_bytes_announced ? 16 : 0));
    bulk_copy(b, packed, kWeightBytes, bar);
  }
  if (bug != Bug::no_barrier_after_init) __syncthreads();

  const int row = thread % 64, first = thread / 64 * (kChunks / 2), m = m0 + row;
  const int n = m / (P * Q), p = m / Q % P, q = m % Q;
  const auto fill_stage = [&](int stage, int step) {
    for (int i = first; i < first + kChunks / 2; ++i) {
      const int tap = step * kChunks + i, r = tap / kR, s = tap % kR;
      const bool inside = m < pixels && tap < kR * kR;
      cp_async16(a + stage * kM * kStep * 2 + row / 8 * (kChunks * 128) + i * 128 + row % 8 * 16,
                 inside ? x + ((n * H + p + r) * W + q + s) * kC : x, inside ? 16 : 0);
    }
  };

  float sums[8] = {};
  fill_stage(0, 0);
  cp_async_commit();
  if (bug != Bug::no_mbarrier_wait) mbar_wait(bar, bug == Bug::wrong_phase ? 1 : 0);
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % 2;
    if (step + 1 < kSteps) fill_stage(1 - stage, step + 1);
    cp_async_commit();
    cp_async_wait<1>();
    if (bug != Bug::no_proxy_fence) fence_proxy_async();
    __syncthreads();
    if (bug != Bug::no_wgmma_fence) wgmma_fence();
    for (int k = 0; k < kStep / 16; ++k) {
      int leading = 128, stride = kChunks * 128;
      if (bug == Bug::strides_swapped) std::swap(leading, stride);
      const uint64_t da = wgmma_operand(a + stage * kM * kStep * 2 + k * 256, leading, stride, Swizzle::none);
      const uint64_t db = wgmma_operand(b + (step * kChunks + 2 * k) * 256, 256, 128, Swizzle::none);
      wgmma_bf16(sums, da, db, true);
    }
    wgmma_commit();
    if (bug != Bug::no_wgmma_wait) wgmma_wait<0>();
    __syncthreads();
  }
  const int lane = thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int r = m0 + thread / 32 * 16 + lane / 4 + i % 2 * 8, k = i / 2 * 8 + lane % 4 * 2;
    if (r < pixels) st<float2>(y + r * kN + k, make_float2(sums[2 * i], sums[2 * i + 1]));
  }
}

template <Bug bug>
void run() {
  size_t bytes = smem_take<unsigned char>(0, 2 * kM * kStep * 2, 128);
  bytes = smem_take<unsigned char>(bytes, kWeightBytes, 128);
  bytes = smem_take<uint64_t>(bytes, 1);
  for (const auto& [N, H, W] : {std::tuple{2, 14, 14}, std::tuple{1, 9, 7}}) {
    const int P = H - kR + 1, Q = W - kR + 1, pixels = N * P * Q, taps = kSteps * kChunks;
    Global<BFloat16> x(N * H * W * kC, "x", Access::input), w(taps * kN * kC, "packed", Access::input);
    Global<float> y(pixels * kN, "y", Access::output);
    fill(x), fill(w, 0.2f);  // packed: [tap][16][8]
    for (int i = kR * kR * kN * kC; i < taps * kN * kC; ++i) w[i] = BFloat16(0.0f);
    launch(wgmma<bug>, dim3((pixels + kM - 1) / kM), dim3(kThreads), bytes, nullptr,
           static_cast<BFloat16*>(x), static_cast<BFloat16*>(w), static_cast<float*>(y), pixels, H, W);
    finish();
    for (int i = 0; i < pixels * kN; ++i) {
      const int m = i / kN, k = i % kN, n = m / (P * Q), p = m / Q % P, q = m % Q;
      double sum = 0;
      for (int t = 0; t < kR * kR * kC; ++t) {
        const int r = t / kC / kR, s = t / kC % kR, c = t % kC;
        sum += static_cast<double>(x[((n * H + p + r) * W + q + s) * kC + c]) * w[(t / kC * kN + k) * kC + c];
      }
      expect_near(y[i], sum, 1e-4);
    }
  }
}

const Cases wgmma_cases{
    {"wgmma", nullptr, run<Bug::none>},
    {"wgmma: no proxy fence", "", run<Bug::no_proxy_fence>},
    {"wgmma: no wgmma fence", "", run<Bug::no_wgmma_fence>},
    {"wgmma: no wait for the sums", "", run<Bug::no_wgmma_wait>},
    {"wgmma: no wait at the mbarrier", "", run<Bug::no_mbarrier_wait>},
    {"wgmma: no barrier after the mbarrier's init", "", run<Bug::no_barrier_after_init>},
    {"wgmma: mbarrier never initialised", "", run<Bug::no_init>},
    {"wgmma: strides of an operand swapped", "", run<Bug::strides_swapped>},
    {"wgmma: more bytes announced than copied", "", run<Bug::too_many_bytes_announced>},
    {"wgmma: mbarrier of two arrivals", "", run<Bug::two_arrivals_expected>},
    {"wgmma: wait for the wrong phase", "", run<Bug::wrong_phase>},
};

}  // namespace
}  // namespace fastconv::simt
