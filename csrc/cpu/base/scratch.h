// A large tensor that an operator needs for one call, kept for its next call (block.h).
#pragma once

#include <atomic>

#include "common/reuse.h"
#include "common/tensor.h"

namespace seqaccel::inline base {

class Scratch {
 public:
  // Has room for `count` values of like's dtype. At most kKept bytes of it outlive the call.
  Scratch(const Tensor& like, int64_t count) : tensor_(kept().exchange(nullptr)) {
    if (tensor_ && tensor_->scalar_type() == like.scalar_type() && tensor_->numel() >= count) return;
    delete tensor_;
    tensor_ = new Tensor(new_tensor(like, {count}));
  }
  ~Scratch() {
    const int64_t bytes = tensor_->numel() * (tensor_->scalar_type() == ScalarType::Double ? 8 : 4);
    if (kReuse && bytes <= kKept) tensor_ = kept().exchange(tensor_);
    delete tensor_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Rows `row` values apart.
  Tensor matrix(int64_t rows, int64_t columns, int64_t row) { return view_of(*tensor_, {rows, columns}, {row, 1}); }

 private:
  static constexpr int64_t kKept = int64_t(64) << 20;
  static std::atomic<Tensor*>& kept() {
    static std::atomic<Tensor*> tensor{nullptr};
    return tensor;
  }
  Tensor* tensor_;
};

}  // namespace seqaccel::inline base
