// SPDX-License-Identifier: MIT
// Planted bugs. Each file holds one kernel, right with Bug::none, and the same kernel with each of its bugs.
// Every case compares with a reference, so a bug is noticed by the checker or by a wrong result; mutants.py
// prints by which.
#pragma once

#include <cmath>

#include "cases.h"

namespace fastconv::simt {

// Small numbers without a pattern.
template <class T>
void fill(Global<T>& global, float scale = 1) {
  uint32_t state = 12345 + static_cast<uint32_t>(global.values.size());
  for (T& value : global.values) {
    state = state * 1664525u + 1013904223u;
    value = T((static_cast<int>(state >> 8 & 0xffff) / 32768.0f - 1) * scale);
  }
}

inline void expect_near(double value, double reference, double tolerance) {
  expect(std::abs(value - reference) <= tolerance, "a result");
}

}  // namespace fastconv::simt
