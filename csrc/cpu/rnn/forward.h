// The recurrence of a layer, forward, for every cell of product_cells.h without layer norm.
//
// A step computes, for each block of L = Lanes<T> hidden units (4 L for a cell with one gate):
//   pre [rows, G, L] = h' [rows, P] * panel [P, G, L]     all gates of the block's units lie side by side
//   saved, c, h = Cell::forward(pre + x[t] + bias, ...)   immediately after the product, from L1
// A cell with two products has a stage for each: source = Cell::first(h' panel + x[t]), then the two lines above with
// source in place of h'. With weight_hr, the h of Cell::forward is the source of a last stage.
//
// Panels of W_hh and W_ih are packed once per call. The input's part of pre, x, is computed in one of three places:
// before the pass, some steps ahead (InputAhead), or, with many rows, together with the recurrent part, so that it
// never leaves L1. Up to kDirectRows rows a product is bound by reading W_hh. Dot products along the rows of W_hh are
// then as fast, and nothing is packed.
//
// Threads share the units. Each keeps its part of the weights in its own L2, and all meet after every stage at a
// barrier, which yields after a bounded spin. The batch is split only where a part has enough rows (kRowsPerThread;
// kRowsFromL2 where all weights fit in L2); the parts never wait for each other. On odd steps the blocks run backwards:
// the last ones of the step before are still in L2 (backward product of 1 row, H = 512, two Zen 4 cores with 1 MB of L2
// each: 24.1 us per step instead of 26.6).
#pragma once

#include "cpu/rnn/blocks.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

// The state between the steps of a pass. Rows are `stride` apart: whole vectors, and one more, so that a row's size is
// never a multiple of a page.
template <typename T>
struct ForwardState {
  T* h[2];     // [B, h_stride]: h of the step before and of this one
  T* c;        // [B, stride]
  T* source;   // [B, stride]: what the second of two products multiplies
  T* bias;     // [kPre, stride]
  T* weights;  // [kWeights, stride]
  ptrdiff_t stride, h_stride;
  bool non_temporal;  // what is kept for the backward pass is stored non-temporally
};

// Whether to use non-temporal stores for what a pass keeps: if that exceeds the L2 of its threads. Regular stores would
// first read each line and evict what the next step needs (LSTM (T, B, H) = (128, 64, 256): forward 8% faster, training
// 2%). They are not used for the output, which the next layer reads soon (a stack of RNN (128, 64, 256): 4% slower),
// nor for lines that x was just read from, which are in the caches anyway.
template <class Cell, typename T>
bool stores_non_temporal(const RnnForward<T>& p, int threads) {
  const ptrdiff_t last = p.rows.steps - 1, rows = p.rows.packed(last, 0) + p.rows.count(last);
  const ptrdiff_t values = Cell::kSaved + Cell::kHasCell;
  const auto aligned = [](const T* at) { return reinterpret_cast<uintptr_t>(at) % SEQACCEL_VECTOR_BYTES == 0; };
  return kNonTemporalStores && p.saved && p.saved != p.x && p.hidden % Lanes<T> == 0 && aligned(p.saved) &&
         aligned(p.cells) && beyond_l2(rows * values * p.hidden * ptrdiff_t(sizeof(T)) / threads);
}

// The s-th step, at time t. The first `running` of a thread's rows run.
struct ForwardStep {
  ptrdiff_t s, t, running;
};

inline ForwardStep forward_step(const RnnRows& rows, bool reverse, const RowShare& share, ptrdiff_t s) {
  const ptrdiff_t t = reverse ? rows.steps - 1 - s : s;
  return {s, t, rows.running ? share.among(rows.running[t]) : share.size};
}

// The products of a block of units and a chunk of rows.
template <typename T>
struct Products {
  const T* pre;    // of the main or the first product; rows are `row` apart
  const T* x_pre;  // the input's part if `pre` does not include it
  ptrdiff_t row;
};

// Blends the new h of a row and stores it for the next step and in the output.
template <typename T>
SEQACCEL_INLINE void put_h(const RnnForward<T>& p, const ForwardState<T>& state, ptrdiff_t s, ptrdiff_t b,
                           ptrdiff_t padded, ptrdiff_t unit, int units, bool blend, Vec<T> h) {
  if (blend) {
    const Vec<T> z = blend_at(p.zoneout_h, padded * p.outputs + unit, units);
    h = z * load(state.h[s & 1] + b * state.h_stride + unit) + (1 - z) * h;
  }
  store(state.h[(s + 1) & 1] + b * state.h_stride + unit, h);
  store_some(p.output + padded * p.outputs + unit, h, units);
}

