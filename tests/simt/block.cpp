// SPDX-License-Identifier: MIT
// Launches a grid: cluster after cluster, the threads of its blocks as fibers. A thread runs until it waits
// for others, so it is interrupted only where it synchronises; Options::order says who is next. When no
// thread can run, blocks whose threads all stand at one __syncthreads go on; when there are none, the copy
// engine makes progress; when that has nothing to do either, it is a deadlock.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

#include "check.h"
#include "memory.h"
#include "report.h"
#include "statistics.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastconv::simt {

Block blocks[kMaxCluster];
int blocks_in_cluster = 1, thread_count, warp_count;
Block* block;
Thread* threads;
Warp* warps;
uint32_t block_serial, epoch;
Thread* current;
bool aborting;
Options options;
bool watching = true;
Launch current_launch;

namespace {

Fiber scheduler;
std::mt19937 random_source;
Thread all_threads[kMaxCluster][kMaxThreads];
Warp all_warps[kMaxCluster][kMaxWarps];
uint32_t serials;

void run_thread() {
  current_launch.call(current_launch.params);
  finish_cp_async(*current);
  finish_bulk_stores(*current);
  current->state = State::done;
  switch_to(current->fiber, scheduler);
}

void resume(Thread& t) {
  if (t.stack < 0) {
    t.stack = take_stack();
    t.stack_begin = reinterpret_cast<uintptr_t>(stack_bottom(t.stack));
    prepare(t.fiber, t.stack, run_thread);
  }
  current = &t;
  threadIdx = t.index;
  switch_to(scheduler, t.fiber);
  current = nullptr;
  if (aborting || t.state != State::done) return;
  give_back_stack(t.stack);
  t.stack = -1;
  Warp& warp = warps[t.warp];
  warp.live &= ~(1u << t.lane);
  warp.ready &= ~(1u << t.lane);
  lane_ended(warp, &threads[t.warp * kWarp]);
  thread_left_cluster(t);
}

int pick_lane(unsigned ready) {
  if (options.order == Order::forward) return __builtin_ctz(ready);
  if (options.order == Order::reverse) return 31 - __builtin_clz(ready);
  for (int skip = random_source() % __builtin_popcount(ready); skip > 0; --skip) ready &= ready - 1;
  return __builtin_ctz(ready);
}

// The numbers 0 .. count - 1 in the order of the options.
template <class T>
std::vector<T> ordered(T count) {
  std::vector<T> numbers(count);
  std::iota(numbers.begin(), numbers.end(), T(0));
  if (options.order == Order::reverse) std::reverse(numbers.begin(), numbers.end());
  if (options.order == Order::random) std::shuffle(numbers.begin(), numbers.end(), random_source);
  return numbers;
}

void start_block(int rank, uint3 index) {
  Block& b = blocks[rank];
  b = {rank, index, ++serials, 1, all_threads[rank], all_warps[rank], 0, false, {}};
  enter(b);
  for (int w = 0; w < warp_count; ++w) {
    const int lanes = std::min(kWarp, thread_count - w * kWarp);
    warps[w] = {~0u >> (kWarp - lanes), ~0u >> (kWarp - lanes), 0};
  }
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.state = State::ready;
    t.number = static_cast<uint16_t>(i), t.slot = static_cast<uint16_t>(rank * thread_count + i);
    t.lane = i % kWarp, t.warp = static_cast<uint8_t>(i / kWarp), t.rank = static_cast<uint8_t>(rank);
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    t.stack = -1;
    t.stack_begin = 0;
    t.clock = 1;
    t.knows.clear();
    t.proxy_fences = 0;
    t.copies.clear();
    t.stores.clear();
    t.accumulators.clear();
    t.cluster_arrivals = t.cluster_waits = 0;
  }
}

// Ends the block that runs, if its threads have.
void end_block_if_done() {
  const auto is_done = [](const Thread& t) { return t.state == State::done; };
  if (block->has_ended || !std::all_of(threads, threads + thread_count, is_done)) return;
  finish_visits();
  finish_bulk_copies();
  finish_warpgroups();
  block->has_ended = true;
}

// Runs every warp until its lanes wait. False if none could run.
bool run_ready_threads() {
  bool ran = false;
  for (const int w : ordered(warp_count)) {
    while (warps[w].ready) {
      ran = true;
      resume(threads[w * kWarp + pick_lane(warps[w].ready)]);
      if (aborting) return true;
    }
    if (options.statistics) close_requests(w);
  }
  return ran;
}

