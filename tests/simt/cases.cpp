// SPDX-License-Identifier: MIT
// The cases of a library for Python (ctypes).
#include "cases.h"

#include <string>

#define SIMT_API extern "C" __attribute__((visibility("default")))

std::vector<fastconv::simt::Case>& fastconv::simt::all_cases() {
  static std::vector<Case> cases;
  return cases;
}

using namespace fastconv::simt;

SIMT_API int simt_case_count() { return static_cast<int>(all_cases().size()); }
SIMT_API const char* simt_case_name(int i) { return all_cases()[i].name; }
SIMT_API const char* simt_case_expected(int i) { return all_cases()[i].expected; }

// Runs a case. Returns what was found, or null. The text lives until the next call.
SIMT_API const char* simt_case_run(int i) {
  static std::string text;
  text.clear();
  try {
    all_cases()[i].run();
    finish();
  } catch (const std::exception& error) {
    text = error.what();
  }
  clear_buffers();
  clear_report();
  return text.empty() ? nullptr : text.c_str();
}