// Updates `count` rows of a share from i0 on and U vectors of units, at the s-th step, at time t. First: after the
// first of two products.
template <class Cell, typename T, bool First, int U>
void forward_update(const RnnForward<T>& p, const ForwardState<T>& state, const RowShare& share, ptrdiff_t s,
                    ptrdiff_t t, ptrdiff_t i0, ptrdiff_t count, ptrdiff_t first_unit, const Products<T>& products) {
  constexpr int L = Lanes<T>, kBegin = Cell::kFirstBegin, kEnd = Cell::kFirstEnd;
  const ptrdiff_t H = p.hidden;
  const bool blend_h = Cell::kZoneout && p.zoneout_h.factors, blend_c = Cell::kZoneout && p.zoneout_c.factors;
  const bool projected = Cell::kProjects && p.weights.hr;
  Unit<Cell, Vec<T>> common[U];
#pragma GCC unroll 4
  for (int v = 0; v < U; ++v) {
    const ptrdiff_t unit = min_of(first_unit + v * L, H - 1) / L * L;
#pragma GCC unroll 8
    for (int g = 0; g < kPre<Cell>; ++g) common[v].pre[g] = load(state.bias + g * state.stride + unit);
#pragma GCC unroll 16
    for (int w = 0; w < Cell::kWeights; ++w) common[v].weights[w] = load(state.weights + w * state.stride + unit);
  }
  for (ptrdiff_t i = 0; i < count; ++i) {
    const ptrdiff_t b = share.at(i0 + i), packed = p.rows.packed(t, b), padded = p.rows.padded(t, b);
    const ptrdiff_t x_at = (p.x_padded ? padded : packed) * p.x_row;
#pragma GCC unroll 4
    for (int v = 0; v < U; ++v) {
      const ptrdiff_t unit = first_unit + v * L;
      if (U > 1 && unit >= H) break;
      const int units = int(min_of(L, H - unit));
      const T* const h_prev = state.h[s & 1] + unit;
      T* const saved = p.saved + packed * Cell::kSaved * H + unit;
      const T* const product = products.pre + i * products.row + v * L;
      Unit<Cell, Vec<T>> u = common[v];
#pragma GCC unroll 8
      for (int g = 0; g < kInputs<Cell>; ++g) {
        if ((g >= kBegin && g < kEnd) != First) continue;
        if (p.x) {
          u.pre[g] = load_some(p.x + x_at + g * H + unit, units) + u.pre[g];
        } else if (Cell::kSeparate) {
          u.pre[g] = load(products.x_pre + i * products.row + v * L + g * L) + u.pre[g];
        }
      }
#pragma GCC unroll 8
      for (int g = 0; g < (First ? Cell::kFirst : kMain<Cell>); ++g) {
        const int at = First                                     ? Cell::kFirstPre + g
                       : Cell::kSeparate && g == kMain<Cell> - 1 ? g + 1
                                                                 : Cell::kMainPre + g;
        u.pre[at] = load(product + g * L) + u.pre[at];
      }
      if (Cell::kUsesPrev) u.h_prev = load(h_prev + b * state.h_stride);
      if constexpr (First) {
        Cell::template first<Functions<T>>(u);
        store(state.source + b * state.stride + unit, u.source);
      } else {
#pragma GCC unroll 8
        for (int g = kBegin; g < kEnd; ++g) u.saved[g] = load_some(saved + g * H, units);
        if constexpr (Cell::kHasCell) u.c_prev = load(state.c + b * state.stride + unit);
        Cell::template forward<Functions<T>>(u);
        if (projected) {
          store(state.source + b * state.stride + unit, u.h);
        } else {
          put_h(p, state, s, b, padded, unit, units, blend_h, u.h);
        }
        if constexpr (Cell::kHasCell) {
          if (blend_c) {
            const Vec<T> z = blend_at(p.zoneout_c, padded * H + unit, units);
            u.c = z * u.c_prev + (1 - z) * u.c;
          }
          store(state.c + b * state.stride + unit, u.c);
          if (p.cells) store_some(p.cells + packed * H + unit, u.c, units, state.non_temporal);
        }
      }
      if (Cell::kSaved > 0 && p.saved) {
#pragma GCC unroll 8
        for (int g = 0; g < Cell::kSaved; ++g) {
          if ((g >= kBegin && g < kEnd) == First)
            store_some(saved + g * H, u.saved[g], units, !First && state.non_temporal);
        }
      }
    }
  }
}

