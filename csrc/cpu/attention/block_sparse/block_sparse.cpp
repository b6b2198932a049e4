// The operators of block-sparse attention: checks, sizes, allocation, the plan of the backward pass.
#include "cpu/attention/block_sparse/block_sparse.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/attention/operands.h"

namespace seqaccel::attention::block_sparse {
namespace {

// The arguments that both operators share, after checks.
struct Call {
  Tensor query, key, value, layout;
  int64_t B, H, G, Tq, Tk, D, Dv, block_size;
  bool causal;
  double scale;
};

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& layout, int64_t block_size,
               bool causal, double scale) {
  check_floating(query, "query");
  const ScalarType dtype = query.scalar_type();
  check_tensor(query, "query", {-1, -1, -1, -1}, dtype);
  const int64_t B = query.size(0), H = query.size(1), Tq = query.size(2), D = query.size(3);
  check_tensor(key, "key", {B, -1, -1, D}, dtype);
  const int64_t G = key.size(1), Tk = key.size(2);
  check_tensor(value, "value", {B, G, Tk, -1}, dtype);
  STD_TORCH_CHECK(G > 0 ? H % G == 0 : H == 0, "seqaccel: expected the ", H, " heads of query to be a multiple of the ",
                  G, " heads of key");
  STD_TORCH_CHECK(D > 0, "seqaccel: expected query to have at least one element a head");
  STD_TORCH_CHECK(block_size >= 1, "seqaccel: expected block_size to be at least 1, but got ", block_size);
  const int64_t size = std::min(block_size, std::max<int64_t>(std::max(Tq, Tk), 1));
  STD_TORCH_CHECK(layout.scalar_type() == ScalarType::Bool, "seqaccel: expected layout to be bool");
  check_tensor(layout, "layout", {B, H, -1, -1}, ScalarType::Bool);
  const int64_t query_blocks = (Tq + size - 1) / size, key_blocks = (Tk + size - 1) / size;
  STD_TORCH_CHECK(layout.size(2) >= query_blocks && layout.size(3) >= key_blocks, "seqaccel: expected layout to have ",
                  query_blocks, " query blocks and ", key_blocks, " key blocks, but got ", shape_string(layout));
  return {rows_contiguous(query),
          rows_contiguous(key),
          rows_contiguous(value),
          rows_contiguous(layout),
          B,
          H,
          G,
          Tq,
          Tk,
          D,
          value.size(3),
          size,
          causal,
          scale};
}

Layout layout_of(const Call& c) {
  const Tensor& t = c.layout;
  return {t.const_data_ptr<bool>(),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          (c.Tq + c.block_size - 1) / c.block_size,
          (c.Tk + c.block_size - 1) / c.block_size,
          c.block_size,
          c.causal};
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
Attention<S> arguments(const Call& c, const Tensor& out, const Tensor& lse, const Tensor& workspace) {
  typedef Compute<S> T;
  Attention<S> p;
  p.B = c.B;
  p.H = c.H;
  p.G = c.G;
  p.Tq = c.Tq;
  p.Tk = c.Tk;
  p.D = c.D;
  p.Dv = c.Dv;
  p.layout = layout_of(c);
  p.scale = T(c.scale);
  p.query = read<S>(c.query);
  p.key = read<S>(c.key);
  p.value = read<S>(c.value);
  p.out = write<S>(out);
  p.lse = lse.mutable_data_ptr<T>();
  p.workspace = workspace.mutable_data_ptr<T>();
  return p;
}

std::tuple<Tensor, Tensor> block_sparse_attention_forward(Tensor query, Tensor key, Tensor value, Tensor layout,
                                                          int64_t block_size, bool causal, double scale) {
  const Call c = make_call(query, key, value, layout, block_size, causal, scale);
  Tensor out = empty_heads(query, c.Dv);
  Tensor lse = new_sums(query, {c.B, c.H, c.Tq});
  if (lse.numel() == 0) return {out, lse};
  with_type(query.scalar_type(), [&](auto zero) {
    const auto& kernel = forward_of(zero, c);
    Tensor workspace = new_sums(query, {kernel.workspace(c.D, c.Dv) * int64_t(omp_get_max_threads())});
    kernel.run(arguments<decltype(zero)>(c, out, lse, workspace));
  });
  return {out, lse};
}

// Segments of a key head's query blocks, and where each adds the gradients of the key blocks that it sees. Layouts that
// batch entries or heads share have one plan.
struct Plan {
  int64_t segments, batch, head, partial_blocks = 0;
  std::vector<int64_t> first;
  std::vector<int32_t> place;
};

// Plans for this number of segments. Each has about the same number of pairs of blocks.
Plan make_plan(const Call& c, const Layout& layout, int64_t segments) {
  const int64_t rows = layout.query_blocks, columns = layout.key_blocks, group = c.H / c.G;
  const int64_t heads = layout.head == 0 ? 1 : c.G, batches = layout.batch == 0 ? 1 : c.B;
  Plan plan;
  plan.segments = segments;
  plan.batch = layout.batch == 0 ? 0 : heads;
  plan.head = layout.head == 0 ? 0 : 1;
  std::vector<int64_t> pairs(size_t(rows) + 1);
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t g = 0; g < heads; ++g) {
      const auto each = [&](int64_t row, const auto& f) {
        for (int64_t h = g * group; h < (layout.head == 0 ? g * group + 1 : (g + 1) * group); ++h) {
          const bool* seen = layout.at(b, h, row);
          for (int64_t i = 0, n = layout.reach(row); i < n; ++i) f(i, seen[i]);
        }
      };
      for (int64_t row = 0; row < rows; ++row) {
        int64_t count = 1;  // a row without keys has its zeros to write
        each(row, [&](int64_t, bool seen) { count += seen; });
        pairs[row + 1] = pairs[row] + count;
      }
      std::vector<int32_t> owner(size_t(columns), kUnseen);
      int32_t partial = 0;
      plan.first.push_back(0);
      for (int64_t s = 0, row = 0; s < segments; ++s) {
        const int64_t target = pairs[rows] / segments * (s + 1);
        std::vector<int32_t> place(size_t(columns), kUnseen);
        for (; row < rows && (s + 1 == segments || pairs[row + 1] <= target); ++row) {
          each(row, [&](int64_t i, bool seen) {
            if (seen) place[i] = kInPlace;
          });
        }
        for (int64_t i = 0; i < columns; ++i) {
          if (place[i] == kInPlace && owner[i] == kInPlace)
            place[i] = partial++;
          else if (place[i] == kInPlace)
            owner[i] = kInPlace;
          // What no segment sees is zeroed by the last one.
          if (s + 1 == segments && owner[i] == kUnseen) place[i] = kInPlace;
        }
        plan.first.push_back(row);
        plan.place.insert(plan.place.end(), place.begin(), place.end());
      }
      plan.partial_blocks = std::max<int64_t>(plan.partial_blocks, partial);
    }
  }
  return plan;
}

