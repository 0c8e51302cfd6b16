// SPDX-License-Identifier: MIT
// Clusters: the shared memory of another block, its mbarriers, one copy for several blocks.
#include "selftest.h"

namespace fastconv::simt {
namespace {

// Each block reads what its neighbour wrote.
template <bool SyncFirst, bool SyncLast>
__global__ void read_neighbour(float* out) {
  FC_SHARED(float, s, [32]);
  const int rank = cluster_rank(), next = (rank + 1) % cluster_size();
  s[threadIdx.x] = static_cast<float>(rank * 100 + threadIdx.x);
  if (SyncFirst) cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = cluster_shared(s, next)[31 - threadIdx.x];
  if (SyncLast) cluster_sync();
}
template <bool SyncFirst, bool SyncLast>
void run_read_neighbour() {
  Global<float> out(8 * 32, "out", Access::output);
  launch(read_neighbour<SyncFirst, SyncLast>, Grid(dim3(8), 4), dim3(32), 0, nullptr,
         static_cast<float*>(out));
  for (int i = 0; i < 256; ++i)
    expect(out[i] == static_cast<float>((i / 32 + 1) % 4 * 100 + 31 - i % 32), "neighbour's shared memory");
}

// All blocks write to block 0, each its own part, or all the same.
template <bool Same>
__global__ void write_to_first(float* out) {
  FC_SHARED(float, s, [64]);
  const int rank = cluster_rank();
  cluster_sync();
  cluster_shared(s, 0)[(Same ? 0 : rank * 32) + threadIdx.x] = 1;
  cluster_sync();
  if (rank == 0) out[threadIdx.x] = s[threadIdx.x] + s[Same ? 0 : 32 + threadIdx.x];
}

// What a thread did before its block's barrier is known to those who learn from another thread of the block.
__global__ void barriers_of_both_kinds(float* out) {
  FC_SHARED(float, s, [64]);
  FC_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x == 0) mbar_init(bar, 1), fence_mbar_init();
  cluster_sync();
  if (cluster_rank() == 1) {
    cluster_shared(s, 0)[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 40) mbar_arrive_remote(bar, 0);
  } else {
    if (threadIdx.x == 7) mbar_wait_cluster(bar, 0);
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
  }
  cluster_sync();
}

enum class Signal { right, block_scope, no_fence, no_sync };

// Block 1 fills block 0's array and says so at its mbarrier.
template <Signal variant>
__global__ void signal_first(float* out) {
  FC_SHARED(float, s, [32]);
  FC_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x == 0) {
    mbar_init(bar, 32);
    if (variant != Signal::no_fence) fence_mbar_init();
  }
  if (variant != Signal::no_sync) cluster_sync();
  if (cluster_rank() == 1) {
    cluster_shared(s, 0)[threadIdx.x] = static_cast<float>(threadIdx.x);
    mbar_arrive_remote(bar, 0);
  } else {
    if (variant == Signal::block_scope)
      mbar_wait(bar, 0);
    else
      mbar_wait_cluster(bar, 0);
    out[threadIdx.x] = s[31 - threadIdx.x];
  }
}

enum class Multicast { right, third_block, only_first_waits, leaves };

// Block 0 brings 128 bytes to both.
template <Multicast variant>
__global__ void multicast(float* out, const float* in) {
  FC_SHARED(float, s, [32]);
  FC_SHARED(uint64_t, bar, [1]);
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, 128);
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0)
    bulk_copy_multicast(s, in, 128, bar, variant == Multicast::third_block ? 7 : 3);
  if (variant == Multicast::leaves && rank == 1) return;
  if (variant != Multicast::only_first_waits || rank == 0) mbar_wait(bar, 0);
  out[rank * 32 + threadIdx.x] = s[31 - threadIdx.x];
  cluster_sync();
}
template <Multicast variant>
void run_multicast() {
  Global<float> in(32, "in", Access::input), out(64);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<float>(i);
  launch(multicast<variant>, Grid(dim3(2), 2), dim3(32), 0, nullptr, static_cast<float*>(out),
         static_cast<const float*>(in));
  for (int i = 0; i < 64; ++i) expect(out[i] == static_cast<float>(31 - i % 32), "multicast");
}

template <int Arrivals, int Waits>
__global__ void arrive_and_wait(float* out) {
  for (int i = 0; i < Arrivals; ++i) cluster_arrive();
  for (int i = 0; i < Waits; ++i) cluster_wait();
  out[blockIdx.x * 32 + threadIdx.x] = 1;
}

// Threads that have ended count as arrived.
__global__ void end_before_cluster_barrier(float* out) {
  out[blockIdx.x * 64 + threadIdx.x] = 1;
  if (threadIdx.x >= 32) return;
  cluster_sync();
}

__global__ void map_to_absent_block(float* out) {
  FC_SHARED(float, s, [32]);
  cluster_sync();
  out[threadIdx.x] = *cluster_shared(s, cluster_size());
}

const Grid kTwo(dim3(2), 2);

const Cases cluster{
    {"shared memory of the neighbour", nullptr, run_read_neighbour<true, true>},
    {"neighbour not known to have begun", "must come first|race: ", run_read_neighbour<false, true>},
    {"neighbour not known to go on", "has ended|nothing orders the two", run_read_neighbour<true, false>},
    {"two blocks write to a third", nullptr, [] { on_output(write_to_first<false>, kTwo, 32, 32); }},
    {"two blocks write to one address", "another block of the cluster",
     [] { on_output(write_to_first<true>, kTwo, 32, 32); }},
    {"barriers of block and cluster", nullptr, [] { on_output(barriers_of_both_kinds, kTwo, 64, 64); }},
    {"arrival from another block", nullptr, [] { on_output(signal_first<Signal::right>, kTwo, 32, 32); }},
    {"wait for another block at block scope", "race: |nothing orders the two",
     [] { on_output(signal_first<Signal::block_scope>, kTwo, 32, 32); }},
    {"arrival without a fence after init", "without a fence_mbar_init",
     [] { on_output(signal_first<Signal::no_fence>, kTwo, 32, 32); }},
    {"arrival at a block that has not begun", "must come first|not initialised",
     [] { on_output(signal_first<Signal::no_sync>, kTwo, 32, 32); }},
    {"multicast", nullptr, run_multicast<Multicast::right>},
    {"multicast beyond the cluster", "a mask of blocks", run_multicast<Multicast::third_block>},
    {"multicast that one block does not wait for",
     "not waited for|race: ", run_multicast<Multicast::only_first_waits>},
    {"multicast to a block that ends", "is outstanding|has ended|nothing orders",
     run_multicast<Multicast::leaves>},
    {"cluster barrier in two steps", nullptr, [] { on_output(arrive_and_wait<1, 1>, kTwo, 32, 64); }},
    {"two arrivals at the cluster barrier", "without a wait",
     [] { on_output(arrive_and_wait<2, 1>, kTwo, 32, 64); }},
    {"a wait without an arrival", "without having arrived",
     [] { on_output(arrive_and_wait<0, 1>, kTwo, 32, 64); }},
    {"end before the cluster barrier", nullptr, [] { on_output(end_before_cluster_barrier, kTwo, 64, 128); }},
    {"a block that the cluster has not", "mapa at", [] { on_output(map_to_absent_block, kTwo, 32, 32); }},
    {"three blocks in clusters of two", "invalid launch",
     [] { on_output(end_before_cluster_barrier, Grid(dim3(3), 2), 64, 192); }},
};

}  // namespace
}  // namespace fastconv::simt
