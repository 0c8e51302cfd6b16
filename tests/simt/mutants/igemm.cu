// SPDX-License-Identifier: MIT
// Implicit GEMM on tensor cores: 5x5 convolution of 8 channels_last bfloat16 channels to 16, float32 output
// [pixels][16]. M = pixels, N = 16, K = 25 taps of 8 channels. One block: 64 x 16; two stages filled by
// cp.async; a warp: 16 x 16.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_wait,
  wait_off_by_one,
  no_commit,
  no_barrier_before_read,
  no_barrier_before_refill,
  other_stage,
  barrier_in_branch,
  no_syncwarp,
  fragments_swapped,
  halves_of_b_swapped,
  misaligned_ldmatrix,
  last_step_missing,
  shared_too_small,
  no_zero_fill,
  unguarded_write,
  bank_conflict,
  too_few_lanes,
};

constexpr int kM = 64, kN = 16, kStep = 32, kThreads = 128, kR = 5, kC = 8,
              kSteps = (kR * kR * kC + kStep - 1) / kStep;
constexpr int kStagePitch = 20;  // of a warp's 16 x 16 tile on its way out

template <Bug bug>
constexpr int kPitch = kStep + (bug == Bug::bank_conflict         ? 0
                                : bug == Bug::misaligned_ldmatrix ? 4
                                                                  : 8);

