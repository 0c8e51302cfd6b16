// SPDX-License-Identifier: MIT
// Cases for Python: small launches, each with what the checker must say of it, or that it must say nothing.
#pragma once

#include <initializer_list>
#include <vector>

#include "core/dtype.h"
#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"

namespace fastconv::simt {

struct Case {
  const char* name;
  const char* expected;  // part of the report; null: the checker is silent and the values are right
  void (*run)();
};

// A zeroed array in global memory, registered under a name. An output must be written whole.
template <class T>
struct Global {
  std::vector<T> values;

  explicit Global(int64_t count, const char* name = "out", Access access = Access::accumulator)
      : values(count) {
    const int64_t stride = 1;
    register_tensor(values.data(), name, access, sizeof(T), 1, &count, &stride);
  }
  operator T*() { return values.data(); }
};

inline void expect(bool ok, const char* what) {
  if (!ok) fail("wrong: ", what);
}

// Before the tensors go: every output must be written.
inline void finish() {
  find_unwritten_outputs();
  if (findings()) throw Error(report());
  clear_buffers();
}

// The cases of a library; a file adds its own by defining a Cases. cases.cpp hands them to Python.
std::vector<Case>& all_cases();
struct Cases {
  Cases(std::initializer_list<Case> cases) { all_cases().insert(all_cases().end(), cases); }
};

}  // namespace fastconv::simt
