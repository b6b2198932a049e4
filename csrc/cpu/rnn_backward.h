// The recurrence of a layer, backward, for every cell of cells.h.
//
// A step, for a block of 4 L units:
//   grad_h [rows, 4 L] = grad_pre[t+1] [rows, G*H] * panel [G*H, 4 L]
//   grad_pre[t], grad_c = Cell::backward(saved[t], c', grad_h + grad_output[t], grad_c)
// Columns of W_hh are packed once a call; with few rows 4 vectors of each row of W_hh itself are read. Threads share
// the work as in the forward pass (rnn_forward.h). The weights' gradients are products over all steps, after the pass;
// those of biases and unit weights are summed here.
#pragma once

#include "rnn_blocks.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr ptrdiff_t kSumRows = 8;  // rows summed before they join the gradient of a bias

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

template <class Cell, typename T>
void backward_update(const RnnBackward<T>& p, const BackwardState<T>& state, const RowShare& share,
                     const BackwardStep& step, ptrdiff_t i0, ptrdiff_t i1, ptrdiff_t unit, const T* product,
                     T* sums_at) {
  constexpr int L = Lanes<T>, kSums = kPre<Cell> + Cell::kWeights;
  const ptrdiff_t H = p.hidden;
  const int units = int(min_of(L, H - unit));
  const bool blend_h = Cell::kZoneout && p.zoneout_h.factors, blend_c = Cell::kZoneout && p.zoneout_c.factors;
  const bool direct = Cell::kDirect || blend_h;
  Vec<T> sums[kSums] = {};
  const auto join_sums = [&] {
#pragma GCC unroll 16
    for (int g = 0; g < kSums; ++g) {
      T* const sum = sums_at + g * state.stride + unit;
      add_compensated(sum, sum + kSums * state.stride, sums[g]);
      sums[g] = Vec<T>{};
    }
  };
  Unit<Cell, Vec<T>> common;
#pragma GCC unroll 16
  for (int w = 0; w < Cell::kWeights; ++w) common.weights[w] = load(state.weights + w * state.stride + unit);
  for (ptrdiff_t i = i0; i < i1; ++i) {
    const ptrdiff_t b = share.at(i);
    T* const held = state.grad_h + b * state.h_stride + unit;
    T* const grad_c_at = state.grad_c + b * state.stride + unit;
    Unit<Cell, Vec<T>> u = common;
    if (b < step.later_running) {
      u.grad_h = load(product + (i - i0) * kColumns * L);
      if (direct) u.grad_h += load(held);
    } else {
      u.grad_h = load(held);
    }
    if constexpr (Cell::kHasCell) u.grad_c = load(grad_c_at);
    if (b >= step.now_running) {
      const ptrdiff_t to = p.rows.row(b) * H + unit;
      store_some(p.grad_h_0 + to, u.grad_h, units);
      if (Cell::kHasCell) store_some(p.grad_c_0 + to, u.grad_c, units);
      continue;
    }
    const ptrdiff_t packed = p.rows.packed(step.t, b), padded = p.rows.padded(step.t, b);
    if (p.grad_output) u.grad_h += load_some(p.grad_output + padded * H + unit, units);
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
    if (blend_h) {
      const Vec<T> z = blend_at(p.zoneout_h, padded * H + unit, units);
      kept_h = z * u.grad_h;
      u.grad_h -= kept_h;
    }
    if (Cell::kHasCell && blend_c) {
      const Vec<T> z = blend_at(p.zoneout_c, padded * H + unit, units);
      kept_c = z * u.grad_c;
      u.grad_c -= kept_c;
    }
    Cell::template backward<Functions<T>>(u);
    if constexpr (Cell::kHasCell) {
      if (blend_c) u.grad_c += kept_c;
      store(grad_c_at, u.grad_c);
    }
    if (direct) {
      if constexpr (Cell::kDirect) kept_h += u.grad_h_prev;
      store(held, kept_h);
    }
    T* const grad_pre = p.grad_pre + packed * kPre<Cell> * H + unit;
#pragma GCC unroll 8
    for (int g = 0; g < kPre<Cell>; ++g) {
      store_some(grad_pre + g * H, u.grad_pre[g], units);
      sums[g] += u.grad_pre[g];
    }
#pragma GCC unroll 16
    for (int w = 0; w < Cell::kWeights; ++w) sums[kPre<Cell> + w] += u.grad_weights[w];
    if ((i + 1 - i0) % kSumRows == 0) join_sums();
  }
  join_sums();
}

