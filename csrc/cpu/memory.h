// Page faults: a large buffer that is fresh from the kernel, taken page by page, costs more than filling it.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace rnnfast::cpu {

// glibc serves large requests with fresh pages from the kernel and gives the end of the heap back as soon as it is
// free. What counts as large, and how much may stay, it learns from the largest such buffer that was ever freed, up to
// 32 MiB. Freeing one of nearly that size (it is never touched, so it costs nothing) spares a training loop thousands
// of faults an iteration.
inline bool teach_allocator() {
  constexpr size_t kLargestLearned = size_t{31} << 20;
  void* volatile buffer = std::malloc(kLargestLearned);
  std::free(buffer);
  return true;
}

// Beyond that every buffer is fresh. Asks for huge pages under one that will be written whole: a fault for each 2 MiB
// instead of each 4 KiB. Only a hint, and only for the huge pages that lie inside the buffer.
inline void prefer_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20, kWorthwhile = int64_t{32} << 20;
  if (bytes < kWorthwhile) return;
  const int64_t begin = reinterpret_cast<int64_t>(data);
  const int64_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
}

}  // namespace rnnfast::cpu
