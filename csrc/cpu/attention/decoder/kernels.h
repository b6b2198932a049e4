// The recurrence of an attention decoder, forward and backward. A step of a row is
//   q = W_q h' + b_q, p = softmax of its scores with the keys, context = sum_j p_j value_j
//   gates = pre + W_c context + W_hh h', and the LSTM's update
// and backward, from the gradient of h,
//   dgates = LSTM's, dcontext = W_c^T dgates, dp_j = dcontext . value_j, ds = p (dp - sum_j p_j dp_j)
//   dq_h = w_h sum_j ds_j (1 - tanh^2(q_h + key_jh)), or of dot products sum_j ds_j key_jh
//   dh' = W_hh^T dgates + W_q^T dq
// where tanh comes from exponentials, unless a query or a key is too large (exponentials.h).
// The gradients of keys, values and weights are products over all steps, which the caller calculates from what each
// step leaves. For the keys of additive attention this takes every tanh a third time. To add to their gradients in each
// step would read and write B * S * A values in each.
//
// A step reads the keys and values of the whole batch, which no L2 holds. So they are read row by row, and the next
// rows are prefetched.
//
// Threads share the batch, and never wait for each other. Weights are packed once per call (rnn/blocks.h). Keys that
// the mask hides at the end of a source cost nothing.
#include "common/product_cells.h"
#include "cpu/attention/additive/scores.h"
#include "cpu/attention/decoder/exponentials.h"
#include "cpu/base/tile.h"
#include "cpu/rnn/blocks.h"

