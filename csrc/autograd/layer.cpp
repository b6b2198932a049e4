// The autograd node of a recurrent layer without lengths and zoneout, and the call itself: what
// functional/rnn/_operator.py does in Python, which takes as long as the kernels of a small problem. Against torch's
// C++ API, so for one torch.

#include <torch/extension.h>

namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Arguments = std::array<Optional, 11>;  // input, h_0, c_0, and up to eight weights

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

c10::List<Optional> weights_of(const Arguments& a, size_t count) {
  return c10::List<Optional>(at::ArrayRef<Optional>(a.data() + 3, count));
}

torch::jit::Stack call_forward(const std::string& cell, const Arguments& a, size_t count, bool reverse, bool save) {
  static const auto rnn_forward = find("seqaccel::rnn_forward");
  torch::jit::Stack stack;
  torch::jit::push(stack, cell, a[0], a[1], a[2], weights_of(a, count), Optional(), Optional(), Optional(), reverse,
                   save);
  rnn_forward.callBoxed(stack);
  return stack;
}

// h_n and c_n are those of a module of one layer and direction: [1, B, .].
variable_list outputs_of(const torch::jit::Stack& found, bool has_c) {
  variable_list outputs{found[0].toTensor(), found[1].toTensor().unsqueeze(0)};
  if (has_c) outputs.push_back(found[2].toTensor().unsqueeze(0));
  return outputs;
}

class Layer : public torch::autograd::Function<Layer> {
 public:
  template <typename... T>
  static variable_list forward(AutogradContext* ctx, const std::string& cell, bool reverse, size_t count,
                               const T&... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Arguments a{arguments...};
    const auto found = call_forward(cell, a, count, reverse, true);
    const variable_list outputs = outputs_of(found, a[2].has_value());
    variable_list saved{outputs[0]};
    for (const Optional& t : a) saved.push_back(t.value_or(Tensor()));
    for (const Tensor& t : found[3].toTensorVector()) saved.push_back(t);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["cell"] = cell;
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["count"] = int64_t(count);
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const std::string cell = ctx->saved_data["cell"].toStringRef();
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const size_t count = ctx->saved_data["count"].toInt();
    const variable_list saved = ctx->get_saved_variables();
    Arguments a;
    std::vector<bool> needs;
    for (size_t i = 0, edge = 0; i < 3 + count; ++i) {
      if (saved[1 + i].defined()) a[i] = saved[1 + i];
      needs.push_back(a[i] && ctx->needs_input_grad(edge++));
    }
    std::array<Optional, 3> of_outputs;  // as the operator has them
    for (size_t i = 0; i < outer.size(); ++i) {
      if (outer[i].defined()) of_outputs[i] = i == 0 ? outer[0] : outer[i].squeeze(0);
    }
    variable_list grads(3 + a.size());  // of forward's arguments
    const auto give = [&](size_t i, const Tensor& grad) {
      if (needs[i]) grads[3 + i] = grad;
    };
    if (at::GradMode::is_enabled()) {
      const auto found = again(cell, reverse, at::ArrayRef<Optional>(a.data(), 3 + count),
                               at::ArrayRef<Optional>(of_outputs.data(), outer.size()), needs);
      for (size_t i = 0; i < needs.size(); ++i) give(i, found[i]);
      return grads;
    }
    c10::List<bool> wanted{needs[0]};
    for (size_t i = 3; i < needs.size(); ++i) wanted.push_back(needs[i]);
    static const auto rnn_backward = find("seqaccel::rnn_backward");
    torch::jit::Stack stack;
    torch::jit::push(stack, cell, of_outputs[0], of_outputs[1], of_outputs[2], a[0], a[1], a[2], weights_of(a, count),
                     Optional(), Optional(), Optional(), saved[0],
                     c10::List<Tensor>(at::ArrayRef<Tensor>(saved).slice(1 + a.size())), reverse, wanted);
    rnn_backward.callBoxed(stack);
    for (size_t i = 0; i < 3; ++i) give(i, stack[i].toTensor());
    const auto of_weights = stack[3].toTensorVector();
    for (size_t i = 0; i < count; ++i) give(3 + i, of_weights[i]);
    return grads;
  }

 private:
  // Differentiable gradients of all arguments, by the reference.
  static variable_list again(const std::string& cell, bool reverse, at::ArrayRef<Optional> inputs,
                             at::ArrayRef<Optional> outer, const std::vector<bool>& needs) {
    py::gil_scoped_acquire gil;
    const py::object function = py::module_::import("seqaccel.functional.rnn._operator").attr("differentiate_again");
    variable_list found;
    for (const py::handle grad : function(cell, reverse, inputs.vec(), outer.vec(), needs)) {
      found.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
    }
    return found;
  }
};

// output [T, B, P], h_n [1, B, P], c_n [1, B, H] if the cell has it. States that are None are zero. gates: weight_hh's
// rows in units.
variable_list layer(const std::string& cell, const Tensor& input, Optional h_0, Optional c_0,
                    const std::vector<Optional>& weights, bool reverse, int64_t gates, bool has_c) {
  py::gil_scoped_release no_gil;
  const size_t count = weights.size();
  TORCH_CHECK(count > 1 && count <= 8 && weights[1] && weights[1]->dim() == 2 && input.dim() == 3, "unexpected shapes");
  if (!h_0) {
    const auto zeros = [&](const c10::SymInt& width) { return input.new_zeros_symint({input.sym_size(1), width}); };
    h_0 = zeros(weights[1]->sym_size(1));
    if (has_c) c_0 = zeros(weights[1]->sym_size(0) / gates);
  }
  Arguments a{input, h_0, c_0};
  std::copy(weights.begin(), weights.end(), a.begin() + 3);
  for (const Optional& t : a) TORCH_CHECK(!t || t->device() == input.device(), "unexpected device");
  const auto records = [](const Optional& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && std::any_of(a.begin(), a.end(), records)) {
    return std::apply([&](const auto&... each) { return Layer::apply(cell, reverse, count, each...); }, a);
  }
  const auto found = call_forward(cell, a, count, reverse, false);
  at::AutoDispatchBelowADInplaceOrView below;  // no views, which may not be detached in place
  return outputs_of(found, c_0.has_value());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("layer", &layer); }
