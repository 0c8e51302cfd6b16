// SPDX-License-Identifier: MIT
// Clusters: the barrier of all threads of all blocks, and who may use the shared memory of another block.
#include <algorithm>

#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"

namespace fastconv::simt {

namespace {

constexpr const char* kClusterWait = "barrier.cluster.wait";

struct ClusterBarrier {
  uint32_t phases;               // that are over
  int live, arrived;             // threads that have not ended; those of them that are in the running phase
  Knowledge arriving, complete;  // of the phase that runs; of those that are over
} barrier;

void end_phase_if_complete() {
  if (barrier.arrived < barrier.live) return;
  ++barrier.phases;
  barrier.arrived = 0;
  barrier.complete = barrier.arriving;
  for (int slot = 0; slot < slot_count(); ++slot) {
    Thread& t = thread_of_slot(slot);
    if (t.state == State::waiting && t.operation == kClusterWait) wake(t);
  }
}

}  // namespace

void start_cluster() { barrier = {0, slot_count(), 0, {}, {}}; }

// Threads that have ended count as arrived.
void thread_left_cluster(Thread& t) {
  --barrier.live;
  if (t.cluster_arrivals > barrier.phases) --barrier.arrived;
  if (barrier.live) end_phase_if_complete();
}

void visit(Thread& t, Block& host, const void* pc) {
  if (host.has_ended)
    found("visit" + place(pc),
          format("%s uses shared memory of block %d of the cluster at %s, but that block has ended",
                 name_of(t).c_str(), host.rank, place(pc).c_str()),
          After::stop);
  const auto begin = t.knows.begin() + std::min<size_t>(t.knows.size(), host.rank * thread_count);
  const auto end = t.knows.begin() + std::min<size_t>(t.knows.size(), (host.rank + 1) * thread_count);
  if (std::all_of(begin, end, [](uint32_t clock) { return clock == 0; }))
    found(
        "begin" + place(pc),
        format("%s uses shared memory of block %d of the cluster at %s, but nothing says that the block has "
               "begun: a cluster_sync must come first",
               name_of(t).c_str(), host.rank, place(pc).c_str()));
  host.visits.resize(slot_count());
  host.visits[t.slot] = {t.clock, pc};
}

// Of the block that ends: its threads must know that all visitors are done.
void finish_visits() {
  Knowledge together;
  for (int i = 0; i < thread_count; ++i) learn(together, threads[i].knows);
  together.resize(slot_count());
  for (size_t slot = 0; slot < block->visits.size(); ++slot) {
    const Visit& last = block->visits[slot];
    if (last.clock <= together[slot]) continue;
    found("exit" + place(last.pc),
          format("block %d of the cluster ends while %s of block %d may use its shared memory at %s: nothing "
                 "orders the two",
                 block->rank, name_of(thread_of_slot(static_cast<int>(slot))).c_str(),
                 static_cast<int>(slot) / thread_count, place(last.pc).c_str()));
  }
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

int cluster_rank() { return block->rank; }
int cluster_size() { return blocks_in_cluster; }

void cluster_arrive(Site site) {
  Thread& t = *current;
  if (t.cluster_arrivals != t.cluster_waits)
    found("cluster" + place(site),
          name_of(t) + " arrives at the cluster's barrier again, at " + place(site) + ", without a wait",
          After::stop);
  ++t.cluster_arrivals;
  ++barrier.arrived;
  publish(barrier.arriving, t);
  end_phase_if_complete();
}

void cluster_wait(Site site) {
  Thread& t = *current;
  if (t.cluster_waits == t.cluster_arrivals)
    found("cluster" + place(site),
          name_of(t) + " waits at the cluster's barrier, at " + place(site) + ", without having arrived",
          After::stop);
  ++t.cluster_waits;
  if (barrier.phases < t.cluster_waits) {
    t.operation = kClusterWait;
    t.site = site;
    t.mbarrier = nullptr;
    wait_as(State::waiting);
  }
  learn(t.knows, barrier.complete);
}

void* cluster_address(const void* p, int rank) {
  const void* pc = __builtin_return_address(0);
  if (!is_shared(p) || rank < 0 || rank >= blocks_in_cluster)
    found("mapa" + place(pc),
          format("mapa at %s needs an address in the block's shared memory and the number of a block of the "
                 "cluster (%d of %d)",
                 place(pc).c_str(), rank, blocks_in_cluster),
          After::stop);
  return const_cast<unsigned char*>(in_block(static_cast<const unsigned char*>(p), rank));
}

}  // namespace fastconv
