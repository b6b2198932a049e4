// The operators of hierarchical attention: checks, sizes, allocation.
#include "cpu/attention/hierarchical/hierarchical.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/attention/operands.h"

namespace seqaccel::attention::hierarchical {
namespace {

// The arguments that both operators share, after checks.
struct Call {
  Tensor query, key, value;
  OptionalTensor pool_query;
  Pyramid pyramid;
  int64_t B, H, G, Tq, T, D, Dv;
  bool mass_bias;
  double scale;
  bool ragged = false;  // has cu_seqlens or lengths
  std::vector<Sequence> sequences = {};
  double dropout = 0;
  uint64_t seed = 0;
};

Pyramid pyramid_of(const Call& c, int64_t T) {
  const Pyramid& p = c.pyramid;
  return make_pyramid(T, p.block_size, p.fanout, p.levels, p.local_blocks, 0, p.causal);
}

// The sequences between offsets in the one row of the batch. What is not in order or in range is limited to it.
void add_packed(Call& c, const Tensor& cu_seqlens) {
  const Tensor offsets = to_contiguous(cu_seqlens);
  const int64_t* const ends = offsets.const_data_ptr<int64_t>();
  int64_t first = std::clamp<int64_t>(ends[0], 0, c.T), node = 0;
  for (int64_t n = 1; n < offsets.size(0); ++n) {
    const int64_t end = std::clamp(ends[n], first, c.T);
    c.sequences.push_back({0, first, end - first, node});
    // Together at most the nodes of one sequence of T tokens: a sum of quotients that are rounded down.
    node += pyramid_of(c, end - first).nodes;
    first = end;
  }
}

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pool_query,
               const OptionalTensor& cu_seqlens, const OptionalTensor& lengths, int64_t block_size, int64_t fanout,
               int64_t levels, int64_t local_blocks, bool causal, bool mass_bias, double scale) {
  check_floating(query, "query");
  const ScalarType dtype = query.scalar_type();
  check_tensor(query, "query", {-1, -1, -1, -1}, dtype);
  const int64_t B = query.size(0), H = query.size(1), Tq = query.size(2), D = query.size(3);
  check_tensor(key, "key", {B, -1, -1, D}, dtype);
  const int64_t G = key.size(1), T = key.size(2);
  check_tensor(value, "value", {B, G, T, -1}, dtype);
  STD_TORCH_CHECK(Tq <= T, "seqaccel: expected at most as many queries as keys, but got ", Tq, " and ", T);
  STD_TORCH_CHECK(G > 0 ? H % G == 0 : H == 0, "seqaccel: expected the ", H, " heads of query to be a multiple of the ",
                  G, " heads of key");
  STD_TORCH_CHECK(D > 0 && value.size(3) > 0, "seqaccel: expected query and value to have at least one element a head");
  if (pool_query) {
    check_tensor(*pool_query, "pool_query", {-1, G, D}, dtype);
    STD_TORCH_CHECK(pool_query->size(0) > 0, "seqaccel: expected pool_query to have at least one row");
  }
  STD_TORCH_CHECK(block_size >= 2 && fanout >= 2, "seqaccel: expected block_size and fanout to be at least 2, but got ",
                  block_size, " and ", fanout);
  STD_TORCH_CHECK(local_blocks >= 1, "seqaccel: expected local_blocks to be at least 1, but got ", local_blocks);
  STD_TORCH_CHECK(!(cu_seqlens || lengths) || Tq == T,
                  "seqaccel: expected as many queries as keys with cu_seqlens or "
                  "lengths, but got ",
                  Tq, " and ", T);
  STD_TORCH_CHECK(!cu_seqlens || !lengths, "seqaccel: expected cu_seqlens or lengths, but got both");
  Call c = {rows_contiguous(query),
            rows_contiguous(key),
            rows_contiguous(value),
            to_contiguous(pool_query),
            make_pyramid(T, block_size, fanout, levels, local_blocks, T - Tq, causal),
            B,
            H,
            G,
            Tq,
            T,
            D,
            value.size(3),
            mass_bias,
            scale,
            cu_seqlens || lengths};
  if (cu_seqlens) {
    check_tensor(*cu_seqlens, "cu_seqlens", {-1}, ScalarType::Long);
    STD_TORCH_CHECK(B == 1 && cu_seqlens->size(0) > 1,
                    "seqaccel: expected a batch of 1 with cu_seqlens, and at least 2 offsets, but got ", B, " and ",
                    cu_seqlens->size(0));
    add_packed(c, *cu_seqlens);
  } else if (lengths) {
    check_tensor(*lengths, "lengths", {B}, ScalarType::Long);
    const Tensor rows = to_contiguous(*lengths);
    for (int64_t b = 0; b < B; ++b) {
      c.sequences.push_back({b, 0, std::clamp<int64_t>(rows.const_data_ptr<int64_t>()[b], 0, T), 0});
    }
  }
  return c;
}

void set_dropout(Call& c, double dropout, const OptionalTensor& seed) {
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "seqaccel: expected dropout between 0 and 1, but got ", dropout);
  if (dropout == 0) return;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                  "seqaccel: expected dropout to have a seed, an int64 tensor of one element on the CPU");
  check_memory(*seed, "seed");
  c.dropout = dropout;
  c.seed = uint64_t(*seed->const_data_ptr<int64_t>());
}

