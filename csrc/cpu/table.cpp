// SPDX-License-Identifier: MIT
// The CPU kernel tables. A kernel is a file beside this one; here it gets a row, and above its table a
// declaration. What rows reject, cost and need stands in conv_costs.h and costs.h.
#include "core/table.h"

#include "core/composed.h"
#include "cpu/costs.h"

namespace fastconv {

using namespace cpu;

constexpr unsigned kAll = kAllDtypes, kAny = kAllLayouts;
constexpr int kPortable = static_cast<int>(Isa::portable);

// Declares a kernel of one instruction set or of each, and makes the rows of the latter, the widest first.
#define KERNEL(Args, name)                               \
  namespace cpu {                                        \
  void name(const Args&, void* workspace, void* stream); \
  }
#define KERNEL_FOR_EACH_ISA(Args, name)                  \
  namespace cpu::portable {                              \
  void name(const Args&, void* workspace, void* stream); \
  }                                                      \
  namespace cpu::avx2 {                                  \
  void name(const Args&, void* workspace, void* stream); \
  }                                                      \
  namespace cpu::avx512 {                                \
  void name(const Args&, void* workspace, void* stream); \
  }
#define ROW_FOR(isa, file, name, reject, cost, workspace)                                     \
  {"cpu/" #name "_" #isa, file,      kAll,          kAny, static_cast<int>(Isa::isa), reject, \
   cost<Isa::isa>,        workspace, cpu::isa::name}
#if defined(__x86_64__)
#define ROWS_FOR_EACH_ISA(...) \
  ROW_FOR(avx512, __VA_ARGS__), ROW_FOR(avx2, __VA_ARGS__), ROW_FOR(portable, __VA_ARGS__)
#else
#define ROWS_FOR_EACH_ISA(...) ROW_FOR(portable, __VA_ARGS__)
#endif

KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_depthwise_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_pixels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_fprop_igemm)
KERNEL(ConvArgs, conv_fprop_naive)
constexpr Row<ConvArgs> kConvFprop[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_fprop_lanes, conv_fprop_lanes_reject, conv_fprop_lanes_cost,
                      conv_fprop_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_fprop_depthwise, conv_depthwise_reject,
                      conv_depthwise_cost, conv_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise_lines.cpp", conv_fprop_depthwise_lines,
                      conv_fprop_depthwise_lines_reject, conv_fprop_depthwise_lines_cost,
                      no_workspace<ConvArgs>),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_fprop_winograd, conv_fprop_winograd_reject,
                      conv_fprop_winograd_cost, conv_fprop_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_lines.cpp", conv_fprop_lines, conv_fprop_lines_reject, conv_fprop_lines_cost,
                      conv_lines_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_pixels.cpp", conv_fprop_pixels, conv_fprop_pixels_reject,
                      conv_fprop_pixels_cost, conv_fprop_pixels_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab.cpp", conv_fprop_slab, conv_slab_reject, conv_fprop_slab_cost,
                      conv_fprop_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_fprop_igemm, conv_igemm_reject, conv_igemm_cost,
                      no_workspace<ConvArgs>),
    {"cpu/conv_fprop_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, does_not_pool, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_fprop_naive},
};

KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_depthwise_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_lines)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_pixels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_dgrad_igemm)
KERNEL(ConvArgs, conv_dgrad_naive)
constexpr Row<ConvArgs> kConvDgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_dgrad_lanes, conv_lanes_reject<cpu::LanesDgrad>,
                      conv_dgrad_lanes_cost, conv_dgrad_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_dgrad_depthwise, conv_dgrad_depthwise_reject,
                      conv_dgrad_depthwise_cost, conv_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise_lines.cpp", conv_dgrad_depthwise_lines,
                      conv_dgrad_depthwise_lines_reject, conv_dgrad_depthwise_lines_cost,
                      no_workspace<ConvArgs>),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_dgrad_winograd, conv_dgrad_winograd_reject,
                      conv_dgrad_winograd_cost, conv_dgrad_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_lines.cpp", conv_dgrad_lines, conv_dgrad_lines_reject, conv_dgrad_lines_cost,
                      conv_lines_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_pixels.cpp", conv_dgrad_pixels, conv_dgrad_pixels_reject,
                      conv_dgrad_pixels_cost, conv_dgrad_pixels_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab.cpp", conv_dgrad_slab, conv_slab_reject, conv_dgrad_slab_cost,
                      conv_dgrad_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_dgrad_igemm, accept<ConvArgs>, conv_dgrad_igemm_cost,
                      no_workspace<ConvArgs>),
    {"cpu/conv_dgrad_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_dgrad_naive},
};

KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_lanes)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_depthwise)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_winograd)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_slab)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_wgrad_igemm)
KERNEL(ConvArgs, conv_wgrad_naive)
constexpr Row<ConvArgs> kConvWgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_wgrad_lanes, conv_lanes_reject<cpu::LanesWgrad>,
                      conv_wgrad_lanes_cost, conv_wgrad_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_depthwise.cpp", conv_wgrad_depthwise, conv_depthwise_reject,
                      conv_depthwise_cost, conv_wgrad_depthwise_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_winograd.cpp", conv_wgrad_winograd, conv_wgrad_winograd_reject,
                      conv_wgrad_winograd_cost, conv_wgrad_winograd_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_slab_wgrad.cpp", conv_wgrad_slab, conv_slab_reject, conv_wgrad_slab_cost,
                      conv_wgrad_slab_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_igemm.cpp", conv_wgrad_igemm, accept<ConvArgs>, conv_igemm_cost,
                      conv_wgrad_igemm_workspace),
    {"cpu/conv_wgrad_naive", "cpu/conv_naive.cpp", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_wgrad_naive},
};

KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_windows)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_channels)
KERNEL_FOR_EACH_ISA(ConvArgs, conv_act_pool_lanes)
constexpr Row<ConvArgs> kConvActPool[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_act_pool_lanes, conv_lanes_reject<cpu::LanesForward>,
                      conv_fprop_lanes_cost, conv_fprop_lanes_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_windows.cpp", conv_act_pool_windows, conv_windows_reject, conv_windows_cost,
                      conv_windows_workspace),
    ROWS_FOR_EACH_ISA("cpu/conv_windows.cpp", conv_act_pool_channels, conv_windows_reject, conv_channels_cost,
                      conv_channels_workspace),
    {"cpu/conv_act_pool_composed", "core/composed.cpp", kAll, kAny, kPortable, accept<ConvArgs>,
     composed::conv_act_pool_cost, composed::conv_act_pool_workspace, composed::conv_act_pool},
};

KERNEL_FOR_EACH_ISA(ConvActPoolBackwardArgs, conv_act_pool_backward_lanes)
constexpr Row<ConvActPoolBackwardArgs> kConvActPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/conv_lanes.cpp", conv_act_pool_backward_lanes, conv_backward_lanes_reject,
                      conv_backward_lanes_cost, conv_backward_lanes_workspace),
    {"cpu/conv_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     accept<ConvActPoolBackwardArgs>, composed::conv_act_pool_backward_cost,
     composed::conv_act_pool_backward_workspace, composed::conv_act_pool_backward},
};

KERNEL_FOR_EACH_ISA(PoolArgs, max_pool_rows)
KERNEL(PoolArgs, max_pool_naive)
constexpr Row<PoolArgs> kMaxPool[] = {
    ROWS_FOR_EACH_ISA("cpu/max_pool_rows.cpp", max_pool_rows, max_pool_rows_reject, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/max_pool_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, max_pool_backward_rows)
KERNEL(PoolArgs, max_pool_backward_naive)
constexpr Row<PoolArgs> kMaxPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/max_pool_backward_rows.cpp", max_pool_backward_rows, max_pool_rows_reject,
                      pool_rows_cost, no_workspace<PoolArgs>),
    {"cpu/max_pool_backward_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_backward_naive},
};

KERNEL(PoolArgs, max_pool_gather_naive)
constexpr Row<PoolArgs> kMaxPoolGather[] = {
    {"cpu/max_pool_gather_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_gather_naive},
};

KERNEL(PoolArgs, max_pool_indices_naive)
constexpr Row<PoolArgs> kMaxPoolIndices[] = {
    {"cpu/max_pool_indices_naive", "cpu/max_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::max_pool_indices_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, avg_pool_rows)
KERNEL(PoolArgs, avg_pool_naive)
constexpr Row<PoolArgs> kAvgPool[] = {
    ROWS_FOR_EACH_ISA("cpu/avg_pool_rows.cpp", avg_pool_rows, accept<PoolArgs>, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/avg_pool_naive", "cpu/avg_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>, pool_naive_cost,
     no_workspace<PoolArgs>, cpu::avg_pool_naive},
};

KERNEL_FOR_EACH_ISA(PoolArgs, avg_pool_backward_rows)
KERNEL(PoolArgs, avg_pool_backward_naive)
constexpr Row<PoolArgs> kAvgPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/avg_pool_rows.cpp", avg_pool_backward_rows, accept<PoolArgs>, pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/avg_pool_backward_naive", "cpu/avg_pool_naive.cpp", kAll, kAny, kPortable, accept<PoolArgs>,
     pool_naive_cost, no_workspace<PoolArgs>, cpu::avg_pool_backward_naive},
};

KERNEL_FOR_EACH_ISA(NormArgs, norm_act_pool_rows)
KERNEL(NormArgs, norm_act_pool_naive)
constexpr Row<NormArgs> kNormActPool[] = {
    ROWS_FOR_EACH_ISA("cpu/norm_rows.cpp", norm_act_pool_rows, norm_rows_reject, norm_rows_cost,
                      norm_rows_workspace),
    {"cpu/norm_act_pool_naive", "cpu/norm_naive.cpp", kAll, kAny, kPortable, norm_naive_reject,
     norm_naive_cost, no_workspace<NormArgs>, cpu::norm_act_pool_naive},
    {"cpu/norm_act_pool_composed", "core/composed.cpp", kAll, kAny, kPortable, composed::norm_act_pool_reject,
     composed::norm_act_pool_cost, composed::norm_act_pool_workspace, composed::norm_act_pool},
};

KERNEL_FOR_EACH_ISA(NormBackwardArgs, norm_act_pool_backward_rows)
KERNEL(NormBackwardArgs, norm_act_pool_backward_naive)
constexpr Row<NormBackwardArgs> kNormActPoolBackward[] = {
    ROWS_FOR_EACH_ISA("cpu/norm_rows.cpp", norm_act_pool_backward_rows, norm_backward_rows_reject,
                      norm_backward_rows_cost, norm_backward_rows_workspace),
    {"cpu/norm_act_pool_backward_naive", "cpu/norm_naive.cpp", kAll, kAny, kPortable,
     norm_backward_naive_reject, norm_backward_naive_cost, no_workspace<NormBackwardArgs>,
     cpu::norm_act_pool_backward_naive},
    {"cpu/norm_act_pool_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     composed::norm_act_pool_backward_reject, composed::norm_act_pool_backward_cost,
     composed::norm_act_pool_backward_workspace, composed::norm_act_pool_backward},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_fprop_dot)
KERNEL_FOR_EACH_ISA(LinearArgs, linear_fprop_gemm)
KERNEL_FOR_EACH_ISA(LinearArgs, linear_fprop_images)
KERNEL(LinearArgs, linear_fprop_naive)
constexpr Row<LinearArgs> kLinearFprop[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_fprop_dot, linear_dot_reject, linear_dot_cost,
                      no_workspace<LinearArgs>),
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_fprop_gemm, accept<LinearArgs>, linear_fprop_gemm_cost,
                      linear_fprop_gemm_workspace),
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_fprop_images, accept<LinearArgs>,
                      linear_fprop_images_cost, linear_fprop_images_workspace),
    {"cpu/linear_fprop_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_fprop_naive},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_dgrad_gemm)
KERNEL(LinearArgs, linear_dgrad_naive)
constexpr Row<LinearArgs> kLinearDgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_dgrad_gemm, accept<LinearArgs>, linear_dgrad_gemm_cost,
                      linear_dgrad_gemm_workspace),
    {"cpu/linear_dgrad_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_dgrad_naive},
};

