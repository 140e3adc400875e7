// The queue of launches, the order in which blocks start and threads run, and how a launch ends or fails.
#include "internal.h"
#include "launched.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

namespace rnnfast::emulator {
namespace {

// How many switches may pass before asynchronous work and polls get a turn.
constexpr unsigned kServiceInterval = 64;
constexpr unsigned kShuffledServiceInterval = 12;
// Yields without any store, meeting or end after which polling threads are taken to wait for ever.
constexpr uint64_t kSpinLimit = 2'000'000;
// TSan of gcc 12 knows 8128 contexts; some are needed for asynchronous operations.
constexpr size_t kTsanContexts = 7900;
constexpr size_t kMaxQueued = 64;
constexpr size_t kSharedAlignment = 128;
// What sm_90 has: opt-in shared memory a block, threads a block, blocks a cluster.
constexpr size_t kMaxShared = 227 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCluster = 16;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

struct Unwound {};  // thrown in a thread whose launch has been given up

std::recursive_mutex& host_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

std::map<std::string, int64_t>& launch_counts() {
  static std::map<std::string, int64_t> instance;
  return instance;
}

Fiber* pop_ready() {
  Scheduler& s = scheduler();
  if (s.ready.empty()) return nullptr;
  if (s.shuffled) std::swap(s.ready.front(), s.ready[s.random.below(s.ready.size())]);
  Fiber* fiber = s.ready.front();
  s.ready.pop_front();
  return fiber;
}

// The next fiber, or null when the host should run: nothing is ready, or its turn has come.
Fiber* next_fiber() {
  Scheduler& s = scheduler();
  if (s.failed || s.until_service == 0) return nullptr;
  --s.until_service;
  return pop_ready();
}

void give_up(const std::string& message) {
  Scheduler& s = scheduler();
  if (!s.failed) s.error = message;
  s.failed = true;
}

__attribute__((noinline, no_sanitize("thread"))) bool under_way(const std::shared_ptr<int>& group) {
  return *static_cast<const volatile int*>(group.get()) != 0;
}

// When a block has ended its shared memory is another's: what still copies into it, or out of it, spoils that.
void require_no_copies(const CopyGroups& groups, const char* what) {
  bool any = under_way(groups.open);
  for (const std::shared_ptr<int>& group : groups.committed) any |= under_way(group);
  if (any) fail(std::string("ends while copies are under way that it has issued with ") + what + " and not waited for");
}

void fiber_main() {
  Scheduler& s = scheduler();
  Fiber& me = *s.current;
  arrive_in_context(me.context);
  // What the host did before the launch is ordered before it.
  me.block->grid->start_key.acquire();
  try {
    me.block->grid->body();
    Quiet quiet;
    require_no_copies(self().copies, "cp_async");
    require_no_copies(self().bulk_stores, "bulk_store");
  } catch (const Unwound&) {
  } catch (const std::exception& error) {
    Quiet quiet;
    give_up(error.what());
  } catch (...) {
    Quiet quiet;
    give_up(name_of(me) + ": threw something that is no std::exception");
  }
  // The end of a thread is ordered before whatever waits for the end of its grid.
  me.block->grid->end_key.release();
  Fiber* next;
  {
    Quiet quiet;
    me.ended = true;
    s.ended.push_back(&me);
    next = next_fiber();
  }
  s.current = next;
  if (next) next->started = true;
  switch_context(me.context, next ? next->context : s.host, true);
  std::abort();  // nobody switches to a fiber that has ended
}

void resume(Fiber& fiber) {
  Scheduler& s = scheduler();
  fiber.started = true;
  s.current = &fiber;
  switch_context(s.host, fiber.context, false);
  s.current = nullptr;
}

Dim3 index_of(size_t block, const Dim3& grid) {
  return {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
          static_cast<unsigned>(block / grid.x / grid.y)};
}

void start_cluster(Grid& grid) {
  Scheduler& s = scheduler();
  const Launch& launch = grid.launch;
  const size_t first = size_t{grid.cluster_order[grid.started_blocks / launch.cluster]} * launch.cluster;
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  cluster->threads = launch.cluster * launch.threads;
  cluster->live_blocks = launch.cluster;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->grid = &grid;
    block->index = index_of(first + rank, launch.grid);
    block->rank = rank;
    block->live = launch.threads;
    block->meetings.resize((launch.threads + kWarpSize - 1) / kWarpSize);
    // As many bytes as asked for and no more, so that ASan sees an overrun.
    void* shared = nullptr;
    if (posix_memalign(&shared, kSharedAlignment, launch.shared_bytes) != 0) throw std::bad_alloc();
    std::memset(shared, kPoison, launch.shared_bytes);
    block->shared = static_cast<std::byte*>(shared);
    for (unsigned t = 0; t < launch.threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread_index = {t, 0, 0};
      fiber->block_index = block->index;
      fiber->block_size = {launch.threads, 1, 1};
      fiber->grid_size = launch.grid;
      fiber->linear_thread = t;
      fiber->cluster_rank = rank;
      fiber->cluster_size = launch.cluster;
      fiber->block = block.get();
      fiber->floor = s.host_floor;
      fiber->what = "start";
      make_context(fiber->context, options().stack_bytes, fiber_main);
      if (fiber->context.tsan) __tsan_set_fiber_name(fiber->context.tsan, short_name_of(*fiber).c_str());
      s.ready.push_back(fiber.get());
      block->threads.push_back(std::move(fiber));
    }
    cluster->blocks.push_back(std::move(block));
  }
  grid.started_blocks += launch.cluster;
  grid.clusters.push_back(std::move(cluster));
}

// The host orders after every grid that has ended.
void join_ended() {
  Scheduler& s = scheduler();
  for (const Key& key : s.joined) key.acquire();
  s.joined.clear();
  s.host_floor = s.time;
  refresh_contexts();
}

void start_blocks() {
  Scheduler& s = scheduler();
  for (size_t i = 0; i < s.grids.size(); ++i) {
    Grid& grid = *s.grids[i];
    if (i > 0) {
      const Grid& previous = *s.grids[i - 1];
      const bool all_triggered =
          previous.started_blocks == previous.blocks && previous.triggered_blocks == previous.blocks;
      if (!grid.launch.dependent || !(all_triggered || previous.ended)) return;
    } else if (grid.started_blocks == 0 && !grid.launch.dependent) {
      join_ended();
    }
    if (grid.started_blocks == 0) grid.start_key.release();
    const size_t resident = static_cast<size_t>(std::max(options().resident_blocks, 1));
    while (grid.started_blocks < grid.blocks) {
      const size_t live = grid.clusters.size() * grid.launch.cluster;
      if (!grid.launch.cooperative && live > 0 && live + grid.launch.cluster > resident) break;
      start_cluster(grid);
    }
  }
}

void trigger(Block& block) {
  if (block.triggered) return;
  block.triggered = true;
  ++block.grid->triggered_blocks;
}

void end_grid(Grid& grid, size_t position) {
  Scheduler& s = scheduler();
  drain_grid(grid);
  grid.ended = true;
  s.joined.push_back(grid.end_key);
  if (position + 1 < s.grids.size()) {
    Grid& next = *s.grids[position + 1];
    next.previous_ended = true;
    next.previous_key = grid.end_key;
    for (Fiber* fiber : next.waiting_for_previous) wake(*fiber);
    next.waiting_for_previous.clear();
  }
}

void end_thread(Fiber& fiber) {
  Block& block = *fiber.block;
  retire_stores(fiber);
  free_context(fiber.context);
  if (--block.live > 0) return;
  trigger(block);
  Cluster& cluster = *block.cluster;
  --cluster.live_blocks;
  ++block.grid->ended_blocks;
  // A peer's late access then meets freed memory, which ASan reports. Not under an operation that still writes there.
  if (cluster.operations == 0) {
    std::free(block.shared);
    block.shared = nullptr;
  }
}

// Puts away what has ended since the last time.
void reap() {
  Scheduler& s = scheduler();
  if (s.ended.empty() && !s.operation_ended) return;
  const NoOrdering no_ordering;
  s.operation_ended = false;
  s.spins = 0;
  for (Fiber* fiber : s.ended) end_thread(*fiber);
  s.ended.clear();
  for (size_t i = 0; i < s.grids.size(); ++i) {
    Grid& grid = *s.grids[i];
    std::erase_if(grid.clusters, [](const auto& c) { return c->live_blocks == 0 && c->operations == 0; });
    if (!grid.ended && grid.ended_blocks == grid.blocks && grid.clusters.empty()) end_grid(grid, i);
  }
  while (!s.grids.empty() && s.grids.front()->ended) s.grids.pop_front();
}

void check_polls() {
  Scheduler& s = scheduler();
  const NoOrdering no_ordering;
  for (size_t i = 0; i < s.polling.size();) {
    Fiber& fiber = *s.polling[i];
    if (!fiber.ready()) {
      ++i;
      continue;
    }
    s.polling[i] = s.polling.back();
    s.polling.pop_back();
    wake(fiber);
  }
}

// Every thread that has begun leaves its kernel by an exception, so that its locals are destroyed; then all is dropped.
void abandon() {
  Scheduler& s = scheduler();
  s.ready.clear();
  s.polling.clear();
  for (auto& grid : s.grids)
    for (auto& cluster : grid->clusters)
      for (auto& block : cluster->blocks)
        for (auto& fiber : block->threads) {
          if (fiber->started && !fiber->ended) {
            fiber->unwinding = true;
            resume(*fiber);
          }
          free_context(fiber->context);
        }
  for (auto& grid : s.grids) s.joined.push_back(grid->end_key);
  const NoOrdering no_ordering;
  s.ended.clear();
  s.ready.clear();
  s.operations.clear();
  forget_memory();
  s.grids.clear();
}

void run_queue() {
  Scheduler& s = scheduler();
  {
    Quiet quiet;
    s.running = true;
    s.failed = false;
    s.spins = 0;
    s.shuffled = options().seed != 0;
    s.random.seed(options().seed);
    adopt_host_context(s.host);
    try {
      while (!s.grids.empty() && !s.failed) {
        s.until_service =
            s.shuffled ? 1 + static_cast<unsigned>(s.random.below(kShuffledServiceInterval)) : kServiceInterval;
        start_blocks();
        if (Fiber* fiber = pop_ready()) {
          resume(*fiber);
        } else if (!run_some_operation() && !commit_some_store()) {
          check_polls();
          if (s.ready.empty() && !s.operation_ended) give_up(where_all_are("deadlock: no thread can go on"));
        }
        if (s.failed) break;
        reap();
        const bool often = s.shuffled ? s.random.below(2) == 0 : !s.operations.empty();
        if (often) run_some_operation();
        if (s.shuffled && s.random.below(2) == 0) commit_some_store();
        check_polls();
        if (s.spins > kSpinLimit) give_up(where_all_are("deadlock: threads poll memory that nobody writes"));
      }
    } catch (const std::exception& error) { give_up(error.what()); }
    if (s.failed) abandon();
    join_ended();
    forget_memory();
    s.running = false;
  }
  if (s.failed) {
    s.failed = false;
    throw std::runtime_error(s.error);
  }
}

std::string check(const Launch& launch) {
  const auto text = [](size_t n) { return std::to_string(n); };
  if (launch.threads < 1 || launch.threads > kMaxThreads)
    return "1 to 1024 threads a block, not " + text(launch.threads);
  if (launch.grid.x < 1 || launch.grid.y < 1 || launch.grid.z < 1) return "an empty grid " + text_of(launch.grid);
  if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    return "a grid beyond the limits: " + text_of(launch.grid);
  if (launch.shared_bytes > kMaxShared)
    return text(launch.shared_bytes) + " bytes of shared memory: at most " + text(kMaxShared);
  if (launch.cluster < 1 || launch.cluster > kMaxCluster)
    return "1 to 16 blocks a cluster, not " + text(launch.cluster);
  if (launch.grid.x % launch.cluster != 0)
    return "clusters of " + text(launch.cluster) + " do not divide the grid " + text_of(launch.grid);
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const size_t at_once = launch.cooperative ? blocks : launch.cluster;
  if (tsan_here() && at_once * launch.threads > kTsanContexts)
    return text(at_once * launch.threads) + " threads at once: TSan knows " + text(kTsanContexts);
  return {};
}

}  // namespace

