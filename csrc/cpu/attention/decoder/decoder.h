// The recurrence of an attention decoder: what the operators (decoder.cpp) hand to the loops (kernels.h).
//
// Letters: B batch, T steps, S keys of a source, H hidden units, A features of query and key, M of a value. All tensors
// are contiguous.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"

namespace seqaccel::attention::decoder {

// What both directions read.
template <typename T>
struct Decoder {
  int64_t B, steps, S, H, A, M;
  const T* key;             // [B, S, A]
  const T* value;           // [B, S, M]
  const bool* mask;         // [B, S], true where a step attends to a key; null: everywhere
  const int64_t* lengths;   // [B]: steps of a sequence; null: all of them
  const T* c_0;             // [B, H]
  const T* query_weight;    // [A, H]; null: the query is h
  const T* score_weight;    // [A]; null: dot products
  const T* context_weight;  // [4H, M]
  const T* weight_hh;       // [4H, H]

  int64_t length(int64_t b) const { return lengths == nullptr || lengths[b] > steps ? steps : lengths[b]; }
};

template <typename T>
struct Forward : Decoder<T> {  // what has a row per step is 0 past a sequence's length
  const T* pre;                // [B, T, 4H]
  const T* h_0;                // [B, H]
  const T* query_bias;         // [A], or null
  T* output;                   // [B, T, H]
  T* h_n;                      // [B, H]
  T* c_n;
  T* context;    // [B, T, M]
  T* attention;  // [B, T, S]
  T* gates;      // [B, T, 4H]
  T* cells;      // [B, T, H]
};

template <typename T>
struct Backward : Decoder<T> {
  const T* query;           // [B, T, A]
  const T* grad_output;     // [B, T, H], or null: zero
  const T* grad_h_n;        // [B, H], or null: zero
  const T* grad_c_n;        // [B, H], or null: zero
  const T* grad_context;    // [B, T, M], or null: zero
  const T* grad_attention;  // [B, T, S], or null: zero
  const T* attention;       // [B, T, S]
  const T* gates;           // [B, T, 4H]
  const T* cells;           // [B, T, H]
  T* grad_pre;              // [B, T, 4H]
  T* all_grad_attention;    // [B, T, S]: with what flows back through the context
  T* grad_query;            // [B, T, A]
  T* all_grad_context;      // [B, T, M]: with what flows back through the step's gates
  T* grad_h_0;              // [B, H]
  T* grad_c_0;
};

// The loops return false if there is no memory for their workspace.
struct DecoderKernels {
  bool (*forward_float)(const Forward<float>&);
  bool (*forward_double)(const Forward<double>&);
  bool (*backward_float)(const Backward<float>&);
  bool (*backward_double)(const Backward<double>&);
};

}  // namespace seqaccel::attention::decoder

SEQACCEL_DECLARE_KERNELS(attention::decoder, DecoderKernels, decoder_kernels)