// Lists the input of the rows [i0, i0 + count) at time t for prefetching: (128, 64, 256) is 2% slower without.
template <typename T>
void list_input(const RnnForward<T>& p, const RowShare& share, ptrdiff_t t, ptrdiff_t i0, ptrdiff_t count,
                PrefetchList& lines) {
  constexpr ptrdiff_t kBytes = 2 * kLine, kValues = kBytes / ptrdiff_t(sizeof(T));
  const ptrdiff_t end = min_of(i0 + count, share.among(p.rows.count(t)));
  lines.begin<kBytes>(max_of(0, end - i0) * panel_count(p.inputs, kValues));
  for (ptrdiff_t i = i0; i < end; ++i) {
    const T* const row = p.input + p.rows.packed(t, share.at(i)) * p.inputs;
    for (ptrdiff_t k = 0; k < p.inputs; k += kValues) lines.add<kBytes>(row + k);
  }
}

// The buffer of state.h that holds a row's state after the last step.
inline int last_buffer(const RnnRows& rows, bool reverse, ptrdiff_t b) {
  if (reverse || !rows.running) return rows.steps & 1;
  ptrdiff_t steps = 0;
  while (steps < rows.steps && b < rows.running[steps]) ++steps;
  return steps & 1;
}

// Copy h_0 and c_0 of a thread's rows and units to the state, and the state to h_n and c_n.
template <class Cell, typename T>
void take_state(const RnnForward<T>& p, const ForwardState<T>& state, const Member& me) {
  for_units<T>(me, p.outputs, [&](ptrdiff_t unit, int units) {
    for (ptrdiff_t i = 0; i < me.rows.size; ++i) {
      const ptrdiff_t b = me.rows.at(i);
      const Vec<T> h = load_some(p.h_0 + p.rows.row(b) * p.outputs + unit, units);
      store(state.h[0] + b * state.h_stride + unit, h);
      if (p.rows.running) store(state.h[1] + b * state.h_stride + unit, h);
    }
  });
  if (!Cell::kHasCell) return;
  for_units<T>(me, p.hidden, [&](ptrdiff_t unit, int units) {
    for (ptrdiff_t i = 0; i < me.rows.size; ++i) {
      const ptrdiff_t b = me.rows.at(i);
      store(state.c + b * state.stride + unit, load_some(p.c_0 + p.rows.row(b) * p.hidden + unit, units));
    }
  });
}

template <class Cell, typename T>
void give_state(const RnnForward<T>& p, const ForwardState<T>& state, const Member& me) {
  for (ptrdiff_t i = 0; i < me.rows.size; ++i) {
    const ptrdiff_t b = me.rows.at(i), row = p.rows.row(b);
    const T* const h = state.h[last_buffer(p.rows, p.reverse, b)] + b * state.h_stride;
    for_units<T>(me, p.outputs,
                 [&](ptrdiff_t unit, int units) { store_some(p.h_n + row * p.outputs + unit, load(h + unit), units); });
    if (!Cell::kHasCell) continue;
    for_units<T>(me, p.hidden, [&](ptrdiff_t unit, int units) {
      store_some(p.c_n + row * p.hidden + unit, load(state.c + b * state.stride + unit), units);
    });
  }
}

// What is the same in every step of a pass: sizes, products, the threads' shares, and memory.
template <class Cell, typename T>
struct ForwardPlan {
  static constexpr bool kTwo = Cell::kFirst > 0;
  typedef UnitProduct<T, kMain<Cell>> Main;
  typedef UnitProduct<T, kTwo ? Cell::kFirst : 1> First;
  typedef UnitProduct<T, 1> Last;
  typedef InputAhead<T, kMain<Cell>> Ahead;

