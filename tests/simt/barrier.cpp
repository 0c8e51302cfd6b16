// SPDX-License-Identifier: MIT
// Barriers of part of a block: bar.sync/bar.arrive with a thread count, and mbarriers in shared memory. Both
// hand on what the arriving threads know to those who wait.
//
// An mbarrier's phase ends when all arrivals are in and all announced bytes have landed. Waiting for parity p
// returns once the phase of parity p is over, which includes "the next phase but one has not begun": as on
// hardware, a waiter that is two phases late is not noticed. Only a wait at cluster scope hands on what
// threads of other blocks know.
#include <algorithm>
#include <map>

#include "check.h"
#include "cuda/ptx.cuh"
#include "memory.h"
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
  Phase phase;                   // that is running, from 1
  Knowledge arriving, complete;  // of this phase's arrivals so far; of all phases that are over
  uint16_t initialiser;          // its slot
  bool is_visible;               // to the copy engine and the cluster

  bool is_over(int parity) const { return static_cast<int>((phase.number - 1) & 1) != parity; }
};

constexpr int kNamedBarriers = 16;
NamedBarrier named[kMaxCluster][kNamedBarriers];
std::map<uint64_t*, MBarrier> mbarriers;
int mbarrier_slots;

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
  NamedBarrier& bar = named[block->rank][id];
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
  bar.missing = bar.count;
  if (bar.arriving.size() <= static_cast<size_t>(bar.phase.slot)) bar.arriving.resize(bar.phase.slot + 1);
  bar.arriving[bar.phase.slot] = bar.phase.number++;
  bar.complete = bar.arriving;
  Block& host = host_of(key);
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = host.threads[i];
    if (t.state == State::waiting && t.mbarrier == key && bar.is_over(t.parity)) wake(t);
  }
}

void arrive_at_mbarrier(uint64_t* key, int bytes, const void* pc) {
  require_mbarrier(key, "mbarrier.arrive", pc);
  MBarrier& bar = mbarriers[key];
  if (!is_shared(key) && !bar.is_visible)
    found("init fence" + place(pc), "arrival from another block at " + place(pc) +
                                        ", at an mbarrier without a fence_mbar_init after its init");
  bar.bytes += bytes;
  publish(bar.arriving, *current);
  if (--bar.missing < 0)
    found("arrivals" + place(pc), "more arrivals than the mbarrier was told to expect, at " + place(pc),
          After::stop);
  end_phase_if_complete(key, bar);
}

void wait_at_mbarrier(uint64_t* key, int parity, bool of_cluster, Site site, const void* pc) {
  require_mbarrier(key, "mbarrier.try_wait", pc);
  Thread& t = *current;
  if (!mbarriers[key].is_over(parity)) {
    t.operation = "mbarrier.try_wait";
    t.site = site;
    t.mbarrier = key;
    t.parity = parity;
    wait_as(State::waiting);
  }
  Knowledge complete = mbarriers[key].complete;
  if (!of_cluster)
    for (int slot = 0; slot < slot_count(); ++slot)
      if (slot / thread_count != t.rank && slot < static_cast<int>(complete.size())) complete[slot] = 0;
  learn(t.knows, complete);
}

}  // namespace

void learn(Knowledge& to, const Knowledge& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void publish(Knowledge& to, Thread& t) {
  learn(to, t.knows);
  if (to.size() < static_cast<size_t>(slot_count())) to.resize(slot_count());
  to[t.slot] = t.clock++;
}

void start_barriers() {
  for (int rank = 0; rank < blocks_in_cluster; ++rank)
    std::fill_n(named[rank], kNamedBarriers, NamedBarrier());
  mbarriers.clear();
  mbarrier_slots = 0;
}

bool has_mbarriers() { return !mbarriers.empty(); }

void require_mbarrier(uint64_t* key, const char* operation, const void* pc) {
  check_access(*current, key, sizeof *key, Kind::atomic, pc);
  if (!mbarriers.count(key))
    found("mbarrier" + place(pc),
          std::string(operation) + " at " + place(pc) + " on an mbarrier that was not initialised",
          After::stop);
}

Phase phase_of(uint64_t* key, const char* operation, const void* pc) {
  require_mbarrier(key, operation, pc);
  const MBarrier& bar = mbarriers[key];
  if (!bar.is_visible)
    found("init fence" + place(pc), std::string(operation) + " at " + place(pc) +
                                        " with an mbarrier without a fence_mbar_init after its init");
  return bar.phase;
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
  const Phase phase{slot_count() + mbarrier_slots++, 1};
  mbarriers[key] = {arrivals, arrivals, 0, phase, {}, {}, current->slot, false};
}

void fence_mbar_init() {
  for (auto& [key, bar] : mbarriers)
    if (bar.initialiser == current->slot) bar.is_visible = true;
}

void mbar_arrive(uint64_t* key) { arrive_at_mbarrier(key, 0, __builtin_return_address(0)); }
void mbar_arrive_expect_tx(uint64_t* key, int bytes) {
  arrive_at_mbarrier(key, bytes, __builtin_return_address(0));
}

void mbar_arrive_remote(uint64_t* key, int rank) {
  arrive_at_mbarrier(cluster_shared(key, rank), 0, __builtin_return_address(0));
}

void mbar_wait(uint64_t* key, int parity, Site site) {
  wait_at_mbarrier(key, parity, false, site, __builtin_return_address(0));
}
void mbar_wait_cluster(uint64_t* key, int parity, Site site) {
  wait_at_mbarrier(key, parity, true, site, __builtin_return_address(0));
}

}  // namespace fastconv
