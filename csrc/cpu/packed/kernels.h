// The loops of a session: every layer of a program, for a chunk of steps, in one parallel region.
//
// A step of a recurrent layer computes, for each block of L units (4 L for a cell with one gate):
//   sums [rows, G, L] = [x | h'] * panel [words, G, L]    one packed array; the parts of x and h' are kept apart in it
//   c, h = update(sums + bias, c')                        immediately after the product
// With more than one step at a time, the part of x is computed first for all of them. Each thread owns a contiguous
// part of the packed array, so that what fits stays in its core's L2; every other step runs backwards over it. Threads
// meet at a barrier after each part of a step whose units the next part all needs: once per step for most cells. Every
// thread converts the vectors that a product reads as bfloat16 or int8 for itself, which is cheaper than another
// barrier.
#include <math.h>

#include "cpu/packed/attention.h"
#include "cpu/packed/cells.h"
#include "cpu/packed/columns.h"
#include "cpu/packed/dense.h"
#include "cpu/packed/elementwise.h"
#include "cpu/packed/hierarchical.h"

#define SEQACCEL_QUOTED(name) #name
#define SEQACCEL_NAME_OF(name) SEQACCEL_QUOTED(name)

namespace seqaccel::SEQACCEL_ISA::packed {

// ---------------------------------------------------------------- recurrent layers

// One step of a layer. It knows its rows of x and y, and the buffer that holds the state before it.
struct SessionStep {
  ptrdiff_t row;   // of stream 0 among the rows of the chunk
  ptrdiff_t time;  // from the beginning of the sequence
  const float* h;
  float* next;
  bool backwards;  // order of the blocks
};

inline bool running(const SessionThread& t, const SessionStep& step, ptrdiff_t b) {
  return t.advances(b) && (t.run.lengths == nullptr || step.time < t.run.lengths[b]);
}

// Blends the new h of a stream's units with the old one, keeps it and puts it out.
SEQACCEL_INLINE void finish(const SessionThread& t, const SessionLayer& l, const SessionStep& step, ptrdiff_t b,
                            ptrdiff_t unit, Vec<float> h) {
  constexpr int L = kWordLanes;
  const int units = int(min_of(L, l.outputs - unit));
  const Vec<float> before = load(step.h + b * l.stride + unit);
  if (l.zoneout_h != 0.0f) h = l.zoneout_h * before + (1.0f - l.zoneout_h) * h;
  if (!running(t, step, b)) {
    store(step.next + b * l.stride + unit, before);
    h = Vec<float>{};
  } else {
    store(step.next + b * l.stride + unit, h);
  }
  t.store_output(step.row + b, l.outputs, unit, h, units);
}

SEQACCEL_INLINE void keep_cell(const SessionThread& t, const SessionLayer& l, const SessionStep& step, ptrdiff_t b,
                               ptrdiff_t unit, Vec<float> c) {
  float* const at = l.c + b * l.stride + unit;
  if (l.zoneout_c != 0.0f) c = l.zoneout_c * load(at) + (1.0f - l.zoneout_c) * c;
  if (running(t, step, b)) store(at, c);
}

// Calls use(u, b0, rows, sums of segment 0, sums of segment 1) for each of the thread's blocks. Sums are [rows,
// vectors, L]. Segment 0 multiplies x; that may have been done before, for all steps. Segment 1 multiplies `second` if
// it has columns.
template <class Use>
SEQACCEL_INLINE void for_blocks(const SessionThread& t, const SessionMatrix& m, const SessionStep& step,
                                const WordRows& first, ptrdiff_t first_row, const float* projected,
                                const WordRows& second, Use use) {
  const ptrdiff_t width = m.vectors * kWordLanes, begin = t.begin(m.blocks), end = t.end(m.blocks);
  alignas(64) float sums[2][kRowChunk * 4 * kWordLanes];
  for (ptrdiff_t i = begin; i < end; ++i) {
    const ptrdiff_t u = step.backwards ? begin + end - 1 - i : i;
    for (ptrdiff_t b = 0; b < t.run.batch; b += kRowChunk) {
      const ptrdiff_t rows = min_of(kRowChunk, t.run.batch - b);
      const float* from_first = sums[0];
      if (projected) {
        from_first = projected + (u * t.rows() + first_row + b) * width;
      } else {
        session_product(m, u, 0, first, first_row + b, rows, sums[0]);
      }
      if (m.columns[1]) session_product(m, u, 1, second, b, rows, sums[1]);
      use(u, b, rows, from_first, sums[1]);
    }
  }
}

template <class Cell>
void recurrent_step(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
                    ptrdiff_t x_row, const float* projected) {
  constexpr int L = kWordLanes, V = kBlockVectors<Cell::kGates>, U = V / Cell::kGates;
  const SessionMatrix& m = l.matrices[0];
  const WordRows h = t.state_rows(m.precision, step.h, l.stride, m.columns[1]);
  const bool projects = l.matrices[1].blocks > 0;
  for_blocks(t, m, step, x, x_row, projected, h,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* from_x, const float* from_h) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 const ptrdiff_t b = b0 + i;
                 for (int j = 0; j < U; ++j) {
                   const ptrdiff_t unit = (u * U + j) * L;
                   if (unit >= l.hidden) break;
                   auto state = unit_at<Cell>(l, unit, step.h + b * l.stride, l.c + b * l.stride);
                   add_sums(state, from_x + (i * V + j) * L, from_h + (i * V + j) * L, 0, Cell::kGates);
                   Cell::template forward<SessionFunctions>(state);
                   if constexpr (Cell::kHasCell) keep_cell(t, l, step, b, unit, state.c);
                   if (projects) {
                     store(l.middle + b * l.stride + unit, state.h);
                   } else {
                     finish(t, l, step, b, unit, state.h);
                   }
                 }
               }
             });
  t.wait();
  if (!projects) return;
  const WordRows full = t.state_rows(m.precision, l.middle, l.stride, l.hidden);
  for_blocks(t, l.matrices[1], step, full, 0, nullptr, full,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* sums, const float*) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 for (int v = 0; v < 4 && (u * 4 + v) * L < l.outputs; ++v) {
                   finish(t, l, step, b0 + i, (u * 4 + v) * L, load(sums + (i * 4 + v) * L));
                 }
               }
             });
  t.wait();
}

