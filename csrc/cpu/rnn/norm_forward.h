// The recurrence of a layer whose cell normalises its products (kNorm), forward. A step has the stages
//   raw [rows, G, L] = h' [rows, H] * panel [H, G, L]           for every block of units
//   saved, c = Cell::forward(gamma_1 x[t] + gamma_2 LN(raw) + bias, c')
//   h = Cell::finish(gamma LN(c) + beta)                        with kNormC; else the second stage gives h
// with x[t] normalised beforehand. Threads that share the units meet after each; of a row's statistics each has those
// of its own units, and joins them with the others' behind the barrier.
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

// Unit `unit` of `count` rows at time t: the gates. `moments` of raw.
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

// c normalised, and h. `moments` of c.
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

template <class Cell, typename T>
bool norm_forward(const RnnForward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  typedef UnitProduct<T, G> Product;
  const ptrdiff_t H = p.hidden, B = p.rows.batch, steps = p.rows.steps;
  const ptrdiff_t blocks = Product::blocks(H), weights = G * H * H, weight_bytes = weights * ptrdiff_t(sizeof(T));
  const bool direct = H >= L && steps * B <= kDirectRows;
  const Split planned = split_work(team_size(), steps, B, weights, weight_bytes, blocks);
  const int threads = planned.threads();
  Product product{p.weights.hh, H, H, nullptr, Product::panel_values(H)};
  product.far = beyond_l2(weight_bytes / planned.groups);

  NormState<T> norm;
  ForwardState<T>& state = norm.forward;
  state.stride = state.h_stride = (panel_count(H, L) + 1) * L;
  state.non_temporal = stores_non_temporal<Cell>(p, threads);
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(direct ? 0 : blocks * product.panel_size);
  const size_t state_at = workspace.reserve<T>((4 * B + kPre<Cell> + Cell::kWeights) * state.stride);
  const size_t raw_at = workspace.reserve<T>(B * (G + 1) * H + L);
  const size_t moments_at = workspace.reserve<RowMoments<T>>(threads * B);
  const size_t shared_at = workspace.reserve<T>(2 * threads * Shared<T, 3>::size(B));
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  if (!direct) product.panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.h[0] = workspace.at<T>(state_at);
  state.h[1] = state.h[0] + B * state.stride;
  state.c = state.h[1] + B * state.stride;
  norm.out = state.c + B * state.stride;
  state.bias = norm.out + B * state.stride;
  state.weights = state.bias + kPre<Cell> * state.stride;
  norm.raw = workspace.at<T>(raw_at);
  norm.fresh = norm.raw + B * G * H;
  spread_rows(state.bias, state.stride, p.bias, kPre<Cell>, H);
  spread_rows(state.weights, state.stride, p.weights.unit_weights, Cell::kWeights, H);

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_work(team, steps, B, weights, weight_bytes, blocks);
    const Member me = member_of(split, thread, p.rows, barriers);
    const RowShare& rows = me.rows;
    if (!direct) pack_blocks(me, blocks, [&](ptrdiff_t u) { product.pack(u); });
    if (!me.share.idle) take_state<Cell>(p, state, me);
#pragma omp barrier
    if (!me.share.idle) {
      alignas(64) T pre[kChunk * kColumns * L];
      RowMoments<T>* const moments = workspace.at<RowMoments<T>>(moments_at) + thread * B;
      T* const shared = workspace.at<T>(shared_at);
      const Shared<T, 3> of_raw = Shared<T, 3>::of(shared, me, B);
      const Shared<T, 3> of_c = Shared<T, 3>::of(shared + threads * Shared<T, 3>::size(B), me, B);
      static_assert(Product::U == 1, "a thread's blocks are its vectors of units");
      const Blocks mine = blocks_of(me, blocks);
      const ptrdiff_t own = mine.begin * L, own_units = min_of(mine.end * L, H) - own;
      for (ptrdiff_t s = 0; s < steps; ++s) {
        const ptrdiff_t t = p.reverse ? steps - 1 - s : s;
        const T* const h_prev = state.h[s & 1];
        const ptrdiff_t running = p.rows.running ? rows.among(p.rows.running[t]) : rows.size;
        fetch_rows(me, h_prev, state.h_stride, H, running);
        for_blocks(me, blocks, s, running, [&](ptrdiff_t u, ptrdiff_t i, ptrdiff_t count) {
          const int units = int(min_of(L, H - u * L));
          product(count, h_prev + rows.at(i) * state.h_stride, rows.step * state.h_stride, u, pre);
          for (ptrdiff_t row = 0; row < count; ++row) {
            T* const raw = norm.raw + rows.at(i + row) * G * H + u * L;
            for (int g = 0; g < G; ++g) store_some(raw + g * H, load(pre + (row * G + g) * L), units);
          }
        });
        for (ptrdiff_t i = 0; i < running; ++i) {
          share_moments(of_raw, me, i, moments_of(norm.raw + rows.at(i) * G * H + own, own_units, G, H));
        }
        me.wait();
        for (ptrdiff_t i = 0; i < running; ++i) {
          const ptrdiff_t b = rows.at(i);
          moments[i] = join_moments(of_raw, me, i);
          if (p.stats && me.share.group == 0) {
            T* const stats = p.stats + p.rows.packed(t, b) * kNormStats;
            stats[kScaleH] = moments[i].scale;
            stats[kMeanC] = stats[kScaleC] = T(0);
          }
        }
        for_units<T>(me, H,
                     [&](ptrdiff_t unit, int) { norm_update<Cell, T>(p, norm, rows, s, t, running, unit, moments); });
        if constexpr (Cell::kNormC) {
          for (ptrdiff_t i = 0; i < running; ++i) {
            share_moments(of_c, me, i, moments_of(norm.fresh + rows.at(i) * H + own, own_units));
          }
          me.wait();
          for (ptrdiff_t i = 0; i < running; ++i) {
            const ptrdiff_t b = rows.at(i);
            moments[i] = join_moments(of_c, me, i);
            if (p.stats && me.share.group == 0) {
              T* const stats = p.stats + p.rows.packed(t, b) * kNormStats;
              stats[kMeanC] = moments[i].mean;
              stats[kScaleC] = moments[i].scale;
            }
          }
          for_units<T>(me, H,
                       [&](ptrdiff_t unit, int) { norm_finish<Cell, T>(p, norm, rows, s, t, running, unit, moments); });
        }
        me.wait();
      }
      give_state<Cell>(p, state, me);
      fence_stores();
    }
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
