// What the design of the kernels rests on, measured on the card at hand; one JSON object a line on stdout.
//   microbench [device | grid | cluster | residency | mma | launch ...]     all by default
// us: microseconds a step (or a launch), the median of several runs. "correct": the result is what the host computes;
// exit status 1 says that one was not, 2 that something could not run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/primitives/launch.h"
#include "kernels.cuh"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::microbench;

constexpr unsigned kThreads = 256, kRuns = 7;
int failures = 0, wrong = 0;

struct Device {
  cudaDeviceProp properties{};
  int clock_khz = 0;
  unsigned sms() const { return static_cast<unsigned>(properties.multiProcessorCount); }
  bool hopper() const { return properties.major >= 9; }
  size_t shared_bytes() const { return properties.sharedMemPerBlockOptin; }
};

void fail(const char* what, const std::string& error) {
  ++failures;
  std::string text;
  for (const char c : error) text += c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ' ? '\'' : c;
  std::printf("{\"what\": \"%s\", \"error\": \"%s\"}\n", what, text.c_str());
  std::fflush(stdout);
}

// Where going on makes no sense: no memory, no device.
void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fail(what, cudaGetErrorString(error));
  std::exit(2);
}

const char* boolean(bool value) {
  if (!value) ++wrong;
  return value ? "true" : "false";
}

