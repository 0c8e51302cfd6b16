// SPDX-License-Identifier: MIT
// What one source needs to compile as plain C++ and as CUDA: FASTCONV_HD marks what runs on both sides there,
// FASTCONV_D what runs on the GPU alone.
#pragma once

#if defined(__CUDACC__)
#define FASTCONV_HD __host__ __device__
#define FASTCONV_D __device__
#else
#define FASTCONV_HD
#define FASTCONV_D
#endif
