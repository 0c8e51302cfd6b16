// SPDX-License-Identifier: MIT
// The emulator's own test: legal code that must stay silent and give the right values, and its broken twins,
// each with a part of the sentence that must be found.
#include "cases.h"

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

// --- global memory

__global__ void write_index(float* out) { out[threadIdx.x] = static_cast<float>(threadIdx.x); }
__global__ void write_index_twice(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }
__global__ void count_threads(int* out) { atomicAdd(out, 1); }
__global__ void atomic_and_plain(int* out) {
  if (threadIdx.x == 0)
    out[0] = 5;
  else
    atomicAdd(out, 1);
}
__global__ void add_one(float* out) { out[threadIdx.x] += 1; }
__global__ void copy(float* out, const float* in, int shift) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) + shift];
}
__global__ void copy_float4(float* out, const float* in, int shift) {
  st<float4>(out + 4 * threadIdx.x, ld<float4>(in + shift + 4 * threadIdx.x));
}
__global__ void local_array(float* out, int n) {
  float a[8];
  for (int i = 0; i < 8; ++i) a[i] = static_cast<float>(i);
  out[threadIdx.x] = a[n & 7];
}
__global__ void local_array_overrun(float* out, int n) {
  float a[8] = {};
  a[n] = 1;
  out[threadIdx.x] = a[n - 1];
}
__global__ void shift_too_far(float* out, int n) { out[threadIdx.x] = static_cast<float>(1 << n); }
__global__ void overflow(float* out, int n) { out[threadIdx.x] = static_cast<float>(n * 2); }

struct Strided {  // a parameter that is a struct: the kernel reads it freely
  float* data;
  int64_t sizes[2], strides[2];
};
__global__ void fill_strided(const Strided s, int64_t extra) {
  for (int64_t i = threadIdx.x; i < s.sizes[0] * (s.sizes[1] + extra); i += blockDim.x)
    s.data[i / (s.sizes[1] + extra) * s.strides[0] + i % (s.sizes[1] + extra) * s.strides[1]] = 1;
}
void run_fill_strided(int64_t extra) {  // 3 x 4 elements of a 3 x 6 matrix
  std::vector<float> values(18);
  const Strided s{values.data(), {3, 4}, {6, 1}};
  register_tensor(s.data, "out", Access::output, sizeof(float), 2, s.sizes, s.strides);
  launch(fill_strided, dim3(1), dim3(32), 0, nullptr, s, extra);
}

// --- shared memory, sizes

template <int Over>
__global__ void overrun_static(float* out) {
  FC_SHARED(float, a, [32]);
  FC_SHARED(float, b, [32]);
  b[threadIdx.x] = 0;
  a[threadIdx.x + Over] = 1;
  __syncthreads();
  out[threadIdx.x] = b[threadIdx.x];
}
__global__ void read_uninitialised(float* out) {
  FC_SHARED(float, a, [33]);
  a[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x + 1];
}
// Shared memory does not keep its values from one block to the next.
__global__ void read_previous_block(float* out) {
  FC_SHARED(float, a, [32]);
  if (blockIdx.x == 0) a[threadIdx.x] = 1;
  if (blockIdx.x == 1) out[threadIdx.x] = a[threadIdx.x];
}
__global__ void carve(float* out) {
  FC_DYN_SMEM(shared);
  float* a = shared.take<float>(33);
  double* b = shared.take<double>(32);
  a[threadIdx.x] = 1, b[threadIdx.x] = 2;
  __syncthreads();
  out[threadIdx.x] = a[31 - threadIdx.x] + static_cast<float>(b[31 - threadIdx.x]);
}
constexpr size_t kCarveBytes = smem_take<double>(smem_take<float>(0, 33), 32);
__global__ void too_much_static(float* out) {
  FC_SHARED(float, a, [13000]);
  a[threadIdx.x] = 1;
  out[threadIdx.x] = a[threadIdx.x];
}

// --- asynchronous copies

template <bool Wait, bool Barrier>
__global__ void copy_async(float* out, const float* in) {
  FC_SHARED(float, s, [64]);
  cp_async4(&s[threadIdx.x], in + threadIdx.x, 4);
  cp_async_commit();
  if (Wait) cp_async_wait<0>();
  if (Barrier) __syncthreads();
  out[threadIdx.x] = s[threadIdx.x ^ 1];
  if (!Wait) cp_async_wait<0>();
}
// Without a barrier the copying thread itself may read.
__global__ void copy_async_own(float* out, const float* in) {
  FC_SHARED(float4, s, [32]);
  const int bytes = threadIdx.x < 16 ? 16 : 8;
  cp_async16(&s[threadIdx.x], in + 4 * threadIdx.x, bytes);
  cp_async_commit();
  cp_async_wait<0>();
  st<float4>(out + 4 * threadIdx.x, s[threadIdx.x]);
}
__global__ void copy_async_never_waited(float* out, const float* in) {
  FC_SHARED(float, s, [64]);
  cp_async4(&s[threadIdx.x], in + threadIdx.x, 4);
  cp_async_commit();
  out[threadIdx.x] = 1;
}

