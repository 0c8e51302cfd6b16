// SPDX-License-Identifier: MIT
// Barriers of part of a block: bar.sync/bar.arrive with a thread count, and mbarriers in shared memory. Both
// hand on what the arriving threads know to those who wait.
//
// An mbarrier's phase ends when all arrivals are in and all announced bytes have landed. Waiting for parity p
// returns once the phase of parity p is over, which includes "the next phase but one has not begun": as on
// hardware, a waiter that is two phases late is not noticed.
#include <algorithm>
#include <map>

#include "check.h"
#include "memory.h"
#include "ptx.h"
#include "report.h"
#include "runtime.h"

namespace fastconv::simt {

namespace {

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Knowledge knowledge;
};

struct MBarrier {
  int count, missing;            // arrivals of a phase
  long bytes;                    // announced and not landed
  int parity;                    // of the phase that is running
  Knowledge arriving, complete;  // of this phase's arrivals so far; of all phases that are over
};

constexpr int kNamedBarriers = 16;
NamedBarrier named[kNamedBarriers];
std::map<uint64_t*, MBarrier> mbarriers;

void arrive_at_named(int id, int count, bool waits, Site site, const void* pc) {
  Thread& t = *current;
  t.operation = waits ? "bar.sync" : "bar.arrive";
  t.site = site;
  t.mbarrier = nullptr;
  if (id < 1 || id >= kNamedBarriers || count <= 0 || count % kWarp)
    found("named" + place(pc),
          format("%s at %s: barrier %d of %d threads; the number is 1 to 15, the count a multiple of 32",
                 t.operation, place(pc).c_str(), id, count),
          After::stop);
  NamedBarrier& bar = named[id];
  if (bar.expected && bar.expected != count)
    found("named" + place(pc),
          format("%s at %s: barrier %d of %d threads, where others said %d", t.operation, place(pc).c_str(),
                 id, count, bar.expected),
          After::stop);
  bar.expected = count;
  publish(bar.knowledge, t);
  if (waits) bar.waiting.push_back(&t);
  if (++bar.arrived < count) {
    if (waits) wait_as(State::waiting);
    return;
  }
  for (Thread* other : bar.waiting) {
    learn(other->knows, bar.knowledge);
    if (other != &t) wake(*other);
  }
  bar = NamedBarrier();
}

void end_phase_if_complete(uint64_t* key, MBarrier& bar) {
  if (bar.missing > 0 || bar.bytes != 0) return;
  bar.parity ^= 1;
  bar.missing = bar.count;
  bar.complete = bar.arriving;
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    if (t.state == State::waiting && t.mbarrier == key && t.parity != bar.parity) wake(t);
  }
}

void arrive_at_mbarrier(uint64_t* key, int bytes, const void* pc) {
  require_mbarrier(key, "mbarrier.arrive", pc);
  MBarrier& bar = mbarriers[key];
  bar.bytes += bytes;
  publish(bar.arriving, *current);
  if (--bar.missing < 0)
    found("arrivals" + place(pc), "more arrivals than the mbarrier was told to expect, at " + place(pc),
          After::stop);
  end_phase_if_complete(key, bar);
}

}  // namespace

void learn(Knowledge& to, const Knowledge& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void publish(Knowledge& to, Thread& t) {
  learn(to, t.knows);
  to.resize(thread_count);
  to[t.number] = t.clock++;
}

void start_barriers() {
  std::fill_n(named, kNamedBarriers, NamedBarrier());
  mbarriers.clear();
}

void require_mbarrier(uint64_t* key, const char* operation, const void* pc) {
  check_access(*current, key, sizeof *key, Kind::atomic, pc);
  if (!mbarriers.count(key))
    found("mbarrier" + place(pc),
          std::string(operation) + " at " + place(pc) + " on an mbarrier that was not initialised",
          After::stop);
}

void land_bytes(uint64_t* key, int bytes) {
  MBarrier& bar = mbarriers[key];
  bar.bytes -= bytes;
  end_phase_if_complete(key, bar);
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

void bar_sync(int id, int count, Site site) {
  arrive_at_named(id, count, true, site, __builtin_return_address(0));
}
void bar_arrive(int id, int count, Site site) {
  arrive_at_named(id, count, false, site, __builtin_return_address(0));
}

void mbar_init(uint64_t* key, int arrivals) {
  const void* pc = __builtin_return_address(0);
  check_access(*current, key, sizeof *key, Kind::write, pc);
  if (!is_shared(key))
    found("mbarrier" + place(pc), "an mbarrier outside of shared memory at " + place(pc), After::stop);
  mbarriers[key] = {arrivals, arrivals, 0, 0, {}, {}};
}

void mbar_arrive(uint64_t* key) { arrive_at_mbarrier(key, 0, __builtin_return_address(0)); }
void mbar_arrive_expect_tx(uint64_t* key, int bytes) {
  arrive_at_mbarrier(key, bytes, __builtin_return_address(0));
}

void mbar_wait(uint64_t* key, int parity, Site site) {
  require_mbarrier(key, "mbarrier.try_wait", __builtin_return_address(0));
  if (mbarriers[key].parity == parity) {
    current->operation = "mbarrier.try_wait";
    current->site = site;
    current->mbarrier = key;
    current->parity = parity;
    wait_as(State::waiting);
  }
  learn(current->knows, mbarriers[key].complete);
}

}  // namespace fastconv