// Whether there are tokens of no sequence, whose results are 0.
bool has_padding(const Call& c) {
  int64_t tokens = 0;
  for (const Sequence& s : c.sequences) tokens += s.T;
  return c.ragged && tokens < c.B * c.T;
}

// The tasks of the sequences: `tasks(pyramid, per_kind)` writes those of one sequence and head.
template <typename Tasks>
std::vector<int64_t> count_tasks(const Call& c, int kinds, const Tasks& tasks) {
  std::vector<int64_t> each(size_t(kinds), 0);
  if (!c.ragged) {
    tasks(c.pyramid, each.data());
    return each;
  }
  const size_t row = c.sequences.size() + 1;
  std::vector<int64_t> before(size_t(kinds) * row, 0);
  for (size_t n = 0; n + 1 < row; ++n) {
    tasks(pyramid_of(c, c.sequences[n].T), each.data());
    for (size_t kind = 0; kind < size_t(kinds); ++kind) {
      before[kind * row + n + 1] = before[kind * row + n] + each[kind];
    }
  }
  return before;
}

Sequences sequences_of(const Call& c, const std::vector<int64_t>& tasks) {
  if (!c.ragged) return {c.B, nullptr, tasks.data()};
  return {int64_t(c.sequences.size()), c.sequences.data(), tasks.data()};
}

const Forward<float>& forward_of(float, const Call&) { return active_attention_kernels().forward_float; }
const Forward<double>& forward_of(double, const Call&) { return active_attention_kernels().forward_double; }
const Forward<BFloat16>& forward_of(BFloat16, const Call& c) {
  const AttentionNarrowKernels& kernels = active_attention_narrow_kernels();
  return takes_pairs(kernels.forward_pairs, c.D, c.Dv) ? kernels.forward_pairs : kernels.forward_bfloat16;
}
const Forward<Float16>& forward_of(Float16, const Call&) { return active_attention_narrow_kernels().forward_float16; }

const Backward<float>& backward_of(float, const Call&) { return active_attention_backward_kernels().backward_float; }
const Backward<double>& backward_of(double, const Call&) { return active_attention_backward_kernels().backward_double; }
const Backward<BFloat16>& backward_of(BFloat16, const Call& c) {
  const AttentionNarrowKernels& kernels = active_attention_narrow_kernels();
  return takes_pairs(kernels.backward_pairs, c.D, c.Dv) ? kernels.backward_pairs : kernels.backward_bfloat16;
}
const Backward<Float16>& backward_of(Float16, const Call&) {
  return active_attention_narrow_kernels().backward_float16;
}

