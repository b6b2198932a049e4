// The recurrence of a layer whose cell normalises its products (kNorm), backward. A step has these stages:
//   grad_h [rows, 4 L] = dL/d(W_hh h')[t+1] [rows, G*H] * panel [G*H, 4 L], and immediately after it
//     with kNormC: Cell::finish_backward, and grad_y = dL/d(LN(c)) of the row
//     otherwise: Cell::backward, and grad_pre of the row
//   with kNormC: dL/dc through the norm, Cell::backward, grad_pre of the row
//   dL/d(W_ih x), dL/d(W_hh h') through their norms
#pragma once

#include "cpu/rnn/backward.h"
#include "cpu/rnn/norm.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <typename T>
struct NormBackwardState {
  BackwardState<T> backward;
  T* grad_pre;  // [B, kPre, H]
  T* grad_y;    // [B, H]: dL/d(LN(c)) gamma
  T* y;         // [B, H]: normalised c
};

// Loads what the units of a row need at a step: saved values, the old state, and c before its norm.
template <class Cell, typename T>
SEQACCEL_INLINE void take_unit(const RnnBackward<T>& p, const BackwardStep& step, ptrdiff_t b, ptrdiff_t unit,
                               int units, Unit<Cell, Vec<T>>& u) {
  const ptrdiff_t H = p.hidden, packed = p.rows.packed(step.t, b);
  const bool inner = b < step.earlier_running;
#pragma GCC unroll 8
  for (int g = 0; g < Cell::kSaved; ++g) {
    u.saved[g] = load_some(p.saved + (packed * Cell::kSaved + g) * H + unit, units);
  }
  if constexpr (Cell::kUsesPrev) {
    const T* const from = inner ? p.output + p.rows.padded(step.earlier, b) * H : p.h_0 + p.rows.row(b) * H;
    u.h_prev = load_some(from + unit, units);
  }
  if constexpr (Cell::kHasCell) {
    const T* const from = inner ? p.cells + p.rows.packed(step.earlier, b) * H : p.c_0 + p.rows.row(b) * H;
    u.c_prev = load_some(from + unit, units);
  }
}

// Stores grad_pre of a unit and row i, which is b of the batch. Adds its part of the gradients of the biases, of
// gamma_1 and of gamma_2 to the sums. Adds to of_pre what the gradients through the norms need: sums of g and g y for
// the input's norm and for the recurrent one.
template <class Cell, typename T, class Sums>
SEQACCEL_INLINE void put_grad_pre(const RnnBackward<T>& p, const NormBackwardState<T>& state, ptrdiff_t packed,
                                  ptrdiff_t i, ptrdiff_t b, ptrdiff_t unit, int units, const Unit<Cell, Vec<T>>& u,
                                  Sums& sums, const UnitSums<T, 4>& of_pre) {
  constexpr int G = Cell::kGates, kPres = kPre<Cell>;
  const ptrdiff_t H = p.hidden, stride = state.backward.stride;
  const T* const gamma = state.backward.weights + unit;
#pragma GCC unroll 8
  for (int g = 0; g < kPres; ++g) {
    store_some(state.grad_pre + (b * kPres + g) * H + unit, u.grad_pre[g], units);
    sums.values[g] += u.grad_pre[g];
  }
  const T* const normed = p.normed + packed * 2 * G * H + unit;
  Vec<T> sums_of_gates[4] = {};
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    const Vec<T> grad_x = u.grad_pre[g], grad_h = u.grad_pre[Cell::kSeparate && g == G - 1 ? G : g];
    const Vec<T> y_x = load_some(normed + g * H, units), y_h = load_some(normed + (G + g) * H, units);
    sums.values[kPres + g] += grad_x * y_x;
    sums.values[kPres + G + g] += grad_h * y_h;
    const Vec<T> g_x = grad_x * load(gamma + g * stride), g_h = grad_h * load(gamma + (G + g) * stride);
    sums_of_gates[0] += g_x;
    sums_of_gates[1] += g_x * y_x;
    sums_of_gates[2] += g_h;
    sums_of_gates[3] += g_h * y_h;
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) of_pre.add(i, k, sums_of_gates[k], units);
}

