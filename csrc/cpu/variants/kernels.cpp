// The kernels of layers with options, of one ISA and type: compiled for each pair, as kernels.cpp.
#include "kernels.h"

#include "backward.h"
#include "forward.h"

namespace rnnfast::cpu {
namespace {

using Storage = StorageOf<DType::RNNFAST_DTYPE>::type;
using Compute = ComputeOf<Storage>::type;

bool is_empty(const VariantParams& p) { return p.rows.batch == 0 || p.hidden_size == 0; }

int64_t forward(const VariantForward& params, Team& team) {
  if (is_empty(params)) return 0;
  return VariantForwardLoop<Storage>(params, team.planned()).run(team);
}

int64_t backward(const VariantBackward& params, Team& team) {
  if (!is_empty(params)) return VariantBackwardLoop<Storage>(params, team.planned()).run(team);
  for (int i = 0; i < kVariantVectors; ++i)
    for_vectors<Compute>(vector_size(params, i), [&](int64_t u, int64_t left) {
      store<Compute>(at<Storage>(params.grad_vectors[i], u), Vector<Compute>{}, left);
    });
  return 0;
}

}  // namespace

#define RNNFAST_TABLE_(isa, dtype) variant_kernels_##isa##_##dtype
#define RNNFAST_TABLE(isa, dtype) RNNFAST_TABLE_(isa, dtype)
extern const VariantKernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE);
const VariantKernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE) = {&forward, &backward};

}  // namespace rnnfast::cpu
