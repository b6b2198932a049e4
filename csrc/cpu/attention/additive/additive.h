// Weights of additive attention: what the operator hands to the kernels of an instruction set.
//
// Letters: B batch, Tq queries, Tk keys, H hidden size. All tensors are contiguous.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"
#include "cpu/base/integers.h"

namespace seqaccel::attention::additive {

template <typename T>
struct Additive {
  int64_t B, Tq, Tk, H;
  const T* query;     // [B, Tq, H]
  const T* key;       // [B, Tk, H]
  const T* weight;    // [H]
  const bool* mask;   // [B, mask_rows, Tk], true where a query attends to a key; null: everywhere
  int64_t mask_rows;  // 1 or Tq
  T* attention;       // [B, Tq, Tk]
};

template <typename T>
struct AdditiveBackward {
  int64_t B, Tq, Tk, H;
  const T* grad_attention;  // [B, Tq, Tk]
  const T* query;
  const T* key;
  const T* weight;
  const T* attention;
  T* grad_logits;   // [B, Tq, Tk], workspace
  T* grad_query;    // [B, Tq, H]
  T* grad_key;      // [B, Tk, H]
  T* grad_weights;  // [B, H]: the gradient of weight from each batch entry
};

struct AdditiveKernels {
  void (*forward_float)(const Additive<float>&);
  void (*forward_double)(const Additive<double>&);
  void (*backward_float)(const AdditiveBackward<float>&);
  void (*backward_double)(const AdditiveBackward<double>&);
};

}  // namespace seqaccel::attention::additive

SEQACCEL_DECLARE_KERNELS(attention::additive, AdditiveKernels, additive_kernels)
