// Tells TSan what orders the threads of torch's pool. libgomp, which runs them, is not instrumented: TSan sees neither
// that a region begins after what its caller did before, nor that the caller goes on after the region. Without this
// every parallel region looks like a race; with the usual remedy, suppressing what passes libgomp, no race in one would
// be seen. Preloaded, so that torch's regions begin here.
#include <dlfcn.h>

#include <cstdlib>

extern "C" {

void __tsan_acquire(void* address);
void __tsan_release(void* address);

using Body = void (*)(void*);

struct Region {
  Body body;
  void* data;
  char begins, ends;
};

static void member(void* pointer) {
  auto* region = static_cast<Region*>(pointer);
  __tsan_acquire(&region->begins);
  region->body(region->data);
  __tsan_release(&region->ends);
}

__attribute__((visibility("default"), no_sanitize("thread"))) void GOMP_parallel(Body body, void* data,
                                                                                 unsigned threads, unsigned flags) {
  using Function = void (*)(Body, void*, unsigned, unsigned);
  static const auto libgomp = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  if (!libgomp) std::abort();
  Region region{body, data, 0, 0};
  __tsan_release(&region.begins);
  libgomp(member, &region, threads, flags);
  __tsan_acquire(&region.ends);
}
}
