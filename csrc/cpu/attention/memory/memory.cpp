// The operator of the novelty gate.
#include "cpu/attention/memory/memory.h"

#include "common/tensor.h"
#include "cpu/base/threads.h"

namespace seqaccel::attention::memory {
namespace {

Tensor novelty_gate(Tensor vectors, Tensor kept, Tensor size, double threshold, int64_t window, int64_t capacity) {
  check_tensor(vectors, "vectors", {-1, -1, -1}, vectors.scalar_type());
  check_float_or_double(vectors, "vectors");
  const int64_t batch = vectors.size(0), length = vectors.size(1), width = vectors.size(2);
  check_tensor(kept, "kept", {batch, -1, width}, vectors.scalar_type());
  check_tensor(size, "size", {batch}, ScalarType::Long);
  STD_TORCH_CHECK(window >= 1 && capacity >= 1, "seqaccel: expected window and capacity to be at least 1, but got ",
                  window, " and ", capacity);
  Tensor slot = new_tensor(size, {batch, length});
  if (batch == 0 || length == 0) return slot;
  vectors = to_contiguous(vectors);
  kept = to_contiguous(kept);
  size = to_contiguous(size);
  const GateKernels& kernels = active_gate_kernels();
  const int64_t rows = kept.size(1);
  const int threads = team_size();
  const int64_t streams = batch < threads ? 1 : threads;  // that are in work at a time
  const auto run = [&](auto zero, auto workspace_size, auto kernel) {
    using T = decltype(zero);
    int64_t room = 1;
    STD_TORCH_CHECK(fits(room, rows + length + 128) && fits(room, width + 128) && fits(room, streams),
                    "seqaccel: not enough memory: the shape ", shape_string(vectors), " of vectors is too large");
    Tensor workspace = new_tensor(vectors, {streams, workspace_size(length, rows, width)});
    kernel({batch, length, width, rows, window, capacity, T(threshold), vectors.const_data_ptr<T>(),
            kept.const_data_ptr<T>(), size.const_data_ptr<int64_t>(), slot.mutable_data_ptr<int64_t>(),
            workspace.mutable_data_ptr<T>(), threads});
  };
  if (vectors.scalar_type() == ScalarType::Float) {
    run(0.0f, kernels.workspace_float, kernels.gate_float);
  } else {
    run(0.0, kernels.workspace_double, kernels.gate_double);
  }
  return slot;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def("novelty_gate(Tensor vectors, Tensor kept, Tensor size, float threshold, int window, int capacity) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) { m.impl("novelty_gate", TORCH_BOX(&novelty_gate)); }

}  // namespace seqaccel::attention::memory
