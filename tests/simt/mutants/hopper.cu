// SPDX-License-Identifier: MIT
// y = x w^T as Hopper wants it. A block has a producer warpgroup, which brings boxes of x and w into a ring
// of swizzled stages and gives back registers, and two consumer warpgroups, which take those registers,
// multiply 64 rows each and store the tile of y as a box. The two blocks of a cluster have the same rows of
// w, of which each brings one half for both.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  swizzle_of_copies,
  swizzle_of_operand,
  rows_of_stage,
  no_expect,
  half_expected,
  no_init_fence,
  no_first_cluster_sync,
  no_last_cluster_sync,
  full_parity,
  empty_parity,
  no_empty_wait,
  block_scope,
  arrives_at_own_only,
  released_before_wait,
  no_wgmma_fence,
  no_wgmma_wait,
  always_adds,
  no_proxy_fence,
  no_barrier_before_store,
  no_store_wait,
  store_not_committed,
  no_registers_given,
  box_at_wrong_column,
};

constexpr int kM = 128, kN = 32, kK = 64, kStages = 3, kCluster = 2;
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2, kHalf = kBBytes / kCluster;

template <Bug bug>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
             const __grid_constant__ TensorMap y, int steps) {
  FC_DYN_SMEM(shared);
  unsigned char* a = shared.take<unsigned char>(kStages * kABytes, 1024);
  unsigned char* b = shared.take<unsigned char>(kStages * kBBytes, 1024);
  float* tile = shared.take<float>(kM * kN, 128);
  uint64_t* full = shared.take<uint64_t>(kStages);
  uint64_t* empty = shared.take<uint64_t>(kStages);
  const int thread = threadIdx.x % 128, rank = cluster_rank(), m0 = blockIdx.x * kM, n0 = blockIdx.y * kN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbar_init(&full[i], 1), mbar_init(&empty[i], kCluster * kConsumers);
    if (bug != Bug::no_init_fence) fence_mbar_init();
  }
  if (bug == Bug::no_first_cluster_sync)
    __syncthreads();
  else
    cluster_sync();

  if (threadIdx.x < 128) {
    if (bug != Bug::no_registers_given) setmaxnreg_dec<40>();
    for (int step = 0; step < steps && thread == 0; ++step) {
      const int stage = step % kStages, phase = step / kStages % 2;
      if (step >= kStages && bug != Bug::no_empty_wait) {
        const int parity = bug == Bug::empty_parity ? phase : phase ^ 1;
        if (bug == Bug::block_scope)
          mbar_wait(&empty[stage], parity);
        else
          mbar_wait_cluster(&empty[stage], parity);
      }
      if (bug == Bug::no_expect)
        mbar_arrive(&full[stage]);
      else
        mbar_arrive_expect_tx(&full[stage], kABytes + (bug == Bug::half_expected ? kHalf : kBBytes));
      const int k = step * kK + (bug == Bug::box_at_wrong_column ? 8 : 0);
      tensor_copy(a + stage * kABytes, x, {k, m0}, &full[stage]);
      tensor_copy_multicast(b + stage * kBBytes + rank * kHalf, w, {k, n0 + rank * kN / kCluster},
                            &full[stage], 3);
    }
  } else {
    setmaxnreg_inc<232>();
    const int consumer = threadIdx.x / 128 - 1;
    float d[kN / 2];
    const Swizzle swizzle = bug == Bug::swizzle_of_operand ? Swizzle::b64 : Swizzle::b128;
    const int stride = bug == Bug::rows_of_stage ? 2048 : 1024;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, phase = step / kStages % 2;
      mbar_wait(&full[stage], bug == Bug::full_parity ? phase ^ 1 : phase);
      if (bug != Bug::no_wgmma_fence) wgmma_fence();
      for (int k = 0; k < kK * 2; k += 32)
        wgmma_bf16(d, wgmma_operand(a + stage * kABytes + consumer * 64 * 128 + k, 0, 1024, swizzle),
                   wgmma_operand(b + stage * kBBytes + k, 0, stride, Swizzle::b128),
                   step + k > 0 || bug == Bug::always_adds);
      wgmma_commit();
      const auto release = [&] {
        bar_sync(1 + consumer, 128);
        if (thread < kCluster)
          mbar_arrive_remote(&empty[stage], bug == Bug::arrives_at_own_only ? rank : thread);
      };
      if (bug == Bug::released_before_wait) release();
      if (bug != Bug::no_wgmma_wait) wgmma_wait<0>();
      if (bug != Bug::released_before_wait) release();
    }
    for (int e = 0; e < kN / 2; ++e)
      tile[(consumer * 64 + thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8) * kN + e / 4 * 8 +
           thread % 4 * 2 + e % 2] = d[e];
    if (bug != Bug::no_proxy_fence) fence_proxy_async();
    if (bug != Bug::no_barrier_before_store) bar_sync(3, 128 * kConsumers);
    if (threadIdx.x == 128) {
      tensor_store(y, {n0, m0}, tile);
      if (bug != Bug::store_not_committed) bulk_commit();
      if (bug != Bug::no_store_wait) bulk_wait_read<0>();
    }
  }
  if (bug != Bug::no_last_cluster_sync) cluster_sync();
}

