// The cost model: what a step should take, of the step kernels and of a layout of the persistent ones (of the split
// ones: split_model.h). A prediction from the constants of costs.h, and nothing that was timed. Plain host code, no
// torch, no CUDA.
//
// A step is a chain of phases. Within a phase what goes on at once counts by its longest; between phases times add up.
// Each time belongs to a limit, so that a plan can say what to work on.
#pragma once

#include <algorithm>
#include <array>

#include "costs.h"
#include "step_tiles.h"

namespace rnnfast::gpu {

// latency: chains of dependent instructions and the block's own barriers. exchange: handing on what the next step
// multiplies, until it is there.
enum class Limit { launch, exchange, mma, issue, shared_memory, l2, hbm, latency };
constexpr size_t kLimits = 8;
constexpr std::array<const char*, kLimits> kLimitNames = {"launch",        "exchange", "mma", "issue",
                                                          "shared memory", "L2",       "HBM", "latency"};

// What is to be planned: one layer, forward or backward.
struct Request {
  Mode mode{};
  Arithmetic arithmetic = Arithmetic::bfloat16;
  int64_t hidden_size = 1, batch = 1, steps = 1, directions = 1;
  int64_t projection_size = 0;  // 0: none
  bool training = false;        // forward writes what backward needs
  bool backward = false;
  bool in_graph = false;  // launches cost what they do inside a CUDA graph
  // How the library multiplies now, by torch's flags: float32 in TF32, float16 with sums in float16.
  bool library_tf32 = false, library_half_sums = false;
};

// Microseconds a step. `parts`: what each limit would take by itself, also where something longer hides it.
class Prediction {
 public:
  // One phase: what goes on at once.
  struct Part {
    Limit limit;
    double us;
  };
  template <size_t kCount> void phase(const Part (&parts)[kCount]) {
    const Part* longest = parts;
    for (const Part& part : parts) {
      parts_[index(part.limit)] += part.us;
      if (part.us > longest->us) longest = &part;
    }
    decides_[index(longest->limit)] += longest->us;
    us_ += longest->us;
  }
  void phase(Limit limit, double us) { phase({Part{limit, us}}); }
  // The phases of another, after these.
  void add(const Prediction& other) {
    us_ += other.us_;
    for (size_t i = 0; i < kLimits; ++i) {
      parts_[i] += other.parts_[i];
      decides_[i] += other.decides_[i];
    }
  }
  // Groups that do not run at the same time.
  void repeat(double times) {
    us_ *= times;
    for (double& part : parts_) part *= times;
    for (double& part : decides_) part *= times;
  }
  // Traffic that goes on beside all phases.
  void beside(Limit limit, double us) {
    parts_[index(limit)] += us;
    if (us <= us_) return;
    us_ = us;
    decides_ = {};
    decides_[index(limit)] = us;
  }

  double us() const { return us_; }
  const std::array<double, kLimits>& parts() const { return parts_; }
  const char* limited_by() const {
    return kLimitNames[static_cast<size_t>(std::max_element(decides_.begin(), decides_.end()) - decides_.begin())];
  }