KERNEL_FOR_EACH_ISA(LinearArgs, linear_wgrad_gemm)
KERNEL(LinearArgs, linear_wgrad_naive)
constexpr Row<LinearArgs> kLinearWgrad[] = {
    ROWS_FOR_EACH_ISA("cpu/linear_gemm.cpp", linear_wgrad_gemm, accept<LinearArgs>, linear_wgrad_gemm_cost,
                      linear_wgrad_gemm_workspace),
    {"cpu/linear_wgrad_naive", "cpu/linear_naive.cpp", kAll, kAny, kPortable, accept<LinearArgs>,
     linear_naive_cost, no_workspace<LinearArgs>, cpu::linear_wgrad_naive},
};

constexpr Row<LinearActBackwardArgs> kLinearActBackward[] = {
    {"cpu/linear_act_backward_composed", "core/composed.cpp", kAll, kAny, kPortable,
     accept<LinearActBackwardArgs>, composed::linear_act_backward_cost,
     composed::linear_act_backward_workspace, composed::linear_act_backward},
};

// Rows of the chain: they save numbers as they compute with them.
#define CHAIN_ROW_FOR(isa, name)                  \
  {"cpu/" #name "_" #isa,                         \
   "cpu/chain_lanes.cpp",                         \
   dtype_bit(Dtype::f32) | dtype_bit(Dtype::f64), \
   kAny,                                          \
   static_cast<int>(Isa::isa),                    \
   name##_reject<Isa::isa>,                       \
   name##_cost<Isa::isa>,                         \
   name##_workspace,                              \
   cpu::isa::name}
#if defined(__x86_64__)
#define CHAIN_ROWS_FOR_EACH_ISA(name) \
  CHAIN_ROW_FOR(avx512, name), CHAIN_ROW_FOR(avx2, name), CHAIN_ROW_FOR(portable, name)
#else
#define CHAIN_ROWS_FOR_EACH_ISA(name) CHAIN_ROW_FOR(portable, name)
#endif

KERNEL_FOR_EACH_ISA(ChainArgs, chain_lanes)
constexpr Row<ChainArgs> kChain[] = {
    CHAIN_ROWS_FOR_EACH_ISA(chain_lanes),
    {"cpu/chain_composed", "core/composed_chain.cpp", kAll, kAny, kPortable, accept<ChainArgs>,
     composed::chain_cost, composed::chain_workspace, composed::chain},
};

KERNEL_FOR_EACH_ISA(ChainBackwardArgs, chain_backward_lanes)
constexpr Row<ChainBackwardArgs> kChainBackward[] = {
    CHAIN_ROWS_FOR_EACH_ISA(chain_backward_lanes),
    {"cpu/chain_backward_composed", "core/composed_chain.cpp", kAll, kAny, kPortable,
     composed::chain_backward_reject, composed::chain_backward_cost, composed::chain_backward_workspace,
     composed::chain_backward},
};

const Tables cpu::tables = {
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
