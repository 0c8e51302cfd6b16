// SPDX-License-Identifier: MIT
// Matrix instructions. Sums are float32 in order of k; the hardware's order and rounding differ, within the
// usual bound.
//
// mma.sync: a warp works at once on registers. wgmma: the four warps of a warpgroup issue one instruction on
// descriptors of shared memory. Its operands are checked when it is issued and again when it is waited for;
// they are read, and the sums written, only then, and the accumulators are NaN until then. Several wgmma may
// follow each other on one accumulator.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>

#include "check.h"
#include "core/dtype.h"
#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"
#include "runtime.h"

namespace fastconv::simt {

namespace {

// --- ldmatrix

struct LdmatrixOperands {
  const unsigned char* row;
  uint32_t* r;
  const void* pc;
};

// Register m of lane l: elements (l / 4, 2 * (l % 4)) and the next of matrix m, or of its transpose.
template <bool Transpose>
void combine_ldmatrix(Thread* warp, unsigned lanes) {
  require_full_warp(warp, lanes);
  if (aborting) return;
  const auto operands = [&](int lane) { return static_cast<LdmatrixOperands*>(warp[lane].operands); };
  for (int l = 0; l < kWarp; ++l) check_access(warp[l], operands(l)->row, 16, Kind::read, operands(l)->pc);
  for (int l = 0; l < kWarp; ++l)
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = Transpose ? 2 * (l % 4) + i : l / 4, column = Transpose ? l / 4 : 2 * (l % 4) + i;
        memcpy(&pair[i], operands(8 * m + row)->row + 2 * column, 2);
      }
      memcpy(&operands(l)->r[m], pair, 4);
    }
}

void ldmatrix(uint32_t* r, const void* row, const char* name, void (*combine)(Thread*, unsigned), Site site,
              const void* pc) {
  if (!is_shared(row) || reinterpret_cast<uintptr_t>(row) % 16)
    found("ldmatrix" + place(pc),
          "ldmatrix at " + place(pc) + " of a row that is misaligned or not in shared memory", After::stop);
  LdmatrixOperands operands{static_cast<const unsigned char*>(row), r, pc};
  meet(~0u, name, site, &operands, combine);
}

// --- mma

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Where the registers of lane l stand in the operands: d (and c) [16][8], a [16][K], b [K][8]. A register of
// a or b holds one TF32 (K = 8) or two 16-bit values (K = 16).
template <int K, class Element>
void combine_mma(Thread* warp, unsigned lanes) {
  require_full_warp(warp, lanes);
  if (aborting) return;
  constexpr int kPack = K / 8;  // elements of one register, neighbours along k
  float a[16][K], b[K][8], d[16][8];
  const auto element = [](uint32_t r, int i) { return Element::value(r, i); };
  for (int l = 0; l < kWarp; ++l) {
    const auto& o = *static_cast<MmaOperands*>(warp[l].operands);
    const int group = l / 4, k = l % 4 * kPack;
    for (int i = 0; i < kPack; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][k + r / 2 * (K / 2) + i] = element(o.a[r], i);
      for (int r = 0; r < 2; ++r) b[k + r * (K / 2) + i][group] = element(o.b[r], i);
    }
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][l % 4 * 2 + r % 2] = o.d[r];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < kWarp; ++l)
    for (int r = 0; r < 4; ++r)
      static_cast<MmaOperands*>(warp[l].operands)->d[r] = d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}

template <class T>
struct Pair {
  static float value(uint32_t r, int i) {
    return T(bit_cast<T>(static_cast<uint16_t>(i ? r >> 16 : r & 0xffffu)));
  }
};
struct Tf32 {  // the unit ignores the low 13 bits
  static float value(uint32_t r, int) { return bit_cast<float>(r & 0xffffe000u); }
};

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const char* name,
         void (*combine)(Thread*, unsigned), Site site) {
  MmaOperands operands{d, a, {b0, b1}};
  meet(~0u, name, site, &operands, combine);
}

// --- wgmma

constexpr int kGroup = 128, kGroups = kMaxThreads / kGroup, kMaxN = 256, kWgmmaK = 16;

struct Wgmma {
  uint64_t a, b;  // descriptors
  int n;
  bool continues;            // on the accumulator of the one issued before it
  float* d[kGroup];          // each thread's accumulator
  std::vector<float> start;  // what it held, [kGroup][n / 2]
  const void* pc;
};

struct WarpGroup {
  int arrived = 0;
  bool is_fenced = false;
  std::deque<Wgmma> issued;
  std::deque<int> groups;  // instructions in each committed group
  int uncommitted = 0;
};
WarpGroup warp_groups[kGroups];

struct WgmmaOperands {
  float* d;
  uint64_t a, b;
};

// The 128 threads of a warpgroup meet; the last to arrive does the work.
template <class F>
void meet_as_group(const char* operation, Site site, void* operands, F&& work) {
  Thread& t = *current;
  Thread* base = &threads[t.number / kGroup * kGroup];
  WarpGroup& group = warp_groups[t.number / kGroup];
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
  work(group, base);
  for (int i = 0; i < kGroup; ++i)
    if (&base[i] != &t) wake(base[i]);
}

// Address of the 16-byte chunk c (8 elements along k) of a row of an operand.
unsigned char* chunk_address(uint64_t operand, int row, int c) {
  const size_t base = (operand & 0x3fff) << 4, leading = (operand >> 16 & 0x3fff) << 4,
               stride = (operand >> 32 & 0x3fff) << 4;
  const int swizzle = static_cast<int>(operand >> 62);  // 0 none, 1 128 bytes, 2 64, 3 32
  size_t at = base + row / 8 * stride;
  if (swizzle == 0) return arena + kDynamicBase + at + c * leading + row % 8 * 16;
  at += row % 8 * (256 >> swizzle) + c * 16;
  at ^= (at >> 7 & ((8 >> (swizzle - 1)) - 1)) << 4;
  return arena + kDynamicBase + at;
}

