// SPDX-License-Identifier: MIT
// Matrix instructions of a warp, which work at once on registers. Sums are float32 in order of k; the
// hardware's order and rounding differ, within the usual bound.
#include <cstring>

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

}  // namespace

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

}  // namespace fastconv
