// SPDX-License-Identifier: MIT
// Linear as a block GEMM over strided matrices (gemm.inl), bias and ReLU applied as a block is stored.
//
//   fprop  y[M, N]  = x[M, K] w[N, K]^T      dgrad  gx[M, K] = gy[M, N] w[N, K]      wgrad  gw[N, K] = gy[M,
//   N]^T x[M, K]
//
// Limit: at small M the packing of w costs as much as the arithmetic. The floor is the fused multiply-add
// rate for large M, reading w once for small M.
#ifndef FASTCONV_ISA

#include <algorithm>

#include "cpu/bias_grad.h"
#include "cpu/parallel.h"

#define FASTCONV_FILE "cpu/linear_gemm.cpp"
#include "cpu/foreach_isa.h"

#else

namespace fastconv::cpu::FASTCONV_ISA {

#include "cpu/gemm.inl"

namespace {

template <class Element>
const Element* element(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const Element*>(m.data) + row * m.row + col * m.col;
}

// c[m, n] = act(bias[n] + sum over k of a[m, k] * b[k, n])
template <class Element>
void multiply(int64_t total_m, int64_t total_n, int64_t total_k, const Matrix& a, const Matrix& b,
              const Matrix& c, const Epilogue& epilogue) {
  using T = typename Compute<Element>::type;
  if (total_m == 0 || total_n == 0) return;
  const Blocks blocks = Blocks::of<T>(total_m, total_n, total_k, 1);
  const int64_t count_m = blocks.count_m(total_m);
  const auto* bias = static_cast<const Element*>(epilogue.bias);
  const double block_us = macs_us(double(blocks.m) * blocks.n * (total_k + 8));
  parallel_for(count_m * blocks.count_n(total_n), block_us, [&](int64_t task) {
    const auto pack_a = [&](Span m, Span k, T* out) {
      pack_matrix(element<Element>(a, m.begin, k.begin), a.row, a.col, m.size, k.size, kRows, out);
    };
    const auto pack_b = [&](Span n, Span k, T* out) {
      pack_matrix(element<Element>(b, k.begin, n.begin), b.col, b.row, n.size, k.size, Simd<T>::kColumns,
                  out);
    };
    const auto store = [&](Span m, Span n, const T* block) {
      auto* out = static_cast<Element*>(c.data);
      for (int64_t i = 0; i < m.size; ++i)
        with_step(c.col, [&](auto step) {
          Element* line = out + (m.begin + i) * c.row + n.begin * step;
          for (int64_t j = 0; j < n.size; ++j)
            line[j * step] = Element(activated(block[i * kBlockN + j], bias, n.begin + j, epilogue.act));
        });
    };
    gemm_block<T>(block_of(task % count_m, blocks.m, total_m), block_of(task / count_m, blocks.n, total_n),
                  {0, total_k}, pack_a, pack_b, store);
  });
}

Matrix transposed(const Matrix& m) { return {m.data, m.col, m.row}; }

}  // namespace

void linear_fprop_gemm(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>>(a.M, a.N, a.K, a.x, transposed(a.w), a.y, a.epilogue);
  });
}

void linear_dgrad_gemm(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>>(a.M, a.K, a.N, a.y, a.w, a.x, Epilogue{});
  });
}

void linear_wgrad_gemm(const LinearArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    multiply<std::remove_pointer_t<decltype(t)>>(a.N, a.K, a.M, transposed(a.y), a.x, a.w, Epilogue{});
  });
  linear_bias_grad(a);
}

}  // namespace fastconv::cpu::FASTCONV_ISA

#endif
