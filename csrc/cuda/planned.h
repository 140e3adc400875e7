// The plan of a call on the current device, remembered: choosing takes some 20 us. Plain host code.
#pragma once

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "persistent/persistent_call.h"
#include "plan.h"
#include "properties.h"

namespace rnnfast::gpu {

// What every call is asked to run on where that is legal (kPlanNames): "auto", unless the environment or a caller says
// otherwise. For tests and comparisons.
class PreferredPlan {
 public:
  static std::string get() {
    const std::lock_guard lock(mutex());
    return name();
  }
  // The one before.
  static std::string set(const std::string& wanted) {
    const std::lock_guard lock(mutex());
    return std::exchange(name(), wanted);
  }
  static bool is_known(const std::string& wanted) {
    for (const char* known : kPlanNames)
      if (wanted == known) return true;
    return false;
  }

 private:
  static std::mutex& mutex() {
    static std::mutex instance;
    return instance;
  }
  static std::string& name() {
    static std::string instance = [] {
      const char* wanted = std::getenv("RNNFAST_CUDA_PLAN");
      if (wanted && is_known(wanted)) return std::string(wanted);
#if defined(RNNFAST_EMULATED)
      // A thread is a fiber: what is fast on a card is slow here.
      return std::string("step");
#else
      return std::string("auto");
#endif
    }();
    return instance;
  }
};

// Torch's flags, as they are now.
struct Precision {
  bool allow_tf32 = false;         // for recurrences
  bool library_tf32 = false;       // torch's products of float32 take it
  bool library_half_sums = false;  // torch's products of float16 add up in float16
};

// How a call runs, beside its tensors.
struct CallKind {
  Precision precision;
  bool training = false, backward = false;
};

inline Request request_of(const Recurrence& r, const CallKind& kind) {
  Request request;
  request.mode = r.mode;
  request.arithmetic = arithmetic_of(r.dtype, kind.precision.allow_tf32);
  request.library_tf32 = kind.precision.library_tf32;
  request.library_half_sums = kind.precision.library_half_sums;
  request.hidden_size = r.hidden_size;
  request.batch = r.rows.batch;
  request.steps = r.rows.steps;
  request.directions = r.directions;
  request.projection_size = r.projected ? r.state_size : 0;
  request.training = kind.training;
  request.backward = kind.backward;
  return request;
}

// Why a plan is not for the current device, "" where it is.
inline std::string why_not_here(const Request& request, const Plan& plan) {
  if (!plan.error.empty() || plan.kernels != Kernels::persistent) return plan.error;
  return why_not_resident(request.mode, request.arithmetic, plan.layout, request.batch, request.directions,
                          request.backward);
}

// Of the plans of these names that are legal and that the current device can hold, the fastest by the model.
template <size_t kCount>
Plan fastest_that_fits(const Request& request, const DeviceProperties& device, const char* const (&names)[kCount]) {
  std::optional<Plan> best;
  for (const char* name : names) {
    Plan plan = plan_of_name(request, device, name);
    if (!why_not_here(request, plan).empty()) continue;
    if (!best || plan.predicted_us < best->predicted_us) best = std::move(plan);
  }
  return *best;  // the step kernels are among them
}

// The preferred plan where it is legal for the request and the current device can hold it, else the step kernels; of
// "auto" the next best.
inline Plan plan_for(const Request& request, const DeviceProperties& device, const std::string& preferred) {
  Plan plan = plan_of_name(request, device, preferred);
  std::string why = why_not_here(request, plan);
  if (why.empty()) return plan;
  Plan next = preferred == "auto" ? fastest_that_fits(request, device, {"block", "cluster", "grid", "split", "step"})
                                  : plan_of_name(request, device, "step");
  next.why = why;
  return next;
}

// The kernels that a call takes.
struct Planned {
  Kernels kernels = Kernels::step;
  PersistentLayout layout;  // of the persistent ones
};

inline Planned planned_kernels(const Recurrence& r, const CallKind& kind) {
  DeviceProperties device;
  // A device that does not say what it is runs step by step.
  if (!current_properties(device).empty()) return {};
  const Request request = request_of(r, kind);
  const std::string preferred = PreferredPlan::get();
  using Key =
      std::tuple<int, int, int, bool, bool, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, std::string>;
  const Key key{device.index,
                static_cast<int>(r.mode),
                static_cast<int>(request.arithmetic),
                request.library_tf32,
                request.library_half_sums,
                r.hidden_size,
                r.rows.batch,
                r.rows.steps,
                r.directions,
                request.projection_size,
                kind.training,
                kind.backward,
                preferred};
  static std::mutex mutex;
  static std::map<Key, Planned> known;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const Plan plan = plan_for(request, device, preferred);
  // Whoever calls with ever new lengths must not fill the memory.
  constexpr size_t kMostKnown = 1024;
  if (known.size() >= kMostKnown) known.clear();
  return known[key] = {plan.kernels, plan.layout};
}

}  // namespace rnnfast::gpu