namespace seqaccel::SEQACCEL_ISA::attention::decoder {

using rnn::ColumnProduct;
using rnn::kChunk;
using rnn::UnitProduct;
using Cell = LstmCell;

constexpr int kGates = Cell::kGates;
constexpr int kTanhVectors = 4;           // sums over tanh at a time, which do not wait for each other
constexpr double kSerialWork = 262144.0;  // products and tanh of a call that are not worth a second thread

// Rows of the state are whole blocks of units, and one vector more, so that a row's size is never a multiple of a page.
template <typename T>
ptrdiff_t row_of(ptrdiff_t width) {
  return panel_count(width, rnn::kColumns * Lanes<T>) * rnn::kColumns * Lanes<T> + Lanes<T>;
}

template <typename T>
SEQACCEL_INLINE void set_zero(T* at, ptrdiff_t count) {
  if (count > 0) memset(at, 0, size_t(count) * sizeof(T));
}

// out [width] += sum over K rows of weights[j] rows[j * width ...]
template <typename T, int K>
SEQACCEL_INLINE void add_rows(const T* weights, const T* rows, ptrdiff_t width, T* out) {
  constexpr int L = Lanes<T>;
  const auto add = [&](ptrdiff_t k, int lanes) __attribute__((always_inline)) {
    Vec<T> sum = load_some(out + k, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      __builtin_prefetch(rows + (n + K) * width + k);
      sum += load_some(rows + n * width + k, lanes) * weights[n];
    }
    store_some(out + k, sum, lanes);
  };
  ptrdiff_t k = 0;
  for (; k + L <= width; k += L) add(k, L);
  if (k < width) add(k, int(width - k));
}

// out [width] = sum_j weights[j] rows[j * width ...]
template <typename T>
void weighted_sum(const T* weights, ptrdiff_t count, const T* rows, ptrdiff_t width, T* out) {
  set_zero(out, width);
  ptrdiff_t j = 0;
  for (; j + 4 <= count; j += 4) add_rows<T, 4>(weights + j, rows + j * width, width, out);
  for (; j < count; ++j) add_rows<T, 1>(weights + j, rows + j * width, width, out);
}

// out[j] = x . rows[j * width ...]
template <typename T>
void products_with_rows(const T* x, const T* rows, ptrdiff_t count, ptrdiff_t width, T* out) {
  constexpr int L = Lanes<T>;
  alignas(64) T sums[4 * L];
  ptrdiff_t j = 0;
  for (; j + 4 * L <= count; j += 4 * L) {
    rnn::dot_product<T, 4>(1, x, width, rows + j * width, L * width, width, L, sums);
    for (int v = 0; v < 4; ++v) store(out + j + v * L, load(sums + v * L));
  }
  for (; j < count; j += L) {
    const int left = int(min_of(L, count - j));
    rnn::dot_product<T, 1>(1, x, width, rows + j * width, 0, width, left, sums);
    store_some(out + j, load(sums), left);
  }
}

// The weights of a query, and 0 for keys that it does not attend to. The first `count` keys hold all that it may.
template <typename T>
void attend(const Decoder<T>& p, ptrdiff_t b, const T* query, const typename Exponentials<T>::Row& exponentials,
            ptrdiff_t count, T* weights) {
  const T* const key = p.key + b * p.S * p.A;
  const bool* const mask = p.mask == nullptr ? nullptr : p.mask + b * p.S;
  set_zero(weights + count, p.S - count);
  if (count == 0) return;
  if (exponentials.key != nullptr) {
    const auto tile = [&](ptrdiff_t j, auto keys) {
      bool any = mask == nullptr;
      for (int n = 0; n < keys() && !any; ++n) any = mask[j + n];
      const T* const key_at = exponentials.key + j * p.A;
      if (any) exponential_logits<T, keys()>(exponentials.query, key_at, p.score_weight, p.A, weights + j);
    };
    ptrdiff_t j = 0;
    for (; j + 4 <= count; j += 4) tile(j, std::integral_constant<int, 4>());
    for (; j < count; ++j) tile(j, std::integral_constant<int, 1>());
  } else if (p.score_weight != nullptr) {
    const additive::Additive<T> scores{1, 1, count, p.A, query, key, p.score_weight, mask, 1, weights};
    ptrdiff_t j = 0;
    for (; j + 4 <= count; j += 4) additive::score_tile<T, 1, 4>(scores, 0, 0, j);
    for (; j < count; ++j) additive::score_tile<T, 1, 1>(scores, 0, 0, j);
  } else {
    products_with_rows(query, key, count, p.A, weights);
  }
  for (ptrdiff_t j = 0; mask != nullptr && j < count; ++j) weights[j] = mask[j] ? weights[j] : T(-INFINITY);
  additive::softmax_row(weights, count);
}

// dL/dq of a query from dL/dlogits.
template <typename T>
void attend_backward(const Decoder<T>& p, ptrdiff_t b, const T* query,
                     const typename Exponentials<T>::Row& exponentials, const T* grad_logits, ptrdiff_t count,
                     T* grad_query) {
  constexpr int L = Lanes<T>;
  const T* const key = p.key + b * p.S * p.A;
  if (p.score_weight == nullptr) return weighted_sum(grad_logits, count, key, p.A, grad_query);
  if (exponentials.key != nullptr) {
    return exponential_backward(exponentials.query, exponentials.key, p.score_weight, grad_logits, count, p.A,
                                grad_query);
  }
  const auto block = [&](ptrdiff_t h, auto vectors, int lanes) __attribute__((always_inline)) {
    constexpr int V = vectors();
    Vec<T> q[V], sum[V] = {};
    for (int v = 0; v < V; ++v) q[v] = load_some(query + h + v * L, lanes);
    for (ptrdiff_t j = 0; j < count; ++j) {
      const T s = grad_logits[j];
      if (s == T(0)) continue;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> t = tanh_vec<T>(q[v] + load_some(key + j * p.A + h + v * L, lanes));
        sum[v] += s - s * t * t;
      }
    }
    for (int v = 0; v < V; ++v) {
      store_some(grad_query + h + v * L, sum[v] * load_some(p.score_weight + h + v * L, lanes), lanes);
    }
  };
  ptrdiff_t h = 0;
  for (; h + kTanhVectors * L <= p.A; h += kTanhVectors * L) block(h, std::integral_constant<int, kTanhVectors>(), L);
  for (; h < p.A; h += L) block(h, std::integral_constant<int, 1>(), int(min_of(L, p.A - h)));
}

// Keys of each source up to the last one that the mask shows.
template <typename T>
ptrdiff_t visible_keys(const Decoder<T>& p, ptrdiff_t b) {
  ptrdiff_t count = p.S;
  while (p.mask != nullptr && count > 0 && !p.mask[b * p.S + count - 1]) --count;
  return count;
}

