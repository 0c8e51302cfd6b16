// SPDX-License-Identifier: MIT
// Convolution as implicit GEMM (conv_gemm.cuh) on tensor cores, for float32, in full or in TF32, float16 and
// bfloat16; the loop is mma_gemm.cuh's. Sums in float32. channels_last with channels in multiples of 16
// bytes, and 1x1 in either layout, come as runs of 16 bytes; all else element by element.
//
// Floor of 32 x 64 x 56 x 56, 64 filters of 3x3: 7.4 GFLOP and 26 MB, 8 us on an H200. Predicted: 36 us,
// mostly for 173 MB from L2, since nine taps read each pixel again, and mma.sync reaches half of wgmma.
// Limits: what N lacks of the tile's width is wasted (grouped, depthwise); a strided dgrad is a launch for
// each phase; zeros that pad meet the filter, so an infinite weight gives NaN there; results are stored one
// by one. Next: reads through L1, stores in runs, wgmma. Not yet run on a GPU.
#include "cuda/bias_grad.h"
#include "cuda/conv_gemm.cuh"
#include "cuda/mma_gemm.cuh"

namespace fastconv::cuda {

template <class Tile>
void conv_fprop_igemm_mma(const ConvArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    mma_gemm<Tile>(Fprop<std::remove_pointer_t<decltype(t)>>(a), conv_fprop_gemm(a), workspace, stream);
  });
}

template <class Tile>
void conv_dgrad_igemm_mma(const ConvArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    each_dgrad_phase(a, [&](const ConvArgs& p) {
      mma_gemm<Tile>(Dgrad<std::remove_pointer_t<decltype(t)>>(p), conv_dgrad_gemm(p), workspace, stream);
    });
  });
}

template <class Tile>
void conv_wgrad_igemm_mma(const ConvArgs& a, void* workspace, void* stream) {
  with_mma_dtype<Tile>(a.dtype, [&](auto* t) {
    mma_gemm<Tile>(Wgrad<std::remove_pointer_t<decltype(t)>>(a), conv_wgrad_gemm(a), workspace, stream);
  });
  conv_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                         \
  template void conv_fprop_igemm_mma<Tile>(const ConvArgs&, void*, void*); \
  template void conv_dgrad_igemm_mma<Tile>(const ConvArgs&, void*, void*); \
  template void conv_wgrad_igemm_mma<Tile>(const ConvArgs&, void*, void*);
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
