// The whole backward pass of a layer. The time loop hands over the gradients of some steps at a time (Chunks), which
// are multiplied into those of the weights and of the input while they are in cache, and are never there for all steps.
//
// A chunk's rows are those that have a step. Where the data have such rows one after the other products read and write
// them as they lie, else their copies. So with the states that entered the steps, which are the output one step earlier
// where all steps have the same rows and no state is cut.
#pragma once

#include <exception>

#include "backend.h"
#include "sanitized.h"
#include "schedule.h"

namespace rnnfast::cpu {
namespace {

// c = a b or c += a b by ATen's product of this type.
inline void multiply_by_aten(const Context& context, const MatmulParams& m) {
  using Function =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  // What compiled programs call; without the dispatcher, which takes as long as a small product.
  static const auto addmm = reinterpret_cast<Function>(torch_function("aoti_torch_cpu_addmm_out"));
  if (!addmm) return multiply(context, m);
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
    const int64_t sizes[] = {rows, columns}, strides[] = {row, column};
    return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2}, context.like.device(),
                                    context.like.scalar_type());
  };
  const Tensor c = matrix(m.c, m.m, m.n, m.c_row, 1), a = matrix(m.a, m.m, m.k, m.a_row, m.a_col),
               b = matrix(m.b, m.k, m.n, m.b_row, m.b_col);
  if (addmm(c.get(), c.get(), a.get(), b.get(), m.accumulates ? 1 : 0, 1) == TORCH_SUCCESS) return;
  const std::string said = torch_error();
  fail(context.op, ": a product of matrices failed: ", said_or_logged(said));
}

// The results, in the order of what layer_forward takes.
struct LayerGradients {
  OptionalTensor input, hx, cx;
  Places parameters;
};

class LayerBackward {
  using Ops = LayerOps<CpuBackend>;

 public:
  // p: what a backward pass reads. input: (rows, I), contiguous. weight_ih: in each direction.
  LayerBackward(const Context& context, BackwardParams& p, const void* input, const Operand& weight_ih, bool by_aten)
      : context_(context),
        p_(p),
        cell_(traits(p.mode)),
        input_(input),
        weight_ih_(weight_ih),
        // ATen's product of 16-bit types reads beyond a row's end, where there may be no number.
        by_aten_(by_aten && (p.dtype == DType::float32 || p.dtype == DType::float64)),
        input_size_(context.like.size(context.like.dim() - 1)),
        size_(traits_of(context.like.scalar_type()).size) {}

  LayerGradients run(int64_t wanted, const OptionalTensor& hx, const OptionalTensor& cx, const Places& places) {
    make_results(wanted, hx, cx, places);
    if (has_empty_results(p_)) {
      for_results([&](const OptionalTensor& result) { clear(result); });
      return results_;
    }
    plan();
    const Need need(p_, context_.row_count, 0);
    chunks_.alone_seconds = chunks_.turns < schedule_.steps()
                                ? need.alone_seconds * static_cast<double>(chunks_.turns) / schedule_.steps()
                                : need.alone_seconds;
    Team team(need.threads, chunks_.alone_seconds);
    check_memory(context_.op, context_.like, kernels(p_.dtype).backward(p_, team, &chunks_));
    if (error_) std::rethrow_exception(error_);
    for (const KindTraits& kind : kKinds)
      for (int64_t d = 0; d < p_.directions && kind.is_matrix(); ++d) finish(kind, d);
    return results_;
  }

 private:
  struct Rows {
    const char* data;
    int64_t stride;  // elements
  };
  // Where the products for a matrix's gradient are, or are to go.
  enum class Where { nowhere, sums, result };