// The first stage, after the product.
template <class Cell, typename T>
void norm_first_backward(const RnnBackward<T>& p, const NormBackwardState<T>& state, const RowShare& share,
                         const BackwardStep& step, ptrdiff_t i0, ptrdiff_t count, ptrdiff_t unit, const T* product,
                         T* sums_at, const UnitSums<T, 2>& of_c, const UnitSums<T, 4>& of_pre) {
  constexpr int L = Lanes<T>, kSums = kPre<Cell> + Cell::kWeights;
  const ptrdiff_t H = p.hidden, stride = state.backward.stride;
  const int units = int(min_of(L, H - unit));
  const bool blend = p.zoneout_h.factors, direct = Cell::kDirect || blend;
  RowSums<T, kSums, kSums> sums{sums_at + unit, stride};
  const T* const weights = state.backward.weights + unit;
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i0 + i);
    Unit<Cell, Vec<T>> u;
    if (!take_grad_h(p, state.backward, step, b, unit, units, direct, product + i * kColumns * L, u.grad_h)) {
      if constexpr (Cell::kHasCell) {
        store_some(p.grad_c_0 + p.rows.row(b) * H + unit, load(state.backward.grad_c + b * stride + unit), units);
      }
      continue;
    }
    const ptrdiff_t packed = p.rows.packed(step.t, b);
    Vec<T> kept{};
    if (blend) kept = split_grad(p.zoneout_h, p.rows.padded(step.t, b) * H + unit, units, u.grad_h);
    take_unit(p, step, b, unit, units, u);
    if constexpr (Cell::kNormC) {
      const T* const stats = p.stats + packed * kNormStats;
      const Vec<T> fresh = u.saved[1] * u.c_prev + u.saved[0] * u.saved[2];
      const Vec<T> y = (fresh - stats[kMeanC]) * stats[kScaleC];
      const Vec<T> gamma = load(weights + (Cell::kWeights - 2) * stride);
      u.c = gamma * y + load(weights + (Cell::kWeights - 1) * stride);
      Cell::template finish_backward<Functions<T>>(u);
      if constexpr (Cell::kNormState) {
        // The next stage adds the part of dL/dc that zoneout passes on to c'. It reads the whole dL/dc from grad_c.
        Vec<T> grad = load(state.backward.grad_c + b * stride + unit);
        if (p.zoneout_c.factors) split_grad(p.zoneout_c, p.rows.padded(step.t, b) * H + unit, units, grad);
        u.grad_c += grad;
      }
      const Vec<T> g = gamma * u.grad_c;
      of_c.add(i0 + i, 0, g, units);
      of_c.add(i0 + i, 1, g * y, units);
      store_some(state.grad_y + b * H + unit, g, units);
      store_some(state.y + b * H + unit, y, units);
      store_some(state.grad_pre + (b * kPre<Cell> + Cell::kGates - 1) * H + unit, u.grad_pre[Cell::kGates - 1], units);
      sums.values[kSums - 2] += u.grad_c * y;
      sums.values[kSums - 1] += u.grad_c;
    } else {
      Cell::template backward<Functions<T>>(u);
      put_grad_pre<Cell>(p, state, packed, i0 + i, b, unit, units, u, sums, of_pre);
    }
    if (direct) {
      if constexpr (Cell::kDirect) kept += u.grad_h_prev;
      store(state.backward.grad_h + b * state.backward.h_stride + unit, kept);
    }
    sums.joined_every(i);
  }
  sums.join();
}

// The stage after the norm of c.
template <class Cell, typename T>
void norm_c_backward(const RnnBackward<T>& p, const NormBackwardState<T>& state, const RowShare& share,
                     const BackwardStep& step, ptrdiff_t count, ptrdiff_t unit, const NormGrad<T>* norms, T* sums_at,
                     const UnitSums<T, 4>& of_pre) {
  constexpr int kSums = kPre<Cell> + Cell::kWeights, kLast = Cell::kGates - 1;
  const ptrdiff_t H = p.hidden, stride = state.backward.stride;
  const int units = int(min_of(Lanes<T>, H - unit));
  RowSums<T, kSums, kSums> sums{sums_at + unit, stride};
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i);
    T* const grad_c = state.backward.grad_c + b * stride + unit;
    Unit<Cell, Vec<T>> u;
    take_unit(p, step, b, unit, units, u);
    u.grad_pre[kLast] = load_some(state.grad_pre + (b * kPre<Cell> + kLast) * H + unit, units);
    Vec<T> grad = load(grad_c), kept{};
    if (p.zoneout_c.factors) kept = split_grad(p.zoneout_c, p.rows.padded(step.t, b) * H + unit, units, grad);
    u.grad_c = norms[i](load_some(state.grad_y + b * H + unit, units), load_some(state.y + b * H + unit, units));
    if (!Cell::kNormState) u.grad_c += grad;
    Cell::template backward<Functions<T>>(u);
    store(grad_c, u.grad_c + kept);
    put_grad_pre<Cell>(p, state, p.rows.packed(step.t, b), i, b, unit, units, u, sums, of_pre);
    sums.joined_every(i);
  }
  sums.join();
}

