// SPDX-License-Identifier: MIT
// One source, one copy of the machine code for each instruction set. A kernel file is laid out as
//
//     #ifndef FASTCONV_ISA
//     #include ...                                  // every header the kernels need
//     #define FASTCONV_FILE "cpu/conv_igemm.cpp"    // this file
//     #include "cpu/foreach_isa.h"
//     #else
//     namespace fastconv::cpu::FASTCONV_ISA { ... } // kernels; helpers in an anonymous namespace inside it
//     #endif
//
// Headers come first, outside the target pragmas, so that no inline function of theirs is compiled for a
// newer processor. Inside the namespace kVectorBytes is the width of a vector register, and kRows x kVectors
// accumulators fit the registers. No include guard: each kernel file includes it once.

#define FASTCONV_ISA portable
namespace fastconv::cpu::portable {
namespace {
constexpr int kVectorBytes = 16, kRows = 4, kVectors = 2;
}
}  // namespace fastconv::cpu::portable
#include FASTCONV_FILE
#undef FASTCONV_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTCONV_ISA avx2
namespace fastconv::cpu::avx2 {
namespace {
constexpr int kVectorBytes = 32, kRows = 6, kVectors = 2;
}
}  // namespace fastconv::cpu::avx2
#include FASTCONV_FILE
#undef FASTCONV_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FASTCONV_ISA avx512
namespace fastconv::cpu::avx512 {
namespace {
constexpr int kVectorBytes = 64, kRows = 8, kVectors = 3;
}
}  // namespace fastconv::cpu::avx512
#include FASTCONV_FILE
#undef FASTCONV_ISA
#pragma GCC pop_options
#endif