template <typename S>
Attention<S> arguments(const Call& c, const std::vector<int64_t>& tasks, const Tensor& pooled_key,
                       const Tensor& pooled_value, const Tensor& out, const Tensor& lse, const Tensor& workspace) {
  typedef Compute<S> T;
  Attention<S> p;
  p.B = c.B;
  p.H = c.H;
  p.G = c.G;
  p.D = c.D;
  p.Dv = c.Dv;
  p.Tq = c.Tq;
  p.nodes = pooled_key.size(2);
  p.pyramid = c.pyramid;
  p.sequences = sequences_of(c, tasks);
  p.scale = T(c.scale);
  for (int l = 0; l <= c.pyramid.levels; ++l) {
    p.bias[l] = c.mass_bias ? T(std::log(double(c.pyramid.span[l]))) : T(0);
  }
  p.dropout = c.dropout;
  p.seed = c.seed;
  p.dropout_row = 0;
  p.query = read<S>(c.query);
  p.key = read<S>(c.key);
  p.value = read<S>(c.value);
  p.pool_query = data_of<S>(c.pool_query);
  p.P = c.pool_query ? c.pool_query->size(0) : 0;
  p.pooled_key = mutable_data_of<S>(pooled_key);
  p.pooled_value = mutable_data_of<S>(pooled_value);
  p.out = write<S>(out);
  p.lse = lse.mutable_data_ptr<T>();
  p.workspace = workspace.mutable_data_ptr<T>();
  return p;
}

// Rows per head in the arrays of pooled keys and values. There are at least two: a size of 0 or 1 would tie an exported
// graph to its T.
int64_t pooled_rows(const Call& c) { return c.T == 0 ? 0 : std::max<int64_t>(c.pyramid.nodes, 2); }

