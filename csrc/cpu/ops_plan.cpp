// The plan of the CUDA kernels (cuda/plan.h) as an op of the CPU library: no GPU has to be at hand to ask.
#include "../boxing.h"
#include "../cuda/plan/plan_json.h"

namespace rnnfast {
namespace {

gpu::Arithmetic arithmetic_of_name(const char* op, const std::string& name) {
  constexpr std::array<std::pair<const char*, gpu::Arithmetic>, 5> kNames = {{{"float64", gpu::Arithmetic::float64},
                                                                              {"float32", gpu::Arithmetic::float32},
                                                                              {"tf32", gpu::Arithmetic::tf32},
                                                                              {"bfloat16", gpu::Arithmetic::bfloat16},
                                                                              {"float16", gpu::Arithmetic::float16}}};
  for (const auto& [known, arithmetic] : kNames)
    if (name == known) return arithmetic;
  fail(op, ": arithmetic: expected one of float64, float32, tf32, bfloat16, float16, got ", name);
}

gpu::DeviceProperties device_of(const char* op, int64_t sm, int64_t sms) {
  std::string known;
  for (const gpu::DeviceProperties& card : gpu::cards()) known += (known.empty() ? "" : ", ") + std::to_string(card.sm);
  const int64_t first = gpu::cards().front().sm;
  RNNFAST_CHECK(sm >= first && sm < 1000, op, ": sm: expected one of ", known, ", or a later one, got ", sm);
  RNNFAST_CHECK(sms >= 0 && sms < 1 << 16, op, ": sms: expected 0 (those of a well known card) or more, got ", sms);
  gpu::DeviceProperties device = gpu::device_properties(static_cast<int>(sm));
  if (sms) {
    // A slice of a card has its part of L2 as well.
    device.l2_bytes = device.l2_bytes * std::min<int64_t>(sms, device.sms) / device.sms;
    device.sms = static_cast<int>(sms);
  }
  return device;
}

std::string plan(std::string mode, std::string arithmetic, int64_t hidden, int64_t batch, int64_t steps,
                 int64_t directions, int64_t projection, bool training, bool backward, bool in_graph, int64_t sm,
                 int64_t sms, std::string forced, bool products_tf32) {
  const char* const op = "rnnfast::cuda_plan";
  gpu::Request request =
      gpu::checked_request(op, mode, hidden, batch, steps, directions, projection, training, backward);
  request.arithmetic = arithmetic_of_name(op, arithmetic);
  request.in_graph = in_graph;
  request.library_tf32 = products_tf32 && request.arithmetic == gpu::Arithmetic::tf32;
  const gpu::DeviceProperties device = device_of(op, sm, sms);
  return gpu::json_of(gpu::plan_of_name(request, device, forced), request, device);
}

// The table of constants for one architecture, a JSON object a line.
std::string plan_constants(int64_t sm) {
  const gpu::DeviceProperties device = device_of("rnnfast::cuda_plan_constants", sm, 0);
  std::string lines;
  for (const gpu::ConstantRow& row : gpu::kConstantTable) {
    const gpu::SourcedValue value = gpu::constant_of(row.constant, device.sm);
    gpu::Json json;
    json.add("name", row.name).add("unit", row.unit).add("value", value.value).add("source", value.source);
    lines += json.str() + "\n";
  }
  return lines;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, library) {
  library.def(
      "cuda_plan(str mode, str arithmetic, int hidden, int batch, int steps=1000, int directions=1, int projection=0, "
      "bool training=False, bool backward=False, bool in_graph=False, int sm=90, int sms=0, str forced='auto', bool "
      "products_tf32=True) -> str");
  library.def("cuda_plan_constants(int sm) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("cuda_plan", TORCH_BOX(&rnnfast::plan));
  library.impl("cuda_plan_constants", TORCH_BOX(&rnnfast::plan_constants));
}
