// The recurrence of a layer, backward, for every cell of product_cells.h without layer norm.
//
// A step computes, for each block of 4 L units:
//   grad_h [rows, 4 L] = grad_pre[t+1] [rows, G*H] * panel [G*H, 4 L]
//   grad_pre[t], grad_c = Cell::backward(saved[t], c', grad_h + grad_output[t], grad_c)
// With weight_hr, the grad_h of the first line has P units; Cell::backward takes its product with weight_hr. With two
// products, the first line reads the gradient of the first product. The gradient of the main product, times its weight,
// goes to Cell::first_backward.
//
// The columns of W_hh are packed once per call, or 4 vectors of each row of W_hh are read in place
// (ColumnProduct::of). Threads share the work as in the forward pass (forward.h), but split the batch earlier
// (backward_rows). The gradients of the weights are products over all steps, computed after the pass. The gradients of
// biases and of the cell's own weights are summed here.
#pragma once

#include "cpu/rnn/blocks.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr ptrdiff_t kSumRows = 8;    // rows that are summed before the sum is added to a bias's gradient
constexpr ptrdiff_t kWriteRows = 8;  // with so many rows, lines that are only written are prefetched too

// Rows of BackwardState::sums per part of the batch.
template <class Cell>
constexpr ptrdiff_t kPartSums = 2 * (kPre<Cell> + Cell::kWeights);

template <typename T>
struct BackwardState {
  T* grad_h;   // [B, h_stride]: the part of dL/dh that bypasses the products: first grad_h_n, then u.grad_h_prev
  T* grad_c;   // [B, stride]
  T* sums;     // [parts, 2, kPre + kWeights, stride]: gradients of biases and unit weights, and their rounding errors
  T* weights;  // [kWeights, stride]
  ptrdiff_t stride, h_stride;
};

// (*sum + *lost) += x. *lost collects the rounding errors of the sum (Knuth's two-sum).
template <typename T>
SEQACCEL_INLINE void add_compensated(T* sum, T* lost, Vec<T> x) {
  const Vec<T> old = load(sum);
  const Vec<T> next = old + x;
  const Vec<T> added = next - old;
  store(sum, next);
  store(lost, load(lost) + ((old - (next - added)) + (x - added)));
}

// A step of the sweep. t is its time; `later` is the time of the step swept before it, and `earlier` of the one swept
// next; -1 means there is none. The sweep ends with a step without a time, which reaches h_0. *_running counts the rows
// of the batch that run at each time. Of a thread's rows, `now` run at t, and `known` ran at `later`, so that their
// dL/dpre is known.
struct BackwardStep {
  ptrdiff_t s, t, later, earlier;
  ptrdiff_t now_running, later_running, earlier_running;
  ptrdiff_t now, known;
};

inline BackwardStep backward_step(const RnnRows& rows, bool reverse, const RowShare& share, ptrdiff_t s) {
  const auto time = [&](ptrdiff_t i) { return i < 0 || i >= rows.steps ? -1 : reverse ? rows.steps - 1 - i : i; };
  const auto running = [&](ptrdiff_t t) { return t < 0 ? 0 : rows.count(t); };
  BackwardStep step{s, time(s), time(s + 1), time(s - 1), 0, 0, 0, 0, 0};
  step.now_running = running(step.t);
  step.later_running = running(step.later);
  step.earlier_running = running(step.earlier);
  step.now = share.among(step.now_running);
  step.known = share.among(step.later_running);
  return step;
}

// Sums over rows of kCount of the kSums values that BackwardState::sums holds per unit.
template <typename T, int kSums, int kCount>
struct RowSums {
  T* to;  // the first of the kCount sums, at the unit
  ptrdiff_t stride;
  Vec<T> values[kCount] = {};

  SEQACCEL_INLINE void join() {
#pragma GCC unroll 16
    for (int g = 0; g < kCount; ++g) {
      add_compensated(to + g * stride, to + (kSums + g) * stride, values[g]);
      values[g] = Vec<T>{};
    }
  }
  SEQACCEL_INLINE void joined_every(ptrdiff_t row) {
    if ((row + 1) % kSumRows == 0) join();
  }
};

