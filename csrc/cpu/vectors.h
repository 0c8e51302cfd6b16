// SPDX-License-Identifier: MIT
// The headers that vectors.inl needs, outside every instruction set's pragmas.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
