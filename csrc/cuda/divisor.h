// SPDX-License-Identifier: MIT
// Division by a number that the host knows: a multiplication and a shift, right for dividends in [0, 2^31).
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994.
#pragma once

#include <cstdint>

#include "core/platform.h"

namespace fastconv::cuda {

class Divisor {
 public:
  explicit Divisor(int64_t divisor = 1) : divisor_(static_cast<int>(divisor)) {
    int log2 = 0;  // rounded up
    while ((int64_t(1) << log2) < divisor) ++log2;
    if (divisor <= 1) return;
    multiplier_ = static_cast<unsigned>(((uint64_t(1) << (31 + log2)) + divisor - 1) / divisor);
    shift_ = log2 - 1;
  }

  FASTCONV_HD int divide(int n) const {
    if (divisor_ == 1) return n;
    return static_cast<int>(static_cast<unsigned>(uint64_t(static_cast<unsigned>(n)) * multiplier_ >> 32) >>
                            shift_);
  }
  // The last digit of a number with mixed radices; `n` keeps the others.
  FASTCONV_HD int pop(int& n) const {
    const int quotient = divide(n), digit = n - quotient * divisor_;
    n = quotient;
    return digit;
  }
  FASTCONV_HD int divisor() const { return divisor_; }

 private:
  int divisor_;
  unsigned multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace fastconv::cuda
