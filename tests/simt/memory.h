// SPDX-License-Identifier: MIT
// The memory that a kernel may touch: shared arrays in an arena with red zones between them, and the global
// buffers that the host registered. Everything else is out of bounds, but for the thread's own stack and the
// program's constants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace fastconv::simt {

struct Cell;  // check.h

// --- shared memory

// Each block of a cluster has an arena, and every array the same place in each. Static arrays lie in the
// first quarter, dynamic ones behind it.
constexpr size_t kArenaBytes = 1 << 20, kDynamicBase = kArenaBytes / 4, kRedZone = 64;

extern unsigned char *arenas, *arena;  // of all blocks of the cluster; of the block that runs
extern size_t arenas_bytes;
inline size_t arena_offset(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - arenas);
}
inline bool is_shared(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - arena) < kArenaBytes;
}
inline bool is_cluster_shared(const void* p) { return arena_offset(p) < arenas_bytes; }
inline Block& host_of(const void* p) { return blocks[arena_offset(p) / kArenaBytes]; }
// The same place in the shared memory of another block.
template <class T>
T* in_block(T* p, int rank) {
  return reinterpret_cast<T*>(arenas + rank * kArenaBytes + arena_offset(p) % kArenaBytes);
}

void open_arenas();           // for a cluster of this launch
void forget_shared_arrays();  // after a launch
void spoil_shared_arrays();   // before each cluster: all bytes 0xff, which is NaN in every float type

// --- global memory

enum class Access : int {
  input,        // read only
  output,       // undefined at first; every byte must have been written in the end
  scratch,      // undefined at first
  accumulator,  // defined at first, read and written
};

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  Access access;
  std::vector<bool> inside;       // which bytes belong to the tensor; empty: all
  std::unique_ptr<Cell[]> cells;  // none for an input

  bool holds(size_t offset, size_t bytes) const;
};

// Registers the elements of a strided tensor: `strides` count elements.
void register_tensor(const void* data, const char* name, Access access, size_t element_bytes, int dims,
                     const int64_t* sizes, const int64_t* strides);
void clear_buffers();
std::vector<Buffer>& buffers();
Buffer* find_buffer(uintptr_t address);

// A finding for every output of which a byte was never written.
void find_unwritten_outputs();

// "byte 12 of shared 'tile' (256 bytes)", "byte -4 of 'input' (100 bytes)"
std::string describe(uintptr_t address);

}  // namespace fastconv::simt
