// SPDX-License-Identifier: MIT
// Warpgroups: wgmma on operands that threads wrote, setmaxnreg.
#include <cmath>

#include "selftest.h"

namespace fastconv::simt {
namespace {

enum class Bug { none, touched, overwritten, no_wait, wrong_base, odd_address, static_operand, differing };

constexpr int kK = 64;  // elements of a row: 128 bytes

// y0 = a b^T and y1 = a b^T + start, with a[m][k] = m % 8 == k, b[n][k] = n + k: in turns on two
// accumulators, so that each product but the first follows one in flight.
template <Bug bug>
__global__ void multiply(float* y, float start) {
  FC_DYN_SMEM(shared);
  BFloat16* a = shared.take<BFloat16>(64 * kK, bug == Bug::wrong_base ? 128 : 1024);
  BFloat16* b = shared.take<BFloat16>(8 * kK, 1024);
  FC_SHARED(float4, other, [64]);
  const int t = threadIdx.x;
  const auto place = [](int row, int k) { return row * kK + (k / 8 ^ row % 8) * 8 + k % 8; };
  for (int i = t; i < 64 * kK; i += 128)
    a[place(i / kK, i % kK)] = BFloat16(i / kK % 8 == i % kK ? 1.0f : 0.0f);
  for (int i = t; i < 8 * kK; i += 128)
    b[place(i / kK, i % kK)] = BFloat16(static_cast<float>(i / kK + i % kK));
  fence_proxy_async();
  __syncthreads();
  float d0[4], d1[4] = {start, start, start, start};
  if (bug == Bug::static_operand) wgmma_operand(other, 0, 1024, Swizzle::b128);
  wgmma_fence();
  for (int k = 0; k < kK; k += 16) {
    const int shift = bug == Bug::odd_address ? 4 : bug == Bug::differing ? t / 32 * 8 : 0;
    const uint64_t da = wgmma_operand(a + k + shift, 0, 1024, Swizzle::b128);
    const uint64_t db = wgmma_operand(b + k, 0, 1024, Swizzle::b128);
    wgmma_bf16(d0, da, db, k > 0);
    wgmma_bf16(d1, da, db, true);
    wgmma_commit();
    if (k == 16) wgmma_wait<1>();
    if (k == 16) wgmma_fence();
  }
  if (bug == Bug::touched) d0[1] += 1;
  if (bug == Bug::overwritten) a[t] = BFloat16(2.0f);
  if (bug != Bug::no_wait) wgmma_wait<0>();
  for (int e = 0; e < 4; ++e) {
    const int at = (t / 32 * 16 + t % 32 / 4 + e / 2 * 8) * 8 + t % 4 * 2 + e % 2;
    y[at] = d0[e], y[512 + at] = d1[e];
  }
}

template <Bug bug>
void run_multiply(float start) {
  Global<float> y(1024, "y", Access::output);
  const size_t bytes = smem_take<BFloat16>(smem_take<BFloat16>(0, 64 * kK, 1024), 8 * kK, 1024);
  launch(multiply<bug>, dim3(1), dim3(128), bytes, nullptr, static_cast<float*>(y), start);
  for (int i = 0; i < 512; ++i) {
    const float product = static_cast<float>(i / 8 % 8 + i % 8);
    expect(y[i] == product, "wgmma");
    expect(std::isnan(start) ? std::isnan(y[512 + i]) : y[512 + i] == product + start, "wgmma that adds");
  }
}

// Three warpgroups of 168 registers a thread: the first gives back what the others take.
template <int Less, int More>
__global__ void __launch_bounds__(384, 1) move_registers(float* out) {
  if (threadIdx.x < 128)
    setmaxnreg_dec<Less>();
  else
    setmaxnreg_inc<More>();
  out[threadIdx.x] = 1;
}

__global__ void __launch_bounds__(128, 1) registers_of_a_warp(float* out) {
  if (threadIdx.x < 32) setmaxnreg_dec<40>();
  out[threadIdx.x] = 1;
}

const Cases warpgroup{
    {"wgmma on two accumulators", nullptr, [] { run_multiply<Bug::none>(3); }},
    {"wgmma on an accumulator of NaN", nullptr, [] { run_multiply<Bug::none>(NAN); }},
    {"accumulators touched in flight", "which was not waited for", [] { run_multiply<Bug::touched>(0); }},
    {"operand overwritten in flight", "still reads", [] { run_multiply<Bug::overwritten>(0); }},
    {"wgmma never waited for", "which was not waited for", [] { run_multiply<Bug::no_wait>(0); }},
    {"swizzled operand at a multiple of 128", "multiple of 1024", [] { run_multiply<Bug::wrong_base>(0); }},
    {"operand at a multiple of 8", "multiples of 16", [] { run_multiply<Bug::odd_address>(0); }},
    {"operand in static shared memory", "needs dynamic", [] { run_multiply<Bug::static_operand>(0); }},
    {"operands that differ in a warpgroup", "different operands", [] { run_multiply<Bug::differing>(0); }},

    {"setmaxnreg", nullptr, [] { on_output(move_registers<40, 232>, 384, 384); }},
    {"more registers than there are", "deadlock", [] { on_output(move_registers<40, 240>, 384, 384); }},
    {"registers in odd numbers", "multiple of 8", [] { on_output(move_registers<42, 232>, 384, 384); }},
    {"fewer registers by inc", "setmaxnreg.inc to", [] { on_output(move_registers<40, 48>, 384, 384); }},
    {"setmaxnreg of one warp", "deadlock", [] { on_output(registers_of_a_warp, 128, 128); }},
};

}  // namespace
}  // namespace fastconv::simt
