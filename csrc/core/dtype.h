// SPDX-License-Identifier: MIT
// Element types: the enum that travels in argument structs, the two 16-bit storage
// types, and what each computes in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/platform.h"

namespace fastconv {

enum class Dtype : uint8_t { f32, f64, f16, bf16 };

inline constexpr unsigned dtype_bit(Dtype t) { return 1u << static_cast<unsigned>(t); }
inline constexpr unsigned kAllDtypes = 0xf;

inline constexpr int64_t dtype_size(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

inline constexpr const char* dtype_name(Dtype t) {
  switch (t) {
    case Dtype::f32:
      return "float32";
    case Dtype::f64:
      return "float64";
    case Dtype::f16:
      return "float16";
    case Dtype::bf16:
      return "bfloat16";
  }
  return "?";
}

template <class To, class From>
FASTCONV_HD inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// IEEE binary16. Conversions round to nearest even; subnormals, infinities and NaN are kept.
struct Half {
  uint16_t bits;

  Half() = default;
  FASTCONV_HD explicit Half(float value) {
    const uint32_t f = bit_cast<uint32_t>(value);
    const uint32_t sign = (f >> 16) & 0x8000u;
    const uint32_t magnitude = f & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      bits = static_cast<uint16_t>(sign | 0x7e00u);  // NaN
    } else if (magnitude >= 0x477ff000u) {
      bits = static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more: infinity
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14: adding 0.5 lets the float adder round at the subnormal's last bit, 2^-24.
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      bits = static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
    } else {
      const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
      bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
    }
  }
  FASTCONV_HD operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t f;
    if (magnitude >= 0x7c00u) {
      f = 0x7f800000u | (magnitude << 13);
    } else if (magnitude >= 0x0400u) {
      f = (magnitude << 13) + 0x38000000u;
    } else {
      f = bit_cast<uint32_t>(static_cast<float>(magnitude) * 5.9604644775390625e-8f);  // * 2^-24, exact
    }
    return bit_cast<float>(sign | f);
  }
};

// The upper half of a float32. Conversions round to nearest even.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  FASTCONV_HD explicit BFloat16(float value) {
    const uint32_t f = bit_cast<uint32_t>(value);
    const bool is_nan = (f & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (f + 0x7fffu + ((f >> 16) & 1u)) >> 16);
  }
  FASTCONV_HD operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// The type sums are kept in by the fast rows. The naive rows sum in double.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// Rounds a sum to storage type T.
template <class T, class Sum>
FASTCONV_HD inline T narrow(Sum value) {
  return T(static_cast<typename Compute<T>::type>(value));
}

// Calls f with a null pointer of the C++ type for `dtype`: `with_dtype(d, [&](auto* t) { using T = ...; })`.
template <class F>
decltype(auto) with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(static_cast<double*>(nullptr));
    case Dtype::f16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::f32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

}  // namespace fastconv
