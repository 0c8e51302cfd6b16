// SPDX-License-Identifier: MIT
// The rows of the CPU tables as a program, for a processor that is not this one (aarch64.py). It calls the
// functions of simt/rows.cpp as standard input asks for, one a line: its name and arguments, addresses as
// numbers. Addresses lie in memory that both processes see at the same place. An answer is a line with its
// length, -1 for null, and the text.
//
// Arguments: a file descriptor of the memory, its address and size, both in decimal.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <numeric>
#include <random>

#include "cpu/parallel.h"
#include "simt/rows.cpp"

namespace {

enum Order { forward, reverse, shuffled };  // as the emulator's
int64_t order, seed;

// The smallest pieces that a thread may get, in some order: no piece may need another.
void in_order(int64_t count, int64_t grain, const void* context, cpu::RangeBody body) {
  std::vector<int64_t> begins((count + grain - 1) / grain);
  for (size_t i = 0; i < begins.size(); ++i) begins[i] = static_cast<int64_t>(i) * grain;
  if (order == reverse) std::reverse(begins.begin(), begins.end());
  if (order == shuffled) std::shuffle(begins.begin(), begins.end(), std::mt19937(seed));
  for (int64_t begin : begins) body(context, begin, std::min(begin + grain, count));
}

void answer(const char* text) {
  if (text)
    std::cout << strlen(text) << '\n' << text << std::flush;
  else
    std::cout << -1 << std::endl;
}

std::string word() {
  std::string found;
  std::cin >> found;
  return found;
}
int64_t number() { return std::stoll(word()); }
template <class T = void>
T* address() {
  return reinterpret_cast<T*>(number());
}

}  // namespace

int main(int, char** arguments) {
  void* const place = reinterpret_cast<void*>(std::stoll(arguments[2]));
  if (mmap(place, std::stoull(arguments[3]), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE,
           std::stoi(arguments[1]), 0) != place) {
    std::perror("mmap");
    return 1;
  }
  cpu::set_parallel_for(in_order);
  for (std::string function; !(function = word()).empty();) {
    if (function == "simt_rows") {
      answer(simt_rows());
    } else if (function == "simt_structs") {
      answer(simt_structs());
    } else if (function == "simt_default_args") {
      const std::string op = word(), pass = word();
      simt_default_args(op.c_str(), pass.c_str(), address());
      answer(nullptr);
    } else if (function == "simt_fill_chain") {
      const auto* plan = address<const int64_t>();
      const int64_t plan_size = number();
      const auto* sizes = address<const int64_t>();
      const int64_t params = number();
      simt_fill_chain(plan, plan_size, sizes, params, address());
      answer(nullptr);
    } else if (function == "simt_why_not") {
      const std::string name = word();
      answer(simt_why_not(name.c_str(), address()));
    } else if (function == "simt_workspace_bytes") {
      const std::string name = word();
      answer(std::to_string(simt_workspace_bytes(name.c_str(), address())).c_str());
    } else if (function == "simt_configure") {
      order = number(), seed = number();
      answer(nullptr);
    } else if (function == "simt_run") {
      const std::string name = word();
      const void* args = address();
      answer(simt_run(name.c_str(), args, address()));
    } else {
      std::cerr << "no function is named " << function << std::endl;
      return 1;
    }
  }
}