// For cells whose second product needs the result of the first one. `first` writes the vector that takes the place of
// h' into middle[0], and the other values that the second half needs into middle[1].
template <class First>
SEQACCEL_INLINE WordRows first_half(const SessionThread& t, const SessionLayer& l, const SessionStep& step,
                                    const WordRows& x, ptrdiff_t x_row, const float* projected, int vectors_of_unit,
                                    First first) {
  constexpr int L = kWordLanes;
  const SessionMatrix& m = l.matrices[0];
  const ptrdiff_t V = m.vectors, U = V / vectors_of_unit;
  const WordRows h = t.state_rows(m.precision, step.h, l.stride, m.columns[1]);
  for_blocks(t, m, step, x, x_row, projected, h,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* from_x, const float* from_h) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 for (ptrdiff_t j = 0; j < U && (u * U + j) * L < l.hidden; ++j) {
                   const ptrdiff_t at = (i * V + j * vectors_of_unit) * L;
                   first(b0 + i, (u * U + j) * L, from_x + at, from_h + at);
                 }
               }
             });
  t.wait();
  return t.state_rows(m.precision, l.middle, l.stride, l.hidden);
}

// Runs cells with kExtra. `middle` holds the source of the main product.
template <class Cell>
void two_products_step(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
                       ptrdiff_t x_row, const float* projected) {
  constexpr int L = kWordLanes, V = Cell::kGates;
  static_assert(Cell::kHasCell && V > 1);
  const WordRows m = first_half(t, l, step, x, x_row, projected, 1,
                                [&](ptrdiff_t b, ptrdiff_t unit, const float* from_x, const float* from_h) {
                                  Unit<Cell, Vec<float>> state;
                                  state.pre[Cell::kGates] = load(from_x);
                                  state.pre[Cell::kFirstPre] = load(from_h);
                                  Cell::template first<SessionFunctions>(state);
                                  store(l.middle + b * l.stride + unit, state.source);
                                });
  for_blocks(t, l.matrices[1], step, x, x_row, nullptr, m,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* from_x, const float* from_m) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 const ptrdiff_t b = b0 + i;
                 auto state = unit_at<Cell>(l, u * L, step.h + b * l.stride, l.c + b * l.stride);
                 add_sums(state, from_x + i * V * L, from_m + i * V * L, 0, V);
                 Cell::template forward<SessionFunctions>(state);
                 keep_cell(t, l, step, b, u * L, state.c);
                 finish(t, l, step, b, u * L, state.h);
               }
             });
  t.wait();
}

