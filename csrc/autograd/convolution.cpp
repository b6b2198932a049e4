// Causal convolutions of whole sequences, without a stride, and their autograd node. functional/conv/ does the same in
// Python, but Python takes longer than the kernels of a small problem.

#include <ATen/ops/randint.h>

#include "autograd/node.h"

namespace seqaccel {
namespace {

enum Operand { kX, kWeight, kBias, kResidual, kHistory, kOperands };
enum Kept { kSeed = kOperands, kReset, kY, kSaved };  // what backward takes after the operands

using Operands = std::array<Optional, kOperands>;

struct Options {
  int64_t dilation, groups;
  std::string activation;  // "none": the identity
  bool relu;               // of the output
  double dropout;
  Optional seed = {}, reset = {};
};

std::tuple<Tensor, Tensor> call_forward(const Operands& a, const Options& o, bool save) {
  static const auto forward = find("seqaccel::causal_conv1d_forward");
  torch::jit::Stack stack;
  stack.reserve(14);
  torch::jit::push(stack, a[kX], a[kWeight], a[kBias], a[kResidual], a[kHistory], o.seed, o.reset, Optional(),
                   o.dilation, o.groups, o.activation, o.relu, o.dropout, save);
  forward.callBoxed(stack);
  return {std::move(stack[0]).toTensor(), std::move(stack[1]).toTensor()};
}

}  // namespace

// The name is shown in profiles. Saves what functional/conv/'s CausalConv1d does.
class CausalConvolution : public torch::autograd::Function<CausalConvolution> {
 public:
  static constexpr bool is_traceable = true;

