// SPDX-License-Identifier: MIT
// The twins of the wrappers in csrc/cuda/ptx.cuh: same names, same signatures (a Site may follow), same
// effect as far as the PTX manual promises it, as late as it allows. Templates are inlined: the functions
// behind them see the kernel as their caller. Included by ptx.cuh only.
#pragma once

#include "simt.h"

namespace fastconv {

// --- cp.async (cp_async.cpp): nothing moves before the issuing thread waits

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
void fence_mbar_init();
void mbar_arrive(uint64_t* bar);
void mbar_arrive_expect_tx(uint64_t* bar, int bytes);
void mbar_wait(uint64_t* bar, int parity, simt::Site site = simt::Site::here());
void mbar_wait_cluster(uint64_t* bar, int parity, simt::Site site = simt::Site::here());
void mbar_arrive_remote(uint64_t* bar, int rank);

// --- clusters (cluster.cpp)

int cluster_rank();
int cluster_size();
void cluster_arrive(simt::Site site = simt::Site::here());
void cluster_wait(simt::Site site = simt::Site::here());
inline void cluster_sync(simt::Site site = simt::Site::here()) {
  cluster_arrive(site);
  cluster_wait(site);
}
void* cluster_address(const void* p, int rank);
template <class T>
inline T* cluster_shared(T* p, int rank) {
  return static_cast<T*>(cluster_address(p, rank));
}

// --- bulk copy (bulk.cpp): copies are done when nobody can run, stores when they are waited for

void fence_proxy_async();
void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar);
void bulk_copy_multicast(void* dst, const void* src, int bytes, uint64_t* bar, uint16_t blocks);
void bulk_store(void* dst, const void* src, int bytes);
void bulk_commit();
void bulk_wait_groups(int newest);
void bulk_wait_groups_read(int newest);
template <int N>
inline void bulk_wait() {
  bulk_wait_groups(N);
}
template <int N>
inline void bulk_wait_read() {
  bulk_wait_groups_read(N);
}

struct TensorMap {
  TensorLayout layout;
};
inline TensorMap encode_tensor_map(const TensorLayout& layout) { return {layout}; }

void copy_box(void* dst, const TensorMap& map, const int* at, int dims, uint64_t* bar);
void copy_box_multicast(void* dst, const TensorMap& map, const int* at, int dims, uint64_t* bar,
                        uint16_t blocks);
void store_box(const TensorMap& map, const int* at, int dims, const void* src);
template <int D>
inline void tensor_copy(void* dst, const TensorMap& map, const int (&at)[D], uint64_t* bar) {
  copy_box(dst, map, at, D, bar);
}
template <int D>
inline void tensor_copy_multicast(void* dst, const TensorMap& map, const int (&at)[D], uint64_t* bar,
                                  uint16_t blocks) {
  copy_box_multicast(dst, map, at, D, bar, blocks);
}
template <int D>
inline void tensor_store(const TensorMap& map, const int (&at)[D], const void* src) {
  store_box(map, at, D, src);
}

// --- warpgroups (warpgroup.cpp): operands of wgmma are read, and sums appear, at the wait

void set_registers(int count, bool more, simt::Site site);
template <int N>
inline void setmaxnreg_dec(simt::Site site = simt::Site::here()) {
  set_registers(N, false, site);
}
template <int N>
inline void setmaxnreg_inc(simt::Site site = simt::Site::here()) {
  set_registers(N, true, site);
}

uint64_t wgmma_operand(const void* p, int leading, int stride, Swizzle swizzle);
void wgmma_fence(simt::Site site = simt::Site::here());
void wgmma_commit(simt::Site site = simt::Site::here());
void wgmma_wait_groups(int newest, simt::Site site);
template <int N>
inline void wgmma_wait(simt::Site site = simt::Site::here()) {
  wgmma_wait_groups(N, site);
}

enum class WgmmaType { f16, bf16, tf32 };
void issue_wgmma(WgmmaType type, float* d, int count, uint64_t a, uint64_t b, bool add, simt::Site site);
template <int Count>
constexpr bool is_wgmma_count = Count >= 4 && Count <= 64 && (Count & (Count - 1)) == 0;
#define SIMT_WGMMA(name, type)                                                                             \
  template <int Count>                                                                                     \
  inline std::enable_if_t<is_wgmma_count<Count>> name(float (&d)[Count], uint64_t a, uint64_t b, bool add, \
                                                      simt::Site site = simt::Site::here()) {              \
    issue_wgmma(type, d, Count, a, b, add, site);                                                          \
  }
SIMT_WGMMA(wgmma_f16, WgmmaType::f16)
SIMT_WGMMA(wgmma_bf16, WgmmaType::bf16)
SIMT_WGMMA(wgmma_tf32, WgmmaType::tf32)
#undef SIMT_WGMMA

}  // namespace fastconv
