// What the plan knows of GPUs: the cards by architecture, and THE table of the constants of its cost model, each with
// its unit and source. Plain host code, no torch, no CUDA.
//
// None of these constants was measured yet; those of a library's products have no microbenchmark, which has no torch:
// benchmarks/plan_check.py times the plan `split` beside what they predict. A card's own come in as lines of kMeasured,
// which `python benchmarks/plan_constants.py benchmarks/results/CARD-microbench.jsonl` prints from a result file of
// benchmarks/microbench; they replace the estimates of that architecture and say where they are from.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "../persistent/persistent.h"

namespace rnnfast::gpu {

// ---- devices --------------------------------------------------------------------------------------------------------

struct DeviceProperties {
  const char* name = "";
  int index = 0;  // among this process's devices
  int sm = 90;    // 10 * major + minor
  int sms = 0;
  int shared_per_block = 0;  // bytes, opt-in
  int largest_cluster = 0;   // blocks; 0: no clusters
  bool cooperative = true;
  double clock_ghz = 1;
  int64_t l2_bytes = 0;
  // Clusters of each size that run at the same time: the card's own cudaOccupancyMaxActiveClusters where that was
  // asked, else below zero, and a rule stands in.
  std::array<int, kMostCluster + 1> known_clusters = none_known();

  // The rule: a cluster lies within one GPC, and a GPC has 16 SMs, or as many as there are (a MIG slice). An H100's
  // have 16 or 18: 8 clusters of 16 blocks run at the same time, and 16 of 6 blocks, though 22 would have SMs enough.
  int clusters(int size) const {
    if (size < 1 || size > largest_cluster || size > kMostCluster) return 0;
    if (const int known = known_clusters[static_cast<size_t>(size)]; known >= 0) return known;
    constexpr int kGpcSms = 16;
    return std::max(1, sms / kGpcSms) * (std::min(sms, kGpcSms) / size);
  }