// Runs cells whose first product has the first rows of weight_hh. forward reads only the last value that first saves.
// `middle` holds the source of the main product and that value.
template <class Cell>
void split_product_step(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
                        ptrdiff_t x_row, const float* projected) {
  constexpr int L = kWordLanes, kLast = Cell::kFirst - 1;
  static_assert(!Cell::kHasCell && kLast > 0 && kMain<Cell> == 1);
  float* const update = l.middle + t.run.batch * l.stride;
  const WordRows reset = first_half(t, l, step, x, x_row, projected, Cell::kFirst,
                                    [&](ptrdiff_t b, ptrdiff_t unit, const float* from_x, const float* from_h) {
                                      const ptrdiff_t row = b * l.stride;
                                      auto state = unit_at<Cell>(l, unit, step.h + row, nullptr);
                                      add_sums(state, from_x, from_h, 0, Cell::kFirst);
                                      Cell::template first<SessionFunctions>(state);
                                      store(l.middle + row + unit, state.source);
                                      store(update + row + unit, state.saved[kLast]);
                                    });
  for_blocks(t, l.matrices[1], step, x, x_row, nullptr, reset,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* from_x, const float* from_reset) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 for (int v = 0; v < 4 && (u * 4 + v) * L < l.hidden; ++v) {
                   const ptrdiff_t unit = (u * 4 + v) * L, row = (b0 + i) * l.stride, sum = (i * 4 + v) * L;
                   auto state = unit_at<Cell>(l, unit, step.h + row, nullptr);
                   add_sums(state, from_x + sum, from_reset + sum, Cell::kMainPre, 1);
                   state.saved[kLast] = load(update + row + unit);
                   Cell::template forward<SessionFunctions>(state);
                   finish(t, l, step, b0 + i, unit, state.h);
                 }
               }
             });
  t.wait();
}

// ---------------------------------------------------------------- recurrent layers with layer norm

// The moments of all gates of a stream, in segment s of the sums [blocks, B, 2, vectors, L].
inline Moments moments_of_sums(const SessionThread& t, const SessionLayer& l, ptrdiff_t b, int s) {
  constexpr int L = kWordLanes;
  const SessionMatrix& m = l.matrices[0];
  const ptrdiff_t V = m.vectors;
  const float count = float(V * l.hidden);
  const auto add_up = [&](auto of) {
    Vec<float> sum = {};
    for (ptrdiff_t u = 0; u < m.blocks; ++u) {
      const float* const at = l.sums + ((u * t.run.batch + b) * 2 + s) * V * L;
      const int units = int(min_of(L, l.hidden - u * L));
      for (ptrdiff_t v = 0; v < V; ++v) sum += of(at + v * L, units);
    }
    return horizontal_sum<float>(sum) / count;
  };
  // Past the last unit the sums are zero.
  const float mean = add_up([](const float* at, int) { return load(at); });
  const float variance = add_up([&](const float* at, int units) {
    const Vec<float> d = load(at) - mean;
    return units == L ? d * d : first_lanes(d * d, units);
  });
  return {mean, 1.0f / sqrtf(variance + l.parameter)};
}

// Adds the normalised pre-activations of a unit. The first of its weights are the gains of x's part, the next of h's.
template <class Cell>
SEQACCEL_INLINE void add_normalised(Unit<Cell, Vec<float>>& state, const SessionThread& t, const SessionLayer& l,
                                    ptrdiff_t b, ptrdiff_t u, const Moments (&moments)[2]) {
  constexpr int L = kWordLanes, V = Cell::kGates;
  alignas(64) float normal[2][V * L];
  for (int s = 0; s < 2; ++s) {
    for (int v = 0; v < V; ++v) {
      const Vec<float> sum = load(l.sums + (((u * t.run.batch + b) * 2 + s) * V + v) * L);
      store(normal[s] + v * L, (sum - moments[s].mean) * moments[s].scale * state.weights[s * V + v]);
    }
  }
  add_sums(state, normal[0], normal[1], 0, V);
}

