// The emulator's own data: fibers, blocks, clusters, grids, and the one scheduler that runs them. Everything runs in
// one host thread at a time, so there is no lock below launch() and synchronize().
#pragma once

#if !defined(__x86_64__) || defined(RNNFAST_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "sanitizers.h"

namespace rnnfast::emulator {

struct Block;
struct Cluster;
struct Grid;
struct Fiber;

// A stack and the registers of one flow of control; the sanitizers' names for it.
struct Context {
#if defined(__x86_64__) && !defined(RNNFAST_EMULATOR_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers{};
#endif
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  void* bottom = nullptr;
  size_t size = 0;
};

struct BufferedStore {
  uintptr_t address;
  unsigned bytes;
  bool release;
  std::array<std::byte, 16> value;
  Key key;  // what an acquire that reads this store orders after
};

// Stores of one thread that others do not see yet, oldest first. It outlives a thread that ends.
struct StoreBuffer {
  Fiber* owner;
  Grid* grid;
  std::vector<BufferedStore> stores;
};

struct Fiber : Thread {
  Context context;
  Block* block = nullptr;
  bool started = false, waits = false, ended = false, unwinding = false;
  std::function<bool()> ready;  // of wait_until

  std::unique_ptr<StoreBuffer> stores;
  uint64_t floor = 0;                            // commits up to this time are visible to it
  uint64_t newest_read = 0;                      // the latest time of which it has seen memory
  std::unordered_map<uintptr_t, uint64_t> seen;  // by 4-byte word: its loads there may not go back before this time
  Key fence_key;                                 // released by its last fence
  std::vector<Key> read_keys;                    // what a fence will acquire
  uintptr_t last_load = 0;
  unsigned loads = 0;

  bool waited_for_previous = false;
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
  Key cluster_key;
};

// Threads that meet: a block barrier, a grid barrier.
struct Barrier {
  unsigned count = 0, arrived = 0;
  std::vector<bool> here;  // by thread of the block
  std::vector<Fiber*> waiting;
  Site site;
  const char* what = "";
  Key key;
};

// Lanes of one warp that meet.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  size_t bytes = 0;
  std::array<const void*, kWarpSize> mine{};
  std::array<void*, kWarpSize> all{};
  std::array<Fiber*, kWarpSize> lanes{};
  Site site;
  const char* what = "";
  Key key;
};

struct Block {
  Cluster* cluster = nullptr;
  Grid* grid = nullptr;
  Dim3 index;
  unsigned rank = 0;  // in its cluster
  unsigned live = 0;  // threads that have not ended
  bool triggered = false;
  std::byte* shared = nullptr;
  std::vector<std::unique_ptr<Fiber>> threads;
  std::array<Barrier, 16> barriers;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // by warp

  ~Block();
};

struct Cluster {
  Grid* grid = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live_blocks = 0;
  unsigned operations = 0;  // asynchronous, issued by its threads and under way
  unsigned arrived = 0, threads = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  Key key = Key::make();
};

struct Grid {
  Launch launch;
  std::string name;
  std::function<void()> body;
  size_t blocks = 0, started_blocks = 0, ended_blocks = 0, triggered_blocks = 0;
  std::vector<unsigned> cluster_order;
  std::vector<std::unique_ptr<Cluster>> clusters;  // that run now
  Barrier barrier;
  bool ended = false;
  Key start_key = Key::make(), end_key = Key::make();
  bool previous_ended = true;
  Key previous_key;
  std::vector<Fiber*> waiting_for_previous;
};

struct Operation {
  std::function<void()> effect, completed;
  const void* key;
  Cluster* cluster;
  Key issued;    // released by the issuing thread
  Key start;     // of the grid
  Key previous;  // end of the grid before, if the issuing thread has waited for it
  std::string who;
};

// Which store each part of a 16-byte word was written by last: (address, bytes) and its key. Kept for TSan only.
using WordKeys = std::vector<std::pair<std::pair<uintptr_t, unsigned>, Key>>;

// One strong store as it became visible, so that a relaxed load can still see what was there before.
struct Commit {
  uint64_t time;
  uintptr_t address;
  unsigned bytes;
  std::array<std::byte, 16> old;
  WordKeys old_keys;
};

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u + 1; }
  // Uniform below n, nearly.
  uint64_t below(uint64_t n) {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
  }

 private:
  uint64_t state_ = 1;
};

struct Scheduler {
  Context host;  // the host thread, while it schedules
  Fiber* current = nullptr;
  bool running = false;
  bool shuffled = false;  // Options::seed is not 0
  Random random;
  std::deque<Fiber*> ready;
  std::vector<Fiber*> polling;
  std::vector<Fiber*> ended;
  std::deque<std::unique_ptr<Grid>> grids;
  std::vector<std::unique_ptr<Operation>> operations;
  const Operation* operation = nullptr;  // whose effect runs now
  bool operation_ended = false;          // since ended blocks were put away last
  unsigned until_service = 0;
  uint64_t spins = 0;  // yields since anything happened
  bool failed = false;
  std::string error;
  std::vector<Key> joined;  // ends of grids that the host has not acquired yet

  // Strong memory.
  uint64_t time = 0;
  uint64_t host_floor = 0;
  std::deque<Commit> history;
  std::vector<StoreBuffer*> buffers;                  // those that are not empty
  std::vector<std::unique_ptr<StoreBuffer>> orphans;  // of threads that have ended
  std::unordered_map<uintptr_t, WordKeys> word_keys;  // by address / 16
};
Scheduler& scheduler();

// The running fiber; fails outside a kernel.
Fiber& running();
// The running fiber stops until wake(); others run. Throws when the launch is given up.
void suspend();
void wake(Fiber& fiber);
void switch_context(Context& from, Context& to, bool from_ends);
// Gives `context` a stack on which `entry` runs when first switched to.
void make_context(Context& context, size_t stack_bytes, void (*entry)());
// Called by each context when control has come to it.
void arrive_in_context(Context& context);
void free_context(Context& context);
// The host has ordered itself after every thread that has ended.
void refresh_contexts();
// The host thread's own context, for switching back.
void adopt_host_context(Context& context);

// "kernel k, block (0,0,0), thread 3"
std::string name_of(const Fiber& fiber);
// "(0,0,0) 3 of k": for TSan, which takes 63 characters. tests/sanitizer_report.py makes the other of it.
std::string short_name_of(const Fiber& fiber);
// The heading and, below it, every thread of every block that runs.
std::string where_all_are(const std::string& heading);
std::string text_of(const Site& site);
std::string text_of(const Dim3& index);

// memory.cpp
void drain(StoreBuffer& buffer);
bool commit_some_store();
void retire_stores(Fiber& fiber);
void drain_grid(const Grid& grid);
void forget_memory();
// engine.cpp
bool run_some_operation();

}  // namespace rnnfast::emulator
