// SPDX-License-Identifier: MIT
// What a kernel is told: plain structs of sizes, strides and pointers. No tensor type is known here.
//
// Letters are the field's: N batch, C input channels, D H W input extents, K output channels, T R S filter
// extents, Z P Q output extents. A 2-D problem has D = T = Z = 1. Strides count elements.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastconv {

enum class Device : uint8_t { cpu, cuda };

// What the code may run on. `level` is the instruction set on a CPU (enum Isa), 10 * major
// + minor on a GPU (90 = sm_90).
struct Target {
  Device device = Device::cpu;
  int level = 0;
};

enum class Isa : int { portable, avx2, avx512 };

enum class Layout : uint8_t { contiguous, channels_last, strided };
inline constexpr unsigned layout_bit(Layout l) { return 1u << static_cast<unsigned>(l); }
inline constexpr unsigned kAllLayouts = 0x7;

struct Extent3 {
  int64_t d = 1, h = 1, w = 1;

  FASTCONV_HD int64_t cells() const { return d * h * w; }
  FASTCONV_HD bool is_one() const { return d == 1 && h == 1 && w == 1; }
};

// A tensor: base pointer and the strides of its five dimensions (a filter's are K, C/groups, T, R, S).
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, d = 0, h = 0, w = 0;
};

// A matrix: base pointer, distance between rows, distance between columns.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0, col = 0;
};

// A sliding window without weights: pooling.
struct Window {
  Extent3 kernel, stride, padding{0, 0, 0}, dilation, out;
};

enum class Act : uint8_t { none, relu };

// How the position of a window's maximum is stored: d * kernel.h * kernel.w + h *
// kernel.w + w inside the window.
enum class Offset : uint8_t { none, u8, i32 };
inline constexpr Offset offset_type(int64_t window_cells) {
  return window_cells <= 255 ? Offset::u8 : Offset::i32;
}

// What follows the sum before it is stored: y = pool(act(sum + bias + residual)).
struct Epilogue {
  const void* bias = nullptr;  // [K], or null
  Act act = Act::none;
  View residual;  // like the unpooled output, or null
  Window pool;    // a 1x1x1 window with stride one pools nothing
  View offsets;   // like the pooled output, or null

  bool pools() const { return !pool.kernel.is_one() || !pool.stride.is_one() || offsets.data; }
};

struct ConvShape {
  int64_t N = 0, C = 0, D = 1, H = 1, W = 1;
  int64_t K = 0, T = 1, R = 1, S = 1;
  int64_t Z = 1, P = 1, Q = 1;
  int64_t groups = 1;
  Extent3 stride, padding{0, 0, 0}, dilation;  // padding in front; what lies behind follows from Z, P, Q

  FASTCONV_HD int64_t group_c() const { return C / groups; }
  FASTCONV_HD int64_t group_k() const { return K / groups; }
  FASTCONV_HD int64_t taps() const { return T * R * S; }
  FASTCONV_HD int64_t in_cells() const { return D * H * W; }
  FASTCONV_HD int64_t out_cells() const { return Z * P * Q; }
  double macs() const {
    return double(N) * double(K) * double(out_cells()) * double(group_c()) * double(taps());
  }
};

// One struct serves the three passes: fprop writes y, dgrad writes x, wgrad writes w and bias_grad.
struct ConvArgs {
  Dtype dtype = Dtype::f32;
  bool tf32 = false;  // float32 may be multiplied in TF32
  Target target;
  Layout layout = Layout::contiguous;  // of x and y
  ConvShape shape;
  View x, w, y;
  void* bias_grad = nullptr;  // wgrad: [K], or null
  Epilogue epilogue;          // fprop; y is then the pooled output
};

// Backward of conv -> act -> pool: reads conv.x, conv.w, the output y, its gradient and the offsets.
struct ConvActPoolBackwardArgs {
  ConvArgs conv;           // conv.y is y; conv.epilogue carries act, pool and offsets
  View grad_y;             // like y
  View grad_x, grad_w;     // null: not wanted
  void* grad_b = nullptr;  // null: not wanted; never wanted without grad_w

  // Without any data, as where a choice is explained, everything is wanted.
  bool wants_x() const { return grad_x.data || !grad_w.data; }
  bool wants_w() const { return grad_w.data || !grad_x.data; }
};

// What an average divides the sum of a window by: its cells in the padded input, those in the input, or a
// number.
enum class DivideBy : uint8_t { padded_cells, input_cells, number };

// Max-pool. Forward writes y and offsets; backward reads y (a gradient) and offsets and writes
// x; gather reads x at the offsets and writes y; indices turns offsets into positions in the
// input plane (y is then int64). Average pooling has no offsets: forward writes y, backward reads
// y (a gradient) and writes x.
struct PoolArgs {
  Dtype dtype = Dtype::f32;
  Target target;
  Layout layout = Layout::contiguous;
  int64_t N = 0, C = 0, D = 1, H = 1, W = 1;
  Window window;
  View x, y, offsets;
  Offset offset = Offset::none;  // none in a backward: a 1x1x1 window, every offset is zero
  View gate;  // max-pool's backward: where gate <= 0 the gradient is zero (the ReLU before the pool), or null
  DivideBy divide_by = DivideBy::padded_cells;  // average
  int64_t divisor = 1;                          // of DivideBy::number
};

// Batch-norm by the batch's own statistics, act and max-pool: with the mean and the biased variance of a
// channel of x and invstd = 1 / sqrt(variance + eps), y = pool(act((x - mean) * invstd * weight + bias)).
struct NormArgs {
  Dtype dtype = Dtype::f32;
  Target target;
  Layout layout = Layout::contiguous;
  int64_t N = 0, C = 0, D = 1, H = 1, W = 1;
  double eps = 0;
  Act act = Act::none;
  Window window;  // a 1x1x1 window with stride one pools nothing; out is then D, H, W
  View x, y;
  View offsets;  // like y, where it pools
  Offset offset = Offset::none;
  const void *weight = nullptr, *bias = nullptr;  // [C], or null: ones, zeros
  double *mean = nullptr, *invstd = nullptr;      // [C]: forward writes them, backward reads them

  FASTCONV_HD int64_t cells() const { return D * H * W; }
  bool pools() const { return offset != Offset::none; }
};

// Reads norm.x, y, offsets, weight, mean, invstd and the gradient of y.
struct NormBackwardArgs {
  NormArgs norm;
  View grad_y;                                // like y
  View grad_x;                                // like x; null: not wanted
  void *grad_w = nullptr, *grad_b = nullptr;  // [C]; null: not wanted
};

// y[M, N] = x[M, K] w[N, K]^T. dgrad writes x, wgrad writes w and bias_grad.
struct LinearArgs {
  Dtype dtype = Dtype::f32;
  bool tf32 = false;  // as in ConvArgs
  Target target;
  Layout layout = Layout::contiguous;
  int64_t M = 0, N = 0, K = 0;
  Matrix x, w, y;
  void* bias_grad = nullptr;  // wgrad: [N], or null
  Epilogue epilogue;          // fprop: bias and act

  double macs() const { return double(M) * double(N) * double(K); }
};

struct LinearActBackwardArgs {
  LinearArgs linear;       // x, w, y and epilogue.act
  Matrix grad_y;           // like y
  Matrix grad_x, grad_w;   // null: not wanted
  void* grad_b = nullptr;  // null: not wanted; never wanted without grad_w
};

}  // namespace fastconv
