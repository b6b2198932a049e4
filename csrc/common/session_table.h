// The C functions that _C exports for sessions: what crosses from the pybind11 module, built for each Python, to the
// kernels, built once. Plain C types only.
#pragma once

#include <stdint.h>

extern "C" {

// A layer of a session. Kinds and their weights, in order (float32, contiguous, null: not there):
//   linear                   weight [outputs, inputs], bias [outputs]
//   conv                     weight [outputs, taps, inputs], bias [outputs]; the last tap meets the present
//   depthwise                weight [taps, outputs], bias [outputs]
//   glu, gated               linear or conv of 2 * outputs rows, whose second half gates the first, or its tanh: they
//                            are activations of these
//   embedding                weight [inputs, outputs]
//   layer_norm, rms_norm     weight [outputs], bias [outputs]; parameter: epsilon
//   batch_norm               gain [outputs], bias [outputs]: by its running statistics
//   softmax                  none
//   relu, tanh, sigmoid, silu, gelu, gelu_tanh, leaky_relu, elu, hardswish     none; parameter: slope or alpha
//   the recurrent cells      as the operator rnn_forward has them
//   the column cells         weight [matrices * hidden, inputs], that of the input of the step before, bias [.,
//   hidden],
//                            weight of the state [., hidden]; parameter: the operator column_forward's scale
//
// A layer reads the output of the layer `source` before it, 1 being the last one, and past the first one the session's
// input; 0 is 1. `skip` counts as `source`, 0 being none: what a linear, conv or depthwise layer adds to its
// activation, and what a column cell's highway adds.
struct SeqaccelSessionLayer {
  const char* kind;
  int64_t inputs, hidden, outputs;
  int64_t matrices;  // column cells: inputs of a unit
  int64_t source, skip;
  int64_t taps, dilation;  // conv, depthwise
  const char* activation;  // linear, conv, depthwise: as the kinds, or "none"
  int64_t relu;            // linear, conv, depthwise: after the addition
  const float* weights[10];
  double zoneout_h, zoneout_c;  // expected share of the old state
  double parameter;
};

// A part of the state of a layer, to `out`, or from `from` if it is null: h [batch, outputs], c [batch, hidden]; of a
// column cell x [batch, inputs], the input of the step before; of conv r [batch, (taps - 1) * dilation, inputs], the
// inputs before, oldest first.
struct SeqaccelSessionPart {
  int64_t layer;
  char part;
  float* out;
  const float* from;
};

// What a function returns.
enum SeqaccelSessionStatus { SEQACCEL_SESSION_OK, SEQACCEL_SESSION_OUT_OF_RANGE, SEQACCEL_SESSION_FAILED };

// A session may be used by several threads: each call runs alone.
struct SeqaccelSessionTable {
  int64_t version;
  // Packs the weights (they may be freed afterwards) and starts `batch` streams at zero. precision: float32, bfloat16
  // or int8. Null: see error.
  void* (*create)(int64_t batch, const char* precision, int64_t count, const struct SeqaccelSessionLayer* layers);
  // Another session of the same weights, which both hold, with streams of its own. Null: see error.
  void* (*fork)(void* session, int64_t batch);
  // The packed weights, which another session of the same layers, precision and instruction set can take over before it
  // has forks: how many bytes; to `out`, or from `from`, if there is one.
  int64_t (*weights)(void* session, char* out, const char* from);
  // The instruction set that the weights are packed for, and run on.
  const char* (*isa)(void* session);
  void (*destroy)(void* session);
  // x [steps, batch, inputs] float32, or [steps, batch] int64 for an embedding, to y [steps, batch, outputs], the state
  // moving on; with advance [batch], that of the streams where it is true only, and y is zero for the others. Of one
  // that is not OK see error; nothing has moved then.
  int (*extend)(void* session, const void* x, int64_t steps, float* y, const bool* advance);
  int (*state)(void* session, int64_t count, const struct SeqaccelSessionPart* parts);
  // Stream b becomes what stream indices[b] was; -1 starts it anew.
  int (*select)(void* session, const int64_t* indices);
  // What went wrong last in this thread.
  const char* (*error)(void);
};

// The version counts changes of these structs: _session refuses a table of another one.
#define SEQACCEL_SESSION_TABLE_VERSION 5

__attribute__((visibility("default"))) const struct SeqaccelSessionTable* seqaccel_session_table(void);
}
