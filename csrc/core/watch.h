// SPDX-License-Identifier: MIT
// Which rows are launched, and why not the others, for whoever watches.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/table.h"

namespace fastconv {

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

// What this thread has launched, while it lives, a composed row before those that it runs; of two, the inner
// one sees it.
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

template <class Args>
void note_launch(const Table<Args>& table, const Args& args, const Row<Args>& row) {
  if (Watch* watch = Watch::current()) watch->seen.push_back(explain_table("", table, args, row.name));
}

}  // namespace fastconv