 private:
  static size_t index(Limit limit) { return static_cast<size_t>(limit); }
  double us_ = 0;
  std::array<double, kLimits> parts_{}, decides_{};
};

// ---- what all of them do --------------------------------------------------------------------------------------------

// Bytes of a step in memory beside the weights: the input projection and what is kept of it, or gradients.
inline double step_traffic(const Request& r) {
  const CellTraits& cell = traits(r.mode);
  const double state = double(r.projection_size ? r.projection_size : r.hidden_size), hidden = double(r.hidden_size);
  double elements;
  if (r.backward) {
    // grad_output, then the reserve or h_t, c_{t-1} (c_t was the step before's), and the gradients of the gates.
    elements = state + hidden * std::max(cell.reserve, 1) + hidden * cell.gates * (cell.split_gate == kNoGate ? 1 : 2);
    if (carries(cell)) elements += hidden;
  } else {
    elements = hidden * cell.gates + state;
    if (r.training) elements += hidden * (cell.reserve + (cell.has_cell_state ? 1 : 0));
  }
  return elements * double(r.batch) * double(r.directions) * element_bytes(r.arithmetic);
}

// Instructions of a thread for one cell, its equations only, and how many functions wait for one another in it.
struct CellWork {
  double instructions = 0;
  int chain = 1;
};
// precise: with the functions of float32, which the step kernels take for every type.
inline CellWork cell_work(const Request& r, const Costs& costs, bool precise) {
  const CellTraits& cell = traits(r.mode);
  // Forward each gate has a function and c_t another; backward only tanh(c_t) is made again.
  const int functions = (r.backward ? 0 : cell.gates) + (cell.has_cell_state ? 1 : 0);
  CellWork work;
  work.instructions =
      functions * costs[precise ? Constant::strict_function_instructions : Constant::function_instructions] +
      cell.gates * costs[Constant::gate_instructions] +
      costs[r.backward ? Constant::backward_cell_instructions : Constant::cell_instructions];
  work.chain = !r.backward && carries(cell) ? 2 : 1;
  return work;
}

// ---- the step kernels -----------------------------------------------------------------------------------------------

struct StepCost {
  int64_t blocks = 0;   // of the larger launch
  int batch = 0;        // indices a block, of the last launch
  double l2_bytes = 0;  // what all blocks of a step read from L2 for their products
  Prediction prediction;
};

// The tile that step/launch.cuh takes. From step/forward.cuh, block.cuh and arithmetic.cuh: 8 batch indices a block or
// as many as the type allows, and warps; `forward_cell` is the launch of forward's cell.
inline StepTile step_tile(const Request& r, const DeviceProperties& device, const StepWork& work, int rows_a_unit,
                          bool forward_cell) {
  StepTile small;
  small.tensor_cores = r.arithmetic != Arithmetic::float32 && r.arithmetic != Arithmetic::float64;
  small.element_bytes = element_bytes(r.arithmetic);
  small.rows = rows_a_unit * kStepUnits;
  small.batch = 8;
  StepTile large = small;
  large.batch = small.tensor_cores ? 32 : 16;
  small.threads = forward_cell && r.arithmetic == Arithmetic::float64 ? 128 : 256;
  large.threads = forward_cell ? 128 : 256;
  return takes_large(small, large, work, device.sms) ? large : small;
}

// A launch: `results` units, each the product of `rows_a_unit` weight rows of `length` elements.
inline StepTile add_step_launch(const Request& r, const DeviceProperties& device, const Costs& costs, int64_t results,
                                int rows_a_unit, double length, bool is_cell, StepCost& cost) {
  const StepWork work{results, static_cast<int64_t>(length), r.batch, r.directions};
  const StepTile tile = step_tile(r, device, work, rows_a_unit, is_cell && !r.backward);
  constexpr int kUnits = kStepUnits;
  const bool tensor_cores = tile.tensor_cores;
  const int batch = tile.batch;
  const int64_t blocks = work.blocks(tile);
  // States that are not there are a row that is.
  const double rows = double(tile.rows) + double(std::min<int64_t>(r.batch, batch));
  const double block_bytes = rows * length * element_bytes(r.arithmetic);
  const double products = double(rows_a_unit) * kUnits * batch * length;  // multiply-adds of a block
  const double on_busiest = double((blocks + device.sms - 1) / device.sms);
  const double mma_products = element_bytes(r.arithmetic) == 2 ? 16 * 8 * 16 : 16 * 8 * 8;
  const double product_clocks =
      tensor_cores ? products / mma_products / 4 * costs[Constant::mma]
                   : products / costs[r.arithmetic == Arithmetic::float64 ? Constant::fma64 : Constant::fma32];
  const double weights =
      double(rows_a_unit) * double(results) * length * element_bytes(r.arithmetic) * double(r.directions);
  Prediction& p = cost.prediction;
  p.phase(Limit::launch, costs[r.in_graph ? Constant::graph_launch : Constant::launch]);
  // The states of the step before, its first use of them, and the partial sums' way through shared memory.
  p.phase(Limit::latency, costs[Constant::l2_latency] + costs[Constant::block_sync]);
  p.phase({{Limit::l2, std::max(costs.moved(double(blocks) * block_bytes, Constant::l2_bandwidth),
                                costs.moved_by_sm(on_busiest * block_bytes, Constant::l2_to_sm))},
           {tensor_cores ? Limit::mma : Limit::issue, costs.clocks(on_busiest * product_clocks)},
           // Weights that L2 does not keep come from memory every step.
           {Limit::hbm, weights > double(device.l2_bytes) ? costs.moved(weights, Constant::hbm_bandwidth) : 0}});
  cost.blocks = std::max(cost.blocks, blocks);
  cost.batch = batch;
  cost.l2_bytes += double(blocks) * block_bytes;
  return tile;
}

inline StepCost step_cost(const Request& r, const DeviceProperties& device) {
  const Costs costs(device);
  StepCost cost;
  const int gates = traits(r.mode).gates;
  const double hidden = double(r.hidden_size), gate_rows = gates * hidden;
  // Backward multiplies gradients of all gates with the columns of W_hh: one row a unit, as long as all gates.
  if (r.projection_size)
    add_step_launch(r, device, costs, r.projection_size, 1, r.backward ? gate_rows : hidden, false, cost);
  const double state = double(r.projection_size ? r.projection_size : r.hidden_size);
  const double length = r.backward && !r.projection_size ? gate_rows : state;
  const StepTile tile = add_step_launch(r, device, costs, r.hidden_size, r.backward ? 1 : gates, length, true, cost);
  // The cells that are there, of the blocks on the busiest SM.
  const StepWork cells{r.hidden_size, static_cast<int64_t>(length), r.batch, r.directions};
  const double on_busiest = double((cells.blocks(tile) + device.sms - 1) / device.sms);
  const CellWork work = cell_work(r, costs, true);
  cost.prediction.phase({{Limit::issue, costs.clocks(on_busiest * cells_a_core(tile, r.batch) * work.instructions)},
                         {Limit::latency, costs.clocks(work.chain * costs[Constant::function_latency])}});
  cost.prediction.beside(Limit::hbm, costs.moved(step_traffic(r), Constant::hbm_bandwidth));
  return cost;
}

// ---- the persistent kernels -----------------------------------------------------------------------------------------

struct Residency {
  int64_t groups = 0;   // of the call
  int64_t at_once = 0;  // that the device holds
  int64_t waves = 1;
};
// One block an SM: a block's weights in registers leave no room for a second.
inline Residency residency(const Request& r, const DeviceProperties& device, const PersistentLayout& layout) {
  Residency result;
  const int64_t batch = int64_t{layout.batch_tiles} * kBatchTile;
  result.groups = (r.batch + batch - 1) / batch * r.directions;
  result.at_once = layout.exchange == Exchange::cluster ? device.clusters(layout.group) : device.sms / layout.group;
  // Launches follow one another with the same groups of both directions.
  if (layout.exchange == Exchange::grid) result.at_once -= result.at_once % r.directions;
  if (result.at_once > 0) result.waves = (result.groups + result.at_once - 1) / result.at_once;
  return result;
}

// The product of a block: passes over the rows, chunks of the sum.
inline void add_product(const Request& r, const Costs& costs, const PersistentLayout& layout,
                        const PersistentShape& shape, Prediction& p) {
  const ProductShape& product = shape.product;
  const int batch = layout.batch_tiles * kBatchTile, active = product.row_warps * product.sum_warps;
  const int warps_a_core = divide_up(active, 4), chunks = product.passes * product.warp_chunks;
  // float32: the product of the upper parts, and the two of an upper and a lower one, into the same sums.
  const int terms = r.arithmetic == Arithmetic::float32 ? 3 : 1;
  const int mmas = kRowTiles * layout.batch_tiles * terms;  // of a warp and tensor-core step, two a chunk
  const double step_clocks = std::max(terms * costs[Constant::mma_latency], warps_a_core * mmas * costs[Constant::mma]);
  double instructions = chunks * (2 * mmas + layout.batch_tiles + costs[Constant::chunk_instructions]) + product.kept;
  if (r.backward && layout.exchange != Exchange::block)
    instructions += product.passes * kRowTiles * costs[Constant::send_instructions];
  // A fragment of states has half the elements of one of weights.
  if (terms == 3) instructions += chunks * (kChunkFragments + layout.batch_tiles) * costs[Constant::split_instructions];
  const double bytes = double(active) * (double(product.kept) * kFragmentBytes + double(chunks) * kChunkBytes * batch);
  p.phase({{Limit::mma, costs.clocks(2 * chunks * step_clocks)},
           {Limit::issue, costs.clocks(warps_a_core * instructions)},
           {Limit::shared_memory, costs.moved_by_sm(bytes, Constant::shared_bandwidth)}});
  // The first operands, the last sums.
  p.phase(Limit::latency, costs.clocks(costs[Constant::shared_latency] + costs[Constant::mma_latency]));
}

// Bytes that a block receives of its group in a step, and the 16-byte words that they come in through L2.
struct Received {
  double bytes = 0, words = 0;
};
inline Received received(const Request& r, const PersistentLayout& layout) {
  const int batch = layout.batch_tiles * kBatchTile, size = element_bytes(r.arithmetic);
  Received all;
  if (layout.exchange == Exchange::block) return all;
  if (layout.exchange == Exchange::cluster) {
    all.bytes = double(layout.group - 1) * layout.units * batch * (r.backward ? 4 : size);
    return all;
  }
  // Backward partial sums in float32 of every block, forward the others' states with their tags.
  all.words = r.backward ? double(layout.group) * layout.units * batch / 4
                         : double(layout.group - 1) * slice_words(layout.units, batch, size);
  all.bytes = 16 * all.words;
  return all;
}

inline void add_exchange(const Request& r, const Costs& costs, const PersistentLayout& layout, double blocks,
                         Prediction& p) {
  const Received all = received(r, layout);
  switch (layout.exchange) {
    case Exchange::block: return p.phase(Limit::exchange, costs[Constant::block_sync]);
    case Exchange::cluster:
      p.phase(Limit::exchange,
              costs[Constant::cluster_exchange] + costs.moved_by_sm(all.bytes, Constant::dsmem_bandwidth));
      return;
    case Exchange::grid: {
      const int threads = layout.warps * 32;
      const double words_a_thread = std::max(1.0, all.words / threads);
      p.phase(Limit::exchange, costs[layout.barrier ? Constant::grid_barrier_exchange : Constant::grid_exchange]);
      p.phase({{Limit::l2, std::max(costs.moved(blocks * all.bytes, Constant::l2_bandwidth),
                                    costs.moved_by_sm(all.bytes, Constant::l2_to_sm))},
               {Limit::issue,
                costs.clocks(divide_up(layout.warps, 4) * words_a_thread * costs[Constant::word_instructions])}});
      // What the threads received meets in shared memory.
      p.phase(Limit::latency, costs[Constant::block_sync]);
    }
  }
}

inline Prediction persistent_cost(const Request& r, const DeviceProperties& device, const PersistentLayout& layout,
                                  const PersistentShape& shape) {
  const Costs costs(device);
  const int gates = traits(r.mode).gates, size = element_bytes(r.arithmetic);
  const int batch = layout.batch_tiles * kBatchTile, threads = layout.warps * 32;
  const Residency resident = residency(r, device, layout);
  const double blocks = double(std::min(resident.groups, resident.at_once)) * layout.group;

  Prediction p;
  add_product(r, costs, layout, shape, p);
  const ProductShape& product = shape.product;
  const int cells = divide_up(layout.units * batch, threads), warps_a_core = divide_up(layout.warps, 4);
  CellWork work = cell_work(r, costs, r.arithmetic == Arithmetic::float32);
  if (r.backward) {
    // The block's own sums for its units, and those that the others sent.
    work.instructions += 2.0 * layout.group;
    p.phase(Limit::shared_memory,
            costs.moved_by_sm(2.0 * layout.group * layout.units * batch * 4, Constant::shared_bandwidth));
  } else {
    const double bytes = 2.0 * product.sum_warps * batch * product.tiles * 16 * 4;
    p.phase(Limit::shared_memory, costs.moved_by_sm(bytes, Constant::shared_bandwidth));
    work.instructions += 2.0 * product.sum_warps * gates;
  }
  p.phase(Limit::latency, costs[Constant::block_sync]);
  const double turn = costs[Constant::turn_instructions];
  p.phase({{Limit::issue, costs.clocks(warps_a_core * (turn + cells * work.instructions))},
           {Limit::latency, costs.clocks(work.chain * costs[Constant::function_latency])}});
  add_exchange(r, costs, layout, blocks, p);
  p.repeat(double(resident.waves));
  p.beside(Limit::hbm, costs.moved(step_traffic(r), Constant::hbm_bandwidth));

  // Once a call, spread over its steps: the launch, and each wave's weights.
  const double slice = double(gates) * layout.units * layout.group * layout.units * size;
  const double load =
      std::max(costs.moved(slice * blocks, Constant::l2_bandwidth), costs.moved_by_sm(slice, Constant::l2_to_sm)) +
      costs.moved(slice * layout.group * double(r.directions), Constant::hbm_bandwidth);
  double start = costs[r.in_graph ? Constant::graph_launch : Constant::launch] + double(resident.waves) * load;
  if (layout.exchange == Exchange::grid) {
    start += double(resident.waves - 1) * costs[r.in_graph ? Constant::graph_launch : Constant::launch] +
             double(resident.waves) * costs[Constant::cooperative_launch];
    // Its words are zeroed first.
    start += costs.moved(double(exchange_bytes(layout, resident.groups, size, r.backward)), Constant::hbm_bandwidth);
    const int64_t groups = std::min(resident.groups, resident.at_once);
    const auto words = double(exchange_bytes(layout, groups, size, r.backward));
    // More than L2 keeps goes through memory every step.
    if (words > double(device.l2_bytes))
      p.beside(Limit::hbm, double(resident.waves) * costs.moved(2 * words, Constant::hbm_bandwidth));
  }
  p.phase(Limit::launch, start / double(std::max<int64_t>(r.steps, 1)));
  return p;
}

}  // namespace rnnfast::gpu
