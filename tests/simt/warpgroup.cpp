// SPDX-License-Identifier: MIT
// What the four warps of a warpgroup do together: wgmma and setmaxnreg.
//
// wgmma is issued on descriptors of shared memory. Its operands are checked when it is issued and held until
// it is waited for; they are read, and the sums written, only then. Until then the accumulators are NaN, and
// touching them is a finding. Several wgmma may follow each other on one accumulator. Sums are float32 in
// order of k.
//
// setmaxnreg: a launch gives every thread as many registers as fit when one block has the multiprocessor for
// itself. What a warpgroup gives back others can take; who finds too few waits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "check.h"
#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"

namespace fastconv::simt {

namespace {

constexpr int kGroup = 128, kGroups = kMaxThreads / kGroup, kRowBytes = 32;  // of an operand, along k

struct Accumulator {
  float* d[kGroup];  // in each thread
  int count;         // elements of a thread
  std::vector<float> values;
  int in_flight;  // wgmma that were issued on it and not waited for
};

struct Wgmma {
  WgmmaType type;
  uint64_t a, b;  // descriptors
  int n;
  bool add;
  std::shared_ptr<Accumulator> accumulator;
  const void* pc;
};

struct WarpGroup {
  int arrived = 0;
  bool is_fenced = false;
  Groups<Wgmma> wgmma;
  int registers = 0;  // of each thread
  int wanted = 0;     // in setmaxnreg.inc, waiting for them
};
WarpGroup warp_groups[kMaxCluster][kGroups];
int free_registers[kMaxCluster];

struct WgmmaOperands {
  float* d;
  uint64_t a, b;
  bool add;
};

// The 128 threads of a warpgroup meet; the last to arrive does the work. Where that returns false, all wait
// on.
template <class F>
void meet_as_group(const char* operation, Site site, void* operands, F&& work) {
  Thread& t = *current;
  Thread* base = &threads[t.number / kGroup * kGroup];
  WarpGroup& group = warp_groups[block->rank][t.number / kGroup];
  t.operation = operation;
  t.site = site;
  t.operands = operands;
  t.mbarrier = nullptr;
  if (++group.arrived < kGroup) return wait_as(State::waiting);
  group.arrived = 0;
  for (int i = 0; i < kGroup; ++i)
    if (strcmp(base[i].operation, operation) != 0 || base[i].site.line != site.line)
      found("warpgroup" + place(site),
            std::string("threads of a warpgroup meet in different operations: ") + operation + " at " +
                place(site) + ", " + base[i].operation + " at " + place(base[i].site),
            After::stop);
  if (!work(group, base)) return wait_as(State::waiting);
  for (int i = 0; i < kGroup; ++i)
    if (&base[i] != &t) wake(base[i]);
}

// --- wgmma

size_t start_of(uint64_t operand) { return (operand & 0x3fff) << 4; }
size_t leading_of(uint64_t operand) { return (operand >> 16 & 0x3fff) << 4; }
size_t stride_of(uint64_t operand) { return (operand >> 32 & 0x3fff) << 4; }
Swizzle swizzle_of(uint64_t operand) { return static_cast<Swizzle>(operand >> 62); }

// Address of the 16-byte chunk c (0 or 1, along k) of a row of an operand.
unsigned char* chunk_address(uint64_t operand, int row, int c) {
  const int width = swizzle_bytes(swizzle_of(operand));
  size_t at = start_of(operand) + row / 8 * stride_of(operand) + row % 8 * width;
  if (swizzle_of(operand) == Swizzle::none) return arena + kDynamicBase + at + c * leading_of(operand);
  at += c * 16;
  return arena + kDynamicBase + (at ^ (at >> 7 & (width / 16 - 1)) << 4);
}

template <class F>
void for_chunks(uint64_t operand, int rows, F&& f) {
  for (int row = 0; row < rows; ++row)
    for (int c = 0; c < 2; ++c) f(chunk_address(operand, row, c));
}

void check_operand(Thread& t, uint64_t operand, int rows, const void* pc) {
  const size_t width = swizzle_bytes(swizzle_of(operand));
  if (width > 16 && (start_of(operand) % (8 * width) >= width || stride_of(operand) % (8 * width)))
    found(
        "wgmma swizzle" + place(pc),
        format("wgmma at %s of an operand whose rows, swizzled over %zu bytes, do not begin at a multiple of "
               "%zu bytes",
               place(pc).c_str(), width, 8 * width),
        After::stop);
  for_chunks(operand, rows, [&](unsigned char* chunk) {
    check_access(t, chunk, 16, Kind::read, pc);
    check_proxy(chunk, 16, "wgmma", pc);
  });
}

// The rows of an operand, each of kRowBytes bytes, as numbers.
std::vector<float> read_operand(uint64_t operand, int rows, WgmmaType type) {
  std::vector<float> values;
  for_chunks(operand, rows, [&](const unsigned char* chunk) {
    uint32_t words[4];
    memcpy(words, chunk, 16);
    for (const uint32_t word : words) {
      const auto low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
      if (type == WgmmaType::tf32)  // the unit ignores the low 13 bits
        values.push_back(bit_cast<float>(word & 0xffffe000u));
      else if (type == WgmmaType::f16)
        values.insert(values.end(), {bit_cast<Half>(low), bit_cast<Half>(high)});
      else
        values.insert(values.end(), {bit_cast<BFloat16>(low), bit_cast<BFloat16>(high)});
    }
  });
  return values;
}

// Element e of the accumulator of thread t of the group: its row and column in d[64][n].
int row_of(int t, int e) { return t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8; }
int column_of(int t, int e) { return e / 4 * 8 + t % 4 * 2 + e % 2; }

void for_operands(const Wgmma& w, bool held) {
  for_chunks(w.a, 64, [&](unsigned char* chunk) { hold(chunk, 16, held); });
  for_chunks(w.b, w.n, [&](unsigned char* chunk) { hold(chunk, 16, held); });
}

void retire(const Wgmma& w, Thread* base) {
  check_operand(*base, w.a, 64, w.pc);
  check_operand(*base, w.b, w.n, w.pc);
  for_operands(w, false);
  const int depth = w.type == WgmmaType::tf32 ? kRowBytes / 4 : kRowBytes / 2;
  const std::vector<float> a = read_operand(w.a, 64, w.type), b = read_operand(w.b, w.n, w.type);
  Accumulator& accumulator = *w.accumulator;
  const int count = accumulator.count;
  for (int t = 0; t < kGroup; ++t)
    for (int e = 0; e < count; ++e) {
      float& sum = accumulator.values[t * count + e];
      if (!w.add) sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row_of(t, e) * depth + k] * b[column_of(t, e) * depth + k];
    }
  if (--accumulator.in_flight) return;
  for (int t = 0; t < kGroup; ++t) {
    std::copy_n(&accumulator.values[t * count], count, accumulator.d[t]);
    const auto begin = reinterpret_cast<uintptr_t>(accumulator.d[t]);
    auto& ranges = base[t].accumulators;
    ranges.erase(
        std::find_if(ranges.begin(), ranges.end(), [&](const Range& r) { return r.begin == begin; }));
  }
}

// That of the newest wgmma in flight on the same registers, or a new one.
std::shared_ptr<Accumulator> accumulator_of(WarpGroup& group, Thread* base, int count, const void* pc) {
  const auto d = [&](int t) { return static_cast<WgmmaOperands*>(base[t].operands)->d; };
  for (const Wgmma& w : group.wgmma.issued) {
    bool is_same = w.accumulator->in_flight > 0 && w.accumulator->count == count;
    for (int t = 0; t < kGroup; ++t) is_same = is_same && w.accumulator->d[t] == d(t);
    if (is_same) return w.accumulator;
  }
  auto made = std::make_shared<Accumulator>();
  made->count = count;
  made->in_flight = 0;
  for (int t = 0; t < kGroup; ++t) {
    made->d[t] = d(t);
    made->values.insert(made->values.end(), d(t), d(t) + count);
    std::fill_n(d(t), count, NAN);
    const auto begin = reinterpret_cast<uintptr_t>(d(t));
    base[t].accumulators.push_back({begin, begin + count * sizeof(float), pc});
  }
  return made;
}

}  // namespace

