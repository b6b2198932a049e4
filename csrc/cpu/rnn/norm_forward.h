// The recurrence of a layer whose cell normalises its products (kNorm), forward. A step has these stages:
//   raw [rows, G, L] = h' [rows, H] * panel [H, G, L]           for every block of units
//   saved, c = Cell::forward(gamma_1 x[t] + gamma_2 LN(raw) + bias, c')
//   h = Cell::finish(gamma LN(c) + beta)                        with kNormC; otherwise the second stage gives h
// x[t] is normalised before the pass. Threads that share the units meet after each stage. Each thread has the
// statistics of its own units of a row, and joins them with the others' after the barrier.
#pragma once

#include "cpu/rnn/forward.h"
#include "cpu/rnn/norm.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <typename T>
struct NormState {
  ForwardState<T> forward;
  T* raw;    // [B, G, H]
  T* fresh;  // [B, H]: c before its norm
  T* out;    // [B, stride]: saved[kSaved - 1], the output gate
};

// Computes the gates of `count` rows at time t for the units from `unit` on, with the moments of raw.
template <class Cell, typename T>
void norm_update(const RnnForward<T>& p, const NormState<T>& state, const RowShare& share, ptrdiff_t s, ptrdiff_t t,
                 ptrdiff_t count, ptrdiff_t unit, const RowMoments<T>* moments) {
  constexpr int G = Cell::kGates;
  const ptrdiff_t H = p.hidden, stride = state.forward.stride;
  const int units = int(min_of(Lanes<T>, H - unit));
  Unit<Cell, Vec<T>> common;
#pragma GCC unroll 8
  for (int g = 0; g < kPre<Cell>; ++g) common.pre[g] = load(state.forward.bias + g * stride + unit);
#pragma GCC unroll 16
  for (int w = 0; w < Cell::kWeights; ++w) common.weights[w] = load(state.forward.weights + w * stride + unit);
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i), packed = p.rows.packed(t, b), padded = p.rows.padded(t, b);
    Unit<Cell, Vec<T>> u = common;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Vec<T> raw = load_some(state.raw + (b * G + g) * H + unit, units);
      const Vec<T> y = (raw - moments[i].mean) * moments[i].scale;
      if (p.normed) store_some(p.normed + packed * p.x_row + g * H + unit, y, units);
      u.pre[g] += u.weights[g] * load_some(p.x + packed * p.x_row + g * H + unit, units);
      const int at = Cell::kSeparate && g == G - 1 ? G : g;
      u.pre[at] += u.weights[G + g] * y;
    }
    if constexpr (Cell::kUsesPrev) u.h_prev = load(state.forward.h[s & 1] + b * state.forward.h_stride + unit);
    if constexpr (Cell::kHasCell) u.c_prev = load(state.forward.c + b * stride + unit);
    Cell::template forward<Functions<T>>(u);
    if (p.saved) {
#pragma GCC unroll 8
      for (int g = 0; g < Cell::kSaved; ++g) {
        store_some(p.saved + (packed * Cell::kSaved + g) * H + unit, u.saved[g], units, state.forward.non_temporal);
      }
    }
    if constexpr (Cell::kNormC) {
      store_some(state.fresh + b * H + unit, u.c, units);
      store(state.out + b * stride + unit, u.saved[Cell::kSaved - 1]);
    } else {
      put_h(p, state.forward, s, b, padded, unit, units, p.zoneout_h.factors != nullptr, u.h);
    }
  }
}

