// SPDX-License-Identifier: MIT
// Work is cut into pieces by shape alone; which thread runs a piece changes no result. The pieces run on
// whatever pool the host program installs (csrc/glue installs PyTorch's), or one after the other.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastconv::cpu {

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, const void* context, RangeBody body);

void set_parallel_for(ParallelFor run);
void parallel_for_ranges(int64_t count, int64_t grain, const void* context, RangeBody body);

// Calls body(begin, end) over parts of [0, count), at least `grain` items each.
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  parallel_for_ranges(count, grain < 1 ? 1 : grain, &body,
                      [](const void* context, int64_t begin, int64_t end) {
                        (*static_cast<const Body*>(context))(begin, end);
                      });
}

// Calls body(i) for each i in [0, count). Below about 10 us of work a second thread costs more than it
// brings, so `item_us`, the rough time of one item, sets how many items a thread gets at least.
template <class Body>
void parallel_for(int64_t count, double item_us, const Body& body) {
  constexpr double kWorthAThreadUs = 10;
  const double grain = kWorthAThreadUs / (item_us > 1e-3 ? item_us : 1e-3);
  parallel_ranges(count, static_cast<int64_t>(grain), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Scratch of the calling thread: 64-byte aligned, at least `bytes` long, kept for the next call and grown
// where it is too small. A call takes all of it.
inline constexpr int64_t kScratchBytes = 1 << 20;
void* thread_scratch(int64_t bytes = kScratchBytes);

}  // namespace fastconv::cpu
