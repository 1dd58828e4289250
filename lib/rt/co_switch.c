/*
 * The context switch; see co_switch.h.
 *
 * A suspended context is a stack pointer; on the stack lie the callee-saved registers and the address
 * to go on at. co_context_init() builds by hand what a suspended context would look like just before it
 * "returns" into entry(). Sources: System V ABI for AMD64, section 3.2; AAPCS64, section 6.1.
 */
#include "rt/co_switch.h"

#include <stdint.h>
#include <string.h>

#if defined(CO_UCONTEXT)

void co_context_init(
	struct co_context *context, void *stack, size_t size_bytes, void (*entry)(void))
{
	getcontext(&context->ucontext);
	context->ucontext.uc_stack.ss_sp = stack;
	context->ucontext.uc_stack.ss_size = size_bytes;
	context->ucontext.uc_link = NULL;
	makecontext(&context->ucontext, entry, 0);
}

void co_context_switch(struct co_context *from, struct co_context *to)
{
	swapcontext(&from->ucontext, &to->ucontext);
}

#elif defined(__x86_64__)

/* rdi: where to save the stack pointer; rsi: the one to continue with. */
__asm__(".text\n"
	".globl co_context_switch_asm\n"
	".hidden co_context_switch_asm\n"
	".type co_context_switch_asm, @function\n"
	"co_context_switch_asm:\n"
	"	.cfi_startproc\n"
	"	endbr64\n"
	"	pushq %rbp\n"
	"	pushq %rbx\n"
	"	pushq %r12\n"
	"	pushq %r13\n"
	"	pushq %r14\n"
	"	pushq %r15\n"
	"	movq %rsp, (%rdi)\n"
	"	movq %rsi, %rsp\n"
	"	popq %r15\n"
	"	popq %r14\n"
	"	popq %r13\n"
	"	popq %r12\n"
	"	popq %rbx\n"
	"	popq %rbp\n"
	"	ret\n"
	"	.cfi_endproc\n"
	".size co_context_switch_asm, . - co_context_switch_asm\n");

enum { SAVED_REGISTERS = 6, ENTRY_SLOT = 6, FRAME_WORDS = 8 };

#elif defined(__aarch64__)

/* x0: where to save the stack pointer; x1: the one to continue with. x19-x29, lr and d8-d15 are kept. */
__asm__(".text\n"
	".globl co_context_switch_asm\n"
	".hidden co_context_switch_asm\n"
	".type co_context_switch_asm, %function\n"
	"co_context_switch_asm:\n"
	"	sub sp, sp, #160\n"
	"	stp x19, x20, [sp, #0]\n"
	"	stp x21, x22, [sp, #16]\n"
	"	stp x23, x24, [sp, #32]\n"
	"	stp x25, x26, [sp, #48]\n"
	"	stp x27, x28, [sp, #64]\n"
	"	stp x29, x30, [sp, #80]\n"
	"	stp d8, d9, [sp, #96]\n"
	"	stp d10, d11, [sp, #112]\n"
	"	stp d12, d13, [sp, #128]\n"
	"	stp d14, d15, [sp, #144]\n"
	"	mov x9, sp\n"
	"	str x9, [x0]\n"
	"	mov sp, x1\n"
	"	ldp x19, x20, [sp, #0]\n"
	"	ldp x21, x22, [sp, #16]\n"
	"	ldp x23, x24, [sp, #32]\n"
	"	ldp x25, x26, [sp, #48]\n"
	"	ldp x27, x28, [sp, #64]\n"
	"	ldp x29, x30, [sp, #80]\n"
	"	ldp d8, d9, [sp, #96]\n"
	"	ldp d10, d11, [sp, #112]\n"
	"	ldp d12, d13, [sp, #128]\n"
	"	ldp d14, d15, [sp, #144]\n"
	"	add sp, sp, #160\n"
	"	ret\n"
	".size co_context_switch_asm, . - co_context_switch_asm\n");

enum { SAVED_REGISTERS = 20, ENTRY_SLOT = 11, FRAME_WORDS = 20 };

#endif

#ifndef CO_UCONTEXT

void co_context_switch_asm(void **save_stack_pointer, void *load_stack_pointer);

void co_context_init(
	struct co_context *context, void *stack, size_t size_bytes, void (*entry)(void))
{
	uintptr_t top = ((uintptr_t)stack + size_bytes) & ~(uintptr_t)15;
	void **frame = (void **)top - FRAME_WORDS;

	memset(frame, 0, FRAME_WORDS * sizeof(*frame));
	frame[ENTRY_SLOT] = (void *)entry;
	context->stack_pointer = frame;
}

void co_context_switch(struct co_context *from, struct co_context *to)
{
	co_context_switch_asm(&from->stack_pointer, to->stack_pointer);
}

#endif
