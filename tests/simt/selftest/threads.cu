// SPDX-License-Identifier: MIT
// Threads of a block and of a warp: barriers, collectives, races.
#include "selftest.h"

namespace fastconv::simt {
namespace {

// --- barriers and races in shared memory

template <bool Barrier>
__global__ void reverse_block(float* out) {
  FC_SHARED(float, s, [128]);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (Barrier) __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

// One tile written again and again: each reuse needs a barrier before it, too.
template <bool Barrier>
__global__ void reuse_tile(float* out) {
  FC_SHARED(float, s, [128]);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = static_cast<float>(i);
    __syncthreads();
    sum += s[(threadIdx.x + 32) % 128];
    if (Barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Two buffers taken in turn need one barrier a step, not two.
__global__ void alternate_tiles(float* out) {
  FC_SHARED(float, s, [2][64]);
  float sum = 0;
  for (int i = 0; i < 6; ++i) {
    s[i % 2][threadIdx.x] = static_cast<float>(i);
    __syncthreads();
    sum += s[i % 2][63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

template <bool Diverge>
__global__ void barrier_in_branch(float* out) {
  if (threadIdx.x < 32 && Diverge) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool Guard>
__global__ void end_before_barrier(float* out, int count) {
  if (static_cast<int>(threadIdx.x) >= count && Guard) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) out[threadIdx.x] = 1;
}

__global__ void write_same_value(float* out) {
  FC_SHARED(int, flag, [1]);
  flag[0] = 1;
  out[threadIdx.x] = 1;
}

__global__ void reduce_at_barrier(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 2), any = __syncthreads_or(threadIdx.x == 7),
            all = __syncthreads_and(threadIdx.x < 40);
  if (threadIdx.x == 0) out[0] = count, out[1] = any, out[2] = all;
}

// Neighbours write the two halves of one word, and the two bytes of one half.
__global__ void write_sub_words(float* out) {
  FC_SHARED(BFloat16, s, [64]);
  FC_SHARED(unsigned char, c, [64]);
  s[threadIdx.x] = BFloat16(static_cast<float>(threadIdx.x));
  c[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(s[63 - threadIdx.x]) + c[63 - threadIdx.x];
}

__global__ void partial_warp(float* out) {
  FC_SHARED(float, s, [48]);
  s[threadIdx.x] = 1;
  __syncwarp();
  __syncthreads();
  out[threadIdx.x] = s[47 - threadIdx.x];
}

// --- warps

// Each half of a warp synchronises by itself; reading across the halves is a race.
template <int Across>
__global__ void sync_half_warps(float* out) {
  FC_SHARED(float, s, [64]);
  const int lane = threadIdx.x % 32;
  s[threadIdx.x] = static_cast<float>(lane);
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = s[threadIdx.x ^ Across];
}

// What is handed from lane to lane by syncwarps stays ordered: 0 -> 1 -> 2.
__global__ void chain_of_syncwarps(float* out) {
  FC_SHARED(float, s, [32]);
  if (threadIdx.x == 0) s[0] = 5;
  if (threadIdx.x < 2) __syncwarp(0x3);
  if (threadIdx.x == 1) s[1] = s[0];
  if (threadIdx.x == 1 || threadIdx.x == 2) __syncwarp(0x6);
  if (threadIdx.x == 2) out[0] = s[0] + s[1];
}

__global__ void shuffle_is_no_fence(float* out) {
  FC_SHARED(float, s, [32]);
  s[threadIdx.x] = 1;
  const float v = __shfl_xor_sync(~0u, 1.0f, 1);
  out[threadIdx.x] = s[threadIdx.x ^ 1] + v;
}

__global__ void shuffles(float* out, int* votes) {
  const int lane = threadIdx.x;
  const float mine = static_cast<float>(lane);
  out[lane] = __shfl_down_sync(~0u, mine, 4);
  out[lane + 32] = __shfl_up_sync(~0u, mine, 1, 8);
  out[lane + 64] = __shfl_sync(~0u, mine, 3, 16);
  out[lane + 96] = static_cast<float>(__shfl_xor_sync(~0u, static_cast<double>(lane), 5));
  votes[lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
}

// The upper lanes end; the others go on among themselves.
__global__ void end_of_half_a_warp(float* out, int count) {
  if (static_cast<int>(threadIdx.x) >= count) return;
  out[threadIdx.x] = __shfl_sync((1u << count) - 1, static_cast<float>(threadIdx.x), 0);
}

__global__ void shuffle_from_absent_lane(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.0f, 8);
}

__global__ void collective_without_itself(float* out) {
  __syncwarp(threadIdx.x == 3 ? 0xfffffff7u : ~0u);
  out[threadIdx.x] = 1;
}

__global__ void different_collectives(float* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0);
  else
    __syncwarp();
}

__global__ void shuffle_against_barrier(float* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0);
  else
    __syncthreads();
}

// --- barriers of part of a block: warp 0 fills a ring of two buffers, warp 1 empties it

template <bool WaitEmpty>
__global__ void ring_of_named_barriers(float* out) {
  FC_SHARED(float, s, [2][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0;
  for (int i = 0; i < 6; ++i) {
    const int slot = i % 2;
    if (warp == 0) {
      if (i >= 2 && WaitEmpty) bar_sync(3 + slot, 64);
      s[slot][lane] = static_cast<float>(i * 32 + lane);
      bar_arrive(1 + slot, 64);
    } else {
      bar_sync(1 + slot, 64);
      sum += s[slot][31 - lane];
      if (i < 4 && WaitEmpty) bar_arrive(3 + slot, 64);
    }
  }
  if (warp == 1) out[lane] = sum;
}

template <bool WaitEmpty, bool WaitFull>
__global__ void ring_of_mbarriers(float* out) {
  FC_SHARED(float, s, [2][32]);
  FC_SHARED(uint64_t, full, [2]);
  FC_SHARED(uint64_t, empty, [2]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) mbar_init(&full[i], 32), mbar_init(&empty[i], 32);
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 6; ++i) {
    const int slot = i % 2, phase = i / 2 % 2;
    if (warp == 0) {
      if (i >= 2 && WaitEmpty) mbar_wait(&empty[slot], phase ^ 1);
      s[slot][lane] = static_cast<float>(i * 32 + lane);
      mbar_arrive(&full[slot]);
    } else {
      if (WaitFull) mbar_wait(&full[slot], phase);
      sum += s[slot][31 - lane];
      mbar_arrive(&empty[slot]);
    }
  }
  if (warp == 1) out[lane] = sum;
}

template <class Kernel>
void run_ring(Kernel kernel) {
  Global<float> out(32);
  launch(kernel, dim3(1), dim3(64), 0, nullptr, static_cast<float*>(out));
  for (int lane = 0; lane < 32; ++lane) {
    float sum = 0;
    for (int i = 0; i < 6; ++i) sum += static_cast<float>(i * 32 + 31 - lane);
    expect(out[lane] == sum, "ring");
  }
}

// --- the cases

const Cases threads_cases{
    {"reverse a block", nullptr, [] { on_output(reverse_block<true>, 128, 128); }},
    {"no barrier before a read", "race: ", [] { on_output(reverse_block<false>, 128, 128); }},
    {"reuse a tile", nullptr, [] { on_output(reuse_tile<true>, 128, 128); }},
    {"no barrier before a reuse", "race: ", [] { on_output(reuse_tile<false>, 128, 128); }},
    {"two tiles in turn", nullptr, [] { on_output(alternate_tiles, 64, 64); }},
    {"one barrier for all", nullptr, [] { on_output(barrier_in_branch<false>, 64, 64); }},
    {"barriers in two branches", "different barriers", [] { on_output(barrier_in_branch<true>, 64, 64); }},
    {"guard after a barrier", nullptr, [] { on_output(end_before_barrier<false>, 64, 40, 40); }},
    {"threads end before a barrier", "ended before a barrier",
     [] { on_output(end_before_barrier<true>, 64, 40, 40); }},
    {"all write one value", "race: ", [] { on_output(write_same_value, 64, 64); }},
    {"reducing barriers", nullptr,
     [] {
       Global<int> out(3);
       launch(reduce_at_barrier, dim3(1), dim3(64), 0, nullptr, static_cast<int*>(out));
       expect(out[0] == 32 && out[1] == 1 && out[2] == 0, "reducing barriers");
     }},
    {"neighbours in one word", nullptr, [] { on_output(write_sub_words, 64, 64); }},
    {"a block of 48", nullptr, [] { on_output(partial_warp, 48, 48); }},
    {"half warps", nullptr, [] { on_output(sync_half_warps<15>, 64, 64); }},
    {"across half warps", "race: ", [] { on_output(sync_half_warps<31>, 64, 64); }},
    {"a chain of syncwarps", nullptr, [] { on_output(chain_of_syncwarps, 32, 1); }},
    {"a shuffle is no fence", "race: ", [] { on_output(shuffle_is_no_fence, 32, 32); }},
    {"shuffles and votes", nullptr,
     [] {
       Global<float> out(128);
       Global<int> votes(32, "votes");
       launch(shuffles, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out), static_cast<int*>(votes));
       for (int l = 0; l < 32; ++l) {
         expect(out[l] == (l + 4 < 32 ? l + 4 : l) && out[l + 32] == (l % 8 ? l - 1 : l),
                "shuffle up or down");
         expect(out[l + 64] == l / 16 * 16 + 3 && out[l + 96] == (l ^ 5), "shuffle by index or xor");
         expect(static_cast<unsigned>(votes[l]) == 0x49249249u, "ballot");
       }
     }},
    {"half a warp ends", nullptr, [] { on_output(end_of_half_a_warp, 32, 20, 20); }},
    {"shuffle from an absent lane", "does not take part",
     [] { on_output(shuffle_from_absent_lane, 32, 16); }},
    {"a mask without the caller", "leaves it out", [] { on_output(collective_without_itself, 32, 32); }},
    {"two collectives in one warp", "different collectives",
     [] { on_output(different_collectives, 32, 32); }},
    {"shuffle against a barrier", "deadlock", [] { on_output(shuffle_against_barrier, 32, 32); }},

    {"ring of named barriers", nullptr, [] { run_ring(ring_of_named_barriers<true>); }},
    {"ring of named barriers, not emptied", "deadlock|race|disagree|wrong",
     [] { run_ring(ring_of_named_barriers<false>); }},
    {"ring of mbarriers", nullptr, [] { run_ring(ring_of_mbarriers<true, true>); }},
    {"ring of mbarriers, not emptied", "race: |more arrivals|deadlock",
     [] { run_ring(ring_of_mbarriers<false, true>); }},
    {"ring of mbarriers, not filled", "race: |more arrivals|uninit",
     [] { run_ring(ring_of_mbarriers<true, false>); }},
};

}  // namespace
}  // namespace fastconv::simt
