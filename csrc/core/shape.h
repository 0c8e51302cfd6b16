// SPDX-License-Identifier: MIT
// Which shapes an operator takes and which it returns, once for real sizes (int64_t) and once for symbolic
// ones. Sizes are batched: [N, C, spatial...] with one to three spatial axes; `padding` of a convolution
// lists the fronts, then the backs.
#pragma once

#include <cstdint>
#include <vector>

#include "core/error.h"

namespace fastconv {

template <class Int>
using Sizes = std::vector<Int>;

// a * b + c, refusing results beyond 64 bits.
inline int64_t mul_add(int64_t a, int64_t b, int64_t c, const char* what) {
  int64_t product, sum;
  if (__builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(product, c, &sum))
    fail(what, ": size overflows 64 bits: ", a, " * ", b, " + ", c);
  return sum;
}
template <class Int>
Int mul_add(const Int& a, const Int& b, const Int& c, const char*) {
  return a * b + c;
}

template <class Int>
std::string text(const Sizes<Int>& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

// The upper bound keeps positions, which are sums and products of such values, within 64 bits.
template <class Int>
void require_values(const Sizes<Int>& values, size_t count, Int least, const char* op, const char* name) {
  constexpr int64_t kMost = INT32_MAX;
  FASTCONV_CHECK(values.size() == count, op, ": ", name, " must have ", count, " values, got ", text(values));
  for (const Int& value : values)
    FASTCONV_CHECK(value >= least && value <= Int(kMost), op, ": ", name, " must be at least ", least,
                   " and at most ", kMost, ", got ", text(values));
}

// Fails where a tensor of this size has more bytes than 64 bits count.
template <class Int>
void require_countable(const Sizes<Int>& size, const char* op) {
  Int bytes(sizeof(double));
  for (const Int& extent : size) bytes = mul_add(bytes, extent, Int(0), op);
}

template <class Int>
Int floor_div(const Int& a, const Int& b) {  // b > 0
  const Int quotient = a / b;
  return a % b < 0 ? quotient - 1 : quotient;
}

// Cells that a filter of `kernel` taps spans.
template <class Int>
Int span_of(const Int& kernel, const Int& dilation, const char* op) {
  return mul_add(dilation, kernel - 1, Int(1), op);
}

// The name of an operator that works along `axes` spatial axes, for messages.
inline const char* conv_name(size_t axes) { return axes == 1 ? "conv1d" : axes == 3 ? "conv3d" : "conv2d"; }
inline const char* max_pool_name(size_t axes) {
  return axes == 1 ? "max_pool1d" : axes == 3 ? "max_pool3d" : "max_pool2d";
}
inline const char* avg_pool_name(size_t axes) {
  return axes == 1 ? "avg_pool1d" : axes == 3 ? "avg_pool3d" : "avg_pool2d";
}

template <class Int>
Sizes<Int> conv_output_size(const Sizes<Int>& input, const Sizes<Int>& weight, const Sizes<Int>& stride,
                            const Sizes<Int>& padding, const Sizes<Int>& dilation, const Int& groups) {
  const size_t axes = stride.size();
  const char* op = conv_name(axes);
  FASTCONV_CHECK(axes >= 1 && axes <= 3, op, ": stride must have 1 to 3 values, got ", text(stride));
  FASTCONV_CHECK(input.size() == axes + 2, op, ": input must have ", axes + 2,
                 " dimensions [N, C, ...], got input of size ", text(input));
  FASTCONV_CHECK(weight.size() == axes + 2, op, ": weight must have ", axes + 2,
                 " dimensions [K, C/groups, ...], got weight of size ", text(weight));
  require_values(stride, axes, Int(1), op, "stride");
  require_values(dilation, axes, Int(1), op, "dilation");
  require_values(padding, 2 * axes, Int(0), op, "padding");
  FASTCONV_CHECK(groups >= 1, op, ": groups must be at least 1, got ", groups);
  for (size_t i = 2; i < axes + 2; ++i)
    FASTCONV_CHECK(input[i] >= 1, op, ": only the batch and the channels may be empty, got input of size ",
                   text(input));
  for (size_t i = 2; i < axes + 2; ++i)
    FASTCONV_CHECK(weight[i] >= 1, op, ": kernel size must be at least 1, got weight of size ", text(weight));
  FASTCONV_CHECK(weight[0] >= groups, op, ": weight.size(0) must be at least groups = ", groups, ", got ",
                 weight[0]);
  FASTCONV_CHECK(weight[0] % groups == 0, op, ": weight.size(0) must be divisible by groups = ", groups,
                 ", got ", weight[0]);
  FASTCONV_CHECK(input[1] == mul_add(weight[1], groups, Int(0), op), op,
                 ": weight.size(1) must equal input.size(1)/groups = ", input[1] / groups, ", got ",
                 weight[1], " (input of size ", text(input), ", weight of size ", text(weight),
                 ", groups = ", groups, ")");
  Sizes<Int> output{input[0], weight[0]};
  for (size_t i = 0; i < axes; ++i) {
    const Int padded = mul_add(Int(1), input[2 + i], mul_add(Int(1), padding[i], padding[axes + i], op), op);
    const Int span = span_of(weight[2 + i], dilation[i], op);
    FASTCONV_CHECK(span <= padded, op, ": kernel size can't be greater than the padded input: along axis ",
                   i + 2, " the kernel spans ", span, ", the padded input has ", padded);
    output.push_back((padded - span) / stride[i] + 1);
  }
  require_countable(output, op);
  return output;
}

template <class Int>
void require_bias(const Sizes<Int>& bias, const Int& channels, const char* op) {
  FASTCONV_CHECK(bias.size() == 1 && bias[0] == channels, op, ": bias must have size [", channels, "], got ",
                 text(bias));
}

// Output extents of a pool, in torch's words: with ceil_mode a last window may hang
// over the end, but not start there.
template <class Int>
Sizes<Int> pool_output_size(const char* op, const Sizes<Int>& input, const Sizes<Int>& kernel,
                            const Sizes<Int>& stride, const Sizes<Int>& padding, const Sizes<Int>& dilation,
                            bool ceil_mode) {
  const size_t axes = kernel.size();
  FASTCONV_CHECK(axes >= 1 && axes <= 3, op, ": kernel_size must have 1 to 3 values, got ", text(kernel));
  FASTCONV_CHECK(input.size() == axes + 2, op, ": input must have ", axes + 2,
                 " dimensions [N, C, ...], got input of size ", text(input));
  require_values(kernel, axes, Int(1), op, "kernel_size");
  require_values(stride, axes, Int(1), op, "stride");
  require_values(padding, axes, Int(0), op, "padding");
  require_values(dilation, axes, Int(1), op, "dilation");
  for (size_t i = 1; i < input.size(); ++i)
    FASTCONV_CHECK(input[i] >= 1, op, ": only the batch may be empty, got input of size ", text(input));
  Int cells(1);
  for (const Int& k : kernel) cells = mul_add(cells, k, Int(0), op);
  FASTCONV_CHECK(cells <= Int(INT32_MAX), op, ": the window has more than ", INT32_MAX,
                 " cells: kernel_size is ", text(kernel));
  Sizes<Int> output{input[0], input[1]};
  for (size_t i = 0; i < axes; ++i) {
    const Int span = span_of(kernel[i], dilation[i], op);
    FASTCONV_CHECK(padding[i] <= span / 2, op, ": padding must be at most half of the kernel's span ", span,
                   ", got ", text(padding));
    const Int padded = mul_add(Int(2), padding[i], input[2 + i], op);
    const Int room = padded - span + (ceil_mode ? stride[i] - 1 : Int(0));
    Int extent = floor_div(room, stride[i]) + 1;
    if (ceil_mode && mul_add(extent - 1, stride[i], Int(0), op) >= input[2 + i] + padding[i])
      extent = extent - 1;
    FASTCONV_CHECK(extent >= 1, op, ": the window is larger than the padded input: along axis ", i + 2,
                   " it spans ", span, ", the padded input has ", padded);
    output.push_back(extent);
  }
  return output;
}

// input [..., K], weight [N, K] -> [..., N]
template <class Int>
Sizes<Int> linear_output_size(const Sizes<Int>& input, const Sizes<Int>& weight) {
  const char* op = "linear";
  FASTCONV_CHECK(!input.empty(), op, ": input must have at least 1 dimension, got input of size ",
                 text(input));
  FASTCONV_CHECK(weight.size() == 2, op,
                 ": weight must have 2 dimensions [out_features, in_features], got weight of size ",
                 text(weight));
  FASTCONV_CHECK(input.back() == weight[1], op, ": input.size(-1) must equal weight.size(1) = ", weight[1],
                 ", got ", input.back(), " (input of size ", text(input), ", weight of size ", text(weight),
                 ")");
  Sizes<Int> output(input.begin(), input.end() - 1);
  output.push_back(weight[0]);
  return output;
}

}  // namespace fastconv
