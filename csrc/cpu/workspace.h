// Memory of one call, and the buffers in it that carry a state from step to step.
#pragma once

#include <cstdlib>

#include "memory.h"
#include "sizes.h"
#include "vec.h"

namespace rnnfast::cpu {
namespace {

// Taken at once before the threads start, so that running out of memory is found before anything is written.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  // First pass: sizes are added up. Second pass, after allocate(): pointers are handed out in the same order.
  template <class T, class... Sizes> T* take(Sizes... sizes) {
    const int64_t at = used_;
    used_ = sum(used_, round_up(product(sizes..., sizeof(T)), kAlignment));
    return memory_ ? reinterpret_cast<T*>(static_cast<char*>(memory_) + at) : nullptr;
  }
  // 0, or how many bytes could not be had.
  int64_t allocate() {
    const int64_t bytes = used_ ? used_ : kAlignment;
    used_ = 0;
    if (bytes == kUncountable) return bytes;
    memory_ = std::aligned_alloc(kAlignment, static_cast<size_t>(bytes));
    if (!memory_) return bytes;
    prefer_huge_pages(memory_, bytes);
    return 0;
  }

 private:
  static constexpr int64_t kAlignment = 128;
  void* memory_ = nullptr;
  int64_t used_ = 0;
};

// A value for each unit of each of a group's rows: (rows, stride), whole vectors wide, so that vectors may be read past
// the last unit.
template <class Compute> struct StateBuffer {
  Compute* data = nullptr;
  int64_t stride = 0;

  void place(Workspace& workspace, int64_t rows, int64_t width) {
    // One more vector keeps rows of a power-of-two width out of the same cache sets.
    stride = sum(round_up(width, kLanes<Compute>), kLanes<Compute>);
    data = workspace.take<Compute>(rows, stride);
  }
  Compute* row(int64_t r) const { return data + r * stride; }
  // A vector of row r, of which the first `left` values count. Products of pairs read to the end of a block, and must
  // find the zeros there that clear_last left: an infinity that met the zeros behind the last column is no number.
  template <class Value> void put(int64_t r, int64_t unit, Value value, int64_t left) const {
    if constexpr (sizeof(Compute) < sizeof(float))
      store<float>(row(r) + unit, value, left);
    else
      store<Compute>(row(r) + unit, value);
  }
  // Zeros in the vector of row r that has its last unit, where products read all of it.
  void clear_last(int64_t r, int64_t width) const {
    const int64_t last = (width - 1) / kLanes<Compute> * kLanes<Compute>;
    std::memset(static_cast<void*>(row(r) + last), 0, kVectorBytes);
  }
};

}  // namespace
}  // namespace rnnfast::cpu