// Normalises c with its moments, and computes h.
template <class Cell, typename T>
void norm_finish(const RnnForward<T>& p, const NormState<T>& state, const RowShare& share, ptrdiff_t s, ptrdiff_t t,
                 ptrdiff_t count, ptrdiff_t unit, const RowMoments<T>* moments) {
  const ptrdiff_t H = p.hidden, stride = state.forward.stride;
  const int units = int(min_of(Lanes<T>, H - unit));
  const Vec<T> gamma = load(state.forward.weights + (Cell::kWeights - 2) * stride + unit);
  const Vec<T> beta = load(state.forward.weights + (Cell::kWeights - 1) * stride + unit);
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i), packed = p.rows.packed(t, b), padded = p.rows.padded(t, b);
    const Vec<T> fresh = load_some(state.fresh + b * H + unit, units);
    Unit<Cell, Vec<T>> u;
    u.saved[Cell::kSaved - 1] = load(state.out + b * stride + unit);
    u.c = gamma * ((fresh - moments[i].mean) * moments[i].scale) + beta;
    Cell::template finish<Functions<T>>(u);
    put_h(p, state.forward, s, b, padded, unit, units, p.zoneout_h.factors != nullptr, u.h);
    Vec<T> c = Cell::kNormState ? u.c : fresh;
    T* const at = state.forward.c + b * stride + unit;
    if (p.zoneout_c.factors) {
      const Vec<T> z = blend_at(p.zoneout_c, padded * H + unit, units);
      c = z * load(at) + (1 - z) * c;
    }
    store(at, c);
    if (p.cells) store_some(p.cells + packed * H + unit, c, units, state.forward.non_temporal);
  }
}

// What is the same in every step of a pass: sizes, the product, the threads' shares, and memory.
template <class Cell, typename T>
struct NormForwardPlan {
  static constexpr int G = Cell::kGates;
  typedef UnitProduct<T, G> Product;
  static_assert(Product::U == 1, "a thread's blocks are its vectors of units");

  const RnnForward<T>& pass;
  const ptrdiff_t H = pass.hidden, B = pass.rows.batch, steps = pass.rows.steps;
  const bool direct = H >= Lanes<T> && steps * B <= kDirectRows;  // nothing is packed
  Product product{pass.weights.hh, H, H, nullptr, Product::panel_values(H)};
  const ptrdiff_t blocks = Product::blocks(H), weights = recurrent_weights<Cell>(H, H, false);
  Team team{pass.rows, weights, weights * ptrdiff_t(sizeof(T)), blocks};
  NormState<T> state;
  RowMoments<T>* moments;  // [threads, B]
  T *of_raw, *of_c;        // see Shared
  Workspace workspace;

  explicit NormForwardPlan(const RnnForward<T>& p) : pass(p) {
    product.far = team.far();
    state.forward.stride = state.forward.h_stride = (panel_count(H, Lanes<T>) + 1) * Lanes<T>;
    state.forward.non_temporal = stores_non_temporal<Cell>(p, team.threads());
  }

  // Returns false if there is not enough memory.
  bool allocate() {
    ForwardState<T>& forward = state.forward;
    const ptrdiff_t stride = forward.stride, threads = team.threads();
    if (!direct) workspace.reserve(product.panels, blocks * product.panel_size);
    for (T*& h : forward.h) workspace.reserve(h, B * stride);
    workspace.reserve(forward.c, B * stride);
    workspace.reserve(state.out, B * stride);
    workspace.reserve(forward.bias, kPre<Cell> * stride);
    workspace.reserve(forward.weights, Cell::kWeights * stride);
    workspace.reserve(state.raw, B * G * H);
    workspace.reserve(state.fresh, B * H);
    workspace.reserve(moments, threads * B);
    workspace.reserve(of_raw, threads * Shared<T, 3>::size(B));
    workspace.reserve(of_c, threads * Shared<T, 3>::size(B));
    workspace.reserve(team.barriers, threads);
    if (!workspace.allocate()) return false;
    spread_rows(forward.bias, stride, pass.bias, kPre<Cell>, H);
    spread_rows(forward.weights, stride, pass.weights.unit_weights, Cell::kWeights, H);
    return true;
  }

  void prepare(const Member& me) const {
    if (!direct) pack_blocks(me, blocks, [&](ptrdiff_t u) { product.pack(u); });
    if (!me.share.idle) take_state<Cell>(pass, state.forward, me);
  }
};

// Runs a thread's share of all steps.
template <class Cell, typename T>
struct NormForwardWalk {
  static constexpr int G = Cell::kGates, L = Lanes<T>;
  typedef NormForwardPlan<Cell, T> Plan;

