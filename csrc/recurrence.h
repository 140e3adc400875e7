// What every backend is given: plain structs of pointers, sizes and strides. No torch header here.
#pragma once

#include <cstdint>

#include "cells.h"
#include "parameters.h"

namespace rnnfast {

enum class DType { float32, float64, bfloat16, float16 };

// Where row (t, b) stands among the rows of gates, output, cell_states, reserve and their gradients.
struct RowLayout {
  int64_t steps = 0;             // T
  int64_t batch = 0;             // B
  int64_t step_stride = 0;       // dense: rows from (t, b) to (t + 1, b)
  int64_t batch_stride = 0;      // dense: rows from (t, b) to (t, b + 1)
  const int64_t* batch_sizes{};  // packed (T,), host memory: row (t, b) follows those of all earlier steps; else null
  const int64_t* lengths{};      // dense (B,) or null: row b ends after lengths[b] steps
  const uint8_t* resets{};  // dense, one a row in the same layout, or null; not 0: true, whatever torch's bool holds

  // A row that starts a segment takes no state over from the row before it in time, nor does that one from it where
  // time runs backwards.
  RNNFAST_HOST_DEVICE bool has_segments() const { return resets != nullptr; }
  RNNFAST_HOST_DEVICE bool starts_segment(int64_t row) const { return resets && resets[row]; }
};

// The sizes and inputs that forward and backward share. Tensors are contiguous; shapes as in docs/design.md.
struct Recurrence {
  Mode mode{};
  DType dtype{};
  RowLayout rows;
  int64_t hidden_size = 0;  // H
  int64_t state_size = 0;   // P with projection, else H
  int64_t directions = 1;   // D; direction 1 runs reversed in time
  bool projected = false;
  Operands parameters;  // of kinds that multiplies_steps(); forward has others too
  const void* hx{};     // (D, B, P or H) or null: zeros
  const void* cx{};     // (D, B, H) or null: zeros
};

// Elements of a size that a matrix of the recurrence may have.
inline int64_t elements_of(Size size, const Recurrence& r) {
  if (size == Size::gates) return traits(r.mode).gates * r.hidden_size;
  return size == Size::state ? r.state_size : r.hidden_size;
}

struct ForwardParams : Recurrence {
  const void* input{};  // (rows, I)
  int64_t input_size = 0;
  // CUDA, in place of the input and of all that makes its projection but bias_hh: that projection (rows, D*G*H)
  const void* gates{};
  void* output{};       // (rows, D*(P or H))
  void* h_n{};          // (D, B, P or H)
  void* c_n{};          // with a cell state: (D, B, H)
  void* cell_states{};  // with a cell state: (rows, D*H) or null: not saved
  void* reserve{};      // (rows, D*R*H) or null: not saved
};

struct BackwardParams : Recurrence {
  const void* grad_output{};       // (rows, D*(P or H)) or null: zeros; so the next three
  const void* grad_h_n{};          // (D, B, P or H)
  const void* grad_c_n{};          // (D, B, H)
  const void* grad_cell_states{};  // (rows, D*H)
  const void* output{};            // as forward left them; so the next two
  const void* cell_states{};
  const void* reserve{};
  void* grad_gates{};      // (rows, D*G*H)
  void* grad_gates_hh{};   // with a split gate: (rows, D*G*H), of W_hh h
  void* grad_hx{};         // (D, B, P or H) or null: nobody asks
  void* grad_cx{};         // with a cell state: (D, B, H) or null
  void* grad_projected{};  // with projection: (rows, D*P)
};

}  // namespace rnnfast