  void make_results(int64_t wanted, const OptionalTensor& hx, const OptionalTensor& cx, const Places& places) {
    const auto wants = [&](int64_t result) { return (wanted >> result & 1) != 0; };
    results_.input = Ops::rows(context_, "grad_input", wants(0), grad_input_, input_size_);
    results_.hx = Ops::state(context_, "grad_hx", wants(1) && hx, p_.grad_hx, p_, p_.state_size);
    results_.cx =
        Ops::state(context_, "grad_cx", wants(2) && cx && cell_.has_cell_state, p_.grad_cx, p_, p_.hidden_size);
    int64_t result = 3;
    for (const KindTraits& kind : kKinds)
      for (int64_t d = 0; d < kMaxDirections; ++d, ++result) {
        const OptionalTensor& parameter = places[kind.kind][d];
        if (!parameter || !wants(result)) continue;
        const auto sizes = parameter->sizes();
        results_.parameters[kind.kind][d] =
            CpuBackend::empty({context_.op, kind.name, Sizes(sizes.begin(), sizes.size()), context_.like.scalar_type(),
                               context_.like, "the gradient of "});
      }
  }

  template <class Use> void for_results(const Use& use) const {
    for (const OptionalTensor* result : {&results_.input, &results_.hx, &results_.cx}) use(*result);
    for (const auto& parameters : results_.parameters.of)
      for (const OptionalTensor& result : parameters) use(result);
  }
  void clear(const OptionalTensor& tensor) const {
    // Of none there is no memory, which must not be named even to leave it alone; so below.
    if (tensor && tensor->numel() > 0)
      std::memset(mutable_data_of(*tensor), 0, static_cast<size_t>(tensor->numel() * size_));
  }

  // How many turns a chunk has, and its memory.
  void plan() {
    schedule_.place(p_.rows, workspace_);
    check_memory(context_.op, context_.like, workspace_.allocate());
    schedule_.place(p_.rows, workspace_);
    const int64_t chunks = divide_up(schedule_.steps(), turns_at_once());
    // One chunk takes the turn that only finishes, too.
    chunks_.turns = chunks > 1 ? divide_up(schedule_.steps(), chunks) : schedule_.steps() + 1;
    chunks_.rows = product(chunks_.turns, p_.rows.batch);
    if (context_.row_count < chunks_.rows) chunks_.rows = context_.row_count;
    const int64_t gates = cell_.gates * p_.hidden_size;
    p_.grad_gates = chunk("gradients of gates", gates);
    if (cell_.split_gate != kNoGate) p_.grad_gates_hh = chunk("gradients of the split gate", p_.hidden_size);
    if (p_.projected) p_.grad_projected = chunk("gradients of projected states", p_.state_size);
    if (wants(Size::hidden)) chunks_.hidden = chunk("states before their projection", p_.hidden_size);
    const bool compact = schedule_.is_compact();
    shifted_ = compact && !p_.rows.batch_sizes && !schedule_.has_cuts();
    if (!compact) rows_copy_ = chunk("rows of the input", input_size_, 1);
    if (!shifted_ && wants(Size::state)) states_copy_ = chunk("states that entered the steps", p_.state_size, 1);
    for (int64_t d = 0; d < p_.directions; ++d) {
      chunks_.grad_bias_ih[d].result = data_of_result(Kind::bias_ih, d);
      chunks_.grad_bias_hh[d].result = data_of_result(Kind::bias_hh, d);
    }
    if (sums_are_wider() && (chunks > 1 || (shifted_ && p_.hx))) make_sums(chunks > 1);
    chunks_.context = this;
    chunks_.use = [](void* self, int64_t first_turn, int64_t last_turn) {
      return static_cast<LayerBackward*>(self)->use(first_turn, last_turn);
    };
    // Written row by row, or added to.
    if (p_.directions > 1 || schedule_.has_lengths()) clear(results_.input);
  }

  // Then what several products give is summed in float32, and rounded once.
  bool sums_are_wider() const { return size_ < static_cast<int64_t>(sizeof(float)); }

