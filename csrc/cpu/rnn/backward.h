// The recurrence of a layer, backward, for every cell of product_cells.h without layer norm.
//
// A step, for a block of 4 L units:
//   grad_h [rows, 4 L] = grad_pre[t+1] [rows, G*H] * panel [G*H, 4 L]
//   grad_pre[t], grad_c = Cell::backward(saved[t], c', grad_h + grad_output[t], grad_c)
// With weight_hr, the grad_h of the first line has P units, and its product with weight_hr is what Cell::backward
// takes. With two products, grad_pre[t+1] there is of the first one; grad_pre[t] of the main one, times its weight,
// goes to Cell::first_backward. Columns of W_hh are packed once a call, or 4 vectors of each row of W_hh itself are
// read (ColumnProduct::of). Threads share the work as in the forward pass (forward.h), but split the batch earlier
// (backward_rows). The weights' gradients are products over all steps, after the pass; those of biases and unit weights
// are summed here.
#pragma once

#include "cpu/rnn/blocks.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr ptrdiff_t kSumRows = 8;    // rows summed before they join the gradient of a bias
constexpr ptrdiff_t kWriteRows = 8;  // from here on lines are fetched that are only written

template <typename T>
struct BackwardState {
  T* grad_h;   // [B, h_stride]: what does not come from the step after: grad_h_n at first, then u.grad_h_prev
  T* grad_c;   // [B, stride]
  T* sums;     // [parts, 2, kPre + kWeights, stride]: gradients of biases and unit weights, and what rounding took
  T* weights;  // [kWeights, stride]
  ptrdiff_t stride, h_stride;
};

// (*sum + *lost) += x, *lost being what rounding took (Knuth's two-sum).
template <typename T>
SEQACCEL_INLINE void add_compensated(T* sum, T* lost, Vec<T> x) {
  const Vec<T> old = load(sum);
  const Vec<T> next = old + x;
  const Vec<T> added = next - old;
  store(sum, next);
  store(lost, load(lost) + ((old - (next - added)) + (x - added)));
}

// A step of the sweep: times of the step itself (steps + 1 times come to an end at h_0: -1), of the one swept before
// and of the next; -1 where there is none. Rows that run at each.
struct BackwardStep {
  ptrdiff_t t, later, earlier;
  ptrdiff_t now_running, later_running, earlier_running;
};

inline BackwardStep backward_step(const RnnRows& rows, bool reverse, ptrdiff_t s) {
  const auto time = [&](ptrdiff_t i) { return i < 0 || i >= rows.steps ? -1 : reverse ? rows.steps - 1 - i : i; };
  const auto running = [&](ptrdiff_t t) { return t < 0 ? 0 : rows.count(t); };
  BackwardStep step{time(s), time(s + 1), time(s - 1), 0, 0, 0};
  step.now_running = running(step.t);
  step.later_running = running(step.later);
  step.earlier_running = running(step.earlier);
  return step;
}

