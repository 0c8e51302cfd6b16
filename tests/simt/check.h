// SPDX-License-Identifier: MIT
// The checker: every access of a kernel is looked up in shadow memory before it happens.
//
// Kernel files are compiled with g++ -fsanitize=thread,undefined but linked with neither runtime library: the
// functions that the instrumentation calls (__tsan_read4, __ubsan_handle_out_of_bounds, ...) are defined in
// check.cpp.
//
// The model: two accesses to one byte, at least one of them a plain write, must be ordered. Ordered are: the
// same thread's; those with a __syncthreads between them; and those where the later thread learnt of the
// earlier one's clock through a __syncwarp, a named barrier, an mbarrier or the cluster's barrier. What the
// copy engine writes is known to those who learnt that the phase of its mbarrier is over. Shuffles and other
// collectives order nothing. Clusters of one launch (blocks, where there are none) are never ordered;
// launches always are. Atomics race with plain accesses, not with each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace fastconv::simt {

enum class Kind { read, write, atomic };

// One access, as remembered. epoch 0: none.
struct Touch {
  const void* pc;
  uint32_t block, epoch, clock;
  uint16_t slot;
  uint8_t bytes;  // bit 0, 1: of the cell's two bytes
};
constexpr uint32_t kEngineEpoch = ~0u;  // of the copy engine, for which no __syncthreads is enough

// The shadow of two bytes.
struct Cell {
  Touch writer, readers[2], atomic;
  uint32_t block;                    // shared memory: the block that this cell is about
  uint32_t proxy_fences;             // of the writer, when it wrote
  uint8_t defined, pending, inside;  // bits: was written; awaits an asynchronous copy; belongs to an array
  uint8_t held;                      // by how many asynchronous operations that still have to read it
};

// Checks an access by `thread` at `pc`. A finding that makes the access itself impossible aborts the launch.
void check_access(Thread& thread, const void* p, size_t bytes, Kind kind, const void* pc);

// Bytes of shared memory that belong to an array, or no longer do.
void set_inside(const void* p, size_t bytes, bool inside);
// Bytes that an asynchronous copy will write, or has written.
void set_pending(const void* p, size_t bytes, bool pending);
// Bytes of shared memory that one more asynchronous operation will read, or one fewer.
void hold(const void* p, size_t bytes, bool held);
// The copy engine writes these bytes of shared memory in a phase of an mbarrier.
void set_written_by_engine(const void* p, size_t bytes, Phase phase, const void* pc);
// Uses by the tensor cores or the copy engine must come after a proxy fence of whoever wrote.
void check_proxy(const void* p, size_t bytes, const char* user, const void* pc);

void forget_accesses();  // between launches; what was written stays written

}  // namespace fastconv::simt