template <typename T>
int threads_for(const Decoder<T>& p) {
  const double A = double(p.A), H = double(p.H), M = double(p.M);
  const double row = 4 * H * (H + M) + (p.query_weight ? A * H : 0) + double(p.S) * (A + M);
  if (double(p.B) * double(p.steps) * row < kSerialWork) return 1;
  return int(min_of(ptrdiff_t(team_size()), p.B));
}

// Calls body(row, rows) for chunks of the rows [b0, b1).
template <class Body>
SEQACCEL_INLINE void for_chunks(ptrdiff_t b0, ptrdiff_t b1, const Body& body) {
  for (ptrdiff_t b = b0; b < b1; b += kChunk) body(b, min_of(kChunk, b1 - b));
}

// Packs on all threads, then runs the rows of a part of the batch on each.
template <class Pack, class Walk>
void run_parts(int threads, ptrdiff_t B, const Pack& pack, const Walk& walk) {
#pragma omp parallel num_threads(threads)
  {
    const ptrdiff_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    pack(thread, count);
#pragma omp barrier
    const ptrdiff_t b0 = B * thread / count, b1 = B * (thread + 1) / count;
    if (b0 < b1) walk(b0, b1);
  }
}

// ---------------------------------------------------------------- forward

template <typename T>
struct ForwardPlan {
  static constexpr int L = Lanes<T>;
  typedef UnitProduct<T, 1> Query;
  typedef UnitProduct<T, kGates> Gates;

  const Forward<T>& p;
  const bool direct = p.B * p.steps <= rnn::kDirectRows;  // nothing is packed
  const int threads = threads_for(p);
  Query query{p.query_weight, p.A, p.H};
  Gates context{p.context_weight, p.H, p.M}, recurrent{p.weight_hh, p.H, p.H};
  const ptrdiff_t query_blocks = p.query_weight ? Query::blocks(p.A) : 0, blocks = Gates::blocks(p.H);
  const ptrdiff_t h_row = row_of<T>(p.H), query_row = row_of<T>(p.A), context_row = row_of<T>(p.M);
  T *h[2], *c, *queries, *contexts;  // [B, ...]
  Exponentials<T> exponentials;
  Workspace workspace;

  explicit ForwardPlan(const Forward<T>& pass) : p(pass) {
    const bool far = beyond_l2((kGates * p.H * (p.H + p.M) + query_blocks * query.K * 4 * L) * ptrdiff_t(sizeof(T)));
    query.far = context.far = recurrent.far = far;
    query.panel_size = Query::panel_values(p.H);
    context.panel_size = recurrent.panel_size = Gates::panel_values(p.M + p.H);
  }

  bool allocate() {
    if (!direct) {
      workspace.reserve(query.panels, query_blocks * query.panel_size);
      workspace.reserve(context.panels, blocks * context.panel_size);
    }
    for (T*& state : h) workspace.reserve(state, p.B * h_row);
    workspace.reserve(c, p.B * h_row);
    workspace.reserve(queries, p.B * query_row);
    workspace.reserve(contexts, p.B * context_row);
    exponentials.reserve(p, workspace);
    if (!workspace.allocate()) return false;
    if (!direct) recurrent.panels = context.panels + Gates::panel_values(p.M);
    return true;
  }

  void pack(ptrdiff_t thread, ptrdiff_t count) const {
    if (direct) return;
    for (ptrdiff_t u = thread; u < query_blocks; u += count) query.pack(u);
    for (ptrdiff_t u = thread; u < blocks; u += count) {
      context.pack(u);
      recurrent.pack(u);
    }
  }

  void project_queries(const T* h_prev, ptrdiff_t b0, ptrdiff_t b1) const {
    alignas(64) T y[kChunk * Query::V * L];
    for (ptrdiff_t u = 0; u < query_blocks; ++u) {
      for_chunks(b0, b1, [&](ptrdiff_t first, ptrdiff_t rows) {
        query(rows, h_prev + first * h_row, h_row, u, y);
        for (int v = 0; v < Query::U && (u * Query::U + v) * L < p.A; ++v) {
          const ptrdiff_t unit = (u * Query::U + v) * L;
          const Vec<T> bias = p.query_bias ? load_some(p.query_bias + unit, int(min_of(L, p.A - unit))) : Vec<T>{};
          for (ptrdiff_t i = 0; i < rows; ++i) {
            store(queries + (first + i) * query_row + unit, load(y + (i * Query::U + v) * L) + bias);
          }
        }
      });
    }
  }

