// The row kernels of layers with options: every cell and type, forward and backward, with a plain product in place of a
// library's. What they compute is asked elsewhere, against loops in plain PyTorch (tests/test_variants_backends.py, on
// a card tests/gpu/test_gpu_options.py); here whether it is the same under every schedule, bit for bit, all of it
// written, and nothing beside it.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/split/plain_product.cuh"
#include "cuda/variants/variant_loop.h"
#include "layer_call.h"

namespace rnnfast::test {
namespace {

struct Options {
  const char* name;
  GateNorm gate_norm = GateNorm::none;
  CellNorm cell_norm = CellNorm::none;
  bool rms = false, hard_sigmoid = false, exponential = false, relu = false, reset_first = false;
  bool bias_hn = false, peephole = false, masks = false, zoneout = false;
  int gates = 0;  // 0: all of the cell
};

struct VariantShape {
  int64_t T = 1, B = 1, H = 1;
  bool reverse = false, lengths = false, resets = false, initial = true;
};

// One call, whose tensors live as long as it does.
class VariantCall {
 public:
  VariantCall(Mode mode, const Options& options, const VariantShape& shape, DType dtype)
      : dtype_(dtype), lengths_(shape.lengths ? shape.B : 0), resets_(shape.resets ? shape.T * shape.B : 0) {
    VariantParams& p = params_;
    p.mode = mode;
    p.dtype = dtype;
    p.hidden_size = shape.H;
    p.gates = options.gates ? options.gates : traits(mode).gates;
    p.reverse = shape.reverse;
    p.gate_norm = options.gate_norm;
    p.cell_norm = options.cell_norm;
    p.rms = options.rms;
    p.hard_sigmoid = options.hard_sigmoid;
    p.exponential = options.exponential;
    p.relu = options.relu;
    p.reset_first = options.reset_first;
    p.eps = 1e-5;
    p.zoneout_h = options.zoneout ? 0.25 : 0;
    p.rows.steps = shape.T;
    p.rows.batch = p.rows.step_stride = shape.B;
    p.rows.batch_stride = 1;
    for (size_t b = 0; b < lengths_.size(); ++b) lengths_[b] = (shape.T + static_cast<int64_t>(b)) % (shape.T + 1);
    for (size_t i = 0; i < resets_.size(); ++i) resets_[i] = random_() % 4 == 0;
    if (shape.lengths) p.rows.lengths = lengths_.device();
    if (shape.resets) p.rows.resets = resets_.device();
    p.gates_in = hold(rows() * p.width());
    p.weight_hh.data[0] = hold(p.width() * shape.H);
    p.weight_hh.stride[0] = shape.H;
    if (shape.initial) {
      p.hx = hold(states());
      if (p.has_cell()) p.cx = hold(states());
      if (p.exponential) p.lx = hold(states());
    }
    if (options.bias_hn) p.vectors[kBiasHn] = hold(shape.H);
    if (options.peephole) p.vectors[kPeephole] = hold((p.gates - 1) * shape.H);
    if (p.gate_norm != GateNorm::none) p.vectors[kNorm] = hold(p.width());
    if (p.gate_norm == GateNorm::joint) p.vectors[kNormBias] = hold(p.width());
    if (p.cell_norm != CellNorm::none) {
      p.vectors[kNormC] = hold(shape.H);
      p.vectors[kNormCBias] = hold(shape.H);
    }
    grad_output_ = hold(rows() * shape.H);
    grad_state_ = hold(states());
    if (!options.masks) return;
    p.recurrent_mask = hold(states());
    if (p.gates > 1) p.candidate_mask = hold(states());
    if (!p.has_cell() || p.exponential) return;
    kept_ = Array<uint8_t>(static_cast<size_t>(rows() * shape.H));
    for (size_t i = 0; i < kept_.size(); ++i) kept_[i] = random_() % 2;
    p.kept_c = kept_.device();
  }

