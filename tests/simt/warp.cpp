// SPDX-License-Identifier: MIT
// Warp collectives: the live lanes of a mask meet at one place in the source, and the last to arrive does the
// work of all. Only __syncwarp orders memory.
#include "report.h"
#include "runtime.h"

namespace fastconv::simt {

namespace {

// Whether `lanes`, which have met, are in one and the same collective.
void require_agreement(const Thread* warp, unsigned lanes) {
  const Thread& first = warp[__builtin_ctz(lanes)];
  for_lanes(lanes, [&](int l) {
    const Thread& other = warp[l];
    if (other.combine == first.combine && other.site.line == first.site.line) return;
    found("collective" + place(first.site),
          format("lanes of one warp meet in different collectives: %s at %s, %s at %s, both with mask %08x",
                 first.operation, place(first.site).c_str(), other.operation, place(other.site).c_str(),
                 first.mask),
          After::stop);
  });
}

// The lanes of lane l's collective, if all of them have come; those that wait with another mask have not.
unsigned met_with(const Warp& warp, const Thread* lanes, int l) {
  const unsigned expected = lanes[l].mask & warp.live;
  unsigned here = 0;
  for_lanes(warp.waiting, [&](int other) { here |= unsigned(lanes[other].mask == lanes[l].mask) << other; });
  return (here & expected) == expected ? expected : 0;
}

void complete(Warp& warp, Thread* lanes, unsigned met) {
  require_agreement(lanes, met);
  if (aborting) return;
  lanes[__builtin_ctz(met)].combine(lanes, met);
  if (aborting) return;
  warp.waiting &= ~met;
  for_lanes(met, [&](int l) {
    if (&lanes[l] != current) wake(lanes[l]);
  });
}

struct ShuffleOperands {
  uint64_t value, result;
  int argument, width;
  Shuffle kind;
};

int source_lane(const ShuffleOperands& o, int lane) {
  const int first = lane & ~(o.width - 1), last = first + o.width - 1;
  switch (o.kind) {
    case Shuffle::index:
      return first + (o.argument & (o.width - 1));
    case Shuffle::up:
      return lane - o.argument < first ? lane : lane - o.argument;
    case Shuffle::down:
      return lane + o.argument > last ? lane : lane + o.argument;
    case Shuffle::xor_:
      return (lane ^ o.argument) > last ? lane : lane ^ o.argument;
  }
  return lane;
}

void combine_shuffle(Thread* warp, unsigned lanes) {
  for_lanes(lanes, [&](int l) {
    auto& mine = *static_cast<ShuffleOperands*>(warp[l].operands);
    const int source = source_lane(mine, l);
    if (lanes >> source & 1) {
      mine.result = static_cast<ShuffleOperands*>(warp[source].operands)->value;
      return;
    }
    mine.result = ~0ull;
    found("shuffle" + place(warp[l].site),
          format("%s at %s: lane %d reads lane %d, which does not take part (mask %08x)", warp[l].operation,
                 place(warp[l].site).c_str(), l, source, lanes));
  });
}

struct BallotOperands {
  bool predicate;
  unsigned result;
};

void combine_ballot(Thread* warp, unsigned lanes) {
  unsigned votes = 0;
  for_lanes(lanes, [&](int l) {
    votes |= unsigned(static_cast<BallotOperands*>(warp[l].operands)->predicate) << l;
  });
  for_lanes(lanes, [&](int l) { static_cast<BallotOperands*>(warp[l].operands)->result = votes; });
}

void combine_syncwarp(Thread* warp, unsigned lanes) {
  Knowledge together;
  for_lanes(lanes, [&](int l) { publish(together, warp[l]); });
  for_lanes(lanes, [&](int l) { learn(warp[l].knows, together); });
}

}  // namespace

void meet(unsigned mask, const char* operation, Site site, void* operands,
          void (*combine)(Thread*, unsigned)) {
  Thread& t = *current;
  Warp& warp = warps[t.warp];
  t.operation = operation;
  t.site = site;
  t.mask = mask;
  t.operands = operands;
  t.combine = combine;
  if (!(mask >> t.lane & 1))
    found("mask" + place(site),
          format("%s calls %s at %s with a mask, %08x, that leaves it out", name_of(t).c_str(), operation,
                 place(site).c_str(), mask),
          After::stop);
  warp.waiting |= 1u << t.lane;
  Thread* lanes = &threads[t.warp * kWarp];
  if (const unsigned met = met_with(warp, lanes, t.lane))
    complete(warp, lanes, met);
  else
    wait_as(State::in_warp_collective);
}

void lane_ended(Warp& warp, Thread* lanes) {
  for (unsigned left = warp.waiting; left && !aborting; left &= warp.waiting & (left - 1)) {
    if (const unsigned met = met_with(warp, lanes, __builtin_ctz(left))) complete(warp, lanes, met);
  }
}

void require_full_warp(Thread* warp, unsigned lanes) {
  const Thread& t = warp[__builtin_ctz(lanes)];
  if (lanes != ~0u)
    found("full warp" + place(t.site),
          format("%s at %s needs a full warp, but lanes %08x take part", t.operation, place(t.site).c_str(),
                 lanes),
          After::stop);
}

void sync_warp(unsigned mask, Site site) { meet(mask, "__syncwarp", site, nullptr, combine_syncwarp); }

uint64_t shuffle(unsigned mask, uint64_t value, int argument, int width, Shuffle kind, Site site) {
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  ShuffleOperands operands{value, value, argument, width, kind};
  meet(mask, kNames[static_cast<int>(kind)], site, &operands, combine_shuffle);
  return operands.result;
}

unsigned ballot(unsigned mask, int predicate, Site site) {
  BallotOperands operands{predicate != 0, 0};
  meet(mask, "a warp vote", site, &operands, combine_ballot);
  return operands.result;
}

}  // namespace fastconv::simt