  void attend_row(ptrdiff_t b, ptrdiff_t t, const T* query_at, ptrdiff_t count) const {
    const ptrdiff_t step = b * p.steps + t;
    T *const weights = p.attention + step * p.S, *const out = p.context + step * p.M;
    if (t >= p.length(b)) {
      set_zero(weights, p.S);
      set_zero(out, p.M);
    } else {
      attend(p, b, query_at, exponentials.row(p, b, query_at), count, weights);
      weighted_sum(weights, count, p.value + b * p.S * p.M, p.M, out);
    }
    memcpy(contexts + b * context_row, out, size_t(p.M) * sizeof(T));
  }

  void update(ptrdiff_t t, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t unit, const T* y, const T* z) const {
    const ptrdiff_t H = p.H;
    const int units = int(min_of(L, H - unit));
    for (ptrdiff_t i = 0; i < rows; ++i) {
      const ptrdiff_t b = first + i, step = b * p.steps + t, at = b * h_row + unit;
      T *const h_new = h[(t + 1) & 1] + at, *const output = p.output + step * H + unit;
      T *const gates = p.gates + step * kGates * H + unit, *const cells = p.cells + step * H + unit;
      if (t >= p.length(b)) {
        store(h_new, load(h[t & 1] + at));
        store_some(output, Vec<T>{}, units);
        store_some(cells, Vec<T>{}, units);
        for (int g = 0; g < kGates; ++g) store_some(gates + g * H, Vec<T>{}, units);
        continue;
      }
      Unit<Cell, Vec<T>> u;
      for (int g = 0; g < kGates; ++g) {
        const ptrdiff_t product = (i * kGates + g) * L;
        u.pre[g] = load(y + product) + load(z + product) + load_some(p.pre + (step * kGates + g) * H + unit, units);
      }
      u.c_prev = load(c + at);
      Cell::forward<rnn::Functions<T>>(u);
      store(c + at, u.c);
      store(h_new, u.h);
      store_some(output, u.h, units);
      store_some(cells, u.c, units);
      for (int g = 0; g < kGates; ++g) store_some(gates + g * H, u.saved[g], units);
    }
  }

  void walk(ptrdiff_t b0, ptrdiff_t b1) const {
    const auto copy = [&](T* to, const T* from, ptrdiff_t to_row, ptrdiff_t from_row) {
      for (ptrdiff_t b = b0; b < b1; ++b) memcpy(to + b * to_row, from + b * from_row, size_t(p.H) * sizeof(T));
    };
    T* const states[] = {h[0], h[1], c};
    for (T* state : states) set_zero(state + b0 * h_row, (b1 - b0) * h_row);
    copy(h[0], p.h_0, h_row, p.H);
    copy(c, p.c_0, h_row, p.H);
    for (ptrdiff_t b = b0; b < b1; ++b) exponentials.begin(p, b, visible_keys(p, b));
    alignas(64) T y[kChunk * Gates::V * L], z[kChunk * Gates::V * L];
    for (ptrdiff_t t = 0; t < p.steps; ++t) {
      const T* const h_prev = h[t & 1];
      project_queries(h_prev, b0, b1);
      for (ptrdiff_t b = b0; b < b1; ++b) {
        attend_row(b, t, p.query_weight ? queries + b * query_row : h_prev + b * h_row, visible_keys(p, b));
      }
      for (ptrdiff_t u = 0; u < blocks; ++u) {
        for_chunks(b0, b1, [&](ptrdiff_t first, ptrdiff_t rows) {
          context(rows, contexts + first * context_row, context_row, u, y);
          recurrent(rows, h_prev + first * h_row, h_row, u, z);
          update(t, first, rows, u * L, y, z);
        });
      }
    }
    copy(p.h_n, h[p.steps & 1], p.H, h_row);
    copy(p.c_n, c, p.H, h_row);
  }
};

template <typename T>
bool forward(const Forward<T>& p) {
  ForwardPlan<T> plan(p);
  if (!plan.allocate()) return false;
  run_parts(
      plan.threads, p.B, [&](ptrdiff_t thread, ptrdiff_t count) { plan.pack(thread, count); },
      [&](ptrdiff_t b0, ptrdiff_t b1) { plan.walk(b0, b1); });
  return true;
}

