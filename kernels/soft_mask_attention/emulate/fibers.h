// Fibers: a stack each, and a switch of a few instructions. swapcontext makes a system call, which would be most of the time.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(SOFT_MASK_UCONTEXT)
#define SOFT_MASK_SWITCH_IN_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#ifdef SOFT_MASK_SWITCH_IN_ASSEMBLY

// Saves the registers that a function must preserve, stores the stack pointer to *save and goes on where `load` was saved.
extern "C" void soft_mask_switch_stack(void** save, void* load);

#ifdef __x86_64__
asm(R"(
.text
.weak soft_mask_switch_stack
.hidden soft_mask_switch_stack
.type soft_mask_switch_stack, @function
soft_mask_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size soft_mask_switch_stack, .-soft_mask_switch_stack
)");
#else
asm(R"(
.text
.weak soft_mask_switch_stack
.hidden soft_mask_switch_stack
.type soft_mask_switch_stack, %function
soft_mask_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size soft_mask_switch_stack, .-soft_mask_switch_stack
)");
#endif

#endif

namespace soft_mask::emulation {

class Fiber {
 public:
  // Makes the next switch to this fiber call `entry`, which must not return, on the given stack (its size a multiple of 16).
  void prepare(char* stack, std::size_t size, void (*entry)()) {
#ifdef SOFT_MASK_SWITCH_IN_ASSEMBLY
    auto* top = reinterpret_cast<void**>(stack + size);
#ifdef __x86_64__
    constexpr int num_saved = 8, return_address = 6;  // one word more, so that `entry` finds the stack aligned as after a call
#else
    constexpr int num_saved = 20, return_address = 11;
#endif
    void** saved = top - num_saved;
    for (int i = 0; i < num_saved; ++i) saved[i] = nullptr;
    saved[return_address] = reinterpret_cast<void*>(entry);
    stack_pointer_ = saved;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves off in this fiber, the running one, and goes on in `other`.
  void switch_to(Fiber& other) {
#ifdef SOFT_MASK_SWITCH_IN_ASSEMBLY
    soft_mask_switch_stack(&stack_pointer_, other.stack_pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

 private:
#ifdef SOFT_MASK_SWITCH_IN_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace soft_mask::emulation
