// SPDX-License-Identifier: MIT
// What one source needs to compile as plain C++ and as CUDA.
#pragma once

#if defined(__CUDACC__)
#define FASTCONV_HD __host__ __device__
#else
#define FASTCONV_HD
#endif
