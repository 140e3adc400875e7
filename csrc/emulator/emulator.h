// Runs CUDA kernels on the host: every CUDA thread is a fiber, and one scheduler switches among them at the points
// where threads can meet. The emulated bodies of csrc/cuda/primitives/ are written with the services below and with
// nothing else of the emulator: there where a body is a call, else in primitives/ here. docs/emulator.md tells what is
// modelled and what is not.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <string>

namespace rnnfast::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The source line of a synchronisation, for messages and for leaving it out (Options::skip).
using Site = std::source_location;

struct Options {
  uint64_t seed = 0;            // 0: threads in order and stores at once; else schedules and delays are shuffled by it
  bool seed_given = false;      // by the environment
  int resident_blocks = 4;      // blocks of an ordinary launch that run at the same time
  int device_blocks = 1 << 20;  // that the device says it could hold at the same time
  size_t stack_bytes = 64 << 10;
  std::string skip;         // "file:line" of a synchronisation to leave out: shows that a test notices
  bool list_sites = false;  // print each synchronisation site once, as it is first reached
};
// This process's options. First read from RNNFAST_EMULATOR_SEED, _RESIDENT, _DEVICE_BLOCKS, _STACK, _SKIP, _LIST_SITES:
// throws std::invalid_argument where a value makes no sense.
Options& options();
// Why the result says nothing of Options::skip: no synchronisation of that place was reached. "" where one was, or none
// was to be left out.
std::string skip_problem();

// Copies that one thread has issued with cp.async (or bulk stores), in groups: how many of each group are under way.
struct CopyGroups {
  std::shared_ptr<int> open = std::make_shared<int>(0);
  std::deque<std::shared_ptr<int>> committed;
};

// The CUDA thread that runs now.
struct Thread {
  Dim3 thread_index, block_index, block_size, grid_size;
  unsigned linear_thread = 0;  // in its block
  unsigned cluster_rank = 0, cluster_size = 1;
  CopyGroups copies, bulk_stores;
  Site site;              // the synchronisation it reached last, and its name
  const char* what = "";  // what it waits for or did last
};
Thread& self();

// Dynamic shared memory of the running thread's block, and where the same address lies in the block of `rank` of its
// cluster.
std::byte* shared_memory();
size_t shared_bytes();
void* in_peer(const void* shared_address, unsigned rank);
// Ends the launch if there is no such block in the cluster or it has ended.
void require_peer(unsigned rank);

// Whether this site is to be left out (Options::skip). Each emulated synchronisation asks first.
bool skipped(const Site& site, const char* what);
// Notes where the thread is, for messages: for what is no synchronisation by itself.
void at(const Site& site, const char* what);

// Lanes of the caller's warp named in `mask` meet; each leaves `bytes` bytes at `mine` and finds those of lane i at
// all + i * bytes. With `orders`, what each wrote before happens before what the others do after (as __syncwarp; a
// shuffle or an mma orders nothing).
void exchange_bytes(uint32_t mask, const void* mine, void* all, size_t bytes, bool orders, const char* what,
                    const Site& site);
template <class T>
std::array<T, kWarpSize> exchange(uint32_t mask, const T& mine, bool orders, const char* what, const Site& site) {
  std::array<T, kWarpSize> all{};
  exchange_bytes(mask, &mine, all.data(), sizeof(T), orders, what, site);
  return all;
}

// Named barrier `id` of the block (0 is __syncthreads) for `count` threads; `waits` false: arrive only.
void block_barrier(unsigned id, unsigned count, bool waits, const char* what, const Site& site);

// The running thread waits until `ready()`; `what` and `site` go into the report of a deadlock. The scheduler calls
// ready() from outside any fiber: it must not touch instrumented memory other than plain reads.
void wait_until(std::function<bool()> ready, const char* what, const Site& site);
// Lets other threads run now and then: for loops that poll memory themselves.
void yield();

// Ordering for the race detector: what the caller did before release(key) happens before what a caller of
// acquire(key) does after. Any address serves as a key.
void release(const void* key);
void acquire(const void* key);

// The asynchronous engines (cp.async, bulk copies, st.async). `effect` runs some time later, in any order among the
// operations under way, with what the issuing thread did before it visible (`after_issuer` false: not even that, as
// for the async proxy without a fence). Its own memory accesses are unordered with every thread until somebody
// acquires `key`, which is released when effect is done; then `completed` runs.
void issue(std::function<void()> effect, std::function<void()> completed, const void* key, bool after_issuer = true);

// A store that other threads may see later: it enters the running thread's store buffer and leaves it at a random
// time, in any order but that of stores to overlapping bytes. The thread's own forwarded_load sees it at once.
// `release`: everything the thread stored before leaves first, and acquire(address) orders after it.
void delayed_store(void* address, const void* value, size_t bytes, bool release);
// One indivisible load of up to 16 bytes that sees the thread's own buffered stores. With `acquires`, orders after the
// release store it reads.
void forwarded_load(const void* address, void* value, size_t bytes, bool acquires);
// The thread's buffered stores leave now. Barriers and fences call it.
void drain_stores();
// Fence at gpu scope: drains the stores, and makes a release of relaxed stores after it and an acquire of relaxed loads
// before it.
void fence();

// Ends the launch with an error that names the running thread, block and kernel.
[[noreturn]] void fail(const std::string& message);

// ---- host side (csrc/cuda/primitives/launch.h) ----------------------------------------------------------------------

struct Launch {
  const char* name = "";
  const void* entry = nullptr;  // the kernel's address: for a debugger
  Dim3 grid;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks a cluster, along x
  bool cooperative = false;  // all blocks at once; grid_sync is allowed
  bool dependent = false;    // programmatic dependent launch: may start before its predecessor has ended
};
// Queues a kernel on the one emulated stream; `body` is run by every thread. Throws std::runtime_error if it (or an
// earlier one) fails: bad configuration, deadlock, fail().
void launch(const Launch& launch, std::function<void()> body);
// Returns when everything queued has run; the host then sees all its writes. Throws as launch().
void synchronize();

// Prints where every thread is; to be called from a debugger.
void print_threads();
// "kernel k, block (0,0,0), thread 3, last at ..." of the CUDA thread that runs now, "" on the host.
std::string who_runs();

// Used by primitives/dependent_launch.h and cluster.h.
void wait_for_previous_grid(const Site& site);
void allow_next_grid(const Site& site);
void cluster_barrier(bool arrives, bool waits, const Site& site);
void grid_barrier(const Site& site);

}  // namespace rnnfast::emulator
