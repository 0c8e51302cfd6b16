// SPDX-License-Identifier: MIT
// Linear as a GEMM (linear_gemm.cuh) on plain arithmetic units; the loop is tile_gemm.cuh's. Sums in float32
// (float64 for float64). Limits: few rows leave most of a GPU idle. The floor is the FMA rate, or one read of
// the weights. Not yet run on a GPU.
#include "cuda/bias_grad.h"
#include "cuda/linear_gemm.cuh"
#include "cuda/tile_gemm.cuh"

namespace fastconv::cuda {

template <class Tile>
void linear_fprop_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    tile_gemm<Tile>(linear_fprop<std::remove_pointer_t<decltype(t)>>(a), linear_fprop_gemm(a), workspace,
                    stream);
  });
}

template <class Tile>
void linear_dgrad_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    tile_gemm<Tile>(linear_dgrad<std::remove_pointer_t<decltype(t)>>(a), linear_dgrad_gemm(a), workspace,
                    stream);
  });
}

template <class Tile>
void linear_wgrad_tiled(const LinearArgs& a, void* workspace, void* stream) {
  with_dtype(a.dtype, [&](auto* t) {
    tile_gemm<Tile>(linear_wgrad<std::remove_pointer_t<decltype(t)>>(a), linear_wgrad_gemm(a), workspace,
                    stream);
  });
  linear_bias_grad(a, workspace, stream);
}

#define FASTCONV_INSTANTIATE(Tile)                                         \
  template void linear_fprop_tiled<Tile>(const LinearArgs&, void*, void*); \
  template void linear_dgrad_tiled<Tile>(const LinearArgs&, void*, void*); \
  template void linear_wgrad_tiled<Tile>(const LinearArgs&, void*, void*);
FASTCONV_INSTANTIATE(Tile64x64)
FASTCONV_INSTANTIATE(Tile64x16)
#undef FASTCONV_INSTANTIATE

}  // namespace fastconv::cuda
