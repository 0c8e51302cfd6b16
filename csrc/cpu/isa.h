// SPDX-License-Identifier: MIT
#pragma once

#include "core/args.h"

namespace fastconv::cpu {

// The best instruction set of this processor, capped by the environment variable
// FASTCONV_CPU_ISA (portable, avx2, avx512).
Isa isa();

const char* isa_name(Isa isa);

}  // namespace fastconv::cpu