// ---------------------------------------------------------------- backward

template <typename T>
struct BackwardPlan {
  static constexpr int L = Lanes<T>;
  typedef ColumnProduct<T> Product;

  const Backward<T>& p;
  const int threads = threads_for(p);
  Product context, recurrent, query{};
  const ptrdiff_t h_row = row_of<T>(p.H), gates_row = row_of<T>(kGates * p.H), query_row = row_of<T>(p.A);
  T *grad_h, *grad_c, *grad_gates, *grad_queries, *grad_logits;  // [B, ...]
  Exponentials<T> exponentials;
  Workspace workspace;

  explicit BackwardPlan(const Backward<T>& pass) : p(pass) {
    const bool few = p.B * p.steps <= rnn::kDirectRows;
    context = Product::of(p.context_weight, p.M, kGates * p.H, few);
    recurrent = Product::of(p.weight_hh, p.H, kGates * p.H, few);
    if (p.query_weight) query = Product::of(p.query_weight, p.H, p.A, few);
    context.far = recurrent.far = query.far =
        beyond_l2((kGates * p.H * (p.H + p.M) + query.K * query.N) * ptrdiff_t(sizeof(T)));
  }

  bool allocate() {
    Product* const products[] = {&context, &recurrent, &query};
    for (Product* product : products) workspace.reserve(product->panels, product->panel_values());
    workspace.reserve(grad_h, p.B * h_row);
    workspace.reserve(grad_c, p.B * h_row);
    workspace.reserve(grad_gates, p.B * gates_row);
    workspace.reserve(grad_queries, p.B * query_row);
    workspace.reserve(grad_logits, p.B * p.S);
    exponentials.reserve(p, workspace);
    return workspace.allocate();
  }

  void pack(ptrdiff_t thread, ptrdiff_t count) const {
    const Product* const products[] = {&context, &recurrent, &query};
    for (const Product* product : products) {
      for (ptrdiff_t j = thread; j < Product::blocks(product->N); j += count) product->pack(j);
    }
  }

  void update(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t H = p.H, step = b * p.steps + t;
    T *const grad_pre = p.grad_pre + step * kGates * H, *const kept = grad_gates + b * gates_row;
    if (t >= p.length(b)) {
      set_zero(kept, kGates * H);
      set_zero(grad_pre, kGates * H);
      return;
    }
    const T* const c_prev = t > 0 ? p.cells + (step - 1) * H : p.c_0 + b * H;
    for (ptrdiff_t unit = 0; unit < H; unit += L) {
      const int units = int(min_of(L, H - unit));
      Unit<Cell, Vec<T>> u;
      T* const grad_c_at = grad_c + b * h_row + unit;
      u.grad_h = load(grad_h + b * h_row + unit);
      if (p.grad_output) u.grad_h += load_some(p.grad_output + step * H + unit, units);
      u.grad_c = load(grad_c_at);
      u.c_prev = load_some(c_prev + unit, units);
      for (int g = 0; g < kGates; ++g) u.saved[g] = load_some(p.gates + (step * kGates + g) * H + unit, units);
      Cell::backward<rnn::Functions<T>>(u);
      store(grad_c_at, u.grad_c);
      for (int g = 0; g < kGates; ++g) {
        store_some(kept + g * H + unit, u.grad_pre[g], units);
        store_some(grad_pre + g * H + unit, u.grad_pre[g], units);
      }
    }
  }

  void attend_row(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t step = b * p.steps + t;
    T *const grad_weights = p.all_grad_attention + step * p.S, *const grad_query = p.grad_query + step * p.A;
    T* const kept = grad_queries + b * query_row;
    if (t >= p.length(b)) {
      set_zero(grad_weights, p.S);
      set_zero(grad_query, p.A);
      set_zero(kept, p.A);
      return;
    }
    const ptrdiff_t count = visible_keys(p, b);
    set_zero(grad_weights + count, p.S - count);
    products_with_rows(p.all_grad_context + step * p.M, p.value + b * p.S * p.M, count, p.M, grad_weights);
    for (ptrdiff_t j = 0; p.grad_attention != nullptr && j < count; ++j) {
      grad_weights[j] += p.grad_attention[step * p.S + j];
    }
    T* const logits = grad_logits + b * p.S;
    additive::softmax_row_backward(grad_weights, p.attention + step * p.S, logits, count);
    const T* const query_at = p.query + step * p.A;
    attend_backward(p, b, query_at, exponentials.row(p, b, query_at), logits, count, grad_query);
    memcpy(kept, grad_query, size_t(p.A) * sizeof(T));
  }

