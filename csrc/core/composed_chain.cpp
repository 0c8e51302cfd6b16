// SPDX-License-Identifier: MIT
// A chain stage by stage; intermediates that are not saved take turns in two slots of the workspace.
#include <cstring>

#include "core/chain_calls.h"
#include "core/composed.h"

namespace fastconv::composed {

namespace {

constexpr int64_t kSlots = 2;

const auto& table_for(const ConvArgs& a) { return tables(a.target.device).conv_act_pool; }
const auto& table_for(const LinearArgs& a) { return tables(a.target.device).linear_fprop; }
const auto& table_for(const ConvActPoolBackwardArgs& a) {
  return tables(a.conv.target.device).conv_act_pool_backward;
}
const auto& table_for(const LinearActBackwardArgs& a) {
  return tables(a.linear.target.device).linear_act_backward;
}

}  // namespace

double chain_cost(const ChainArgs& a) {
  double sum = 0;
  ChainCalls(a, nullptr, kSlots).each_forward([&](const auto& args) { sum += cost(table_for(args), args); });
  return sum;
}

int64_t chain_workspace(const ChainArgs& a) {
  const ChainCalls calls(a, nullptr, kSlots);
  int64_t most = 0;
  calls.each_forward([&](const auto& args) { most = std::max(most, workspace(table_for(args), args)); });
  return calls.slot_bytes() + most;
}

void chain(const ChainArgs& a, void* workspace, void* stream) {
  const ChainCalls calls(a, workspace, kSlots);
  int64_t i = 0;
  calls.each_forward([&](const auto& args) {
    const auto& table = table_for(args);
    using RowOf = std::decay_t<decltype(*table.begin())>;
    const void* known = a.stages[i++].row;
    const RowOf& row = known ? *static_cast<const RowOf*>(known) : choose(table, args);
    note_launch(table, args, row);
    row.launch(args, calls.rest(), stream);
  });
}

void choose_rows(ChainArgs& a) {
  int64_t i = 0;
  ChainCalls(a, nullptr, kSlots).each_forward([&](const auto& args) {
    a.stages[i++].row = &choose(table_for(args), args);
  });
}

const char* chain_backward_reject(const ChainBackwardArgs& a) {
  bool reads = false;
  for (int64_t i = 0; i < a.chain.count; ++i)
    reads = reads || a.chain.stages[i].saved_output >= 0 || a.chain.stages[i].saved_offsets >= 0;
  return !reads || !strstr(a.forward, "_lanes_") ? nullptr : "reads dense tensors, and lanes were saved";
}

double chain_backward_cost(const ChainBackwardArgs& a) {
  double sum = 0;
  ChainCalls(a.chain, nullptr, kSlots).each_backward(a, [&](const auto& args) {
    sum += cost(table_for(args), args);
  });
  return sum;
}

int64_t chain_backward_workspace(const ChainBackwardArgs& a) {
  const ChainCalls calls(a.chain, nullptr, kSlots);
  int64_t most = 0;
  calls.each_backward(a, [&](const auto& args) { most = std::max(most, workspace(table_for(args), args)); });
  return calls.slot_bytes() + most;
}

void chain_backward(const ChainBackwardArgs& a, void* workspace, void* stream) {
  const ChainCalls calls(a.chain, workspace, kSlots);
  calls.each_backward(a, [&](const auto& args) { launch(table_for(args), args, calls.rest(), stream); });
}

}  // namespace fastconv::composed
