// SPDX-License-Identifier: MIT
// Matrix instructions of a warp.
#include "selftest.h"

namespace fastconv::simt {
namespace {

// --- matrix instructions

// [16][8] += [16][16] [16][8] through ldmatrix: a row-major, b as [n][k], and again with b as [k][n] and a
// transposing load.
__global__ void multiply_f16(float* out) {
  FC_SHARED(Half, a, [16][16]);
  FC_SHARED(Half, b, [16][16]);
  FC_SHARED(Half, bt, [16][16]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    a[i / 16][i % 16] = Half(static_cast<float>(i % 7));
    b[i / 16][i % 16] = Half(static_cast<float>(i % 5));
    bt[i % 16][i / 16] = Half(static_cast<float>(i % 5));
  }
  __syncwarp();
  uint32_t ra[4], rb[4], rbt[4];
  ldmatrix_x4(ra, &a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4(rb, &b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  ldmatrix_x4_trans(rbt, &bt[lane % 8 + lane / 8 % 2 * 8][lane / 16 * 8]);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {}, dt[4] = {};
    mma_m16n8k16_f16(d, ra, rb[2 * half], rb[2 * half + 1]);
    mma_m16n8k16_f16(dt, ra, rbt[2 * half], rbt[2 * half + 1]);
    for (int r = 0; r < 4; ++r) {
      const int at = (lane / 4 + r / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + r % 2;
      out[at] = d[r], out[256 + at] = dt[r];
    }
  }
}
void run_multiply_f16() {
  Global<float> out(512);
  launch(multiply_f16, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += static_cast<float>((m * 16 + k) % 7 * ((n * 16 + k) % 5));
      expect(out[m * 16 + n] == sum, "ldmatrix and mma");
      expect(out[256 + m * 16 + n] == sum, "ldmatrix.trans and mma");
    }
}

template <int Lanes>
__global__ void multiply_tf32(float* out) {
  const int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  float d[4] = {};
  // a[m][k] = m + 16 k, b[k][n] = k + 8 n
  const uint32_t a[4] = {to_tf32(row + 16.f * k), to_tf32(row + 8 + 16.f * k), to_tf32(row + 16.f * (k + 4)),
                         to_tf32(row + 8 + 16.f * (k + 4))};
  if (lane < Lanes) mma_m16n8k8_tf32(d, a, to_tf32(k + 8.f * row), to_tf32(k + 4 + 8.f * row));
  for (int r = 0; r < 4; ++r) out[(row + r / 2 * 8) * 8 + k * 2 + r % 2] = d[r];
}
void run_multiply_tf32() {
  Global<float> out(128);
  launch(multiply_tf32<32>, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(out));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += static_cast<float>((m + 16 * k) * (k + 8 * n));
      expect(out[m * 8 + n] == sum, "mma of tf32");
    }
}

// --- the cases

const Cases matrix_cases{
    {"ldmatrix and mma", nullptr, run_multiply_f16},
    {"mma of tf32", nullptr, run_multiply_tf32},
    {"mma of 31 lanes", "full warp", [] { on_output(multiply_tf32<31>, 32, 128); }},
};

}  // namespace
}  // namespace fastconv::simt
