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

// How the weights and the inputs of the products are held. bfloat16: both rounded to it, a word is a pair along k, sums
// are float32. int8: rows of the weight as int8 with a scale each, vectors of the input as uint8 (value + 128) with a
// scale each, a word is four along k, sums are int32 and the same on every instruction set.
enum class Precision : int32_t { float32, bfloat16, int8 };

enum class LayerKind : int32_t {
  linear,
  conv,
  depthwise,
  embedding,
  layer_norm,
  rms_norm,
  batch_norm,
  softmax,
  activation,
  recurrent,
  column,
};

// [W_0 | W_1], one product a block of units: columns of segment 0 multiply one vector, of segment 1 another, and the
// two sums stay apart. Vector v, lane q of block u is row v * vector_rows + u * block_rows + q, if it is one of the
// units: with G gates of N units, vector g of block u holds gate g of units u*L ...; without (interleaved = false) a
// block is 4 L rows.
struct SessionMatrix {
  Precision precision;
  int32_t vectors;   // of a block, 2 to 4
  bool interleaved;  // vectors are gates
  int64_t units;     // N
  int64_t columns[2];
  int64_t words[2];     // of a row of each segment
  int64_t blocks;       // of L units, or of 4 L rows
  int64_t panel_words;  // of a block: (words[0] + words[1]) * vectors * L
  uint32_t* panels;     // [blocks, segment, words, vectors, L]
  float* scales;        // int8: [blocks, 2, vectors, L]
  int32_t* offsets;     // int8: [blocks, 2, vectors, L], 128 times the sum of a row
};

// One matrix to pack: weight rows are contiguous, bfloat16 or float32; null: a segment of no columns.
struct SessionPack {
  SessionMatrix* matrix;
  const void* source[2];
  bool bfloat16;
};

struct SessionLayer {
  LayerKind kind;
  Activation activation;
  int32_t cell;    // index in ProductCells, or in ColumnCells
  int32_t source;  // the layer whose output it reads; -1: the session's input
  int32_t skip;    // the layer whose output it adds, or its highway; -1: the session's input; kNoSkip
  bool relu;       // linear, conv, depthwise: after the addition
  float* output;   // [chunk * B, outputs]; null: the session's output
  int64_t inputs, hidden, outputs;
  SessionMatrix matrices[3];
  const float* bias;     // recurrent, column: [pre-activations, stride]; else [outputs] or null
  const float* weights;  // of a unit or row, [., stride]; embedding: the table
  float zoneout_h, zoneout_c;
  float parameter;  // epsilon, the slope of an activation, or what scales in a column cell
  int64_t stride;   // between the rows of the state and of the buffers below
  float* h[2];      // [B, stride]; h[parity] is the state; column: the input of the step before
  float* c;         // [B, stride]
  int32_t buffers;
  bool normalised;  // layer norm between the product and the update
  float* middle;    // [buffers, B, stride]: what passes from a part of a step to the next
  float* sums;      // layer norm: [blocks, B, 2, vectors, L]
  int parity;
  // conv and depthwise. Input of time t of stream b is at slot t % slots of ring [B, slots, inputs]; there is room for
  // all that an output sees and for a chunk. `position` [B]: time of the next input.
  int64_t taps, dilation, slots;
  float* ring;
  int64_t* position;
};

struct SessionRun {
  SessionLayer* layers;
  int64_t count, batch, steps;
  int64_t chunk;            // steps that a layer runs before the next one does
  const void* x;            // [steps, B, inputs] float32 (or bfloat16), or [steps, B] int64 for an embedding
  void* y;                  // [steps, B, outputs] float32 (or bfloat16)
  bool bfloat16;            // x and y
  bool reverse;             // one recurrent layer: from the last step to the first
  const int64_t* lengths;   // one recurrent layer: [B], or null
  const bool* advance;      // [B], or null; false: the stream keeps its state
  double work;              // products of a step and row, to choose the number of threads by
  float* projected;         // [blocks, chunk * B, vectors, L], where chunk > 1
  uint32_t* scratch;        // [threads, scratch_words]
  int64_t scratch_words;    // thread's own: rows of x and of h as words, and their scales
  int64_t scratch_rows_at;  // word that rows of h begin at
  int64_t scales_at;        // word that the scales begin at
  int64_t gathered_at;      // word that gathered taps begin at
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
