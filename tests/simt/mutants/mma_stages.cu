// SPDX-License-Identifier: MIT
// The stages of mma_gemm.cuh: [64, k] by [k, 16] in float16. A is [m][k] and copied in runs of 16 bytes; B is
// [k][n], goes through registers and is transposed by ldmatrix. Offsets along k are worked out by one warp
// and live until the tile after the next. Slices of k go to a workspace, which a second kernel adds up.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  waits_for_one_less,
  no_barrier,
  put_before_the_arithmetic,
  one_set_of_steps,
  steps_too_late,
  no_swizzle,
  copies_not_swizzled,
  turns_swizzled_by_row,
  b_not_transposed,
  halves_of_b_swapped,
  rest_of_k_not_zero,
  slices_share_their_sums,
  slice_added_twice,
};

constexpr int kM = 64, kN = 16, kK = 32, kStages = 4, kThreads = 128, kRun = 8, kSliceK = 160;

template <Bug bug>
__device__ int a_place(int row, int run) {
  const int turn = bug == Bug::turns_swizzled_by_row ? row % 4 : row / 2 % 4;
  return (row * 4 + (bug == Bug::no_swizzle ? run : run ^ turn)) * kRun;
}
__device__ int b_place(int k, int run) { return (k * 2 + (run ^ k / 4 % 2)) * kRun; }