inline void keep_sums(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
                      ptrdiff_t x_row, const float* projected) {
  const SessionMatrix& m = l.matrices[0];
  const size_t width = size_t(m.vectors) * kWordLanes;
  const WordRows h = t.state_rows(m.precision, step.h, l.stride, m.columns[1]);
  for_blocks(t, m, step, x, x_row, projected, h,
             [&](ptrdiff_t u, ptrdiff_t b0, ptrdiff_t rows, const float* from_x, const float* from_h) {
               for (ptrdiff_t i = 0; i < rows; ++i) {
                 float* const to = l.sums + (u * t.run.batch + b0 + i) * 2 * ptrdiff_t(width);
                 memcpy(to, from_x + i * ptrdiff_t(width), width * sizeof(float));
                 memcpy(to + width, from_h + i * ptrdiff_t(width), width * sizeof(float));
               }
             });
  t.wait();
}

template <class Cell>
void norm_step(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
               ptrdiff_t x_row, const float* projected) {
  constexpr int L = kWordLanes;
  static_assert(!Cell::kHasCell && Cell::kGates > 1);
  keep_sums(t, l, step, x, x_row, projected);
  for (ptrdiff_t b = 0; b < t.run.batch; ++b) {
    const Moments moments[2] = {moments_of_sums(t, l, b, 0), moments_of_sums(t, l, b, 1)};
    for (ptrdiff_t u = t.begin(l.matrices[0].blocks); u < t.end(l.matrices[0].blocks); ++u) {
      auto state = unit_at<Cell>(l, u * L, step.h + b * l.stride, nullptr);
      add_normalised(state, t, l, b, u, moments);
      Cell::template forward<SessionFunctions>(state);
      finish(t, l, step, b, u * L, state.h);
    }
  }
  t.wait();
}

// Runs cells with kNormC. finish reads only the last value that forward saves. `middle` holds it and the new c.
template <class Cell>
void norm_of_cell_step(const SessionThread& t, const SessionLayer& l, const SessionStep& step, const WordRows& x,
                       ptrdiff_t x_row, const float* projected) {
  constexpr int L = kWordLanes, kLast = Cell::kSaved - 1;
  static_assert(Cell::kHasCell && Cell::kGates > 1);
  const ptrdiff_t begin = t.begin(l.matrices[0].blocks), end = t.end(l.matrices[0].blocks);
  float* const new_c = l.middle + t.run.batch * l.stride;
  keep_sums(t, l, step, x, x_row, projected);
  for (ptrdiff_t b = 0; b < t.run.batch; ++b) {
    const Moments moments[2] = {moments_of_sums(t, l, b, 0), moments_of_sums(t, l, b, 1)};
    for (ptrdiff_t u = begin; u < end; ++u) {
      auto state = unit_at<Cell>(l, u * L, step.h + b * l.stride, l.c + b * l.stride);
      add_normalised(state, t, l, b, u, moments);
      Cell::template forward<SessionFunctions>(state);
      store(l.middle + b * l.stride + u * L, state.saved[kLast]);
      store(new_c + b * l.stride + u * L, state.c);
    }
  }
  t.wait();
  const float* const gain = l.weights + (Cell::kWeights - 2) * l.stride;
  for (ptrdiff_t b = 0; b < t.run.batch; ++b) {
    const Moments moments = moments_of(new_c + b * l.stride, l.hidden, l.parameter);
    for (ptrdiff_t u = begin; u < end; ++u) {
      const ptrdiff_t at = b * l.stride + u * L;
      const Vec<float> c = load(new_c + at);
      Unit<Cell, Vec<float>> state;
      state.c = (c - moments.mean) * moments.scale * load(gain + u * L) + load(gain + l.stride + u * L);
      state.saved[kLast] = load(l.middle + at);
      Cell::template finish<SessionFunctions>(state);
      keep_cell(t, l, step, b, u * L, Cell::kNormState ? state.c : c);
      finish(t, l, step, b, u * L, state.h);
    }
  }
  t.wait();
}

typedef void StepFunction(const SessionThread&, const SessionLayer&, const SessionStep&, const WordRows&, ptrdiff_t,
                          const float*);

inline void recurrent_layer(const SessionThread& t, const SessionLayer& l, StepFunction* run_step) {
  const SessionMatrix& m = l.matrices[0];
  const ptrdiff_t rows = t.rows(), width = m.vectors * kWordLanes;
  const WordRows x = t.input_rows(m.precision, l.inputs);
  const bool projects = t.steps > 1;
  for (ptrdiff_t u = t.begin(m.blocks); u < t.end(m.blocks) && projects; ++u) {
    session_product(m, u, 0, x, 0, rows, t.run.projected + u * rows * width);
  }
  for (ptrdiff_t s = 0; s < t.steps; ++s) {
    const int parity = l.parity ^ int((t.done + s) & 1);
    const ptrdiff_t at = t.run.reverse ? t.steps - 1 - s : s;
    const ptrdiff_t time = t.run.reverse ? t.run.steps - 1 - t.done - s : t.done + s;
    const SessionStep step = {at * t.run.batch, time, l.h[parity], l.h[parity ^ 1], parity == 1};
    run_step(t, l, step, x, step.row, projects ? t.run.projected : nullptr);
  }
}

