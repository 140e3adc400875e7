// What every backend is given: plain structs of pointers, sizes and strides. No torch header here.
#pragma once

#include <cstdint>

#include "cells.h"

namespace rnnfast {

enum class DType { float32, float64, bfloat16, float16 };

constexpr int kMaxDirections = 2;

// Where row (t, b) stands among the rows of gates, output, cell_states, reserve and their gradients.
struct RowLayout {
  int64_t steps = 0;             // T
  int64_t batch = 0;             // B
  int64_t step_stride = 0;       // dense: rows from (t, b) to (t + 1, b)
  int64_t batch_stride = 0;      // dense: rows from (t, b) to (t, b + 1)
  const int64_t* batch_sizes{};  // packed (T,), host memory: row (t, b) follows those of all earlier steps; else null
  const int64_t* lengths{};      // dense (B,) or null: row b ends after lengths[b] steps
  const uint8_t* resets{};  // dense, one a row in the same layout, or null; not 0: true, whatever torch's bool holds
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
  const void* weight_hh[kMaxDirections]{};     // (G*H, P or H)
  int64_t weight_hh_stride[kMaxDirections]{};  // elements from one row to the next
  const void* weight_hr[kMaxDirections]{};     // (P, H) or null
  int64_t weight_hr_stride[kMaxDirections]{};
  const void* hx{};  // (D, B, P or H) or null: zeros
  const void* cx{};  // (D, B, H) or null: zeros
};

// Either `gates` is given or, with from_input, the layer's input and what makes gates of it.
struct ForwardParams : Recurrence {
  bool from_input = false;
  const void* gates{};  // (rows, D*G*H)
  const void* input{};  // (rows, I)
  int64_t input_size = 0;
  const void* weight_ih[kMaxDirections]{};  // (G*H, I)
  int64_t weight_ih_stride[kMaxDirections]{};
  const void* bias_ih[kMaxDirections]{};  // (G*H,) or null
  const void* bias_hh[kMaxDirections]{};  // (G*H,) or null; with gates only the GRU's n gate is read
  void* output{};                         // (rows, D*(P or H))
  void* h_n{};                            // (D, B, P or H)
  void* c_n{};                            // LSTM: (D, B, H)
  void* cell_states{};                    // LSTM: (rows, D*H) or null: not saved
  void* reserve{};                        // (rows, D*4*H) or null: not saved
};

struct BackwardParams : Recurrence {
  const void* grad_output{};       // (rows, D*(P or H)) or null: zeros; so the next three
  const void* grad_h_n{};          // (D, B, P or H)
  const void* grad_c_n{};          // (D, B, H)
  const void* grad_cell_states{};  // (rows, D*H)
  const void* output{};
  const void* cell_states{};
  const void* reserve{};
  void* grad_gates{};      // (rows, D*G*H)
  void* grad_gates_hh{};   // GRU: (rows, D*G*H)
  void* grad_hx{};         // (D, B, P or H) or null: nobody asks
  void* grad_cx{};         // LSTM: (D, B, H) or null
  void* grad_projected{};  // with projection: (rows, D*P)
};

// c (M, N) = a (M, K) b (K, N) + bias (N); strides in elements. c is row-major with row stride `c_row`.
struct MatmulParams {
  DType dtype{};
  int64_t m = 0, n = 0, k = 0;
  const void* a{};
  int64_t a_row = 0, a_col = 0;
  const void* b{};
  int64_t b_row = 0, b_col = 0;
  const void* bias[2]{};    // (N,) each or null; their sum is added
  int64_t bias_count[2]{};  // the first so many columns get this bias
  void* c{};
  int64_t c_row = 0;
};

}  // namespace rnnfast