template <Bug bug>
__global__ void __launch_bounds__(kThreads) mma_stages(const Half* a, const Half* b, float* partial, int k) {
  FC_DYN_SMEM(shared);
  Half* a_stages = shared.take<Half>(kStages * kM * kK);
  Half* b_stages = shared.take<Half>(kStages * kK * kN);
  FC_SHARED(int, steps, [2][kK]);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, k0 = blockIdx.x * kSliceK;
  const int there = k - k0 < kSliceK ? k - k0 : kSliceK, tiles = (there + kK - 1) / kK;

  const auto set_of = [](int tile) { return bug == Bug::one_set_of_steps ? 0 : tile % 2; };
  const auto work_out_steps = [&](int tile) {
    if (warp == 0 && tile * kK + lane < there) steps[set_of(tile)][lane] = (k0 + tile * kK + lane) * kN;
  };
  uint16_t values[kK * kN / kThreads];
  const auto fetch = [&](int tile) {
    Half* stage = a_stages + tile % kStages * kM * kK;
    for (int i = 0; i < 2; ++i) {
      const int row = thread / 4 + 32 * i, run = thread % 4, at = tile * kK + run * kRun;
      const bool is_there = at < there || bug == Bug::rest_of_k_not_zero;
      const int place = bug == Bug::copies_not_swizzled ? (row * 4 + run) * kRun : a_place<bug>(row, run);
      cp_async16(stage + place, is_there ? a + row * k + k0 + at : nullptr, is_there ? 16 : 0);
    }
    cp_async_commit();
    for (int i = 0; i < kK * kN / kThreads; ++i) {
      const int step = thread / kN + i * (kThreads / kN);
      values[i] = tile * kK + step < there ? b[steps[set_of(tile)][step] + thread % kN].bits : 0;
    }
  };
  const auto put = [&](int tile) {
    for (int i = 0; i < kK * kN / kThreads; ++i) {
      const int step = thread / kN + i * (kThreads / kN), n = thread % kN;
      b_stages[tile % kStages * kK * kN + b_place(step, n / kRun) + n % kRun].bits = values[i];
    }
  };
  work_out_steps(0);
  __syncthreads();
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles)
      fetch(tile), put(tile);
    else
      cp_async_commit();
    work_out_steps(tile + 1);
    __syncthreads();
  }

  float sums[2][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<bug == Bug::waits_for_one_less ? kStages - 1 : kStages - 2>();
    if (bug != Bug::no_barrier) __syncthreads();
    const int ahead = tile + kStages - 1;
    if (bug == Bug::steps_too_late) work_out_steps(ahead);
    if (ahead < tiles)
      fetch(ahead);
    else
      cp_async_commit();
    if (bug != Bug::steps_too_late) work_out_steps(ahead + 1);
    if (bug == Bug::put_before_the_arithmetic && ahead < tiles) put(ahead + 1);
    for (int i = 0; i < kK / 16; ++i) {
      uint32_t ra[4], rb[4];
      ldmatrix_x4(
          ra, a_stages + tile % kStages * kM * kK + a_place<bug>(warp * 16 + lane % 16, 2 * i + lane / 16));
      const Half* row = b_stages + tile % kStages * kK * kN + b_place(i * 16 + lane % 16, lane / 16);
      if (bug == Bug::b_not_transposed)
        ldmatrix_x4(rb, row);
      else
        ldmatrix_x4_trans(rb, row);
      if (bug == Bug::halves_of_b_swapped) std::swap(rb[1], rb[2]);
      mma_m16n8k16_f16(sums[0], ra, rb[0], rb[1]);
      mma_m16n8k16_f16(sums[1], ra, rb[2], rb[3]);
    }
    if (bug != Bug::put_before_the_arithmetic && ahead < tiles) put(ahead);
  }
  cp_async_wait<0>();
  float* out = partial + (bug == Bug::slices_share_their_sums ? 0 : blockIdx.x * kM * kN);
  for (int i = 0; i < 8; ++i)
    out[(warp * 16 + lane / 4 + i % 4 / 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
}

template <Bug bug>
__global__ void add_slices(const float* partial, float* y, int slices) {
  for (int i = threadIdx.x; i < kM * kN; i += blockDim.x) {
    float sum = bug == Bug::slice_added_twice ? partial[i] : 0;
    for (int slice = 0; slice < slices; ++slice) sum += partial[slice * kM * kN + i];
    y[i] = sum;
  }
}

template <Bug bug>
void run() {
  size_t bytes = smem_take<Half>(0, kStages * kM * kK);
  bytes = smem_take<Half>(bytes, kStages * kK * kN);
  for (const int k : {328, 16}) {
    const int slices = (k + kSliceK - 1) / kSliceK;
    Global<Half> a(kM * k, "a", Access::input), b(k * kN, "b", Access::input);
    Global<float> partial(slices * kM * kN, "workspace", Access::scratch), y(kM * kN, "y", Access::output);
    fill(a), fill(b, 0.2f);
    launch(mma_stages<bug>, dim3(slices), dim3(kThreads), bytes, nullptr, static_cast<Half*>(a),
           static_cast<Half*>(b), static_cast<float*>(partial), k);
    launch(add_slices<bug>, dim3(1), dim3(kThreads), 0, nullptr, static_cast<float*>(partial),
           static_cast<float*>(y), slices);
    finish();
    for (int i = 0; i < kM * kN; ++i) {
      double sum = 0;
      for (int t = 0; t < k; ++t) sum += static_cast<double>(a[i / kN * k + t]) * b[t * kN + i % kN];
      expect_near(y[i], sum, 1e-4);
    }
  }
}

const Cases mma_stages_cases{
    {"mma stages", nullptr, run<Bug::none>},
    {"mma stages: waits for one group less", "", run<Bug::waits_for_one_less>},
    {"mma stages: no barrier after the wait", "", run<Bug::no_barrier>},
    {"mma stages: registers put into a stage in use", "", run<Bug::put_before_the_arithmetic>},
    {"mma stages: one set of steps for two tiles", "", run<Bug::one_set_of_steps>},
    {"mma stages: steps worked out when they are needed", "", run<Bug::steps_too_late>},
    {"mma stages: no swizzle", "", run<Bug::no_swizzle>},
    {"mma stages: copies without the swizzle of ldmatrix", "", run<Bug::copies_not_swizzled>},
    {"mma stages: two rows of 64 bytes with another swizzle", "", run<Bug::turns_swizzled_by_row>},
    {"mma stages: b read without transposing", "", run<Bug::b_not_transposed>},
    {"mma stages: registers of b's fragments swapped", "", run<Bug::halves_of_b_swapped>},
    {"mma stages: rest of k not zero", "", run<Bug::rest_of_k_not_zero>},
    {"mma stages: slices share a workspace", "", run<Bug::slices_share_their_sums>},
    {"mma stages: first slice added twice", "", run<Bug::slice_added_twice>},
};

}  // namespace
}  // namespace fastconv::simt