template <Bug bug>
__global__ void __launch_bounds__(kThreads)
    igemm(const BFloat16* x, const BFloat16* w, float* y, int pixels, int H, int W) {
  constexpr int pitch = kPitch<bug>;
  FC_DYN_SMEM(shared);
  BFloat16* a = shared.take<BFloat16>(2 * kM * pitch);
  BFloat16* b = shared.take<BFloat16>(2 * kN * pitch);
  float* out = shared.take<float>(kThreads / 32 * 16 * kStagePitch);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, P = H - kR + 1, Q = W - kR + 1;
  const int m0 = blockIdx.x * kM, chunk = thread % 4,
            row = thread / 4;  // copies 8 channels of a tap, for rows row, row + 32

  const auto fill_stage = [&](int stage, int step) {
    const int tap = step * 4 + chunk, r = tap / kR, s = tap % kR;
    for (int i = 0; i < 2; ++i) {
      const int m = m0 + row + 32 * i, n = m / (P * Q), p = m / Q % P, q = m % Q;
      const bool inside = (tap < kR * kR && m < pixels) || bug == Bug::no_zero_fill;
      cp_async16(a + (stage * kM + row + 32 * i) * pitch + 8 * chunk,
                 inside ? x + ((n * H + p + r) * W + q + s) * kC : x, inside ? 16 : 0);
    }
    if (thread < kN * 4)
      cp_async16(b + (stage * kN + row) * pitch + 8 * chunk,
                 tap < kR * kR ? w + (row * kR * kR + tap) * kC : w, tap < kR * kR ? 16 : 0);
  };

  float sums[2][4] = {};
  fill_stage(0, 0);
  if (bug != Bug::no_commit) cp_async_commit();
  for (int step = 0; step < kSteps - (bug == Bug::last_step_missing); ++step) {
    const int stage = step % 2, read = bug == Bug::other_stage ? 1 - stage : stage;
    if (step + 1 < kSteps) fill_stage(1 - stage, step + 1);
    cp_async_commit();
    if (bug == Bug::wait_off_by_one)
      cp_async_wait<2>();
    else if (bug != Bug::no_wait)
      cp_async_wait<1>();
    if (bug == Bug::barrier_in_branch && warp == 3)
      __syncthreads();
    else if (bug != Bug::no_barrier_before_read)
      __syncthreads();
    for (int k = 0; k < kStep; k += 16) {
      uint32_t ra[4], rb[4];
      ldmatrix_x4(ra, a + (read * kM + warp * 16 + lane % 16) * pitch + k + lane / 16 * 8);
      ldmatrix_x4(rb, b + (read * kN + lane % 8 + lane / 16 * 8) * pitch + k + lane / 8 % 2 * 8);
      if (bug == Bug::fragments_swapped) std::swap(ra[1], ra[2]);
      if (bug == Bug::halves_of_b_swapped) std::swap(rb[0], rb[1]);
      if (bug == Bug::too_few_lanes && lane == 31) continue;
      mma_m16n8k16_bf16(sums[0], ra, rb[0], rb[1]);
      mma_m16n8k16_bf16(sums[1], ra, rb[2], rb[3]);
    }
    if (bug != Bug::no_barrier_before_refill) __syncthreads();
  }
  if (bug == Bug::last_step_missing) cp_async_wait<0>();

  float* mine = out + warp * 16 * kStagePitch;
  for (int i = 0; i < 8; ++i)
    mine[(lane / 4 + i % 4 / 2 * 8) * kStagePitch + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
  if (bug != Bug::no_syncwarp) __syncwarp();
  for (int i = 0; i < 2; ++i) {
    const int r = 8 * i + lane / 4, m = m0 + warp * 16 + r;
    if (m < pixels || bug == Bug::unguarded_write)
      st<float4>(y + m * kN + lane % 4 * 4, ld<float4>(mine + r * kStagePitch + lane % 4 * 4));
  }
}

template <Bug bug>
void run() {
  size_t bytes = smem_take<BFloat16>(0, 2 * kM * kPitch<bug>);
  bytes = smem_take<BFloat16>(bytes, 2 * kN * kPitch<bug>);
  bytes = smem_take<float>(bytes, (kThreads / 32 - (bug == Bug::shared_too_small)) * 16 * kStagePitch);
  for (const auto& [N, H, W] : {std::tuple{2, 14, 14}, std::tuple{1, 9, 7}}) {
    const int P = H - kR + 1, Q = W - kR + 1, pixels = N * P * Q;
    Global<BFloat16> x(N * H * W * kC, "x", Access::input), w(kN * kR * kR * kC, "w", Access::input);
    Global<float> y(pixels * kN, "y", Access::output);
    fill(x), fill(w, 0.2f);
    launch(igemm<bug>, dim3((pixels + kM - 1) / kM), dim3(kThreads), bytes, nullptr,
           static_cast<BFloat16*>(x), static_cast<BFloat16*>(w), static_cast<float*>(y), pixels, H, W);
    finish();
    for (int i = 0; i < pixels * kN; ++i) {
      const int m = i / kN, k = i % kN, n = m / (P * Q), p = m / Q % P, q = m % Q;
      double sum = 0;
      for (int t = 0; t < kR * kR * kC; ++t) {
        const int r = t / kC / kR, s = t / kC % kR, c = t % kC;
        sum += static_cast<double>(x[((n * H + p + r) * W + q + s) * kC + c]) * w[k * kR * kR * kC + t];
      }
      expect_near(y[i], sum, 1e-4);
    }
  }
}

const Cases igemm_cases{
    {"igemm", nullptr, run<Bug::none>},
    {"igemm: no wait for cp.async", "", run<Bug::no_wait>},
    {"igemm: wait off by one group", "", run<Bug::wait_off_by_one>},
    {"igemm: first group not committed", "", run<Bug::no_commit>},
    {"igemm: no barrier before the read", "", run<Bug::no_barrier_before_read>},
    {"igemm: no barrier before the refill", "", run<Bug::no_barrier_before_refill>},
    {"igemm: reads the other stage", "", run<Bug::other_stage>},
    {"igemm: barriers in two branches", "", run<Bug::barrier_in_branch>},
    {"igemm: no syncwarp before the tile is read back", "", run<Bug::no_syncwarp>},
    {"igemm: registers of the fragment of a swapped", "", run<Bug::fragments_swapped>},
    {"igemm: halves of the fragment of b swapped", "", run<Bug::halves_of_b_swapped>},
    {"igemm: misaligned ldmatrix", "", run<Bug::misaligned_ldmatrix>},
    {"igemm: last step of k missing", "", run<Bug::last_step_missing>},
    {"igemm: too little dynamic shared memory", "", run<Bug::shared_too_small>},
    {"igemm: taps beyond the filter read, not zero-filled", "", run<Bug::no_zero_fill>},
    {"igemm: write without a guard", "", run<Bug::unguarded_write>},
    {"igemm: bank conflict", "", run<Bug::bank_conflict>},
    {"igemm: mma without the last lane", "", run<Bug::too_few_lanes>},
};

}  // namespace
}  // namespace fastconv::simt
