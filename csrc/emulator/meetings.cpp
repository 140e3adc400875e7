// Where threads meet: warps, named barriers, clusters, grids. Strict: what CUDA leaves undefined or lets pass only on
// some cards ends the launch, among it a meeting that an ended thread would have to join.
#include <algorithm>

#include "internal.h"

namespace rnnfast::emulator {
namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void wait(Fiber& me, const char* what, const Site& site) {
  me.what = what;
  me.site = site;
  me.waits = true;
  suspend();
}

// What everyone has made visible by now.
void see_all(Fiber& me) { me.floor = scheduler().time; }

void wake_all(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) wake(*fiber);
  waiting.clear();
  scheduler().spins = 0;
}

std::string hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// Hands every lane the values of all.
void deal(Meeting& meeting) {
  std::vector<std::byte> values(kWarpSize * meeting.bytes);
  for (unsigned i = 0; i < kWarpSize; ++i)
    if (meeting.mask >> i & 1) std::memcpy(values.data() + i * meeting.bytes, meeting.mine[i], meeting.bytes);
  for (unsigned i = 0; i < kWarpSize; ++i)
    if (meeting.mask >> i & 1) std::memcpy(meeting.all[i], values.data(), values.size());
}

Meeting& join_meeting(Fiber& me, unsigned lane, uint32_t mask, size_t bytes, const char* what, const Site& site) {
  auto& meetings = me.block->meetings[me.linear_thread / kWarpSize];
  for (auto& meeting : meetings) {
    if (meeting->mask == mask) {
      if (!same(meeting->site, site) || std::strcmp(meeting->what, what) != 0 || meeting->bytes != bytes)
        fail(std::string("lanes of the warp diverge: others are at ") + meeting->what + " " + text_of(meeting->site));
      return *meeting;
    }
    if (meeting->mask & mask)
      fail("lanes of the warp disagree on who meets: mask " + hex(mask) + ", others at " + meeting->what + " " +
           text_of(meeting->site) + " have " + hex(meeting->mask));
  }
  const size_t threads = me.block->threads.size(), first = me.linear_thread / kWarpSize * kWarpSize;
  const uint32_t exist = threads - first >= kWarpSize ? kAllLanes : (1u << (threads - first)) - 1;
  if (mask & ~exist) fail("mask " + hex(mask) + " names lanes that the block does not have");
  if (!(mask >> lane & 1)) fail("mask " + hex(mask) + " does not name the calling lane");
  auto meeting = std::make_unique<Meeting>();
  meeting->mask = mask;
  meeting->bytes = bytes;
  meeting->site = site;
  meeting->what = what;
  meetings.push_back(std::move(meeting));
  return *meetings.back();
}

}  // namespace

void exchange_bytes(uint32_t mask, const void* mine, void* all, size_t bytes, bool orders, const char* what,
                    const Site& site) {
  Fiber& me = running();
  if (me.unwinding) return;
  Key key;
  {
    Quiet quiet;
    const unsigned lane = me.linear_thread % kWarpSize;
    me.what = what;
    me.site = site;
    Meeting& meeting = join_meeting(me, lane, mask, bytes, what, site);
    if (orders) {
      drain_stores();
      if (!meeting.key) meeting.key = Key::make();
      key = meeting.key;
    }
    key.release();
    meeting.mine[lane] = mine;
    meeting.all[lane] = all;
    meeting.lanes[lane] = &me;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived != mask) {
      wait(me, what, site);
    } else {
      if (bytes > 0) deal(meeting);
      for (unsigned i = 0; i < kWarpSize; ++i)
        if (i != lane && mask >> i & 1) wake(*meeting.lanes[i]);
      scheduler().spins = 0;
      std::erase_if(me.block->meetings[me.linear_thread / kWarpSize],
                    [&](const auto& m) { return m.get() == &meeting; });
    }
    if (orders) see_all(me);
  }
  key.acquire();
}