template <class Cell>
void cell_layer(const SessionThread& t, const SessionLayer& l) {
  if constexpr (Cell::kNormC) {
    recurrent_layer(t, l, norm_of_cell_step<Cell>);
  } else if constexpr (Cell::kNorm) {
    recurrent_layer(t, l, norm_step<Cell>);
  } else if constexpr (Cell::kExtra) {
    recurrent_layer(t, l, two_products_step<Cell>);
  } else if constexpr (Cell::kFirst > 0) {
    recurrent_layer(t, l, split_product_step<Cell>);
  } else {
    recurrent_layer(t, l, recurrent_step<Cell>);
  }
}

template <class... Cells>
inline void recurrent_layer_of(const SessionThread& t, const SessionLayer& l, CellList<Cells...>) {
  static void (*const kLayers[])(const SessionThread&, const SessionLayer&) = {cell_layer<Cells>...};
  kLayers[l.cell](t, l);
}

// ---------------------------------------------------------------- layers without a state

inline void embedding_layer(const SessionThread& t, const SessionLayer& l) {
  const int64_t* const indices = static_cast<const int64_t*>(t.x);
  for (ptrdiff_t i = t.begin(t.rows()); i < t.end(t.rows()); ++i) {
    memcpy(static_cast<float*>(t.y) + i * l.outputs, l.weights + indices[i] * l.outputs,
           size_t(l.outputs) * sizeof(float));
  }
  t.wait();
}

// y = (x - shift) * scale * weight + bias.
inline void scale_row(const SessionLayer& l, const float* x, float* y, float shift, float scale) {
  for (ptrdiff_t k = 0; k < l.outputs; k += kWordLanes) {
    const int count = int(min_of(kWordLanes, l.outputs - k));
    Vec<float> value = (load_some(x + k, count) - shift) * scale;
    if (l.weights) value *= load_some(l.weights + k, count);
    if (l.bias) value += load_some(l.bias + k, count);
    store_some(y + k, value, count);
  }
}

inline float sum_of(const float* x, ptrdiff_t count) {
  Vec<float> sum = {};
  for (ptrdiff_t k = 0; k < count; k += kWordLanes) sum += load_some(x + k, int(min_of(kWordLanes, count - k)));
  return horizontal_sum<float>(sum);
}

inline float mean_of_squares(const float* x, ptrdiff_t count) {
  Vec<float> sum = {};
  for (ptrdiff_t k = 0; k < count; k += kWordLanes) {
    const Vec<float> value = load_some(x + k, int(min_of(kWordLanes, count - k)));
    sum += value * value;
  }
  return horizontal_sum<float>(sum) / float(count);
}

inline void softmax_row(const float* x, float* y, ptrdiff_t count) {
  float most = -INFINITY, total = 0.0f;
  for (ptrdiff_t k = 0; k < count; ++k) most = x[k] > most ? x[k] : most;
  for (ptrdiff_t k = 0; k < count; k += kWordLanes) {
    const int n = int(min_of(kWordLanes, count - k));
    store_some(y + k, exp_vec<float>(load_some(x + k, n) - most), n);
  }
  for (ptrdiff_t k = 0; k < count; ++k) total += y[k];
  for (ptrdiff_t k = 0; k < count; ++k) y[k] /= total;
}

inline void row_layer(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t N = l.inputs;
  for (ptrdiff_t i = t.begin(t.rows()); i < t.end(t.rows()); ++i) {
    const float* const x = static_cast<const float*>(t.x) + i * N;
    float* const y = static_cast<float*>(t.y) + i * l.outputs;
    if (l.kind == LayerKind::layer_norm) {
      const Moments moments = moments_of(x, N, l.parameter);
      scale_row(l, x, y, moments.mean, moments.scale);
    } else if (l.kind == LayerKind::rms_norm) {
      scale_row(l, x, y, 0.0f, 1.0f / sqrtf(mean_of_squares(x, N) + l.parameter));
    } else if (l.kind == LayerKind::batch_norm) {
      scale_row(l, x, y, 0.0f, 1.0f);
    } else if (l.kind == LayerKind::sum) {
      *y = sum_of(x, N) * l.parameter;
    } else {
      softmax_row(x, y, N);
    }
  }
  t.wait();
}

