// SPDX-License-Identifier: MIT
// Convolution as implicit GEMM (conv_gemm.cuh) on plain arithmetic units; the loop is tile_gemm.cuh's.
// Sums in float32 (float64 for float64).
// Limits: what N lacks of the tile's width is wasted (grouped, depthwise); a strided dgrad is a launch for
// each phase; zeros that pad meet the filter, so an infinite weight gives NaN there. The floor is the FMA
// rate.
// Not yet run on a GPU.
#include "cuda/bias_grad.h"
#include "cuda/conv_gemm.cuh"
#include "cuda/tile_gemm.cuh"

namespace fastconv::cuda {

template <class Tile>
void conv_fprop_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    tile_gemm<Tile>(Fprop<std::remove_pointer_t<decltype(t)>>(a), conv_fprop_gemm(a), workspace, stream);
  });
}

template <class Tile>
void conv_dgrad_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    each_dgrad_phase(a, [&](const ConvArgs& p) {
      tile_gemm<Tile>(Dgrad<std::remove_pointer_t<decltype(t)>>(p), conv_dgrad_gemm(p), workspace, stream);
    });
  });
}

template <class Tile>
void conv_wgrad_igemm_tiled(const ConvArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    tile_gemm<Tile>(Wgrad<std::remove_pointer_t<decltype(t)>>(a), conv_wgrad_gemm(a), workspace, stream);
  });
  conv_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                           \
  template void conv_fprop_igemm_tiled<Tile>(const ConvArgs&, void*, void*); \
  template void conv_dgrad_igemm_tiled<Tile>(const ConvArgs&, void*, void*); \
  template void conv_wgrad_igemm_tiled<Tile>(const ConvArgs&, void*, void*);
FASTCONV_INSTANTIATE(Tile64x64)
FASTCONV_INSTANTIATE(Tile64x16)
#undef FASTCONV_INSTANTIATE

}  // namespace fastconv::cuda