  template <typename... T>
  static Tensor forward(AutogradContext* ctx, const Options& options, const T&... operands) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Operands a{operands...};
    auto [y, saved] = call_forward(a, options, true);
    const bool needs_y = options.relu || (options.activation != "none" && saved.dim() == 1);  // [0]: nothing else
    variable_list kept;
    for (const Optional& t : a) kept.push_back(t.value_or(Tensor()));
    kept.insert(kept.end(), {options.seed.value_or(Tensor()), options.reset.value_or(Tensor()), needs_y ? y : Tensor(),
                             std::move(saved)});
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["dilation"] = options.dilation;
    ctx->saved_data["groups"] = options.groups;
    ctx->saved_data["activation"] = options.activation;
    ctx->saved_data["relu"] = options.relu;
    ctx->saved_data["dropout"] = options.dropout;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    auto& data = ctx->saved_data;
    const Options options = {data["dilation"].toInt(), data["groups"].toInt(), data["activation"].toStringRef(),
                             data["relu"].toBool(), data["dropout"].toDouble()};
    const Tensor& grad_y = outer[0];
    const variable_list saved = ctx->get_saved_variables();
    std::array<Optional, kSaved> a;
    std::array<bool, kOperands> needs = {};
    for (size_t i = 0, edge = 0; i < a.size(); ++i) {
      if (!saved[i].defined()) continue;
      a[i] = saved[i];
      if (i < kOperands) needs[i] = ctx->needs_input_grad(edge++);
    }
    variable_list grads(1 + kOperands);  // of forward's arguments
    if (at::GradMode::is_enabled() || is_batched(grad_y)) {
      py::gil_scoped_acquire gil;
      const py::object function =
          py::module_::import("seqaccel.functional.conv._operators").attr("differentiate_again");
      const std::vector<Optional> operands(a.begin(), a.begin() + kOperands);
      const py::object found = function(operands, grad_y, needs, a[kSeed], a[kReset], py::none(), options.dilation,
                                        options.groups, options.activation, options.relu, options.dropout);
      size_t i = 1;
      for (const py::handle grad : found) grads[i++] = grad.is_none() ? Tensor() : grad.cast<Tensor>();
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    int64_t wants = 0;
    for (int i = 0; i < kOperands; ++i) {
      // Without a relu around it the residual's gradient is that of y.
      if (needs[i] && (i != kResidual || options.relu)) wants |= 1 << i;
    }
    static const auto operation = find("seqaccel::causal_conv1d_backward");
    torch::jit::Stack stack;
    stack.reserve(17);
    torch::jit::push(stack, grad_y, a[kY], saved[kSaved], a[kX], a[kWeight], a[kHistory], a[kSeed], a[kReset],
                     Optional(), Optional(), options.dilation, options.groups, options.activation, options.relu,
                     options.dropout, a[kResidual].has_value(), wants);
    operation.callBoxed(stack);
    for (int i = 0; i < kOperands; ++i) {
      if (needs[i]) grads[1 + i] = wants >> i & 1 ? std::move(stack[i]).toTensor() : grad_y;
    }
    return grads;
  }
};

namespace {

bool has_sizes(const Optional& t, at::IntArrayRef sizes) { return !t || t->sizes() == sizes; }

// Converts an int of Python that is positive, and no bool.
bool take_positive(const py::handle& given, int64_t& value) {
  if (!PyLong_CheckExact(given.ptr())) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
  return overflow == 0 && value > 0 && value < int64_t(1) << 31;
}

// y of the public function's arguments. Returns nothing if Python has to run or to refuse the call: under function
// modes and forward-mode AD, if sizes, dtypes or types do not fit, for the long filters that are products of spectra,
// and for wide layers of bfloat16, some of which oneDNN runs.
std::optional<Tensor> causal_conv1d(const py::handle& x, const py::handle& weight, const py::handle& bias,
                                    const py::handle& residual, const py::handle& initial_state,
                                    const py::handle& reset, const py::handle& stride, const py::handle& dilation,
                                    const py::handle& groups, const py::handle& activation, const py::handle& dropout,
                                    const py::handle& output_activation) {
  constexpr int64_t kLong = 512, kWide = 64;
  if (python_must_run()) return {};
  Operands a;
  Options options = {};
  if (!take(x, a[kX]) || !take(weight, a[kWeight]) || !take(bias, a[kBias]) || !take(residual, a[kResidual]) ||
      !take(initial_state, a[kHistory]) || !take(reset, options.reset) || !a[kX] || !a[kWeight]) {
    return {};
  }
  int64_t every = 0;
  if (!take_positive(stride, every) || every != 1 || !take_positive(dilation, options.dilation) ||
      !take_positive(groups, options.groups)) {
    return {};
  }
  static const std::set<std::string> known = {"relu", "leaky_relu", "silu", "gelu", "gelu_tanh",
                                              "tanh", "sigmoid",    "glu",  "gated"};
  const auto text = [](const py::handle& given) {
    const char* found = PyUnicode_CheckExact(given.ptr()) ? PyUnicode_AsUTF8(given.ptr()) : "";
    if (found == nullptr) PyErr_Clear();
    return std::string(found == nullptr ? "" : found);
  };
  options.activation = activation.is_none() ? "none" : text(activation);
  options.relu = !output_activation.is_none();
  if ((!activation.is_none() && known.count(options.activation) == 0) ||
      (options.relu && text(output_activation) != "relu")) {
    return {};
  }
  if (PyFloat_CheckExact(dropout.ptr())) {
    options.dropout = PyFloat_AS_DOUBLE(dropout.ptr());
  } else {
    return {};
  }
  const Tensor &input = *a[kX], &filter = *a[kWeight];
  const at::ScalarType dtype = input.scalar_type();
  for (const Optional& t : a) {
    if (t && t->scalar_type() != dtype) return {};
  }
  const bool known_dtype = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!known_dtype || input.dim() != 3 || filter.dim() != 3) return {};
  const int64_t B = input.size(0), C = input.size(1), T = input.size(2), O = filter.size(0), K = filter.size(2);
  const bool gated = options.activation == "glu" || options.activation == "gated";
  if (K < 1 || K >= kLong || C != filter.size(1) * options.groups || O % options.groups != 0 ||
      (gated && (O % 2 != 0 || options.groups > 1)) || !(options.dropout >= 0 && options.dropout <= 1) ||
      !has_sizes(a[kBias], {O}) || !has_sizes(a[kResidual], {B, gated ? O / 2 : O, T}) ||
      !has_sizes(a[kHistory], {B, C, (K - 1) * options.dilation}) || !has_sizes(options.reset, {B, T}) ||
      (options.reset && options.reset->scalar_type() != at::kBool)) {
    return {};
  }
  if (dtype == at::kBFloat16 && std::min(C, O) >= kWide && B * T >= kWide && options.groups == 1) return {};
  py::gil_scoped_release no_gil;
  if (options.dropout > 0) options.seed = at::randint(-(int64_t(1) << 62), int64_t(1) << 62, {1}, at::kLong);
  const auto records = [](const Optional& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && std::any_of(a.begin(), a.end(), records)) {
    return std::apply([&](const auto&... each) { return CausalConvolution::apply(options, each...); }, a);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(call_forward(a, options, false));
}

}  // namespace

void bind_convolutions(py::module_& m) { m.def("causal_conv1d", &causal_conv1d); }

}  // namespace seqaccel
