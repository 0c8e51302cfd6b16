// SPDX-License-Identifier: MIT
// Every PTX instruction that has no CUDA C++ form, one named wrapper each; kernels hold no asm. Each wrapper
// has a twin of the same signature in tests/simt/ptx.h, which is what the tests execute where there is no
// GPU, and a golden test (tests/test_ptx.py), which runs in both worlds.
//
// Wrappers compile for every architecture. Where an instruction is missing, its wrapper is a trap; the least
// level of a kernel's row keeps the kernel from there.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/platform.cuh"

namespace fastconv {

// How the 16-byte chunks of a shared-memory operand are permuted, over rows of 128, 64 or 32 bytes: bits 4
// and up of the address are XORed with as many bits from bit 7 on, 3, 2 or 1 of them.
enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };

constexpr int swizzle_bytes(Swizzle s) { return s == Swizzle::none ? 16 : 256 >> static_cast<int>(s); }

constexpr int kMaxTensorDims = 5;

// A tensor in global memory and the box of it that one copy moves: sizes, strides and box in elements, from
// the innermost dimension outwards.
struct TensorLayout {
  Dtype dtype;
  void* data;
  int dims;
  int64_t sizes[kMaxTensorDims], strides[kMaxTensorDims];
  int box[kMaxTensorDims];
  Swizzle swizzle;
};

// Fails with a sentence if the copy engine cannot do it.
inline void check_tensor_layout(const TensorLayout& t) {
  const int64_t item = dtype_size(t.dtype), row = t.box[0] * item;
  FASTCONV_CHECK(t.strides[0] == 1, "tensor map: the innermost stride must be 1, got ", t.strides[0]);
  FASTCONV_CHECK(reinterpret_cast<uintptr_t>(t.data) % 16 == 0,
                 "tensor map: data must be aligned to 16 bytes, got ", t.data);
  for (int d = 0; d < t.dims; ++d) {
    FASTCONV_CHECK(t.sizes[d] >= 1 && t.sizes[d] <= int64_t(1) << 32, "tensor map: size ", d,
                   " must be 1 to 2^32, got ", t.sizes[d]);
    FASTCONV_CHECK(t.box[d] >= 1 && t.box[d] <= 256, "tensor map: box ", d, " must be 1 to 256, got ",
                   t.box[d]);
    const int64_t bytes = t.strides[d] * item;
    FASTCONV_CHECK(d == 0 || (bytes > 0 && bytes % 16 == 0 && bytes < int64_t(1) << 40),
                   "tensor map: stride ", d, " must be a multiple of 16 bytes below 2^40, got ", bytes);
  }
  if (t.swizzle == Swizzle::none)
    FASTCONV_CHECK(row % 16 == 0, "tensor map: a row of the box must be a multiple of 16 bytes, got ", row);
  else
    FASTCONV_CHECK(row == swizzle_bytes(t.swizzle), "tensor map: a row of the box must be the ",
                   swizzle_bytes(t.swizzle), " bytes of its swizzle, got ", row);
}

}  // namespace fastconv

#if defined(FASTCONV_SIMT)
#include "ptx.h"
#else

#include <cudaTypedefs.h>

#if __CUDA_ARCH__ >= 800
#define FC_SM80(...) asm volatile(__VA_ARGS__)
#else
#define FC_SM80(...) __trap()
#endif
#if __CUDA_ARCH__ >= 900
#define FC_SM90(...) asm volatile(__VA_ARGS__)
#else
#define FC_SM90(...) __trap()
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FC_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define FC_SM90A(...) __trap()
#endif

namespace fastconv {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- cp.async (sm_80): 16 or 4 bytes from global to shared memory; beyond src_bytes it fills with zeros

__device__ __forceinline__ void cp_async16(void* dst, const void* src, int src_bytes) {
  FC_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
          "r"(src_bytes) : "memory");
}
__device__ __forceinline__ void cp_async4(void* dst, const void* src, int src_bytes) {
  FC_SM80("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)), "l"(src),
          "r"(src_bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { FC_SM80("cp.async.commit_group;" :: : "memory"); }
// Waits until at most N of the newest groups are outstanding.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  FC_SM80("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- warp-level matrix instructions (ldmatrix sm_75, others sm_80)

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16][8] += a[16][K] b[K][8], sums in float32.
#define FC_MMA(name, shape, type)                                                                         \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    FC_SM80("mma.sync.aligned." shape ".row.col.f32." type "." type                                       \
            ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]),                    \
            "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0),     \
            "r"(b1));                                                                                     \
  }
