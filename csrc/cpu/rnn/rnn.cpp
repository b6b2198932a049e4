// Operators rnn_forward and rnn_backward: one layer of any cell, in one direction. The products over all time steps
// (input projection, weight gradients) go to aten::mm or matmul.h; the recurrence is forward.h and backward.h.
#include "cpu/rnn/rnn.h"

#include <cstring>

#include "cpu/base/scratch.h"
#include "cpu/base/threads.h"
#include "cpu/rnn/layer.h"

namespace seqaccel::rnn {
namespace {

constexpr int64_t kFusedRows = 64;  // with more rows in all, the recurrence may compute the input's part itself
constexpr int64_t kProjectionBytes = int64_t(64) << 20;  // of W_ih x held at a time if no backward pass follows
// Bytes of dL/dpre held at a time. They decide how many steps (at least one) a backward pass without lengths runs at
// once.
constexpr int64_t kGradBytes = int64_t(32) << 20;

bool run(const RnnCellEntry& cell, const RnnForward<float>& pass) { return cell.forward_float(pass); }
bool run(const RnnCellEntry& cell, const RnnForward<double>& pass) { return cell.forward_double(pass); }
bool run(const RnnCellEntry& cell, const RnnBackward<float>& pass) { return cell.backward_float(pass); }
bool run(const RnnCellEntry& cell, const RnnBackward<double>& pass) { return cell.backward_double(pass); }
void run(const RowProduct<float>& product) { active_rnn_kernels().row_product_float(product); }
void run(const RowProduct<double>& product) { active_rnn_kernels().row_product_double(product); }
void run(const NormRows<float>& rows) { active_rnn_norm_kernels().normalize_float(rows); }
void run(const NormRows<double>& rows) { active_rnn_norm_kernels().normalize_double(rows); }

// The biases of the pre-activations [kPre, H], as far as there are any.
template <typename T>
std::vector<T> bias_of(const RnnLayer& layer) {
  std::vector<T> sum;
  for (const int part : {kBiasIh, kBiasHh}) {
    if (!layer.weights[size_t(part)]) continue;
    sum.resize(size_t(layer.pre_width()), T(0));
    const T* const bias = layer.weight(part).const_data_ptr<T>();
    const int64_t rows = layer.gate_rows(), last = rows - layer.hidden;
    for (int64_t i = 0; i < rows; ++i) {
      sum[size_t(layer.cell->separate && part == kBiasHh && i >= last ? i + layer.hidden : i)] += bias[i];
    }
  }
  return sum;
}

// The weights of units [kWeights, H]: those of all tensors, one after the other.
template <typename T>
std::vector<T> unit_weights_of(const RnnLayer& layer) {
  std::vector<T> all;
  for (int i = layer.first_unit_tensor(); layer.cell->unit_weights && i < int(layer.weights.size()); ++i) {
    const T* const values = layer.weight(i).const_data_ptr<T>();
    all.insert(all.end(), values, values + layer.weight(i).numel());
  }
  return all;
}

template <typename T>
RnnWeights<T> weights_of(const RnnLayer& layer, const std::vector<T>& unit_weights) {
  return {layer.weight(kWeightHh).const_data_ptr<T>(),
          layer.cell->extra ? layer.weight_mh().const_data_ptr<T>() : nullptr, data_or_null<T>(layer.weight_hr()),
          unit_weights.empty() ? nullptr : unit_weights.data()};
}

// The input's part of the pre-activations, to which a forward pass adds the recurrent part.
struct Projection {
  Tensor values;  // [rows, width], of which kInputs*H per row are used; undefined: given, or computed step by step
  int64_t width;
  int64_t chunk;  // steps per pass
  bool whole;     // `values` has room for all steps, else for those of one pass
};

// What a forward pass keeps, in the operator's order. Undefined: the cell has no such tensor, or nothing is kept.
struct Kept {
  Tensor gates, cells, normed, stats;
  std::vector<Tensor> list() const {
    std::vector<Tensor> tensors;
    for (const Tensor* tensor : {&gates, &cells, &normed, &stats}) {
      if (tensor->defined()) tensors.push_back(*tensor);
    }
    return tensors;
  }
};

struct Outputs {
  Tensor output, h_n, c_n;
};

template <typename T>
T* pointer(const Tensor& t, int64_t row = 0, int64_t width = 0) {
  return t.defined() ? t.mutable_data_ptr<T>() + row * width : nullptr;
}

// Computes input W_ih^T of the packed rows [first, first + rows), and the other pre-activations of the input.
template <typename T>
void project(const RnnLayer& layer, const Tensor& input, int64_t first, int64_t rows, const Projection& projection,
             const Kept& kept) {
  const int64_t at = projection.whole ? first : 0, width = projection.width;
  const auto part = [&](const Tensor& weight, int64_t column) {
    if (rows <= kFewRows) {
      return run(RowProduct<T>{rows, weight.size(0), layer.inputs, input.const_data_ptr<T>() + first * layer.inputs,
                               weight.const_data_ptr<T>(), pointer<T>(projection.values, at, width) + column, width});
    }
    Tensor values = columns_of(rows_of(projection.values, at, rows), column, weight.size(0));
    matmul::product(values, rows_of(input, first, rows), transposed(weight));
  };
  part(layer.weight(kWeightIh), 0);
  if (layer.cell->extra) part(layer.weight_mx(), layer.gate_rows());
  if (layer.cell->norm) {
    run(NormRows<T>{rows, layer.gate_rows(), width, pointer<T>(projection.values, at, width),
                    pointer<T>(kept.stats, first, kNormStats)});
  }
}

template <typename T>
void forward_steps(const RnnLayer& layer, const Tensor& input, const Projection& projection, bool reverse,
                   const Kept& kept, const Outputs& outputs) {
  const std::vector<T> bias = bias_of<T>(layer), unit_weights = unit_weights_of<T>(layer);
  const bool has_cell = layer.cell->has_cell, fused = !projection.values.defined();
  const Tensor *h = &layer.h_0, *c = has_cell ? &*layer.c_0 : nullptr;
  for (int64_t done = 0; done < layer.steps; done += projection.chunk) {
    const int64_t steps = std::min(projection.chunk, layer.steps - done);
    const int64_t first = reverse ? layer.steps - done - steps : done, packed = layer.offset(first);
    const int64_t padded = layer.is_packed ? packed : first * layer.streams;
    const int64_t rows = (first + steps < layer.steps ? layer.offset(first + steps) : layer.packed_rows) - packed;
    RnnForward<T> pass{};
    pass.rows = layer.rows(first, steps);
    pass.hidden = layer.hidden;
    pass.outputs = layer.outputs;
    pass.reverse = reverse;
    pass.h_0 = h->const_data_ptr<T>();
    pass.c_0 = has_cell ? c->const_data_ptr<T>() : nullptr;
    pass.weights = weights_of(layer, unit_weights);
    pass.bias = bias.empty() ? nullptr : bias.data();
    if (layer.given()) {
      pass.x = input.const_data_ptr<T>() + padded * layer.inputs;
      pass.x_row = layer.inputs;
      pass.x_padded = true;
    } else if (fused) {
      pass.input = input.const_data_ptr<T>() + packed * layer.inputs;
      pass.weight_ih = layer.weight(kWeightIh).const_data_ptr<T>();
      pass.inputs = layer.inputs;
    } else {
      project<T>(layer, input, packed, rows, projection, kept);
      pass.x = pointer<T>(projection.values, projection.whole ? packed : 0, projection.width);
      pass.x_row = projection.width;
    }
    // The first of two products stores its results for the second where a training step keeps them.
    pass.saved = layer.cell->first && !kept.gates.defined() ? const_cast<T*>(pass.x)
                                                            : pointer<T>(kept.gates, packed, layer.saved_width());
    pass.cells = pointer<T>(kept.cells, packed, layer.hidden);
    if (kept.normed.defined()) pass.normed = pointer<T>(kept.normed, packed, projection.width) + layer.gate_rows();
    pass.stats = pointer<T>(kept.stats, packed, kNormStats);
    pass.output = pointer<T>(outputs.output, padded, layer.outputs);
    pass.h_n = outputs.h_n.mutable_data_ptr<T>();
    if (has_cell) pass.c_n = outputs.c_n.mutable_data_ptr<T>();
    pass.zoneout_h = blend_of<T>(layer.zoneout_h, padded * layer.outputs);
    pass.zoneout_c = blend_of<T>(layer.zoneout_c, padded * layer.hidden);
    check_workspace(run(*layer.cell, pass));
    h = &outputs.h_n;
    c = &outputs.c_n;
  }
}

// Whether the recurrence computes the input's part itself, so that it stays in L1. If threads share the units, and both
// weights together exceed L2, those of the input evict the recurrent ones. That still costs less than W_ih x through
// memory if the alternative is a product of our own over all steps: 14% faster (LSTM inference (T, B, I, H) =
// (160, 16, 256, 256) and (400, 24, 80, 300), Zen 4), 10% (training (60, 16, 300, 300)), equally fast with one row.
bool is_fused(const RnnLayer& layer) {
  if (layer.cell->first > 0 || layer.cell->norm || layer.inputs == 0 || layer.packed_rows <= kFusedRows) return false;
  if (matmul::own_products_are_faster()) return true;
  const int64_t threads = team_size();
  const int64_t weights = layer.gate_rows() * (layer.inputs + layer.outputs);
  return layer.usual_rows() >= kRowsPerThread * threads || !beyond_l2(weights * (layer.single() ? 4 : 8) / threads);
}

Projection choose_projection(const RnnLayer& layer, const Kept& kept, const Tensor& output) {
  const RnnCellEntry& cell = *layer.cell;
  const int64_t T = layer.steps;
  Projection projection{{}, layer.input_width(), T, true};
  if (layer.given() || is_fused(layer)) return projection;
  if (cell.saved == 0 && !layer.padded()) {
    projection.values = as_rows(output);
  } else if (kept.normed.defined()) {
    projection.values = as_rows(kept.normed);
    projection.width = 2 * layer.gate_rows();
  } else if (kept.gates.defined()) {
    projection.values = as_rows(kept.gates);
    projection.width = layer.saved_width();
  } else {
    if (cell.first) projection.width = layer.saved_width();
    const int64_t step_bytes = layer.batch * projection.width * (layer.single() ? 4 : 8);
    projection.chunk = std::min(T, std::max<int64_t>(1, kProjectionBytes / step_bytes));
    projection.values = new_pooled(layer.input, {projection.chunk * layer.batch, projection.width});
    projection.whole = false;
  }
  return projection;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_forward(Text cell, Tensor input, Tensor h_0,
                                                                    OptionalTensor c_0, WeightList weights,
                                                                    OptionalTensor lengths, OptionalTensor zoneout_h,
                                                                    OptionalTensor zoneout_c, bool reverse, bool save,
                                                                    OptionalTensor reset) {
  const RnnLayer layer =
      check_rnn_layer(cell.value, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reset, reverse);
  const int64_t B = layer.batch, H = layer.hidden, P = layer.outputs;
  const bool has_cell = layer.cell->has_cell, norm = layer.cell->norm;
  Kept kept;
  if (save && layer.cell->saved > 0) kept.gates = layer.new_rows(layer.saved_width());
  if (save && has_cell) kept.cells = layer.new_rows(H);
  if (save && norm) kept.normed = layer.new_rows(2 * layer.gate_rows());
  if (save && norm) kept.stats = layer.new_rows(kNormStats);
  Outputs outputs;
  outputs.output = layer.new_rows(P);
  if (layer.packed_rows == 0) {
    torch::stable::zero_(outputs.output);
    for (Tensor& tensor : kept.list()) torch::stable::zero_(tensor);
    return {outputs.output, torch::stable::clone(layer.h_0),
            has_cell ? torch::stable::clone(*layer.c_0) : new_tensor(input, {0}), kept.list()};
  }
  outputs.h_n = new_tensor(input, {B, P});
  outputs.c_n = has_cell ? new_tensor(input, {B, H}) : new_tensor(input, {0});
  const Projection projection = choose_projection(layer, kept, outputs.output);
  const Tensor rows = layer.padded() && !layer.given() ? pack_rows(layer, layer.input) : as_rows(layer.input);
  (layer.single() ? forward_steps<float> : forward_steps<double>)(layer, rows, projection, reverse, kept, outputs);
  if (layer.padded()) {
    zero_padding(layer, outputs.output);
    for (const Tensor& tensor : kept.list()) {  // the memory after the packed rows
      Tensor rest = rows_of(as_rows(tensor), layer.packed_rows, layer.times * layer.streams - layer.packed_rows);
      torch::stable::zero_(rest);
    }
  }
  outputs.h_n = states_of_streams(layer, outputs.h_n, &Episode::gives_state);
  if (has_cell) outputs.c_n = states_of_streams(layer, outputs.c_n, &Episode::gives_state);
  return {outputs.output, outputs.h_n, outputs.c_n, kept.list()};
}

namespace {

template <typename T>
bool all_zero(const Tensor& t) {
  const T* data = t.const_data_ptr<T>();
  return std::all_of(data, data + t.numel(), [](T x) { return x == T(0); });
}

struct GradOutputs {
  OptionalTensor output, h_n, c_n;
};

// What a backward pass gives to the products over all steps.
struct Swept {
  Tensor grad_pre;           // [packed rows, kPre*H], or 2*G*H, rows grad_row apart
  Tensor grad_bias;          // [kPre*H]
  Tensor grad_unit_weights;  // [kWeights*H]
  Tensor source, grad_h;     // [packed rows, H], [packed rows, P]; undefined if the cell has none
  Tensor grad_h_0, grad_c_0;
};

template <typename T>
std::vector<T> values_of(const Tensor& t) {
  return std::vector<T>(t.const_data_ptr<T>(), t.const_data_ptr<T>() + t.numel());
}

template <typename T>
void add_to(const Tensor& t, const std::vector<T>& values) {
  T* const to = t.mutable_data_ptr<T>();
  for (size_t i = 0; i < values.size(); ++i) to[i] += values[i];
}

// If `accumulate`, the gradients of biases and unit weights are added to those in `swept`.
template <typename T>
void backward_steps(const RnnLayer& layer, const GradOutputs& grads, const Tensor& output, const Kept& kept,
                    bool reverse, bool accumulate, Swept& swept) {
  std::vector<T> bias, others;
  if (accumulate) {
    bias = values_of<T>(swept.grad_bias);
    others = values_of<T>(swept.grad_unit_weights);
  }
  const std::vector<T> unit_weights = unit_weights_of<T>(layer);
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
  pass.weights = weights_of(layer, unit_weights);
  pass.output = output.const_data_ptr<T>();
  pass.saved = pointer<T>(kept.gates);
  pass.cells = pointer<T>(kept.cells);
  pass.normed = pointer<T>(kept.normed);
  pass.stats = pointer<T>(kept.stats);
  pass.grad_pre = pointer<T>(swept.grad_pre);
  pass.grad_row = layer.grad_row();
  pass.grad_h_0 = pointer<T>(swept.grad_h_0);
  pass.grad_c_0 = pointer<T>(swept.grad_c_0);
  pass.grad_bias = pointer<T>(swept.grad_bias);
  pass.grad_unit_weights = pointer<T>(swept.grad_unit_weights);
  pass.source = pointer<T>(swept.source);
  pass.grad_h = pointer<T>(swept.grad_h);
  pass.zoneout_h = blend_of<T>(layer.zoneout_h, 0);
  pass.zoneout_c = blend_of<T>(layer.zoneout_c, 0);
  check_workspace(run(*layer.cell, pass));
  add_to(swept.grad_bias, bias);
  add_to(swept.grad_unit_weights, others);
}

// The products over all steps: gradients of the input and of weights. If `accumulate`, they are added to what is there.
class Gradients {
 public:
  Gradients(const RnnLayer& layer, const Swept& swept, const Tensor& output, bool reverse, bool accumulate)
      : layer_(layer), swept_(swept), output_(as_rows(output)), reverse_(reverse), accumulate_(accumulate) {
    if (layer.ragged()) previous_ = pack_previous(layer, output, reverse);
  }

  void input(Tensor& grad) const {
    const Tensor D = columns(0, layer_.gate_rows());
    if (layer_.given() && layer_.padded()) return unpack_rows(layer_, D, grad);
    Tensor rows = layer_.padded() ? new_pooled(grad, {layer_.packed_rows, layer_.inputs}) : as_rows(grad);
    if (layer_.given()) {
      torch::stable::copy_(rows, D);
    } else {
      matmul::product(rows, D, layer_.weight(kWeightIh));
    }
    if (layer_.cell->extra) matmul::product(rows, columns(layer_.gate_rows(), layer_.hidden), layer_.weight_mx(), true);
    if (layer_.padded()) unpack_rows(layer_, rows, grad);
  }

  // The gradient of a weight that multiplied `factor` [packed rows, .]: D^T factor, where D is columns of grad_pre.
  void weight(Tensor& grad, int64_t first_column, const Tensor& factor) const {
    matmul::product(grad, transposed(columns(first_column, grad.size(0))), factor, accumulate_);
  }

  // The gradient of a weight that multiplied h'.
  void recurrent(Tensor& grad, int64_t first_column) const {
    if (layer_.ragged()) return weight(grad, first_column, previous_);
    const Tensor D = columns(first_column, grad.size(0));
    const int64_t B = layer_.batch, rest = layer_.packed_rows - B;
    if (rest > 0) {
      matmul::product(grad, transposed(rows_of(D, reverse_ ? 0 : B, rest)), rows_of(output_, reverse_ ? B : 0, rest),
                      accumulate_);
    } else if (!accumulate_) {
      torch::stable::zero_(grad);
    }
    if (layer_.single() ? all_zero<float>(layer_.h_0) : all_zero<double>(layer_.h_0)) return;
    matmul::product(grad, transposed(rows_of(D, reverse_ ? rest : 0, B)), layer_.h_0, true);
  }

  void weight_hr(Tensor& grad) const { matmul::product(grad, transposed(swept_.grad_h), swept_.source, accumulate_); }

  void weight_hh(Tensor& grad) const {
    const RnnCellEntry& cell = *layer_.cell;
    const int64_t rows = layer_.gate_rows(), H = layer_.hidden;
    if (cell.extra) return weight(grad, 0, swept_.source);
    if (cell.norm) return recurrent(grad, rows);
    // In a cell with two products the last rows did not multiply h'. With a separate pre-activation its columns come
    // after the others.
    const int64_t shared = cell.separate ? rows - H : cell.first ? cell.first * H : rows;
    Tensor front = rows_of(grad, 0, shared);
    recurrent(front, 0);
    if (shared == rows) return;
    Tensor back = rows_of(grad, shared, rows - shared);
    if (cell.separate) {
      recurrent(back, rows);
    } else {
      weight(back, shared, swept_.source);
    }
  }

 private:
  Tensor columns(int64_t first, int64_t count) const { return columns_of(swept_.grad_pre, first, count); }

  const RnnLayer& layer_;
  const Swept& swept_;
  Tensor output_, previous_;
  bool reverse_, accumulate_;
};

// The gradients that a backward pass shall compute.
struct Results {
  bool input;
  std::vector<bool> weights;
  Tensor grad_input;
  std::vector<Tensor> grad_weights;
};

// The backward pass of a layer, or of a part of one as if it were a layer, and the products over its steps.
void backward_part(const RnnLayer& layer, const GradOutputs& grads, const Tensor& output, const Kept& kept,
                   bool reverse, bool accumulate, Scratch& scratch, Swept& swept, Results& results) {
  const RnnCellEntry& traits = *layer.cell;
  const int64_t rows = layer.gate_rows();
  const bool projected = bool(layer.weight_hr());
  swept.grad_pre = scratch.matrix(layer.packed_rows, layer.grad_width(), layer.grad_row());
  swept.source = swept.grad_h = Tensor();  // frees those of the part before
  if (traits.first || projected) swept.source = new_pooled(layer.input, {layer.packed_rows, layer.hidden});
  if (projected) swept.grad_h = new_pooled(layer.input, {layer.packed_rows, layer.outputs});
  (layer.single() ? backward_steps<float> : backward_steps<double>)(layer, grads, output, kept, reverse, accumulate,
                                                                    swept);

  const Gradients gradients(layer, swept, output, reverse, accumulate);
  const std::vector<bool>& wanted = results.weights;
  std::vector<Tensor>& found = results.grad_weights;
  if (results.input) gradients.input(results.grad_input);
  if (wanted[kWeightIh] || (traits.extra && wanted[kCommonWeights])) {
    const Tensor factor = layer.padded() ? pack_rows(layer, layer.input) : as_rows(layer.input);
    if (wanted[kWeightIh]) gradients.weight(found[kWeightIh], 0, factor);
    if (traits.extra && wanted[kCommonWeights]) gradients.weight(found[kCommonWeights], rows, factor);
  }
  if (wanted[kWeightHh]) gradients.weight_hh(found[kWeightHh]);
  if (traits.extra && wanted[kCommonWeights + 1]) {
    gradients.recurrent(found[kCommonWeights + 1], traits.first_pre * layer.hidden);
  }
  if (projected && wanted[kCommonWeights]) gradients.weight_hr(found[kCommonWeights]);
}

// Runs a layer without lengths part by part, from the end of its recurrence on. Each part continues from the state that
// the one before it left. So dL/dpre of all steps is never held at once.
void backward_parts(const RnnLayer& layer, const GradOutputs& grads, const Tensor& output, const Kept& kept,
                    bool reverse, Swept& swept, Results& results) {
  const int64_t T = layer.steps, B = layer.batch, value = layer.single() ? 4 : 8;
  const int64_t longest = std::max<int64_t>(1, kGradBytes / (B * layer.grad_row() * value));
  const int64_t parts = layer.ragged() ? 1 : (T + longest - 1) / longest;
  const int64_t most = layer.ragged() ? layer.packed_rows : (T + parts - 1) / parts * B;
  Scratch scratch(layer.input, most * layer.grad_row());
  if (parts == 1) return backward_part(layer, grads, output, kept, reverse, false, scratch, swept, results);
  const auto times = [&](const Tensor& t, int64_t first, int64_t count) {
    return t.defined() ? layer.is_packed ? rows_of(t, first * B, count * B) : rows_of(t, first, count) : t;
  };
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t index = reverse ? i : parts - 1 - i;
    const int64_t first = T * index / parts, count = T * (index + 1) / parts - first;
    const bool begins = i + 1 == parts;  // whether the recurrence begins in this part
    const auto blend = [&](const OptionalTensor& z) {
      return z && z->numel() > 1 ? OptionalTensor(times(*z, first, count)) : z;
    };
    RnnLayer part = layer;
    part.times = part.steps = count;
    part.packed_rows = count * B;
    part.input = times(layer.input, first, count);
    part.zoneout_h = blend(layer.zoneout_h);
    part.zoneout_c = blend(layer.zoneout_c);
    const int64_t before = reverse ? first + count : first - 1;
    if (!begins) part.h_0 = as_rows(times(output, before, 1));
    if (!begins && layer.c_0) part.c_0 = as_rows(times(kept.cells, before, 1));
    GradOutputs outer;
    if (grads.output) outer.output = times(*grads.output, first, count);
    outer.h_n = i ? OptionalTensor(swept.grad_h_0) : grads.h_n;
    if (layer.c_0) outer.c_n = i ? OptionalTensor(swept.grad_c_0) : grads.c_n;
    const Kept own{times(kept.gates, first, count), times(kept.cells, first, count), times(kept.normed, first, count),
                   times(kept.stats, first, count)};
    Tensor whole = results.grad_input;
    if (results.input) results.grad_input = times(whole, first, count);
    backward_part(part, outer, times(output, first, count), own, reverse, i > 0, scratch, swept, results);
    results.grad_input = whole;
  }
}

// Copies the values [from_first, from_first + count) of a vector to those from `first` on of another of the same dtype.
void copy_values(const Tensor& to, int64_t first, const Tensor& from, int64_t from_first, int64_t count) {
  const int64_t bytes = int64_t(from.element_size());
  std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + first * bytes,
              static_cast<const char*>(from.const_data_ptr()) + from_first * bytes, size_t(count * bytes));
}

// The saved tensors by name, after checks.
Kept check_kept(const RnnLayer& layer, const std::vector<Tensor>& saved) {
  const RnnCellEntry& cell = *layer.cell;
  const size_t count = size_t(cell.saved > 0) + size_t(cell.has_cell) + (cell.norm ? 2 : 0);
  STD_TORCH_CHECK(saved.size() == count, "seqaccel: expected ", int64_t(count), " saved tensors of the cell '",
                  cell.name, "', but got ", int64_t(saved.size()));
  Kept kept;
  size_t next = 0;
  const auto take = [&](Tensor& tensor, const char* name, int64_t width) {
    layer.check_rows(saved[next], name, width);
    tensor = to_contiguous(saved[next++]);
  };
  if (cell.saved > 0) take(kept.gates, "saved gates", layer.saved_width());
  if (cell.has_cell) take(kept.cells, "saved cells", layer.hidden);
  if (cell.norm) take(kept.normed, "saved norms", 2 * layer.gate_rows());
  if (cell.norm) take(kept.stats, "saved statistics", kNormStats);
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_backward(
    Text cell, OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input, Tensor h_0,
    OptionalTensor c_0, WeightList weights, OptionalTensor lengths, OptionalTensor zoneout_h, OptionalTensor zoneout_c,
    Tensor output, std::vector<Tensor> saved, bool reverse, std::vector<bool> needs, OptionalTensor reset) {
  const RnnLayer layer =
      check_rnn_layer(cell.value, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reset, reverse);
  const RnnCellEntry& traits = *layer.cell;
  const ScalarType dtype = input.scalar_type();
  const int64_t B = layer.batch, S = layer.streams, H = layer.hidden, P = layer.outputs, rows = layer.gate_rows();
  const bool has_cell = traits.has_cell;
  STD_TORCH_CHECK(needs.size() == weights.size() + 1, "seqaccel: expected needs to have ", int64_t(weights.size() + 1),
                  " entries, but got ", int64_t(needs.size()));
  const Kept kept = check_kept(layer, saved);
  layer.check_rows(output, "output", P);
  if (grad_output) layer.check_rows(*grad_output, "grad_output", P);
  if (grad_h_n) check_tensor(*grad_h_n, "grad_h_n", {S, P}, dtype);
  if (!has_cell) grad_c_n = std::nullopt;
  if (grad_c_n) check_tensor(*grad_c_n, "grad_c_n", {S, H}, dtype);
  output = to_contiguous(detach(output));
  const auto of_rows = [&](const OptionalTensor& grad) {
    return grad ? OptionalTensor(states_of_rows(layer, to_contiguous(*grad), &Episode::gives_state)) : grad;
  };
  const GradOutputs grads{grad_output ? OptionalTensor(pooled_contiguous(*grad_output)) : grad_output,
                          of_rows(grad_h_n), of_rows(grad_c_n)};

  Results results{needs[0], {}, needs[0] ? layer.new_rows(layer.inputs) : new_tensor(input, {0}), {}};
  Swept swept;
  swept.grad_h_0 = new_tensor(input, {B, P});
  swept.grad_c_0 = has_cell ? new_tensor(input, {B, H}) : new_tensor(input, {0});
  std::vector<Tensor>& grad_weights = results.grad_weights;
  for (size_t i = 0; i < weights.size(); ++i) {
    results.weights.push_back(needs[i + 1] && bool(weights[i]));
    if (!results.weights[i]) {
      grad_weights.push_back(new_tensor(input, {0}));
    } else {  // not from the pool, whose storages cannot be resized: sharded optimizers free gradients that way
      grad_weights.push_back(new_tensor(input, sizes_of(*weights[i])));
    }
  }
  const std::vector<bool>& wanted = results.weights;
  if (layer.packed_rows == 0) {
    for (Tensor& grad : grad_weights) torch::stable::zero_(grad);
    for (Tensor* grad : {&results.grad_input, &swept.grad_h_0, &swept.grad_c_0}) torch::stable::zero_(*grad);
    if (grads.h_n) torch::stable::copy_(swept.grad_h_0, *grads.h_n);
    if (grads.c_n) torch::stable::copy_(swept.grad_c_0, *grads.c_n);
    return {results.grad_input, swept.grad_h_0, swept.grad_c_0, grad_weights};
  }

  swept.grad_bias = new_tensor(input, {layer.pre_width()});
  swept.grad_unit_weights = new_tensor(input, {traits.unit_weights * H});
  backward_parts(layer, grads, output, kept, reverse, swept, results);
  swept.grad_h_0 = states_of_streams(layer, swept.grad_h_0, &Episode::takes_state);
  if (has_cell) swept.grad_c_0 = states_of_streams(layer, swept.grad_c_0, layer.takes_c());
  // A separate pre-activation of h' for the last gate comes after the others.
  const int64_t shared = traits.separate ? rows - H : rows;
  if (wanted[kBiasIh]) copy_values(grad_weights[kBiasIh], 0, swept.grad_bias, 0, rows);
  if (wanted[kBiasHh]) {
    copy_values(grad_weights[kBiasHh], 0, swept.grad_bias, 0, shared);
    if (shared < rows) copy_values(grad_weights[kBiasHh], shared, swept.grad_bias, rows, rows - shared);
  }
  for (int i = layer.first_unit_tensor(), done = 0, tensor = 0; done < traits.unit_weights; ++i, ++tensor) {
    const int64_t count = traits.weight_tensors[tensor];
    if (wanted[size_t(i)]) {
      copy_values(grad_weights[size_t(i)], 0, swept.grad_unit_weights, done * H, count * H);
    }
    done += int(count);
  }
  return {results.grad_input, swept.grad_h_0, swept.grad_c_0, grad_weights};
}

}  // namespace

const RnnCellEntry* find_rnn_cell(const char* name) {
  const auto find = [&](const auto& kernels) -> const RnnCellEntry* {
    for (int i = 0; i < kernels.count; ++i) {
      if (std::strcmp(kernels.cells[i].name, name) == 0) return &kernels.cells[i];
    }
    return nullptr;
  };
  if (const RnnCellEntry* cell = find(active_rnn_kernels())) return cell;
  if (const RnnCellEntry* cell = find(active_rnn_staged_kernels())) return cell;
  return find(active_rnn_norm_kernels());
}

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "rnn_forward(str cell, Tensor input, Tensor h_0, Tensor? c_0, Tensor?[] weights, Tensor? lengths, "
      "Tensor? zoneout_h, Tensor? zoneout_c, bool reverse, bool save, Tensor? reset=None) "
      "-> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "rnn_backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, "
      "Tensor? c_0, Tensor?[] weights, Tensor? lengths, Tensor? zoneout_h, Tensor? zoneout_c, Tensor output, "
      "Tensor[] saved, bool reverse, bool[] needs, Tensor? reset=None) -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace seqaccel::rnn
