// SPDX-License-Identifier: MIT
// Every CPU kernel by name, for the table (csrc/cpu/table.cpp).
#pragma once

#include "core/args.h"

namespace fastconv::cpu {

// Complete kernels: every shape, stride and dtype.
void conv_fprop_naive(const ConvArgs&, void* workspace, void* stream);
void conv_dgrad_naive(const ConvArgs&, void* workspace, void* stream);
void conv_wgrad_naive(const ConvArgs&, void* workspace, void* stream);
void max_pool_naive(const PoolArgs&, void* workspace, void* stream);
void max_pool_backward_naive(const PoolArgs&, void* workspace, void* stream);
void max_pool_gather_naive(const PoolArgs&, void* workspace, void* stream);
void max_pool_indices_naive(const PoolArgs&, void* workspace, void* stream);
void linear_fprop_naive(const LinearArgs&, void* workspace, void* stream);
void linear_dgrad_naive(const LinearArgs&, void* workspace, void* stream);
void linear_wgrad_naive(const LinearArgs&, void* workspace, void* stream);

// The bias half of wgrad: a.bias_grad[k] = sum of a.y over everything but k, where it is wanted.
void conv_bias_grad(const ConvArgs& a);
void linear_bias_grad(const LinearArgs& a);

// What does not depend on the instruction set.
const char* conv_naive_reject(const ConvArgs&);
const char* conv_igemm_reject(const ConvArgs&);
int64_t conv_wgrad_igemm_pieces(const ConvShape&);
int64_t conv_wgrad_igemm_workspace(const ConvArgs&);
const char* max_pool_backward_rows_reject(const PoolArgs&);

// Kernels compiled once for each instruction set.
#define FASTCONV_DECLARE(isa)                                                  \
  namespace isa {                                                              \
  void conv_fprop_igemm(const ConvArgs&, void* workspace, void* stream);       \
  void conv_dgrad_igemm(const ConvArgs&, void* workspace, void* stream);       \
  void conv_wgrad_igemm(const ConvArgs&, void* workspace, void* stream);       \
  void linear_fprop_gemm(const LinearArgs&, void* workspace, void* stream);    \
  void linear_dgrad_gemm(const LinearArgs&, void* workspace, void* stream);    \
  void linear_wgrad_gemm(const LinearArgs&, void* workspace, void* stream);    \
  void max_pool_rows(const PoolArgs&, void* workspace, void* stream);          \
  void max_pool_backward_rows(const PoolArgs&, void* workspace, void* stream); \
  }
FASTCONV_DECLARE(portable)
FASTCONV_DECLARE(avx2)
FASTCONV_DECLARE(avx512)
#undef FASTCONV_DECLARE

}  // namespace fastconv::cpu
