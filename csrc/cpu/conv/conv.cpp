#include "cpu/conv/conv.h"

#include "common/tensor.h"
#include "cpu/conv/checks.h"
#include "cpu/conv/segments.h"

namespace seqaccel::conv {
namespace {

constexpr int64_t kWantsX = 1, kWantsWeight = 2, kWantsBias = 4, kWantsResidual = 8, kWantsHistory = 16;

ConvShape grid_shape(const Tensor& x, const Tensor& weight, int64_t row_dilation, int64_t column_dilation,
                     int64_t groups) {
  check_float_or_double(x, "x");
  check_tensor(x, "x", {-1, -1, -1, -1}, x.scalar_type());
  check_groups(x, weight, groups);
  check_tensor(weight, "weight", {-1, x.size(1) / groups, -1, -1}, x.scalar_type());
  const int64_t row_taps = weight.size(2), column_taps = weight.size(3), width = x.size(3);
  STD_TORCH_CHECK(column_taps % 2 == 1, "seqaccel: weight must have an odd number of taps in a row, but has shape ",
                  shape_string(weight));
  check_dilation(row_dilation, row_taps, width);
  check_dilation(column_dilation, column_taps);
  ConvShape shape = {x.size(0),    x.size(1), weight.size(0), x.size(2) * width, row_taps * column_taps,
                     row_dilation, groups};
  if (column_taps == 1) {  // a sequence
    shape.dilation *= width;
    return shape;
  }
  shape.width = std::max<int64_t>(width, 1);
  if (width == 0) shape.dilation = 0;  // nothing lies before nothing
  shape.column_taps = column_taps;
  shape.column_dilation = column_dilation;
  return shape;
}

// A tensor [N, C, T, S] as [N, C, T * S], and back.
Tensor flat(const Tensor& t, const char* name, const Tensor& like) {
  check_tensor(t, name, {-1, -1, -1, -1}, like.scalar_type());
  const Extents sizes = {t.size(0), t.size(1), t.size(2) * t.size(3)};
  return view_of(to_contiguous(t), sizes, row_major(sizes));
}

OptionalTensor flat(const OptionalTensor& t, const char* name, const Tensor& like) {
  return t ? OptionalTensor(flat(*t, name, like)) : OptionalTensor();
}

Tensor as_grid(const Tensor& t, int64_t rows, int64_t width) {
  if (t.dim() != 3) return t;  // not wanted
  const Extents sizes = {t.size(0), t.size(1), rows, width};
  return view_of(t, sizes, row_major(sizes));
}

ConvEpilogue make_epilogue(const std::string& activation, bool relu, double dropout, const OptionalTensor& seed) {
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "seqaccel: dropout must be between 0 and 1, but got ", dropout);
  uint64_t seed_value = 0;
  if (dropout > 0) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                    "seqaccel: dropout needs a seed, an int64 tensor of one element on the CPU");
    check_memory(*seed, "seed");
    seed_value = uint64_t(seed->const_data_ptr<int64_t>()[0]);
  }
  return {parse_activation(activation), relu, dropout, seed_value};
}

void check_gates(const ConvShape& shape, const ConvEpilogue& epilogue) {
  STD_TORCH_CHECK(!is_gated(epilogue.activation) || (shape.out_channels % 2 == 0 && shape.groups == 1),
                  "seqaccel: a gated activation takes an even number of output channels and one group");
}

template <typename T>
void run_forward(const ConvShape& shape, const ConvEpilogue& epilogue, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& history, Tensor& y,
                 Tensor& saved, Saved kind) {
  ConvForward<T> p = {};
  p.shape = shape;
  p.epilogue = epilogue;
  p.x = data_of<T>(x);
  p.weight = data_of<T>(weight);
  p.bias = data_of<T>(bias);
  p.residual = data_of<T>(residual);
  p.history = data_of<T>(history);
  p.y = static_cast<T*>(y.mutable_data_ptr());
  if (kind == Saved::pre) p.pre = static_cast<T*>(saved.mutable_data_ptr());
  if (kind == Saved::active) p.active = saved.mutable_data_ptr<uint8_t>();
  p.threads = thread_count(multiply_adds(shape));
  check_workspace(run(p));
}