// dL/dh of a row at a step, before zoneout: the product of the step after it, the part that bypassed that product, and
// the gradient of the output. Returns false at the end of the row, after writing dL/dh_0.
template <typename T>
SEQACCEL_INLINE bool take_grad_h(const RnnBackward<T>& p, const BackwardState<T>& state, const BackwardStep& step,
                                 ptrdiff_t b, ptrdiff_t unit, int units, bool direct, const T* product, Vec<T>& grad) {
  const T* const held = state.grad_h + b * state.h_stride + unit;
  if (b < step.later_running) {
    grad = load(product);
    if (direct) grad += load(held);
  } else {
    grad = load(held);
  }
  if (b >= step.now_running) {
    store_some(p.grad_h_0 + p.rows.row(b) * p.outputs + unit, grad, units);
    return false;
  }
  if (p.grad_output) {
    grad += load_some(p.grad_output + p.rows.padded(step.t, b) * p.outputs + unit, units);
  }
  return true;
}

// Splits dL/ds of a blended state s = Z s' + (1 - Z) s~: returns the gradient of s' and leaves that of s~ in `grad`.
template <typename T>
SEQACCEL_INLINE Vec<T> split_grad(const RnnBlend<T>& blend, ptrdiff_t offset, int units, Vec<T>& grad) {
  const Vec<T> kept = blend_at(blend, offset, units) * grad;
  grad -= kept;
  return kept;
}

// Lists the lines that the updates of a step will read: of `count` rows from i0 on and kColumns vectors of units from
// `unit` on. With many rows the product takes long enough to fetch the lines of dL/dpre too, which otherwise come from
// memory when they are written: the sweep is 7% faster for LSTM (T, B, H) = (128, 64, 512), 3% for (128, 16, 256).
template <class Cell, typename T>
void list_update(const RnnBackward<T>& p, const RowShare& share, const BackwardStep& step, ptrdiff_t i0,
                 ptrdiff_t count, ptrdiff_t unit, PrefetchList& lines) {
  constexpr ptrdiff_t kBytes = kColumns * SEQACCEL_VECTOR_BYTES;
  constexpr int kNormed = Cell::kNorm ? 2 * Cell::kGates : 0, kWritten = Cell::kNorm ? kNormed : kPre<Cell>;
  constexpr int kPieces = Cell::kSaved + kNormed + Cell::kUsesH + 1 + Cell::kHasCell + Cell::kUsesPrev;
  const ptrdiff_t H = p.hidden, inner = share.among(step.earlier_running);
  const ptrdiff_t end = min_of(i0 + count, step.now);
  lines.begin<kBytes>((end - i0) * kPieces);
  for (ptrdiff_t i = i0; i < end; ++i) {
    const ptrdiff_t b = share.at(i), packed = p.rows.packed(step.t, b), padded = p.rows.padded(step.t, b);
#pragma GCC unroll 8
    for (int g = 0; g < Cell::kSaved; ++g) lines.add<kBytes>(p.saved + (packed * Cell::kSaved + g) * H + unit);
#pragma GCC unroll 8
    for (int g = 0; g < kNormed; ++g) lines.add<kBytes>(p.normed + (packed * kNormed + g) * H + unit);
    if (Cell::kUsesH) lines.add<kBytes>(p.output + padded * H + unit);
    if (p.grad_output && p.outputs == H) lines.add<kBytes>(p.grad_output + padded * H + unit);
#pragma GCC unroll 8
    for (int g = 0; g < kWritten && count >= kWriteRows; ++g) {
      const char* const at = reinterpret_cast<const char*>(p.grad_pre + packed * p.grad_row + g * H + unit);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) __builtin_prefetch(at + v * SEQACCEL_VECTOR_BYTES, 1, 2);
    }
    if (i >= inner) continue;
    if (Cell::kHasCell) lines.add<kBytes>(p.cells + p.rows.packed(step.earlier, b) * H + unit);
    if (Cell::kUsesPrev) lines.add<kBytes>(p.output + p.rows.padded(step.earlier, b) * H + unit);
  }
}

