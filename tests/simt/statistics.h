// SPDX-License-Identifier: MIT
// Counts what a GPU would do for each memory instruction: passes over the 32 shared-memory banks, 32-byte
// sectors of global memory. One request of a warp is the k-th execution of one instruction by each of its
// lanes since the warp last stopped. g++ merges and splits plain accesses in its own way, so the counts are
// exact for ld and st alone.
#pragma once

#include <cstddef>
#include <string>

#include "check.h"

namespace fastconv::simt {

void count_access(const Thread& thread, const void* p, size_t bytes, Kind kind, const void* pc);
void close_requests(int warp);  // the warp has stopped: what its lanes did belongs together
void count_launch();            // the current one
void clear_statistics();

// One line a kernel: the most dynamic shared memory that a launch asked for. Then one line a source line and
// kind of access: requests, passes or sectors, the least possible, and the worst conflict.
std::string statistics_report();

}  // namespace fastconv::simt