  // So many that the gates' gradients of a chunk stay in cache, but enough for a product of them to be worth reading
  // and writing the gradients of the weights, which may lie far beyond it.
  int64_t turns_at_once() const {
#if defined(RNNFAST_SANITIZED)
    return divide_up(8, p_.rows.batch);  // the fuzzer's calls are small
#endif
    constexpr int64_t kBytes = 1 << 20, kFewestRows = 256, kFewestBeyondCache = 2048;
    // Sums of narrow types are as much to read and write as in float32, their products less to do. So many rows are
    // multiplied without a second look at the sums (matmul.h, pair_matmul.h).
    constexpr int64_t kFewestOfSums = 1024;
    constexpr int64_t kMostRows = 4096;  // many more in one sum would cost digits
    const int64_t gates = cell_.gates * p_.hidden_size, a_row = p_.directions * gates * size_;
    const double weights = static_cast<double>(gates) * static_cast<double>(input_size_ + p_.state_size);
    const double sums = weights * (sums_are_wider() ? static_cast<int64_t>(sizeof(float)) : size_);
    const int64_t fewest = sums > 20 * kL2 ? kFewestBeyondCache : sums_are_wider() ? kFewestOfSums : kFewestRows;
    const int64_t fitting = a_row > 0 ? kBytes / a_row : fewest, most = fitting < kMostRows ? fitting : kMostRows;
    const int64_t rows = most < fewest ? fewest : most;
    if (!sums_are_wider()) return divide_up(rows, p_.rows.batch);
    // Sums may take more memory than chunks spare.
    if (static_cast<double>(context_.row_count - rows) * a_row <= p_.directions * sums) return schedule_.steps() + 1;
    return p_.rows.batch < rows ? rows / p_.rows.batch : 1;
  }

  // What several products are summed in: of every parameter, or with one chunk of W_hh, which has two (add_shifted).
  void make_sums(bool of_all) {
    const auto made = [&](const char* name, const OptionalTensor& result) {
      const auto sizes = result->sizes();
      buffers_.push_back(CpuBackend::empty({context_.op, name, Sizes(sizes.begin(), sizes.size()), ScalarType::Float,
                                            context_.like, "sums for the gradient of "}));
      return mutable_data_of(buffers_.back());
    };
    for (const KindTraits& kind : kKinds)
      for (int64_t d = 0; d < p_.directions; ++d) {
        const OptionalTensor& result = results_.parameters[kind.kind][d];
        if (!result || result->numel() < 1 || !(of_all || kind.kind == Kind::weight_hh)) continue;
        if (kind.is_matrix())
          sums_[kind.kind][d] = static_cast<float*>(made(kind.name, result));
        else
          (kind.kind == Kind::bias_ih ? chunks_.grad_bias_ih : chunks_.grad_bias_hh)[d].sum = made(kind.name, result);
      }
  }

  // Whether the gradient of a matrix that multiplies vectors of this size is wanted.
  bool wants(Size columns) const {
    for (const KindTraits& kind : kKinds)
      for (const OptionalTensor& result : results_.parameters[kind.kind])
        if (result && kind.is_matrix() && kind.columns == columns) return true;
    return false;
  }

  // (D, rows of a chunk, width and what is beyond it).
  void* chunk(const char* name, int64_t width) { return chunk(name, width, p_.directions); }
  void* chunk(const char* name, int64_t width, int64_t directions) {
    buffers_.push_back(Ops::empty(context_, name, {directions, chunks_.rows, chunk_row_stride(width, size_)}));
    return mutable_data_of(buffers_.back());
  }
  Rows rows_of_chunk(const void* data, int64_t width, int64_t d) const {
    const int64_t stride = chunk_row_stride(width, size_);
    return {static_cast<const char*>(data) + d * chunks_.rows * stride * size_, stride};
  }

  void* data_of_result(Kind kind, int64_t d) const {
    const OptionalTensor& result = results_.parameters[kind][d];
    return result ? mutable_data_of(*result) : nullptr;
  }

  // What is thrown must not pass through the kernels.
  bool use(int64_t first_turn, int64_t last_turn) {
    try {
      last_chunk_ = last_turn >= schedule_.steps();
      for (int64_t d = 0; d < p_.directions; ++d) use_steps(d, schedule_.times_of_turns(d, first_turn, last_turn));
    } catch (...) { error_ = std::current_exception(); }
    return !error_;
  }