template <Bug bug>
void run() {
  size_t bytes = smem_take<unsigned char>(0, kStages * kABytes, 1024);
  bytes = smem_take<unsigned char>(bytes, kStages * kBBytes, 1024);
  bytes = smem_take<float>(bytes, kM * kN, 128);
  bytes = smem_take<uint64_t>(smem_take<uint64_t>(bytes, kStages), kStages);
  const int M = 200, N = 40, K = 8 * kK - 24, steps = 8;
  Global<BFloat16> x(M * K, "x", Access::input), w(N * K, "w", Access::input);
  Global<float> y(M * N, "y", Access::output);
  fill(x), fill(w, 0.2f);
  const Swizzle swizzle = bug == Bug::swizzle_of_copies ? Swizzle::none : Swizzle::b128;
  launch(
      multiply<bug>, Grid(dim3((M + kM - 1) / kM, (N + kN - 1) / kN), kCluster), dim3(kThreads), bytes,
      nullptr, make_tensor_map(Dtype::bf16, static_cast<BFloat16*>(x), {K, M}, {1, K}, {kK, kM}, swizzle),
      make_tensor_map(Dtype::bf16, static_cast<BFloat16*>(w), {K, N}, {1, K}, {kK, kN / kCluster}, swizzle),
      make_tensor_map(Dtype::f32, static_cast<float*>(y), {N, M}, {1, N}, {kN, kM}), steps);
  finish();
  for (int i = 0; i < M * N; ++i) {
    double sum = 0;
    for (int k = 0; k < K; ++k) sum += static_cast<double>(x[i / N * K + k]) * w[i % N * K + k];
    expect_near(y[i], sum, 1e-4);
  }
}

const Cases hopper{
    {"hopper", nullptr, run<Bug::none>},
    {"hopper: copies without a swizzle", "", run<Bug::swizzle_of_copies>},
    {"hopper: operand of another swizzle", "", run<Bug::swizzle_of_operand>},
    {"hopper: stride of an operand", "", run<Bug::rows_of_stage>},
    {"hopper: no bytes announced", "", run<Bug::no_expect>},
    {"hopper: bytes of the other block not announced", "", run<Bug::half_expected>},
    {"hopper: no fence after the mbarriers' init", "", run<Bug::no_init_fence>},
    {"hopper: cluster not known to have begun", "", run<Bug::no_first_cluster_sync>},
    {"hopper: end without a cluster_sync", "", run<Bug::no_last_cluster_sync>},
    {"hopper: wrong parity of a full stage", "", run<Bug::full_parity>},
    {"hopper: wrong parity of an empty stage", "", run<Bug::empty_parity>},
    {"hopper: stage refilled without a wait", "", run<Bug::no_empty_wait>},
    {"hopper: wait for the cluster at block scope", "", run<Bug::block_scope>},
    {"hopper: stage released to its own block only", "", run<Bug::arrives_at_own_only>},
    {"hopper: stage released before its wgmma are done", "", run<Bug::released_before_wait>},
    {"hopper: no wgmma fence", "", run<Bug::no_wgmma_fence>},
    {"hopper: no wait for the sums", "", run<Bug::no_wgmma_wait>},
    {"hopper: sums never begun with zero", "", run<Bug::always_adds>},
    {"hopper: no proxy fence before the store", "", run<Bug::no_proxy_fence>},
    {"hopper: no barrier before the store", "", run<Bug::no_barrier_before_store>},
    {"hopper: end without a wait for the store", "", run<Bug::no_store_wait>},
    {"hopper: store not committed", "", run<Bug::store_not_committed>},
    {"hopper: registers that nobody gave back", "", run<Bug::no_registers_given>},
    {"hopper: box at the wrong column", "", run<Bug::box_at_wrong_column>},
};

}  // namespace
}  // namespace fastconv::simt
