// What the emulator tells ASan and TSan about fibers and ordering. The hooks are weak: linked without a sanitizer they
// are absent and nothing is called. This directory is compiled without -fsanitize=thread, so that only kernel code is
// watched.
#pragma once

#include <cstddef>

extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_set_fiber_name(void* fiber, const char* name);
[[gnu::weak]] void __tsan_acquire(void* key);
[[gnu::weak]] void __tsan_release(void* key);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreSyncBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreSyncEnd(const char* file, int line);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace rnnfast::emulator {

inline bool tsan_here() { return __tsan_create_fiber != nullptr; }
inline bool asan_here() { return __sanitizer_start_switch_fiber != nullptr; }

// While it lives TSan ignores what the current context reads, writes, allocates and frees: the emulator's own data.
// Standard containers need it because the linker may take their instrumented instances from a kernel's object file.
class Quiet {
 public:
  Quiet() {
    if (tsan_here()) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    if (tsan_here()) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// While it lives TSan takes no atomic of the current context for an ordering: the host drops what threads share by
// shared_ptr.
class NoOrdering {
 public:
  NoOrdering() {
    if (tsan_here()) AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  }
  ~NoOrdering() {
    if (tsan_here()) AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
  NoOrdering(const NoOrdering&) = delete;
  NoOrdering& operator=(const NoOrdering&) = delete;
};

// An address that stands for "what happened before release" in TSan. Counted by hand: std::shared_ptr counts with
// atomics, which TSan would take for an ordering of the threads that share it. Empty without TSan.
class Key {
 public:
  Key() = default;
  Key(const Key& other) : counter_(other.counter_) {
    if (counter_) ++*counter_;
  }
  Key(Key&& other) noexcept : counter_(other.counter_) { other.counter_ = nullptr; }
  Key& operator=(Key other) noexcept {
    int* mine = counter_;
    counter_ = other.counter_;
    other.counter_ = mine;
    return *this;
  }
  ~Key() {
    if (counter_ && --*counter_ == 0) delete counter_;
  }

  static Key make() {
    Key key;
    if (tsan_here()) key.counter_ = new int(1);
    return key;
  }
  explicit operator bool() const { return counter_ != nullptr; }
  bool operator==(const Key& other) const { return counter_ == other.counter_; }
  void release() const {
    if (counter_) __tsan_release(counter_);
  }
  void acquire() const {
    if (counter_) __tsan_acquire(counter_);
  }

 private:
  int* counter_ = nullptr;
};

}  // namespace rnnfast::emulator
