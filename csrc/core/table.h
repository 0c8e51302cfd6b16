// SPDX-License-Identifier: MIT
// The kernel tables: one per device and pass, the complete naive kernel in its last row. The cheapest row
// that does not reject wins; order breaks ties. The choice is a pure function of the argument struct.
#pragma once

#include <cstddef>
#include <string>
#include <type_traits>

#include "core/chain_args.h"

namespace fastconv {

template <class Args>
struct Row {
  const char* name;                         // "<device>/<op>_<pass>_<family>[_<what distinguishes it>]"
  const char* file;                         // the kernel's source, below csrc/
  unsigned dtypes;                          // bits of Dtype
  unsigned layouts;                         // bits of Layout
  int min_level;                            // the least Target::level it runs on
  const char* (*reject)(const Args&);       // why not, as a sentence; null: it can
  double (*cost_us)(const Args&);           // predicted time, for comparing rows of one table
  int64_t (*workspace_bytes)(const Args&);  // scratch memory, uninitialised, aligned to 64 bytes
  void (*launch)(const Args&, void* workspace, void* stream);  // null in a build without that device
};

template <class Args>
struct Table {
  const Row<Args>* rows = nullptr;
  size_t size = 0;

  const Row<Args>* begin() const { return rows; }
  const Row<Args>* end() const { return rows + size; }
};

// Why `row` cannot take `args`, or null.
template <class Args>
const char* why_not(const Row<Args>& row, const Args& args);

// The row for `args`. `forced` is a list of row names, separated by commas: a name of this table is taken
// instead of the cheapest. Fails where the forced row rejects.
template <class Args>
const Row<Args>& choose(const Table<Args>& table, const Args& args, const char* forced = "");

struct Tables {
  Table<ConvArgs> conv_fprop, conv_dgrad, conv_wgrad, conv_act_pool;
  Table<ConvActPoolBackwardArgs> conv_act_pool_backward;
  Table<PoolArgs> max_pool, max_pool_backward, max_pool_gather, max_pool_indices;
  Table<PoolArgs> avg_pool, avg_pool_backward;
  Table<NormArgs> norm_act_pool;
  Table<NormBackwardArgs> norm_act_pool_backward;
  Table<LinearArgs> linear_fprop, linear_dgrad, linear_wgrad;
  Table<LinearActBackwardArgs> linear_act_backward;
  Table<ChainArgs> chain;
  Table<ChainBackwardArgs> chain_backward;

  // Calls f(op, pass, table) for each table.
  template <class F>
  void each(F&& f) const {
    f("conv", "fprop", conv_fprop);
    f("conv", "dgrad", conv_dgrad);
    f("conv", "wgrad", conv_wgrad);
    f("conv_act_pool", "forward", conv_act_pool);
    f("conv_act_pool", "backward", conv_act_pool_backward);
    f("max_pool", "forward", max_pool);
    f("max_pool", "backward", max_pool_backward);
    f("max_pool", "gather", max_pool_gather);
    f("max_pool", "indices", max_pool_indices);
    f("avg_pool", "forward", avg_pool);
    f("avg_pool", "backward", avg_pool_backward);
    f("norm_act_pool", "forward", norm_act_pool);
    f("norm_act_pool", "backward", norm_act_pool_backward);
    f("linear", "fprop", linear_fprop);
    f("linear", "dgrad", linear_dgrad);
    f("linear", "wgrad", linear_wgrad);
    f("linear_act", "backward", linear_act_backward);
    f("chain", "forward", chain);
    f("chain", "backward", chain_backward);
  }
};

namespace cpu {
extern const Tables tables;  // csrc/cpu/table.cpp
}
namespace cuda {
extern const Tables tables;  // csrc/cuda/table.cpp
}

inline const Tables& tables(Device device) { return device == Device::cpu ? cpu::tables : cuda::tables; }

// Whether some table of some device has a row of that name.
bool is_row_name(const std::string& name);

template <class Args, size_t size>
constexpr Table<Args> table_of(const Row<Args> (&rows)[size]) {
  return {rows, size};
}

// Pieces of rows that many share.
template <class Args>
const char* accept(const Args&) {
  return nullptr;
}
template <class Args>
int64_t no_workspace(const Args&) {
  return 0;
}

}  // namespace fastconv