  const RnnForward<T>& pass;
  const ptrdiff_t H = pass.hidden, P = pass.outputs, B = pass.rows.batch, steps = pass.rows.steps;
  const ptrdiff_t inputs = pass.input ? pass.inputs : 0;  // 0: W_ih x is computed before the pass
  const bool projected = Cell::kProjects && pass.weights.hr;
  const bool direct = H >= Lanes<T> && pass.input == nullptr && steps * B <= kDirectRows;  // nothing is packed
  Main main{pass.weights.hh, H, P}, input{pass.weight_ih, H, inputs};
  First first{pass.weights.mh, H, P};
  Last last{pass.weights.hr, P, H};
  const ptrdiff_t main_blocks = Main::blocks(H), first_blocks = kTwo ? First::blocks(H) : 0;
  const ptrdiff_t last_blocks = projected ? Last::blocks(P) : 0;
  const ptrdiff_t weights = recurrent_weights<Cell>(H, P, projected);
  Team team{pass.rows, weights, (weights + kMain<Cell> * H * inputs) * ptrdiff_t(sizeof(T)), main_blocks};
  ForwardState<T> state;
  const bool runs_ahead = pass.input && Ahead::steps_ahead(B / team.planned.parts) > 1;  // see InputAhead
  const ptrdiff_t ahead_size = main_blocks * Ahead::capacity(B) * Main::V * Lanes<T>;
  T* ahead;  // [threads, ahead_size], if (runs_ahead)
  Workspace workspace;

  explicit ForwardPlan(const RnnForward<T>& p) : pass(p) {
    if (kTwo && !Cell::kExtra) {
      first.weight = p.weights.hh;
      main.weight = p.weights.hh + Cell::kFirst * H * P;
    }
    main.far = input.far = first.far = last.far = team.far();
    input.panel_size = main.panel_size = Main::panel_values(inputs + P);
    first.panel_size = First::panel_values(P);
    last.panel_size = Last::panel_values(H);
    state.stride = (panel_count(H, Lanes<T>) + 1) * Lanes<T>;
    state.h_stride = (panel_count(P, Lanes<T>) + 1) * Lanes<T>;
    state.non_temporal = stores_non_temporal<Cell>(p, team.threads());
  }

  // Returns false if there is not enough memory.
  bool allocate() {
    if (!direct) {
      workspace.reserve(input.panels, main_blocks * main.panel_size);
      workspace.reserve(first.panels, first_blocks * first.panel_size);
      workspace.reserve(last.panels, last_blocks * last.panel_size);
    }
    workspace.reserve(ahead, runs_ahead ? team.threads() * ahead_size : 0);
    for (T*& h : state.h) workspace.reserve(h, B * state.h_stride);
    workspace.reserve(state.c, B * state.stride);
    workspace.reserve(state.source, B * state.stride);
    workspace.reserve(state.bias, kPre<Cell> * state.stride);
    workspace.reserve(state.weights, Cell::kWeights * state.stride);
    workspace.reserve(team.barriers, team.threads());
    if (!workspace.allocate()) return false;
    if (!direct) main.panels = input.panels + Main::panel_values(inputs);
    spread_rows(state.bias, state.stride, pass.bias, kPre<Cell>, H);
    spread_rows(state.weights, state.stride, pass.weights.unit_weights, Cell::kWeights, H);
    return true;
  }

  void prepare(const Member& me) const {
    if (!direct) {
      pack_blocks(me, main_blocks, [&](ptrdiff_t u) {
        if (pass.input) input.pack(u);
        main.pack(u);
      });
      pack_blocks(me, first_blocks, [&](ptrdiff_t u) { first.pack(u); });
      pack_blocks(me, last_blocks, [&](ptrdiff_t u) { last.pack(u); });
    }
    if (!me.share.idle) take_state<Cell>(pass, state, me);
  }
};

// Runs a thread's share of all steps.
template <class Cell, typename T>
struct ForwardWalk {
  static constexpr int L = Lanes<T>;
  typedef ForwardPlan<Cell, T> Plan;
  typedef typename Plan::Main Main;
  typedef typename Plan::First First;
  typedef typename Plan::Last Last;
  typedef typename Plan::Ahead Ahead;

  const Plan& plan;
  const Member& me;
  const RnnForward<T>& p = plan.pass;
  const ForwardState<T>& state = plan.state;
  const RowShare& rows = me.rows;
  const Blocks mine = blocks_of(me, plan.main_blocks);
  Ahead ahead{plan.input,
              p.input,
              p.rows,
              rows,
              plan.ahead + me.thread * plan.ahead_size,
              plan.runs_ahead ? Ahead::steps_ahead(rows.size) : 1,
              Ahead::capacity(plan.B)};
  PrefetchList lines;
  alignas(64) T pre[kChunk * kColumns * L];
  alignas(64) T x_pre[Cell::kSeparate ? kChunk * Main::V * L : 1];

  ForwardWalk(const Plan& plan, const Member& me) : plan(plan), me(me) {}