void start_warpgroups() {
  const int each = std::min(256, kMaxRegisters / thread_count / 8 * 8);
  for (int rank = 0; rank < blocks_in_cluster; ++rank) {
    free_registers[rank] = 0;
    for (WarpGroup& group : warp_groups[rank]) {
      group = WarpGroup();
      group.registers = each;
    }
  }
}

void finish_warpgroups() {
  for (const WarpGroup& group : warp_groups[block->rank])
    if (!group.wgmma.issued.empty())
      found("wgmma end", "the block ends while the wgmma issued at " + place(group.wgmma.issued[0].pc) +
                             " is outstanding");
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

uint64_t wgmma_operand(const void* p, int leading, int stride, Swizzle swizzle) {
  const void* pc = __builtin_return_address(0);
  const auto address = static_cast<size_t>(static_cast<const unsigned char*>(p) - arena) - kDynamicBase;
  if (!is_shared(p) || address > 0x3ffff || (address | leading | stride) % 16)
    found(
        "operand" + place(pc),
        "wgmma_operand at " + place(pc) +
            " needs dynamic shared memory of the block, and an address and strides that are multiples of 16",
        After::stop);
  return static_cast<uint64_t>(address) >> 4 | static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

void wgmma_fence(Site site) {
  meet_as_group("wgmma.fence", site, nullptr,
                [](WarpGroup& group, Thread*) { return group.is_fenced = true; });
}

void wgmma_commit(Site site) {
  meet_as_group("wgmma.commit_group", site, nullptr, [](WarpGroup& group, Thread*) {
    group.wgmma.commit();
    return true;
  });
}

void wgmma_wait_groups(int newest, Site site) {
  meet_as_group("wgmma.wait_group", site, nullptr, [&](WarpGroup& group, Thread* base) {
    group.wgmma.wait(newest, [&](const Wgmma& w) { retire(w, base); });
    group.is_fenced = false;
    return true;
  });
}

void issue_wgmma(WgmmaType type, float* d, int count, uint64_t a, uint64_t b, bool add, Site site) {
  const void* pc = __builtin_return_address(0);
  WgmmaOperands operands{d, a, b, add};
  meet_as_group("wgmma.mma_async", site, &operands, [&](WarpGroup& group, Thread* base) {
    if (!group.is_fenced)
      found("wgmma fence" + place(pc), "wgmma at " + place(pc) + " without a wgmma_fence before it");
    for (int t = 0; t < kGroup; ++t) {
      const auto& o = *static_cast<WgmmaOperands*>(base[t].operands);
      if (o.a != a || o.b != b || o.add != add)
        found("wgmma operands" + place(pc),
              "threads of a warpgroup give different operands to wgmma at " + place(pc), After::stop);
    }
    Wgmma w{type, a, b, 2 * count, add, accumulator_of(group, base, count, pc), pc};
    check_operand(*base, a, 64, pc);
    check_operand(*base, b, w.n, pc);
    for_operands(w, true);
    ++w.accumulator->in_flight;
    group.wgmma.issue(std::move(w));
    return true;
  });
}

void set_registers(int count, bool more, Site site) {
  const char* name = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  if (count % 8 || count < 24 || count > 256)
    found("registers" + place(site),
          format("%s of %d at %s: the number is a multiple of 8 from 24 to 256", name, count,
                 place(site).c_str()),
          After::stop);
  // Registers for all who wait, as far as there are enough.
  const auto hand_out = [](WarpGroup* groups) {
    for (int i = 0; i < kGroups; ++i) {
      WarpGroup& group = groups[i];
      const int missing = (group.wanted - group.registers) * kGroup;
      if (!group.wanted || missing > free_registers[block->rank]) continue;
      free_registers[block->rank] -= missing;
      group.registers = std::exchange(group.wanted, 0);
      for (int t = 0; t < kGroup; ++t)
        if (&threads[i * kGroup + t] != current) wake(threads[i * kGroup + t]);
    }
  };
  meet_as_group(name, site, nullptr, [&](WarpGroup& group, Thread*) {
    if (more ? count < group.registers : count > group.registers)
      found("registers" + place(site),
            format("%s to %d registers at %s, from %d", name, count, place(site).c_str(), group.registers),
            After::stop);
    WarpGroup* groups = warp_groups[block->rank];
    if (more) {
      group.wanted = count;
      hand_out(groups);
      return group.wanted == 0;
    }
    free_registers[block->rank] += (group.registers - count) * kGroup;
    group.registers = count;
    hand_out(groups);
    return true;
  });
}

}  // namespace fastconv
