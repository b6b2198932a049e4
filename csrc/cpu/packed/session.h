// Streaming runners: what session.cpp and bfloat16.cpp hand to the loops (kernels.h).
//
// A program is a chain of layers that every step of B streams runs through. Its weights are packed once, by the kernels
// of one instruction set (lanes L), into panels of 32-bit words; its state lies in the layers. Where "rows" are time
// steps and streams together, time comes first.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::packed {

// How a session holds the weights and inputs of its products, in 32-bit words.
//   float32   A word is one value.
//   bfloat16  Weights and inputs are rounded to bfloat16. A word holds two values along k. Sums are float32.
//   int8      A row of the weight is int8, and an input vector is uint8 (value + 128). Each row and each vector has a
//             scale. A word holds four values along k. Sums are int32, the same on every instruction set.
enum class Precision : int32_t { float32, bfloat16, int8 };

enum class LayerKind : int32_t {
  linear,
  conv,
  depthwise,
  attention,
  hierarchical,
  positions,
  embedding,
  layer_norm,
  rms_norm,
  batch_norm,
  softmax,
  sum,
  activation,
  unary,
  binary,
  gather,
  past,
  keep,
  recurrent,
  column,
};

// The functions of a layer `unary`, beside the activations, and those of a layer `binary`.
enum class Unary : int32_t { exp, log, sqrt, abs, softplus, reciprocal, at_least, at_most };
enum class Binary : int32_t { add, subtract, multiply, divide, maximum, minimum };

// A piece of a layer's output (source -1: of the session's input) and its place in what a `gather` makes.
struct SessionMove {
  int64_t source, from, to, count;
};

// A packed matrix [W_0 | W_1]. The columns of segment 0 multiply one vector and those of segment 1 another; the two
// sums stay apart. A block is computed at once. It holds `vectors` vectors of L rows. If the matrix is interleaved,
// vector g of block u holds gate g of units u * L to u * L + L - 1. Otherwise block u holds rows 4 * u * L to 4 * u * L
// + 4 * L - 1.
struct SessionMatrix {
  Precision precision;
  int32_t vectors;   // per block, 2 to 4
  bool interleaved;  // each vector of a block is a gate
  int64_t units;
  int64_t columns[2];
  int64_t words[2];  // per row of each segment
  int64_t blocks;
  int64_t panel_words;  // per block: (words[0] + words[1]) * vectors * L
  uint32_t* panels;     // [blocks, segment, words, vectors, L]
  float* scales;        // int8: [blocks, 2, vectors, L]
  int32_t* offsets;     // int8: [blocks, 2, vectors, L], 128 times the sum of a row
};

// A matrix to pack. Its weight has contiguous rows of float32 or bfloat16. A segment without columns has a null source.
struct SessionPack {
  SessionMatrix* matrix;
  const void* source[2];
  bool bfloat16;
};

// A level of the pyramid that hierarchical attention keeps for each stream and key head. In the memory of a key head,
// `keys` is the place of the level's keys [slots, d], behind which are its values [slots, d]: node j lies in slot
// j % slots. From level 1 on, `sums` is the place of the open node's sums of weighted keys [d] and values [d], and
// `moments` that of its largest score and its sum of weights.
struct SessionLevel {
  int64_t span;   // steps that a node stands for
  int64_t above;  // steps of a node of the next level; 0: a query sees all nodes of this one
  int64_t slots;
  int64_t keys, sums, moments;
  float bias;  // added to the scores of nodes
};

struct SessionLayer {
  LayerKind kind;
  Activation activation;
  int32_t cell;    // index in ProductCells, or in ColumnCells; a Unary or a Binary
  int32_t source;  // the layer whose output it reads; -1: the session's input
  int32_t skip;   // the layer whose output it adds, its highway, its queries, what a binary function has second, or the
                  // past that it keeps; -1: the session's input; kNoSkip
  bool relu;      // linear, conv, depthwise: relu after the skip has been added
  float* output;  // [chunk * B, frames, outputs]; null: the session's output
  int64_t inputs, hidden, outputs;
  int64_t frames;  // rows of inputs and of outputs per step and stream
  SessionMatrix matrices[3];
  const float* bias;     // recurrent, column: [pre-activations, stride]; else [outputs] or null
  const float* weights;  // of a unit or row, [., stride]; embedding: the table
  float zoneout_h, zoneout_c;
  float parameter;  // epsilon, the slope of an activation, or what scales in a column cell
  int64_t stride;   // between the rows of the state and of the buffers below
  float* h[2];      // [B, stride]; h[parity] is the state; column: the input of the step before
  float* c;         // [B, stride]; past: what was kept
  int32_t buffers;
  bool normalised;  // layer norm between the product and the update
  float* middle;    // [buffers, B, stride]: values that one part of a step hands to the next
  float* sums;      // layer norm: [blocks, B, 2, vectors, L]
  int parity;
  // conv, depthwise and attention: the ring [B, slots, inputs] holds the input of time t of stream b in slot t % slots.
  // It has room for every input that an output sees and for a chunk. `position` [B] is the time of the next input.
  int64_t taps, dilation, slots;
  int64_t heads;  // attention, hierarchical
  float* ring;
  int64_t* position;
  int64_t kept;  // values of a stream in the ring, or in what has its place: hierarchical: [B, key heads, hidden]
  bool ages;     // has `position`
  // hierarchical
  int64_t key_heads, levels, local_blocks, pool_rows;
  const SessionLevel* level;  // [levels]
  const double* frequencies;  // [d / 2]: angles per step that turn queries and keys; or null
  // gather
  const SessionMove* moves;
  int64_t move_count;
};

struct SessionRun {
  SessionLayer* layers;
  int64_t count, batch, steps;
  int64_t chunk;            // steps that a layer runs before the next one does
  const void* x;            // [steps, B, inputs] float32 (or bfloat16), or [steps, B] int64 for an embedding
  void* y;                  // [steps, B, outputs] float32 (or bfloat16)
  bool bfloat16;            // x and y
  bool reverse;             // runs from the last step to the first; for a single recurrent layer
  const int64_t* lengths;   // [B], or null; for a single recurrent layer
  const bool* advance;      // [B], or null; false: the stream keeps its state
  double work;              // multiply-adds per step and row: the number of threads depends on it
  float* projected;         // [blocks, chunk * B, vectors, L], where chunk > 1
  uint32_t* scratch;        // [threads, scratch_words]
  int64_t scratch_words;    // per thread: rows of x and of h as words, and their scales
  int64_t scratch_rows_at;  // first word of the rows of h
  int64_t scales_at;        // first word of the scales
  int64_t gathered_at;      // first word of the gathered taps, or of the vectors of hierarchical attention
  int threads;
};

constexpr int32_t kNoSkip = -2;

struct SessionKernels {
  const char* isa;
  int lanes;
  // Words of a row of K values.
  int64_t (*words)(Precision, int64_t K);
  bool (*pack)(const SessionPack*, int64_t count);  // false: no memory
  void (*run)(const SessionRun*);
};

}  // namespace seqaccel::packed

SEQACCEL_DECLARE_KERNELS_BF16(packed, SessionKernels, session_kernels)
