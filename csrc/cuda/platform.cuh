// SPDX-License-Identifier: MIT
// What kernel sources see of the machine. Two worlds give it: CUDA, and the CPU emulator of the tests
// (FASTCONV_SIMT). Kernel files launch, take shared memory and access vectors only through these names, so
// that the same source runs in both.
//
//   FC_SHARED(float, tile, [16][68]);                     static shared memory, aligned to 16 bytes
//   FC_DYN_SMEM(carve); float* a = carve.take<float>(n)   dynamic shared memory; the host adds up smem_take()
//   ld<float4>(p), st<float4>(p, v)                       one aligned vector access
//   launch(kernel, grid, block, smem, stream, args...)    fails with a sentence where it is refused;
//   launch(kernel, Grid(grid, 2), ...)                    in clusters of two blocks
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/error.h"
#include "core/platform.h"

#if defined(FASTCONV_SIMT)
#include "words.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastconv {

// The blocks of a launch. `cluster` of them, neighbours along x, are a cluster (sm_90; at most 8).
struct Grid {
  dim3 blocks;
  unsigned cluster;

  Grid(dim3 blocks = dim3(), unsigned cluster = 1) : blocks(blocks), cluster(cluster) {}
};

}  // namespace fastconv

#if defined(FASTCONV_SIMT)
#include "simt.h"
#else

#define FC_SHARED(T, name, dims) __shared__ __align__(16) T name dims
#define FC_DYN_SMEM(name)                                              \
  extern __shared__ __align__(1024) unsigned char fastconv_dyn_smem[]; \
  ::fastconv::SmemCarver name { fastconv_dyn_smem }

namespace fastconv {

template <class V>
__device__ __forceinline__ V ld(const void* p) {
  return *static_cast<const V*>(p);
}

template <class V>
__device__ __forceinline__ void st(void* p, const V& value) {
  *static_cast<V*>(p) = value;
}

struct SmemCarver {
  unsigned char* next;

  template <class T>
  __device__ __forceinline__ T* take(int count, int align = 16) {
    const uint64_t address = (reinterpret_cast<uint64_t>(next) + align - 1) & ~uint64_t(align - 1);
    T* piece = reinterpret_cast<T*>(address);
    next = reinterpret_cast<unsigned char*>(piece + count);
    return piece;
  }
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Grid grid, dim3 block, size_t smem, void* stream,
            const Args&... args) {
  constexpr size_t kDefaultSmem = 48 * 1024;  // more must be asked for
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  cudaError_t error = cudaSuccess;
  if (smem > kDefaultSmem)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so nobody else should find it
  fail("cuda: a kernel with grid (", grid.blocks.x, ", ", grid.blocks.y, ", ", grid.blocks.z,
       "), clusters of ", grid.cluster, ", block (", block.x, ", ", block.y, ", ", block.z, ") and ", smem,
       " bytes of shared memory was not launched: ", cudaGetErrorString(error));
}

}  // namespace fastconv
#endif

namespace fastconv {

// The bytes in use after `count` more elements of T are taken behind the first `used`.
template <class T>
constexpr size_t smem_take(size_t used, size_t count, size_t align = 16) {
  return (used + align - 1) / align * align + count * sizeof(T);
}

}  // namespace fastconv