template <class Cell, typename T>
bool rnn_backward(const RnnBackward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>, kPres = kPre<Cell>, kSums = kPres + Cell::kWeights;
  typedef ColumnProduct<T> Product;
  const ptrdiff_t H = p.hidden, B = p.rows.batch, steps = p.rows.steps, K = G * H;
  const ptrdiff_t blocks = Product::blocks(H);
  const bool direct = steps * B <= kDirectRows;
  const ptrdiff_t weights = K * H;
  const ptrdiff_t weight_bytes = weights * ptrdiff_t(sizeof(T));
  const int threads = split_work(omp_get_max_threads(), steps, B, weights, weight_bytes, blocks).threads();
  Product recurrent{p.weight, H, K, direct ? H / Product::kWidth : 0};

  BackwardState<T> state;
  state.stride = state.h_stride = blocks * Product::kWidth + L;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(recurrent.panel_values());
  const size_t state_at = workspace.reserve<T>((2 * B + 2 * threads * kSums + Cell::kWeights) * state.stride);
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  recurrent.panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.grad_h = workspace.at<T>(state_at);
  state.grad_c = state.grad_h + B * state.stride;
  state.sums = state.grad_c + B * state.stride;
  state.weights = state.sums + 2 * threads * kSums * state.stride;
  memset(state.sums, 0, sizeof(T) * size_t(2 * threads * kSums * state.stride));
  spread_rows(state.weights, state.stride, p.unit_weights, Cell::kWeights, H);
  int parts = 1;

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_work(team, steps, B, weights, weight_bytes, blocks);
    const Share share = share_of(split, thread, B, blocks);
    const RowShare rows = row_share(split, share, p.rows);
    if (thread == 0) parts = split.parts;
    for (ptrdiff_t j = thread; j < blocks; j += team) recurrent.pack(j);
    const ptrdiff_t first_unit = share.u0 * Product::kWidth, last_unit = min_of(H, share.u1 * Product::kWidth);
    for (ptrdiff_t unit = first_unit; unit < last_unit && !share.idle; unit += L) {
      const int units = int(min_of(L, H - unit));
      for (ptrdiff_t i = 0; i < rows.size; ++i) {
        const ptrdiff_t b = rows.at(i), at = p.rows.row(b) * H + unit;
        const Vec<T> h = p.grad_h_n ? load_some(p.grad_h_n + at, units) : Vec<T>{};
        store(state.grad_h + b * state.h_stride + unit, h);
        if (p.rows.running) store_some(p.grad_h_0 + at, h, units);
        if constexpr (Cell::kHasCell) {
          const Vec<T> c = p.grad_c_n ? load_some(p.grad_c_n + at, units) : Vec<T>{};
          store(state.grad_c + b * state.stride + unit, c);
          if (p.rows.running) store_some(p.grad_c_0 + at, c, units);
        }
      }
    }
#pragma omp barrier
    if (!share.idle) {
      alignas(64) T product[kChunk * Product::kWidth];
      T* const sums = state.sums + share.part * 2 * kSums * state.stride;
      for (ptrdiff_t s = steps - 1; s >= -1; --s) {
        const BackwardStep step = backward_step(p.rows, p.reverse, s);
        const ptrdiff_t known = rows.among(step.later_running);
        const ptrdiff_t count = max_of(known, rows.among(step.now_running));
        for (ptrdiff_t i = share.u0; i < share.u1; ++i) {
          const ptrdiff_t j = s & 1 ? share.u0 + share.u1 - 1 - i : i;
          for (ptrdiff_t r = 0; r < count; r += kChunk) {
            const ptrdiff_t end = min_of(r + kChunk, count), products = min_of(end, known) - r;
            if (products > 0) {
              const T* const later = p.grad_pre + p.rows.packed(step.later, rows.at(r)) * kPres * H;
              const ptrdiff_t row = rows.step * kPres * H;
              if constexpr (Cell::kApart) {
                recurrent(products, later, row, j, 0, K - H, product);
                recurrent(products, later + K, row, j, K - H, H, product, true);
              } else {
                recurrent(products, later, row, j, 0, K, product);
              }
            }
            for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
              backward_update<Cell, T>(p, state, rows, step, r, end, (j * kColumns + v) * L, product + v * L, sums);
            }
          }
        }
        wait_for_all(barriers[share.part], split.groups);
      }
    }
  }
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
  return true;
}

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