  const Plan& plan;
  const Member& me;
  const RnnForward<T>& p = plan.pass;
  const NormState<T>& state = plan.state;
  const RowShare& rows = me.rows;
  const Blocks mine = blocks_of(me, plan.blocks);
  const ptrdiff_t own = mine.begin * L, own_units = min_of(mine.end * L, plan.H) - own;
  RowMoments<T>* const moments = plan.moments + me.thread * plan.B;
  const Shared<T, 3> of_raw = Shared<T, 3>::of(plan.of_raw, me, plan.B);
  const Shared<T, 3> of_c = Shared<T, 3>::of(plan.of_c, me, plan.B);
  alignas(64) T pre[kChunk * kColumns * L];

  NormForwardWalk(const Plan& plan, const Member& me) : plan(plan), me(me) {}

  // Computes raw = W_hh h' and the moments of this thread's units.
  void multiply(const ForwardStep& step) {
    const ForwardState<T>& forward = state.forward;
    const ptrdiff_t H = plan.H;
    const T* const h_prev = forward.h[step.s & 1];
    for_blocks(me, plan.blocks, step.s, step.running, [&](ptrdiff_t u, ptrdiff_t i, ptrdiff_t count) {
      const int units = int(min_of(L, H - u * L));
      plan.product(count, h_prev + rows.at(i) * forward.h_stride, rows.step * forward.h_stride, u, pre);
      for (ptrdiff_t row = 0; row < count; ++row) {
        T* const raw = state.raw + rows.at(i + row) * G * H + u * L;
        for (int g = 0; g < G; ++g) store_some(raw + g * H, load(pre + (row * G + g) * L), units);
      }
    });
    for (ptrdiff_t i = 0; i < step.running; ++i) {
      share_moments(of_raw, me, i, moments_of(state.raw + rows.at(i) * G * H + own, own_units, G, H));
    }
  }

  // Computes the moments of whole rows, and calls keep(stats, moments) for each if a backward pass follows.
  template <class Keep>
  SEQACCEL_INLINE void join(const ForwardStep& step, const Shared<T, 3>& shared, const Keep& keep) const {
    for (ptrdiff_t i = 0; i < step.running; ++i) {
      moments[i] = join_moments(shared, me, i);
      if (p.stats && me.share.group == 0) keep(p.stats + p.rows.packed(step.t, rows.at(i)) * kNormStats, moments[i]);
    }
  }

  // Normalises raw and runs the cell.
  void cell_stage(const ForwardStep& step) {
    join(step, of_raw, [](T* stats, const RowMoments<T>& of_row) {
      stats[kScaleH] = of_row.scale;
      stats[kMeanC] = stats[kScaleC] = T(0);
    });
    for_units<T>(me, plan.H, [&](ptrdiff_t unit, int) {
      norm_update<Cell, T>(p, state, rows, step.s, step.t, step.running, unit, moments);
    });
  }

  // Normalises c and computes h.
  void finish_stage(const ForwardStep& step) {
    for (ptrdiff_t i = 0; i < step.running; ++i) {
      share_moments(of_c, me, i, moments_of(state.fresh + rows.at(i) * plan.H + own, own_units));
    }
    me.wait();
    join(step, of_c, [](T* stats, const RowMoments<T>& of_row) {
      stats[kMeanC] = of_row.mean;
      stats[kScaleC] = of_row.scale;
    });
    for_units<T>(me, plan.H, [&](ptrdiff_t unit, int) {
      norm_finish<Cell, T>(p, state, rows, step.s, step.t, step.running, unit, moments);
    });
  }

  void run() {
    for (ptrdiff_t s = 0; s < plan.steps; ++s) {
      const ForwardStep step = forward_step(p.rows, p.reverse, rows, s);
      fetch_rows(me, state.forward.h[s & 1], state.forward.h_stride, plan.H, step.running);
      multiply(step);
      me.wait();
      cell_stage(step);
      if constexpr (Cell::kNormC) finish_stage(step);
      me.wait();
    }
    give_state<Cell>(p, state.forward, me);
    fence_stores();
  }
};

template <class Cell, typename T>
bool norm_forward(const RnnForward<T>& p) {
  NormForwardPlan<Cell, T> plan(p);
  if (!plan.allocate()) return false;
  plan.team.run([&](const Member& me) { plan.prepare(me); },
                [&](const Member& me) { NormForwardWalk<Cell, T>(plan, me).run(); });
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