FC_MMA(mma_m16n8k16_f16, "m16n8k16", "f16")
FC_MMA(mma_m16n8k16_bf16, "m16n8k16", "bf16")
FC_MMA(mma_m16n8k8_tf32, "m16n8k8", "tf32")
#undef FC_MMA

// Rounds to TF32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r = 0;
  FC_SM80("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// --- barriers of part of a block

// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads: wait there, or only count as arrived.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- mbarrier (sm_90)

__device__ __forceinline__ void mbar_init(uint64_t* bar, int arrivals) {
  FC_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// Makes the inits visible to the copy engine and to the cluster; other threads need a barrier on top.
__device__ __forceinline__ void fence_mbar_init() {
  FC_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
__device__ __forceinline__ void mbar_arrive(uint64_t* bar) {
  FC_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbar_arrive_expect_tx(uint64_t* bar, int bytes) {
  FC_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
          "r"(bytes) : "memory");
}
#define FC_MBAR_WAIT(scope)                     \
  FC_SM90(                                      \
      "{\n"                                     \
      ".reg .pred done;\n"                      \
      "again_%=:\n"                             \
      "mbarrier.try_wait.parity.acquire." scope \
      ".shared::cta.b64 done, [%0], %1;\n"      \
      "@!done bra again_%=;\n"                  \
      "}" ::"r"(shared_address(bar)),           \
      "r"(parity) : "memory")
// Returns once the phase of that parity is complete, and orders what arriving threads of the block did
// before.
__device__ __forceinline__ void mbar_wait(uint64_t* bar, int parity) { FC_MBAR_WAIT("cta"); }
// The same for arriving threads of the whole cluster.
__device__ __forceinline__ void mbar_wait_cluster(uint64_t* bar, int parity) { FC_MBAR_WAIT("cluster"); }
#undef FC_MBAR_WAIT
// Arrives at the mbarrier in the same place of another block's shared memory.
__device__ __forceinline__ void mbar_arrive_remote(uint64_t* bar, int rank) {
  FC_SM90(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(bar)),
      "r"(rank) : "memory");
}

// --- clusters (sm_90)

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
  FC_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size = 1;
  FC_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() { FC_SM90("barrier.cluster.arrive.release;" :: : "memory"); }
__device__ __forceinline__ void cluster_wait() { FC_SM90("barrier.cluster.wait.acquire;" :: : "memory"); }
// All threads of all blocks of the cluster meet. Needed before the first access to another block's shared
// memory, and again between the last one and the end of that block.
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Where `p`, in this block's shared memory, lies in that of the block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* p, int rank) {
  uint64_t address = 0;
  FC_SM90("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// --- bulk copy (sm_90): one thread moves a run of bytes, or a box of a tensor, between global and shared
// memory. `bar` counts the bytes as they land in shared memory. Stores form groups of the issuing thread. Of
// a box, what is outside of the tensor is zero in shared memory, and is not stored.

// Orders this thread's writes to shared memory before later accesses by the copy engine or the tensor cores.
__device__ __forceinline__ void fence_proxy_async() {
  FC_SM90("fence.proxy.async.shared::cta;" :: : "memory");
}
// Addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) {
  FC_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              shared_address(dst)),
          "l"(src), "r"(bytes), "r"(shared_address(bar)) : "memory");
}
// To the same place of every block of the cluster whose bit is set in `blocks`; each one's `bar` counts.
// sm_90a.
__device__ __forceinline__ void bulk_copy_multicast(void* dst, const void* src, int bytes, uint64_t* bar,
                                                    uint16_t blocks) {
  FC_SM90A(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
      "[%3], %4;" ::"r"(shared_address(dst)),
      "l"(src), "r"(bytes), "r"(shared_address(bar)), "h"(blocks) : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, const void* src, int bytes) {
  FC_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)),
          "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { FC_SM90("cp.async.bulk.commit_group;" :: : "memory"); }
