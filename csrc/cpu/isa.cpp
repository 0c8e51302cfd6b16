// SPDX-License-Identifier: MIT
#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

namespace fastconv::cpu {

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa cap() {
  const char* name = std::getenv("FASTCONV_CPU_ISA");
  if (!name || !*name) return Isa::avx512;
  for (Isa isa : kAll)
    if (!strcmp(name, isa_name(isa))) return isa;
  fail("FASTCONV_CPU_ISA must be portable, avx2 or avx512, got ", name);
}

}  // namespace

Isa isa() {
  static const Isa best = std::min(of_processor(), cap());
  return best;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

}  // namespace fastconv::cpu