template <class Cell, typename T>
void backward_update(const RnnBackward<T>& p, const BackwardState<T>& state, const RowShare& share,
                     const BackwardStep& step, ptrdiff_t i0, ptrdiff_t count, ptrdiff_t unit, const T* product,
                     T* sums_at) {
  constexpr int L = Lanes<T>, kSums = kPre<Cell> + Cell::kWeights;
  const ptrdiff_t H = p.hidden;
  const int units = int(min_of(L, H - unit));
  const bool projected = Cell::kProjects && p.weights.hr;
  const bool blend_h = Cell::kZoneout && p.zoneout_h.factors && !projected;
  const bool blend_c = Cell::kZoneout && p.zoneout_c.factors;
  const bool direct = Cell::kDirect || blend_h;
  RowSums<T, kSums, kSums> sums{sums_at + unit, state.stride};
  Unit<Cell, Vec<T>> common;
#pragma GCC unroll 16
  for (int w = 0; w < Cell::kWeights; ++w) common.weights[w] = load(state.weights + w * state.stride + unit);
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i0 + i);
    T* const grad_c_at = state.grad_c + b * state.stride + unit;
    Unit<Cell, Vec<T>> u = common;
    bool running = b < step.now_running;
    if (!projected) {
      running = take_grad_h(p, state, step, b, unit, units, direct, product + i * kColumns * L, u.grad_h);
    } else if (running) {
      u.grad_h = load(product + i * kColumns * L);
    }
    if constexpr (Cell::kHasCell) u.grad_c = load(grad_c_at);
    if (!running) {
      if (Cell::kHasCell) store_some(p.grad_c_0 + p.rows.row(b) * H + unit, u.grad_c, units);
      continue;
    }
    const ptrdiff_t packed = p.rows.packed(step.t, b), padded = p.rows.padded(step.t, b);
    const bool inner = b < step.earlier_running;
    if constexpr (Cell::kUsesPrev) {
      const T* const from = inner ? p.output + p.rows.padded(step.earlier, b) * H : p.h_0 + p.rows.row(b) * H;
      u.h_prev = load_some(from + unit, units);
    }
    if constexpr (Cell::kHasCell) {
      const T* const from = inner ? p.cells + p.rows.packed(step.earlier, b) * H : p.c_0 + p.rows.row(b) * H;
      u.c_prev = load_some(from + unit, units);
    }
    if constexpr (Cell::kUsesH) u.h = load_some(p.output + padded * H + unit, units);
#pragma GCC unroll 8
    for (int g = 0; g < Cell::kSaved; ++g) {
      u.saved[g] = load_some(p.saved + (packed * Cell::kSaved + g) * H + unit, units);
    }
    Vec<T> kept_h{}, kept_c{};
    if (blend_h) kept_h = split_grad(p.zoneout_h, padded * H + unit, units, u.grad_h);
    if (Cell::kHasCell && blend_c) kept_c = split_grad(p.zoneout_c, padded * H + unit, units, u.grad_c);
    Cell::template backward<Functions<T>>(u);
    if constexpr (Cell::kHasCell) {
      if (blend_c) u.grad_c += kept_c;
      store(grad_c_at, u.grad_c);
    }
    if (direct) {
      if constexpr (Cell::kDirect) kept_h += u.grad_h_prev;
      store(state.grad_h + b * state.h_stride + unit, kept_h);
    }
    if (projected) store_some(p.source + packed * H + unit, u.h, units);
    T* const grad_pre = p.grad_pre + packed * p.grad_row + unit;
#pragma GCC unroll 8
    for (int g = 0; g < kPre<Cell>; ++g) {
      if (g >= Cell::kFirstGrad && g < Cell::kFirstGradEnd) continue;
      store_some(grad_pre + g * H, u.grad_pre[g], units);
      sums.values[g] += u.grad_pre[g];
    }
#pragma GCC unroll 16
    for (int w = 0; w < Cell::kWeights; ++w) sums.values[kPre<Cell> + w] += u.grad_weights[w];
    sums.joined_every(i);
  }
  sums.join();
}

// The update after the main one of two products.
template <class Cell, typename T>
void first_backward_update(const RnnBackward<T>& p, const BackwardState<T>& state, const RowShare& share,
                           const BackwardStep& step, ptrdiff_t i0, ptrdiff_t count, ptrdiff_t unit, const T* product,
                           T* sums_at) {
  constexpr int L = Lanes<T>, kSums = kPre<Cell> + Cell::kWeights, kBegin = Cell::kFirstGrad;
  constexpr int kCount = Cell::kFirstGradEnd - kBegin;
  const ptrdiff_t H = p.hidden;
  const int units = int(min_of(L, H - unit));
  RowSums<T, kSums, kCount> sums{sums_at + kBegin * state.stride + unit, state.stride};
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i0 + i), packed = p.rows.packed(step.t, b);
    Unit<Cell, Vec<T>> u;
    u.grad_source = load(product + i * kColumns * L);
    if constexpr (Cell::kUsesPrev) {
      const T* const from =
          b < step.earlier_running ? p.output + p.rows.padded(step.earlier, b) * H : p.h_0 + p.rows.row(b) * H;
      u.h_prev = load_some(from + unit, units);
    }
