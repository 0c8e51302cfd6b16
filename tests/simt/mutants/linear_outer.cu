// SPDX-License-Identifier: MIT
// C[i, j] = sum over r of A[i, r] B[r, j] behind the gate of a ReLU: two warps share out r, each lane fetches
// one element of A and keeps 8 sums of one column, shared memory adds the warps' parts.
#include "mutants.h"

namespace fastconv::simt {
namespace {

enum class Bug {
  none,
  no_barrier,
  tail_not_zero,
  terms_unguarded,
  gate_not_applied,
  nan_gated,
  wrong_lane,
  same_slice,
  column_unguarded,
  parts_overwrite,
};

constexpr int kRows = 8, kTerms = 4, kWarps = 2;

template <Bug bug>
__global__ void __launch_bounds__(kWarps * 32)
    outer(const float* a, const float* gate, const float* b, float* c, int cols, int terms) {
  FC_SHARED(float, partial, [kWarps][kRows][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = (terms + kWarps - 1) / kWarps;
  const int begin = bug == Bug::same_slice ? 0 : warp * slice;
  const int end = begin + slice < terms ? begin + slice : terms;
  const int j = lane < cols || bug == Bug::column_unguarded ? lane : cols - 1;
  float sums[kRows] = {};
  for (int r = begin; r < end; r += kTerms) {
    const int term = r + lane / kRows, safe = bug == Bug::tail_not_zero && term >= terms ? terms - 1 : term;
    float fetched = 0;
    if (term < end || bug == Bug::tail_not_zero || bug == Bug::terms_unguarded) {
      fetched = a[lane % kRows * terms + safe];
      const float y = gate[lane % kRows * terms + safe];
      const bool closed = bug == Bug::nan_gated ? !(y > 0) : y <= 0;
      if (closed && bug != Bug::gate_not_applied) fetched = 0;
    }
    for (int u = 0; u < kTerms; ++u) {
      const float value = b[(r + u < terms ? r + u : terms - 1) * cols + j];
      for (int i = 0; i < kRows; ++i) {
        const int from = bug == Bug::wrong_lane ? i * kTerms + u : u * kRows + i;
        sums[i] += __shfl_sync(~0u, fetched, from) * value;
      }
    }
  }
  for (int i = 0; i < kRows; ++i) partial[bug == Bug::parts_overwrite ? 0 : warp][i][lane] = sums[i];
  if (bug != Bug::no_barrier) __syncthreads();
  for (int e = threadIdx.x; e < kRows * cols; e += kWarps * 32) {
    const int i = e / cols;
    c[e] = partial[0][i][e % cols] + partial[1][i][e % cols];
  }
}

template <Bug bug>
void run() {
  const int cols = 29;
  for (const int terms : {22, 8}) {
    Global<float> a(kRows * terms, "a", Access::input), gate(kRows * terms, "gate", Access::input);
    Global<float> b(terms * cols, "b", Access::input), c(kRows * cols, "c", Access::output);
    fill(a), fill(gate), fill(b);
    gate.values[3] = NAN;
    launch(outer<bug>, dim3(1), dim3(kWarps * 32), 0, nullptr, static_cast<float*>(a),
           static_cast<float*>(gate), static_cast<float*>(b), static_cast<float*>(c), cols, terms);
    finish();
    for (int e = 0; e < kRows * cols; ++e) {
      double sum = 0;
      for (int r = 0; r < terms; ++r) {
        const int at = e / cols * terms + r;
        if (!(gate[at] <= 0)) sum += double(a[at]) * b[r * cols + e % cols];
      }
      expect_near(c[e], sum, 1e-4);
    }
  }
}

const Cases linear_outer_cases{
    {"linear_outer", nullptr, run<Bug::none>},
    {"linear_outer: no barrier between the warps", "", run<Bug::no_barrier>},
    {"linear_outer: terms of the next slice are added", "", run<Bug::tail_not_zero>},
    {"linear_outer: terms beyond the last", "", run<Bug::terms_unguarded>},
    {"linear_outer: gate not applied", "", run<Bug::gate_not_applied>},
    {"linear_outer: NaN closes the gate", "", run<Bug::nan_gated>},
    {"linear_outer: shuffle from another lane", "", run<Bug::wrong_lane>},
    {"linear_outer: warps sum the same slice", "", run<Bug::same_slice>},
    {"linear_outer: columns beyond the last", "", run<Bug::column_unguarded>},
    {"linear_outer: warps write one part", "", run<Bug::parts_overwrite>},
};

}  // namespace
}  // namespace fastconv::simt