void check_operand(Thread& t, uint64_t operand, int rows, const void* pc) {
  for (int row = 0; row < rows; ++row)
    for (int c = 0; c < 2; ++c) {
      check_access(t, chunk_address(operand, row, c), 16, Kind::read, pc);
      check_proxy(chunk_address(operand, row, c), 16, "wgmma", pc);
    }
}

std::vector<float> read_operand(uint64_t operand, int rows) {
  std::vector<float> values(rows * kWgmmaK);
  for (int i = 0; i < rows * kWgmmaK; ++i) {
    BFloat16 element;
    memcpy(&element, chunk_address(operand, i / kWgmmaK, i % kWgmmaK / 8) + 2 * (i % 8), 2);
    values[i] = element;
  }
  return values;
}

// Element e of the accumulator of thread t of the group: its row and column in d[64][n].
int row_of(int t, int e) { return t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8; }
int column_of(int t, int e) { return e / 4 * 8 + t % 4 * 2 + e % 2; }

void retire(WarpGroup& group, Thread* base) {
  const Wgmma w = std::move(group.issued.front());
  group.issued.pop_front();
  check_operand(*base, w.a, 64, w.pc);
  check_operand(*base, w.b, w.n, w.pc);
  const std::vector<float> a = read_operand(w.a, 64), b = read_operand(w.b, w.n);
  std::vector<float> sums = w.start;
  const int each = w.n / 2;
  for (int t = 0; t < kGroup; ++t)
    for (int e = 0; e < each; ++e)
      for (int k = 0; k < kWgmmaK; ++k)
        sums[t * each + e] += a[row_of(t, e) * kWgmmaK + k] * b[column_of(t, e) * kWgmmaK + k];
  if (!group.issued.empty() && group.issued.front().continues) {
    group.issued.front().start = sums;  // still in flight: the accumulators stay NaN
    return;
  }
  for (int t = 0; t < kGroup; ++t) std::copy_n(&sums[t * each], each, w.d[t]);
}

void issue_wgmma(float* d, int n, uint64_t a, uint64_t b, Site site, const void* pc) {
  WgmmaOperands operands{d, a, b};
  meet_as_group("wgmma.mma_async", site, &operands, [&](WarpGroup& group, Thread* base) {
    if (!group.is_fenced)
      found("wgmma fence" + place(pc), "wgmma at " + place(pc) + " without a wgmma_fence before it");
    check_operand(*base, a, 64, pc);
    check_operand(*base, b, n, pc);
    Wgmma w{a, b, n, !group.issued.empty(), {}, std::vector<float>(kGroup * n / 2), pc};
    for (int t = 0; t < kGroup; ++t) {
      const auto& o = *static_cast<WgmmaOperands*>(base[t].operands);
      if (o.a != a || o.b != b)
        found("wgmma operands" + place(pc),
              "threads of a warpgroup give different operands to wgmma at " + place(pc), After::stop);
      w.d[t] = o.d;
      w.continues = w.continues && group.issued.back().d[t] == o.d;
      std::copy_n(o.d, n / 2, &w.start[t * n / 2]);
      std::fill_n(o.d, n / 2, NAN);
    }
    group.issued.push_back(std::move(w));
    ++group.uncommitted;
  });
}

}  // namespace

void start_tensor_cores() {
  for (WarpGroup& group : warp_groups) group = WarpGroup();
}

void finish_tensor_cores() {
  for (const WarpGroup& group : warp_groups)
    if (!group.issued.empty())
      found("wgmma end",
            "the block ends while the wgmma issued at " + place(group.issued[0].pc) + " is outstanding");
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site) {
  ldmatrix(r, row, "ldmatrix", combine_ldmatrix<false>, site, __builtin_return_address(0));
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site) {
  ldmatrix(r, row, "ldmatrix.trans", combine_ldmatrix<true>, site, __builtin_return_address(0));
}
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  mma(d, a, b0, b1, "mma of float16", combine_mma<16, Pair<Half>>, site);
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  mma(d, a, b0, b1, "mma of bfloat16", combine_mma<16, Pair<BFloat16>>, site);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  mma(d, a, b0, b1, "mma of tf32", combine_mma<8, Tf32>, site);
}

// Half of the last kept bit is added to the magnitude; infinities and NaN have no room for it.
uint32_t to_tf32(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  return bits & 0xffffe000u;
}

uint64_t wgmma_operand(const void* p, int leading, int stride, Swizzle swizzle) {
  const uint64_t address = static_cast<const unsigned char*>(p) - arena - kDynamicBase;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

void wgmma_fence(Site site) {
  meet_as_group("wgmma.fence", site, nullptr, [](WarpGroup& group, Thread*) { group.is_fenced = true; });
}

void wgmma_commit(Site site) {
  meet_as_group("wgmma.commit_group", site, nullptr, [](WarpGroup& group, Thread*) {
    group.groups.push_back(group.uncommitted);
    group.uncommitted = 0;
  });
}

void wgmma_wait_groups(int newest, Site site) {
  meet_as_group("wgmma.wait_group", site, nullptr, [&](WarpGroup& group, Thread* base) {
    while (static_cast<int>(group.groups.size()) > newest) {
      for (int i = 0; i < group.groups[0]; ++i) retire(group, base);
      group.groups.pop_front();
    }
    group.is_fenced = false;
  });
}

void wgmma_m64n16k16_bf16(float (&d)[8], uint64_t a, uint64_t b, Site site) {
  issue_wgmma(d, 16, a, b, site, __builtin_return_address(0));
}

}  // namespace fastconv