// Without a history, taps that lie as far back as the sequence is long meet zeros only. Leaves them out of the shape
// and returns the weight of the others, where copying it costs less than multiplying by zeros.
Tensor without_idle_taps(ConvShape& s, const Tensor& weight, bool has_history) {
  const int64_t rows = s.kernel_size / s.column_taps, step = s.dilation * s.width;
  if (has_history || s.depthwise() || s.length == 0 || (rows - 1) * step < s.length) return weight;
  constexpr double kCopy = 16, kCall = 250e3;  // multiply-adds in the time to copy a value, and to make a call
  const int64_t kept = ((s.length - 1) / step + 1) * s.column_taps, taps = s.kernel_size, in = s.group_in();
  const double columns = double(s.batch) * double(s.length), values = double(s.out_channels) * double(in);
  if (double(taps - kept) * columns * values < kCopy * double(kept) * values + kCall) return weight;
  s.kernel_size = kept;
  return to_contiguous(view_of(weight, {s.out_channels, in, kept}, {in * taps, taps, 1}, taps - kept));
}

// x [B, C, T] and the others likewise: of a grid its rows one after another.
std::tuple<Tensor, Tensor> forward_of(ConvShape shape, const ConvEpilogue& epilogue, Tensor x, Tensor weight,
                                      OptionalTensor bias, OptionalTensor residual, OptionalTensor history, bool save) {
  const ScalarType dtype = x.scalar_type();
  check_history(shape, history, dtype);
  if (bias) check_tensor(*bias, "bias", {shape.out_channels}, dtype);
  check_gates(shape, epilogue);
  const int64_t outputs = epilogue.y_channels(shape);
  if (residual) check_tensor(*residual, "residual", {shape.batch, outputs, shape.length}, dtype);
  x = to_contiguous(x);
  weight = to_contiguous(weight);
  bias = to_contiguous(bias);
  residual = to_contiguous(residual);
  history = to_contiguous(history);
  const Saved kind = save ? saved_kind(epilogue, residual.has_value()) : Saved::nothing;
  Tensor y = new_tensor(x, {shape.batch, outputs, shape.length});
  const int64_t none[] = {0}, full[] = {shape.batch, shape.out_channels, shape.length};
  Tensor saved = torch::stable::new_empty(x,
                                          kind == Saved::nothing ? torch::headeronly::IntHeaderOnlyArrayRef(none, 1)
                                                                 : torch::headeronly::IntHeaderOnlyArrayRef(full, 3),
                                          kind == Saved::active ? ScalarType::Byte : dtype);
  if (y.numel() == 0) return {y, saved};
  weight = without_idle_taps(shape, weight, history.has_value());
  with_type(dtype, [&](auto t) {
    run_forward<decltype(t)>(shape, epilogue, x, weight, bias, residual, history, y, saved, kind);
  });
  return {y, saved};
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                   OptionalTensor history, OptionalTensor seed, OptionalTensor reset,
                                   OptionalTensor cu_seqlens, int64_t dilation, int64_t groups, Text activation,
                                   bool relu, double dropout, bool save) {
  ConvShape shape = sequence_shape(x, weight, dilation, groups, /*narrow=*/true);
  const Sequences sequences(shape, reset, cu_seqlens);
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  return forward_of(shape, epilogue, x, weight, bias, residual, history, save);
}

std::tuple<Tensor, Tensor> forward_grid(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                        OptionalTensor history, OptionalTensor seed, OptionalTensor reset,
                                        int64_t row_dilation, int64_t column_dilation, int64_t groups, Text activation,
                                        bool relu, double dropout, bool save) {
  ConvShape shape = grid_shape(x, weight, row_dilation, column_dilation, groups);
  const Sequences sequences(shape, reset, OptionalTensor(), x.size(3));
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  const auto [y, saved] = forward_of(shape, epilogue, flat(x, "x", x), flat(weight, "weight", x), bias,
                                     flat(residual, "residual", x), flat(history, "history", x), save);
  return {as_grid(y, x.size(2), x.size(3)), saved};
}

struct Gradients {
  Tensor x, weight, bias, residual, history;
};

