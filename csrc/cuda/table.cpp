// SPDX-License-Identifier: MIT
// The CUDA kernel tables. A kernel is a file beside this one; here it gets a row, and above its table a
// declaration. Every build holds the rows, so that a choice can be explained anywhere; only a build with CUDA
// can launch them. What rows reject, cost and need stands in costs.h.
#include "core/table.h"

#include "core/composed.h"
#include "cuda/costs.h"

#if FASTCONV_WITH_CUDA
#define LAUNCH(...) __VA_ARGS__
#else
#define LAUNCH(...) nullptr
#endif

namespace fastconv {

using namespace cuda;

// Declares a kernel: plain, or for each Tile.
#define KERNEL(Args, name)                               \
  namespace cuda {                                       \
  void name(const Args&, void* workspace, void* stream); \
  }
#define TILED_KERNEL(Args, name)                         \
  namespace cuda {                                       \
  template <class Tile>                                  \
  void name(const Args&, void* workspace, void* stream); \
  }
#define TILED_ROW_OF(tile, file, name, gemm, cost, workspace) \
  {"cuda/" #name "_" #tile,                                   \
   file,                                                      \
   kAll,                                                      \
   kAny,                                                      \
   kOldest,                                                   \
   tiled_reject<cuda::Tile##tile, cuda::gemm>,                \
   cost<cuda::Tile##tile, cuda::gemm>,                        \
   workspace<cuda::Tile##tile, cuda::gemm>,                   \
   LAUNCH(cuda::name<cuda::Tile##tile>)}
#define SKINNY_ROW(tile)                            \
  {"cuda/linear_fprop_skinny_" #tile,               \
   "cuda/linear_skinny.cu",                         \
   kAll,                                            \
   kAny,                                            \
   kOldest,                                         \
   linear_fprop_skinny_reject<cuda::DotTile##tile>, \
   linear_fprop_skinny_cost<cuda::DotTile##tile>,   \
   no_workspace<LinearArgs>,                        \
   LAUNCH(cuda::linear_fprop_skinny<cuda::DotTile##tile>)}
#define TILED_ROWS(...) TILED_ROW_OF(64x64, __VA_ARGS__), TILED_ROW_OF(64x16, __VA_ARGS__)
#define MMA_ROW_OF(tile, file, name, operation, cost, workspace)                      \
  {"cuda/" #name "_" #tile,                                                           \
   file,                                                                              \
   mma_dtypes<cuda::MmaTile##tile>,                                                   \
   kAny,                                                                              \
   kAmpere,                                                                           \
   mma_reject<cuda::MmaTile##tile, cuda::operation##_gemm, cuda::operation##_access>, \
   cost<cuda::MmaTile##tile, cuda::operation##_gemm, cuda::operation##_access>,       \
   workspace<cuda::MmaTile##tile, cuda::operation##_gemm>,                            \
   LAUNCH(cuda::name<cuda::MmaTile##tile>)}
#define MMA_ROWS(...)                                                                                \
  MMA_ROW_OF(128x128, __VA_ARGS__), MMA_ROW_OF(128x64, __VA_ARGS__), MMA_ROW_OF(64x64, __VA_ARGS__), \
      MMA_ROW_OF(128x32, __VA_ARGS__), MMA_ROW_OF(128x128_tf32, __VA_ARGS__),                        \
      MMA_ROW_OF(128x64_tf32, __VA_ARGS__), MMA_ROW_OF(64x64_tf32, __VA_ARGS__),                     \
      MMA_ROW_OF(128x32_tf32, __VA_ARGS__)

TILED_KERNEL(ConvArgs, conv_fprop_igemm_tiled)
TILED_KERNEL(ConvArgs, conv_fprop_igemm_mma)
KERNEL(ConvArgs, conv_fprop_direct)
KERNEL(ConvArgs, conv_fprop_naive)
KERNEL(ConvArgs, conv_fprop_depthwise)
constexpr Row<ConvArgs> kConvFprop[] = {
    {"cuda/conv_fprop_depthwise", "cuda/conv_depthwise.cu", kAll, kAny, kOldest, conv_fprop_depthwise_reject,
     conv_fprop_depthwise_cost, no_workspace<ConvArgs>, LAUNCH(cuda::conv_fprop_depthwise)},
    {"cuda/conv_fprop_direct", "cuda/conv_direct.cu", kUpToFloat, kAny, kOldest, conv_fprop_direct_reject,
     conv_fprop_direct_cost, no_workspace<ConvArgs>, LAUNCH(cuda::conv_fprop_direct)},
    MMA_ROWS("cuda/conv_igemm_mma.cu", conv_fprop_igemm_mma, conv_fprop, mma_cost, tiled_workspace),
    TILED_ROWS("cuda/conv_igemm_tiled.cu", conv_fprop_igemm_tiled, conv_fprop_gemm, tiled_cost,
               tiled_workspace),
    {"cuda/conv_fprop_naive", "cuda/conv_naive.cu", kAll, kAny, kOldest, does_not_pool, conv_fprop_naive_cost,
     no_workspace<ConvArgs>, LAUNCH(cuda::conv_fprop_naive)},
};

TILED_KERNEL(ConvArgs, conv_dgrad_igemm_tiled)
TILED_KERNEL(ConvArgs, conv_dgrad_igemm_mma)
KERNEL(ConvArgs, conv_dgrad_direct)
KERNEL(ConvArgs, conv_dgrad_naive)
KERNEL(ConvArgs, conv_dgrad_depthwise)
constexpr Row<ConvArgs> kConvDgrad[] = {
    {"cuda/conv_dgrad_depthwise", "cuda/conv_depthwise.cu", kAll, kAny, kOldest, conv_dgrad_depthwise_reject,
     conv_dgrad_depthwise_cost, no_workspace<ConvArgs>, LAUNCH(cuda::conv_dgrad_depthwise)},
    {"cuda/conv_dgrad_direct", "cuda/conv_direct.cu", kUpToFloat, kAny, kOldest, conv_dgrad_direct_reject,
     conv_dgrad_direct_cost, no_workspace<ConvArgs>, LAUNCH(cuda::conv_dgrad_direct)},
    MMA_ROWS("cuda/conv_igemm_mma.cu", conv_dgrad_igemm_mma, conv_dgrad, mma_dgrad_cost,
             tiled_dgrad_workspace),
    TILED_ROWS("cuda/conv_igemm_tiled.cu", conv_dgrad_igemm_tiled, conv_dgrad_gemm, tiled_dgrad_cost,
               tiled_dgrad_workspace),
    {"cuda/conv_dgrad_naive", "cuda/conv_naive.cu", kAll, kAny, kOldest, accept<ConvArgs>,
     conv_dgrad_naive_cost, no_workspace<ConvArgs>, LAUNCH(cuda::conv_dgrad_naive)},
};

TILED_KERNEL(ConvArgs, conv_wgrad_igemm_tiled)
TILED_KERNEL(ConvArgs, conv_wgrad_igemm_mma)
KERNEL(ConvArgs, conv_wgrad_direct)
KERNEL(ConvArgs, conv_wgrad_naive)
KERNEL(ConvArgs, conv_wgrad_depthwise)
constexpr Row<ConvArgs> kConvWgrad[] = {
    {"cuda/conv_wgrad_depthwise", "cuda/conv_depthwise_wgrad.cu", kAll, kAny, kOldest, depthwise_reject,
     conv_wgrad_depthwise_cost, conv_wgrad_depthwise_workspace, LAUNCH(cuda::conv_wgrad_depthwise)},
    {"cuda/conv_wgrad_direct", "cuda/conv_direct_backward.cu", kUpToFloat, kAny, kOldest,
     conv_wgrad_direct_reject, conv_wgrad_direct_cost, conv_wgrad_direct_workspace,
     LAUNCH(cuda::conv_wgrad_direct)},
    MMA_ROWS("cuda/conv_igemm_mma.cu", conv_wgrad_igemm_mma, conv_wgrad, mma_wgrad_cost,
             tiled_wgrad_workspace),
    TILED_ROWS("cuda/conv_igemm_tiled.cu", conv_wgrad_igemm_tiled, conv_wgrad_gemm, tiled_wgrad_cost,
               tiled_wgrad_workspace),
    {"cuda/conv_wgrad_naive", "cuda/conv_naive.cu", kAll, kAny, kOldest, accept<ConvArgs>,
     conv_wgrad_naive_cost, bias_workspace, LAUNCH(cuda::conv_wgrad_naive)},
};

KERNEL(ConvArgs, conv_act_pool_direct)
constexpr Row<ConvArgs> kConvActPool[] = {
    {"cuda/conv_act_pool_direct", "cuda/conv_direct.cu", kUpToFloat, kAny, kOldest,
     conv_act_pool_direct_reject, conv_fprop_direct_cost, no_workspace<ConvArgs>,
     LAUNCH(cuda::conv_act_pool_direct)},
    {"cuda/conv_act_pool_composed", "core/composed.cpp", kAll, kAny, kOldest, accept<ConvArgs>,
     composed::conv_act_pool_cost, composed::conv_act_pool_workspace, LAUNCH(composed::conv_act_pool)},
};

KERNEL(ConvActPoolBackwardArgs, conv_act_pool_backward_direct)
constexpr Row<ConvActPoolBackwardArgs> kConvActPoolBackward[] = {
    {"cuda/conv_act_pool_backward_direct", "cuda/conv_direct_backward.cu", kUpToFloat, kAny, kOldest,
     conv_act_pool_backward_direct_reject, conv_act_pool_backward_direct_cost,
     conv_act_pool_backward_direct_workspace, LAUNCH(cuda::conv_act_pool_backward_direct)},
    {"cuda/conv_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kOldest,
     accept<ConvActPoolBackwardArgs>, composed::conv_act_pool_backward_cost,
     composed::conv_act_pool_backward_workspace, LAUNCH(composed::conv_act_pool_backward)},
};

KERNEL(PoolArgs, max_pool_naive)
KERNEL(PoolArgs, max_pool_runs)
KERNEL(PoolArgs, max_pool_pixels)
constexpr Row<PoolArgs> kMaxPool[] = {
    {"cuda/max_pool_runs", "cuda/max_pool_runs.cu", kAll, kAny, kOldest, pool_runs_reject<false>,
     pool_runs_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_runs)},
    {"cuda/max_pool_pixels", "cuda/max_pool_pixels.cu", kAll, kAny, kOldest, pool_pixels_reject<false>,
     pool_pixels_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_pixels)},
    {"cuda/max_pool_naive", "cuda/max_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_naive)},
};

KERNEL(PoolArgs, max_pool_backward_naive)
KERNEL(PoolArgs, max_pool_backward_runs)
KERNEL(PoolArgs, max_pool_backward_pixels)
constexpr Row<PoolArgs> kMaxPoolBackward[] = {
    {"cuda/max_pool_backward_runs", "cuda/max_pool_runs.cu", kAll, kAny, kOldest, pool_runs_reject<true>,
     pool_runs_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_backward_runs)},
    {"cuda/max_pool_backward_pixels", "cuda/max_pool_pixels.cu", kAll, kAny, kOldest,
     pool_pixels_reject<true>, pool_pixels_cost, no_workspace<PoolArgs>,
     LAUNCH(cuda::max_pool_backward_pixels)},
    {"cuda/max_pool_backward_naive", "cuda/max_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_backward_naive)},
};

KERNEL(PoolArgs, max_pool_gather_naive)
constexpr Row<PoolArgs> kMaxPoolGather[] = {
    {"cuda/max_pool_gather_naive", "cuda/max_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_gather_naive)},
};

KERNEL(PoolArgs, max_pool_indices_naive)
constexpr Row<PoolArgs> kMaxPoolIndices[] = {
    {"cuda/max_pool_indices_naive", "cuda/max_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, LAUNCH(cuda::max_pool_indices_naive)},
};

KERNEL(PoolArgs, avg_pool_naive)
KERNEL(PoolArgs, avg_pool_runs)
KERNEL(PoolArgs, avg_pool_pixels)
constexpr Row<PoolArgs> kAvgPool[] = {
    {"cuda/avg_pool_runs", "cuda/avg_pool_runs.cu", kAll, kAny, kOldest, pool_runs_reject<false>,
     pool_runs_cost, no_workspace<PoolArgs>, LAUNCH(cuda::avg_pool_runs)},
    {"cuda/avg_pool_pixels", "cuda/avg_pool_pixels.cu", kAll, kAny, kOldest, pool_pixels_reject<false>,
     pool_pixels_cost, no_workspace<PoolArgs>, LAUNCH(cuda::avg_pool_pixels)},
    {"cuda/avg_pool_naive", "cuda/avg_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, LAUNCH(cuda::avg_pool_naive)},
};

KERNEL(PoolArgs, avg_pool_backward_naive)
KERNEL(PoolArgs, avg_pool_backward_runs)
KERNEL(PoolArgs, avg_pool_backward_pixels)
constexpr Row<PoolArgs> kAvgPoolBackward[] = {
    {"cuda/avg_pool_backward_runs", "cuda/avg_pool_runs.cu", kAll, kAny, kOldest, pool_runs_reject<true>,
     pool_runs_cost, no_workspace<PoolArgs>, LAUNCH(cuda::avg_pool_backward_runs)},
    {"cuda/avg_pool_backward_pixels", "cuda/avg_pool_pixels.cu", kAll, kAny, kOldest,
     pool_pixels_reject<true>, pool_pixels_cost, no_workspace<PoolArgs>,
     LAUNCH(cuda::avg_pool_backward_pixels)},
    {"cuda/avg_pool_backward_naive", "cuda/avg_pool_naive.cu", kAll, kAny, kOldest, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, LAUNCH(cuda::avg_pool_backward_naive)},
};

KERNEL(NormArgs, norm_act_pool_naive)
KERNEL(NormArgs, norm_act_pool_slices)
constexpr Row<NormArgs> kNormActPool[] = {
    {"cuda/norm_act_pool_slices", "cuda/norm_slices.cu", kAll, kAny, kOldest, norm_slices_reject,
     norm_slices_cost, norm_slices_workspace, LAUNCH(cuda::norm_act_pool_slices)},
    {"cuda/norm_act_pool_naive", "cuda/norm_naive.cu", kAll, kAny, kOldest, norm_naive_reject,
     norm_naive_cost, no_workspace<NormArgs>, LAUNCH(cuda::norm_act_pool_naive)},
    {"cuda/norm_act_pool_composed", "core/composed.cpp", kAll, kAny, kOldest, composed::norm_act_pool_reject,
     composed::norm_act_pool_cost, composed::norm_act_pool_workspace, LAUNCH(composed::norm_act_pool)},
};

KERNEL(NormBackwardArgs, norm_act_pool_backward_naive)
KERNEL(NormBackwardArgs, norm_act_pool_backward_slices)
constexpr Row<NormBackwardArgs> kNormActPoolBackward[] = {
    {"cuda/norm_act_pool_backward_slices", "cuda/norm_slices.cu", kAll, kAny, kOldest,
     norm_backward_slices_reject, norm_backward_slices_cost, norm_backward_slices_workspace,
     LAUNCH(cuda::norm_act_pool_backward_slices)},
    {"cuda/norm_act_pool_backward_naive", "cuda/norm_naive.cu", kAll, kAny, kOldest,
     norm_backward_naive_reject, norm_backward_naive_cost, no_workspace<NormBackwardArgs>,
     LAUNCH(cuda::norm_act_pool_backward_naive)},
    {"cuda/norm_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kOldest,
     composed::norm_act_pool_backward_reject, composed::norm_act_pool_backward_cost,
     composed::norm_act_pool_backward_workspace, LAUNCH(composed::norm_act_pool_backward)},
};

TILED_KERNEL(LinearArgs, linear_fprop_skinny)
TILED_KERNEL(LinearArgs, linear_fprop_tiled)
TILED_KERNEL(LinearArgs, linear_fprop_mma)
KERNEL(LinearArgs, linear_fprop_naive)
constexpr Row<LinearArgs> kLinearFprop[] = {
    SKINNY_ROW(1x4),
    SKINNY_ROW(8x4),
    MMA_ROWS("cuda/linear_mma.cu", linear_fprop_mma, linear_fprop, mma_cost, tiled_workspace),
    TILED_ROWS("cuda/linear_tiled.cu", linear_fprop_tiled, linear_fprop_gemm, tiled_cost, tiled_workspace),
    {"cuda/linear_fprop_naive", "cuda/linear_naive.cu", kAll, kAny, kOldest, accept<LinearArgs>,
     linear_fprop_naive_cost, no_workspace<LinearArgs>, LAUNCH(cuda::linear_fprop_naive)},
};

TILED_KERNEL(LinearArgs, linear_dgrad_tiled)
TILED_KERNEL(LinearArgs, linear_dgrad_mma)
KERNEL(LinearArgs, linear_dgrad_skinny)
KERNEL(LinearArgs, linear_dgrad_naive)
constexpr Row<LinearArgs> kLinearDgrad[] = {
    {"cuda/linear_dgrad_skinny", "cuda/linear_skinny_backward.cu", kAll, kAny, kOldest,
     outer_reject<cuda::dgrad_outer>, outer_cost<cuda::dgrad_outer>, no_workspace<LinearArgs>,
     LAUNCH(cuda::linear_dgrad_skinny)},
    MMA_ROWS("cuda/linear_mma.cu", linear_dgrad_mma, linear_dgrad, mma_cost, tiled_workspace),
    TILED_ROWS("cuda/linear_tiled.cu", linear_dgrad_tiled, linear_dgrad_gemm, tiled_cost, tiled_workspace),
    {"cuda/linear_dgrad_naive", "cuda/linear_naive.cu", kAll, kAny, kOldest, accept<LinearArgs>,
     linear_dgrad_naive_cost, no_workspace<LinearArgs>, LAUNCH(cuda::linear_dgrad_naive)},
};

TILED_KERNEL(LinearArgs, linear_wgrad_tiled)
TILED_KERNEL(LinearArgs, linear_wgrad_mma)
KERNEL(LinearArgs, linear_wgrad_skinny)
KERNEL(LinearArgs, linear_wgrad_naive)
constexpr Row<LinearArgs> kLinearWgrad[] = {
    {"cuda/linear_wgrad_skinny", "cuda/linear_skinny_backward.cu", kAll, kAny, kOldest,
     outer_reject<cuda::wgrad_outer>, outer_cost<cuda::wgrad_outer>, no_workspace<LinearArgs>,
     LAUNCH(cuda::linear_wgrad_skinny)},
    MMA_ROWS("cuda/linear_mma.cu", linear_wgrad_mma, linear_wgrad, mma_wgrad_cost, tiled_wgrad_workspace),
    TILED_ROWS("cuda/linear_tiled.cu", linear_wgrad_tiled, linear_wgrad_gemm, tiled_wgrad_cost,
               tiled_wgrad_workspace),
    {"cuda/linear_wgrad_naive", "cuda/linear_naive.cu", kAll, kAny, kOldest, accept<LinearArgs>,
     linear_wgrad_naive_cost, bias_workspace, LAUNCH(cuda::linear_wgrad_naive)},
};

KERNEL(LinearActBackwardArgs, linear_act_backward_skinny)
constexpr Row<LinearActBackwardArgs> kLinearActBackward[] = {
    {"cuda/linear_act_backward_skinny", "cuda/linear_skinny_backward.cu", kAll, kAny, kOldest,
     linear_act_backward_skinny_reject, linear_act_backward_skinny_cost, no_workspace<LinearActBackwardArgs>,
     LAUNCH(cuda::linear_act_backward_skinny)},
    {"cuda/linear_act_backward_composed", "core/composed.cpp", kAll, kAny, kOldest,
     accept<LinearActBackwardArgs>, composed::linear_act_backward_cost,
     composed::linear_act_backward_workspace, LAUNCH(composed::linear_act_backward)},
};

KERNEL(ChainArgs, chain_fused)
KERNEL(ChainArgs, chain_fused_cluster)
constexpr Row<ChainArgs> kChain[] = {
    {"cuda/chain_fused_cluster", "cuda/chain_fused.cu", kAll, kAny, kHopper, chain_fused_reject<true>,
     chain_fused_cost<true>, no_workspace<ChainArgs>, LAUNCH(cuda::chain_fused_cluster)},
    {"cuda/chain_fused", "cuda/chain_fused.cu", kAll, kAny, kOldest, chain_fused_reject<false>,
     chain_fused_cost<false>, no_workspace<ChainArgs>, LAUNCH(cuda::chain_fused)},
    {"cuda/chain_composed", "core/composed_chain.cpp", kAll, kAny, kOldest, accept<ChainArgs>,
     composed::chain_cost, composed::chain_workspace, LAUNCH(composed::chain)},
};

KERNEL(ChainBackwardArgs, chain_backward_fused)
constexpr Row<ChainBackwardArgs> kChainBackward[] = {
    {"cuda/chain_backward_fused", "cuda/chain_fused_backward.cu", kUpToFloat, kAny, kOldest,
     chain_backward_fused_reject, chain_backward_fused_cost, chain_backward_fused_workspace,
     LAUNCH(cuda::chain_backward_fused)},
    {"cuda/chain_backward_composed", "core/composed_chain.cpp", kAll, kAny, kOldest,
     composed::chain_backward_reject, composed::chain_backward_cost, composed::chain_backward_workspace,
     LAUNCH(composed::chain_backward)},
};

const Tables cuda::tables = {
    table_of(kConvFprop),           table_of(kConvDgrad),
    table_of(kConvWgrad),           table_of(kConvActPool),
    table_of(kConvActPoolBackward), table_of(kMaxPool),
    table_of(kMaxPoolBackward),     table_of(kMaxPoolGather),
    table_of(kMaxPoolIndices),      table_of(kAvgPool),
    table_of(kAvgPoolBackward),     table_of(kNormActPool),
    table_of(kNormActPoolBackward), table_of(kLinearFprop),
    table_of(kLinearDgrad),         table_of(kLinearWgrad),
    table_of(kLinearActBackward),   table_of(kChain),
    table_of(kChainBackward),
};

}  // namespace fastconv
