// Asynchronous copies and mbarriers: groups, zero fill, bytes counted by barriers, phases and parities, stores to
// peers. (Their misuse: test_misuse.cpp.)
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "check.h"
#include "cuda/primitives/async_copy.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/mbarrier.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/shared.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

constexpr unsigned kThreads = 64;

Array<uint32_t> counting(size_t count) {
  Array<uint32_t> values(count);
  std::iota(values.begin(), values.end(), 1u);
  return values;
}

// ---- cp.async ----

// Each thread copies pieces of three sizes; every third thread's are not valid. Neighbours read them.
RNNFAST_KERNEL void cp_async_kernel(uint32_t* result, const uint32_t* input) {
  const unsigned i = thread_index(), n = block_threads();
  auto* fours = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t *eights = fours + n, *sixteens = eights + 2 * n;
  const bool valid = i % 3 != 0;
  const auto source = [&](unsigned words) { return valid ? input + i * words : nullptr; };
  cp_async<4>(fours + i, source(1), valid);
  cp_async<8>(eights + 2 * i, source(2), valid);
  cp_async<16>(sixteens + 4 * i, source(4), valid);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  const unsigned other = (i + 1) % n;
  uint32_t* out = result + other * 7;
  out[0] = fours[other];
  for (unsigned k = 0; k < 2; ++k) out[1 + k] = eights[2 * other + k];
  for (unsigned k = 0; k < 4; ++k) out[3 + k] = sixteens[4 * other + k];
}

void test_cp_async_sizes_and_zero_fill() {
  const Array<uint32_t> input = counting(4 * kThreads);
  for_each_seed(6, [&] {
    Array<uint32_t> result(7 * kThreads, 99);
    CHECK(runs(blocks(1, kThreads, 7 * 4 * kThreads), cp_async_kernel, result.device(), input.device()));
    for (unsigned i = 0; i < kThreads; ++i) {
      const bool valid = i % 3 != 0;
      CHECK(result[7 * i] == (valid ? input[i] : 0));
      for (unsigned k = 0; k < 2; ++k) CHECK(result[7 * i + 1 + k] == (valid ? input[2 * i + k] : 0));
      for (unsigned k = 0; k < 4; ++k) CHECK(result[7 * i + 3 + k] == (valid ? input[4 * i + k] : 0));
    }
  });
}

// Three groups and an empty one; after wait<N> the thread reads all but the newest N.
RNNFAST_KERNEL void cp_async_groups_kernel(uint32_t* result, const uint32_t* input) {
  const unsigned i = thread_index();
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory()) + 3 * i;
  for (unsigned group = 0; group < 3; ++group) {
    cp_async<4>(mine + group, input + 3 * i + group);
    cp_async_commit();
  }
  cp_async_commit();
  cp_async_wait<3>();
  result[3 * i] = mine[0];
  cp_async_wait<2>();
  result[3 * i + 1] = mine[1];
  cp_async_wait<0>();
  result[3 * i + 2] = mine[2];
}

void test_cp_async_groups() {
  const Array<uint32_t> input = counting(3 * kThreads);
  for_each_seed(6, [&] {
    Array<uint32_t> result(3 * kThreads);
    CHECK(runs(blocks(1, kThreads, 4 * 3 * kThreads), cp_async_groups_kernel, result.device(), input.device()));
    CHECK(result == input);
  });
}

// ---- bulk copies ----

// Two pieces a round and one arrival, `rounds` phases of one barrier; then back to global memory, added up.
RNNFAST_KERNEL void bulk_kernel(uint32_t* result, const uint32_t* input, unsigned words, unsigned rounds) {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  auto* data = reinterpret_cast<uint32_t*>(shared_memory() + 16);
  uint32_t* sums = data + words;
  const unsigned i = thread_index();
  if (i == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
  }
  for (unsigned k = i; k < words; k += block_threads()) sums[k] = 0;
  for (unsigned round = 0; round < rounds; ++round) {
    // The barrier is there; the data of the last round has been read.
    sync_threads();
    if (i == 0) {
      const uint32_t *from = input + round * words, half = words / 2;
      mbarrier_arrive_expect_tx(bar, words * 4);
      bulk_copy(data, from, half * 4, bar);
      bulk_copy(data + half, from + half, half * 4, bar);
    }
    mbarrier_wait(bar, round % 2);
    for (unsigned k = i; k < words; k += block_threads()) sums[k] += data[k];
  }
  fence_async_proxy();
  sync_threads();
  if (i == 0) {
    bulk_store(result, sums, words * 4);
    bulk_commit();
    bulk_wait<0>();
    result[words] = result[words - 1];
  }
}

