// SPDX-License-Identifier: MIT
// The copy engine: runs of bytes and boxes of tensors, into shared memory and out of it.
#include "selftest.h"

namespace fastconv::simt {
namespace {

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

// --- boxes of tensors

enum class Load { right, no_init_fence, no_expect, two_coordinates, misaligned, one_waits, no_proxy_fence };

constexpr int kBoxRows = 4, kBoxColumns = 32;  // of 64-byte rows, bf16
constexpr int kBoxBytes = kBoxRows * kBoxColumns * 2;

// The box at (column, row) of a matrix.
template <Load variant>
__global__ void copy_box(BFloat16* out, const __grid_constant__ TensorMap map, int column, int row) {
  FC_DYN_SMEM(shared);
  BFloat16* s = shared.take<BFloat16>(kBoxRows * kBoxColumns + 32, 512);
  uint64_t* bar = shared.take<uint64_t>(1);
  if (variant == Load::no_proxy_fence) s[threadIdx.x] = BFloat16(1.0f);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    if (variant != Load::no_init_fence) fence_mbar_init();
    if (variant == Load::no_expect)
      mbar_arrive(bar);
    else
      mbar_arrive_expect_tx(bar, kBoxBytes);
    if (variant == Load::two_coordinates)
      tensor_copy(s, map, {column, row, 0}, bar);
    else
      tensor_copy(s + (variant == Load::misaligned ? 32 : 0), map, {column, row}, bar);
  }
  __syncthreads();
  if (variant != Load::one_waits || threadIdx.x < 32) mbar_wait(bar, 0);
  if (variant == Load::one_waits) bar_sync(1 + threadIdx.x / 32, 32);
  for (int i = threadIdx.x; i < kBoxRows * kBoxColumns; i += blockDim.x) {
    // 64 bytes: chunk c of row r stands in the place of chunk c ^ r / 2.
    const int r = i / kBoxColumns, x = i % kBoxColumns;
    out[i] = s[r * kBoxColumns + (x / 8 ^ r / 2) * 8 + x % 8];
  }
}

template <Load variant>
void run_copy_box(int column, int row) {
  constexpr int kRows = 6, kColumns = 40, kPitch = 48;
  Global<BFloat16> in(kRows * kPitch, "in", Access::input),
      out(kBoxRows * kBoxColumns, "out", Access::output);
  for (int i = 0; i < kRows * kPitch; ++i) in[i] = BFloat16(static_cast<float>(i % 251));
  const TensorMap map = make_tensor_map(Dtype::bf16, static_cast<BFloat16*>(in), {kColumns, kRows},
                                        {1, kPitch}, {kBoxColumns, kBoxRows}, Swizzle::b64);
  const size_t bytes = smem_take<uint64_t>(kBoxBytes + 64, 1);
  launch(copy_box<variant>, dim3(1), dim3(64), bytes, nullptr, static_cast<BFloat16*>(out), map, column, row);
  for (int i = 0; i < kBoxRows * kBoxColumns; ++i) {
    const int r = row + i / kBoxColumns, c = column + i % kBoxColumns;
    const bool inside = 0 <= r && r < kRows && 0 <= c && c < kColumns;
    expect(out[i].bits == (inside ? in[r * kPitch + c].bits : 0), "box of a tensor");
  }
}

// The map is of 40 x 6 elements, the tensor ends before.
void run_box_of_too_large_a_map() {
  Global<BFloat16> in(40 * 3, "in", Access::input), out(kBoxRows * kBoxColumns);
  const TensorMap map = make_tensor_map(Dtype::bf16, static_cast<BFloat16*>(in), {40, 6}, {1, 40},
                                        {kBoxColumns, kBoxRows}, Swizzle::b64);
  launch(copy_box<Load::right>, dim3(1), dim3(64), smem_take<uint64_t>(kBoxBytes + 64, 1), nullptr,
         static_cast<BFloat16*>(out), map, 0, 0);
}

template <int D>
void make_map(const int64_t (&sizes)[D], const int64_t (&strides)[D], const int (&box)[D], Swizzle swizzle) {
  Global<float> in(1024);
  make_tensor_map(Dtype::f32, static_cast<float*>(in), sizes, strides, box, swizzle);
}

// --- stores

enum class Store { right, no_proxy_fence, no_wait, overwritten, read_back };

template <Store variant>
__global__ void store_bulk(float* out) {
  FC_SHARED(float, s, [64]);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (variant != Store::no_proxy_fence) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, s, 128);
    bulk_commit();
    bulk_store(out + 32, s + 32, 128);
    bulk_commit();
    if (variant != Store::no_wait) bulk_wait_read<1>();
    s[variant == Store::overwritten ? 32 : 0] = -1;
    if (variant != Store::no_wait) bulk_wait_read<0>();
    if (variant == Store::read_back) out[0] += 1;
  }
}