// The shape and the layout alone decide, so that results do not depend on the threads. There are enough segments for
// many cores, but each has at least 1024 queries on average, and the blocks of `partial` are at most three times the
// gradients.
Plan make_plan(const Call& c, const Layout& layout) {
  const int64_t wanted = (32 + c.B * c.G - 1) / (c.B * c.G);
  int64_t segments = std::max<int64_t>(1, std::min(wanted, c.Tq / 1024));
  for (;; segments /= 2) {
    Plan plan = make_plan(c, layout, segments);
    if (plan.partial_blocks <= 3 * layout.key_blocks) return plan;
  }
}

template <typename S>
AttentionBackward<S> backward_arguments(const Call& c, const Attention<S>& forward, const Plan& plan,
                                        const Tensor& grad_out, const Tensor& grad_query, const Tensor& grad_key,
                                        const Tensor& grad_value, const Tensor& partial_key,
                                        const Tensor& partial_value) {
  typedef Compute<S> T;
  AttentionBackward<S> p;
  p.forward = forward;
  p.grad_out = read<S>(grad_out);
  p.grad_query = write<S>(grad_query);
  p.grad_key = write<T>(grad_key);
  p.grad_value = write<T>(grad_value);
  p.segments = plan.segments;
  p.plan_batch = plan.batch;
  p.plan_head = plan.head;
  p.first = plan.first.data();
  p.place = plan.place.data();
  p.partial_blocks = plan.partial_blocks;
  p.partial_key = partial_key.mutable_data_ptr<T>();
  p.partial_value = partial_value.mutable_data_ptr<T>();
  return p;
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(Tensor grad_out, Tensor query, Tensor key,
                                                                   Tensor value, Tensor layout, Tensor out, Tensor lse,
                                                                   int64_t block_size, bool causal, double scale) {
  const Call c = make_call(query, key, value, layout, block_size, causal, scale);
  const ScalarType dtype = query.scalar_type();
  check_tensor(grad_out, "grad_out", {c.B, c.H, c.Tq, c.Dv}, dtype);
  check_tensor(out, "out", {c.B, c.H, c.Tq, c.Dv}, dtype);
  check_tensor(lse, "lse", {c.B, c.H, c.Tq}, compute_dtype(dtype));
  const Tensor grad_rows = rows_contiguous(grad_out), out_rows = rows_contiguous(out);
  const Tensor lse_rows = to_contiguous(lse);
  Tensor grad_query = empty_heads(query), grad_key = empty_sums(key, c.D), grad_value = empty_sums(value, c.Dv);
  const auto results = [&] { return std::tuple(grad_query, to_dtype(grad_key, dtype), to_dtype(grad_value, dtype)); };
  if (lse.numel() == 0 || key.size(2) == 0) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*grad);
    return results();
  }
  const Plan plan = make_plan(c, layout_of(c));
  const int64_t partial_rows = c.B * c.G * plan.partial_blocks * c.block_size;
  Tensor partial_key = new_sums(query, {partial_rows * c.D}), partial_value = new_sums(query, {partial_rows * c.Dv});
  with_type(dtype, [&](auto zero) {
    const auto& kernel = backward_of(zero, c);
    Tensor workspace = new_sums(query, {kernel.workspace(c.D, c.Dv) * int64_t(omp_get_max_threads())});
    const auto forward = arguments<decltype(zero)>(c, out_rows, lse_rows, workspace);
    kernel.run(
        backward_arguments(c, forward, plan, grad_rows, grad_query, grad_key, grad_value, partial_key, partial_value));
  });
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "block_sparse_attention_forward(Tensor query, Tensor key, Tensor value, Tensor layout, int block_size, "
      "bool causal, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor layout, "
      "Tensor out, Tensor lse, int block_size, bool causal, float scale) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("block_sparse_attention_forward", TORCH_BOX(&block_sparse_attention_forward));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward));
}

}  // namespace seqaccel::attention::block_sparse
