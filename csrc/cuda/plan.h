// Which kernels run a layer, and how a launch is laid out: the cheapest of all legal layouts by the cost model
// (plan/model.h), whose constants stand in plan/costs.h. Plain host code, no torch, no CUDA.
//
// A choice looks at some hundred layouts and takes about 20 us of the host: a call of few steps may keep its plan.
#pragma once

#include <optional>
#include <string>

#include "plan/model.h"
#include "plan/split_model.h"

namespace rnnfast::gpu {

enum class Kernels { step, persistent, split };
constexpr std::array<const char*, 3> kKernelsNames = {"step", "persistent", "split"};

struct Plan {
  Kernels kernels = Kernels::step;
  PersistentLayout layout;  // the next three: of the persistent kernels
  PersistentShape shape;
  Residency residency;
  double predicted_us = 0;              // a step, what a call takes once spread over its steps
  std::array<double, kLimits> parts{};  // of each Limit alone, us a step
  const char* limited_by = "";
  bool recompute = false;  // backward makes the gates again in place of reading the reserve: saves no time
  std::string why;         // in words
  std::string error;       // nothing of that name is legal: why; else ""

  const char* name() const {
    return kernels == Kernels::persistent ? name_of(layout) : kKernelsNames[static_cast<size_t>(kernels)];
  }
};

// What a plan may be asked for by name; "auto" chooses.
constexpr std::array<const char*, 7> kPlanNames = {"auto", "step", "split", "block", "cluster", "grid", "grid-barrier"};

namespace detail {

inline void set_cost(const Prediction& cost, Plan& plan) {
  plan.predicted_us = cost.us();
  plan.parts = cost.parts();
  plan.limited_by = cost.limited_by();
}

// Whether there is a row, on a device.
inline bool has_rows(const Request& request, const DeviceProperties& device) {
  return request.hidden_size >= 1 && request.batch >= 1 && device.sms >= 1;
}

inline Plan step_plan(const Request& request, const DeviceProperties& device, std::string why) {
  Plan plan;
  plan.why = std::move(why);
  if (has_rows(request, device)) set_cost(step_cost(request, device).prediction, plan);
  return plan;
}

// `error` says why there is none.
inline Plan split_plan(const Request& request, const DeviceProperties& device) {
  Plan plan;
  plan.kernels = Kernels::split;
  if (!has_rows(request, device) || request.steps < 1)
    plan.error = "split: there is nothing to compute";
  else if (request.arithmetic == Arithmetic::float32 && request.library_tf32)
    plan.error = "split: torch's products of float32 are in TF32 now, which this recurrence may not use";
  else if (request.arithmetic == Arithmetic::float16 && request.library_half_sums)
    plan.error = "split: torch's products of float16 add up in float16 now, and can give no sums in float32";
  else if (request.batch >= int64_t{1} << 31)
    plan.error = "split: 2^31 batch indices or more run step by step";
  else
    set_cost(split_cost(request, device).prediction, plan);
  return plan;
}

// Why no layout is, whatever the exchange; "" where some may be.
inline std::string never_persistent(const Request& request) {
  if (request.hidden_size < 1 || request.batch < 1 || request.steps < 1) return "there is nothing to compute";
  if (request.arithmetic == Arithmetic::float64) return "float64 runs step by step: there are no persistent kernels";
  if (request.projection_size > 0) return "a projection runs step by step: there are no persistent kernels";
  // An RNN's W_hh of that size in 16 bits, 128 MB, is more than any chip has; beyond, bytes would not fit an int.
  constexpr int64_t kMostHidden = 1 << 13;
  if (request.hidden_size > kMostHidden) return "W_hh does not fit on chip";
  // Tiles of the batch are the grid's y.
  constexpr int64_t kMostTiles = 65535;
  if (request.batch > kMostTiles * kBatchTile) return "524,281 batch indices or more run step by step";
  // Where kernels number rows in 32 bits (rows.cuh).
  constexpr int64_t kMostRows = (int64_t{1} << 31) - 16;
  if (request.steps >= kMostRows / request.batch / request.directions) return "2^31 rows or more run step by step";
  return "";
}

// What kept layouts of one exchange from being legal.
struct Obstacles {
  int least_shared = 0;      // bytes of a block, of those with few enough cells; 0: there are none
  int64_t least_blocks = 0;  // that would have to run at once, of those that fit an SM
};

inline bool is_legal(const Request& request, const DeviceProperties& device, const PersistentLayout& layout,
                     const PersistentShape& shape, Obstacles& obstacles) {
  const auto lower = [](auto& least, auto value) { least = least ? std::min(least, value) : value; };
  if (layout.units * layout.batch_tiles * kBatchTile > kMostCells * layout.warps * 32) return false;
  lower(obstacles.least_shared, shape.map.bytes);
  if (shape.map.bytes > device.shared_per_block) return false;
  const Residency resident = residency(request, device, layout);
  // Groups of blocks that only meet among themselves may follow one another; through L2 all of a launch must be there.
  const int64_t groups = layout.exchange == Exchange::grid ? request.directions : 1;
  if (resident.at_once >= groups) return true;
  lower(obstacles.least_blocks, groups * layout.group);
  return false;
}

inline std::string kilobytes(int bytes) { return std::to_string((bytes + 1023) / 1024) + " KB"; }

inline std::string what_hinders(const DeviceProperties& device, Exchange exchange, const Obstacles& obstacles) {
  const std::string name = name_of(exchange);
  if (exchange == Exchange::cluster && device.largest_cluster < 2)
    return name + ": needs compute capability 9.0 (sm_90) or later, got sm_" + std::to_string(device.sm);
  if (exchange == Exchange::grid && !device.cooperative) return name + ": needs cooperative launches";
  // Or a MIG slice, or a card with smaller GPCs, where even one cluster does not fit.
  if (obstacles.least_blocks)
    return name + ": needs " + std::to_string(obstacles.least_blocks) +
           " blocks at the same time, one an SM; there are " + std::to_string(device.sms) + " SMs";
  if (obstacles.least_shared > device.shared_per_block)
    return name + ": needs " + kilobytes(obstacles.least_shared) + " of shared memory a block, there are " +
           kilobytes(device.shared_per_block);
  if (exchange == Exchange::block) return name + ": more cells than its threads can own";
  return name + ": there are too few units for two blocks, or too many for " +
         std::to_string(exchange == Exchange::cluster ? device.largest_cluster : device.sms);
}

// The cheapest layout of one exchange; none, and `hinders` says why.
inline std::optional<Plan> best_of(const Request& request, const DeviceProperties& device, Exchange exchange,
                                   bool barrier, std::string& hinders) {
  Obstacles obstacles;
  std::optional<Plan> best;
  const int hidden = static_cast<int>(request.hidden_size), octets = divide_up(hidden, kOctet);
  const bool allowed = exchange == Exchange::block || (exchange == Exchange::cluster && device.largest_cluster >= 2) ||
                       (exchange == Exchange::grid && device.cooperative);
  const int most = exchange == Exchange::block     ? 1
                   : exchange == Exchange::cluster ? std::min(device.largest_cluster, kMostCluster)
                                                   : device.sms;
  const int least = exchange == Exchange::block ? 1 : 2;
  for (int own = 1, before = 0; allowed && own <= octets; ++own) {
    const int group = divide_up(octets, own);
    // More units in as many blocks: some blocks have less to do, and the others more.
    if (group == before) continue;
    before = group;
    if (group < least || group > most) continue;
    for (int tiles = 1; tiles <= most_batch_tiles(exchange); tiles *= 2) {
      for (const int warps : {1, 2, 4, 6, kMostWarps}) {
        PersistentLayout layout;
        layout.exchange = exchange;
        layout.group = group;
        layout.units = own * kOctet;
        layout.batch_tiles = tiles;
        layout.warps = warps;
        layout.barrier = barrier;
        const PersistentShape shape =
            persistent_shape(layout, traits(request.mode).gates, request.arithmetic, request.backward);
        if (!is_legal(request, device, layout, shape, obstacles)) continue;
        const Prediction cost = persistent_cost(request, device, layout, shape);
        if (best && best->predicted_us <= cost.us()) continue;
        best.emplace();
        best->kernels = Kernels::persistent;
        best->layout = layout;
        best->shape = shape;
        best->residency = residency(request, device, layout);
        if (exchange == Exchange::grid && best->residency.waves > 1)
          best->layout.launch_tiles = static_cast<int>(best->residency.at_once / request.directions);
        set_cost(cost, *best);
      }
    }
  }
  if (!best) hinders = what_hinders(device, exchange, obstacles);
  return best;
}

// "0.61 us": two digits after the point, whatever the locale.
inline std::string microseconds(double us) {
  const int64_t hundredths = static_cast<int64_t>(100 * us + 0.5);
  const std::string digits = std::to_string(hundredths % 100 + 100);
  return std::to_string(hundredths / 100) + "." + digits.substr(1) + " us";
}

}  // namespace detail

// The plan for a request: forward and backward are planned separately, each with a layout of its own.
inline Plan choose_plan(const Request& request, const DeviceProperties& device) {
  const Plan step = detail::step_plan(request, device, ""), split = detail::split_plan(request, device);
  const Plan& simple = split.error.empty() && split.predicted_us < step.predicted_us ? split : step;
  const Plan& other = &simple == &split ? step : split;
  const auto text_of = [](const Plan& plan) {
    return plan.error.empty() ? std::string(plan.name()) + " " + detail::microseconds(plan.predicted_us) : plan.error;
  };
  std::optional<Plan> best;
  std::string others, no_persistent = detail::never_persistent(request);
  if (no_persistent.empty()) {
    for (const Exchange exchange : {Exchange::block, Exchange::cluster, Exchange::grid}) {
      for (const bool barrier : {false, true}) {
        if (barrier && exchange != Exchange::grid) continue;
        std::string hinders;
        std::optional<Plan> found = detail::best_of(request, device, exchange, barrier, hinders);
        // The exchange through L2 has the same obstacles either way.
        if (found || !barrier) others += "; " + (found ? text_of(*found) : hinders);
        if (found && (!best || found->predicted_us < best->predicted_us)) best = std::move(found);
      }
    }
  } else {
    others = "; " + no_persistent;
  }
  const bool persistent = best && best->predicted_us < simple.predicted_us;
  Plan chosen = persistent ? *std::move(best) : simple;
  if (!detail::has_rows(request, device) || request.steps < 1)
    chosen.why = no_persistent;
  else
    chosen.why = "the cheapest by the model: " + (persistent ? text_of(simple) + "; " : "") + text_of(other) + others;
  return chosen;
}

// As choose_plan, of the plan of that name alone (kPlanNames): where none is legal, `error` says why.
inline Plan plan_of_name(const Request& request, const DeviceProperties& device, const std::string& name) {
  if (name == "auto") return choose_plan(request, device);
  if (name == "step") return detail::step_plan(request, device, "asked for by name");
  if (name == "split") {
    Plan split = detail::split_plan(request, device);
    split.why = "asked for by name";
    return split;
  }
  Plan none;
  const bool barrier = name == "grid-barrier";
  std::optional<Exchange> exchange;
  for (const Exchange each : {Exchange::block, Exchange::cluster, Exchange::grid})
    if (name == name_of(each) || (barrier && each == Exchange::grid)) exchange = each;
  if (!exchange) {
    none.error = "expected one of ";
    for (const char* known : kPlanNames) none.error += (known == kPlanNames[0] ? "" : ", ") + std::string(known);
    none.error += ", got " + name;
    return none;
  }
  if (const std::string why = detail::never_persistent(request); !why.empty()) {
    none.error = name + ": " + why;
    return none;
  }
  std::string hinders;
  std::optional<Plan> found = detail::best_of(request, device, *exchange, barrier, hinders);
  if (!found) {
    none.error = hinders;
    return none;
  }
  found->why = "asked for by name";
  return *found;
}

}  // namespace rnnfast::gpu