Tensor new_pooled(const Call& c, int64_t width) {
  Tensor pooled = new_tensor(c.query, {c.B, c.G, pooled_rows(c), width});
  const size_t bytes = size_t(pooled.numel()) * pooled.element_size();
  if ((c.pyramid.nodes < 2 || c.ragged) && bytes > 0) memset(pooled.mutable_data_ptr(), 0, bytes);
  return pooled;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hierarchical_attention_forward(
    Tensor query, Tensor key, Tensor value, OptionalTensor pool_query, OptionalTensor cu_seqlens,
    OptionalTensor lengths, int64_t block_size, int64_t fanout, int64_t levels, int64_t local_blocks, bool causal,
    bool mass_bias, double scale, double dropout, OptionalTensor seed) {
  Call c = make_call(query, key, value, pool_query, cu_seqlens, lengths, block_size, fanout, levels, local_blocks,
                     causal, mass_bias, scale);
  set_dropout(c, dropout, seed);
  Tensor out = empty_heads(query, c.Dv);
  Tensor lse = new_sums(query, {c.B, c.H, c.Tq});
  Tensor pooled_key = new_pooled(c, c.D), pooled_value = new_pooled(c, c.Dv);
  if (has_padding(c)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  if (lse.numel() == 0) {
    for (Tensor* pooled : {&pooled_key, &pooled_value}) torch::stable::zero_(*pooled);
    return {out, lse, pooled_key, pooled_value};
  }
  const std::vector<int64_t> tasks = count_tasks(c, 1 + c.pyramid.levels, [&](const Pyramid& p, int64_t* each) {
    each[kBlocks] = query_blocks(p);
    for (int l = 1; l <= c.pyramid.levels; ++l) each[l] = l <= p.levels ? p.count[l] : 0;
  });
  with_type(query.scalar_type(), [&](auto zero) {
    const auto& kernel = forward_of(zero, c);
    const int64_t share = kernel.workspace(c.D, c.Dv, pool_children(c.pyramid));
    Tensor workspace = new_sums(query, {share * omp_get_max_threads()});
    kernel.run(arguments<decltype(zero)>(c, tasks, pooled_key, pooled_value, out, lse, workspace));
  });
  return {out, lse, pooled_key, pooled_value};
}

// How many segments a head's query blocks are split into in the backward pass. The shape alone decides, so that results
// do not depend on the threads. There are enough for many cores, but each has at least 16 blocks and 1024 queries,
// which keeps the part that segments share small. `all_blocks` are those of all sequences.
int64_t backward_segments(const Call& c, const Pyramid& p, int64_t all_blocks) {
  const int64_t blocks = query_blocks(p);
  const int64_t least = std::max<int64_t>(16, (1024 + p.block_size - 1) / p.block_size);
  const int64_t all = std::max<int64_t>(1, c.G * all_blocks), wanted = (32 * blocks + all - 1) / all;
  return std::max<int64_t>(1, std::min(wanted, blocks / least));
}

// `pool`: of the pyramid alone.
std::vector<int64_t> count_backward_tasks(const Call& c, bool pool = false) {
  int64_t all_blocks = 0;
  for (const Sequence& s : c.sequences) all_blocks += query_blocks(pyramid_of(c, s.T));
  if (!c.ragged) all_blocks = c.B * query_blocks(c.pyramid);
  return count_tasks(c, kChunks + 1 + c.pyramid.levels, [&](const Pyramid& p, int64_t* each) {
    const int64_t segments = pool ? 1 : backward_segments(c, p, all_blocks);
    each[kSegments] = segments;
    each[kNodes] = p.nodes;
    each[kPartialRows] = 0;
    for (int64_t s = 0; s < segments; ++s) {
      each[kPartialRows] += p.nodes + outside_rows(p, segment_outside(p, s, segments));
    }
    each[kPoolSums] = 0;
    for (int l = 1; l <= c.pyramid.levels; ++l) {
      each[kChunks + l] = l <= p.levels ? pool_chunks(p, l) : 0;
      each[kPoolSums] += each[kChunks + l];
    }
  });
}

template <typename S>
AttentionBackward<S> backward_arguments(const Attention<S>& forward, const Tensor& grad_out,
                                        const OptionalTensor& grad_lse, const Tensor& grad_query,
                                        const Tensor& grad_key, const Tensor& grad_value, const Tensor& grad_pool,
                                        const Tensor& partial, const Tensor& partial_pool) {
  typedef Compute<S> T;
  AttentionBackward<S> p;
  p.forward = forward;
  p.grad_out = read<S>(grad_out);
  p.grad_lse = data_of<T>(grad_lse);
  p.grad_query = write<S>(grad_query);
  p.grad_key = write<T>(grad_key);
  p.grad_value = write<T>(grad_value);
  p.grad_pool = forward.pool_query ? grad_pool.mutable_data_ptr<T>() : nullptr;
  p.segments = 0;
  p.partial = partial.mutable_data_ptr<T>();
  p.partial_pool = partial_pool.mutable_data_ptr<T>();
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hierarchical_attention_backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, OptionalTensor pool_query, OptionalTensor cu_seqlens,
    OptionalTensor lengths, Tensor out, Tensor lse, Tensor pooled_key, Tensor pooled_value, int64_t block_size,
    int64_t fanout, int64_t levels, int64_t local_blocks, bool causal, bool mass_bias, double scale,
    OptionalTensor grad_lse, double dropout, OptionalTensor seed) {
  Call c = make_call(query, key, value, pool_query, cu_seqlens, lengths, block_size, fanout, levels, local_blocks,
                     causal, mass_bias, scale);
  set_dropout(c, dropout, seed);
  const ScalarType dtype = query.scalar_type();
  check_tensor(grad_out, "grad_out", {c.B, c.H, c.Tq, c.Dv}, dtype);
  if (grad_lse) check_tensor(*grad_lse, "grad_lse", {c.B, c.H, c.Tq}, compute_dtype(dtype));
  check_tensor(out, "out", {c.B, c.H, c.Tq, c.Dv}, dtype);
  check_tensor(lse, "lse", {c.B, c.H, c.Tq}, compute_dtype(dtype));
  check_tensor(pooled_key, "pooled_key", {c.B, c.G, pooled_rows(c), c.D}, dtype);
  check_tensor(pooled_value, "pooled_value", {c.B, c.G, pooled_rows(c), c.Dv}, dtype);
  const Tensor grad_rows = rows_contiguous(grad_out), out_rows = rows_contiguous(out);
  const Tensor lse_rows = to_contiguous(lse);
  const OptionalTensor grad_lse_rows = to_contiguous(grad_lse);
  const Tensor keys = to_contiguous(pooled_key), values = to_contiguous(pooled_value);
  Tensor grad_query = empty_heads(query), grad_key = empty_sums(key, c.D), grad_value = empty_sums(value, c.Dv);
  Tensor grad_pool = c.pool_query ? new_sums(query, {c.pool_query->size(0), c.G, c.D}) : new_sums(query, {0, c.G, c.D});
  const auto results = [&] {
    return std::tuple(grad_query, to_dtype(grad_key, dtype), to_dtype(grad_value, dtype), to_dtype(grad_pool, dtype));
  };
  if (lse.numel() == 0 || has_padding(c)) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_pool}) torch::stable::zero_(*grad);
  }
  if (lse.numel() == 0) return results();
  const std::vector<int64_t> tasks = count_backward_tasks(c);
  const Sequences sequences = sequences_of(c, tasks);
  Tensor partial = new_sums(query, {c.G * sequences.tasks(kPartialRows) * (c.D + c.Dv)});
  Tensor partial_pool = new_sums(query, {c.pool_query ? c.G * sequences.tasks(kPoolSums) * c.D : 0});
  with_type(dtype, [&](auto zero) {
    const auto& kernel = backward_of(zero, c);
    const int64_t share = kernel.workspace(c.D, c.Dv, pool_children(c.pyramid));
    Tensor workspace = new_sums(query, {share * omp_get_max_threads()});
    kernel.run(backward_arguments(arguments<decltype(zero)>(c, tasks, keys, values, out_rows, lse_rows, workspace),
                                  grad_rows, grad_lse_rows, grad_query, grad_key, grad_value, grad_pool, partial,
                                  partial_pool));
  });
  return results();
}

