// SPDX-License-Identifier: MIT
// State shared by the files of the runtime. One launch runs at a time, on one host thread; clusters run one
// after the other, the blocks of a cluster in turns, the threads of a block as fibers. So all state is
// global, and is that of the block that runs now (`enter`). A launch without clusters has clusters of one
// block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/platform.cuh"
#include "fiber.h"

namespace fastconv::simt {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp, kMaxCluster = 8;
constexpr size_t kMaxStaticShared = 48 << 10, kMaxShared = 227 << 10;  // of sm_90
constexpr int kMaxRegisters = 64 << 10;

// --- threads and warps

enum class State : uint8_t {
  ready,
  at_block_barrier,
  in_warp_collective,
  waiting,  // for a named barrier, an mbarrier, its warpgroup or its cluster
  done
};

// What a thread knows to have happened: for each slot, a value of its clock. Every thread of the cluster has
// a slot; its clock goes up whenever it publishes what it did. Behind them every mbarrier has one, for what
// the copy engine did in its phases. Empty: nothing beyond what __syncthreads ordered.
using Knowledge = std::vector<uint32_t>;
void learn(Knowledge& to, const Knowledge& from);

// Asynchronous operations that were issued and not waited for, in order, in committed groups.
template <class T>
struct Groups {
  std::vector<T> issued;
  std::vector<int> sizes;  // of the groups
  int uncommitted = 0;

  void issue(T operation) {
    issued.push_back(std::move(operation));
    ++uncommitted;
  }
  void commit() { sizes.push_back(std::exchange(uncommitted, 0)); }

  // Calls f(operation) for those of all but the `newest` groups, and forgets them.
  template <class F>
  void wait(int newest, F&& f) {
    const int groups = std::max(0, static_cast<int>(sizes.size()) - newest);
    int count = 0;
    for (int i = 0; i < groups; ++i) count += sizes[i];
    for (int i = 0; i < count; ++i) f(issued[i]);
    issued.erase(issued.begin(), issued.begin() + count);
    sizes.erase(sizes.begin(), sizes.begin() + groups);
  }
  void clear() {
    issued.clear();
    sizes.clear();
    uncommitted = 0;
  }
};

struct CpAsync {
  unsigned char* dst;
  const unsigned char* src;
  int bytes, src_bytes;
  const void* pc;
};

struct Piece {  // of a copy by the copy engine
  unsigned char* dst;
  const unsigned char* src;  // null: zeros
  int bytes;
};

struct BulkStore {
  std::vector<Piece> pieces;
  std::vector<unsigned char> taken;  // what was read from shared memory, once it was
  const void* pc;
};

struct Range {
  uintptr_t begin, end;
  const void* pc;
};

struct Thread {
  Fiber fiber;
  int stack;  // its number, -1 before the start and after the end
  uintptr_t stack_begin;
  uint3 index;
  uint16_t number, slot;  // in the block, in the cluster
  uint8_t lane, warp, rank;
  State state;

  // Where it waits, and for what: the operation's name, its place, mask or predicate, and its operands.
  const char* operation;
  Site site;
  unsigned mask;
  void* operands;
  void (*combine)(Thread* warp, unsigned lanes);
  uint64_t* mbarrier;
  int parity;

  uint32_t clock;
  Knowledge knows;
  uint32_t proxy_fences;  // fence.proxy.async executed so far

  Groups<CpAsync> copies;
  Groups<BulkStore> stores;
  std::vector<Range> accumulators;  // on its stack, of wgmma in flight

  // The cluster barrier: how often it arrived, and waited.
  uint32_t cluster_arrivals, cluster_waits;
};

struct Warp {
  unsigned ready, live, waiting;  // bits of lanes
};

struct Visit {
  uint32_t clock;
  const void* pc;
};

// A block of the cluster that runs.
struct Block {
  int rank;  // in the cluster
  uint3 index;
  uint32_t serial;  // never repeated, ascending
  uint32_t epoch;   // __syncthreads passed, from 1
  Thread* threads;
  Warp* warps;
  int reduced;  // the result of the __syncthreads_count, _and or _or that was completed last
  bool has_ended;
  std::vector<Visit> visits;  // the last access of each thread of another block to its shared memory, by slot
};
extern Block blocks[kMaxCluster];
extern int blocks_in_cluster, thread_count, warp_count;  // of each block
inline int slot_count() { return blocks_in_cluster * thread_count; }
Thread& thread_of_slot(int slot);

// Of the block that runs.
extern Block* block;
extern Thread* threads;
extern Warp* warps;
extern uint32_t block_serial, epoch;
void enter(Block& b);

extern Thread* current;  // null on the host
extern bool aborting;    // a fatal error: no thread of this launch runs again

// --- options

// In which order ready threads, warps and blocks run. Correct kernels do not depend on it.
enum class Order : int { forward, reverse, random };
struct Options {
  Order order = Order::forward;
  unsigned seed = 1;
  bool statistics = false;  // count bank conflicts and sectors
};
extern Options options;
extern bool watching;  // off: no access is checked. For kernels that are not instrumented

// --- scheduling (block.cpp)

// The running thread waits in `state` until somebody calls wake. Its operation and site are set before.
void wait_as(State state);
void wake(Thread& thread);
// Leaves the running thread for good.
[[noreturn]] void abandon_thread();
extern Launch current_launch;
std::string who_waits_where();

// --- parts that keep state for a cluster: begun with it, ended with each block or thread

void start_barriers();  // barrier.cpp
bool has_mbarriers();
void start_warpgroups();  // warpgroup.cpp
void finish_warpgroups();
void start_bulk_copies();  // bulk.cpp
void finish_bulk_copies();
void finish_bulk_stores(Thread& thread);
bool complete_one_copy();  // nobody can run: the copy engine makes progress. False if it has nothing to do
void finish_cp_async(const Thread& thread);  // cp_async.cpp
void start_cluster();                        // cluster.cpp
void thread_left_cluster(Thread& thread);
void finish_visits();
// An access to another block's shared memory: that block must be there, now and until it ends.
void visit(Thread& thread, Block& host, const void* pc);

// --- barriers (barrier.cpp)

// Adds what the thread knows and its own past to `to`; what it does from here on is not included.
void publish(Knowledge& to, Thread& thread);
void land_bytes(uint64_t* bar, int bytes);
void require_mbarrier(uint64_t* bar, const char* operation, const void* pc);
// The slot of an mbarrier, and the number of its phase, for what the copy engine does in it.
struct Phase {
  int slot;
  uint32_t number;
};
Phase phase_of(uint64_t* bar, const char* operation, const void* pc);

// --- warp collectives (warp.cpp)

// The live lanes of `mask` meet; the last to arrive calls combine for all of them.
void meet(unsigned mask, const char* operation, Site site, void* operands,
          void (*combine)(Thread*, unsigned));
void require_full_warp(Thread* warp, unsigned lanes);
// A lane ended: those who wait for it alone go on.
void lane_ended(Warp& warp, Thread* lanes);

template <class F>
void for_lanes(unsigned lanes, F&& f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

}  // namespace fastconv::simt
