// SPDX-License-Identifier: MIT
// What the tables hold and what they would choose, as plain structs;
// csrc/bindings.cpp turns them into Python's.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/shape.h"
#include "core/table.h"

namespace fastconv {

struct RowInfo {
  std::string name, file, source_hash, op, pass, device;
  std::vector<std::string> dtypes, layouts;
  bool built;
};

// Every row of every table of both devices, in table order.
std::vector<RowInfo> list_rows();

struct Considered {
  std::string name;
  std::optional<std::string> reason;  // why not
  double cost_us;                     // predicted; 0 where the row is rejected
  bool built;
};

struct Explanation {
  std::string pass, chosen;
  std::vector<Considered> rows;
};

// Every row of a table for a call: `chosen` is the name of the one that it takes.
template <class Args>
Explanation explain_table(const char* pass, const Table<Args>& table, const Args& args, const char* chosen) {
  Explanation answer{pass, chosen, {}};
  for (const Row<Args>& row : table) {
    const char* reason = why_not(row, args);
    answer.rows.push_back({row.name, reason ? std::optional<std::string>(reason) : std::nullopt,
                           reason ? 0 : row.cost_us(args), row.launch != nullptr});
  }
  return answer;
}

// What this thread's launches were, while it lives; of two, the inner one sees them.
class Watch {
 public:
  Watch() : before_(current()) { current() = this; }
  ~Watch() { current() = before_; }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  static Watch*& current() {
    static thread_local Watch* watch = nullptr;
    return watch;
  }

  std::vector<Explanation> seen;  // `pass` is left empty

 private:
  Watch* before_;
};

// A call in sizes alone. `op` is conv, conv_act_pool, max_pool, avg_pool, linear or chain;
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