template <typename T>
T* pointer_if(bool wanted, Tensor& t) {
  return wanted ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <typename T>
void run_backward(const ConvShape& shape, const ConvEpilogue& epilogue, const Tensor& grad_y, const OptionalTensor& y,
                  const Tensor& saved, Saved kind, const Tensor& x, const Tensor& weight, const OptionalTensor& history,
                  const OptionalTensor& addend, int64_t wants, Gradients& grads) {
  ConvBackward<T> p = {};
  p.shape = shape;
  p.epilogue = epilogue;
  p.grad_y = data_of<T>(grad_y);
  p.y = data_of<T>(y);
  if (kind == Saved::pre) p.pre = data_of<T>(saved);
  if (kind == Saved::active) p.active = saved.const_data_ptr<uint8_t>();
  p.x = data_of<T>(x);
  p.weight = data_of<T>(weight);
  p.history = data_of<T>(history);
  p.addend = data_of<T>(addend);
  p.grad_x = pointer_if<T>(wants & kWantsX, grads.x);
  p.grad_weight = pointer_if<T>(wants & kWantsWeight, grads.weight);
  p.grad_bias = pointer_if<T>(wants & kWantsBias, grads.bias);
  p.grad_residual = pointer_if<T>(wants & kWantsResidual, grads.residual);
  p.grad_history = pointer_if<T>(wants & kWantsHistory, grads.history);
  p.threads = thread_count(2 * multiply_adds(shape));
  check_workspace(run(p));
}

// Writes the gradient of a weight [O, C / groups, kept], whose other taps were idle, into that of all taps.
template <typename T>
void place_taps(const Tensor& kept, Tensor& all) {
  const int64_t rows = all.size(0) * all.size(1), from = kept.size(2), to = all.size(2);
  const T* const values = data_of<T>(kept);
  T* const out = static_cast<T*>(all.mutable_data_ptr());
#pragma omp parallel for schedule(static) if (rows * to > 65536)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < to - from; ++k) out[row * to + k] = T{};
    for (int64_t k = 0; k < from; ++k) out[row * to + to - from + k] = values[row * from + k];
  }
}

