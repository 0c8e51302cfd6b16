// SPDX-License-Identifier: MIT
// Linear as a GEMM (linear_gemm.cuh) on tensor cores, for float32, in full or in TF32, float16 and bfloat16;
// the loop is mma_gemm.cuh's. Sums in float32. Matrices with rows or columns in multiples of 16 bytes come as
// runs of 16 bytes, transposed or not; others element by element.
//
// Floor of 1024 x 4096 by 4096: 34 GFLOP, 35 us on an H200. Predicted: 100 us, since mma.sync reaches half of
// wgmma. Limits: few rows leave most of a tile idle; results are stored one by one. Next: stores in runs,
// wgmma. Not yet run on a GPU.
#include "cuda/bias_grad.h"
#include "cuda/linear_gemm.cuh"
#include "cuda/mma_gemm.cuh"

namespace fastconv::cuda {

template <class Tile>
void linear_fprop_mma(const LinearArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    mma_gemm<Tile>(linear_fprop<std::remove_pointer_t<decltype(t)>>(a), linear_fprop_gemm(a), workspace,
                   stream);
  });
}

template <class Tile>
void linear_dgrad_mma(const LinearArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    mma_gemm<Tile>(linear_dgrad<std::remove_pointer_t<decltype(t)>>(a), linear_dgrad_gemm(a), workspace,
                   stream);
  });
}

template <class Tile>
void linear_wgrad_mma(const LinearArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    mma_gemm<Tile>(linear_wgrad<std::remove_pointer_t<decltype(t)>>(a), linear_wgrad_gemm(a), workspace,
                   stream);
  });
  linear_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                       \
  template void linear_fprop_mma<Tile>(const LinearArgs&, void*, void*); \
  template void linear_dgrad_mma<Tile>(const LinearArgs&, void*, void*); \
  template void linear_wgrad_mma<Tile>(const LinearArgs&, void*, void*);
FASTCONV_INSTANTIATE(MmaTile128x128)
FASTCONV_INSTANTIATE(MmaTile128x64)
FASTCONV_INSTANTIATE(MmaTile64x64)
FASTCONV_INSTANTIATE(MmaTile128x32)
FASTCONV_INSTANTIATE(MmaTile128x128_tf32)
FASTCONV_INSTANTIATE(MmaTile128x64_tf32)
FASTCONV_INSTANTIATE(MmaTile64x64_tf32)
FASTCONV_INSTANTIATE(MmaTile128x32_tf32)
#undef FASTCONV_INSTANTIATE

}  // namespace fastconv::cuda