// Waits until at most N of the newest groups are outstanding,
template <int N>
__device__ __forceinline__ void bulk_wait() {
  FC_SM90("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// or have shared memory still to read.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  FC_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// What the copy engine knows of a tensor. A kernel takes it as `const __grid_constant__ TensorMap`.
struct TensorMap {
  CUtensorMap encoded;
};

inline TensorMap encode_tensor_map(const TensorLayout& t) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    FASTCONV_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                   "tensor map: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
                                            CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  cuuint64_t sizes[kMaxTensorDims], strides[kMaxTensorDims];
  cuuint32_t box[kMaxTensorDims], steps[kMaxTensorDims];
  for (int d = 0; d < t.dims; ++d) {
    sizes[d] = static_cast<cuuint64_t>(t.sizes[d]);
    if (d) strides[d - 1] = static_cast<cuuint64_t>(t.strides[d] * dtype_size(t.dtype));
    box[d] = static_cast<cuuint32_t>(t.box[d]);
    steps[d] = 1;
  }
  TensorMap map;
  const CUresult result =
      encode(&map.encoded, kTypes[static_cast<int>(t.dtype)], static_cast<cuuint32_t>(t.dims), t.data, sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(t.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FASTCONV_CHECK(result == CUDA_SUCCESS, "tensor map: refused by the CUDA driver with error ", result);
  return map;
}

// `f` with the number of dimensions and the coordinates as text; asm finds these in its first five operands.
#define FC_TENSOR(f)                                 \
  static_assert(1 <= D && D <= kMaxTensorDims);      \
  const int c0 = at[0], c1 = D > 1 ? at[D > 1] : 0;  \
  const int c2 = D > 2 ? at[D > 2 ? 2 : 0] : 0;      \
  const int c3 = D > 3 ? at[D > 3 ? 3 : 0] : 0;      \
  const int c4 = D > 4 ? at[D > 4 ? 4 : 0] : 0;      \
  if constexpr (D == 1) f("1d", "{%0}");             \
  if constexpr (D == 2) f("2d", "{%0, %1}");         \
  if constexpr (D == 3) f("3d", "{%0, %1, %2}");     \
  if constexpr (D == 4) f("4d", "{%0, %1, %2, %3}"); \
  if constexpr (D == 5) f("5d", "{%0, %1, %2, %3, %4}")
#define FC_TENSOR_AT "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)

// The box that begins at `at`, the innermost coordinate first, which may lie outside of the tensor. `dst` is
// a multiple of 128 bytes. `bar` counts all bytes of the box.
template <int D>
__device__ __forceinline__ void tensor_copy(void* dst, const TensorMap& map, const int (&at)[D],
                                            uint64_t* bar) {
#define FC_COPY(dims, coordinates)                                                       \
  FC_SM90("cp.async.bulk.tensor." dims                                                   \
          ".shared::cluster.global.mbarrier::complete_tx::bytes [%6], [%5, " coordinates \
          "], [%7];" ::FC_TENSOR_AT,                                                     \
          "l"(&map), "r"(shared_address(dst)), "r"(shared_address(bar)) : "memory")
  FC_TENSOR(FC_COPY);
#undef FC_COPY
}
template <int D>
__device__ __forceinline__ void tensor_copy_multicast(void* dst, const TensorMap& map, const int (&at)[D],
                                                      uint64_t* bar, uint16_t blocks) {
#define FC_COPY(dims, coordinates)                                                          \
  FC_SM90A("cp.async.bulk.tensor." dims                                                     \
           ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%6], " \
           "[%5, " coordinates "], [%7], %8;" ::FC_TENSOR_AT,                               \
           "l"(&map), "r"(shared_address(dst)), "r"(shared_address(bar)), "h"(blocks) : "memory")
  FC_TENSOR(FC_COPY);
#undef FC_COPY
}
template <int D>
__device__ __forceinline__ void tensor_store(const TensorMap& map, const int (&at)[D], const void* src) {
#define FC_COPY(dims, coordinates)                                                        \
  FC_SM90("cp.async.bulk.tensor." dims ".global.shared::cta.bulk_group [%5, " coordinates \
          "], [%6];" ::FC_TENSOR_AT,                                                      \
          "l"(&map), "r"(shared_address(src)) : "memory")
  FC_TENSOR(FC_COPY);
#undef FC_COPY
}
#undef FC_TENSOR
#undef FC_TENSOR_AT

// --- warpgroups (sm_90a)

// Sets the registers of each thread of a warpgroup, a multiple of 8 from 24 to 256. What _dec gives back is
// what _inc can get, and waits for. The kernel needs __launch_bounds__.
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  FC_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  FC_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Where a K-major operand lies in shared memory: its core matrices are 8 rows of 16 bytes. `stride`: bytes
// from one 8 rows to the next. `leading`: bytes from one 16-byte column to the next; swizzled operands have
// none, their rows are as long as the swizzle and their 8 rows dense.
__device__ __forceinline__ uint64_t wgmma_operand(const void* p, int leading, int stride, Swizzle swizzle) {
  return static_cast<uint64_t>((shared_address(p) & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}
// Before the first wgmma, and after other code has touched accumulators.
__device__ __forceinline__ void wgmma_fence() { FC_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ __forceinline__ void wgmma_commit() { FC_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  FC_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d[64][N] = a[64][K] b[N][K]^T, added to d where `add`. K is 16, with TF32 8; N is 8, 16, 32, 64 or 128, as
// many as d has elements, twice. Element e of a thread is in row t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8 and
// column e / 4 * 8 + t % 4 * 2 + e % 2.
#define FC_WGMMA(name, n, shape, types, transposed, registers, constraints, a_, b_, add_)                    \
  __device__ __forceinline__ void name(float (&d)[n / 2], uint64_t a, uint64_t b, bool add) {                \
    FC_SM90A("{\n.reg .pred add;\nsetp.ne.b32 add, " add_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n shape \
             ".f32." types " {" registers "}, " a_ ", " b_ ", add, 1, 1" transposed                          \
             ";\n}" : constraints : "l"(a),                                                                  \
             "l"(b), "r"(static_cast<int>(add)));                                                            \
  }
#define FC_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FC_F8(i) FC_F4(i), FC_F4(i + 4)
#define FC_F16(i) FC_F8(i), FC_F8(i + 8)
#define FC_F32(i) FC_F16(i), FC_F16(i + 16)
#define FC_F64(i) FC_F32(i), FC_F32(i + 32)
#define FC_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define FC_R4 "%0,%1,%2,%3"
#define FC_R8 FC_R4 ",%4,%5,%6,%7"
#define FC_R16 FC_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FC_R32 FC_R8 ",%8,%9," FC_TEN(1) "," FC_TEN(2) ",%30,%31"
#define FC_R64 \
  FC_R8 ",%8,%9," FC_TEN(1) "," FC_TEN(2) "," FC_TEN(3) "," FC_TEN(4) "," FC_TEN(5) ",%60,%61,%62,%63"
#define FC_WGMMA_ALL(name, ...)                                           \
  FC_WGMMA(name, 8, __VA_ARGS__, FC_R4, FC_F4(0), "%4", "%5", "%6")       \
  FC_WGMMA(name, 16, __VA_ARGS__, FC_R8, FC_F8(0), "%8", "%9", "%10")     \
  FC_WGMMA(name, 32, __VA_ARGS__, FC_R16, FC_F16(0), "%16", "%17", "%18") \
  FC_WGMMA(name, 64, __VA_ARGS__, FC_R32, FC_F32(0), "%32", "%33", "%34") \
  FC_WGMMA(name, 128, __VA_ARGS__, FC_R64, FC_F64(0), "%64", "%65", "%66")
FC_WGMMA_ALL(wgmma_f16, "k16", "f16.f16", ", 0, 0")
FC_WGMMA_ALL(wgmma_bf16, "k16", "bf16.bf16", ", 0, 0")
FC_WGMMA_ALL(wgmma_tf32, "k8", "tf32.tf32", "")

#undef FC_WGMMA
#undef FC_WGMMA_ALL
#undef FC_F4
#undef FC_F8
#undef FC_F16
#undef FC_F32
#undef FC_F64
#undef FC_TEN
#undef FC_R4
#undef FC_R8
#undef FC_R16
#undef FC_R32
#undef FC_R64
#undef FC_SM80
#undef FC_SM90
#undef FC_SM90A

}  // namespace fastconv
#endif

namespace fastconv {

// The map of a tensor, for copies of boxes of it: sizes, strides and box in elements, the innermost
// dimension, of stride 1, first. Swizzled boxes have rows of as many bytes as the swizzle.
template <int D>
TensorMap make_tensor_map(Dtype dtype, const void* data, const int64_t (&sizes)[D],
                          const int64_t (&strides)[D], const int (&box)[D], Swizzle swizzle = Swizzle::none) {
  static_assert(D <= kMaxTensorDims);
  TensorLayout layout{dtype, const_cast<void*>(data), D, {}, {}, {}, swizzle};
  for (int d = 0; d < D; ++d)
    layout.sizes[d] = sizes[d], layout.strides[d] = strides[d], layout.box[d] = box[d];
  check_tensor_layout(layout);
  return encode_tensor_map(layout);
}

}  // namespace fastconv