  // Every result of forward and of backward.
  std::vector<std::vector<double>> results() {
    const VariantParams& p = params_;
    const int64_t H = p.hidden_size, R = rows(), N = p.width();
    made_.clear();
    asked_.clear();
    gpu::VariantStepForward f;
    static_cast<VariantParams&>(f.call) = p;
    f.call.output = result(R * H);
    f.call.h_n = result(states());
    if (p.has_cell()) f.call.c_n = result(states());
    if (p.has_cell()) f.call.cell_states = result(R * H);
    if (p.exponential) f.call.l_n = result(states());
    f.call.reserve_out = result(R * p.reserve() * H);
    if (p.gate_norm != GateNorm::none) f.call.normed = result(R * N);
    if (p.gate_norm != GateNorm::none) f.call.scale = result(R, compute_type(dtype_));
    if (!CHECK_NO_ERROR(run_forward(f))) return {};

    gpu::VariantStepBackward b;
    static_cast<VariantParams&>(b.call) = p;
    b.call.output = f.call.output;
    b.call.cell_states = f.call.cell_states;
    b.call.reserve_in = f.call.reserve_out;
    b.call.normed = f.call.normed;
    b.call.scale = f.call.scale;
    b.call.grad_output = grad_output_;
    b.call.grad_h_n = grad_state_;
    if (p.has_cell()) b.call.grad_c_n = grad_state_;
    if (p.exponential) b.call.grad_l_n = grad_state_;
    b.call.grad_gates = result(R * N);
    if (p.splits_gradient()) b.call.grad_sums = result(R * N);
    if (p.hx) b.call.grad_hx = result(states());
    if (p.cx) b.call.grad_cx = result(states());
    if (p.lx) b.call.grad_lx = result(states());
    for (int i = 0; i < kVariantVectors; ++i)
      if (p.vectors[i]) b.call.grad_vectors[i] = result(vector_size(p, i));
    if (!CHECK_NO_ERROR(run_backward(b))) return {};

    std::vector<std::vector<double>> found;
    for (const Buffer* buffer : asked_) {
      found.emplace_back(buffer->count());
      for (size_t i = 0; i < buffer->count(); ++i) found.back()[i] = buffer->get(i);
    }
    return found;
  }

 private:
  int64_t rows() const { return params_.rows.steps * params_.rows.batch; }
  int64_t states() const { return params_.rows.batch * params_.hidden_size; }

  const void* hold(int64_t count) {
    std::uniform_real_distribution<double> uniform(-1, 1);
    Values values(static_cast<size_t>(count));
    for (double& value : values) value = uniform(random_);
    keep_.emplace_back(dtype_, values);
    return keep_.back().device();
  }
  // What nobody has written is NaN.
  void* make(int64_t count, DType dtype) { return made_.emplace_back(dtype, static_cast<size_t>(count)).device(); }
  void* result(int64_t count) { return result(count, dtype_); }
  void* result(int64_t count, DType dtype) {
    void* const pointer = make(count, dtype);
    asked_.push_back(&made_.back());
    return pointer;
  }

  // From (B, length) to (B, columns), by W_hh or some rows of it.
  std::function<std::string()> product(const void* from, void* sums, int64_t first_row, int64_t rows, bool forward) {
    gpu::PlainProduct product;
    const int64_t H = params_.hidden_size;
    product.from = from;
    product.sums = sums;
    product.rows = params_.rows.batch;
    product.columns = forward ? rows : H;
    product.length = forward ? H : rows;
    product.weight[0] = static_cast<const char*>(params_.weight_hh.data[0]) + first_row * H * gpu::size_of(dtype_);
    product.column_stride[0] = forward ? H : 1;
    product.length_stride[0] = forward ? 1 : H;
    return [product, dtype = dtype_] { return gpu::run_plain_product(product, dtype, nullptr); };
  }

  std::string run_forward(gpu::VariantStepForward& f) {
    const VariantParams& p = params_;
    const int64_t first = p.first_width();
    f.entering = make(states(), dtype_);
    f.sums = make(p.rows.batch * first, compute_);
    gpu::VariantProducts products{product(f.entering, f.sums, 0, first, true), {}};
    if (p.reset_first) {
      f.reset_state = make(states(), dtype_);
      f.reset_sums = make(states(), compute_);
      products.reset = product(f.reset_state, f.reset_sums, first, p.hidden_size, true);
    }
    for (void** workspace : {&f.carry_c, &f.carry_l, &f.fresh_c}) *workspace = make(states(), compute_);
    return finish(gpu::run_variant_forward(f, products, {nullptr, true}));
  }
  std::string run_backward(gpu::VariantStepBackward& b) {
    const VariantParams& p = params_;
    const int64_t first = p.first_width();
    b.sum_gradients = make(p.rows.batch * first, dtype_);
    b.back = make(states(), compute_);
    gpu::VariantProducts products{product(b.sum_gradients, b.back, 0, first, false), {}};
    if (p.reset_first) {
      b.reset_gradients = make(states(), dtype_);
      products.reset = product(b.reset_gradients, b.back, first, p.hidden_size, false);
    }
    for (void** workspace : {&b.carry_h, &b.carry_c, &b.carry_l, &b.raw_c, &b.of_normed, &b.beside})
      *workspace = make(states(), compute_);
    b.of_gates = make(p.rows.batch * p.width(), compute_);
    gpu::place_vectors(b);
    b.turns_summed = 2;
    for (void** sums : {&b.vectors_now, &b.vectors_before}) *sums = make(p.rows.batch * b.vectors, compute_);
    return finish(gpu::run_variant_backward(b, products, {nullptr, true}));
  }