template <class T> class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), bytes()), "cudaMalloc");
    clear(nullptr);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    require(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  void clear(cudaStream_t stream) { require(cudaMemsetAsync(data_, 0, bytes(), stream), "cudaMemsetAsync"); }
  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    require(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_;
  T* data_ = nullptr;
};

class Stream {
 public:
  Stream() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    for (cudaEvent_t& event : events_) require(cudaEventCreate(&event), "cudaEventCreate");
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

  // Microseconds of what `run` puts into the stream, the median of several after one to warm up; `prepare` comes before
  // each and is not counted. Below zero: it failed, and said so.
  template <class Prepare, class Run> double time(const char* what, const Prepare& prepare, const Run& run) const {
    std::vector<double> times;
    for (unsigned i = 0; i <= kRuns; ++i) {
      prepare();
      require(cudaEventRecord(events_[0], stream_), "cudaEventRecord");
      const std::string error = run();
      if (!error.empty()) return fail(what, error), -1;
      require(cudaEventRecord(events_[1], stream_), "cudaEventRecord");
      require(cudaStreamSynchronize(stream_), what);
      float ms = 0;
      require(cudaEventElapsedTime(&ms, events_[0], events_[1]), "cudaEventElapsedTime");
      if (i > 0) times.push_back(1e3 * ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t events_[2]{};
};

// ---- passing a state on ---------------------------------------------------------------------------------------------

constexpr unsigned kSteps = 1000;

std::vector<Word16> first_state(unsigned count) {
  std::vector<Word16> state(count);
  for (unsigned w = 0; w < count; ++w) state[w] = advance(Word16{}, w, 0);
  return state;
}

bool is_expected(const std::vector<Word16>& last) {
  const unsigned count = static_cast<unsigned>(last.size());
  std::vector<Word16> state = first_state(count), next(count);
  for (unsigned t = 1; t <= kSteps; ++t) {
    for (unsigned w = 0; w < count; ++w) next[w] = advance(state[source_of(w, count, t)], w, t);
    state.swap(next);
  }
  return std::equal(last.begin(), last.end(), state.begin(),
                    [](const Word16& a, const Word16& b) { return std::equal(a.x, a.x + 4, b.x); });
}

// State sizes: one word a block (latency alone), then H = 1024 at B = 1, 4, 16 in 16 bits (2, 8 and 32 KB), then 64 KB.
std::vector<unsigned> state_words(unsigned ctas) { return {ctas, 128, 512, 2048, 4096}; }

void measure_grid(const Device& device, const Stream& stream) {
  for (unsigned ctas : {8u, 16u, 32u, 64u, 96u, 132u}) {
    if (ctas > device.sms()) continue;
    for (const unsigned count : state_words(ctas)) {
      if (count < ctas || 2 * count * sizeof(Word16) > device.shared_bytes()) continue;
      const DeviceArray<Word16> first(first_state(count)), last(count);
      DeviceArray<Word16> published(2 * count);
      DeviceArray<uint32_t> flags(ctas);
      LaunchConfig config;
      config.grid = {ctas, 1, 1};
      config.threads = kThreads;
      config.shared_bytes = 2 * count * sizeof(Word16);
      config.cooperative = true;
      config.stream = stream.get();
      const auto prepare = [&] {
        published.clear(stream.get());
        flags.clear(stream.get());
      };
      const auto report = [&](const char* way, const auto& run) {
        config.name = way;
        const double us = stream.time(way, prepare, run);
        if (us < 0) return;
        std::printf(
            "{\"what\": \"grid_exchange\", \"way\": \"%s\", \"ctas\": %u, \"bytes\": %zu, \"us\": %.4f, "
            "\"correct\": %s}\n",
            way, ctas, count * sizeof(Word16), us / kSteps, boolean(is_expected(last.host())));
        std::fflush(stdout);
      };
      report("polling", [&] {
        return launch(config, exchange_by_polling, last.data(), first.data(), published.data(), count, kSteps);
      });
      report("grid_barrier", [&] {
        return launch(config, exchange_by_grid_barrier, last.data(), first.data(), published.data(), count, kSteps);
      });
      report("flags", [&] {
        return launch(config, exchange_by_flags, last.data(), first.data(), published.data(), flags.data(), count,
                      kSteps);
      });
    }
  }
}

// Clusters of this size that are resident at once; 0 where none is, below zero where the question failed.
template <class... P>
int resident_clusters(void (*kernel)(P...), unsigned cluster, unsigned threads, size_t shared_bytes,
                      const Device& device) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster * device.sms());
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = -1;
  if (cudaOccupancyMaxActiveClusters(&count, function, &config) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return -1;
  }
  return count;
}

void measure_cluster(const Device& device, const Stream& stream) {
  if (!device.hopper()) return fail("cluster", "clusters need compute capability 9.0");
  for (const unsigned ranks : {2u, 4u, 8u, 16u}) {
    for (const unsigned count : state_words(ranks)) {
      const size_t shared_bytes = 2 * sizeof(mbarrier) + 2 * count * sizeof(Word16);
      if (count < ranks || shared_bytes > device.shared_bytes()) continue;
      const int resident = resident_clusters(exchange_by_st_async, ranks, kThreads, shared_bytes, device);
      // One cluster alone, and as many as the card holds: do they get into each other's way?
      for (const unsigned clusters : {1u, resident > 1 ? static_cast<unsigned>(resident) : 0u}) {
        if (clusters == 0) continue;
        const DeviceArray<Word16> first(first_state(count)), last(count);
        LaunchConfig config;
        config.grid = {ranks * clusters, 1, 1};
        config.threads = kThreads;
        config.shared_bytes = shared_bytes;
        config.cluster = ranks;
        config.stream = stream.get();
        const auto report = [&](const char* way, auto kernel) {
          config.name = way;
          const double us =
              stream.time(way, [] {}, [&] { return launch(config, kernel, last.data(), first.data(), count, kSteps); });
          if (us < 0) return;
          // What a block receives from the others, and with that rate: each gets the state but for its own part.
          const double received = double(count) * sizeof(Word16) * (ranks - 1) / ranks;
          std::printf(
              "{\"what\": \"cluster_exchange\", \"way\": \"%s\", \"ctas\": %u, \"clusters\": %u, "
              "\"bytes\": %zu, \"us\": %.4f, \"gbs_a_cta\": %.2f, \"correct\": %s}\n",
              way, ranks, clusters, count * sizeof(Word16), us / kSteps, received / (us / kSteps) * 1e-3,
              boolean(is_expected(last.host())));
          std::fflush(stdout);
        };
        report("st_async", exchange_by_st_async);
        report("cluster_barrier", exchange_by_cluster_barrier);
      }
    }
  }
}

void measure_residency(const Device& device, const Stream&) {
  if (!device.hopper()) return fail("residency", "clusters need compute capability 9.0");
  for (const unsigned cluster : {2u, 4u, 8u, 16u}) {
    for (const size_t kilobytes : {16u, 100u, 200u}) {
      for (const unsigned threads : {256u, 512u}) {
        const int count = resident_clusters(exchange_by_st_async, cluster, threads, kilobytes << 10, device);
        std::printf(
            "{\"what\": \"residency\", \"ctas\": %u, \"shared_kb\": %zu, \"threads\": %u, \"clusters\": %d, "
            "\"sms_used\": %d}\n",
            cluster, kilobytes, threads, count,
            std::min(count * static_cast<int>(cluster), static_cast<int>(device.sms())));
        std::fflush(stdout);
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

template <class Shape> void measure_shape(const Device& device, const Stream& stream) {
  constexpr unsigned kTimes = 2000;
  if (Shape::kSharedBytes > device.shared_bytes()) return;
  const DeviceArray<float> result(Shape::kRows * Shape::kBatch);
  LaunchConfig config;
  config.grid = {device.sms(), 1, 1};
  config.threads = kMmaWarps * 32;
  config.shared_bytes = Shape::kSharedBytes;
  config.stream = stream.get();
  config.name = "mma_rate";
  const double us = stream.time("mma", [] {}, [&] { return launch(config, mma_rate<Shape>, result.data(), kTimes); });
  if (us < 0) return;
  const std::vector<float> values = result.host();
  bool good = true;
  for (unsigned row = 0; row < Shape::kRows; ++row) {
    for (unsigned n = 0; n < Shape::kBatch; ++n) {
      int sum = 0;
      for (unsigned k = 0; k < Shape::kDepth; ++k) sum += weight_at(row, k) * state_at(n, k);
      good = good && values[row * Shape::kBatch + n] == static_cast<float>(sum * static_cast<int>(kTimes));
    }
  }
  const double a_step = us / kTimes, products = double(kMmaWarps) * Shape::kRowTiles * Shape::kChunks * Shape::kTiles;
  // Four sub-cores an SM. At the highest clock that the card names: at a lower one it took fewer clocks than this says.
  const double clocks = a_step * 1e-3 * device.clock_khz / (products / 4);
  std::printf(
      "{\"what\": \"mma\", \"weights\": \"%s\", \"n\": %u, \"weight_kb\": %zu, \"us\": %.4f, \"tflops\": %.1f, "
      "\"clocks_an_mma\": %.2f, \"weight_gbs_an_sm\": %.0f, \"correct\": %s}\n",
      Shape::kShared ? "shared" : "registers", Shape::kBatch, Shape::kWeightBytes >> 10, a_step,
      Shape::kFlops * device.sms() / a_step * 1e-6, clocks, Shape::kWeightBytes / a_step * 1e-3, boolean(good));
  std::fflush(stdout);
}

// Four row tiles a warp: 112 KB of weights an SM in 112 registers a thread, or in shared memory; and 196 KB there.
void measure_mma(const Device& device, const Stream& stream) {
  measure_shape<MmaShape<4, 7, 1, false>>(device, stream);
  measure_shape<MmaShape<4, 7, 2, false>>(device, stream);
  measure_shape<MmaShape<4, 7, 4, false>>(device, stream);
  measure_shape<MmaShape<4, 7, 1, true>>(device, stream);
  measure_shape<MmaShape<4, 7, 2, true>>(device, stream);
  measure_shape<MmaShape<4, 7, 4, true>>(device, stream);
  measure_shape<MmaShape<4, 12, 1, true>>(device, stream);
  measure_shape<MmaShape<4, 12, 2, true>>(device, stream);
  measure_shape<MmaShape<4, 12, 4, true>>(device, stream);
}

// ---- launches -------------------------------------------------------------------------------------------------------

void measure_chain(const Stream& stream, unsigned blocks, bool dependent, bool graphed) {
  constexpr unsigned kLaunches = 500;
  DeviceArray<uint32_t> values(blocks * kThreads);
  const auto launch_all = [&]() -> std::string {
    LaunchConfig config;
    config.grid = {blocks, 1, 1};
    config.threads = kThreads;
    config.stream = stream.get();
    config.name = "chain_link";
    for (unsigned i = 0; i < kLaunches; ++i) {
      config.dependent = dependent && i > 0;
      if (const std::string error = launch(config, chain_link, values.data(), i); !error.empty()) return error;
    }
    return "";
  };
  cudaGraphExec_t executable = nullptr;
  if (graphed) {
    cudaGraph_t graph = nullptr;
    require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const std::string error = launch_all();
    const cudaError_t ended = cudaStreamEndCapture(stream.get(), &graph);
    if (!error.empty()) return fail("launch", error);
    require(ended, "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  const double us = stream.time(
      "launch", [&] { values.clear(stream.get()); },
      [&]() -> std::string {
        if (!graphed) return launch_all();
        const cudaError_t error = cudaGraphLaunch(executable, stream.get());
        return error == cudaSuccess ? "" : cudaGetErrorString(error);
      });
  if (executable) require(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  if (us < 0) return;
  const std::vector<uint32_t> found = values.host();
  bool good = true;
  for (unsigned i = 0; i < found.size(); ++i) {
    uint32_t value = 0;
    for (unsigned step = 0; step < kLaunches; ++step) value = mix(value, i, step);
    good = good && value == found[i];
  }
  std::printf("{\"what\": \"launch\", \"ctas\": %u, \"dependent\": %s, \"graph\": %s, \"us\": %.4f, \"correct\": %s}\n",
              blocks, dependent ? "true" : "false", graphed ? "true" : "false", us / kLaunches, boolean(good));
  std::fflush(stdout);
}

void measure_launch(const Device& device, const Stream& stream) {
  for (const unsigned blocks : {1u, 16u, device.sms()}) {
    for (const bool graphed : {false, true}) {
      for (const bool dependent : {false, true}) measure_chain(stream, blocks, dependent, graphed);
    }
  }
}

void report_device(const Device& device, const Stream&) {
  int driver = 0, runtime = 0;
  require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  require(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  std::printf(
      "{\"what\": \"device\", \"name\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %u, \"clock_mhz\": %d, "
      "\"l2_mb\": %.1f, \"shared_kb_a_block\": %zu, \"driver\": %d, \"runtime\": %d}\n",
      device.properties.name, device.properties.major, device.properties.minor, device.sms(), device.clock_khz / 1000,
      device.properties.l2CacheSize / 1048576.0, device.shared_bytes() >> 10, driver, runtime);
  std::fflush(stdout);
}

struct Part {
  const char* name;
  void (*run)(const Device&, const Stream&);
};
constexpr Part kParts[] = {{"device", report_device},        {"launch", measure_launch}, {"grid", measure_grid},
                           {"residency", measure_residency}, {"mma", measure_mma},       {"cluster", measure_cluster}};

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> chosen(argv + 1, argv + argc);
  for (const std::string& name : chosen) {
    if (std::none_of(std::begin(kParts), std::end(kParts), [&](const Part& part) { return name == part.name; })) {
      std::fprintf(stderr, "no part is called %s; there are:", name.c_str());
      for (const Part& part : kParts) std::fprintf(stderr, " %s", part.name);
      std::fprintf(stderr, "\n");
      return 2;
    }
  }
  Device device;
  require(cudaGetDeviceProperties(&device.properties, 0), "cudaGetDeviceProperties");
  require(cudaDeviceGetAttribute(&device.clock_khz, cudaDevAttrClockRate, 0), "cudaDeviceGetAttribute");
  const Stream stream;
  for (const Part& part : kParts) {
    if (chosen.empty() || std::find(chosen.begin(), chosen.end(), part.name) != chosen.end()) part.run(device, stream);
  }
  return failures ? 2 : wrong ? 1 : 0;
}
