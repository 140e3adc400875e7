// Ops with one fault each. A sanitizer that lets them pass would not see such a fault in an op of rnnfast either:
// tests/fuzz/run.py has each found before it trusts what follows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

namespace {

using torch::stable::Tensor;

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// In memory that torch allocated, as every argument and result is.
double read_past_the_end(Tensor tensor) { return floats(tensor)[tensor.numel()]; }
double write_past_the_end(Tensor tensor) { return floats(tensor)[tensor.numel()] = 1; }

double overflow_an_integer(Tensor tensor) {
  volatile int64_t size = std::numeric_limits<int64_t>::max() / 2;
  return static_cast<double>(size * (tensor.numel() + 2));
}

void count_up(volatile float* data) {
  for (int i = 0; i < 3000000; ++i) *data = *data + 1;
}

// Two calls at once race: an op works without the interpreter's lock.
double write_one(Tensor tensor) {
  count_up(floats(tensor));
  return 0;
}

// The two parts of a region race.
double write_on_all_threads(Tensor tensor) {
  float* data = floats(tensor);
  torch::stable::parallel_for(0, 2, 1, [=](int64_t, int64_t) { count_up(data); });
  return 0;
}

// No fault: a pool's threads read what was written before the region, and the caller what they wrote.
double write_in_order(Tensor tensor) {
  float* data = floats(tensor);
  for (int i = 0; i < 100; ++i) {
    data[0] += 1;
    data[1] += 1;
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) data[j] *= 2;
    });
  }
  return data[0];
}

}  // namespace

STABLE_TORCH_LIBRARY(rnnfast_planted, library) {
  library.def("read_past_the_end(Tensor tensor) -> float");
  library.def("write_past_the_end(Tensor tensor) -> float");
  library.def("overflow_an_integer(Tensor tensor) -> float");
  library.def("write_one(Tensor tensor) -> float");
  library.def("write_on_all_threads(Tensor tensor) -> float");
  library.def("write_in_order(Tensor tensor) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast_planted, CPU, library) {
  library.impl("read_past_the_end", TORCH_BOX(&read_past_the_end));
  library.impl("write_past_the_end", TORCH_BOX(&write_past_the_end));
  library.impl("overflow_an_integer", TORCH_BOX(&overflow_an_integer));
  library.impl("write_one", TORCH_BOX(&write_one));
  library.impl("write_on_all_threads", TORCH_BOX(&write_on_all_threads));
  library.impl("write_in_order", TORCH_BOX(&write_in_order));
}