  void use_steps(int64_t d, Range times) {
    const int64_t rows = schedule_.rows_before(times.last) - schedule_.rows_before(times.first);
    if (rows < 1) return;
    const Rows gates = rows_of_chunk(p_.grad_gates, cell_.gates * p_.hidden_size, d);
    for (const KindTraits& kind : kKinds) {
      if (!kind.is_matrix() || !results_.parameters[kind.kind][d]) continue;
      const Rows left = kind.rows == Size::gates ? gates : rows_of_chunk(p_.grad_projected, p_.state_size, d);
      if (kind.columns == Size::input)
        add_product(kind, d, left, 0, input_rows(times), rows);
      else if (kind.columns == Size::hidden)
        add_product(kind, d, left, 0, rows_of_chunk(chunks_.hidden, p_.hidden_size, d), rows);
      else if (shifted_)
        add_shifted(kind, d, left, times);
      else
        add_product(kind, d, left, 0, entered(d, times), rows);
    }
    if (results_.input) give_to_input(d, gates, times, rows);
  }

  // To the gradient of a parameter: left^T right, of so many rows, from the chunk's row `first` of the left ones.
  // is_last: of those of the chunk.
  void add_product(const KindTraits& kind, int64_t d, const Rows& left, int64_t first, const Rows& right, int64_t rows,
                   bool is_last = true) {
    if (rows < 1) return;
    const Where to = !sums_[kind.kind][d] || (is_last && last_chunk_) ? Where::result : Where::sums;
    const int64_t width = results_.parameters[kind.kind][d]->size(0), H = p_.hidden_size;
    if (p_.grad_gates_hh && kind.multiplies_steps() && kind.rows == Size::gates) {
      const int64_t split = cell_.split_gate * H;
      add_columns(kind, d, left, 0, first, right, rows, {0, split}, to);
      add_columns(kind, d, rows_of_chunk(p_.grad_gates_hh, H, d), split, first, right, rows, {split, split + H}, to);
      add_columns(kind, d, left, 0, first, right, rows, {split + H, width}, to);
    } else {
      add_columns(kind, d, left, 0, first, right, rows, {0, width}, to);
    }
    so_far_[kind.kind][d] = to;
  }
  // The same for some columns of what stands left, whose own first one is that of `left_begins`.
  void add_columns(const KindTraits& kind, int64_t d, const Rows& left, int64_t left_begins, int64_t first,
                   const Rows& right, int64_t rows, Range columns, Where to) const {
    const OptionalTensor& result = results_.parameters[kind.kind][d];
    if (columns.last <= columns.first || result->size(1) < 1) return;
    MatmulParams m = to_result(kind, d, columns, to);
    m.k = rows;
    m.a = left.data + (first * left.stride + columns.first - left_begins) * size_;
    m.a_row = 1;
    m.a_col = left.stride;
    m.b = right.data;
    m.b_row = right.stride;
    multiply_chunk(m);
  }
  // A product for these rows of a gradient, or for its sums.
  MatmulParams to_result(const KindTraits& kind, int64_t d, Range rows, Where to) const {
    const OptionalTensor& result = results_.parameters[kind.kind][d];
    MatmulParams m;
    m.accumulates = so_far_[kind.kind][d] != Where::nowhere;
    m.m = rows.last - rows.first;
    m.n = m.c_row = result->size(1);
    if (float* const sums = sums_[kind.kind][d]) m.sums = sums + rows.first * m.n;
    if (to == Where::result) m.c = static_cast<char*>(mutable_data_of(*result)) + rows.first * m.n * size_;
    return m;
  }
  // What no product was for is zeros. Sums that the last chunk had nothing for are still to be rounded.
  void finish(const KindTraits& kind, int64_t d) {
    const OptionalTensor& result = results_.parameters[kind.kind][d];
    if (so_far_[kind.kind][d] == Where::nowhere) return clear(result);
    if (so_far_[kind.kind][d] == Where::result) return;
    MatmulParams m = to_result(kind, d, {0, result->size(0)}, Where::result);
    m.a = m.b = m.c;  // of which there is nothing to multiply
    multiply_chunk(m);
  }
  void multiply_chunk(MatmulParams& m) const {
    m.dtype = p_.dtype;
    m.b_col = 1;
    if (by_aten_)
      multiply_by_aten(context_, m);
    else
      multiply(context_, m);
  }

