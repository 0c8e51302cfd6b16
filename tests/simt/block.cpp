// SPDX-License-Identifier: MIT
// Launches a grid: block after block, the threads of a block as fibers. A thread runs until it waits for
// others, so it is interrupted only where it synchronises; Options::order says who is next. When no thread
// can run, the copy engine makes progress; when that has nothing to do either, all threads must stand at one
// __syncthreads.
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

Thread threads[kMaxThreads];
Warp warps[kMaxWarps];
int thread_count, warp_count;
Thread* current;
uint32_t block_serial, epoch;
bool aborting;
Options options;
bool watching = true;
Launch current_launch;

namespace {

Fiber scheduler;
std::mt19937 random_source;
int reduced;  // the result of the __syncthreads_count, _and or _or that was completed last

void run_thread() {
  current_launch.call(current_launch.params);
  finish_thread_copies(*current);
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

void start_block() {
  ++block_serial;
  epoch = 1;
  spoil_shared_arrays();
  start_barriers();
  start_tensor_cores();
  start_copies();
  for (int w = 0; w < warp_count; ++w) {
    const int lanes = std::min(kWarp, thread_count - w * kWarp);
    warps[w] = {~0u >> (kWarp - lanes), ~0u >> (kWarp - lanes), 0};
  }
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.state = State::ready;
    t.stack = -1;
    t.stack_begin = 0;
    t.clock = 1;
    t.knows.clear();
    t.proxy_fences = 0;
    t.copies.clear();
    t.groups.clear();
    t.uncommitted = 0;
  }
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

  reduced = static_cast<int>(std::count_if(
      threads, last, [](const Thread& t) { return t.state == State::at_block_barrier && t.mask; }));
  ++epoch;
  for (Thread* t = threads; t != last; ++t)
    if (t->state == State::at_block_barrier) {
      t->knows.clear();  // the epoch says it all
      t->mask = waiting;
      wake(*t);
    }
}

// No thread can run. A copy lands only where nothing else helps.
void make_progress() {
  const auto waits_for_more_than_the_block = [](const Thread& t) {
    return t.state != State::at_block_barrier && t.state != State::done;
  };
  if (!std::any_of(threads, threads + thread_count, waits_for_more_than_the_block))
    return complete_block_barrier();
  if (!complete_one_copy()) found("deadlock", "deadlock: " + who_waits_where(), After::stop);
}

void run_block() {
  const auto is_done = [](const Thread& t) { return t.state == State::done; };
  start_block();
  while (!aborting) {
    if (run_ready_threads()) continue;
    if (std::all_of(threads, threads + thread_count, is_done)) break;
    make_progress();
  }
  if (aborting) return;
  finish_copies();
  finish_tensor_cores();
}

void check_configuration(const Launch& l) {
  const dim3 &g = l.grid, &b = l.block;
  const bool is_fine = g.x > 0 && g.y > 0 && g.z > 0 && g.x < 1u << 31 && g.y < 1 << 16 && g.z < 1 << 16 &&
                       b.x > 0 && b.y > 0 && b.z > 0 && b.x <= kMaxThreads && b.y <= kMaxThreads &&
                       b.z <= 64 && static_cast<uint64_t>(b.x) * b.y * b.z <= kMaxThreads &&
                       l.shared_bytes <= kMaxShared;
  FASTCONV_CHECK(is_fine, "invalid launch: grid (", g.x, ", ", g.y, ", ", g.z, "), block (", b.x, ", ", b.y,
                 ", ", b.z, "), ", l.shared_bytes, " bytes of shared memory");
}

}  // namespace

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_configuration(launch);
  const int findings_before = findings();
  open_arena();
  forget_accesses();
  give_back_all_stacks();
  current_launch = launch;
  gridDim = launch.grid, blockDim = launch.block;
  aborting = false;
  random_source.seed(options.seed);

  const dim3 &g = launch.grid, &b = launch.block;
  thread_count = static_cast<int>(b.x * b.y * b.z);
  warp_count = (thread_count + kWarp - 1) / kWarp;
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.number = static_cast<uint16_t>(i), t.lane = i % kWarp, t.warp = static_cast<uint8_t>(i / kWarp);
    t.index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
  }
  for (const uint64_t i : ordered(static_cast<uint64_t>(g.x) * g.y * g.z)) {
    blockIdx = {static_cast<unsigned>(i % g.x), static_cast<unsigned>(i / g.x % g.y),
                static_cast<unsigned>(i / g.x / g.y)};
    run_block();
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
  warps[t.warp].ready |= 1u << t.lane;
}

void abandon_thread() {
  switch_to(current->fiber, scheduler);
  __builtin_unreachable();
}

std::string who_waits_where() {
  std::map<std::string, int> places;
  for (int i = 0; i < thread_count; ++i) {
    const Thread& t = threads[i];
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
  return reduce == Reduce::count ? reduced : reduce == Reduce::all ? reduced == all : reduced > 0;
}

}  // namespace fastconv::simt