// Sums over rows of kCount values from `first` on of those that BackwardState::sums holds, of kSums.
template <typename T, int kSums, int kCount>
struct RowSums {
  T* to;  // first, at the unit
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

// dL/dh of a row at a step, before zoneout: of the step after it, of what bypassed that step, and of the output. False:
// the row is at its end, and dL/dh_0 is written.
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

// Splits dL/ds of a blended state s = Z s' + (1 - Z) s~: what goes to s' is returned, the rest stays.
template <typename T>
SEQACCEL_INLINE Vec<T> split_grad(const RnnBlend<T>& blend, ptrdiff_t offset, int units, Vec<T>& grad) {
  const Vec<T> kept = blend_at(blend, offset, units) * grad;
  grad -= kept;
  return kept;
}

// What the updates of a step will read of `count` rows from i0 on and the kColumns vectors of units from `unit` on.
// Many rows are long enough a product to fetch the lines of dL/dpre too, which would come from memory when they are
// written: the sweep is 7% faster for LSTM (T, B, H) = (128, 64, 512), 3% for (128, 16, 256).
template <class Cell, typename T>
void list_update(const RnnBackward<T>& p, const RowShare& share, const BackwardStep& step, ptrdiff_t i0,
                 ptrdiff_t count, ptrdiff_t unit, PrefetchList& lines) {
  constexpr ptrdiff_t kBytes = kColumns * SEQACCEL_VECTOR_BYTES;
  constexpr int kNormed = Cell::kNorm ? 2 * Cell::kGates : 0, kWritten = Cell::kNorm ? kNormed : kPre<Cell>;
  constexpr int kPieces = Cell::kSaved + kNormed + Cell::kUsesH + 1 + Cell::kHasCell + Cell::kUsesPrev;
  const ptrdiff_t H = p.hidden, inner = share.among(step.earlier_running);
  const ptrdiff_t end = min_of(i0 + count, share.among(step.now_running));
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

// Behind the product with the main weight of two.
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

// dL/dh of the projected h, to p.grad_h.
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

// grad_h_n and grad_c_n of a thread's rows and units to the state, and of rows that never run to the result.
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

// The gradients of biases and unit weights from the sums of all parts of the batch.
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

template <class Cell, typename T>
bool rnn_backward(const RnnBackward<T>& p) {
  constexpr int L = Lanes<T>, kSums = kPre<Cell> + Cell::kWeights;
  typedef ColumnProduct<T> Product;
  const ptrdiff_t H = p.hidden, P = p.outputs, B = p.rows.batch, steps = p.rows.steps, row = p.grad_row;
  const bool two = Cell::kFirst > 0, projected = Cell::kProjects && p.weights.hr;
  const auto columns = [&](const T* weight, ptrdiff_t N, ptrdiff_t K) {
    return Product::of(weight, N, K, steps * B <= kDirectRows);
  };
  // recurrent: to dL/dh'; main: behind it, of two products; last: W_hr.
  Product recurrent = columns(p.weights.hh, P, Cell::kGates * H), main{}, last{};
  if (two) {
    main = columns(p.weights.hh + (Cell::kExtra ? 0 : Cell::kFirst * H * P), P, kMain<Cell> * H);
    recurrent = columns(Cell::kExtra ? p.weights.mh : p.weights.hh, P, Cell::kFirst * H);
  }
  if (projected) last = columns(p.weights.hr, H, P);
  const ptrdiff_t blocks = Product::blocks(H), h_blocks = Product::blocks(P);
  const ptrdiff_t weights = (kMain<Cell> + Cell::kFirst) * H * P + (projected ? P * H : 0);
  const ptrdiff_t weight_bytes = weights * ptrdiff_t(sizeof(T));
  const auto split_for = [&](int team) {
    return split_work(team, steps, B, weights, weight_bytes, blocks, backward_rows(P));
  };
  const Split planned = split_for(team_size());
  const int threads = planned.threads();
  recurrent.far = main.far = last.far = beyond_l2(weight_bytes / planned.groups);

  BackwardState<T> state;
  state.stride = blocks * Product::kWidth + L;
  state.h_stride = h_blocks * Product::kWidth + L;
  Workspace workspace;
  const size_t recurrent_at = workspace.reserve<T>(recurrent.panel_values());
  const size_t main_at = workspace.reserve<T>(main.panel_values());
  const size_t last_at = workspace.reserve<T>(last.panel_values());
  const size_t state_at =
      workspace.reserve<T>(B * state.h_stride + (B + 2 * threads * kSums + Cell::kWeights) * state.stride);
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  recurrent.panels = workspace.at<T>(recurrent_at);
  main.panels = workspace.at<T>(main_at);
  last.panels = workspace.at<T>(last_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.grad_h = workspace.at<T>(state_at);
  state.grad_c = state.grad_h + B * state.h_stride;
  state.sums = state.grad_c + B * state.stride;
  state.weights = state.sums + 2 * threads * kSums * state.stride;
  memset(state.sums, 0, sizeof(T) * size_t(2 * threads * kSums * state.stride));
  spread_rows(state.weights, state.stride, p.weights.unit_weights, Cell::kWeights, H);
  int parts = 1;

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_for(team);
    const Member me = member_of(split, thread, p.rows, barriers);
    const RowShare& rows = me.rows;
    if (thread == 0) parts = split.parts;
    const Product* const products[] = {&recurrent, &main, &last};
    for (const Product* product : products) {
      pack_blocks(me, Product::blocks(product->N), [&](ptrdiff_t j) { product->pack(j); });
    }
    if (!me.share.idle) take_grad_state<Cell>(p, state, me);
#pragma omp barrier
    if (!me.share.idle) {
      alignas(64) T product[kChunk * Product::kWidth];
      PrefetchList lines;
      T* const sums = state.sums + me.part() * 2 * kSums * state.stride;
      for (ptrdiff_t s = steps - 1; s >= -1; --s) {
        const BackwardStep step = backward_step(p.rows, p.reverse, s);
        const ptrdiff_t known = rows.among(step.later_running), now = rows.among(step.now_running);
        if (known > 0) fetch_rows(me, p.grad_pre + p.rows.packed(step.later, 0) * row, row, kPre<Cell> * H, known);
        const auto multiply_later = [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
          const ptrdiff_t products = min_of(i + count, known) - i, stride = rows.step * row, K = recurrent.K;
          if (products <= 0) return;
          const T* const later = p.grad_pre + p.rows.packed(step.later, rows.at(i)) * row + Cell::kFirstPre * H;
          if constexpr (Cell::kSeparate) {
            recurrent(products, later, stride, j, 0, K - H, product, false, &lines);
            recurrent(products, later + K, stride, j, K - H, H, product, true, &lines);
          } else {
            recurrent(products, later, stride, j, 0, K, product, false, &lines);
          }
        };
        if (projected) {
          for_blocks(me, h_blocks, s, max_of(known, now), [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
            multiply_later(j, i, count);
            for (int v = 0; v < kColumns && (j * kColumns + v) * L < P; ++v) {
              projected_update(p, state, rows, step, i, count, (j * kColumns + v) * L, product + v * L);
            }
          });
          me.wait();
          if (now > 0) fetch_rows(me, p.grad_h + p.rows.packed(step.t, 0) * P, P, P, now);
        }
        for_blocks(me, blocks, s, max_of(known, now), [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
          const ptrdiff_t unit = j * Product::kWidth;
          list_update<Cell>(p, rows, step, i, count, unit, lines);
          if (!projected) {
            multiply_later(j, i, count);
          } else if (now > i) {
            last(min_of(count, now - i), p.grad_h + p.rows.packed(step.t, rows.at(i)) * P, rows.step * P, j, 0, P,
                 product, false, &lines);
          }
          for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
            backward_update<Cell, T>(p, state, rows, step, i, count, (j * kColumns + v) * L, product + v * L, sums);
          }
        });
        if constexpr (Cell::kFirst > 0) {
          me.wait();
          if (now > 0) fetch_rows(me, p.grad_pre + p.rows.packed(step.t, 0) * row, row, kPre<Cell> * H, now);
          for_blocks(me, blocks, s, now, [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
            main(count, p.grad_pre + p.rows.packed(step.t, rows.at(i)) * row + Cell::kMainPre * H, rows.step * row, j,
                 0, main.K, product);
            for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
              first_backward_update<Cell, T>(p, state, rows, step, i, count, (j * kColumns + v) * L, product + v * L,
                                             sums);
            }
          });
        }
        me.wait();
      }
    }
  }
  give_sums<Cell>(p, state, parts);
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
