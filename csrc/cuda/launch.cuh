// What every CUDA operator needs of torch's stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

namespace seqaccel::cuda {

constexpr int kThreads = 256;  // per block

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor fresh(const Tensor& like, const Extents& sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

inline Tensor fresh_like(const Tensor& t) { return torch::stable::empty_like(t); }

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "seqaccel: too many blocks for one launch: ", blocks);
  return unsigned(blocks);
}

}  // namespace seqaccel::cuda
