// The recurrence of a layer, forward, for every cell of cells.h.
//
// A step, for a block of L = Lanes<T> hidden units (4 L with one gate):
//   pre [rows, G, L] = h' [rows, P] * panel [P, G, L]     all gates of the block's units lie side by side
//   saved, c, h = Cell::forward(pre + x[t] + bias, ...)   right behind the product, from L1
// Panels of W_hh and W_ih are packed once a call. The input's part is calculated some steps ahead (InputAhead), or with
// rows enough beside the recurrent part, and never leaves L1. Up to kDirectRows rows in all a product is bound by
// reading W_hh, and dot products along its own rows do as well; nothing is packed.
//
// Threads share the units, each its half of the weights in its own L2, and meet once a step at a barrier that yields
// after a bounded spin; the batch is split only where the weights are small or rows are many (kRowsPerThread), and its
// parts never wait for each other. On odd steps the blocks run backwards, so that those read last, still in L2, come
// first: 24.1 us a step instead of 26.6 for the backward product of 1 row, H = 512, on two Zen 4 cores with 1 MB of L2
// each.
#pragma once

#include "rnn_blocks.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

// State between the steps of a pass; rows are `stride` apart: whole vectors, and never a multiple of a page.
template <typename T>
struct ForwardState {
  T* h[2];     // [B, h_stride], of the step before and of this one
  T* c;        // [B, stride]
  T* bias;     // [kPre, stride]
  T* weights;  // [kWeights, stride]
  ptrdiff_t stride, h_stride;
};

// Rows [i0, i1) of a share at the s-th step, at time t; products lie pre_row apart. x_pre: the input's part, where it
// is not added up in `pre`.
template <class Cell, typename T>
void forward_update(const RnnForward<T>& p, const ForwardState<T>& state, const RowShare& share, ptrdiff_t s,
                    ptrdiff_t t, ptrdiff_t i0, ptrdiff_t i1, ptrdiff_t unit, const T* pre, const T* x_pre,
                    ptrdiff_t pre_row) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  const ptrdiff_t H = p.hidden;
  const int units = int(min_of(L, H - unit));
  const T* const h_prev = state.h[s & 1] + unit;
  T* const h_next = state.h[(s + 1) & 1] + unit;
  Unit<Cell, Vec<T>> common;
#pragma GCC unroll 8
  for (int g = 0; g < kPre<Cell>; ++g) common.pre[g] = load(state.bias + g * state.stride + unit);
#pragma GCC unroll 16
  for (int w = 0; w < Cell::kWeights; ++w) common.weights[w] = load(state.weights + w * state.stride + unit);
  for (ptrdiff_t i = i0; i < i1; ++i) {
    const ptrdiff_t b = share.at(i), packed = p.rows.packed(t, b), padded = p.rows.padded(t, b);
    Unit<Cell, Vec<T>> u = common;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const T* const product = pre + (i - i0) * pre_row + g * L;
      if (p.x) {
        u.pre[g] = load_some(p.x + packed * p.x_row + g * H + unit, units) + u.pre[g];
      } else if (Cell::kApart) {
        u.pre[g] = load(x_pre + (i - i0) * pre_row + g * L) + u.pre[g];
      }
      const int sum = Cell::kApart && g == G - 1 ? G : g;
      u.pre[sum] = load(product) + u.pre[sum];
    }
    const bool blend_h = Cell::kZoneout && p.zoneout_h.factors, blend_c = Cell::kZoneout && p.zoneout_c.factors;
    if (Cell::kUsesPrev || blend_h) u.h_prev = load(h_prev + b * state.h_stride);
    if constexpr (Cell::kHasCell) u.c_prev = load(state.c + b * state.stride + unit);
    Cell::template forward<Functions<T>>(u);
    if (blend_h) {
      const Vec<T> z = blend_at(p.zoneout_h, padded * H + unit, units);
      u.h = z * u.h_prev + (1 - z) * u.h;
    }
    store(h_next + b * state.h_stride, u.h);
    store_some(p.output + padded * H + unit, u.h, units);
    if constexpr (Cell::kHasCell) {
      if (blend_c) {
        const Vec<T> z = blend_at(p.zoneout_c, padded * H + unit, units);
        u.c = z * u.c_prev + (1 - z) * u.c;
      }
      store(state.c + b * state.stride + unit, u.c);
      if (p.cells) store_some(p.cells + packed * H + unit, u.c, units);
    }
    if (Cell::kSaved > 0 && p.saved) {
      T* const saved = p.saved + packed * Cell::kSaved * H + unit;
#pragma GCC unroll 8
      for (int g = 0; g < Cell::kSaved; ++g) store_some(saved + g * H, u.saved[g], units);
    }
  }
}

// The buffer of state.h that holds a row's state after the last step.
inline int last_buffer(const RnnRows& rows, bool reverse, ptrdiff_t b) {
  if (reverse || !rows.running) return rows.steps & 1;
  ptrdiff_t steps = 0;
  while (steps < rows.steps && b < rows.running[steps]) ++steps;
  return steps & 1;
}