bool is_same_place(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// Every thread stands at a __syncthreads, or is done.
void complete_block_barrier() {
  const auto last = threads + thread_count;
  const auto in_state = [](State state) { return [state](const Thread& t) { return t.state == state; }; };
  const Thread& first = *std::find_if(threads, last, in_state(State::at_block_barrier));
  const auto is_elsewhere = [&](const Thread& t) {
    return t.state == State::at_block_barrier && !is_same_place(t.site, first.site);
  };
  if (std::any_of(threads, last, is_elsewhere))
    return found("divergence", "threads of one block wait at different barriers: " + who_waits_where(),
                 After::stop);
  const int waiting = static_cast<int>(std::count_if(threads, last, in_state(State::at_block_barrier)));
  if (waiting < thread_count)
    found("ended" + place(first.site),
          "some threads ended before a barrier of the block: " + who_waits_where());

  block->reduced = static_cast<int>(std::count_if(
      threads, last, [](const Thread& t) { return t.state == State::at_block_barrier && t.mask; }));
  Knowledge together;  // beyond the block; of the block itself, the epoch says it all
  if (blocks_in_cluster > 1 || has_mbarriers())
    for (Thread* t = threads; t != last; ++t) publish(together, *t);
  epoch = ++block->epoch;
  for (Thread* t = threads; t != last; ++t)
    if (t->state == State::at_block_barrier) {
      t->knows = together;
      t->mask = waiting;
      wake(*t);
    }
}

// Lets those blocks go on whose threads all stand at a __syncthreads, or are done. False if there are none.
bool complete_block_barriers() {
  const auto waits_for_more_than_the_block = [](const Thread& t) {
    return t.state != State::at_block_barrier && t.state != State::done;
  };
  bool completed = false;
  for (int rank = 0; rank < blocks_in_cluster && !aborting; ++rank) {
    enter(blocks[rank]);
    if (block->has_ended || std::any_of(threads, threads + thread_count, waits_for_more_than_the_block))
      continue;
    complete_block_barrier();
    completed = true;
  }
  return completed;
}

void run_cluster(uint64_t first) {
  for (int rank = 0; rank < blocks_in_cluster; ++rank) {
    const uint64_t i = first + static_cast<uint64_t>(rank);
    start_block(rank, {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                       static_cast<unsigned>(i / gridDim.x / gridDim.y)});
  }
  spoil_shared_arrays();
  start_barriers();
  start_warpgroups();
  start_bulk_copies();
  start_cluster();
  while (!aborting) {
    bool ran = false, has_ended = true;
    for (const int rank : ordered(blocks_in_cluster)) {
      enter(blocks[rank]);
      ran = run_ready_threads() || ran;
      if (aborting) return;
      end_block_if_done();
      has_ended = has_ended && block->has_ended;
    }
    if (has_ended) return;
    if (ran || complete_block_barriers() || aborting) continue;
    if (!complete_one_copy()) found("deadlock", "deadlock: " + who_waits_where(), After::stop);
  }
}

void check_configuration(const Launch& l) {
  const dim3 &g = l.grid.blocks, &b = l.block;
  const unsigned cluster = l.grid.cluster;
  const bool is_fine = g.x > 0 && g.y > 0 && g.z > 0 && g.x < 1u << 31 && g.y < 1 << 16 && g.z < 1 << 16 &&
                       b.x > 0 && b.y > 0 && b.z > 0 && b.x <= kMaxThreads && b.y <= kMaxThreads &&
                       b.z <= 64 && static_cast<uint64_t>(b.x) * b.y * b.z <= kMaxThreads && cluster > 0 &&
                       cluster <= kMaxCluster && g.x % cluster == 0 && l.shared_bytes <= kMaxShared;
  FASTCONV_CHECK(is_fine, "invalid launch: grid (", g.x, ", ", g.y, ", ", g.z, "), clusters of ", cluster,
                 ", block (", b.x, ", ", b.y, ", ", b.z, "), ", l.shared_bytes, " bytes of shared memory");
}

}  // namespace

void enter(Block& b) {
  block = &b;
  threads = b.threads;
  warps = b.warps;
  block_serial = b.serial;
  epoch = b.epoch;
  blockIdx = b.index;
  arena = arenas + b.rank * kArenaBytes;
}

Thread& thread_of_slot(int slot) { return all_threads[slot / thread_count][slot % thread_count]; }

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_configuration(launch);
  const int findings_before = findings();
  forget_accesses();
  give_back_all_stacks();
  current_launch = launch;
  if (options.statistics) count_launch();
  gridDim = launch.grid.blocks, blockDim = launch.block;
  aborting = false;
  random_source.seed(options.seed);

  thread_count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  warp_count = (thread_count + kWarp - 1) / kWarp;
  blocks_in_cluster = static_cast<int>(launch.grid.cluster);
  open_arenas();
  const uint64_t block_count = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  for (const uint64_t i : ordered(block_count / launch.grid.cluster)) {
    run_cluster(i * launch.grid.cluster);
    if (aborting) break;
  }
  forget_shared_arrays();
  current_launch = {};
  if (findings() > findings_before) throw Error(report());
}

void wait_as(State state) {
  current->state = state;
  warps[current->warp].ready &= ~(1u << current->lane);
  switch_to(current->fiber, scheduler);
}

void wake(Thread& t) {
  t.state = State::ready;
  blocks[t.rank].warps[t.warp].ready |= 1u << t.lane;
}

void abandon_thread() {
  switch_to(current->fiber, scheduler);
  __builtin_unreachable();
}

std::string who_waits_where() {
  std::map<std::string, int> places;
  for (int slot = 0; slot < slot_count(); ++slot) {
    const Thread& t = thread_of_slot(slot);
    ++places[t.state == State::done ? "ended" : std::string("in ") + t.operation + " at " + place(t.site)];
  }
  std::string text;
  for (const auto& [where, count] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + where;
  return text;
}

void sync_block(Site site) {
  current->operation = "__syncthreads";
  current->site = site;
  current->mask = 0;
  wait_as(State::at_block_barrier);
}

int sync_block_reduce(int predicate, Reduce reduce, Site site) {
  current->operation = "a reducing __syncthreads";
  current->site = site;
  current->mask = predicate != 0;
  wait_as(State::at_block_barrier);
  const int all = static_cast<int>(current->mask);
  const int reduced = block->reduced;
  return reduce == Reduce::count ? reduced : reduce == Reduce::all ? reduced == all : reduced > 0;
}

}  // namespace fastconv::simt
