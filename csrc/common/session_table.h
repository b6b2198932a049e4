// The C functions that _C exports for sessions: what crosses from the pybind11 module, built for each Python, to the
// kernels, built once. Plain C types only.
#pragma once

#include <stdint.h>

extern "C" {

struct SeqaccelLstmLayer {
  const float* weight_ih;  // [4 * hidden_size, input_size]
  const float* weight_hh;  // [4 * hidden_size, hidden_size]
  const float* bias_ih;    // [4 * hidden_size] or null
  const float* bias_hh;    // [4 * hidden_size] or null
  int64_t input_size;
};

struct SeqaccelSessionTable {
  int64_t version;
  // Packs the weights (they may be freed afterwards) and starts `batch` streams at zero; null when memory is short.
  void* (*create)(int64_t batch, int64_t hidden_size, int64_t num_layers, const struct SeqaccelLstmLayer* layers);
  void (*destroy)(void* session);
  // x [steps, batch, input_size] -> y [steps, batch, hidden_size], the state moving on.
  void (*extend)(void* session, const float* x, int64_t steps, float* y);
  // The state [2, num_layers, batch, hidden_size], h before c: read and written in place between calls.
  float* (*state)(void* session);
};

// The version counts changes of this struct: _session refuses a table of another one.
#define SEQACCEL_SESSION_TABLE_VERSION 1

__attribute__((visibility("default"))) const struct SeqaccelSessionTable* seqaccel_session_table(void);
}
