// SPDX-License-Identifier: MIT
#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "runtime.h"

namespace fastconv::simt {

namespace {

constexpr size_t kPage = 4096, kStride = kStackBytes + kPage, kStacks = kMaxCluster * kMaxThreads;

char* stacks() {
  static char* const base = [] {
    void* memory = mmap(nullptr, kStacks * kStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    FASTCONV_CHECK(memory != MAP_FAILED, "no memory for the stacks of the threads");
    return static_cast<char*>(memory);
  }();
  return base;
}

// Stacks that were used so far. Each new one costs the process two mappings, of which it may have 65530.
int used;

std::vector<int>& pool() {
  static std::vector<int> free;
  return free;
}

}  // namespace

char* stack_bottom(int stack) { return stacks() + stack * kStride + kPage; }

int take_stack() {
  if (pool().empty()) {
    mprotect(stacks() + used * kStride, kPage, PROT_NONE);
    return used++;
  }
  const int stack = pool().back();
  pool().pop_back();
  return stack;
}

void give_back_stack(int stack) { pool().push_back(stack); }

void give_back_all_stacks() {
  pool().clear();
  for (int i = used - 1; i >= 0; --i) pool().push_back(i);
}

#if SIMT_USES_UCONTEXT

void prepare(Fiber& fiber, int stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_bottom(stack);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// The jump at the end replaces `ret`: a return to an address that no call left behind is always mispredicted.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden simt_switch
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %r8
  jmp *%r8
.size simt_switch,.-simt_switch
)");

void prepare(Fiber& fiber, int stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_bottom(stack) + kStackBytes);
  *--top = nullptr;  // the stack pointer is 8 off a multiple of 16 where a function begins
  *--top = reinterpret_cast<void*>(entry);  // where the first switch jumps
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_to(Fiber& from, Fiber& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace fastconv::simt
