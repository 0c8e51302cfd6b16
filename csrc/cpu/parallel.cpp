// SPDX-License-Identifier: MIT
#include "cpu/parallel.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastconv::cpu {

namespace {

void serial(int64_t count, int64_t, const void* context, RangeBody body) { body(context, 0, count); }

ParallelFor installed = serial;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

void set_parallel_for(ParallelFor run) { installed = run; }

void parallel_for_ranges(int64_t count, int64_t grain, const void* context, RangeBody body) {
  installed(count, grain, context, body);
}

void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, Free> scratch;
  thread_local int64_t size = 0;
  if (bytes > size) {
    bytes = std::max((bytes + 63) / 64 * 64, kScratchBytes);
    size = 0;
    scratch.reset();
    scratch.reset(std::aligned_alloc(64, bytes));
    if (!scratch) throw std::bad_alloc();
    size = bytes;
  }
  return scratch.get();
}

}  // namespace fastconv::cpu
