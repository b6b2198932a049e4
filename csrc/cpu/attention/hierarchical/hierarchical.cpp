// The operators of hierarchical attention: checks, sizes, allocation.
#include "cpu/attention/hierarchical/hierarchical.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/attention/operands.h"

namespace seqaccel::attention::hierarchical {
namespace {

// The arguments that both operators share, after checks.
struct Call {
  Tensor query, key, value;
  OptionalTensor pool_query;
  Pyramid pyramid;
  int64_t B, H, G, T, D;
  bool mass_bias;
  double scale;
};

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pool_query,
               int64_t block_size, int64_t fanout, int64_t levels, int64_t local_blocks, bool causal, bool mass_bias,
               double scale) {
  check_float_or_double(query, "query");
  const ScalarType dtype = query.scalar_type();
  check_tensor(query, "query", {-1, -1, -1, -1}, dtype);
  const int64_t B = query.size(0), H = query.size(1), T = query.size(2), D = query.size(3);
  check_tensor(key, "key", {B, -1, T, D}, dtype);
  const int64_t G = key.size(1);
  check_tensor(value, "value", {B, G, T, D}, dtype);
  STD_TORCH_CHECK(G > 0 ? H % G == 0 : H == 0, "seqaccel: expected the ", H, " heads of query to be a multiple of the ",
                  G, " heads of key");
  STD_TORCH_CHECK(D > 0, "seqaccel: expected query to have at least one element a head");
  if (pool_query) {
    check_tensor(*pool_query, "pool_query", {-1, G, D}, dtype);
    STD_TORCH_CHECK(pool_query->size(0) > 0, "seqaccel: expected pool_query to have at least one row");
  }
  STD_TORCH_CHECK(block_size >= 2 && fanout >= 2, "seqaccel: expected block_size and fanout to be at least 2, but got ",
                  block_size, " and ", fanout);
  STD_TORCH_CHECK(local_blocks >= 1, "seqaccel: expected local_blocks to be at least 1, but got ", local_blocks);
  return {rows_contiguous(query),
          rows_contiguous(key),
          rows_contiguous(value),
          to_contiguous(pool_query),
          make_pyramid(T, block_size, fanout, levels, local_blocks, causal),
          B,
          H,
          G,
          T,
          D,
          mass_bias,
          scale};
}

template <typename T>
Attention<T> arguments(const Call& c, const Tensor& pooled_key, const Tensor& pooled_value, const Tensor& out,
                       const Tensor& lse, const Tensor& workspace) {
  Attention<T> p;
  p.B = c.B;
  p.H = c.H;
  p.G = c.G;
  p.D = c.D;
  p.pyramid = c.pyramid;
  p.scale = T(c.scale);
  for (int l = 0; l <= c.pyramid.levels; ++l) {
    p.bias[l] = c.mass_bias ? T(std::log(double(c.pyramid.span[l]))) : T(0);
  }
  p.query = read<T>(c.query);
  p.key = read<T>(c.key);
  p.value = read<T>(c.value);
  p.pool_query = data_or_null<T>(c.pool_query);
  p.P = c.pool_query ? c.pool_query->size(0) : 0;
  p.pooled_key = pooled_key.mutable_data_ptr<T>();
  p.pooled_value = pooled_value.mutable_data_ptr<T>();
  p.out = write<T>(out);
  p.lse = lse.mutable_data_ptr<T>();
  p.workspace = workspace.mutable_data_ptr<T>();
  return p;
}

// Rows per head in the arrays of pooled keys and values. There are at least two: a size of 0 or 1 would tie an exported
// graph to its T.
int64_t pooled_rows(const Call& c) { return c.T == 0 ? 0 : std::max<int64_t>(c.pyramid.nodes, 2); }

Tensor new_pooled(const Call& c) {
  Tensor pooled = new_tensor(c.query, {c.B, c.G, pooled_rows(c), c.D});
  if (c.pyramid.nodes < 2) torch::stable::zero_(pooled);
  return pooled;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hierarchical_attention_forward(Tensor query, Tensor key, Tensor value,
                                                                          OptionalTensor pool_query, int64_t block_size,
                                                                          int64_t fanout, int64_t levels,
                                                                          int64_t local_blocks, bool causal,
                                                                          bool mass_bias, double scale) {
  const Call c =
      make_call(query, key, value, pool_query, block_size, fanout, levels, local_blocks, causal, mass_bias, scale);
  const bool is_double = query.scalar_type() == ScalarType::Double;
  Tensor out = empty_heads(query);
  Tensor lse = new_tensor(query, {c.B, c.H, c.T});
  Tensor pooled_key = new_pooled(c), pooled_value = new_pooled(c);
  if (out.numel() == 0) {
    for (Tensor* pooled : {&pooled_key, &pooled_value}) torch::stable::zero_(*pooled);
    return {out, lse, pooled_key, pooled_value};
  }
  const AttentionKernels& kernels = active_attention_kernels();
  const int64_t share = kernels.forward_workspace(c.D, pool_children(c.pyramid), is_double);
  Tensor workspace = new_tensor(query, {share * omp_get_max_threads()});
  if (is_double) {
    kernels.forward_double(arguments<double>(c, pooled_key, pooled_value, out, lse, workspace));
  } else {
    kernels.forward_float(arguments<float>(c, pooled_key, pooled_value, out, lse, workspace));
  }
  return {out, lse, pooled_key, pooled_value};
}

// How many segments a head's query blocks are split into in the backward pass. The shape alone decides, so that results
// do not depend on the threads. There are enough for many cores, but each has at least 16 blocks and 1024 queries,
// which keeps the part that segments share small.
int64_t backward_segments(const Call& c) {
  const int64_t blocks = query_blocks(c.pyramid);
  const int64_t least = std::max<int64_t>(16, (1024 + c.pyramid.block_size - 1) / c.pyramid.block_size);
  const int64_t wanted = (32 + c.B * c.G - 1) / std::max<int64_t>(1, c.B * c.G);
  return std::max<int64_t>(1, std::min(wanted, blocks / least));
}

template <typename T>
AttentionBackward<T> backward_arguments(const Call& c, const Attention<T>& forward, const Tensor& grad_out,
                                        const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                                        const Tensor& grad_pool, int64_t segments, const Tensor& partial,
                                        const Tensor& partial_pool) {
  AttentionBackward<T> p;
  p.forward = forward;
  p.grad_out = read<T>(grad_out);
  p.grad_query = write<T>(grad_query);
  p.grad_key = write<T>(grad_key);
  p.grad_value = write<T>(grad_value);
  p.grad_pool = c.pool_query ? grad_pool.mutable_data_ptr<T>() : nullptr;
  p.segments = segments;
  p.partial = partial.mutable_data_ptr<T>();
  p.partial_pool = partial_pool.mutable_data_ptr<T>();
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hierarchical_attention_backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, OptionalTensor pool_query, Tensor out, Tensor lse,
    Tensor pooled_key, Tensor pooled_value, int64_t block_size, int64_t fanout, int64_t levels, int64_t local_blocks,
    bool causal, bool mass_bias, double scale) {
  const Call c =
      make_call(query, key, value, pool_query, block_size, fanout, levels, local_blocks, causal, mass_bias, scale);
  const ScalarType dtype = query.scalar_type();
  const bool is_double = dtype == ScalarType::Double;
  check_tensor(grad_out, "grad_out", {c.B, c.H, c.T, c.D}, dtype);
  check_tensor(out, "out", {c.B, c.H, c.T, c.D}, dtype);
  check_tensor(lse, "lse", {c.B, c.H, c.T}, dtype);
  check_tensor(pooled_key, "pooled_key", {c.B, c.G, pooled_rows(c), c.D}, dtype);
  check_tensor(pooled_value, "pooled_value", {c.B, c.G, pooled_rows(c), c.D}, dtype);
  const Tensor grad_rows = rows_contiguous(grad_out), out_rows = rows_contiguous(out);
  const Tensor lse_rows = to_contiguous(lse);
  const Tensor keys = to_contiguous(pooled_key), values = to_contiguous(pooled_value);
  Tensor grad_query = empty_heads(query), grad_key = empty_heads(key), grad_value = empty_heads(value);
  Tensor grad_pool =
      c.pool_query ? new_tensor(query, {c.pool_query->size(0), c.G, c.D}) : new_tensor(query, {0, c.G, c.D});
  if (out.numel() == 0) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_pool}) torch::stable::zero_(*grad);
    return {grad_query, grad_key, grad_value, grad_pool};
  }
  const int64_t segments = backward_segments(c);
  int64_t rows = 0;
  for (int64_t s = 0; s < segments; ++s) {
    rows += c.pyramid.nodes + outside_rows(c.pyramid, segment_outside(c.pyramid, s, segments));
  }
  Tensor partial = new_tensor(query, {c.B * c.G * rows * 2 * c.D});
  Tensor partial_pool = new_tensor(query, {c.pool_query ? pool_tasks(c.pyramid, c.B * c.G) * c.D : 0});
  const AttentionBackwardKernels& kernels = active_attention_backward_kernels();
  const int64_t share = kernels.backward_workspace(c.D, pool_children(c.pyramid), is_double);
  Tensor workspace = new_tensor(query, {share * omp_get_max_threads()});
  if (is_double) {
    kernels.backward_double(backward_arguments(c, arguments<double>(c, keys, values, out_rows, lse_rows, workspace),
                                               grad_rows, grad_query, grad_key, grad_value, grad_pool, segments,
                                               partial, partial_pool));
  } else {
    kernels.backward_float(backward_arguments(c, arguments<float>(c, keys, values, out_rows, lse_rows, workspace),
                                              grad_rows, grad_query, grad_key, grad_value, grad_pool, segments, partial,
                                              partial_pool));
  }
  return {grad_query, grad_key, grad_value, grad_pool};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "hierarchical_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? pool_query, int block_size, "
      "int fanout, int levels, int local_blocks, bool causal, bool mass_bias, float scale) -> (Tensor out, Tensor lse, "
      "Tensor pooled_key, Tensor pooled_value)");
  m.def(
      "hierarchical_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? pool_query, "
      "Tensor out, Tensor lse, Tensor pooled_key, Tensor pooled_value, int block_size, int fanout, int levels, "
      "int local_blocks, bool causal, bool mass_bias, float scale) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value, Tensor grad_pool_query)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("hierarchical_attention_forward", TORCH_BOX(&hierarchical_attention_forward));
  m.impl("hierarchical_attention_backward", TORCH_BOX(&hierarchical_attention_backward));
}

}  // namespace seqaccel::attention::hierarchical
