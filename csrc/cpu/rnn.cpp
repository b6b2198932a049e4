// Operators rnn_forward and rnn_backward: one layer of any cell, in one direction. The products over all time steps
// (input projection, weight gradients) go to aten::mm or matmul.h; the recurrence is rnn_forward.h and rnn_backward.h.
#include "rnn.h"

#include <cstring>

#include "rnn_layer.h"
#include "scratch.h"

namespace seqaccel {
namespace {

constexpr int64_t kFusedRows = 64;  // in all: with more, the recurrence calculates the input's part itself
constexpr int64_t kProjectionBytes = int64_t(32) << 20;  // held at a time where nothing is kept for a backward pass

bool run(const RnnCellEntry& cell, const RnnForward<float>& pass) { return cell.forward_float(pass); }
bool run(const RnnCellEntry& cell, const RnnForward<double>& pass) { return cell.forward_double(pass); }
bool run(const RnnCellEntry& cell, const RnnBackward<float>& pass) { return cell.backward_float(pass); }
bool run(const RnnCellEntry& cell, const RnnBackward<double>& pass) { return cell.backward_double(pass); }
void run(const RowProduct<float>& product) { active_rnn_kernels().row_product_float(product); }
void run(const RowProduct<double>& product) { active_rnn_kernels().row_product_double(product); }

// The biases of the pre-activations [kPre, H], or what there is of them.
template <typename T>
std::vector<T> bias_of(const RnnLayer& layer) {
  std::vector<T> sum;
  for (const int part : {kBiasIh, kBiasHh}) {
    if (!layer.weights[size_t(part)]) continue;
    sum.resize(size_t(layer.pre_width()), T(0));
    const T* const bias = layer.weight(part).const_data_ptr<T>();
    const int64_t rows = layer.gate_rows(), last = rows - layer.hidden;
    for (int64_t i = 0; i < rows; ++i) {
      sum[size_t(layer.cell->apart && part == kBiasHh && i >= last ? i + layer.hidden : i)] += bias[i];
    }
  }
  return sum;
}

// The input's part of the pre-activations, which a forward pass adds to the recurrent one.
struct Projection {
  Tensor values;   // [chunk * B, width] at least, G*H values of a row used; empty: calculated step by step
  int64_t width;   // from one row to the next
  int64_t chunk;   // steps held at a time
  bool in_output;  // values are the output itself
};

// values = input W_ih^T of the packed rows [first, first + rows).
template <typename T>
void project(const RnnLayer& layer, const Tensor& input, int64_t first, int64_t rows, const Tensor& weight_t,
             const Projection& projection) {
  const int64_t from = projection.in_output ? first : 0;
  if (rows <= kFewRows) {
    return run(RowProduct<T>{rows, layer.gate_rows(), layer.inputs, input.const_data_ptr<T>() + first * layer.inputs,
                             layer.weight(kWeightIh).const_data_ptr<T>(),
                             projection.values.mutable_data_ptr<T>() + from * projection.width, projection.width});
  }
  Tensor values = columns_of(rows_of(projection.values, from, rows), 0, layer.gate_rows());
  mm_out(values, rows_of(input, first, rows), weight_t);
}

struct ForwardResult {
  Tensor output, h_n, c_n;
  std::vector<Tensor> saved;
};

template <typename T>
void forward_steps(const RnnLayer& layer, const Tensor& input, const Projection& projection, bool fused, bool reverse,
                   ForwardResult& result) {
  const Tensor weight_t = torch::stable::transpose(layer.weight(kWeightIh), 0, 1);
  const std::vector<T> bias = bias_of<T>(layer);
  const bool has_cell = layer.cell->has_cell, save = !result.saved.empty();
  const Tensor *h = &layer.h_0, *c = has_cell ? &*layer.c_0 : nullptr;
  for (int64_t done = 0; done < layer.steps; done += projection.chunk) {
    const int64_t steps = std::min(projection.chunk, layer.steps - done);
    const int64_t first = reverse ? layer.steps - done - steps : done, padded = first * layer.batch;
    const int64_t packed = layer.offset(first);
    const int64_t rows = (first + steps < layer.steps ? layer.offset(first + steps) : layer.packed_rows) - packed;
    if (!fused) project<T>(layer, input, packed, rows, weight_t, projection);
    RnnForward<T> pass{};
    pass.rows = layer.rows(first, steps);
    pass.hidden = layer.hidden;
    pass.outputs = layer.outputs;
    pass.reverse = reverse;
    pass.h_0 = h->const_data_ptr<T>();
    pass.c_0 = has_cell ? c->const_data_ptr<T>() : nullptr;
    pass.weight = layer.weight(kWeightHh).const_data_ptr<T>();
    pass.bias = bias.empty() ? nullptr : bias.data();
    if (fused) {
      pass.input = input.const_data_ptr<T>() + packed * layer.inputs;
      pass.weight_ih = layer.weight(kWeightIh).const_data_ptr<T>();
      pass.inputs = layer.inputs;
    } else {
      pass.x = projection.values.const_data_ptr<T>() + (projection.in_output ? packed * projection.width : 0);
      pass.x_row = projection.width;
    }
    pass.output = result.output.mutable_data_ptr<T>() + padded * layer.outputs;
    pass.h_n = result.h_n.mutable_data_ptr<T>();
    if (has_cell) pass.c_n = result.c_n.mutable_data_ptr<T>();
    if (save) pass.saved = result.saved[0].mutable_data_ptr<T>();
    if (save && has_cell) pass.cells = result.saved[1].mutable_data_ptr<T>();
    pass.zoneout_h = blend_of<T>(layer.zoneout_h, padded * layer.outputs);
    pass.zoneout_c = blend_of<T>(layer.zoneout_c, padded * layer.hidden);
    check_workspace(run(*layer.cell, pass));
    h = &result.h_n;
    c = &result.c_n;
  }
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_forward(std::string cell, Tensor input, Tensor h_0,
                                                                    OptionalTensor c_0, WeightList weights,
                                                                    OptionalTensor lengths, OptionalTensor zoneout_h,
                                                                    OptionalTensor zoneout_c, bool reverse, bool save) {
  const RnnLayer layer = check_rnn_layer(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c);
  const int64_t T = layer.steps, B = layer.batch, H = layer.hidden, P = layer.outputs;
  const bool has_cell = layer.cell->has_cell;
  ForwardResult result;
  result.output = new_empty(input, {T, B, P});
  if (save && layer.cell->saved > 0) result.saved.push_back(new_empty(input, {T, B, layer.saved_width()}));
  if (save && has_cell) result.saved.push_back(new_empty(input, {T, B, H}));
  if (layer.packed_rows == 0) {
    if (T > 0) torch::stable::zero_(result.output);
    return {result.output, torch::stable::clone(layer.h_0),
            has_cell ? torch::stable::clone(*layer.c_0) : new_empty(input, {0}), result.saved};
  }
  result.h_n = new_empty(input, {B, P});
  result.c_n = has_cell ? new_empty(input, {B, H}) : new_empty(input, {0});

  const bool fused = layer.inputs > 0 && layer.packed_rows > kFusedRows;
  Projection projection{{}, layer.gate_rows(), T, false};
  if (!fused && layer.cell->saved == 0 && P == layer.gate_rows() && !layer.ragged()) {
    projection.values = as_rows(result.output);
    projection.in_output = true;
  } else if (!fused && !result.saved.empty()) {
    projection.values = as_rows(result.saved[0]);
    projection.width = layer.saved_width();
  } else if (!fused) {
    const int64_t step_bytes = B * layer.gate_rows() * (layer.single() ? 4 : 8);
    projection.chunk = std::min(T, std::max<int64_t>(1, kProjectionBytes / step_bytes));
    projection.values = new_empty(input, {projection.chunk * B, projection.width});
  }
  const Tensor rows = layer.ragged() ? pack_rows(layer, layer.input) : as_rows(layer.input);
  (layer.single() ? forward_steps<float> : forward_steps<double>)(layer, rows, projection, fused, reverse, result);
  if (layer.ragged()) {
    zero_padding(layer, result.output);
    for (Tensor& tensor : result.saved) {  // what follows the packed rows
      Tensor rest = rows_of(as_rows(tensor), layer.packed_rows, T * B - layer.packed_rows);
      torch::stable::zero_(rest);
    }
  }
  return {result.output, result.h_n, result.c_n, result.saved};
}

template <typename T>
bool all_zero(const Tensor& t) {
  const T* data = t.const_data_ptr<T>();
  return std::all_of(data, data + t.numel(), [](T x) { return x == T(0); });
}

// grad_weight += D^T h_0, D [B, .] columns of the gradients of each row's first step.
template <typename T>
void add_first_step(const RnnLayer& layer, const Tensor& first_step, Tensor& grad_weight) {
  if (all_zero<T>(layer.h_0)) return;
  product(grad_weight, torch::stable::transpose(first_step, 0, 1), layer.h_0, true);
}

// h' of every packed row.
Tensor pack_previous(const RnnLayer& layer, const Tensor& output, bool reverse) {
  Tensor packed = new_empty(output, {layer.packed_rows, layer.outputs});
  const size_t bytes = size_t(layer.outputs) * (layer.single() ? 4 : 8);
  const char* const from = static_cast<const char*>(output.const_data_ptr());
  const char* const h_0 = static_cast<const char*>(layer.h_0.const_data_ptr());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  for (int64_t t = 0; t < layer.steps; ++t) {
    const int64_t earlier = reverse ? t + 1 : t - 1;
    const int64_t inner = earlier < 0 || earlier >= layer.steps ? 0 : layer.running[size_t(earlier)];
    for (int64_t b = 0; b < layer.running[size_t(t)]; ++b, to += bytes) {
      const size_t row = size_t(layer.order[size_t(b)]);
      std::memcpy(to, b < inner ? from + (size_t(earlier * layer.batch) + row) * bytes : h_0 + row * bytes, bytes);
    }
  }
  return packed;
}

// grad_weight = D^T h', D columns of grad_pre [packed rows, kPre*H].
void recurrent_gradient(const RnnLayer& layer, const Tensor& columns, const Tensor& output, const Tensor& previous,
                        bool reverse, Tensor& grad_weight) {
  if (layer.ragged()) return product(grad_weight, torch::stable::transpose(columns, 0, 1), previous);
  const int64_t B = layer.batch, rest = layer.packed_rows - B;
  if (rest > 0) {
    product(grad_weight, torch::stable::transpose(rows_of(columns, reverse ? 0 : B, rest), 0, 1),
            rows_of(output, reverse ? B : 0, rest));
  } else {
    torch::stable::zero_(grad_weight);
  }
  (layer.single() ? add_first_step<float> : add_first_step<double>)(layer, rows_of(columns, reverse ? rest : 0, B),
                                                                    grad_weight);
}

struct BackwardResult {
  Tensor grad_input, grad_h_0, grad_c_0;
  std::vector<Tensor> grad_weights;
};

struct GradOutputs {
  OptionalTensor output, h_n, c_n;
};

template <typename T>
void backward_steps(const RnnLayer& layer, const GradOutputs& grads, const Tensor& output,
                    const std::vector<Tensor>& saved, bool reverse, Tensor& grad_pre, Tensor& grad_bias,
                    BackwardResult& result) {
  const bool has_cell = layer.cell->has_cell;
  RnnBackward<T> pass{};
  pass.rows = layer.rows(0, layer.steps);
  pass.hidden = layer.hidden;
  pass.outputs = layer.outputs;
  pass.reverse = reverse;
  pass.grad_output = data_or_null<T>(grads.output);
  pass.grad_h_n = data_or_null<T>(grads.h_n);
  pass.grad_c_n = data_or_null<T>(grads.c_n);
  pass.h_0 = layer.h_0.const_data_ptr<T>();
  pass.c_0 = data_or_null<T>(layer.c_0);
  pass.weight = layer.weight(kWeightHh).const_data_ptr<T>();
  pass.output = output.const_data_ptr<T>();
  if (layer.cell->saved > 0) pass.saved = saved[0].const_data_ptr<T>();
  if (has_cell) pass.cells = saved[1].const_data_ptr<T>();
  pass.grad_pre = grad_pre.mutable_data_ptr<T>();
  pass.grad_h_0 = result.grad_h_0.mutable_data_ptr<T>();
  if (has_cell) pass.grad_c_0 = result.grad_c_0.mutable_data_ptr<T>();
  pass.grad_bias = grad_bias.mutable_data_ptr<T>();
  pass.zoneout_h = blend_of<T>(layer.zoneout_h, 0);
  pass.zoneout_c = blend_of<T>(layer.zoneout_c, 0);
  check_workspace(run(*layer.cell, pass));
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_backward(
    std::string cell, OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input,
    Tensor h_0, OptionalTensor c_0, WeightList weights, OptionalTensor lengths, OptionalTensor zoneout_h,
    OptionalTensor zoneout_c, Tensor output, std::vector<Tensor> saved, bool reverse, std::vector<bool> needs) {
  const RnnLayer layer = check_rnn_layer(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c);
  const ScalarType dtype = input.scalar_type();
  const int64_t T = layer.steps, B = layer.batch, H = layer.hidden, P = layer.outputs, rows = layer.gate_rows();
  const bool has_cell = layer.cell->has_cell;
  const size_t kept = size_t(layer.cell->saved > 0) + size_t(has_cell);
  STD_TORCH_CHECK(saved.size() == kept, "seqaccel: expected ", int64_t(kept), " saved tensors of the cell '", cell,
                  "', but got ", int64_t(saved.size()));
  STD_TORCH_CHECK(needs.size() == weights.size() + 1, "seqaccel: expected needs to have ", int64_t(weights.size() + 1),
                  " entries, but got ", int64_t(needs.size()));
  check_tensor(output, "output", {T, B, P}, dtype);
  if (layer.cell->saved > 0) check_tensor(saved[0], "saved gates", {T, B, layer.saved_width()}, dtype);
  if (has_cell) check_tensor(saved[1], "saved cells", {T, B, H}, dtype);
  if (grad_output) check_tensor(*grad_output, "grad_output", {T, B, P}, dtype);
  if (grad_h_n) check_tensor(*grad_h_n, "grad_h_n", {B, P}, dtype);
  if (grad_c_n && has_cell) check_tensor(*grad_c_n, "grad_c_n", {B, H}, dtype);
  output = to_contiguous(detach(output));
  for (Tensor& tensor : saved) tensor = to_contiguous(tensor);
  const GradOutputs grads{to_contiguous(grad_output), to_contiguous(grad_h_n), to_contiguous(grad_c_n)};

  BackwardResult result;
  result.grad_input = needs[0] ? new_empty(input, {T, B, layer.inputs}) : new_empty(input, {0});
  result.grad_h_0 = new_empty(input, {B, P});
  result.grad_c_0 = has_cell ? new_empty(input, {B, H}) : new_empty(input, {0});
  const auto wanted = [&](int i) { return needs[size_t(i) + 1] && bool(weights[size_t(i)]); };
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!wanted(int(i))) {
      result.grad_weights.push_back(new_empty(input, {0}));
    } else if (weights[i]->dim() == 1) {
      result.grad_weights.push_back(new_empty(input, {weights[i]->size(0)}));
    } else {
      result.grad_weights.push_back(new_empty(input, {weights[i]->size(0), weights[i]->size(1)}));
    }
  }
  if (layer.packed_rows == 0) {
    for (Tensor& grad : result.grad_weights) torch::stable::zero_(grad);
    for (Tensor* grad : {&result.grad_input, &result.grad_h_0, &result.grad_c_0}) torch::stable::zero_(*grad);
    if (grads.h_n) torch::stable::copy_(result.grad_h_0, *grads.h_n);
    if (grads.c_n && has_cell) torch::stable::copy_(result.grad_c_0, *grads.c_n);
    return {result.grad_input, result.grad_h_0, result.grad_c_0, result.grad_weights};
  }

  Scratch scratch(input, layer.packed_rows * layer.pre_width());
  Tensor grad_pre = scratch.matrix(layer.packed_rows, layer.pre_width());
  Tensor grad_bias = new_empty(input, {layer.pre_width()});
  (layer.single() ? backward_steps<float> : backward_steps<double>)(layer, grads, output, saved, reverse, grad_pre,
                                                                    grad_bias, result);
  const Tensor of_input = columns_of(grad_pre, 0, rows);
  if (needs[0] && layer.ragged()) {
    Tensor packed = new_empty(input, {layer.packed_rows, layer.inputs});
    product(packed, of_input, layer.weight(kWeightIh));
    unpack_rows(layer, packed, result.grad_input);
  } else if (needs[0]) {
    Tensor flat = as_rows(result.grad_input);
    product(flat, of_input, layer.weight(kWeightIh));
  }
  if (wanted(kWeightIh)) {
    product(result.grad_weights[kWeightIh], torch::stable::transpose(of_input, 0, 1),
            layer.ragged() ? pack_rows(layer, layer.input) : as_rows(layer.input));
  }
  // The last gate's pre-activation of h' may lie apart, behind the others.
  const int64_t joined = layer.cell->apart ? rows - H : rows;
  if (wanted(kWeightHh)) {
    const Tensor previous = layer.ragged() ? pack_previous(layer, output, reverse) : Tensor();
    const Tensor flat = as_rows(output);
    for (const int64_t first : {int64_t(0), joined}) {
      const int64_t count = first ? rows - joined : joined;
      if (count == 0) continue;
      Tensor grad = rows_of(result.grad_weights[kWeightHh], first, count);
      recurrent_gradient(layer, columns_of(grad_pre, first ? rows : 0, count), flat, previous, reverse, grad);
    }
  }
  if (wanted(kBiasIh)) torch::stable::copy_(result.grad_weights[kBiasIh], rows_of(grad_bias, 0, rows));
  if (wanted(kBiasHh)) {
    Tensor front = rows_of(result.grad_weights[kBiasHh], 0, joined);
    torch::stable::copy_(front, rows_of(grad_bias, 0, joined));
    if (joined < rows) {
      Tensor back = rows_of(result.grad_weights[kBiasHh], joined, rows - joined);
      torch::stable::copy_(back, rows_of(grad_bias, rows, rows - joined));
    }
  }
  return {result.grad_input, result.grad_h_0, result.grad_c_0, result.grad_weights};
}

}  // namespace

const RnnCellEntry* find_rnn_cell(const char* name) {
  const RnnKernels& kernels = active_rnn_kernels();
  for (int i = 0; i < kernels.count; ++i) {
    if (std::strcmp(kernels.cells[i].name, name) == 0) return &kernels.cells[i];
  }
  return nullptr;
}

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "rnn_forward(str cell, Tensor input, Tensor h_0, Tensor? c_0, Tensor?[] weights, Tensor? lengths, "
      "Tensor? zoneout_h, Tensor? zoneout_c, bool reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "rnn_backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, "
      "Tensor? c_0, Tensor?[] weights, Tensor? lengths, Tensor? zoneout_h, Tensor? zoneout_c, Tensor output, "
      "Tensor[] saved, bool reverse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace seqaccel
