// SPDX-License-Identifier: MIT
// What the tables hold and what they would choose, as plain structs;
// csrc/bindings.cpp turns them into Python's.
#pragma once

#include <string>
#include <vector>

#include "core/shape.h"
#include "core/table.h"
#include "core/watch.h"

namespace fastconv {

struct RowInfo {
  std::string name, file, source_hash, op, pass, device;
  std::vector<std::string> dtypes, layouts;
  bool built;
};

// Every row of every table of both devices, in table order.
std::vector<RowInfo> list_rows();

// A call in sizes alone. `op` is conv, conv_act_pool, max_pool, avg_pool, norm_act_pool, linear or chain;
// what an op does not have is left empty.
struct Question {
  std::string op;
  Device device = Device::cpu;
  Dtype dtype = Dtype::f32;
  Layout layout = Layout::contiguous;
  int level = 0;  // Target::level; 0: this machine's
  Sizes<int64_t> input, weight, stride, padding, dilation;
  int64_t groups = 1;
  Sizes<int64_t> pool_kernel, pool_stride, pool_padding;
  bool ceil_mode = false;
  Sizes<int64_t> plan;  // of a chain (core/chain.h), and the sizes of its parameters
  std::vector<Sizes<int64_t>> params;
};

std::vector<Explanation> explain(const Question& question);

}  // namespace fastconv
