// Memory that a test shares with its kernels: a std::vector whose device() is what kernels are given. In the emulator
// that is the vector's own memory, whose bounds ASan knows. On a card it is a copy, made as device() is called and
// brought back by fetch_arrays(), which run() and finish() call (run_kernel.h): so before each launch device() must be
// called anew, and an array may not be moved in between. Copies rather than managed memory: no page moves while blocks
// wait for each other, and compute-sanitizer knows each copy's bounds.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(RNNFAST_EMULATED)
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#endif

namespace rnnfast::test {

#if defined(RNNFAST_EMULATED)

inline void fetch_arrays() {}
inline void forget_arrays() {}

#else

inline void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class DeviceCopy {
 public:
  DeviceCopy() = default;
  // Of an array's copy a card knows nothing before its device() is called.
  DeviceCopy(const DeviceCopy&) {}
  DeviceCopy& operator=(const DeviceCopy&) { return *this; }
  ~DeviceCopy() {
    std::erase(out(), this);
    cudaFree(device_);
  }

  void* upload(const void* host, size_t bytes) {
    if (bytes == 0) return nullptr;
    if (bytes != bytes_) {
      cudaFree(device_);
      device_ = nullptr;
      bytes_ = 0;
      require(cudaMalloc(&device_, bytes), "cudaMalloc");
      bytes_ = bytes;
    }
    require(cudaMemcpy(device_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
    return device_;
  }
  // To be brought back as well.
  void* upload_to_change(void* host, size_t bytes) {
    void* device = upload(host, bytes);
    host_ = host;
    if (device && std::find(out().begin(), out().end(), this) == out().end()) out().push_back(this);
    return device;
  }
  void fetch() const { require(cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy to the host"); }

  // Those that kernels may have changed.
  static std::vector<DeviceCopy*>& out() {
    static std::vector<DeviceCopy*> copies;
    return copies;
  }

 private:
  void* device_ = nullptr;
  size_t bytes_ = 0;
  void* host_ = nullptr;
};

inline void forget_arrays() { DeviceCopy::out().clear(); }
inline void fetch_arrays() {
  const std::vector<DeviceCopy*> copies = DeviceCopy::out();
  forget_arrays();
  for (const DeviceCopy* copy : copies) copy->fetch();
}

#endif

template <class T> class Array : public std::vector<T> {
  using Base = std::vector<T>;

 public:
  using Base::Base;
  Array() = default;
  Array(const Base& values) : Base(values) {}

#if defined(RNNFAST_EMULATED)
  T* device() { return Base::data(); }
  const T* device() const { return Base::data(); }
#else
  T* device() { return static_cast<T*>(copy_.upload_to_change(Base::data(), bytes())); }
  const T* device() const { return static_cast<const T*>(copy_.upload(Base::data(), bytes())); }

 private:
  size_t bytes() const { return Base::size() * sizeof(T); }
  mutable DeviceCopy copy_;
#endif
};

}  // namespace rnnfast::test
