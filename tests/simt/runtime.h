// SPDX-License-Identifier: MIT
// State shared by the files of the runtime. One launch runs at a time, on one host thread; blocks run one
// after the other, the threads of a block as fibers. So all state is global, and is that of the block that
// runs now.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "fiber.h"
#include "simt.h"

namespace fastconv::simt {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxStaticShared = 48 << 10, kMaxShared = 227 << 10;  // of sm_90

// --- threads and warps

enum class State : uint8_t {
  ready,
  at_block_barrier,
  in_warp_collective,
  waiting,  // for a named barrier, an mbarrier or its warpgroup
  done
};

// What a thread knows to have happened: for each thread of the block, a value of that thread's clock. A clock
// goes up whenever its thread publishes what it did. Empty: nothing beyond what __syncthreads ordered.
using Knowledge = std::vector<uint32_t>;
void learn(Knowledge& to, const Knowledge& from);

struct CpAsync {  // one cp.async that has been issued and not waited for
  unsigned char* dst;
  const unsigned char* src;
  int bytes, src_bytes;
  const void* pc;
};

struct Thread {
  Fiber fiber;
  int stack;  // its number, -1 before the start and after the end
  uintptr_t stack_begin;
  uint3 index;
  uint16_t number;  // in the block
  uint8_t lane, warp;
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

  std::vector<CpAsync> copies;  // in order of issue
  std::vector<int> groups;      // copies in each committed group
  int uncommitted;              // copies since the last commit
};

struct Warp {
  unsigned ready, live, waiting;  // bits of lanes
};

extern Thread threads[kMaxThreads];
extern Warp warps[kMaxWarps];
extern int thread_count, warp_count;
extern Thread* current;        // null on the host
extern uint32_t block_serial;  // of the block that runs, never repeated
extern uint32_t epoch;         // __syncthreads passed in this block, from 1
extern bool aborting;          // a fatal error: no thread of this launch runs again

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

// --- parts that keep state for a block

void start_barriers();      // barrier.cpp
void start_tensor_cores();  // tensor_core.cpp
void finish_tensor_cores();
void start_copies();  // async.cpp
void finish_copies();
void finish_thread_copies(const Thread& thread);
bool complete_one_copy();  // nobody can run: the copy engine makes progress. False if it has nothing to do

// --- barriers (barrier.cpp)

// Adds what the thread knows and its own past to `to`; what it does from here on is not included.
void publish(Knowledge& to, Thread& thread);
void land_bytes(uint64_t* bar, int bytes);
void require_mbarrier(uint64_t* bar, const char* operation, const void* pc);

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