  // The same where the states that entered the steps are the output, shifted by a step, and before the first hx.
  void add_shifted(const KindTraits& kind, int64_t d, const Rows& left, Range times) {
    const int64_t batch = p_.rows.batch, width = p_.state_size, steps = schedule_.steps();
    const bool has_first = d == 0 ? times.first == 0 : times.last == steps;
    const int64_t first = d == 0 ? 0 : times.last - 1 - times.first;  // that step's place among those of the chunk
    const int64_t others = has_first && d == 0 ? 1 : 0, count = times.last - times.first - has_first;
    const int64_t before = times.first + others + (d == 0 ? -1 : 1);
    const bool has_initial = has_first && p_.hx;
    if (count > 0)
      add_product(kind, d, left, others * batch,
                  {static_cast<const char*>(p_.output) + (before * batch * p_.directions + d) * width * size_,
                   p_.directions * width},
                  count * batch, !has_initial);
    if (has_initial)
      add_product(kind, d, left, first * batch, {static_cast<const char*>(p_.hx) + d * batch * width * size_, width},
                  batch);
  }

  // use(t, s, row) for the rows of these steps: step t of what is sth by length, `row`th among them. Each moves so many
  // bytes; the steps are shared out among threads.
  template <class Use> void for_rows(Range times, int64_t bytes, const Use& use) const {
    const int64_t before = schedule_.rows_before(times.first);
    const double seconds = static_cast<double>(schedule_.rows_before(times.last) - before) * bytes / kBytesMoved;
    Team team(useful_threads(seconds * kFlops, seconds * kFlops), seconds);
    const Stage stage{1, shares_for(team.planned()), 1};
    const auto use_share = [&](const Piece& piece) {
      const Range mine = share_of(times.last - times.first, piece.share, stage.shares);
      for (int64_t t = times.first + mine.first; t < times.first + mine.last; ++t)
        for (int64_t s = 0; s < schedule_.active(t); ++s) use(t, s, schedule_.rows_before(t) - before + s);
    };
    if (stage.shares == 1) return use_share({});
    team.run(&stage, 1, use_share);
  }

  // from(t, s): the row for step t of what is sth by length; null: zeros.
  template <class From> Rows copied(void* to, int64_t width, Range times, const From& from) const {
    const int64_t stride = chunk_row_stride(width, size_);
    const auto bytes = static_cast<size_t>(width * size_);
    if (bytes > 0)
      for_rows(times, width * size_, [&](int64_t t, int64_t s, int64_t row) {
        char* const copy = static_cast<char*>(to) + row * stride * size_;
        if (const void* source = from(t, s))
          std::memcpy(copy, source, bytes);
        else
          std::memset(copy, 0, bytes);
      });
    return {static_cast<const char*>(to), stride};
  }

  const char* data_row(const void* data, int64_t t, int64_t s, int64_t width) const {
    return static_cast<const char*>(data) + schedule_.data_row(t, schedule_.batch_index(s)) * width * size_;
  }

  Rows input_rows(Range times) const {
    if (!rows_copy_) return {data_row(input_, times.first, 0, input_size_), input_size_};
    return copied(rows_copy_, input_size_, times,
                  [&](int64_t t, int64_t s) { return data_row(input_, t, s, input_size_); });
  }