  const DType dtype_, compute_ = compute_type(dtype_);
  std::mt19937_64 random_{7};
  VariantParams params_;
  Array<int64_t> lengths_;
  Array<uint8_t> resets_, kept_;
  std::deque<Buffer> keep_, made_;
  std::vector<const Buffer*> asked_;
  const void *grad_output_{}, *grad_state_{};
};

// ---- cases ----------------------------------------------------------------------------------------------------------

// Small ones first, of one or two blocks a launch (layer_call.h); then more units than a block has threads.
const std::vector<VariantShape> kShapes = {
    {.T = 3, .B = 2, .H = 5, .lengths = true, .resets = true},
    {.T = 3, .B = 2, .H = 40, .reverse = true, .lengths = true, .resets = true},
    {.T = 2, .B = 1, .H = 300, .initial = false},
};

const std::vector<Options> kOfLstm = {
    {.name = "separate, output",
     .gate_norm = GateNorm::separate,
     .cell_norm = CellNorm::output,
     .peephole = true,
     .masks = true},
    {.name = "joint, carried, coupled",
     .gate_norm = GateNorm::joint,
     .cell_norm = CellNorm::carried,
     .rms = true,
     .hard_sigmoid = true,
     .zoneout = true,
     .gates = 3},
    {.name = "exponential", .gate_norm = GateNorm::joint, .exponential = true},
    // Without a norm of the gates, behind whose sums everything of a row is in order.
    {.name = "peepholes", .peephole = true},
};
const std::vector<Options> kOfGru = {
    {.name = "separate", .gate_norm = GateNorm::separate, .bias_hn = true, .zoneout = true},
    {.name = "reset first", .hard_sigmoid = true, .reset_first = true, .masks = true},
    {.name = "without r", .gate_norm = GateNorm::joint, .relu = true, .gates = 2},
    {.name = "b_hn", .bias_hn = true},
};
const std::vector<Options> kOfRnn = {{.name = "joint", .gate_norm = GateNorm::joint, .masks = true, .zoneout = true}};

struct Setting {
  const Options* options;
  VariantShape shape;
};

void run_cell(Mode mode, const TypeCase& type) {
  const Family family = traits(mode).family;
  const auto& every = family == Family::lstm ? kOfLstm : family == Family::gru ? kOfGru : kOfRnn;
  // The small ones first, and among them all options.
  std::vector<Setting> settings;
  for (const VariantShape& shape : kShapes)
    for (const Options& options : every) settings.push_back({&options, shape});
  const size_t count = kSmallOnly ? kSmall * every.size() : settings.size();
  std::vector<std::vector<std::vector<double>>> first(count);
  for_each_seed(kSeeds, [&] {
    for (size_t i = 0; i < count; ++i) {
      // As run_in_turn has it; the first time is what the others are held against.
      if (!first[i].empty() && seed() % count != i) continue;
      const VariantShape& shape = settings[i].shape;
      const check::Note note(std::string(settings[i].options->name) + ", T=" + std::to_string(shape.T) +
                             " B=" + std::to_string(shape.B) + " H=" + std::to_string(shape.H));
      VariantCall call(mode, *settings[i].options, shape, dtype_of(type.arithmetic));
      const auto found = call.results();
      bool finite = !found.empty();
      for (const auto& values : found)
        for (const double value : values) finite = finite && !std::isnan(value);
      CHECK_MESSAGE(finite, "a result that nobody has written, or of what nobody has written");
      if (first[i].empty())
        first[i] = found;
      else
        CHECK_MESSAGE(found == first[i], "another result under another schedule");
    }
  });
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(variant) {
  using namespace rnnfast;
  using namespace rnnfast::test;
  std::vector<check::Case> cases;
  for (const CellTraits& cell : kCells)
    for (const TypeCase& type : kTypes)
      // To these kernels TF32 is float32; and there are no options of the MGU.
      if (type.arithmetic != Arithmetic::tf32 && cell.family != Family::mgu)
        cases.push_back({case_name(cell) + "-" + type.name, [mode = cell.mode, &type] { run_cell(mode, type); }});
  return cases;
}