#pragma GCC unroll 8
    for (int g = Cell::kFirstBegin; g < Cell::kFirstEnd; ++g) {
      u.saved[g] = load_some(p.saved + (packed * Cell::kSaved + g) * H + unit, units);
    }
    Cell::template first_backward<Functions<T>>(u);
    store_some(p.source + packed * H + unit, u.source, units);
    if constexpr (Cell::kDirect) {
      T* const held = state.grad_h + b * state.h_stride + unit;
      store(held, load(held) + u.grad_h_prev);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kCount; ++g) {
      store_some(p.grad_pre + packed * p.grad_row + (kBegin + g) * H + unit, u.grad_pre[kBegin + g], units);
      sums.values[g] += u.grad_pre[kBegin + g];
    }
    sums.joined_every(i);
  }
  sums.join();
}

// Stores dL/dh of the projected h in p.grad_h.
template <typename T>
void projected_update(const RnnBackward<T>& p, const BackwardState<T>& state, const RowShare& share,
                      const BackwardStep& step, ptrdiff_t i0, ptrdiff_t count, ptrdiff_t unit, const T* product) {
  constexpr int L = Lanes<T>;
  const ptrdiff_t P = p.outputs;
  const int units = int(min_of(L, P - unit));
  const bool blend = p.zoneout_h.factors;
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i0 + i);
    Vec<T> grad;
    if (!take_grad_h(p, state, step, b, unit, units, blend, product + i * kColumns * L, grad)) continue;
    if (blend) {
      store(state.grad_h + b * state.h_stride + unit,
            split_grad(p.zoneout_h, p.rows.padded(step.t, b) * P + unit, units, grad));
    }
    store_some(p.grad_h + p.rows.packed(step.t, b) * P + unit, grad, units);
  }
}

// Copies grad_h_n and grad_c_n of a thread's rows and units to the state. With lengths it also writes them to the
// result, where they stay for rows that never run.
template <class Cell, typename T>
void take_grad_state(const RnnBackward<T>& p, const BackwardState<T>& state, const Member& me) {
  const auto take = [&](ptrdiff_t width, const T* from, T* to, ptrdiff_t stride, T* grad_0) {
    for_units<T>(me, width, [&](ptrdiff_t unit, int units) {
      for (ptrdiff_t i = 0; i < me.rows.size; ++i) {
        const ptrdiff_t b = me.rows.at(i), at = p.rows.row(b) * width + unit;
        const Vec<T> grad = from ? load_some(from + at, units) : Vec<T>{};
        store(to + b * stride + unit, grad);
        if (p.rows.running) store_some(grad_0 + at, grad, units);
      }
    });
  };
  take(p.outputs, p.grad_h_n, state.grad_h, state.h_stride, p.grad_h_0);
  if (Cell::kHasCell) take(p.hidden, p.grad_c_n, state.grad_c, state.stride, p.grad_c_0);
}

// Reserves the memory of the state. A row is padded to whole panels, and one vector more, so that its size is never a
// multiple of a page.
template <class Cell, typename T>
void reserve_state(Workspace& workspace, BackwardState<T>& state, const RnnBackward<T>& p, int threads) {
  const ptrdiff_t B = p.rows.batch, L = Lanes<T>;
  state.stride = ColumnProduct<T>::blocks(p.hidden) * ColumnProduct<T>::kWidth + L;
  state.h_stride = ColumnProduct<T>::blocks(p.outputs) * ColumnProduct<T>::kWidth + L;
  workspace.reserve(state.grad_h, B * state.h_stride);
  workspace.reserve(state.grad_c, B * state.stride);
  workspace.reserve(state.sums, threads * kPartSums<Cell> * state.stride);
  workspace.reserve(state.weights, Cell::kWeights * state.stride);
}

template <class Cell, typename T>
void fill_state(const BackwardState<T>& state, const RnnBackward<T>& p, int threads) {
  memset(state.sums, 0, sizeof(T) * size_t(threads * kPartSums<Cell> * state.stride));
  spread_rows(state.weights, state.stride, p.weights.unit_weights, Cell::kWeights, p.hidden);
}