void block_barrier(unsigned id, unsigned count, bool waits, const char* what, const Site& site) {
  Fiber& me = running();
  if (me.unwinding) return;
  Key key;
  {
    Quiet quiet;
    me.what = what;
    me.site = site;
    Block& block = *me.block;
    const unsigned threads = static_cast<unsigned>(block.threads.size());
    if (id >= block.barriers.size()) fail("barrier " + std::to_string(id) + ": there are 16");
    const bool whole_block = id == 0 && count == threads;
    if (!whole_block && (count == 0 || count % kWarpSize != 0 || count > threads || threads % kWarpSize != 0))
      fail("barrier " + std::to_string(id) + " for " + std::to_string(count) + " of " + std::to_string(threads) +
           " threads: only whole warps of the block can meet");
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived == 0) {
      barrier.count = count;
      barrier.site = site;
      barrier.what = what;
      barrier.here.assign(threads, false);
      barrier.key = Key::make();
    }
    const auto others = [&] { return std::string("others are at ") + barrier.what + " " + text_of(barrier.site); };
    if (barrier.count != count)
      fail("barrier " + std::to_string(id) + " for " + std::to_string(count) + " threads, but for " +
           std::to_string(barrier.count) + " before: " + others());
    if (whole_block && !same(barrier.site, site)) fail("threads of the block diverge: " + others());
    if (barrier.here[me.linear_thread])
      fail("barrier " + std::to_string(id) + ": the thread arrives a second time before the others have met it");
    drain_stores();
    key = barrier.key;
    key.release();
    barrier.here[me.linear_thread] = true;
    if (++barrier.arrived < barrier.count) {
      if (waits) {
        barrier.waiting.push_back(&me);
        wait(me, what, site);
      }
    } else {
      for (unsigned t = 0; t < threads; ++t)
        if (barrier.here[t] != barrier.here[t / kWarpSize * kWarpSize])
          fail("barrier " + std::to_string(id) + ": only a part of warp " + std::to_string(t / kWarpSize) +
               " has arrived");
      barrier.arrived = 0;
      barrier.key = Key();
      wake_all(barrier.waiting);
    }
    if (waits) see_all(me);
  }
  if (waits) key.acquire();
}

void cluster_barrier(bool arrives, bool waits, const Site& site) {
  Fiber& me = running();
  if (me.unwinding) return;
  Key key;
  {
    Quiet quiet;
    const char* what = arrives ? (waits ? "cluster_sync" : "cluster_arrive") : "cluster_wait";
    me.what = what;
    me.site = site;
    Cluster& cluster = *me.block->cluster;
    if (arrives) {
      if (me.cluster_arrived) fail("the thread arrives a second time without cluster_wait");
      drain_stores();
      me.cluster_arrived = true;
      me.cluster_phase = cluster.phase;
      me.cluster_key = cluster.key;
      me.cluster_key.release();
      if (++cluster.arrived == cluster.threads) {
        cluster.arrived = 0;
        ++cluster.phase;
        cluster.key = Key::make();
        wake_all(cluster.waiting);
      }
    }
    if (waits) {
      if (!me.cluster_arrived) fail("cluster_wait without cluster_arrive");
      if (cluster.phase == me.cluster_phase) {
        cluster.waiting.push_back(&me);
        wait(me, what, site);
      }
      me.cluster_arrived = false;
      key = me.cluster_key;
      see_all(me);
    }
  }
  key.acquire();
}

void grid_barrier(const Site& site) {
  Fiber& me = running();
  if (me.unwinding) return;
  Key key;
  {
    Quiet quiet;
    const char* what = "grid_sync";
    me.what = what;
    me.site = site;
    Grid& grid = *me.block->grid;
    if (!grid.launch.cooperative) fail("grid_sync needs a cooperative launch");
    Barrier& barrier = grid.barrier;
    if (barrier.arrived == 0) {
      barrier.count = static_cast<unsigned>(grid.blocks * grid.launch.threads);
      barrier.site = site;
      barrier.key = Key::make();
    }
    if (!same(barrier.site, site))
      fail("threads of the grid diverge: others are at grid_sync " + text_of(barrier.site));
    drain_stores();
    key = barrier.key;
    key.release();
    if (++barrier.arrived < barrier.count) {
      barrier.waiting.push_back(&me);
      wait(me, what, site);
    } else {
      barrier.arrived = 0;
      barrier.key = Key();
      wake_all(barrier.waiting);
    }
    see_all(me);
  }
  key.acquire();
}

std::byte* shared_memory() { return running().block->shared; }
size_t shared_bytes() { return running().block->grid->launch.shared_bytes; }

void* in_peer(const void* shared_address, unsigned rank) {
  Fiber& me = running();
  const auto& blocks = me.block->cluster->blocks;
  const auto* address = static_cast<const std::byte*>(shared_address);
  const std::byte* begin = me.block->shared;
  if (rank >= blocks.size())
    fail("rank " + std::to_string(rank) + " in a cluster of " + std::to_string(blocks.size()) + " blocks");
  if (address < begin || address > begin + shared_bytes()) fail("an address outside the block's shared memory");
  return blocks[rank]->shared + (address - begin);
}

void require_peer(unsigned rank) {
  const auto& blocks = running().block->cluster->blocks;
  if (rank < blocks.size() && blocks[rank]->live == 0)
    fail("the block of rank " + std::to_string(rank) + " has ended, and its shared memory with it");
}

}  // namespace rnnfast::emulator
