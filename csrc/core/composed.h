// SPDX-License-Identifier: MIT
// The last row of each fused table: the same work done by the best unfused rows of that device, through
// workspace. It makes a fused operator complete on every shape that its parts take.
#pragma once

#include <algorithm>

#include "core/watch.h"

namespace fastconv::composed {

// Runs the best row of a table, or asks it for its cost or workspace.
template <class Args>
void launch(const Table<Args>& table, const Args& args, void* workspace, void* stream) {
  const Row<Args>& row = choose(table, args);
  note_launch(table, args, row);
  row.launch(args, workspace, stream);
}
template <class Args>
double cost(const Table<Args>& table, const Args& args) {
  return choose(table, args).cost_us(args);
}
template <class Args>
int64_t workspace(const Table<Args>& table, const Args& args) {
  return choose(table, args).workspace_bytes(args);
}

// Arrays in workspace begin at whole cache lines.
inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
inline char* after(void* workspace, int64_t bytes) { return static_cast<char*>(workspace) + align(bytes); }

double conv_act_pool_cost(const ConvArgs& a);
int64_t conv_act_pool_workspace(const ConvArgs& a);
void conv_act_pool(const ConvArgs& a, void* workspace, void* stream);

double conv_act_pool_backward_cost(const ConvActPoolBackwardArgs& a);
int64_t conv_act_pool_backward_workspace(const ConvActPoolBackwardArgs& a);
void conv_act_pool_backward(const ConvActPoolBackwardArgs& a, void* workspace, void* stream);

const char* norm_act_pool_reject(const NormArgs& a);
double norm_act_pool_cost(const NormArgs& a);
int64_t norm_act_pool_workspace(const NormArgs& a);
void norm_act_pool(const NormArgs& a, void* workspace, void* stream);

const char* norm_act_pool_backward_reject(const NormBackwardArgs& a);
double norm_act_pool_backward_cost(const NormBackwardArgs& a);
int64_t norm_act_pool_backward_workspace(const NormBackwardArgs& a);
void norm_act_pool_backward(const NormBackwardArgs& a, void* workspace, void* stream);

double linear_act_backward_cost(const LinearActBackwardArgs& a);
int64_t linear_act_backward_workspace(const LinearActBackwardArgs& a);
void linear_act_backward(const LinearActBackwardArgs& a, void* workspace, void* stream);

double chain_cost(const ChainArgs& a);
int64_t chain_workspace(const ChainArgs& a);
void chain(const ChainArgs& a, void* workspace, void* stream);
// Keeps the choice of each stage's row in the arguments, for calls that differ in nothing but addresses.
void choose_rows(ChainArgs& a);

const char* chain_backward_reject(const ChainBackwardArgs& a);
double chain_backward_cost(const ChainBackwardArgs& a);
int64_t chain_backward_workspace(const ChainBackwardArgs& a);
void chain_backward(const ChainBackwardArgs& a, void* workspace, void* stream);

}  // namespace fastconv::composed