// Adds up the sums of all parts of the batch to the gradients of biases and unit weights.
template <class Cell, typename T>
void give_sums(const RnnBackward<T>& p, const BackwardState<T>& state, int parts) {
  constexpr int kPres = kPre<Cell>, kSums = kPres + Cell::kWeights;
  const ptrdiff_t H = p.hidden;
  for (int g = 0; g < kSums; ++g) {
    T* const to = g < kPres ? p.grad_bias + g * H : p.grad_unit_weights + (g - kPres) * H;
    for (ptrdiff_t k = 0; k < H; ++k) {
      T sum = T(0);
      for (int part = 0; part < parts; ++part) {
        const T* const at = state.sums + (part * 2 * kSums + g) * state.stride + k;
        sum += at[0] + at[kSums * state.stride];
      }
      to[k] = sum;
    }
  }
}

// What is the same in every step of a sweep: sizes, products, the threads' shares, and memory.
template <class Cell, typename T>
struct BackwardPlan {
  static constexpr bool kTwo = Cell::kFirst > 0;
  typedef ColumnProduct<T> Product;

  const RnnBackward<T>& pass;
  const ptrdiff_t H = pass.hidden, P = pass.outputs, row = pass.grad_row;
  const bool projected = Cell::kProjects && pass.weights.hr;
  Product recurrent, main{}, last{};  // gives dL/dh'; the main one of two products; the one with W_hr
  const ptrdiff_t blocks = Product::blocks(H), h_blocks = Product::blocks(P);
  const ptrdiff_t weights = recurrent_weights<Cell>(H, P, projected);
  Team team{pass.rows, weights, weights * ptrdiff_t(sizeof(T)), blocks, backward_rows(P)};
  BackwardState<T> state;
  Workspace workspace;

  explicit BackwardPlan(const RnnBackward<T>& p) : pass(p) {
    const auto columns = [&](const T* weight, ptrdiff_t N, ptrdiff_t K) {
      return Product::of(weight, N, K, p.rows.steps * p.rows.batch <= kDirectRows);
    };
    const RnnWeights<T>& w = p.weights;
    if constexpr (kTwo) {
      main = columns(w.hh + (Cell::kExtra ? 0 : Cell::kFirst * H * P), P, kMain<Cell> * H);
      recurrent = columns(Cell::kExtra ? w.mh : w.hh, P, Cell::kFirst * H);
    } else {
      recurrent = columns(w.hh, P, Cell::kGates * H);
    }
    if (projected) last = columns(w.hr, H, P);
    recurrent.far = main.far = last.far = team.far();
  }

  // Returns false if there is not enough memory.
  bool allocate() {
    Product* const products[] = {&recurrent, &main, &last};
    for (Product* product : products) workspace.reserve(product->panels, product->panel_values());
    reserve_state<Cell>(workspace, state, pass, team.threads());
    workspace.reserve(team.barriers, team.threads());
    if (!workspace.allocate()) return false;
    fill_state<Cell>(state, pass, team.threads());
    return true;
  }

  void prepare(const Member& me) const {
    const Product* const products[] = {&recurrent, &main, &last};
    for (const Product* product : products) {
      pack_blocks(me, Product::blocks(product->N), [&](ptrdiff_t j) { product->pack(j); });
    }
    if (!me.share.idle) take_grad_state<Cell>(pass, state, me);
  }
};

// Runs a thread's share of all steps.
template <class Cell, typename T>
struct BackwardWalk {
  static constexpr int L = Lanes<T>;
  typedef BackwardPlan<Cell, T> Plan;
  typedef typename Plan::Product Product;

  const Plan& plan;
  const Member& me;
  const RnnBackward<T>& p = plan.pass;
  const BackwardState<T>& state = plan.state;
  const RowShare& rows = me.rows;
  T* const sums = state.sums + me.part() * kPartSums<Cell> * state.stride;
  PrefetchList lines;
  alignas(64) T product[kChunk * Product::kWidth];

  BackwardWalk(const Plan& plan, const Member& me) : plan(plan), me(me) {}