// What is the same in every step of a sweep: sizes, the product, the threads' shares, and memory.
template <class Cell, typename T>
struct NormBackwardPlan {
  static constexpr int G = Cell::kGates, L = Lanes<T>;
  typedef ColumnProduct<T> Product;

  const RnnBackward<T>& pass;
  const ptrdiff_t H = pass.hidden, B = pass.rows.batch, row = pass.grad_row;
  Product product = Product::of(pass.weights.hh, H, G* H, pass.rows.steps* B <= kDirectRows);
  const ptrdiff_t blocks = Product::blocks(H), weights = recurrent_weights<Cell>(H, H, false);
  Team team{pass.rows, weights, weights * ptrdiff_t(sizeof(T)), blocks, backward_rows(H)};
  NormBackwardState<T> state;
  NormGrad<T>* norms;              // [threads, B]
  T *own_of_c, *own_of_pre;        // see UnitSums, for each thread
  T *shared_of_c, *shared_of_pre;  // see Shared
  Workspace workspace;

  explicit NormBackwardPlan(const RnnBackward<T>& p) : pass(p) { product.far = team.far(); }

  // Returns false if there is not enough memory.
  bool allocate() {
    const ptrdiff_t threads = team.threads();
    workspace.reserve(product.panels, product.panel_values());
    reserve_state<Cell>(workspace, state.backward, pass, team.threads());
    workspace.reserve(state.grad_pre, B * kPre<Cell> * H);
    workspace.reserve(state.grad_y, B * H);
    workspace.reserve(state.y, B * H);
    workspace.reserve(norms, threads * B);
    workspace.reserve(own_of_c, threads * B * 2 * L);
    workspace.reserve(own_of_pre, threads * B * 4 * L);
    workspace.reserve(shared_of_c, threads * Shared<T, 2>::size(B));
    workspace.reserve(shared_of_pre, threads * Shared<T, 4>::size(B));
    workspace.reserve(team.barriers, threads);
    if (!workspace.allocate()) return false;
    fill_state<Cell>(state.backward, pass, team.threads());
    return true;
  }

  void prepare(const Member& me) const {
    pack_blocks(me, blocks, [&](ptrdiff_t j) { product.pack(j); });
    if (!me.share.idle) take_grad_state<Cell>(pass, state.backward, me);
  }
};

// Runs a thread's share of all steps.
template <class Cell, typename T>
struct NormBackwardWalk {
  static constexpr int G = Cell::kGates, L = Lanes<T>;
  typedef NormBackwardPlan<Cell, T> Plan;
  typedef typename Plan::Product Product;

  const Plan& plan;
  const Member& me;
  const RnnBackward<T>& p = plan.pass;
  const NormBackwardState<T>& state = plan.state;
  const RowShare& rows = me.rows;
  const ptrdiff_t H = plan.H, row = plan.row;
  T* const sums = state.backward.sums + me.part() * kPartSums<Cell> * state.backward.stride;
  NormGrad<T>* const norms = plan.norms + me.thread * plan.B;
  const UnitSums<T, 2> of_c{plan.own_of_c + me.thread * plan.B * 2 * L, Shared<T, 2>::of(plan.shared_of_c, me, plan.B)};
  const UnitSums<T, 4> of_pre{plan.own_of_pre + me.thread * plan.B * 4 * L,
                              Shared<T, 4>::of(plan.shared_of_pre, me, plan.B)};
  PrefetchList lines;
  alignas(64) T product[kChunk * Product::kWidth];