template <Store variant>
void run_store_bulk() {
  Global<float> out(64, "out", Access::output);
  launch(store_bulk<variant>, dim3(1), dim3(64), 0, nullptr, static_cast<float*>(out));
  for (int i = 0; i < 64; ++i) expect(out[i] == static_cast<float>(i), "bulk store");
}

// What was waited for may be read; the box ends beyond the tensor.
__global__ void store_box(float* out, const __grid_constant__ TensorMap map) {
  FC_DYN_SMEM(shared);
  float* s = shared.take<float>(64, 128);
  for (int i = threadIdx.x; i < 64; i += 32) s[i] = static_cast<float>(i);
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    tensor_store(map, {2, 1}, s);  // 16 columns, 4 rows
    bulk_commit();
    bulk_wait<0>();
    out[1 * 8 + 2] += 100;
  }
}

void run_store_box() {
  Global<float> out(24);
  const TensorMap map = make_tensor_map(Dtype::f32, static_cast<float*>(out), {8, 3}, {1, 8}, {16, 4});
  launch(store_box, dim3(1), dim3(32), 256, nullptr, static_cast<float*>(out), map);
  for (int i = 0; i < 24; ++i) {
    const int r = i / 8 - 1, c = i % 8 - 2;
    const float stored = r >= 0 && c >= 0 ? static_cast<float>(r * 16 + c) : 0.0f;
    expect(out[i] == stored + (r == 0 && c == 0 ? 100.0f : 0.0f), "store of a box");
  }
}

const Cases bulk{
    {"bulk copy", nullptr, [] { on_input(copy_bulk<true, 0>, 32, 128); }},
    {"bulk copy without a wait", "not waited for", [] { on_input(copy_bulk<false, 0>, 32, 128); }},
    {"bulk copy of fewer bytes than announced", "deadlock", [] { on_input(copy_bulk<true, 16>, 32, 128); }},

    {"a box", nullptr, [] { run_copy_box<Load::right>(8, 2); }},
    {"a box at a corner", nullptr, [] { run_copy_box<Load::right>(-3, -1); }},
    {"a box at the other corner", nullptr, [] { run_copy_box<Load::right>(21, 5); }},
    {"a box outside of the tensor", nullptr, [] { run_copy_box<Load::right>(0, -4); }},
    {"no fence after the mbarrier's init", "without a fence_mbar_init",
     [] { run_copy_box<Load::no_init_fence>(0, 0); }},
    {"bytes of a box not announced", "not waited for", [] { run_copy_box<Load::no_expect>(0, 0); }},
    {"a coordinate too many", "as many coordinates", [] { run_copy_box<Load::two_coordinates>(0, 0); }},
    {"a box at a multiple of 64", "a multiple of 128", [] { run_copy_box<Load::misaligned>(0, 0); }},
    {"a box that one warp waits for", "the copy engine|not waited for",
     [] { run_copy_box<Load::one_waits>(0, 0); }},
    {"a box over fresh writes", "without a fence_proxy_async",
     [] { run_copy_box<Load::no_proxy_fence>(0, 0); }},
    {"a map larger than its tensor", "out of bounds", run_box_of_too_large_a_map},
    {"a map of odd stride", "stride 1 must be a multiple of 16 bytes",
     [] { make_map({9, 4}, {1, 9}, {4, 2}, Swizzle::none); }},
    {"a map of a narrow box", "row of the box must be the 128 bytes of its swizzle",
     [] { make_map({64, 4}, {1, 64}, {16, 2}, Swizzle::b128); }},
    {"a map of a large box", "box 1 must be 1 to 256",
     [] { make_map({64, 4}, {1, 64}, {16, 257}, Swizzle::none); }},

    {"bulk store", nullptr, run_store_bulk<Store::right>},
    {"bulk store of fresh writes", "without a fence_proxy_async", run_store_bulk<Store::no_proxy_fence>},
    {"bulk store without a wait", "copy engine reads|still reads", run_store_bulk<Store::no_wait>},
    {"source of a bulk store overwritten", "still reads", run_store_bulk<Store::overwritten>},
    {"result of a bulk store read early", "not waited for", run_store_bulk<Store::read_back>},
    {"store of a box", nullptr, run_store_box},
};

}  // namespace
}  // namespace fastconv::simt
