// Where the ops get memory: one that cannot be had is an error that says what was asked for, by which op, and where.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "checks.h"

namespace rnnfast {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A function of torch's C interface that not every torch has, null where this one lacks it. tests/torch_versions.py
// looks for the names that are asked for.
inline void* torch_function(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

// What torch said of its last error, "" where it does not keep that for us (before 2.13).
inline std::string torch_error() {
  using Function = const char* (*)();
  static const auto function = reinterpret_cast<Function>(torch_function("torch_exception_get_what_without_backtrace"));
  return function ? function() : "";
}

inline std::string said_or_logged(const std::string& said) {
  return said.empty() ? "the error is in the log above" : said;
}

// What the device of a tensor says of its memory. Each library defines this for its own devices.
struct DeviceMemory {
  int64_t free = -1;  // bytes; negative: unknown
  int64_t total = -1;
  std::string error;  // of the device: nothing can be had there any more
};
DeviceMemory device_memory(const Tensor& on);

struct Wanted {
  const char* op;
  const char* name;  // the tensor's, as the schemas and docs/design.md have it
  Sizes sizes;
  ScalarType type;
  const Tensor& like;  // on its device
  const char* role = "";
  bool computed = false;  // making it runs a kernel of torch's, which may fail for reasons of its own
};

struct TypeTraits {
  const char* name;
  int64_t size;
};
inline TypeTraits traits_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return {"float32", 4};
    case ScalarType::Double: return {"float64", 8};
    case ScalarType::BFloat16: return {"bfloat16", 2};
    case ScalarType::Half: return {"float16", 2};
    case ScalarType::Long: return {"int64", 8};
    case ScalarType::Bool: return {"bool", 1};
    case ScalarType::Byte: return {"uint8", 1};
    default: fail("rnnfast: a tensor of a type that no op has");
  }
}

inline std::string text_of(const Wanted& wanted) {
  const int64_t dims = static_cast<int64_t>(wanted.sizes.size());
  return std::string(wanted.role) + wanted.name + " of shape " + shape_text(wanted.sizes.data(), dims) + ", " +
         traits_of(wanted.type).name;
}

[[noreturn]] inline void fail_uncountable(const char* op, const std::string& what) {
  fail(op, ": could not allocate ", what, ": so many bytes that 64 bits do not count them");
}

inline int64_t bytes_of(const Wanted& wanted) {
  int64_t bytes = traits_of(wanted.type).size;
  bool overflow = false;
  for (const int64_t size : wanted.sizes) {
    if (size == 0) return 0;
    overflow |= __builtin_mul_overflow(bytes, size, &bytes);
  }
  if (overflow) fail_uncountable(wanted.op, text_of(wanted));
  return bytes;
}

inline std::string size_text(int64_t bytes) {
  const bool large = bytes >= int64_t{1} << 30;
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %s", static_cast<double>(bytes) / (large ? 1 << 30 : 1 << 20),
                large ? "GiB" : "MiB");
  return text;
}

inline bool names_memory(const std::string& error) {
  for (const char* words : {"out of memory", "not enough memory", "allocate memory"})
    if (error.find(words) != std::string::npos) return true;
  return false;
}

// Ends a call of which something inside could not be had. rnnfast/ops.py knows the words "out of memory" and makes
// torch.OutOfMemoryError of them, so they must not stand for anything else, such as a kernel that failed earlier.
// `bytes` is negative where only torch knows them; `said` is torch's text on the matter; `computed` as in Wanted.
[[noreturn]] inline void fail_for_memory(const char* op, const std::string& what, int64_t bytes, const Tensor& on,
                                         const std::string& said, bool computed) {
  // With less than this to spare torch's kernels may find no room for themselves.
  constexpr int64_t kSpare = int64_t{256} << 20;
  const DeviceMemory memory = device_memory(on);
  const bool scarce = memory.free < 0 ? bytes >= 0 : memory.free - kSpare < bytes;
  // Where torch said nothing: its allocator alone fails for want of memory only, be it the limit of this process.
  const bool out = memory.error.empty() && (said.empty() ? scarce || !computed : names_memory(said));
  std::string size, room, device = "cpu";
  if (bytes >= 0) size = std::to_string(bytes) + " bytes (" + size_text(bytes) + ")";
  if (!on.is_cpu()) device = "cuda:" + std::to_string(on.get_device_index());
  if (memory.free >= 0) room = " (" + size_text(memory.free) + " free of " + size_text(memory.total) + ")";
  if (out) {
    const std::string needs = size.empty() ? what : what + " needs " + size;
    fail(op, ": out of memory: ", needs, " on ", device, room, said.empty() ? "" : "; torch says: ", said);
  }
  const std::string why = memory.error.empty() ? said_or_logged(said) : memory.error;
  if (size.empty()) fail(op, ": ", what, " failed on ", device, room, ": ", why);
  fail(op, ": could not allocate ", what, " ", size, " on ", device, room, ": ", why);
}

// What `make` makes, a tensor as described.
template <class Make> Tensor allocate(const Wanted& wanted, const Make& make) {
  const int64_t bytes = bytes_of(wanted);
  try {
    return make();
  } catch (const std::exception&) {
    fail_for_memory(wanted.op, text_of(wanted) + ",", bytes, wanted.like, torch_error(), wanted.computed);
  }
}

// Uninitialized. Not by torch::stable::empty: the dispatcher would look the op up by its name and take the arguments
// boxed, which costs as much as a step of a small layer.
inline Tensor empty(const Wanted& wanted) {
  constexpr size_t kMostDims = 3;  // no op returns more
  RNNFAST_CHECK(wanted.sizes.size() <= kMostDims, wanted.op, ": ", wanted.name, ": too many dimensions");
  return allocate(wanted, [&] {
    // As torch lays out a contiguous tensor; unsigned, because beside a size of 0 the product of the others may
    // overflow.
    std::array<int64_t, kMostDims> strides;
    uint64_t stride = 1;
    for (size_t i = wanted.sizes.size(); i-- > 0;
         stride *= static_cast<uint64_t>(std::max<int64_t>(wanted.sizes[i], 1)))
      strides[i] = static_cast<int64_t>(stride);
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(wanted.type));
    const int32_t device_type = wanted.like.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
    AtenTensorHandle made = nullptr;
    const auto status =
        aoti_torch_empty_strided(static_cast<int64_t>(wanted.sizes.size()), wanted.sizes.data(), strides.data(), dtype,
                                 device_type, wanted.like.get_device_index(), &made);
    RNNFAST_CHECK(status == TORCH_SUCCESS, "aoti_torch_empty_strided failed");  // in allocate's words
    return Tensor(made);
  });
}

inline Tensor contiguous_copy(const char* op, const char* name, const Tensor& tensor) {
  return allocate({op, name, tensor.sizes(), tensor.scalar_type(), tensor, "a contiguous copy of ", true},
                  [&] { return torch::stable::contiguous(tensor); });
}

}  // namespace rnnfast