// --- matrix instructions

// [16][8] += [16][16] [16][8] through ldmatrix: a row-major, b as [n][k], and again with b as [k][n] and a
// transposing load.
__global__ void multiply_f16(float* out) {
  FC_SHARED(Half, a, [16][16]);
  FC_SHARED(Half, b, [16][16]);
  FC_SHARED(Half, bt, [16][16]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    a[i / 16][i % 16] = Half(static_cast<float>(i % 7));
    b[i / 16][i % 16] = Half(static_cast<float>(i % 5));
    bt[i % 16][i / 16] = Half(static_cast<float>(i % 5));
  }
  __syncwarp();
  uint32_t ra[4], rb[4], rbt[4];
  ldmatrix_x4(ra, &a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4(rb, &b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  ldmatrix_x4_trans(rbt, &bt[lane % 8 + lane / 8 % 2 * 8][lane / 16 * 8]);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {}, dt[4] = {};
    mma_m16n8k16_f16(d, ra, rb[2 * half], rb[2 * half + 1]);
    mma_m16n8k16_f16(dt, ra, rbt[2 * half], rbt[2 * half + 1]);
    for (int r = 0; r < 4; ++r) {
      const int at = (lane / 4 + r / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + r % 2;
      out[at] = d[r], out[256 + at] = dt[r];
    }
  }
}
void run_multiply_f16() {
  Global<float> out(512);
  launch(multiply_f16, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += static_cast<float>((m * 16 + k) % 7 * ((n * 16 + k) % 5));
      expect(out[m * 16 + n] == sum, "ldmatrix and mma");
      expect(out[256 + m * 16 + n] == sum, "ldmatrix.trans and mma");
    }
}

template <int Lanes>
__global__ void multiply_tf32(float* out) {
  const int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  float d[4] = {};
  // a[m][k] = m + 16 k, b[k][n] = k + 8 n
  const uint32_t a[4] = {to_tf32(row + 16.f * k), to_tf32(row + 8 + 16.f * k), to_tf32(row + 16.f * (k + 4)),
                         to_tf32(row + 8 + 16.f * (k + 4))};
  if (lane < Lanes) mma_m16n8k8_tf32(d, a, to_tf32(k + 8.f * row), to_tf32(k + 4 + 8.f * row));
  for (int r = 0; r < 4; ++r) out[(row + r / 2 * 8) * 8 + k * 2 + r % 2] = d[r];
}
void run_multiply_tf32() {
  Global<float> out(128);
  launch(multiply_tf32<32>, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += static_cast<float>((m + 16 * k) * (k + 8 * n));
      expect(out[m * 8 + n] == sum, "mma of tf32");
    }
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

template <bool Wait, int ExtraBytes>
__global__ void copy_bulk(float* out, const float* in) {
  FC_SHARED(float4, s, [32]);
  FC_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, 512 + ExtraBytes);
    bulk_copy(s, in, 512, bar);
  }
  __syncthreads();
  if (Wait) mbar_wait(bar, 0);
  st<float4>(out + 4 * threadIdx.x, s[31 - threadIdx.x]);
}

// --- the cases

// Launches one block on an output of `count` floats.
template <class... Params, class... Args>
void on_output(void (*kernel)(float*, Params...), int block, int count, const Args&... args) {
  Global<float> out(count);
  launch(kernel, dim3(1), dim3(block), 0, nullptr, static_cast<float*>(out), args...);
}

// The same, with an input of as many floats.
template <class... Params, class... Args>
void on_input(void (*kernel)(float*, const float*, Params...), int block, int count, const Args&... args) {
  Global<float> in(count, "in", Access::input), out(count, "out", Access::output);
  launch(kernel, dim3(1), dim3(block), 0, nullptr, static_cast<float*>(out), static_cast<const float*>(in),
         args...);
}

const Cases selftest{
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

    {"write an output", nullptr,
     [] {
       Global<float> out(64, "out", Access::output);
       launch(write_index, dim3(1), dim3(64), 0, nullptr, static_cast<float*>(out));
     }},
    {"an element never written", "never written: byte 252 of 'out'",
     [] {
       Global<float> out(64, "out", Access::output);
       launch(write_index, dim3(1), dim3(63), 0, nullptr, static_cast<float*>(out));
     }},
    {"write past the end", "out of bounds: thread (64,0,0) writes 4 bytes at byte 256 of 'out'",
     [] { on_output(write_index, 65, 64); }},
    {"write through null", "access through a null",
     [] { launch(write_index, dim3(1), dim3(1), 0, nullptr, static_cast<float*>(nullptr)); }},
    {"two blocks, one address", "another block",
     [] {
       Global<float> out(32);
       launch(write_index_twice, dim3(2), dim3(32), 0, nullptr, static_cast<float*>(out));
     }},
    {"two launches, one address", nullptr,
     [] {
       Global<float> out(32);
       for (int i = 0; i < 2; ++i) launch(add_one, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
       expect(out[31] == 2, "two launches");
     }},
    {"an atomic counter", nullptr,
     [] {
       Global<int> out(1);
       launch(count_threads, dim3(3), dim3(64), 0, nullptr, static_cast<int*>(out));
       expect(out[0] == 192, "atomic counter");
     }},
    {"atomic against plain", "race: ",
     [] {
       Global<int> out(1);
       launch(atomic_and_plain, dim3(1), dim3(64), 0, nullptr, static_cast<int*>(out));
     }},
    {"add to an output", "uninitialised memory",
     [] {
       Global<float> out(32, "out", Access::output);
       launch(add_one, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
     }},
    {"write to an input", "an input",
     [] {
       Global<float> in(32, "in", Access::input);
       launch(write_index, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(in));
     }},
    {"copy", nullptr, [] { on_input(copy, 64, 64, 0); }},
    {"read before the beginning", "byte -4 of 'in'", [] { on_input(copy, 64, 64, -1); }},
    {"vector access", nullptr, [] { on_input(copy_float4, 16, 64, 0); }},
    {"misaligned vector access", "misaligned vector of 16 bytes", [] { on_input(copy_float4, 15, 64, 2); }},
    {"strided output", nullptr, [] { run_fill_strided(0); }},
    {"write between the elements", "between its elements|byte 64 of 'out' (64 bytes)",
     [] { run_fill_strided(1); }},
    {"local array", nullptr, [] { on_output(local_array, 32, 32, 5); }},
    {"local array overrun", "index outside of an array", [] { on_output(local_array_overrun, 32, 32, 8); }},
    {"shift too far", "shift by too many bits", [] { on_output(shift_too_far, 1, 1, 40); }},
    {"integer overflow", "overflow of a multiplication", [] { on_output(overflow, 1, 1, 1 << 30); }},

    {"static array", nullptr, [] { on_output(overrun_static<0>, 32, 32); }},
    {"static array overrun", "byte 128 of shared 'a' (128 bytes)",
     [] { on_output(overrun_static<1>, 32, 32); }},
    {"shared memory never written", "uninitialised memory, byte 128 of shared 'a'",
     [] { on_output(read_uninitialised, 32, 32); }},
    {"shared memory of the block before", "uninitialised memory",
     [] {
       Global<float> out(32);
       launch(read_previous_block, dim3(2), dim3(32), 0, nullptr, static_cast<float*>(out));
     }},
    {"carve", nullptr,
     [] {
       Global<float> out(32);
       launch(carve, dim3(1), dim3(32), kCarveBytes, nullptr, static_cast<float*>(out));
       expect(out[5] == 3, "carve");
     }},
    {"carve more than there is", "carves",
     [] {
       Global<float> out(32);
       launch(carve, dim3(1), dim3(32), kCarveBytes - 8, nullptr, static_cast<float*>(out));
     }},
    {"52 kB of static arrays", "too much shared memory", [] { on_output(too_much_static, 32, 32); }},
    {"a block of 2048", "invalid launch", [] { on_output(write_index, 2048, 2048); }},
    {"a block of 1024 after all this", nullptr, [] { on_output(write_index, 1024, 1024); }},

    {"cp.async", nullptr, [] { on_input(copy_async<true, true>, 64, 64); }},
    {"cp.async without a barrier", "race: ", [] { on_input(copy_async<true, false>, 64, 64); }},
    {"cp.async without a wait", "not waited for", [] { on_input(copy_async<false, true>, 64, 64); }},
    {"cp.async of the reader", nullptr, [] { on_input(copy_async_own, 32, 128); }},
    {"cp.async never waited for", "is outstanding", [] { on_input(copy_async_never_waited, 64, 64); }},
    {"bulk copy", nullptr, [] { on_input(copy_bulk<true, 0>, 32, 128); }},
    {"bulk copy without a wait", "not waited for", [] { on_input(copy_bulk<false, 0>, 32, 128); }},
    {"bulk copy of fewer bytes than announced", "deadlock", [] { on_input(copy_bulk<true, 16>, 32, 128); }},

    {"ldmatrix and mma", nullptr, run_multiply_f16},
    {"mma of tf32", nullptr, run_multiply_tf32},
    {"mma of 31 lanes", "full warp", [] { on_output(multiply_tf32<31>, 32, 128); }},

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