// ---------------------------------------------------------------- the program

inline void session_layer(const SessionThread& t, const SessionLayer& l) {
  switch (l.kind) {
    case LayerKind::linear:
      return dense_layer(t, l, t.input_rows(l.matrices[0].precision, l.inputs));
    case LayerKind::conv:
      return conv_layer(t, l);
    case LayerKind::depthwise:
      return depthwise_layer(t, l);
    case LayerKind::attention:
      return attention_layer(t, l);
    case LayerKind::hierarchical:
      return hierarchical_layer(t, l);
    case LayerKind::positions:
      return positions_layer(t, l);
    case LayerKind::embedding:
      return embedding_layer(t, l);
    case LayerKind::layer_norm:
    case LayerKind::rms_norm:
    case LayerKind::batch_norm:
    case LayerKind::softmax:
    case LayerKind::sum:
      return row_layer(t, l);
    case LayerKind::activation:
      return activation_layer(t, l);
    case LayerKind::unary:
      return unary_layer(t, l);
    case LayerKind::binary:
      return binary_layer(t, l);
    case LayerKind::gather:
      return gather_layer(t, l);
    case LayerKind::past:
      return past_layer(t, l);
    case LayerKind::keep:
      return keep_layer(t, l);
    case LayerKind::recurrent:
      return recurrent_layer_of(t, l, ProductCells{});
    case LayerKind::column:
      return column_layer_of(t, l, ColumnCells{});
  }
}

inline void session_thread(const SessionRun& run, Barrier& barrier, int thread, int team) {
  const SessionLayer& first = run.layers[0];
  const SessionLayer& last = run.layers[run.count - 1];
  const bool indices = first.kind == LayerKind::embedding;
  const ptrdiff_t value = run.bfloat16 ? 2 : 4;
  const ptrdiff_t in_row = run.batch * (indices ? 8 : first.inputs * first.frames * value),
                  out_row = run.batch * last.outputs * last.frames * value;
  for (ptrdiff_t done = 0; done < run.steps; done += run.chunk) {
    const ptrdiff_t steps = min_of(run.chunk, run.steps - done);
    const ptrdiff_t at = run.reverse ? run.steps - done - steps : done;
    const void* const input = static_cast<const char*>(run.x) + at * in_row;
    void* const output = static_cast<char*>(run.y) + at * out_row;
    const auto made_by = [&](int32_t layer) { return layer < 0 ? input : run.layers[layer].output; };
    for (int64_t i = 0; i < run.count; ++i) {
      const SessionLayer& l = run.layers[i];
      const void* const skip = l.skip == kNoSkip ? nullptr : made_by(l.skip);
      session_layer({run, thread, team, barrier, run.scratch + thread * run.scratch_words, done, steps,
                     made_by(l.source), l.output ? l.output : output, run.bfloat16 && l.source < 0,
                     run.bfloat16 && l.output == nullptr, static_cast<const float*>(skip), ptrdiff_t(l.frames)},
                    l);
    }
  }
}

inline void session_run(const SessionRun* pointer) {
  const SessionRun& run = *pointer;
  Barrier barrier;
  memset(&barrier, 0, sizeof(barrier));
  if (run.threads == 1) {  // a parallel region of one thread would allocate
    session_thread(run, barrier, 0, 1);
  } else {
#pragma omp parallel num_threads(run.threads)
    session_thread(run, barrier, omp_get_thread_num(), omp_get_num_threads());
  }
  for (int64_t i = 0; i < run.count; ++i) {
    SessionLayer& l = run.layers[i];
    l.parity ^= int(run.steps & 1);
    for (ptrdiff_t b = 0; l.position && b < run.batch; ++b) {
      if (run.advance == nullptr || run.advance[b]) l.position[b] += run.steps;
    }
  }
}

extern const SessionKernels session_kernels;
const SessionKernels session_kernels = {SEQACCEL_NAME_OF(SEQACCEL_ISA), kWordLanes, words_of, session_pack,
                                        session_run};

}  // namespace seqaccel::SEQACCEL_ISA::packed