  // Calls update(unit, product) for each vector of units of block j that begins before `width`.
  template <class Update>
  SEQACCEL_INLINE void for_vectors(ptrdiff_t j, ptrdiff_t width, const Update& update) const {
    for (int v = 0; v < kColumns && (j * kColumns + v) * L < width; ++v)
      update((j * kColumns + v) * L, product + v * L);
  }

  // Computes dL/dh of rows [i, i + count) from dL/dpre of the step swept before.
  void multiply_known(const BackwardStep& step, ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
    const ptrdiff_t products = min_of(i + count, step.known) - i, stride = rows.step * plan.row, K = plan.recurrent.K;
    if (products <= 0) return;
    const T* const known = p.grad_pre + p.rows.packed(step.later, rows.at(i)) * plan.row + Cell::kFirstPre * plan.H;
    if constexpr (Cell::kSeparate) {
      plan.recurrent(products, known, stride, j, 0, K - plan.H, product, false, &lines);
      plan.recurrent(products, known + K, stride, j, K - plan.H, plan.H, product, true, &lines);
    } else {
      plan.recurrent(products, known, stride, j, 0, K, product, false, &lines);
    }
  }

  // Computes dL/dh of the projected h.
  void projected_stage(const BackwardStep& step) {
    const ptrdiff_t running = max_of(step.known, step.now);
    for_blocks(me, plan.h_blocks, step.s, running, [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
      multiply_known(step, j, i, count);
      for_vectors(j, plan.P,
                  [&](ptrdiff_t unit, const T* at) { projected_update(p, state, rows, step, i, count, unit, at); });
    });
  }

  // Computes dL/dh and runs the cell.
  void cell_stage(const BackwardStep& step) {
    const ptrdiff_t P = plan.P, running = max_of(step.known, step.now);
    for_blocks(me, plan.blocks, step.s, running, [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
      list_update<Cell>(p, rows, step, i, count, j * Product::kWidth, lines);
      if (!plan.projected) {
        multiply_known(step, j, i, count);
      } else if (step.now > i) {
        plan.last(min_of(count, step.now - i), p.grad_h + p.rows.packed(step.t, rows.at(i)) * P, rows.step * P, j, 0, P,
                  product, false, &lines);
      }
      for_vectors(j, plan.H, [&](ptrdiff_t unit, const T* at) {
        backward_update<Cell, T>(p, state, rows, step, i, count, unit, at, sums);
      });
    });
  }

  // Runs the main one of two products, and the part of the cell in front of it.
  void first_stage(const BackwardStep& step) {
    for_blocks(me, plan.blocks, step.s, step.now, [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
      const T* const grad_pre = p.grad_pre + p.rows.packed(step.t, rows.at(i)) * plan.row + Cell::kMainPre * plan.H;
      plan.main(count, grad_pre, rows.step * plan.row, j, 0, plan.main.K, product);
      for_vectors(j, plan.H, [&](ptrdiff_t unit, const T* at) {
        first_backward_update<Cell, T>(p, state, rows, step, i, count, unit, at, sums);
      });
    });
  }

  // Prefetches dL/dpre of the rows that run at time t to L2.
  void fetch_grad_pre(ptrdiff_t t, ptrdiff_t running) const {
    if (running > 0)
      fetch_rows(me, p.grad_pre + p.rows.packed(t, 0) * plan.row, plan.row, kPre<Cell> * plan.H, running);
  }

  void run() {
    for (ptrdiff_t s = p.rows.steps - 1; s >= -1; --s) {
      const BackwardStep step = backward_step(p.rows, p.reverse, rows, s);
      fetch_grad_pre(step.later, step.known);
      if (plan.projected) {
        projected_stage(step);
        me.wait();
        if (step.now > 0) fetch_rows(me, p.grad_h + p.rows.packed(step.t, 0) * plan.P, plan.P, plan.P, step.now);
      }
      cell_stage(step);
      if constexpr (Plan::kTwo) {
        me.wait();
        fetch_grad_pre(step.t, step.now);
        first_stage(step);
      }
      me.wait();
    }
  }
};

template <class Cell, typename T>
bool rnn_backward(const RnnBackward<T>& p) {
  BackwardPlan<Cell, T> plan(p);
  if (!plan.allocate()) return false;
  const Split split = plan.team.run([&](const Member& me) { plan.prepare(me); },
                                    [&](const Member& me) { BackwardWalk<Cell, T>(plan, me).run(); });
  give_sums<Cell>(p, plan.state, split.parts);
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