// The pyramid alone is that of attention with keys in the place of queries, which play no part.

const Pool<float>& pool_of(float) { return active_pool_kernels().of_float; }
const Pool<double>& pool_of(double) { return active_pool_kernels().of_double; }
const Pool<BFloat16>& pool_of(BFloat16) { return active_pool_kernels().of_bfloat16; }
const Pool<Float16>& pool_of(Float16) { return active_pool_kernels().of_float16; }

Call make_pool_call(const Tensor& key, const Tensor& value, const OptionalTensor& pool_query, int64_t block_size,
                    int64_t fanout, int64_t levels, double scale) {
  return make_call(key, key, value, pool_query, std::nullopt, std::nullopt, block_size, fanout, levels, 1, true, false,
                   scale);
}

std::tuple<Tensor, Tensor> attention_pool_forward(Tensor key, Tensor value, OptionalTensor pool_query,
                                                  int64_t block_size, int64_t fanout, int64_t levels, double scale) {
  const Call c = make_pool_call(key, value, pool_query, block_size, fanout, levels, scale);
  Tensor pooled_key = new_pooled(c, c.D), pooled_value = new_pooled(c, c.Dv);
  if (c.B == 0 || c.G == 0 || c.pyramid.nodes == 0) return {pooled_key, pooled_value};
  const std::vector<int64_t> tasks(c.pyramid.count, c.pyramid.count + 1 + c.pyramid.levels);
  Tensor workspace = new_sums(key, {pool_children(c.pyramid) * int64_t(omp_get_max_threads())});
  with_type(key.scalar_type(), [&](auto zero) {
    typedef decltype(zero) S;
    pool_of(zero).forward(arguments<S>(c, tasks, pooled_key, pooled_value, c.value, workspace, workspace));
  });
  return {pooled_key, pooled_value};
}