  NormBackwardWalk(const Plan& plan, const Member& me) : plan(plan), me(me) {
    of_c.clear(plan.B);
    of_pre.clear(plan.B);
  }

  // Computes dL/dh from dL/d(W_hh h') of the step swept before, and runs the cell back to its first norm.
  void first_stage(const BackwardStep& step) {
    const ptrdiff_t running = max_of(step.known, step.now), K = G * H;
    for_blocks(me, plan.blocks, step.s, running, [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
      list_update<Cell>(p, rows, step, i, count, j * Product::kWidth, lines);
      if (step.known > i) {
        plan.product(min_of(count, step.known - i), p.grad_pre + p.rows.packed(step.later, rows.at(i)) * row + K,
                     rows.step * row, j, 0, K, product, false, &lines);
      }
      for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
        norm_first_backward<Cell, T>(p, state, rows, step, i, count, (j * kColumns + v) * L, product + v * L, sums,
                                     of_c, of_pre);
      }
    });
  }

  // Computes dL/dc through its norm, and runs the rest of the cell.
  void c_stage(const BackwardStep& step) {
    for (ptrdiff_t i = 0; i < step.now; ++i) {
      const T* const stats = p.stats + p.rows.packed(step.t, rows.at(i)) * kNormStats;
      norms[i] = NormGrad<T>::of(of_c, me, i, 0, H, stats[kScaleC]);
    }
    for_units<T>(me, H, [&](ptrdiff_t unit, int) {
      norm_c_backward<Cell, T>(p, state, rows, step, step.now, unit, norms, sums, of_pre);
    });
  }

  // Computes dL/d(W_ih x) and dL/d(W_hh h') through their norms. With kSeparate, the pre-activation of h' replaces that
  // of the input in the last gate.
  void pre_stage(const BackwardStep& step) {
    const T* const gamma_x = p.weights.unit_weights;
    const T* const gamma_h = gamma_x + G * H;
    for (ptrdiff_t i = 0; i < step.now; ++i) {
      const ptrdiff_t b = rows.at(i), packed = p.rows.packed(step.t, b);
      T* const grad_pre = state.grad_pre + b * kPre<Cell> * H;
      const T* const normed = p.normed + packed * 2 * G * H;
      const T* const stats = p.stats + packed * kNormStats;
      const NormGrad<T> of_x = NormGrad<T>::of(of_pre, me, i, 0, G * H, stats[kScaleX]);
      const NormGrad<T> of_h = NormGrad<T>::of(of_pre, me, i, 2, G * H, stats[kScaleH]);
      T* const to = p.grad_pre + packed * row;
      for_units<T>(me, H, [&](ptrdiff_t unit, int units) {
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          const ptrdiff_t at = g * H + unit;
          const Vec<T> grad_x = load_some(grad_pre + at, units);
          const Vec<T> grad_h = Cell::kSeparate && g == G - 1 ? load_some(grad_pre + G * H + unit, units) : grad_x;
          store_some(to + at, of_x(grad_x * load_some(gamma_x + at, units), load_some(normed + at, units)), units);
          store_some(to + G * H + at,
                     of_h(grad_h * load_some(gamma_h + at, units), load_some(normed + G * H + at, units)), units);
        }
      });
    }
  }

  void run() {
    for (ptrdiff_t s = p.rows.steps - 1; s >= -1; --s) {
      const BackwardStep step = backward_step(p.rows, p.reverse, rows, s);
      if (step.known > 0) {
        fetch_rows(me, p.grad_pre + p.rows.packed(step.later, 0) * row + G * H, row, G * H, step.known);
      }
      first_stage(step);
      if constexpr (Cell::kNormC) {
        of_c.share(me, step.now);
        me.wait();
        c_stage(step);
      }
      of_pre.share(me, step.now);
      me.wait();
      pre_stage(step);
      me.wait();
    }
  }
};

template <class Cell, typename T>
bool norm_backward(const RnnBackward<T>& p) {
  NormBackwardPlan<Cell, T> plan(p);
  if (!plan.allocate()) return false;
  const Split split = plan.team.run([&](const Member& me) { plan.prepare(me); },
                                    [&](const Member& me) { NormBackwardWalk<Cell, T>(plan, me).run(); });
  give_sums<Cell>(p, plan.state.backward, split.parts);
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