void test_bulk_copies() {
  constexpr unsigned kWords = 256, kRounds = 5;
  const Array<uint32_t> input = counting(kWords * kRounds);
  for_each_seed(6, [&] {
    Array<uint32_t> result(kWords + 1);
    CHECK(runs(blocks(1, kThreads, 16 + 8 * kWords), bulk_kernel, result.device(), input.device(), kWords, kRounds));
    for (unsigned k = 0; k < kWords; ++k) {
      uint32_t sum = 0;
      for (unsigned round = 0; round < kRounds; ++round) sum += input[round * kWords + k];
      CHECK(result[k] == sum);
    }
    CHECK(result[kWords] == result[kWords - 1]);
  });
}

// ---- mbarriers ----

// One thread, three arrivals a phase: what test_wait says after each arrival, for both parities.
RNNFAST_KERNEL void phases_kernel(uint32_t* answers) {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 3);
  for (unsigned n = 0; n < 9; ++n) {
    answers[n] = uint32_t(mbarrier_test_wait(bar, 0)) | uint32_t(mbarrier_test_wait(bar, 1)) << 1;
    mbarrier_arrive(bar);
  }
}

void test_mbarrier_phases_and_parities() {
  Array<uint32_t> answers(9);
  CHECK(runs(blocks(1, 1, 8), phases_kernel, answers.device()));
  // A phase has the parity of its number, the first being 0; the one before the first counts as over.
  for (unsigned n = 0; n < 9; ++n) CHECK(answers[n] == (n / 3 % 2 == 0 ? 2u : 1u));
}

// The phase waits for bytes as well as for arrivals, in whichever order they come.
RNNFAST_KERNEL void bytes_kernel(uint32_t* answers, const uint32_t* input, bool announce_first) {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier_init(bar, 2);
  fence_mbarrier_init();
  mbarrier_arrive(bar);
  if (announce_first) mbarrier_expect_tx(bar, 32);
  bulk_copy(shared_memory() + 16, input, 16, bar);
  if (!announce_first) mbarrier_expect_tx(bar, 32);
  answers[0] = mbarrier_test_wait(bar, 0);
  mbarrier_arrive(bar);
  for (unsigned n = 0; n < 50; ++n) answers[1] |= uint32_t(mbarrier_test_wait(bar, 0));
  bulk_copy(shared_memory() + 32, input, 16, bar);
  mbarrier_wait(bar, 0);
  answers[2] = mbarrier_test_wait(bar, 0);
}

void test_mbarrier_counts_bytes() {
  const Array<uint32_t> data(4);
  for_each_seed(6, [&] {
    for (const bool announce_first : {true, false}) {
      Array<uint32_t> answers(3);
      CHECK(runs(blocks(1, 1, 48), bytes_kernel, answers.device(), data.device(), announce_first));
      CHECK(answers == std::vector<uint32_t>({0, 0, 1}));
    }
  });
}

// A ring of two stages between the warps of a block, full and empty barriers: nothing is lost or read twice.
RNNFAST_KERNEL void ring_kernel(uint32_t* sums, unsigned items) {
  auto* full = reinterpret_cast<mbarrier*>(shared_memory());
  mbarrier* empty = full + 2;
  auto* stages = reinterpret_cast<uint32_t*>(full + 4);
  if (thread_index() == 0) {
    for (unsigned s = 0; s < 2; ++s) {
      mbarrier_init(&full[s], 32);
      mbarrier_init(&empty[s], 32);
    }
  }
  sync_threads();
  uint32_t sum = 0;
  for (unsigned n = 0; n < items; ++n) {
    const unsigned s = n % 2, parity = n / 2 % 2;
    uint32_t* stage = stages + 32 * s;
    if (warp() == 0) {
      // The phase before the first counts as over: the first round does not wait.
      mbarrier_wait(&empty[s], parity ^ 1);
      stage[lane()] = 100 * n + lane();
      mbarrier_arrive(&full[s]);
    } else {
      mbarrier_wait(&full[s], parity);
      sum = 31 * sum + stage[31 - lane()];
      mbarrier_arrive(&empty[s]);
    }
  }
  if (warp() == 1) sums[lane()] = sum;
}

void test_mbarrier_ring() {
  constexpr unsigned kItems = 9;
  for_each_seed(10, [&] {
    Array<uint32_t> sums(32);
    CHECK(runs(blocks(1, 64, 32 + 256), ring_kernel, sums.device(), kItems));
    for (unsigned l = 0; l < 32; ++l) {
      uint32_t sum = 0;
      for (unsigned n = 0; n < kItems; ++n) sum = 31 * sum + 100 * n + 31 - l;
      CHECK(sums[l] == sum);
    }
  });
}

// ---- peers ----

template <class T> struct PeerLayout {
  mbarrier bar;
  T values[2][kThreads];
};

