// SPDX-License-Identifier: MIT
// The twins of the wrappers in csrc/cuda/ptx.cuh: same names, same signatures (a Site may follow), same
// effect as far as the PTX manual promises it, as late as it allows. Defined in async.cpp, barrier.cpp and
// tensor_core.cpp.
#pragma once

#include "simt.h"

namespace fastconv {

enum class Swizzle : int;

// --- cp.async (async.cpp): nothing moves before the issuing thread waits

void cp_async16(void* dst, const void* src, int src_bytes);
void cp_async4(void* dst, const void* src, int src_bytes);
void cp_async_commit();
void cp_async_wait_groups(int newest);
template <int N>
inline void cp_async_wait() {
  cp_async_wait_groups(N);
}

// --- warp-level matrix instructions (tensor_core.cpp): sums in float32, k in order

void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here());
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      simt::Site site = simt::Site::here());
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       simt::Site site = simt::Site::here());
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      simt::Site site = simt::Site::here());
uint32_t to_tf32(float x);

// --- barriers of part of a block, mbarriers (barrier.cpp)

void bar_sync(int id, int count, simt::Site site = simt::Site::here());
void bar_arrive(int id, int count, simt::Site site = simt::Site::here());
void mbar_init(uint64_t* bar, int arrivals);
inline void fence_mbar_init() {}
void mbar_arrive(uint64_t* bar);
void mbar_arrive_expect_tx(uint64_t* bar, int bytes);
void mbar_wait(uint64_t* bar, int parity, simt::Site site = simt::Site::here());

// --- bulk copy (async.cpp): done when nobody can run

void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar);
void fence_proxy_async();

// --- warpgroup matrix instructions (tensor_core.cpp): operands are read, and sums appear, at the wait

uint64_t wgmma_operand(const void* p, int leading, int stride, Swizzle swizzle);
void wgmma_fence(simt::Site site = simt::Site::here());
void wgmma_commit(simt::Site site = simt::Site::here());
void wgmma_wait_groups(int newest, simt::Site site);
template <int N>
inline void wgmma_wait(simt::Site site = simt::Site::here()) {
  wgmma_wait_groups(N, site);
}
void wgmma_m64n16k16_bf16(float (&d)[8], uint64_t a, uint64_t b, simt::Site site = simt::Site::here());

}  // namespace fastconv