Gradients backward_of(ConvShape shape, const ConvEpilogue& epilogue, Tensor grad_y, OptionalTensor y, Tensor saved,
                      Tensor x, Tensor weight, OptionalTensor history, OptionalTensor addend, bool has_residual,
                      int64_t wants) {
  const ScalarType dtype = x.scalar_type();
  const bool is_short = 2 * shape.batch * shape.length <= shape.group_out();
  // As float32. If columns are few, short_backward.h then takes less time than pairs of bfloat16.
  if (is_narrow(dtype) && (shape.depthwise() || is_short)) {
    const auto wide = [](const auto& t) { return to_dtype(t, ScalarType::Float); };
    const Tensor kept = saved.scalar_type() == ScalarType::Byte ? saved : wide(saved);
    const Gradients grads = backward_of(shape, epilogue, wide(grad_y), wide(y), kept, wide(x), wide(weight),
                                        wide(history), wide(addend), has_residual, wants);
    return {to_dtype(grads.x, dtype), to_dtype(grads.weight, dtype), to_dtype(grads.bias, dtype),
            to_dtype(grads.residual, dtype), to_dtype(grads.history, dtype)};
  }
  check_history(shape, history, dtype);
  const int64_t B = shape.batch, C = shape.in_channels, O = shape.out_channels, T = shape.length, P = shape.context();
  check_gates(shape, epilogue);
  const int64_t Y = epilogue.y_channels(shape);
  check_tensor(grad_y, "grad_y", {B, Y, T}, dtype);
  const Saved kind = saved_kind(epilogue, has_residual);
  if (kind != Saved::nothing) check_tensor(saved, "saved", {B, O, T}, kind == Saved::active ? ScalarType::Byte : dtype);
  const bool needs_y = epilogue.relu || (epilogue.activation != Activation::none && kind == Saved::nothing);
  STD_TORCH_CHECK(y || !needs_y, "seqaccel: the backward of this activation needs y");
  if (y) check_tensor(*y, "y", {B, Y, T}, dtype);
  if (addend) check_tensor(*addend, "addend", {B, C, T}, dtype);
  grad_y = to_contiguous(grad_y);
  y = to_contiguous(y);
  saved = to_contiguous(saved);
  x = to_contiguous(x);
  weight = to_contiguous(weight);
  history = to_contiguous(history);
  addend = to_contiguous(addend);
  const auto make = [&](int64_t flag, std::initializer_list<int64_t> sizes) {
    return wants & flag ? new_tensor(x, sizes) : new_tensor(x, {0});
  };
  Gradients grads = {make(kWantsX, {B, C, T}), make(kWantsWeight, {O, C / shape.groups, shape.kernel_size}),
                     make(kWantsBias, {O}), make(kWantsResidual, {B, Y, T}),
                     make(kWantsHistory, {shape.segments ? shape.history_rows : B, C, P})};
  const int64_t taps = shape.kernel_size;
  weight = without_idle_taps(shape, weight, history || wants & kWantsHistory);
  const bool cut = shape.kernel_size < taps;
  Tensor all_taps = grads.weight;
  if (cut && wants & kWantsWeight) grads.weight = new_tensor(x, {O, C / shape.groups, shape.kernel_size});
  if (B == 0 || O == 0 || T == 0) {
    for (Tensor* grad : {&grads.x, &grads.weight, &grads.bias, &grads.history}) {
      if (grad->numel() > 0) torch::stable::zero_(*grad);
    }
  } else {
    with_type(dtype, [&](auto t) {
      run_backward<decltype(t)>(shape, epilogue, grad_y, y, saved, kind, x, weight, history, addend, wants, grads);
    });
  }
  if (cut && wants & kWantsWeight) {
    with_type(dtype, [&](auto t) { place_taps<decltype(t)>(grads.weight, all_taps); });
    grads.weight = all_taps;
  }
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y, OptionalTensor y, Tensor saved, Tensor x,
                                                            Tensor weight, OptionalTensor history, OptionalTensor seed,
                                                            OptionalTensor reset, OptionalTensor cu_seqlens,
                                                            OptionalTensor addend, int64_t dilation, int64_t groups,
                                                            Text activation, bool relu, double dropout,
                                                            bool has_residual, int64_t wants) {
  ConvShape shape = sequence_shape(x, weight, dilation, groups, /*narrow=*/true);
  const Sequences sequences(shape, reset, cu_seqlens);
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  const Gradients grads =
      backward_of(shape, epilogue, grad_y, y, saved, x, weight, history, addend, has_residual, wants);
  return {grads.x, grads.weight, grads.bias, grads.residual, grads.history};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_grid(Tensor grad_y, OptionalTensor y, Tensor saved,
                                                                 Tensor x, Tensor weight, OptionalTensor history,
                                                                 OptionalTensor seed, OptionalTensor reset,
                                                                 int64_t row_dilation, int64_t column_dilation,
                                                                 int64_t groups, Text activation, bool relu,
                                                                 double dropout, bool has_residual, int64_t wants) {
  ConvShape shape = grid_shape(x, weight, row_dilation, column_dilation, groups);
  const Sequences sequences(shape, reset, OptionalTensor(), x.size(3));
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  const Gradients grads =
      backward_of(shape, epilogue, flat(grad_y, "grad_y", x), flat(y, "y", x), saved, flat(x, "x", x),
                  flat(weight, "weight", x), flat(history, "history", x), OptionalTensor(), has_residual, wants);
  const int64_t rows = x.size(2), width = x.size(3), taps = weight.size(2);
  return {as_grid(grads.x, rows, width), as_grid(grads.weight, taps, weight.size(3)), grads.bias,
          as_grid(grads.residual, rows, width), as_grid(grads.history, (taps - 1) * row_dilation, width)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? history, Tensor? seed, "
      "Tensor? reset, Tensor? cu_seqlens, int dilation, int groups, str activation, bool relu, float dropout, "
      "bool save) -> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_backward(Tensor grad_y, Tensor? y, Tensor saved, Tensor x, Tensor weight, Tensor? history, "
      "Tensor? seed, Tensor? reset, Tensor? cu_seqlens, Tensor? addend, int dilation, int groups, str activation, "
      "bool relu, float dropout, bool has_residual, int wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv2d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? history, Tensor? seed, "
      "Tensor? reset, int row_dilation, int column_dilation, int groups, str activation, bool relu, float dropout, "
      "bool save) -> "
      "(Tensor, Tensor)");
  m.def(
      "causal_conv2d_backward(Tensor grad_y, Tensor? y, Tensor saved, Tensor x, Tensor weight, Tensor? history, "
      "Tensor? seed, Tensor? reset, int row_dilation, int column_dilation, int groups, str activation, bool relu, "
      "float dropout, "
      "bool has_residual, int wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
  m.impl("causal_conv2d_forward", TORCH_BOX(&forward_grid));
  m.impl("causal_conv2d_backward", TORCH_BOX(&backward_grid));
}

}  // namespace seqaccel::conv
