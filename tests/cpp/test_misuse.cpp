// What only the emulator notices: misuse of the primitives, which it refuses, and results that a card may give but need
// not where an order is missing. (The primitives themselves: test_primitives.cpp, test_async.cpp, test_memory.cpp.)
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/primitives/async_copy.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/mbarrier.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/mma.h"
#include "cuda/primitives/shared.h"
#include "message_kernels.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

constexpr unsigned kThreads = 64;

// ---- cp.async ----

#if !defined(__SANITIZE_THREAD__)
// The line is that of the wait in this kernel: with it left out some schedule reads what has not come.
constexpr unsigned kWaitLine = __LINE__ + 4;
void cp_async_one_wait_kernel(uint32_t* result, const uint32_t* input) {
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory()) + thread_index();
  cp_async<4>(mine, input + thread_index()), cp_async_commit();
  cp_async_wait<0>();
  result[thread_index()] = *mine;
}

void test_cp_async_left_out_wait_shows() {
  Array<uint32_t> input(kThreads);
  std::iota(input.begin(), input.end(), 1u);
  const std::string file = __FILE__, before = rnnfast::emulator::options().skip;
  for (const bool skip : {false, true}) {
    unsigned wrong = 0;
    if (skip) rnnfast::emulator::options().skip = file + ":" + std::to_string(kWaitLine);
    for_all_seeds(6, [&] {
      std::vector<uint32_t> result(kThreads);
      const std::string error =
          run(blocks(1, kThreads, 4 * kThreads), cp_async_one_wait_kernel, result.data(), input.data());
      // A thread may also end before its copy.
      CHECK(error.empty() || error.find("not waited for") != std::string::npos);
      wrong += !error.empty() || result != input;
    });
    rnnfast::emulator::options().skip = before;
    CHECK((wrong > 0) == skip);
  }
}
#endif

void cp_async_at(uint32_t* global, size_t shared_offset) {
  cp_async<16>(shared_memory() + shared_offset, global);
  cp_async_commit();
  cp_async_wait<0>();
}

void test_cp_async_refuses_addresses() {
  alignas(16) uint32_t data[8] = {};
  CHECK(runs(blocks(1, 1, 32), cp_async_at, data, size_t(16)));
  CHECK_CONTAINS(run(blocks(1, 1, 32), cp_async_at, data, size_t(8)), "cp_async");
  CHECK_CONTAINS(run(blocks(1, 1, 32), cp_async_at, data, size_t(32)), "cp_async");
  CHECK_CONTAINS(run(blocks(1, 1, 32), cp_async_at, data + 1, size_t(0)), "cp_async");
}

// A block that ends leaves its shared memory to another: what it has begun to copy would arrive there.
void leaves_cp_async(uint32_t* global) {
  cp_async<4>(shared_memory(), global);
  cp_async_commit();
}
void leaves_uncommitted_cp_async(uint32_t* global) { cp_async<4>(shared_memory(), global); }
void leaves_bulk_store(uint32_t* global) {
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory());
  for (unsigned i = 0; i < 4; ++i) mine[i] = i;
  fence_async_proxy();
  bulk_store(global, mine, 16);
  bulk_commit();
}

// On some schedule the copy is there before the thread ends, which nobody can tell from a copy that was waited for.
void check_left_copies(void (*kernel)(uint32_t*), const char* what) {
  unsigned refused = 0;
  for_all_seeds(20, [&] {
    alignas(16) uint32_t data[4] = {};
    const std::string error = run(blocks(1, 1, 16), kernel, data);
    if (!error.empty()) CHECK_CONTAINS(error, std::string("issued with ") + what + " and not waited for");
    refused += !error.empty();
  });
  CHECK(refused > 10);
}

void test_copies_must_be_waited_for() {
  check_left_copies(leaves_cp_async, "cp_async");
  check_left_copies(leaves_uncommitted_cp_async, "cp_async");
  check_left_copies(leaves_bulk_store, "bulk_store");
}

// ---- bulk copies ----

void bulk_copy_of(const uint32_t* input, uint32_t bytes) {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_tx(bar, bytes);
  bulk_copy(shared_memory() + 16, input, bytes, bar);
  mbarrier_wait(bar, 0);
}

void test_bulk_copy_refuses_sizes() {
  alignas(16) uint32_t data[32] = {};
  CHECK(runs(blocks(1, 1, 80), bulk_copy_of, data, 64u));
  CHECK_CONTAINS(run(blocks(1, 1, 80), bulk_copy_of, data, 24u), "bulk_copy");
  CHECK_CONTAINS(run(blocks(1, 1, 80), bulk_copy_of, data, 80u), "bulk_copy");
}

