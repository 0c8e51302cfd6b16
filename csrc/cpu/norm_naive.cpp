// SPDX-License-Identifier: MIT
// Batch-norm and ReLU from their definition, core/naive.h for each channel, one after the other: the oracle
// of all other rows of its tables. Composed with max-pool's rows it takes every window.
#include "core/naive.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

namespace {

double channel_us(const NormArgs& a) { return 2e-2 * double(naive::norm_count(a)); }

}  // namespace

void norm_act_pool_naive(const NormArgs& a, void*, void*) {
  with_dtype(a.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.C, channel_us(a), [&](int64_t c) { naive::norm_act<Element>(a, c, naive::Alone()); });
  });
}

void norm_act_pool_backward_naive(const NormBackwardArgs& a, void*, void*) {
  with_dtype(a.norm.dtype, [&](auto* t) {
    using Element = std::remove_pointer_t<decltype(t)>;
    parallel_for(a.norm.C, channel_us(a.norm),
                 [&](int64_t c) { naive::norm_act_backward<Element>(a, c, naive::Alone()); });
  });
}

}  // namespace fastconv::cpu
