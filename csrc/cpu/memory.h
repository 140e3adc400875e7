// Large buffers are fresh from the kernel on most calls, and taking them page by page costs more than filling them.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace rnnfast::cpu {

// Asks for huge pages under a buffer that will be written whole: one fault for each 2 MiB instead of each 4 KiB. Only a
// hint, and only for the huge pages that lie inside the buffer.
inline void prefer_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const int64_t begin = reinterpret_cast<int64_t>(data);
  const int64_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
}

}  // namespace rnnfast::cpu