 private:
  static constexpr std::array<int, kMostCluster + 1> none_known() {
    std::array<int, kMostCluster + 1> none{};
    for (int& each : none) each = -1;
    return none;
  }
};

// From data sheets, boost clocks; for use where there is no GPU. In the order of the columns below.
constexpr int kKilobyte = 1024, kCards = 6;
inline const std::array<DeviceProperties, kCards>& cards() {
  static const auto make = [](const char* name, int sm, int sms, int shared_kb, int cluster, double ghz, int l2_mb) {
    DeviceProperties card;
    card.name = name;
    card.sm = sm;
    card.sms = sms;
    card.shared_per_block = shared_kb * kKilobyte;
    card.largest_cluster = cluster;
    card.clock_ghz = ghz;
    card.l2_bytes = int64_t{l2_mb} << 20;
    return card;
  };
  // 8 blocks a cluster are portable; an H100 and a B200 take 16 of kernels that ask for it.
  static const std::array<DeviceProperties, kCards> all = {
      make("A100", 80, 108, 163, 0, 1.41, 40),    make("A10", 86, 72, 99, 0, 1.70, 6),
      make("L40S", 89, 142, 99, 0, 2.52, 96),     make("H100 SXM", 90, 132, 227, 16, 1.755, 50),
      make("B200", 100, 148, 227, 16, 1.85, 126), make("RTX 5090", 120, 170, 99, 8, 2.41, 96),
  };
  return all;
}

// The column of an architecture: of one that is not listed that of the nearest before it.
inline size_t column_of(int sm) {
  size_t column = 0;
  for (size_t i = 0; i < cards().size(); ++i)
    if (cards()[i].sm <= sm) column = i;
  return column;
}

// A well known card of an architecture; of one that is not listed the nearest before it, under its own number.
inline DeviceProperties device_properties(int sm) {
  DeviceProperties card = cards()[column_of(sm)];
  card.sm = sm;
  return card;
}

// ---- the table of constants -----------------------------------------------------------------------------------------

// clk: a clock of an SM. Of a sub-core: of one of an SM's four. Bandwidths are those of the whole card.
// clang-format off
enum class Constant {
  launch, graph_launch, cooperative_launch, library_launch,
  l2_latency, l2_bandwidth, l2_to_sm, hbm_bandwidth, shared_bandwidth, dsmem_bandwidth,
  block_sync, cluster_exchange, grid_exchange, grid_barrier_exchange,
  mma, mma_latency, fma32, fma64, library_mma, library_fma64, library_part, library_l2_part,
  function_instructions, strict_function_instructions, gate_instructions, cell_instructions,
  backward_cell_instructions, turn_instructions, chunk_instructions, split_instructions,
  word_instructions, send_instructions, function_latency, shared_latency,
  count
};
// clang-format on
constexpr size_t kConstants = static_cast<size_t>(Constant::count);

struct ConstantRow {
  Constant constant;
  const char* name;
  const char* unit;
  std::array<double, kCards> values;  // 8.0 A100, 8.6 A10, 8.9 L40S, 9.0 H100, 10.0 B200, 12.0 RTX 5090
  const char* source;
};

constexpr const char* kSheet = "data sheet, not held to it line by line";
constexpr const char* kCounted = "counted in the machine code for 9.0a, on the way of a dense sequence";

// clang-format off
constexpr std::array<ConstantRow, kConstants> kConstantTable = {{
    {Constant::launch, "launch", "us", {3.0, 3.0, 3.0, 2.5, 2.5, 2.5},
     "estimated: from one launch of a stream to the next, from 9.0 on a dependent one"},
    {Constant::graph_launch, "graph launch", "us", {1.6, 1.6, 1.6, 1.3, 1.3, 1.3},
     "estimated: the same inside a CUDA graph"},
    {Constant::cooperative_launch, "cooperative launch", "us", {6, 6, 6, 5, 5, 5},
     "estimated: what it takes beyond a plain launch, once a call; the exchange's words are zeroed in it"},
    {Constant::library_launch, "launch of a library's product", "us", {5, 5, 5, 5, 5, 5},
     "estimated: of the host, through ATen's dispatch and cuBLAS, without a graph"},
    {Constant::l2_latency, "L2 latency", "us", {0.15, 0.15, 0.13, 0.15, 0.18, 0.13},
     "estimated: some 200 to 300 clk"},
    {Constant::l2_bandwidth, "L2 bandwidth", "TB/s", {4.0, 1.8, 4.5, 5.5, 7.0, 6.0},
     "estimated: about 30 bytes a clk and SM reach the SMs together"},
    {Constant::l2_to_sm, "L2 to one SM", "B/clk", {64, 64, 64, 64, 64, 64},
     "data sheet: 64 bytes a clk"},
    {Constant::hbm_bandwidth, "memory bandwidth", "TB/s", {2.0, 0.6, 0.86, 3.35, 8.0, 1.79}, kSheet},
    {Constant::shared_bandwidth, "shared memory", "B/clk", {128, 128, 128, 128, 128, 128},
     "data sheet: 32 banks of 4 bytes"},
    {Constant::dsmem_bandwidth, "shared memory of another SM", "B/clk", {0, 0, 0, 14, 14, 14},
     "estimated: 3.3 TB/s of all SMs of a Hopper card, after Luo et al. 2024, arXiv:2402.13499"},
    {Constant::block_sync, "barrier of a block", "us", {0.03, 0.03, 0.02, 0.03, 0.03, 0.02},
     "estimated: some 40 clk"},
    {Constant::cluster_exchange, "exchange in a cluster", "us", {0, 0, 0, 0.2, 0.2, 0.2},
     "estimated: st.async, 180 clk to another SM, and the wake-up at an mbarrier"},
    {Constant::grid_exchange, "exchange through L2, tagged data", "us", {0.6, 0.6, 0.5, 0.5, 0.6, 0.5},
     "estimated: a store to L2 and a load from it, polled"},
    {Constant::grid_barrier_exchange, "exchange through L2, flags", "us", {1.3, 1.3, 1.1, 1.2, 1.3, 1.1},
     "estimated: a fence, a flag, and a second trip for the data"},
    {Constant::mma, "mma.sync m16n8k16 (TF32: m16n8k8)", "clk of a sub-core", {8, 16, 16, 6, 8, 32},
     "estimated: data sheet's peak; on 9.0 two thirds of it (arXiv:2402.13499), on 10.0 taken as on 8.0"},
    {Constant::mma_latency, "mma.sync, until its sum can be added to", "clk", {33, 33, 33, 33, 33, 33},
     "estimated: 33 clk were measured by others on an A100, Sun et al. 2022, arXiv:2206.02874"},
    {Constant::fma32, "float32 FMA", "1/clk of an SM", {64, 128, 128, 128, 128, 128}, kSheet},
    {Constant::fma64, "float64 FMA", "1/clk of an SM", {32, 2, 2, 64, 64, 2}, kSheet},
    {Constant::library_mma, "16-bit products of a library (TF32: half)", "1/clk of an SM",
     {1024, 512, 512, 2048, 4096, 256}, "data sheet: dense peak, sums in float32; on 9.0 and 10.0 by wgmma and tcgen05"},
    {Constant::library_fma64, "float64 products of a library", "1/clk of an SM", {64, 2, 2, 128, 64, 2}, kSheet},
    {Constant::library_part, "what a library reaches of its peak", "of 1", {0.7, 0.7, 0.7, 0.7, 0.7, 0.7},
     "estimated: of a tile of its own, with operands in L2"},
    {Constant::library_l2_part, "what a library's blocks read that leaves L2", "of 1", {1, 1, 1, 0.5, 0.5, 1},
     "estimated: on 9.0 and 10.0 two blocks of a cluster share each read"},
    {Constant::function_instructions, "sigmoid or tanh", "instructions", {10, 10, 10, 10, 10, 10}, kCounted},
    {Constant::strict_function_instructions, "the same in float32", "instructions", {24, 24, 24, 24, 24, 24}, kCounted},
    {Constant::gate_instructions, "a gate beside that", "instructions", {15, 15, 15, 15, 15, 15}, kCounted},
    {Constant::cell_instructions, "a cell beside its gates", "instructions", {100, 100, 100, 100, 100, 100}, kCounted},
    {Constant::backward_cell_instructions, "the same backward", "instructions", {230, 230, 230, 230, 230, 230}, kCounted},
    {Constant::turn_instructions, "a warp's turn beside product and cells", "instructions", {260, 260, 260, 260, 260, 260},
     kCounted},
    {Constant::chunk_instructions, "loop over a chunk of the sum", "instructions", {6, 6, 6, 6, 6, 6}, kCounted},
    {Constant::split_instructions, "a fragment in three TF32 parts", "instructions", {12, 12, 12, 12, 12, 12}, kCounted},
    {Constant::word_instructions, "a word of 16 bytes through L2", "instructions", {45, 45, 45, 45, 45, 45}, kCounted},
    {Constant::send_instructions, "sending the sums of a tile", "instructions", {60, 60, 60, 60, 60, 60}, kCounted},
    {Constant::function_latency, "sigmoid or tanh, until its result", "clk", {100, 100, 100, 100, 100, 100},
     "estimated: two special functions of some 20 clk and a dozen dependent instructions"},
    {Constant::shared_latency, "shared memory, until its data", "clk", {30, 30, 30, 30, 30, 30},
     "estimated: 23 to 33 clk were measured by others"},
}};
// clang-format on

constexpr bool table_is_in_order() {
  for (size_t i = 0; i < kConstants; ++i)
    if (static_cast<size_t>(kConstantTable[i].constant) != i) return false;
  return true;
}
static_assert(table_is_in_order(), "kConstantTable must have a row for each Constant, in their order");

// What was measured, in the units of the table. Printed by benchmarks/plan_constants.py (above).
struct MeasuredConstant {
  Constant constant;
  int sm;
  double value;
  const char* source;  // "measured on CARD: FILE"
};
constexpr std::array<MeasuredConstant, 0> kMeasured = {};

struct SourcedValue {
  double value;
  const char* source;
};
inline SourcedValue constant_of(Constant constant, int sm) {
  for (const MeasuredConstant& each : kMeasured)
    if (each.constant == constant && column_of(each.sm) == column_of(sm)) return {each.value, each.source};
  const ConstantRow& row = kConstantTable[static_cast<size_t>(constant)];
  return {row.values[column_of(sm)], row.source};
}

// The constants of a device, in microseconds and bytes a microsecond where they are times and bandwidths.
class Costs {
 public:
  explicit Costs(const DeviceProperties& device) : clocks_a_us_(1e3 * device.clock_ghz) {
    for (size_t i = 0; i < kConstants; ++i) values_[i] = constant_of(static_cast<Constant>(i), device.sm).value;
    // A MIG slice has its part of the paths to L2 and to memory.
    part_ = std::min(1.0, double(device.sms) / cards()[column_of(device.sm)].sms);
  }
  double operator[](Constant constant) const { return values_[static_cast<size_t>(constant)]; }
  double clocks(double count) const { return count / clocks_a_us_; }
  // TB/s, of the whole card, to microseconds.
  double moved(double bytes, Constant bandwidth) const { return bytes / (1e6 * part_ * (*this)[bandwidth]); }
  // B/clk, of one SM.
  double moved_by_sm(double bytes, Constant bandwidth) const { return clocks(bytes / (*this)[bandwidth]); }

 private:
  std::array<double, kConstants> values_{};
  double clocks_a_us_, part_ = 1;
};

}  // namespace rnnfast::gpu
