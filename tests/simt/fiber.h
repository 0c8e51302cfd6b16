// SPDX-License-Identifier: MIT
// Fibers: one stack for each CUDA thread, switched by hand. A switch saves and restores the registers that a
// call keeps, nothing else: 4 ns on x86-64. Other processors use ucontext (200 ns, a system call for the
// signal mask).
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(FASTCONV_SIMT_UCONTEXT)
#include <ucontext.h>
#define SIMT_USES_UCONTEXT 1
#endif

namespace fastconv::simt {

struct Fiber {
#if SIMT_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

constexpr size_t kStackBytes = 128 << 10;

// Prepares `fiber` to run `entry` on stack number `stack` from its beginning. `entry` never returns.
void prepare(Fiber& fiber, int stack, void (*entry)());

// Saves the running code in `from` and continues `to`.
void switch_to(Fiber& from, Fiber& to);

// Lowest address of a stack. A page that faults lies below.
char* stack_bottom(int stack);

// Stacks are a pool: a thread that has ended gives its own back.
int take_stack();
void give_back_stack(int stack);
void give_back_all_stacks();

}  // namespace fastconv::simt
