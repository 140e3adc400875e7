// A plan as JSON, for the ops that tell one (cpu/ops_plan.cpp, ops_cuda.cpp), and what they make of their arguments.
#pragma once

#include <algorithm>
#include <concepts>
#include <locale>
#include <sstream>
#include <string>

#include "../../checks.h"
#include "../plan.h"

namespace rnnfast::gpu {

// A JSON object, member by member.
class Json {
 public:
  Json() {
    text_.imbue(std::locale::classic());
    text_.precision(9);
    text_ << '{';
  }
  Json& add(const char* name, const std::string& value) { return begin(name).quoted(value); }
  Json& add(const char* name, const char* value) { return add(name, std::string(value)); }
  Json& add(const char* name, bool value) { return begin(name), text_ << (value ? "true" : "false"), *this; }
  Json& add(const char* name, double value) { return begin(name), text_ << value, *this; }
  template <std::integral Value> Json& add(const char* name, Value value) {
    return begin(name), text_ << int64_t{value}, *this;
  }
  Json& add(const char* name, const Json& value) { return begin(name), text_ << value.str(), *this; }
  std::string str() const { return text_.str() + "}"; }

 private:
  Json& begin(const char* name) {
    text_ << (text_.tellp() > 1 ? ", " : "");
    return quoted(name), text_ << ": ", *this;
  }
  Json& quoted(const std::string& value) {
    text_ << '"';
    for (const char c : value) text_ << (c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ' ? '\'' : c);
    return text_ << '"', *this;
  }
  std::ostringstream text_;
};

// What such an op is given of a call; the arithmetic comes apart, since who knows the device knows the rest of that.
// The bound keeps products of two sizes within int64.
inline Request checked_request(const char* op, const std::string& mode, int64_t hidden, int64_t batch, int64_t steps,
                               int64_t directions, int64_t projection, bool training, bool backward) {
  const auto check_between = [&](const char* argument, int64_t value, int64_t least) {
    constexpr int64_t kMost = int64_t{1} << 31;
    RNNFAST_CHECK(value >= least && value <= kMost, op, ": ", argument, ": expected ", least, " to 2^31, got ", value);
  };
  Request request;
  request.mode = mode_of(op, mode);
  check_between("hidden", request.hidden_size = hidden, 1);
  check_between("batch", request.batch = batch, 0);
  check_between("steps", request.steps = steps, 0);
  check_between("projection", request.projection_size = projection, 0);
  RNNFAST_CHECK(directions == 1 || directions == 2, op, ": directions: expected 1 or 2, got ", directions);
  RNNFAST_CHECK(!projection || traits(request.mode).may_project, op, ": projection: expected 0 with mode ", mode);
  request.directions = directions;
  request.training = training;
  request.backward = backward;
  return request;
}

// {"error": why} where nothing is legal. Not an exception: what it says reaches Python only from torch 2.13 on.
inline std::string json_of(const Plan& plan, const Request& request, const DeviceProperties& device) {
  Json json, parts;
  if (!plan.error.empty()) return json.add("error", plan.error).str();
  const bool persistent = plan.kernels == Kernels::persistent;
  json.add("plan", plan.name()).add("kernels", kKernelsNames[static_cast<size_t>(plan.kernels)]);
  json.add("predicted_us", plan.predicted_us).add("limited_by", plan.limited_by).add("why", plan.why);
  for (size_t i = 0; i < kLimits; ++i) parts.add(kLimitNames[i], plan.parts[i]);
  json.add("limits_us", parts).add("recompute", plan.recompute);
  if (persistent) {
    const PersistentLayout& layout = plan.layout;
    const ProductShape& product = plan.shape.product;
    json.add("group", layout.group).add("units", layout.units).add("batch_tiles", layout.batch_tiles);
    json.add("warps", layout.warps).add("groups", plan.residency.groups).add("waves", plan.residency.waves);
    json.add("groups_at_once", plan.residency.at_once).add("shared_bytes", plan.shape.map.bytes);
    json.add("row_warps", product.row_warps).add("sum_warps", product.sum_warps).add("passes", product.passes);
    json.add("chunks", product.warp_chunks).add("fragments_in_shared_memory", product.kept);
  } else if (plan.kernels == Kernels::split) {
    const LibraryTiles tiles = split_cost(request, device).tiles;
    json.add("launches", request.projection_size ? 4 : 2).add("blocks", static_cast<int64_t>(tiles.blocks));
    json.add("tile_rows", tiles.rows).add("tile_columns", tiles.columns).add("parts", tiles.parts);
    json.add("l2_bytes", static_cast<int64_t>(std::min(tiles.l2_bytes, 9e18)));
  } else if (request.hidden_size && request.batch) {
    const StepCost cost = step_cost(request, device);
    json.add("launches", request.projection_size ? 2 : 1)
        .add("blocks", cost.blocks)
        .add("l2_bytes", static_cast<int64_t>(std::min(cost.l2_bytes, 9e18)));
  }
  Json about;
  about.add("name", device.name).add("sm", device.sm).add("sms", device.sms);
  about.add("shared_per_block", device.shared_per_block).add("largest_cluster", device.largest_cluster);
  if (persistent) about.add("clusters", device.clusters(plan.layout.group));
  return json.add("device", about).str();
}

}  // namespace rnnfast::gpu
