// Fiber stacks and the switch between them, with what the sanitizers must be told. On x86-64 the switch is a few
// instructions; elsewhere ucontext, whose two system calls a switch cost ten times as much.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "internal.h"

#if defined(__x86_64__) && !defined(RNNFAST_EMULATOR_UCONTEXT)
// Leaves on the stack what a callee must preserve, with the control words of both floating-point units, and returns to
// whoever left the other stack so.
extern "C" void rnnfast_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.type rnnfast_emulator_switch, @function
rnnfast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rnnfast_emulator_switch, .-rnnfast_emulator_switch
.popsection
)");
#endif

namespace rnnfast::emulator {
namespace {

constexpr size_t kPage = 4096;
// Frames that a sanitizer watches are larger.
constexpr size_t kSanitizerScale = 4;
// Idle contexts that TSan is asked to keep, out of the 8128 that it has.
constexpr size_t kIdleContexts = 4000;

struct Idle {
  void* bottom;
  size_t size;
  void* tsan;
};

// Stacks that nobody uses now. Under TSan a stack keeps its context: its history is that of the threads that ran on it,
// so it may serve again only when the host has ordered itself after these (refresh_contexts), as every later thread is.
struct Pool {
  std::vector<Idle> clean, used;

  void free(const Idle& idle) {
    if (idle.tsan) __tsan_destroy_fiber(idle.tsan);
    munmap(static_cast<std::byte*>(idle.bottom) - kPage, idle.size + kPage);
  }
  ~Pool() {
    // At exit TSan's contexts are left alone: it is winding down too.
    for (const std::vector<Idle>* idle : {&clean, &used})
      for (const Idle& i : *idle) munmap(static_cast<std::byte*>(i.bottom) - kPage, i.size + kPage);
  }
};

Pool& pool() {
  static Pool pool;
  return pool;
}

void* new_stack(size_t size) {
  void* memory =
      mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // A stack that overflows faults in its lowest page.
  mprotect(memory, kPage, PROT_NONE);
  return static_cast<std::byte*>(memory) + kPage;
}

void begin_at(Context& context, void (*entry)()) {
#if defined(__x86_64__) && !defined(RNNFAST_EMULATOR_UCONTEXT)
  // What rnnfast_emulator_switch pops: control words, six registers, the entry; above it a null return address.
  auto* top = reinterpret_cast<uint64_t*>(static_cast<std::byte*>(context.bottom) + context.size);
  constexpr uint64_t kControlWords = 0x0000037f'00001f80u;
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  *--top = kControlWords;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.bottom;
  context.registers.uc_stack.ss_size = context.size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

}  // namespace

void make_context(Context& context, size_t stack_bytes, void (*entry)()) {
  const size_t scale = asan_here() || tsan_here() ? kSanitizerScale : 1;
  context.size = (stack_bytes * scale + kPage - 1) / kPage * kPage;
  std::vector<Idle>& clean = pool().clean;
  while (!clean.empty() && clean.back().size != context.size) {
    pool().free(clean.back());
    clean.pop_back();
  }
  if (!clean.empty()) {
    context.bottom = clean.back().bottom;
    context.tsan = clean.back().tsan;
    clean.pop_back();
  } else {
    context.bottom = new_stack(context.size);
    if (tsan_here()) context.tsan = __tsan_create_fiber(0);
  }
  context.fake_stack = nullptr;
  begin_at(context, entry);
}

void free_context(Context& context) {
  if (!context.bottom) return;
  // Frames that a fiber left without returning may still be marked.
  if (asan_here()) __asan_unpoison_memory_region(context.bottom, context.size);
  const Idle idle{context.bottom, context.size, context.tsan};
  context.bottom = nullptr;
  context.tsan = nullptr;
  if (!tsan_here())
    pool().clean.push_back(idle);
  else if (pool().used.size() + pool().clean.size() < kIdleContexts)
    pool().used.push_back(idle);
  else
    pool().free(idle);
}

void refresh_contexts() {
  Pool& p = pool();
  p.clean.insert(p.clean.end(), p.used.begin(), p.used.end());
  p.used.clear();
}

void adopt_host_context(Context& context) {
  if (tsan_here()) context.tsan = __tsan_get_current_fiber();
  if (!asan_here()) return;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
  pthread_attr_getstack(&attributes, &context.bottom, &context.size);
  pthread_attr_destroy(&attributes);
}

void switch_context(Context& from, Context& to, bool from_ends) {
  if (asan_here()) __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
  constexpr unsigned kNoOrdering = 1;
  if (to.tsan) __tsan_switch_to_fiber(to.tsan, kNoOrdering);
#if defined(__x86_64__) && !defined(RNNFAST_EMULATOR_UCONTEXT)
  rnnfast_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive_in_context(from);
}

void arrive_in_context(Context& context) {
  if (asan_here()) __sanitizer_finish_switch_fiber(context.fake_stack, nullptr, nullptr);
}

}  // namespace rnnfast::emulator
