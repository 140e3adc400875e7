// How the persistent kernels are launched. setup.py writes the units that include this, each with one
// PersistentInstance.
#pragma once

#include <algorithm>
#include <string>

#include "../device.h"
#include "../primitives/launch.h"
#include "../primitives/occupancy.h"
#include "backward.cuh"
#include "forward.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type> struct PersistentForwardKernel {
  static constexpr const char* kName = "persistent_forward";
  static constexpr bool kBackward = false;
  template <Exchange kExchange, int kBatchTiles> static auto function() {
    return persistent_forward<kFamily, Type, kExchange, kBatchTiles>;
  }
};
template <Family kFamily, class Type> struct PersistentBackwardKernel {
  static constexpr const char* kName = "persistent_backward";
  static constexpr bool kBackward = true;
  template <Exchange kExchange, int kBatchTiles> static auto function() {
    return persistent_backward<kFamily, Type, kExchange, kBatchTiles>;
  }
};

// Calls use(integral_constant<Exchange>, integral_constant<int, batch tiles>) with what a layout asks for.
template <class Use> auto with_instance(const PersistentLayout& layout, const Use& use) {
  const auto with_tiles = [&](auto exchange) {
    if (layout.batch_tiles == 1) return use(exchange, std::integral_constant<int, 1>());
    if constexpr (most_batch_tiles(decltype(exchange)::value) > 2) {
      if (layout.batch_tiles == 4) return use(exchange, std::integral_constant<int, 4>());
    }
    return use(exchange, std::integral_constant<int, 2>());
  };
  switch (layout.exchange) {
    case Exchange::block: return with_tiles(std::integral_constant<Exchange, Exchange::block>());
    case Exchange::cluster: return with_tiles(std::integral_constant<Exchange, Exchange::cluster>());
    default: return with_tiles(std::integral_constant<Exchange, Exchange::grid>());
  }
}

// Calls visit(kernel, integral_constant<Exchange>, integral_constant<int, batch tiles>) for every kernel of a unit.
// What goes over all kernels does so here (benchmarks/occupancy/).
template <Family kFamily, class Type, class Visit> void for_each_persistent_kernel(const Visit& visit) {
  const auto with_instances = [&](auto kernel) {
    PersistentLayout layout;
    for (const Exchange exchange : {Exchange::block, Exchange::cluster, Exchange::grid}) {
      layout.exchange = exchange;
      for (layout.batch_tiles = 1; layout.batch_tiles <= most_batch_tiles(exchange); layout.batch_tiles *= 2)
        with_instance(layout, [&](auto of_exchange, auto batch_tiles) { visit(kernel, of_exchange, batch_tiles); });
    }
  };
  with_instances(PersistentForwardKernel<kFamily, Type>());
  with_instances(PersistentBackwardKernel<kFamily, Type>());
}

// The grid of a call, of `tiles` tiles of the batch; the name is the caller's.
inline LaunchConfig persistent_config(const PersistentLayout& layout, const PersistentShape& shape, int64_t tiles,
                                      int64_t directions) {
  LaunchConfig config;
  config.grid = {static_cast<unsigned>(layout.group), static_cast<unsigned>(tiles), static_cast<unsigned>(directions)};
  config.threads = static_cast<unsigned>(layout.warps) * kWarpSize;
  config.shared_bytes = static_cast<size_t>(shape.map.bytes);
  config.cluster = layout.exchange == Exchange::cluster ? static_cast<unsigned>(layout.group) : 1;
  config.cooperative = layout.exchange == Exchange::grid;
  return config;
}
template <class Kernel, Family kFamily, class Type> PersistentShape shape_of(const PersistentLayout& layout) {
  return persistent_shape(layout, FamilyCell<kFamily>::Constants::kGates, Type::kArithmetic, Kernel::kBackward);
}

template <class Kernel, Family kFamily, class Type, class Params>
std::string launch_persistent(Params p, void* stream) {
  p.shape = shape_of<Kernel, kFamily, Type>(p.layout);
  const std::string name =
      std::string(Kernel::kName) + "<" + traits(p.mode).name + ", " + Type::kName + ", " + name_of(p.layout) + ">";
  const int64_t all = batch_groups(p.layout, p.rows.layout.batch),
                most = groups_a_launch(p.layout, p.rows.layout.batch);
  if (all == 0 || p.hidden_size == 0) return "";
  constexpr int kBytes = static_cast<int>(sizeof(typename Type::Storage));
  const int64_t words = exchange_bytes(p.layout, most * p.directions, kBytes, Kernel::kBackward);
  std::string error;
  for (; p.first_tile < all && error.empty(); p.first_tile += most) {
    const int64_t tiles = std::min(most, all - p.first_tile);
    LaunchConfig config = persistent_config(p.layout, p.shape, tiles, p.directions);
    config.stream = stream;
    config.name = name.c_str();
    // What the launch before has left in the words is no longer zeros.
    if (words > 0 && p.first_tile > 0) error = zero_on_device(p.words, words, stream);
    if (!error.empty()) return error;
    error = with_instance(p.layout, [&](auto exchange, auto batch_tiles) {
      return launch(config, Kernel::template function<decltype(exchange)::value, decltype(batch_tiles)::value>(), p);
    });
  }
  return error;
}

// "" where the current device can hold the blocks that wait for each other: those of a group, of a grid those of a
// launch. Else why not.
template <class Kernel, Family kFamily, class Type>
std::string why_not_resident(const PersistentLayout& layout, int64_t batch, int64_t directions) {
  const int64_t tiles = groups_a_launch(layout, batch);
  LaunchConfig config = persistent_config(layout, shape_of<Kernel, kFamily, Type>(layout), tiles, directions);
  config.name = Kernel::kName;
  const int64_t wanted = layout.exchange == Exchange::grid ? layout.group * tiles * directions : layout.group;
  std::string error;
  const int64_t held = with_instance(layout, [&](auto exchange, auto batch_tiles) {
    return blocks_at_once(config, Kernel::template function<decltype(exchange)::value, decltype(batch_tiles)::value>(),
                          error);
  });
  if (held >= wanted || !error.empty()) return error;
  return std::string(name_of(layout)) + ": needs " + std::to_string(wanted) +
         " blocks at the same time, and the device holds " + std::to_string(held) + " of " + Kernel::kName;
}

template <Family kFamily, class Type> PersistentKernels PersistentInstance<kFamily, Type>::kernels() {
  using Forward = PersistentForwardKernel<kFamily, Type>;
  using Backward = PersistentBackwardKernel<kFamily, Type>;
  return {
      [](const PersistentForward& p, void* stream) { return launch_persistent<Forward, kFamily, Type>(p, stream); },
      [](const PersistentBackward& p, void* stream) { return launch_persistent<Backward, kFamily, Type>(p, stream); },
      why_not_resident<Forward, kFamily, Type>, why_not_resident<Backward, kFamily, Type>};
}

}  // namespace rnnfast::gpu
