// SPDX-License-Identifier: MIT
// What may be read and written, when and by how many bytes.
#include "selftest.h"

namespace fastconv::simt {
namespace {

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

// --- cp.async

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

// --- the cases

const Cases memory_cases{
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
};

}  // namespace
}  // namespace fastconv::simt