  // Calls body(b, column, vector) for the rows [b0, b1) of a product of one or two summands, in vectors.
  template <class Multiply, class Body>
  SEQACCEL_INLINE void for_product(ptrdiff_t b0, ptrdiff_t b1, ptrdiff_t width, const Multiply& multiply,
                                   const Body& body) const {
    alignas(64) T y[kChunk * Product::kWidth];
    for (ptrdiff_t j = 0; j < Product::blocks(width); ++j) {
      for_chunks(b0, b1, [&](ptrdiff_t first, ptrdiff_t rows) {
        multiply(first, rows, j, y);
        for (ptrdiff_t i = 0; i < rows; ++i) {
          for (int v = 0; v < rnn::kColumns && j * Product::kWidth + v * L < width; ++v) {
            body(first + i, j * Product::kWidth + v * L, load(y + i * Product::kWidth + v * L));
          }
        }
      });
    }
  }

  void walk(ptrdiff_t b0, ptrdiff_t b1) const {
    const auto take = [&](T* to, const T* from) {
      set_zero(to + b0 * h_row, (b1 - b0) * h_row);
      for (ptrdiff_t b = b0; b < b1 && from != nullptr; ++b) {
        memcpy(to + b * h_row, from + b * p.H, size_t(p.H) * sizeof(T));
      }
    };
    take(grad_h, p.grad_h_n);
    take(grad_c, p.grad_c_n);
    for (ptrdiff_t b = b0; b < b1; ++b) exponentials.begin(p, b, visible_keys(p, b));
    for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
      for (ptrdiff_t b = b0; b < b1; ++b) update(t, b);
      for_product(
          b0, b1, p.M,
          [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t j, T* y) {
            context(rows, grad_gates + first * gates_row, gates_row, j, 0, context.K, y);
          },
          [&](ptrdiff_t b, ptrdiff_t m, Vec<T> grad) {
            const ptrdiff_t at = (b * p.steps + t) * p.M + m;
            const int lanes = int(min_of(L, p.M - m));
            const bool more = p.grad_context != nullptr && t < p.length(b);
            store_some(p.all_grad_context + at, more ? grad + load_some(p.grad_context + at, lanes) : grad, lanes);
          });
      for (ptrdiff_t b = b0; b < b1; ++b) attend_row(t, b);
      for_product(
          b0, b1, p.H,
          [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t j, T* y) {
            recurrent(rows, grad_gates + first * gates_row, gates_row, j, 0, recurrent.K, y);
            if (p.query_weight) query(rows, grad_queries + first * query_row, query_row, j, 0, query.K, y, true);
          },
          [&](ptrdiff_t b, ptrdiff_t unit, Vec<T> grad) {
            if (t >= p.length(b)) return;
            if (!p.query_weight) grad += load_some(grad_queries + b * query_row + unit, int(min_of(L, p.H - unit)));
            store(grad_h + b * h_row + unit, grad);
          });
    }
    for (ptrdiff_t b = b0; b < b1; ++b) {
      memcpy(p.grad_h_0 + b * p.H, grad_h + b * h_row, size_t(p.H) * sizeof(T));
      memcpy(p.grad_c_0 + b * p.H, grad_c + b * h_row, size_t(p.H) * sizeof(T));
    }
  }
};

template <typename T>
bool backward(const Backward<T>& p) {
  BackwardPlan<T> plan(p);
  if (!plan.allocate()) return false;
  run_parts(
      plan.threads, p.B, [&](ptrdiff_t thread, ptrdiff_t count) { plan.pack(thread, count); },
      [&](ptrdiff_t b0, ptrdiff_t b1) { plan.walk(b0, b1); });
  return true;
}

extern const DecoderKernels decoder_kernels;
const DecoderKernels decoder_kernels = {forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::decoder