Block::~Block() { std::free(shared); }

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

Fiber& running() {
  Fiber* fiber = scheduler().current;
  if (!fiber) throw std::runtime_error("a kernel's function was called outside a kernel");
  return *fiber;
}

Thread& self() { return running(); }

void suspend() {
  Scheduler& s = scheduler();
  Fiber& me = *s.current;
  Fiber* next = next_fiber();
  if (next != &me) {
    s.current = next;
    if (next) next->started = true;
    switch_context(me.context, next ? next->context : s.host, false);
  }
  if (me.unwinding) throw Unwound{};
}

void wake(Fiber& fiber) {
  fiber.waits = false;
  scheduler().ready.push_back(&fiber);
}

void yield() {
  Fiber& me = running();
  if (me.unwinding) return;
  Quiet quiet;
  ++scheduler().spins;
  scheduler().ready.push_back(&me);
  suspend();
}

void wait_until(std::function<bool()> ready, const char* what, const Site& site) {
  Fiber& me = running();
  Quiet quiet;
  while (!me.unwinding && !ready()) {
    me.what = what;
    me.site = site;
    me.waits = true;
    me.ready = ready;
    scheduler().polling.push_back(&me);
    suspend();
    me.ready = nullptr;
  }
}

void fail(const std::string& message) {
  Quiet quiet;
  const Scheduler& s = scheduler();
  std::string who = "emulator";
  if (s.current) {
    const Fiber& me = *s.current;
    who = name_of(me);
    if (*me.what && me.site.line() != 0) who += std::string(", at ") + me.what + " " + text_of(me.site);
  } else if (s.operation) {
    who = s.operation->who;
  }
  throw std::runtime_error(who + ": " + message);
}