  // Computes W_ih x of the next steps once those held before are used up.
  void look_ahead(const ForwardStep& step) {
    if (ahead.steps == 1 || step.s % ahead.steps != 0) return;
    const ptrdiff_t count = min_of(ahead.steps, plan.steps - step.s), low = p.reverse ? step.t - count + 1 : step.t;
    ahead.fill(low, low + count, mine.begin, mine.end);
  }

  // Runs the first of two products, and computes what the main one multiplies.
  void first_stage(const ForwardStep& step) {
    const T* const h_prev = state.h[step.s & 1];
    for_blocks(me, plan.first_blocks, step.s, step.running, [&](ptrdiff_t u, ptrdiff_t i, ptrdiff_t count) {
      plan.first(count, h_prev + rows.at(i) * state.h_stride, rows.step * state.h_stride, u, pre);
      forward_update<Cell, T, true, First::U>(p, state, rows, step.s, step.t, i, count, u * First::U * L,
                                              {pre, nullptr, First::V * L});
    });
  }

  // Runs the main product and the cell. W_ih x is computed here, unless it was before.
  void main_stage(const ForwardStep& step) {
    const T* const source = Plan::kTwo ? state.source : state.h[step.s & 1];
    const ptrdiff_t source_row = Plan::kTwo ? state.stride : state.h_stride, inputs = plan.inputs;
    for_blocks(me, plan.main_blocks, step.s, step.running, [&](ptrdiff_t u, ptrdiff_t i, ptrdiff_t count) {
      const ptrdiff_t b = rows.at(i);
      T* x_sum = Cell::kSeparate ? x_pre : pre;
      if (ahead.steps > 1) {
        x_sum = ahead.at(u - mine.begin, step.t) + i * Main::V * L;
      } else if (p.input) {
        plan.input(count, p.input + p.rows.packed(step.t, b) * inputs, rows.step * inputs, u, x_sum);
      }
      T* const sum = Cell::kSeparate ? pre : x_sum;
      // The product of the last block prefetches the input that the next step reads first.
      const bool fetches = p.input && ahead.steps == 1 && step.s + 1 < plan.steps && u == mine.last(step.s);
      if (fetches) list_input(p, rows, p.reverse ? step.t - 1 : step.t + 1, i, count, lines);
      plan.main(count, source + b * source_row, rows.step * source_row, u, sum, p.input && !Cell::kSeparate,
                fetches ? &lines : nullptr);
      forward_update<Cell, T, false, Main::U>(p, state, rows, step.s, step.t, i, count, u * Main::U * L,
                                              {sum, x_sum, Main::V * L});
    });
  }

  // Projects h.
  void last_stage(const ForwardStep& step) {
    for_blocks(me, plan.last_blocks, step.s, step.running, [&](ptrdiff_t u, ptrdiff_t i, ptrdiff_t count) {
      plan.last(count, state.source + rows.at(i) * state.stride, rows.step * state.stride, u, pre);
      for (int v = 0; v < Last::U && (u * Last::U + v) * L < plan.P; ++v) {
        const ptrdiff_t unit = (u * Last::U + v) * L;
        for (ptrdiff_t row = 0; row < count; ++row) {
          const ptrdiff_t b = rows.at(i + row);
          put_h(p, state, step.s, b, p.rows.padded(step.t, b), unit, int(min_of(L, plan.P - unit)),
                p.zoneout_h.factors != nullptr, load(pre + (row * Last::U + v) * L));
        }
      }
    });
  }

  void run() {
    for (ptrdiff_t s = 0; s < plan.steps; ++s) {
      const ForwardStep step = forward_step(p.rows, p.reverse, rows, s);
      look_ahead(step);
      fetch_rows(me, state.h[s & 1], state.h_stride, plan.P, step.running);
      if constexpr (Plan::kTwo) {
        first_stage(step);
        me.wait();
        fetch_rows(me, state.source, state.stride, plan.H, step.running);
      }
      main_stage(step);
      if (plan.projected) {
        me.wait();
        fetch_rows(me, state.source, state.stride, plan.H, step.running);
        last_stage(step);
      }
      me.wait();
    }
    give_state<Cell>(p, state, me);
    fence_stores();
  }
};

template <class Cell, typename T>
bool rnn_forward(const RnnForward<T>& p) {
  ForwardPlan<Cell, T> plan(p);
  if (!plan.allocate()) return false;
  plan.team.run([&](const Member& me) { plan.prepare(me); },
                [&](const Member& me) { ForwardWalk<Cell, T>(plan, me).run(); });
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
