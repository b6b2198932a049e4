// The recurrence of a layer whose cell normalises its products (kNorm), backward. A step has the stages
//   grad_h [rows, 4 L] = dL/d(W_hh h')[t+1] [rows, G*H] * panel [G*H, 4 L], and behind it
//     with kNormC: Cell::finish_backward, and grad_y = dL/d(LN(c)) of the row
//     else: Cell::backward, and grad_pre of the row
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
  T* grad_y;    // [B, H]: of c's norm: dL/d(LN(c)) gamma
  T* y;         // [B, H]: c normalised
};

// What the unit of a row needs at a step: saved values, the old state, and c before its norm.
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

// grad_pre of a unit and row i, b of the batch, to the row; its products with what they scaled to the sums: biases,
// then gamma_1 and gamma_2; and what the gradients of the norms need of it to of_pre: sums of g and g y, of the input's
// and of the recurrent one.
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

// The first stage, behind the product.
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
        // The part of dL/dc that zoneout sends to c' is added in the next stage, which finds the whole in grad_c.
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

// Behind c's norm.
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

template <class Cell, typename T>
bool norm_backward(const RnnBackward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>, kPres = kPre<Cell>, kSums = kPres + Cell::kWeights;
  typedef ColumnProduct<T> Product;
  const ptrdiff_t H = p.hidden, B = p.rows.batch, steps = p.rows.steps, row = p.grad_row;
  Product product = Product::of(p.weights.hh, H, G * H, steps * B <= kDirectRows);
  const ptrdiff_t blocks = Product::blocks(H), weights = G * H * H, weight_bytes = weights * ptrdiff_t(sizeof(T));
  const auto split_for = [&](int team) {
    return split_work(team, steps, B, weights, weight_bytes, blocks, backward_rows(H));
  };
  const Split planned = split_for(team_size());
  const int threads = planned.threads();
  product.far = beyond_l2(weight_bytes / planned.groups);

  NormBackwardState<T> norm;
  BackwardState<T>& state = norm.backward;
  state.stride = state.h_stride = blocks * Product::kWidth + L;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(product.panel_values());
  const size_t state_at = workspace.reserve<T>((2 * B + 2 * threads * kSums + Cell::kWeights) * state.stride);
  const size_t rows_at = workspace.reserve<T>(B * (kPres + 2) * H);
  const size_t norms_at = workspace.reserve<NormGrad<T>>(threads * B);
  const size_t own_at = workspace.reserve<T>(threads * B * 6 * L);
  const size_t shared_at = workspace.reserve<T>(threads * (Shared<T, 2>::size(B) + Shared<T, 4>::size(B)));
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  product.panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.grad_h = workspace.at<T>(state_at);
  state.grad_c = state.grad_h + B * state.stride;
  state.sums = state.grad_c + B * state.stride;
  state.weights = state.sums + 2 * threads * kSums * state.stride;
  norm.grad_pre = workspace.at<T>(rows_at);
  norm.grad_y = norm.grad_pre + B * kPres * H;
  norm.y = norm.grad_y + B * H;
  memset(state.sums, 0, sizeof(T) * size_t(2 * threads * kSums * state.stride));
  spread_rows(state.weights, state.stride, p.weights.unit_weights, Cell::kWeights, H);
  const T* const gamma_x = p.weights.unit_weights;
  const T* const gamma_h = gamma_x + G * H;
  int parts = 1;

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_for(team);
    const Member me = member_of(split, thread, p.rows, barriers);
    const RowShare& rows = me.rows;
    if (thread == 0) parts = split.parts;
    pack_blocks(me, blocks, [&](ptrdiff_t j) { product.pack(j); });
    if (!me.share.idle) take_grad_state<Cell>(p, state, me);
#pragma omp barrier
    if (!me.share.idle) {
      alignas(64) T out[kChunk * Product::kWidth];
      PrefetchList lines;
      T* const sums = state.sums + me.part() * 2 * kSums * state.stride;
      NormGrad<T>* const norms = workspace.at<NormGrad<T>>(norms_at) + thread * B;
      T* const own = workspace.at<T>(own_at) + thread * B * 6 * L;
      memset(own, 0, sizeof(T) * size_t(B * 6 * L));
      T* const shared = workspace.at<T>(shared_at);
      const UnitSums<T, 2> of_c{own, Shared<T, 2>::of(shared, me, B)};
      const UnitSums<T, 4> of_pre{own + B * 2 * L, Shared<T, 4>::of(shared + threads * Shared<T, 2>::size(B), me, B)};
      for (ptrdiff_t s = steps - 1; s >= -1; --s) {
        const BackwardStep step = backward_step(p.rows, p.reverse, s);
        const ptrdiff_t known = rows.among(step.later_running), now = rows.among(step.now_running);
        if (known > 0) fetch_rows(me, p.grad_pre + p.rows.packed(step.later, 0) * row + G * H, row, G * H, known);
        for_blocks(me, blocks, s, max_of(known, now), [&](ptrdiff_t j, ptrdiff_t i, ptrdiff_t count) {
          list_update<Cell>(p, rows, step, i, count, j * Product::kWidth, lines);
          if (known > i) {
            product(min_of(count, known - i), p.grad_pre + p.rows.packed(step.later, rows.at(i)) * row + G * H,
                    rows.step * row, j, 0, G * H, out, false, &lines);
          }
          for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
            norm_first_backward<Cell, T>(p, norm, rows, step, i, count, (j * kColumns + v) * L, out + v * L, sums, of_c,
                                         of_pre);
          }
        });
        if constexpr (Cell::kNormC) {
          of_c.share(me, now);
          me.wait();
          for (ptrdiff_t i = 0; i < now; ++i) {
            const T* const stats = p.stats + p.rows.packed(step.t, rows.at(i)) * kNormStats;
            norms[i] = NormGrad<T>::of(of_c, me, i, 0, H, stats[kScaleC]);
          }
          for_units<T>(me, H, [&](ptrdiff_t unit, int) {
            norm_c_backward<Cell, T>(p, norm, rows, step, now, unit, norms, sums, of_pre);
          });
        }
        of_pre.share(me, now);
        me.wait();
        // A separate pre-activation of h' takes the place of the input's, last of the gates.
        for (ptrdiff_t i = 0; i < now; ++i) {
          const ptrdiff_t b = rows.at(i), packed = p.rows.packed(step.t, b);
          T* const grad_pre = norm.grad_pre + b * kPres * H;
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
        me.wait();
      }
    }
  }
  give_sums<Cell>(p, state, parts);
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
