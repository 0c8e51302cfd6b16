// SPDX-License-Identifier: MIT
// The CPU kernel tables. A row is added here, a kernel in a file beside this one.
//
// Costs are microseconds on one core: work over the rate that the row reaches on its usual shapes, plus
// what a call costs before the first element. They only need to order the rows of one table. Rates were
// measured on a Xeon with AVX-512.
#include "core/table.h"

#include "core/composed.h"
#include "cpu/launch.h"

namespace fastconv {

namespace {

constexpr unsigned kAll = kAllDtypes, kAny = kAllLayouts;
constexpr int kPortable = static_cast<int>(Isa::portable);

double conv_elements(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  return double(s.N) * double(s.K * s.out_cells() + s.C * s.in_cells()) +
         double(s.K * s.group_c() * s.taps());
}

// Naive rows: about 0.5 multiply-adds a nanosecond, less where a term is bounds-checked.
double conv_naive_cost(const ConvArgs& a) { return 0.5 + a.shape.macs() * 2e-3 + conv_elements(a) * 5e-3; }
double linear_naive_cost(const LinearArgs& a) { return 0.5 + a.macs() * 1e-3; }
double max_pool_naive_cost(const PoolArgs& a) {
  const double cells = double(a.N) * double(a.C) * double(a.D * a.H * a.W + a.window.out.cells());
  return 0.5 + cells * (1e-2 + 5e-3 * double(a.window.kernel.cells()));
}

// Multiply-adds a microsecond of the block GEMM, with packing.
constexpr double gemm_rate(Isa isa) { return isa == Isa::avx512 ? 30e3 : isa == Isa::avx2 ? 18e3 : 4e3; }

template <Isa isa>
double conv_igemm_cost(const ConvArgs& a) {
  const ConvShape& s = a.shape;
  const double packed = double(s.N) * double(s.out_cells()) * double(s.C * s.taps());
  return 3 + double(s.groups) * 0.5 + a.shape.macs() / gemm_rate(isa) + packed * 5e-4 +
         conv_elements(a) * 5e-4;
}
template <Isa isa>
double linear_gemm_cost(const LinearArgs& a) {
  const double packed = double(a.M) * double(a.K) + double(a.N) * double(a.K) + double(a.M) * double(a.N);
  return 2 + a.macs() / gemm_rate(isa) + packed * 1e-3;
}
template <Isa isa>
double max_pool_rows_cost(const PoolArgs& a) {
  return 0.5 + max_pool_naive_cost(a) / (isa == Isa::avx512 ? 8 : isa == Isa::avx2 ? 6 : 4);
}

// The rows of a family compiled once for each instruction set, the widest first.
#define ROW_FOR(isa, name, reject, cost, workspace)                                     \
  {"cpu/" #name "_" #isa, kAll,      kAny,          static_cast<int>(Isa::isa), reject, \
   cost<Isa::isa>,        workspace, cpu::isa::name}
#if defined(__x86_64__)
#define ROWS_FOR_EACH_ISA(...) \
  ROW_FOR(avx512, __VA_ARGS__), ROW_FOR(avx2, __VA_ARGS__), ROW_FOR(portable, __VA_ARGS__)
#else
#define ROWS_FOR_EACH_ISA(...) ROW_FOR(portable, __VA_ARGS__)
#endif

constexpr Row<ConvArgs> kConvFprop[] = {
    ROWS_FOR_EACH_ISA(conv_fprop_igemm, cpu::conv_igemm_reject, conv_igemm_cost, no_workspace<ConvArgs>),
    {"cpu/conv_fprop_naive", kAll, kAny, kPortable, cpu::conv_naive_reject, conv_naive_cost,
     no_workspace<ConvArgs>, cpu::conv_fprop_naive},
};

constexpr Row<ConvArgs> kConvDgrad[] = {
    ROWS_FOR_EACH_ISA(conv_dgrad_igemm, accept<ConvArgs>, conv_igemm_cost, no_workspace<ConvArgs>),
    {"cpu/conv_dgrad_naive", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost, no_workspace<ConvArgs>,
     cpu::conv_dgrad_naive},
};

constexpr Row<ConvArgs> kConvWgrad[] = {
    ROWS_FOR_EACH_ISA(conv_wgrad_igemm, accept<ConvArgs>, conv_igemm_cost, cpu::conv_wgrad_igemm_workspace),
    {"cpu/conv_wgrad_naive", kAll, kAny, kPortable, accept<ConvArgs>, conv_naive_cost, no_workspace<ConvArgs>,
     cpu::conv_wgrad_naive},
};

constexpr Row<ConvArgs> kConvActPool[] = {
    {"cpu/conv_act_pool_composed", kAll, kAny, kPortable, accept<ConvArgs>, composed::conv_act_pool_cost,
     composed::conv_act_pool_workspace, composed::conv_act_pool},
};

constexpr Row<ConvActPoolBackwardArgs> kConvActPoolBackward[] = {
    {"cpu/conv_act_pool_backward_composed", kAll, kAny, kPortable, accept<ConvActPoolBackwardArgs>,
     composed::conv_act_pool_backward_cost, composed::conv_act_pool_backward_workspace,
     composed::conv_act_pool_backward},
};

constexpr Row<PoolArgs> kMaxPool[] = {
    ROWS_FOR_EACH_ISA(max_pool_rows, accept<PoolArgs>, max_pool_rows_cost, no_workspace<PoolArgs>),
    {"cpu/max_pool_naive", kAll, kAny, kPortable, accept<PoolArgs>, max_pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_naive},
};

constexpr Row<PoolArgs> kMaxPoolBackward[] = {
    ROWS_FOR_EACH_ISA(max_pool_backward_rows, cpu::max_pool_backward_rows_reject, max_pool_rows_cost,
                      no_workspace<PoolArgs>),
    {"cpu/max_pool_backward_naive", kAll, kAny, kPortable, accept<PoolArgs>, max_pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_backward_naive},
};

constexpr Row<PoolArgs> kMaxPoolGather[] = {
    {"cpu/max_pool_gather_naive", kAll, kAny, kPortable, accept<PoolArgs>, max_pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_gather_naive},
};

constexpr Row<PoolArgs> kMaxPoolIndices[] = {
    {"cpu/max_pool_indices_naive", kAll, kAny, kPortable, accept<PoolArgs>, max_pool_naive_cost,
     no_workspace<PoolArgs>, cpu::max_pool_indices_naive},
};

constexpr Row<LinearArgs> kLinearFprop[] = {
    ROWS_FOR_EACH_ISA(linear_fprop_gemm, accept<LinearArgs>, linear_gemm_cost, no_workspace<LinearArgs>),
    {"cpu/linear_fprop_naive", kAll, kAny, kPortable, accept<LinearArgs>, linear_naive_cost,
     no_workspace<LinearArgs>, cpu::linear_fprop_naive},
};

constexpr Row<LinearArgs> kLinearDgrad[] = {
    ROWS_FOR_EACH_ISA(linear_dgrad_gemm, accept<LinearArgs>, linear_gemm_cost, no_workspace<LinearArgs>),
    {"cpu/linear_dgrad_naive", kAll, kAny, kPortable, accept<LinearArgs>, linear_naive_cost,
     no_workspace<LinearArgs>, cpu::linear_dgrad_naive},
};

constexpr Row<LinearArgs> kLinearWgrad[] = {
    ROWS_FOR_EACH_ISA(linear_wgrad_gemm, accept<LinearArgs>, linear_gemm_cost, no_workspace<LinearArgs>),
    {"cpu/linear_wgrad_naive", kAll, kAny, kPortable, accept<LinearArgs>, linear_naive_cost,
     no_workspace<LinearArgs>, cpu::linear_wgrad_naive},
};

constexpr Row<LinearActBackwardArgs> kLinearActBackward[] = {
    {"cpu/linear_act_backward_composed", kAll, kAny, kPortable, accept<LinearActBackwardArgs>,
     composed::linear_act_backward_cost, composed::linear_act_backward_workspace,
     composed::linear_act_backward},
};

}  // namespace

const Tables cpu::tables = {
    table_of(kConvFprop),         table_of(kConvDgrad),           table_of(kConvWgrad),
    table_of(kConvActPool),       table_of(kConvActPoolBackward), table_of(kMaxPool),
    table_of(kMaxPoolBackward),   table_of(kMaxPoolGather),       table_of(kMaxPoolIndices),
    table_of(kLinearFprop),       table_of(kLinearDgrad),         table_of(kLinearWgrad),
    table_of(kLinearActBackward),
};

}  // namespace fastconv