void wait_for_previous_grid(const Site& site) {
  Fiber& me = running();
  if (me.unwinding) return;
  Grid& grid = *me.block->grid;
  {
    Quiet quiet;
    if (!grid.previous_ended) {
      me.waits = true;
      me.site = site;
      me.what = "wait_for_previous_grid";
      grid.waiting_for_previous.push_back(&me);
      suspend();
    }
    me.floor = scheduler().time;
    me.waited_for_previous = true;
  }
  grid.previous_key.acquire();
}

void allow_next_grid(const Site& /*site*/) {
  Fiber& me = running();
  if (me.unwinding) return;
  Quiet quiet;
  trigger(*me.block);
  // Lets the host start the next grid now rather than when this thread next stops.
  if (scheduler().shuffled && scheduler().random.below(2) == 0) yield();
}

void launch(const Launch& launch, std::function<void()> body) {
  const std::lock_guard lock(host_mutex());
  Scheduler& s = scheduler();
  if (s.running) fail("a launch from within a kernel");
  if (const std::string error = check(launch); !error.empty()) {
    // What was queued before still runs: its arguments may not outlive this call's caller.
    run_queue();
    throw std::runtime_error(std::string("kernel ") + launch.name + ": " + error);
  }
  if (s.grids.size() >= kMaxQueued) run_queue();
  Quiet quiet;
  auto grid = std::make_unique<Grid>();
  grid->launch = launch;
  grid->name = launch.name;
  grid->body = std::move(body);
  grid->blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  grid->previous_ended = s.grids.empty();
  const size_t clusters = grid->blocks / launch.cluster;
  for (unsigned i = 0; i < clusters; ++i) grid->cluster_order.push_back(i);
  // Blocks start in any order.
  if (options().seed != 0) {
    Random random;
    random.seed(options().seed);
    for (size_t i = clusters; i > 1; --i) std::swap(grid->cluster_order[i - 1], grid->cluster_order[random.below(i)]);
  }
  ++launch_counts()[grid->name];
  s.grids.push_back(std::move(grid));
}

std::string launched() {
  const std::lock_guard lock(host_mutex());
  std::string lines;
  for (const auto& [name, count] : launch_counts()) lines += std::to_string(count) + " " + name + "\n";
  launch_counts().clear();
  return lines;
}

void synchronize() {
  const std::lock_guard lock(host_mutex());
  if (scheduler().running) fail("synchronize from within a kernel");
  run_queue();
}

}  // namespace rnnfast::emulator