// ---- mbarriers ----

void uninitialised_kernel() { mbarrier_arrive(reinterpret_cast<mbarrier*>(shared_memory())); }
void too_many_kernel() {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 1);
  mbarrier_expect_tx(bar, 16);
  mbarrier_arrive(bar);
  mbarrier_arrive(bar);
}
void never_kernel() {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 1);
  mbarrier_arrive_expect_tx(bar, 16);
  mbarrier_wait(bar, 0);
}
void unfenced_kernel() {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 1);
  cluster_sync();
  mbarrier_arrive_remote(map_to_rank(bar, cluster_rank() ^ 1));
  cluster_sync();
}
void zero_arrivals_kernel() { mbarrier_init(reinterpret_cast<mbarrier*>(shared_memory()), 0); }

void test_mbarrier_misuse_is_an_error() {
  CHECK_CONTAINS(run(blocks(1, 1, 8), uninitialised_kernel), "not initialised");
  CHECK_CONTAINS(run(blocks(1, 1, 8), too_many_kernel), "more arrivals");
  CHECK_CONTAINS(run(blocks(1, 1, 8), zero_arrivals_kernel), "mbarrier_init");
  CHECK_CONTAINS(run(blocks(2, 1, 8, 2), unfenced_kernel), "fence_mbarrier_init");
  // Bytes that never come: a deadlock that names the wait.
  CHECK_CONTAINS(run(blocks(1, 1, 8), never_kernel), "mbarrier_wait");
}

// ---- peers ----

struct PeerSlot {
  mbarrier bar;
  float value;
};

void wrong_block_kernel() {
  auto* shared = reinterpret_cast<PeerSlot*>(shared_memory());
  mbarrier_init(&shared->bar, 1);
  fence_mbarrier_init();
  cluster_sync();
  if (cluster_rank() == 0) st_async(1.0f, &map_to_rank(shared, 1)->value, &shared->bar);
  cluster_sync();
}

void test_st_async_wants_the_barrier_beside_the_data() {
  CHECK_CONTAINS(run(blocks(2, 1, sizeof(PeerSlot), 2), wrong_block_kernel), "another block");
}

// ---- ldmatrix ----

void ldmatrix_at(size_t offset) {
  uint32_t r[1];
  ldmatrix_x1(r, shared_memory() + lane() % 8 * 16 + offset);
}
void test_ldmatrix_refuses_addresses() {
  CHECK_CONTAINS(run(blocks(1, 32, 256), ldmatrix_at, size_t(8)), "ldmatrix_x1");
  CHECK_CONTAINS(run(blocks(1, 32, 256), ldmatrix_at, size_t(256)), "ldmatrix_x1");
}

// ---- memory ----

void messages_without_order_get_lost() {
  CHECK(lost_messages<Order::relaxed>(kManySeeds) > 0);
  CHECK(lost_messages<Order::release_only>(kManySeeds) > 0);
  CHECK(lost_messages<Order::acquire_only>(kManySeeds) > 0);
}

RNNFAST_KERNEL void misaligned_kernel(char* bytes) { store_global(bytes + 4, load_global(bytes + 4)); }

void misaligned() {
  alignas(16) char bytes[64] = {};
  CHECK_CONTAINS(run(blocks(1, 1), misaligned_kernel, bytes), "misaligned 16-byte access");
}

}  // namespace

CHECK_CASES(misuse) {
  return {
#if !defined(__SANITIZE_THREAD__)
      {"cp_async_left_out_wait_shows", test_cp_async_left_out_wait_shows},
#endif
      {"cp_async_refuses_addresses", test_cp_async_refuses_addresses},
      {"copies_must_be_waited_for", test_copies_must_be_waited_for},
      {"bulk_copy_refuses_sizes", test_bulk_copy_refuses_sizes},
      {"mbarrier_misuse_is_an_error", test_mbarrier_misuse_is_an_error},
      {"st_async_wants_the_barrier_beside_the_data", test_st_async_wants_the_barrier_beside_the_data},
      {"ldmatrix_refuses_addresses", test_ldmatrix_refuses_addresses},
      {"messages_without_order_get_lost", messages_without_order_get_lost},
      {"misaligned", misaligned},
      {"race-relaxed-flag", flag_case<false>, check::Kind::by_name_only},
  };
}
