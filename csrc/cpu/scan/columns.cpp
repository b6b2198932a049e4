// The operators of the column cells on a CPU.
#include "cpu/scan/columns.h"

#include "common/column_arguments.h"
#include "cpu/base/pool.h"

namespace seqaccel::scan {
namespace {

// Where sequences begin: whatever the offsets are, ascending and within the steps.
class Starts {
 public:
  Starts(const OptionalTensor& offsets, int64_t steps) : steps_(steps) {
    if (!offsets) return;
    const int64_t* const given = offsets->const_data_ptr<int64_t>();
    int64_t last = 0;
    for (int64_t i = 0; i < offsets->size(0); ++i) {
      last = std::max(last, std::min(given[i], steps));
      starts_.push_back(last);
    }
  }
  const int64_t* data() const { return starts_.empty() ? nullptr : starts_.data(); }
  // Zeros, where steps belong to no sequence.
  void fill(std::initializer_list<Tensor*> tensors) const {
    if (starts_.empty() || (starts_.front() == 0 && starts_.back() == steps_)) return;
    for (Tensor* const t : tensors) {
      if (t->numel() > 0) torch::stable::zero_(*t);
    }
  }

 private:
  std::vector<int64_t> starts_;
  int64_t steps_;
};

std::tuple<Tensor, Tensor, Tensor> column_forward(Text cell, Tensor u, OptionalTensor x, OptionalTensor weight,
                                                  OptionalTensor bias, Tensor c_0, OptionalTensor mask,
                                                  OptionalTensor scale, OptionalTensor mask_pad, OptionalTensor reset,
                                                  OptionalTensor cu_seqlens, int64_t directions, bool save) {
  ColumnTensors t = {u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens};
  const ColumnCall call = ColumnCall::check(cell.value, t, directions);
  ColumnResults made(call, t, save, new_pooled);
  const Starts starts(t.cu_seqlens, call.shape.steps);
  starts.fill({&made.h, &made.c});
  ColumnForward p = {call.operands(t), made.h.mutable_data_ptr(), made.c_n.mutable_data_ptr(),
                     made.kept ? made.c.mutable_data_ptr() : nullptr};
  p.in.shape.starts = starts.data();
  active_column_table().cells[call.cell].forward[call.dtype](p);
  return {made.h, made.c_n, made.c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> column_backward(Text cell, Tensor grad_h, OptionalTensor grad_c_n,
                                                                   Tensor u, OptionalTensor x, OptionalTensor weight,
                                                                   OptionalTensor bias, Tensor c_0, OptionalTensor mask,
                                                                   OptionalTensor scale, OptionalTensor mask_pad,
                                                                   OptionalTensor reset, OptionalTensor cu_seqlens,
                                                                   Tensor c, int64_t directions) {
  ColumnTensors t = {u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens};
  const ColumnCall call = ColumnCall::check(cell.value, t, directions);
  const int64_t channels = t.c_0.size(1);
  const ScalarType dtype = t.u.scalar_type();
  check_operand(grad_h, "grad_h", {call.shape.steps, call.rows, channels}, t.u, dtype);
  check_operand(grad_c_n, "grad_c_n", {call.shape.batch, channels}, t.u, dtype);
  check_operand(c, "c", {call.shape.steps, call.rows, channels}, t.u, dtype);
  grad_h = to_contiguous(grad_h);
  grad_c_n = to_contiguous(grad_c_n);
  c = to_contiguous(c);
  ColumnGradients g(t, new_pooled);
  const auto out = [](Tensor& to, bool wanted) { return wanted ? to.mutable_data_ptr() : nullptr; };
  const Starts starts(t.cu_seqlens, call.shape.steps);
  starts.fill({&g.u, &g.x});
  ColumnBackward p = {call.operands(t),
                      grad_h.const_data_ptr(),
                      grad_c_n ? grad_c_n->const_data_ptr() : nullptr,
                      c.const_data_ptr(),
                      out(g.u, true),
                      out(g.x, t.x.has_value()),
                      out(g.weight, t.weight.has_value()),
                      out(g.bias, t.bias.has_value()),
                      out(g.c_0, true)};
  p.in.shape.starts = starts.data();
  STD_TORCH_CHECK(active_column_table().cells[call.cell].backward[call.dtype](p),
                  "seqaccel: not enough memory for the gradients of the parameters");
  return {g.u, g.x, g.weight, g.bias, g.c_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "column_forward(str cell, Tensor u, Tensor? x, Tensor? weight, Tensor? bias, Tensor c_0, Tensor? mask, "
      "Tensor? scale, Tensor? mask_pad, Tensor? reset, Tensor? cu_seqlens, int directions, bool save) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "column_backward(str cell, Tensor grad_h, Tensor? grad_c_n, Tensor u, Tensor? x, Tensor? weight, Tensor? bias, "
      "Tensor c_0, Tensor? mask, Tensor? scale, Tensor? mask_pad, Tensor? reset, Tensor? cu_seqlens, Tensor c, "
      "int directions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("column_forward", TORCH_BOX(&column_forward));
  m.impl("column_backward", TORCH_BOX(&column_backward));
}

}  // namespace seqaccel::scan