template <class Cell, typename T>
bool rnn_forward(const RnnForward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  typedef UnitProduct<T, G> Product;
  typedef InputAhead<T, G> Ahead;
  const ptrdiff_t H = p.hidden, B = p.rows.batch, steps = p.rows.steps;
  const ptrdiff_t blocks = Product::blocks(H);
  const bool direct = H >= L && p.input == nullptr && steps * B <= kDirectRows;
  const ptrdiff_t weights = G * H * H;
  const ptrdiff_t weight_bytes = weights * ptrdiff_t(sizeof(T));
  const ptrdiff_t inputs = p.input ? p.inputs : 0;
  const ptrdiff_t panel_size = Product::panel_values(inputs + H);
  const Split planned = split_work(omp_get_max_threads(), steps, B, weights, weight_bytes, blocks);
  const int threads = planned.threads();

  ForwardState<T> state;
  state.stride = state.h_stride = (panel_count(H, L) + 1) * L;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(direct ? 0 : blocks * panel_size);
  const size_t state_at = workspace.reserve<T>((3 * B + kPre<Cell> + Cell::kWeights) * state.stride);
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  const ptrdiff_t ahead_size = blocks * Ahead::capacity(B) * Product::V * L;
  const bool runs_ahead = p.input && Ahead::steps_ahead(B / planned.parts) > 1;
  const size_t ahead_at = workspace.reserve<T>(runs_ahead ? threads * ahead_size : 0);
  if (!workspace.allocate()) return false;
  T* const panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.h[0] = workspace.at<T>(state_at);
  state.h[1] = state.h[0] + B * state.stride;
  state.c = state.h[1] + B * state.stride;
  state.bias = state.c + B * state.stride;
  state.weights = state.bias + kPre<Cell> * state.stride;
  spread_rows(state.bias, state.stride, p.bias, kPre<Cell>, H);
  spread_rows(state.weights, state.stride, p.unit_weights, Cell::kWeights, H);
  const Product recurrent{p.weight, H, H, direct ? nullptr : panels + Product::panel_values(inputs), panel_size};
  const Product input{p.weight_ih, H, inputs, panels, panel_size};

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_work(team, steps, B, weights, weight_bytes, blocks);
    const Share share = share_of(split, thread, B, blocks);
    const RowShare rows = row_share(split, share, p.rows);
    for (ptrdiff_t u = thread; u < blocks && !direct; u += team) {
      if (p.input) input.pack(u);
      recurrent.pack(u);
    }
    const ptrdiff_t first_unit = share.u0 * Product::U * L, last_unit = min_of(H, share.u1 * Product::U * L);
    for (ptrdiff_t unit = first_unit; unit < last_unit && !share.idle; unit += L) {
      const int units = int(min_of(L, H - unit));
      for (ptrdiff_t i = 0; i < rows.size; ++i) {
        const ptrdiff_t b = rows.at(i), from = p.rows.row(b) * H + unit;
        const Vec<T> h = load_some(p.h_0 + from, units);
        store(state.h[0] + b * state.h_stride + unit, h);
        if (p.rows.running) store(state.h[1] + b * state.h_stride + unit, h);
        if (Cell::kHasCell) store(state.c + b * state.stride + unit, load_some(p.c_0 + from, units));
      }
    }
#pragma omp barrier
    if (!share.idle) {
      alignas(64) T pre[kChunk * Product::V * L];
      alignas(64) T x_pre[Cell::kApart ? kChunk * Product::V * L : 1];
      Ahead ahead{input,
                  p.input,
                  p.rows,
                  rows,
                  workspace.at<T>(ahead_at) + thread * ahead_size,
                  runs_ahead ? Ahead::steps_ahead(rows.size) : 1,
                  Ahead::capacity(B)};
      for (ptrdiff_t s = 0; s < steps; ++s) {
        const ptrdiff_t t = p.reverse ? steps - 1 - s : s;
        const T* const h_prev = state.h[s & 1];
        if (ahead.steps > 1 && s % ahead.steps == 0) {
          const ptrdiff_t count = min_of(ahead.steps, steps - s), low = p.reverse ? t - count + 1 : t;
          ahead.fill(low, low + count, share.u0, share.u1);
        }
        const ptrdiff_t running = p.rows.running ? rows.among(p.rows.running[t]) : rows.size;
        for (ptrdiff_t j = share.u0; j < share.u1; ++j) {
          const ptrdiff_t u = s & 1 ? share.u0 + share.u1 - 1 - j : j;
          for (ptrdiff_t i = 0; i < running; i += kChunk) {
            const ptrdiff_t count = min_of(kChunk, running - i), b = rows.at(i);
            T* x_sum = Cell::kApart ? x_pre : pre;
            if (ahead.steps > 1) {
              x_sum = ahead.at(u - share.u0, t) + i * Product::V * L;
            } else if (p.input) {
              input(count, p.input + p.rows.packed(t, b) * inputs, rows.step * inputs, u, x_sum);
            }
            T* const sum = Cell::kApart ? pre : x_sum;
            recurrent(count, h_prev + b * state.h_stride, rows.step * state.h_stride, u, sum, p.input && !Cell::kApart);
            for (int v = 0; v < Product::U && (u * Product::U + v) * L < H; ++v) {
              forward_update<Cell, T>(p, state, rows, s, t, i, i + count, (u * Product::U + v) * L, sum + v * L, x_sum,
                                      Product::V * L);
            }
          }
        }
        wait_for_all(barriers[share.part], split.groups);
      }
      for (ptrdiff_t i = 0; i < rows.size; ++i) {
        const ptrdiff_t b = rows.at(i), to = p.rows.row(b) * H;
        const T* const h = state.h[last_buffer(p.rows, p.reverse, b)] + b * state.h_stride;
        for (ptrdiff_t unit = first_unit; unit < last_unit; unit += L) {
          const int units = int(min_of(L, H - unit));
          store_some(p.h_n + to + unit, load(h + unit), units);
          if (Cell::kHasCell) store_some(p.c_n + to + unit, load(state.c + b * state.stride + unit), units);
        }
      }
    }
  }
  return true;
}

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
