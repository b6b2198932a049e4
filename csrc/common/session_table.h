// The C functions that _C exports for sessions: what crosses from the pybind11 module, built for each Python, to the
// kernels, built once. Plain C types only.
#pragma once

#include <stdint.h>

extern "C" {

// A layer of a session. These are the kinds and their weights, in order (float32, contiguous; null: absent):
//   linear                   weight [outputs, inputs], bias [outputs]
//   conv                     weight [outputs, taps, inputs], bias [outputs]; the last tap multiplies the newest input
//   depthwise                weight [taps, outputs], bias [outputs]
//   glu, gated               activations of a linear or conv layer with 2 * outputs rows: the second half gates the
//                            first, or its tanh
//   embedding                weight [inputs, outputs]
//   layer_norm, rms_norm     weight [outputs], bias [outputs]; parameter: epsilon
//   batch_norm               gain [outputs], bias [outputs], with the running statistics applied
//   softmax                  none
//   sum                      none. The sum of the inputs times the parameter; outputs is 1
//   relu, tanh, sigmoid, silu, gelu, gelu_tanh, leaky_relu, elu, hardswish     none; parameter: slope or alpha
//   exp, log, sqrt, abs, softplus, reciprocal                                  none
//   at_least, at_most        none; parameter: the limit
//   add, subtract, multiply, divide, maximum, minimum     none. Of the source and the skip, in this order
//   gather                   none. Puts pieces of other layers' outputs together: see `moves`
//   past                     none. What the last `keep` has kept, at first zeros. It reads no input
//   keep                     none. The skip is a `past`: what the source holds is what it gives at the next step. A
//                            keep has no output and is not the last layer
//   the recurrent cells      as the operator rnn_forward has them
//   attention                none. The queries [outputs] attend, head by head, to the keys and values of `taps` steps,
//                            the last of which is their own. Inputs: the keys [inputs / 2] and then the values, of
//                            as many heads or fewer. parameter: the queries times this are added to the result
//   hierarchical             pool_query [pool_rows, key heads, d]. Inputs: the queries [outputs], the keys and the
//   values
//                            of the step, of as many heads or fewer. Each stream keeps a pyramid of earlier steps.
//                            hidden: values that it holds per key head (see SessionLevel). parameter: the base of the
//                            angles that turn queries and keys by their positions, or 0
//   positions                table [hidden, outputs], whose row of a stream's age is added to the input
//   the column cells         weight [matrices * hidden, inputs], the same for the input of the step before,
//                            bias [., hidden], weight of the state [., hidden]; parameter: scale of column_forward
//
// A layer has `frames` rows of inputs and outputs a step, one after the other in its output: those of one row (linear
// but not conv, the norms, softmax and sum, the functions of one value) run on each. Others have 1.
//
// A layer reads the output of the layer `source` places before it. 1 (or 0) is the last one, and the place before the
// first layer is the session's input. `skip` counts likewise, and 0 is none: the output that a linear, conv or
// depthwise layer adds to its activation, that a column cell's highway adds, or that attention takes as its queries.
struct SeqaccelSessionLayer {
  const char* kind;
  int64_t inputs, hidden, outputs;
  int64_t matrices;  // column cells: inputs of a unit
  int64_t source, skip;
  int64_t taps, dilation;  // conv, depthwise; attention: taps
  int64_t frames;          // 0 is 1
  // gather: of each piece the layer that it comes from (how far before this one, as `source`), its place there, its
  // place in the output and its length. What no piece covers is zero.
  const int64_t (*moves)[4];
  int64_t move_count;
  int64_t heads;  // attention, hierarchical: of the queries
  // hierarchical: a node of level 1 stands for block_size steps and a node of a higher level for fanout nodes. `levels`
  // counts the steps too. The highest of them has room for top_slots nodes. If it is `limited`, a query sees the part
  // of it that it would see with another level above, otherwise all.
  int64_t block_size, fanout, levels, local_blocks, top_slots, limited, mass_bias, pool_rows;
  const char* activation;  // linear, conv, depthwise: as the kinds, or "none"
  int64_t relu;            // linear, conv, depthwise: applied after the addition of `skip`
  const float* weights[10];
  double zoneout_h, zoneout_c;  // expected share of the old state
  double parameter;
};

// A part of a layer's state. It is copied to `out`, or if that is null from `from`. Parts are h [batch, outputs] and
// c [batch, hidden]; for a column cell x [batch, inputs], the input of the step before; for conv and depthwise
// r [batch, (taps - 1) * dilation, inputs], the inputs before, oldest first. Attention has r too, and n [batch], how
// many of those steps there have been: n is written before r. A hierarchical layer has p [batch, key heads, hidden],
// its pyramid, and as `positions` has, a [batch], the age of each stream, in int64 (out and from point to int64
// values). Parts of a level of the pyramid, for each batch and key head: k and v, the rings of keys and values
// [slots, d]; from level 1 on s and t, the open node's sums of weighted keys and values [d], and g and w, its largest
// score and its sum of weights.
struct SeqaccelSessionPart {
  int64_t layer;
  char part;
  int64_t level;  // of a pyramid, otherwise without meaning
  float* out;
  const float* from;
};

// The results of functions.
enum SeqaccelSessionStatus { SEQACCEL_SESSION_OK, SEQACCEL_SESSION_OUT_OF_RANGE, SEQACCEL_SESSION_FAILED };

// Several threads may use a session: its calls run one at a time.
struct SeqaccelSessionTable {
  int64_t version;
  // Packs the weights (they may be freed afterwards) and starts `batch` streams at zero. precision: float32, bfloat16
  // or int8. Returns null on failure: see error.
  void* (*create)(int64_t batch, const char* precision, int64_t count, const struct SeqaccelSessionLayer* layers);
  // Creates another session that shares the weights and has streams of its own. Returns null on failure: see error.
  void* (*fork)(void* session, int64_t batch);
  // Copies the packed weights to `out`, or from `from`, if either is not null. Returns their size in bytes. They come
  // from a session of the same layers, precision and instruction set, and are copied before there are forks.
  int64_t (*weights)(void* session, char* out, const char* from);
  // The instruction set that the weights are packed for, and run on.
  const char* (*isa)(void* session);
  void (*destroy)(void* session);
  // Runs x [steps, batch, inputs] float32, or [steps, batch] int64 for an embedding, to y [steps, batch, outputs], and
  // moves the state on. With advance [batch] only the streams where it is true move; y is zero for the others. If the
  // result is not OK, nothing has moved: see error.
  int (*extend)(void* session, const void* x, int64_t steps, float* y, const bool* advance);
  int (*state)(void* session, int64_t count, const struct SeqaccelSessionPart* parts);
  // Stream b becomes what stream indices[b] was; -1 starts it anew.
  int (*select)(void* session, const int64_t* indices);
  // The message of the last failure in this thread.
  const char* (*error)(void);
};

// The version counts changes of these structs: _session refuses a table of another one.
#define SEQACCEL_SESSION_TABLE_VERSION 8

__attribute__((visibility("default"))) const struct SeqaccelSessionTable* seqaccel_session_table(void);
}