// Every thread sends a value of each of `rounds` to the next block and passes on what it got.
template <class T> RNNFAST_KERNEL void st_async_kernel(T* result, const T* input, unsigned rounds) {
  auto* shared = reinterpret_cast<PeerLayout<T>*>(shared_memory());
  const unsigned i = thread_index(), next = (cluster_rank() + 1) % cluster_size();
  if (i == 0) {
    mbarrier_init(&shared->bar, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  PeerLayout<T>* peer = map_to_rank(shared, next);
  T value = input[block_index().x * kThreads + i];
  for (unsigned round = 0; round < rounds; ++round) {
    if (i == 0) mbarrier_arrive_expect_tx(&shared->bar, sizeof(T) * kThreads);
    st_async(value, &peer->values[round % 2][kThreads - 1 - i], &peer->bar);
    mbarrier_wait(&shared->bar, round % 2);
    value = shared->values[round % 2][i];
    // The peer may not be two rounds ahead.
    cluster_sync();
  }
  result[block_index().x * kThreads + i] = value;
}

template <class T> void check_st_async() {
  constexpr unsigned kRanks = 3, kRounds = 4, kBlocks = 2 * kRanks;
  Array<T> input(kBlocks * kThreads);
  for (size_t n = 0; n < input.size(); ++n) {
    uint32_t words[4] = {uint32_t(n), uint32_t(n * n), ~uint32_t(n), uint32_t(n) << 16};
    std::memcpy(&input[n], words, sizeof(T));
  }
  for_each_seed(4, [&] {
    Array<T> result(input.size());
    CHECK(runs(blocks(kBlocks, kThreads, sizeof(PeerLayout<T>), kRanks), st_async_kernel<T>, result.device(),
               input.device(), kRounds));
    for (unsigned block = 0; block < kBlocks; ++block) {
      const unsigned first = block / kRanks * kRanks, source = first + (block - first + 2 * kRanks - kRounds) % kRanks;
      for (unsigned i = 0; i < kThreads; ++i) {
        const unsigned place = kRounds % 2 == 0 ? i : kThreads - 1 - i;
        CHECK(std::memcmp(&result[block * kThreads + i], &input[source * kThreads + place], sizeof(T)) == 0);
      }
    }
  });
}

void test_st_async_4_bytes() { check_st_async<float>(); }
void test_st_async_8_bytes() { check_st_async<uint64_t>(); }
void test_st_async_16_bytes() { check_st_async<Word16>(); }

// Peers write to rank 0's memory themselves and arrive at its barrier, phase after phase; rank 0 answers through
// theirs.
RNNFAST_KERNEL void arrive_remote_kernel(uint32_t* result, unsigned rounds) {
  auto* bar = reinterpret_cast<mbarrier*>(shared_memory());
  auto* slots = reinterpret_cast<uint32_t*>(bar + 1);
  const unsigned ranks = cluster_size(), rank = cluster_rank();
  mbarrier_init(bar, rank == 0 ? ranks - 1 : 1);
  fence_mbarrier_init();
  cluster_sync();
  uint32_t sum = rank;
  for (unsigned round = 0; round < rounds; ++round) {
    if (rank == 0) {
      mbarrier_wait_cluster(bar, round % 2);
      for (unsigned r = 1; r < ranks; ++r) sum = sum * 7 + slots[r];
      for (unsigned r = 1; r < ranks; ++r) {
        *map_to_rank(slots, r) = sum;
        mbarrier_arrive_remote(map_to_rank(bar, r));
      }
    } else {
      map_to_rank(slots, 0)[rank] = sum + rank;
      mbarrier_arrive_remote(map_to_rank(bar, 0));
      mbarrier_wait_cluster(bar, round % 2);
      sum = slots[0];
    }
  }
  result[rank] = sum;
}

void test_mbarrier_arrive_remote() {
  constexpr unsigned kRanks = 4, kRounds = 6;
  uint32_t sums[kRanks] = {0, 1, 2, 3};
  for (unsigned round = 0; round < kRounds; ++round) {
    for (unsigned r = 1; r < kRanks; ++r) sums[0] = sums[0] * 7 + sums[r] + r;
    for (unsigned r = 1; r < kRanks; ++r) sums[r] = sums[0];
  }
  for_each_seed(10, [&] {
    Array<uint32_t> result(kRanks);
    CHECK(runs(blocks(kRanks, 1, 8 + 4 * kRanks, kRanks), arrive_remote_kernel, result.device(), kRounds));
    for (unsigned r = 0; r < kRanks; ++r) CHECK(result[r] == sums[r]);
  });
}

}  // namespace

CHECK_CASES(async) {
  return {
      {"cp_async_sizes_and_zero_fill", test_cp_async_sizes_and_zero_fill},
      {"cp_async_groups", test_cp_async_groups},
      {"bulk_copies", test_bulk_copies},
      {"mbarrier_phases_and_parities", test_mbarrier_phases_and_parities},
      {"mbarrier_counts_bytes", test_mbarrier_counts_bytes},
      {"mbarrier_ring", test_mbarrier_ring},
      {"st_async_4_bytes", test_st_async_4_bytes},
      {"st_async_8_bytes", test_st_async_8_bytes},
      {"st_async_16_bytes", test_st_async_16_bytes},
      {"mbarrier_arrive_remote", test_mbarrier_arrive_remote},
  };
}
