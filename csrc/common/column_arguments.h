// The arguments of the column operators, checked once for the CPU and the GPU: ranks, sizes, dtypes and devices, in
// O(1), so that no call can make a kernel read or write out of bounds.
#pragma once

#include <optional>

#include "common/column_list.h"
#include "common/scan_arguments.h"

namespace seqaccel::scan {

struct ColumnTensors {
  Tensor u;
  OptionalTensor x, weight, bias;
  Tensor c_0;
  OptionalTensor mask, scale, mask_pad, reset, cu_seqlens;
};

// The index of a dtype in the tables of kernels.
inline int column_dtype(const Tensor& u) {
  switch (u.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    default:
      STD_TORCH_CHECK(false, "seqaccel: expected u to be float32, float64, bfloat16 or float16");
  }
}

struct ColumnCall {
  size_t cell;  // its index in ColumnCells
  const ColumnCell& traits;
  int dtype;
  ColumnShape shape;  // without starts
  int64_t rows;       // of the tensors with steps; shape.batch is that of the state

  // Checks the operands and makes them contiguous.
  static ColumnCall check(const std::string& name, ColumnTensors& t, int64_t directions) {
    const int dtype = column_dtype(t.u);
    const ScalarType type = t.u.scalar_type();
    STD_TORCH_CHECK(t.u.dim() == 3, "seqaccel: expected u to have 3 dimensions, but got ", shape_string(t.u));
    STD_TORCH_CHECK(t.c_0.dim() == 2, "seqaccel: expected c_0 to have 2 dimensions, but got ", shape_string(t.c_0));
    STD_TORCH_CHECK(directions == 1 || directions == 2, "seqaccel: expected directions to be 1 or 2, but got ",
                    directions);
    check_memory(t.u, "u");
    const int64_t steps = t.u.size(0), rows = t.u.size(1), channels = t.c_0.size(1);
    STD_TORCH_CHECK(channels > 0 && channels % directions == 0,
                    "seqaccel: expected the channels of c_0 to be a positive multiple of directions, but got ",
                    shape_string(t.c_0), " and ", directions, " directions");
    const size_t cell = find(name, t, channels);
    const ColumnCell& traits = kColumnCells[cell];
    int64_t batch = rows;
    if (t.cu_seqlens) {
      STD_TORCH_CHECK(t.cu_seqlens->dim() == 1 && t.cu_seqlens->size(0) > 0 && rows == 1 && !t.mask_pad && !t.reset,
                      "seqaccel: expected cu_seqlens to have shape [N + 1], u one row, and neither mask_pad nor reset");
      batch = t.cu_seqlens->size(0) - 1;
      check_operand(t.cu_seqlens, "cu_seqlens", {batch + 1}, t.u, ScalarType::Long);
    }
    check_operand(t.c_0, "c_0", {batch, channels}, t.u, type);
    check_operand(t.x, "x", {steps, rows, channels}, t.u, type);
    check_operand(t.weight, "weight", {traits.weights * channels}, t.u, type);
    check_operand(t.bias, "bias", {traits.biases * channels}, t.u, type);
    if (traits.mask == Mask::step) {
      check_operand(t.mask, "mask", {steps, rows, channels}, t.u, type);
    } else {
      check_operand(t.mask, "mask", {batch, channels}, t.u, type);
    }
    check_operand(t.scale, "scale", {1}, t.u, type);
    check_operand(t.mask_pad, "mask_pad", {steps, rows}, t.u, ScalarType::Bool);
    check_operand(t.reset, "reset", {steps, rows}, t.u, ScalarType::Bool);
    const auto none = [&](const OptionalTensor& operand, const char* what, bool has) {
      STD_TORCH_CHECK(has || !operand, "seqaccel: ", name, " takes no ", what);
    };
    none(t.weight, "weight", traits.weights > 0);
    none(t.bias, "bias", traits.biases > 0);
    none(t.mask, "mask", traits.mask != Mask::none);
    none(t.scale, "scale", traits.scale || traits.mask == Mask::column);  // (of an SRU without x it scales nothing)
    t.u = to_contiguous(t.u);
    t.c_0 = to_contiguous(t.c_0);
    for (OptionalTensor* operand :
         {&t.x, &t.weight, &t.bias, &t.mask, &t.scale, &t.mask_pad, &t.reset, &t.cu_seqlens}) {
      *operand = to_contiguous(*operand);
    }
    return {cell, traits, dtype, {steps, batch, directions, channels / directions, nullptr}, rows};
  }

  ColumnOperands operands(const ColumnTensors& t) const {
    const auto data = [](const OptionalTensor& o) { return o ? o->const_data_ptr() : nullptr; };
    ColumnShape with_starts = shape;
    with_starts.starts = data_or_null<int64_t>(t.cu_seqlens);
    return {with_starts,
            t.u.const_data_ptr(),
            data(t.x),
            data(t.weight),
            data(t.bias),
            t.c_0.const_data_ptr(),
            data(t.mask),
            data(t.scale),
            data_or_null<bool>(t.mask_pad),
            data_or_null<bool>(t.reset)};
  }

 private:
  static size_t find(const std::string& name, const ColumnTensors& t, int64_t channels) {
    const bool divides = t.u.size(2) % channels == 0;
    const ColumnCell* const cell = find_column_cell(name, divides ? t.u.size(2) / channels : 0, t.x.has_value());
    STD_TORCH_CHECK(cell, "seqaccel: there is no cell '", name, "' whose u has the features of ", shape_string(t.u),
                    " for the ", channels, " channels of c_0", t.x ? ", with x" : ", without x");
    return size_t(cell - kColumnCells.data());
  }
};

// Makes an uninitialised tensor.
typedef Tensor (*NewTensor)(const Tensor& like, const Extents& sizes);

// The results of the forward pass: h, c_n and c; c is empty where it is not kept, or is h.
struct ColumnResults {
  Tensor h, c_n, c;
  bool kept;
  ColumnResults(const ColumnCall& call, const ColumnTensors& t, bool save, NewTensor make)
      : h(make(t.u, {call.shape.steps, call.rows, t.c_0.size(1)})),
        c_n(make(t.c_0, sizes_of(t.c_0))),
        c(make(t.u, {0})),
        kept(save && (!call.traits.output_is_state || t.mask_pad)) {
    if (kept) c = make(t.u, sizes_of(h));
  }
};

// The gradients of u, x, weight, bias and c_0; empty of what there is not.
struct ColumnGradients {
  Tensor u, x, weight, bias, c_0;
  ColumnGradients(const ColumnTensors& t, NewTensor make)
      : u(make(t.u, sizes_of(t.u))),
        x(make(t.u, sizes_of(t.x))),
        weight(new_tensor(t.u, sizes_of(t.weight))),
        bias(new_tensor(t.u, sizes_of(t.bias))),
        c_0(make(t.u, sizes_of(t.c_0))) {}

 private:
  static Extents sizes_of(const OptionalTensor& t) { return t ? seqaccel::sizes_of(*t) : Extents{0}; }
};

}  // namespace seqaccel::scan