// The gradients of the nodes, for each head those of keys before those of values.
Tensor node_gradients(const Call& c, const Tensor& grad_key, const Tensor& grad_value) {
  const int64_t nodes = c.pyramid.nodes, heads = c.B * c.G;
  Tensor all = new_sums(c.key, {heads * nodes * (c.D + c.Dv)});
  const size_t size = size_t(all.element_size());
  char* to = static_cast<char*>(all.mutable_data_ptr());
  const Tensor grads[2] = {to_contiguous(to_dtype(grad_key, all.scalar_type())),
                           to_contiguous(to_dtype(grad_value, all.scalar_type()))};
  for (int64_t head = 0; head < heads; ++head) {
    for (const Tensor& grad : grads) {
      const size_t row = size_t(grad.size(3)) * size, bytes = size_t(nodes) * row;
      std::memcpy(to, static_cast<const char*>(grad.const_data_ptr()) + size_t(head * grad.size(2)) * row, bytes);
      to += bytes;
    }
  }
  return all;
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_backward(Tensor grad_pooled_key, Tensor grad_pooled_value, Tensor key,
                                                           Tensor value, OptionalTensor pool_query, Tensor pooled_key,
                                                           Tensor pooled_value, int64_t block_size, int64_t fanout,
                                                           int64_t levels, double scale) {
  const Call c = make_pool_call(key, value, pool_query, block_size, fanout, levels, scale);
  const ScalarType dtype = key.scalar_type();
  check_tensor(grad_pooled_key, "grad_pooled_key", {c.B, c.G, pooled_rows(c), c.D}, dtype);
  check_tensor(grad_pooled_value, "grad_pooled_value", {c.B, c.G, pooled_rows(c), c.Dv}, dtype);
  check_tensor(pooled_key, "pooled_key", {c.B, c.G, pooled_rows(c), c.D}, dtype);
  check_tensor(pooled_value, "pooled_value", {c.B, c.G, pooled_rows(c), c.Dv}, dtype);
  Tensor grad_key = empty_sums(key, c.D), grad_value = empty_sums(value, c.Dv);
  Tensor grad_pool = new_sums(key, {c.pool_query ? c.pool_query->size(0) : 0, c.G, c.D});
  for (Tensor* grad : {&grad_key, &grad_value, &grad_pool}) torch::stable::zero_(*grad);
  if (c.B > 0 && c.G > 0 && c.pyramid.nodes > 0) {
    const std::vector<int64_t> tasks = count_backward_tasks(c, /*pool=*/true);
    Tensor partial = node_gradients(c, grad_pooled_key, grad_pooled_value);
    Tensor partial_pool = new_sums(key, {c.pool_query ? c.B * c.G * tasks[kPoolSums] * c.D : 0});
    Tensor workspace = new_sums(key, {2 * pool_children(c.pyramid) * int64_t(omp_get_max_threads())});
    const Tensor keys = to_contiguous(pooled_key), values = to_contiguous(pooled_value);
    with_type(dtype, [&](auto zero) {
      typedef decltype(zero) S;
      const auto forward = arguments<S>(c, tasks, keys, values, c.value, workspace, workspace);
      pool_of(zero).backward(backward_arguments(forward, c.value, std::nullopt, c.key, grad_key, grad_value, grad_pool,
                                                partial, partial_pool));
    });
  }
  return {to_dtype(grad_key, dtype), to_dtype(grad_value, dtype), to_dtype(grad_pool, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "hierarchical_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? pool_query, Tensor? cu_seqlens, "
      "Tensor? lengths, int block_size, int fanout, int levels, int local_blocks, bool causal, bool mass_bias, float "
      "scale, float dropout=0.0, Tensor? seed=None) -> (Tensor out, Tensor lse, "
      "Tensor pooled_key, Tensor pooled_value)");
  m.def(
      "hierarchical_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? pool_query, "
      "Tensor? cu_seqlens, Tensor? lengths, Tensor out, Tensor lse, Tensor pooled_key, Tensor pooled_value, int "
      "block_size, int fanout, int levels, "
      "int local_blocks, bool causal, bool mass_bias, float scale, Tensor? grad_lse=None, float dropout=0.0, "
      "Tensor? seed=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_pool_query)");
  m.def(
      "attention_pool_forward(Tensor key, Tensor value, Tensor? pool_query, int block_size, int fanout, int levels, "
      "float scale) -> (Tensor pooled_key, Tensor pooled_value)");
  m.def(
      "attention_pool_backward(Tensor grad_pooled_key, Tensor grad_pooled_value, Tensor key, Tensor value, "
      "Tensor? pool_query, Tensor pooled_key, Tensor pooled_value, int block_size, int fanout, int levels, "
      "float scale) -> (Tensor grad_key, Tensor grad_value, Tensor grad_pool_query)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward));
  m.impl("hierarchical_attention_forward", TORCH_BOX(&hierarchical_attention_forward));
  m.impl("hierarchical_attention_backward", TORCH_BOX(&hierarchical_attention_backward));
}

}  // namespace seqaccel::attention::hierarchical
