// SPDX-License-Identifier: MIT
// The runtime for Python (ctypes). A function that can fail returns a sentence, or null where all is well;
// the text lives until the next call.
#include <string>

#include "memory.h"
#include "report.h"
#include "runtime.h"
#include "statistics.h"

#define SIMT_API extern "C" __attribute__((visibility("default")))

using namespace fastconv::simt;

SIMT_API void simt_configure(int order, unsigned seed, bool statistics) {
  options = {static_cast<Order>(order), seed, statistics};
}

SIMT_API void simt_watch(bool on) { watching = on; }

// Forgets buffers, findings and statistics.
SIMT_API void simt_clear() {
  clear_buffers();
  clear_report();
  clear_statistics();
}

SIMT_API void simt_register(const void* data, const char* name, int access, size_t element_bytes, int dims,
                            const int64_t* sizes, const int64_t* strides) {
  register_tensor(data, name, static_cast<Access>(access), element_bytes, dims, sizes, strides);
}

SIMT_API const char* simt_statistics() {
  static std::string text;
  text = statistics_report();
  return text.c_str();
}

SIMT_API const char* simt_unwritten_outputs() {
  clear_report();
  find_unwritten_outputs();
  return findings() ? report().c_str() : nullptr;
}
