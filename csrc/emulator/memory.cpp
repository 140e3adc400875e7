// Strong loads and stores: what a store buffer, and a load that goes ahead of earlier ones, can show within the PTX
// memory model. With seed 0 every access is at once.
#include <algorithm>

#include "internal.h"

namespace rnnfast::emulator {
namespace {

// How many commits back a relaxed load may look, and how full a store buffer may get.
constexpr size_t kHistory = 64;
constexpr size_t kBuffered = 16;
constexpr uint64_t kStaleLoads = 4;  // one of so many loads may go back in time
constexpr unsigned kLoadsBetweenYields = 32;

bool overlap(uintptr_t a, size_t a_bytes, uintptr_t b, size_t b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

std::byte* bytes_at(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

void remember_read(Fiber& me, const Key& key) {
  if (key && std::find(me.read_keys.begin(), me.read_keys.end(), key) == me.read_keys.end())
    me.read_keys.push_back(key);
}

void commit(Fiber* owner, const BufferedStore& store) {
  Scheduler& s = scheduler();
  const uintptr_t word = store.address / 16;
  ++s.time;
  if (s.shuffled) {
    Commit commit{s.time, store.address, store.bytes, {}, {}};
    std::memcpy(commit.old.data(), bytes_at(store.address), store.bytes);
    if (tsan_here()) commit.old_keys = s.word_keys[word];
    s.history.push_back(std::move(commit));
    if (s.history.size() > kHistory) s.history.pop_front();
    if (owner)
      for (unsigned i = 0; i < store.bytes; i += 4) owner->seen[(store.address + i) / 4] = s.time;
  }
  if (tsan_here()) {
    WordKeys& keys = s.word_keys[word];
    std::erase_if(keys,
                  [&](const auto& k) { return overlap(k.first.first, k.first.second, store.address, store.bytes); });
    if (store.key) keys.push_back({{store.address, store.bytes}, store.key});
  }
  std::memcpy(bytes_at(store.address), store.value.data(), store.bytes);
  s.spins = 0;
}

// One store that may leave now: no earlier one of the thread overlaps it, and a release is the oldest.
void commit_one(StoreBuffer& buffer) {
  std::vector<size_t> free;
  for (size_t i = 0; i < buffer.stores.size(); ++i) {
    const BufferedStore& store = buffer.stores[i];
    bool blocked = store.release && i > 0;
    for (size_t j = 0; j < i && !blocked; ++j) {
      const BufferedStore& earlier = buffer.stores[j];
      blocked = overlap(store.address, store.bytes, earlier.address, earlier.bytes);
    }
    if (!blocked) free.push_back(i);
  }
  const size_t chosen = free[scheduler().random.below(free.size())];
  const BufferedStore store = buffer.stores[chosen];
  buffer.stores.erase(buffer.stores.begin() + static_cast<std::ptrdiff_t>(chosen));
  commit(buffer.owner, store);
  if (buffer.stores.empty()) std::erase(scheduler().buffers, &buffer);
}

// The time as of which this load sees memory.
uint64_t time_of_load(Fiber& me, uintptr_t address, size_t bytes) {
  Scheduler& s = scheduler();
  if (!s.shuffled) return s.time;
  const bool touched = std::any_of(s.history.begin(), s.history.end(),
                                   [&](const Commit& c) { return overlap(c.address, c.bytes, address, bytes); });
  if (!touched) return s.time;
  uint64_t oldest = std::max(me.floor, s.history.front().time - 1), time = s.time;
  for (size_t i = 0; i < bytes; i += 4) oldest = std::max(oldest, me.seen[(address + i) / 4]);
  if (oldest < s.time && s.random.below(kStaleLoads) == 0) time = oldest + s.random.below(s.time - oldest + 1);
  for (size_t i = 0; i < bytes; i += 4) me.seen[(address + i) / 4] = time;
  return time;
}

}  // namespace

void delayed_store(void* address, const void* value, size_t bytes, bool release) {
  Fiber& me = running();
  if (me.unwinding) return;
  Scheduler& s = scheduler();
  Quiet quiet;
  BufferedStore store{reinterpret_cast<uintptr_t>(address), static_cast<unsigned>(bytes), release, {}, me.fence_key};
  std::memcpy(store.value.data(), value, bytes);
  if (release) {
    store.key = Key::make();
    store.key.release();
  }
  if (!s.shuffled) {
    commit(&me, store);
    return;
  }
  if (!me.stores) me.stores = std::make_unique<StoreBuffer>(StoreBuffer{&me, me.block->grid, {}});
  if (me.stores->stores.empty()) s.buffers.push_back(me.stores.get());
  me.stores->stores.push_back(std::move(store));
  if (me.stores->stores.size() > kBuffered) commit_one(*me.stores);
  if (s.random.below(kBuffered) == 0) yield();
}

void forwarded_load(const void* address, void* value, size_t bytes, bool acquires) {
  Fiber& me = running();
  if (me.unwinding) {
    std::memcpy(value, address, bytes);
    return;
  }
  Scheduler& s = scheduler();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  {
    Quiet quiet;
    // A loop that polls must not keep the thread that would end it from running.
    if (begin == me.last_load || ++me.loads % kLoadsBetweenYields == 0) yield();
    me.last_load = begin;
    const uint64_t time = time_of_load(me, begin, bytes);
    auto* out = static_cast<std::byte*>(value);
    std::memcpy(out, address, bytes);
    const WordKeys* word_keys = nullptr;
    if (tsan_here()) word_keys = &s.word_keys[begin / 16];
    // Takes back the commits after `time`, newest first.
    for (auto commit = s.history.rbegin(); commit != s.history.rend() && commit->time > time; ++commit) {
      if (tsan_here() && commit->address / 16 == begin / 16) word_keys = &commit->old_keys;
      for (unsigned i = 0; i < commit->bytes; ++i)
        if (commit->address + i >= begin && commit->address + i < begin + bytes)
          out[commit->address + i - begin] = commit->old[i];
    }
    if (me.stores) {
      for (const BufferedStore& store : me.stores->stores)
        for (unsigned i = 0; i < store.bytes; ++i)
          if (store.address + i >= begin && store.address + i < begin + bytes)
            out[store.address + i - begin] = store.value[i];
    }
    me.newest_read = std::max(me.newest_read, time);
    if (acquires) me.floor = std::max(me.floor, time);
    if (word_keys) {
      for (const auto& [range, key] : *word_keys) {
        if (!overlap(range.first, range.second, begin, bytes)) continue;
        if (acquires) key.acquire();
        remember_read(me, key);
      }
    }
  }
}

void drain(StoreBuffer& buffer) {
  while (!buffer.stores.empty()) commit_one(buffer);
}

void drain_stores() {
  Fiber& me = running();
  Quiet quiet;
  if (me.stores) drain(*me.stores);
}

void fence() {
  Fiber& me = running();
  if (me.unwinding) return;
  Quiet quiet;
  drain_stores();
  for (const Key& key : me.read_keys) key.acquire();
  me.read_keys.clear();
  me.floor = std::max(me.floor, me.newest_read);
  me.fence_key = Key::make();
  me.fence_key.release();
}

bool commit_some_store() {
  Scheduler& s = scheduler();
  if (s.buffers.empty()) return false;
  commit_one(*s.buffers[s.random.below(s.buffers.size())]);
  return true;
}

void retire_stores(Fiber& fiber) {
  if (!fiber.stores || fiber.stores->stores.empty()) return;
  fiber.stores->owner = nullptr;
  scheduler().orphans.push_back(std::move(fiber.stores));
}

void drain_grid(const Grid& grid) {
  Scheduler& s = scheduler();
  for (auto& buffer : s.orphans)
    if (buffer->grid == &grid) drain(*buffer);
  std::erase_if(s.orphans, [&](const auto& buffer) { return buffer->grid == &grid; });
}

void forget_memory() {
  Scheduler& s = scheduler();
  s.buffers.clear();
  s.orphans.clear();
  s.history.clear();
  s.word_keys.clear();
}

void release(const void* key) {
  Fiber& me = running();
  if (me.unwinding) return;
  drain_stores();
  if (tsan_here()) __tsan_release(const_cast<void*>(key));
}

void acquire(const void* key) {
  running().floor = scheduler().time;
  if (tsan_here()) __tsan_acquire(const_cast<void*>(key));
}

}  // namespace rnnfast::emulator