  // The states that entered the steps.
  Rows entered(int64_t d, Range times) const {
    const GroupRows all{schedule_, 0, 1, d == 1};
    const int64_t width = p_.state_size;
    return copied(states_copy_, width, times, [&](int64_t t, int64_t s) -> const char* {
      if (all.cut_before(t, s)) return nullptr;
      if (s < all.active(all.before(t)))
        return data_row(p_.output, all.before(t), s, p_.directions * width) + d * width * size_;
      if (!p_.hx) return nullptr;
      return static_cast<const char*>(p_.hx) + (d * p_.rows.batch + all.batch_index(s)) * width * size_;
    });
  }

  // The gradient of the chunk's rows of the input: gates W_ih, added up over the directions.
  void give_to_input(int64_t d, const Rows& gates, Range times, int64_t rows) const {
    if (input_size_ < 1) return;
    const auto row_of = [&](int64_t t, int64_t s) { return data_row(grad_input_, t, s, input_size_); };
    MatmulParams m;
    m.accumulates = p_.directions > 1;
    m.m = rows;
    m.n = input_size_;
    m.k = cell_.gates * p_.hidden_size;
    m.a = gates.data;
    m.a_row = gates.stride;
    m.a_col = 1;
    m.b = weight_ih_.data[d];
    m.b_row = weight_ih_.stride[d];
    m.c = rows_copy_ ? rows_copy_ : const_cast<char*>(row_of(times.first, 0));
    m.c_row = rows_copy_ ? chunk_row_stride(input_size_, size_) : input_size_;
    if (rows_copy_ && m.accumulates) copied(rows_copy_, input_size_, times, row_of);
    multiply_chunk(m);
    if (!rows_copy_) return;
    for_rows(times, input_size_ * size_, [&](int64_t t, int64_t s, int64_t row) {
      std::memcpy(const_cast<char*>(row_of(t, s)), static_cast<const char*>(rows_copy_) + row * m.c_row * size_,
                  static_cast<size_t>(input_size_ * size_));
    });
  }

  const Context& context_;
  BackwardParams& p_;
  const CellTraits& cell_;
  const void* const input_;
  const Operand& weight_ih_;
  const bool by_aten_;
  const int64_t input_size_, size_;  // size_: bytes of an element
  void* grad_input_ = nullptr;
  LayerGradients results_;
  PerKind<std::array<Where, kMaxDirections>> so_far_;
  PerKind<std::array<float*, kMaxDirections>> sums_;  // null: the result itself is added to
  bool last_chunk_ = false;
  Workspace workspace_;
  Schedule schedule_;
  Chunks chunks_{};
  Tensors buffers_;
  void* rows_copy_ = nullptr;    // where the chunk's rows of the input are not together, of these or their gradients
  void* states_copy_ = nullptr;  // where the states that entered are not the output, shifted
  bool shifted_ = false;
  std::exception_ptr error_;
};

inline std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, Places> layer_backward(
    std::string mode, bool by_aten, int64_t wanted, Tensor input, OptionalTensor grad_output, OptionalTensor grad_h_n,
    OptionalTensor grad_c_n, OptionalTensor grad_cell_states, OptionalTensor output, OptionalTensor cell_states,
    OptionalTensor reserve, OptionalTensor hx, OptionalTensor cx, Sequences sequences, Places places) {
  // The input has the rows of all.
  Context context("rnnfast::layer_backward", "input", input);
  BackwardParams p;
  LayerOps<CpuBackend>::fill_backward(context, mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, output,
                                      cell_states, reserve, hx, cx, sequences, places, p);
  Recurrence others;
  others.directions = p.directions;
  for (const KindTraits& kind : kKinds) {
    if (kind.multiplies_steps()) continue;
    check_parameters(kind, context, p, places);
    if (kind.is_matrix()) hold_parameters(kind, context, others, places);
  }
  const void* const data = context.hold("input", input);
  const LayerGradients grads =
      LayerBackward(context, p, data, others.parameters[Kind::weight_ih], by_aten).run(wanted, hx, cx, places);
  return {grads.input, grads.hx, grads.cx, grads.parameters};
}

}  // namespace
}  // namespace rnnfast::cpu
