// The autograd node of a recurrent layer without lengths and zoneout, and the call itself: what
// functional/rnn/_operator.py does in Python, which takes as long as the kernels of a small problem. Against torch's
// C++ API, so for one torch.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/extension.h>

namespace seqaccel {
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

// Whether a gradient is of a vmap over a backward pass.
bool is_batched(const Tensor& t) {
  constexpr auto keys = c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return t.defined() && t.key_set().has_any(keys);
}

// Shares the version counter of `t` and no memory: says later whether `t` was modified.
Tensor watch(const Tensor& t) {
  Tensor watching = at::empty({0}, t.options().requires_grad(false));
  watching.unsafeGetTensorImpl()->set_version_counter(t.unsafeGetTensorImpl()->version_counter());
  return watching;
}

bool modified(const Tensor& watching) { return watching._version() != 0; }  // outputs are fresh: version 0

}  // namespace

// Profiles show its name. The output may be modified in place, as torch's layers allow: backward then calculates it
// again.
class RecurrentLayer : public torch::autograd::Function<RecurrentLayer> {
 public:
  static constexpr bool is_traceable = true;

  template <typename... T>
  static variable_list forward(AutogradContext* ctx, const std::string& cell, bool reverse, size_t count,
                               const T&... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Arguments a{arguments...};
    const auto found = call_forward(cell, a, count, reverse, true);
    const variable_list outputs = outputs_of(found, a[2].has_value());
    variable_list saved{outputs[0].variable_data()};
    ctx->saved_data["output"] = watch(outputs[0]);
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
    RECORD_FUNCTION("seqaccel::" + cell + "_backward", c10::ArrayRef<const c10::IValue>());
    variable_list saved = ctx->get_saved_variables();
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
    if (at::GradMode::is_enabled() || std::any_of(outer.begin(), outer.end(), is_batched)) {
      const auto found = again(cell, reverse, at::ArrayRef<Optional>(a.data(), 3 + count),
                               at::ArrayRef<Optional>(of_outputs.data(), outer.size()), needs);
      for (size_t i = 0; i < needs.size(); ++i) give(i, found[i]);
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    if (modified(ctx->saved_data["output"].toTensor())) {
      saved[0] = call_forward(cell, a, count, reverse, false)[0].toTensor();
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
  // Gradients of all arguments by the reference: differentiable, and of batched ones.
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

namespace {

// Whether a tensor is dense, on the CPU, and neither transformed nor traced nor seen by a dispatch mode of Python's.
bool is_ordinary(const Tensor& t) {
  static const auto expected =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                           c10::DispatchKey::BackendSelect});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return t.layout() == c10::kStrided && expected.isSupersetOf((t.key_set() | local.included_) - local.excluded_);
}

// An argument of Python's: nothing for None. False: a tensor of a class of its own, or not an ordinary one.
bool take(const py::handle& given, Optional& t) {
  if (given.is_none()) return true;
  if (!THPVariable_CheckExact(given.ptr())) return false;
  t = THPVariable_Unpack(given.ptr());
  return is_ordinary(*t);
}

// output [T, B, P], h_n [1, B, P], c_n [1, B, H] if the cell has it. States that are None are zero; weight_hh has gates
// * H rows. Nothing: something is in the way (function modes, forward-mode AD, whose tangents the node would lose), or
// sizes or dtypes do not fit; for Python to do or to refuse. Of no steps: modules refuse them, streams do not.
std::optional<variable_list> layer(const std::string& cell, const py::handle& input, const py::handle& h_0,
                                   const py::handle& c_0, const py::sequence& weights, bool reverse, int64_t gates,
                                   bool has_c) {
  const size_t count = weights.size();
  Arguments a;
  if (count < 2 || count > 8 || at::impl::torch_function_mode_enabled() ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
    return {};
  }
  bool ordinary = take(input, a[0]) && take(h_0, a[1]) && take(c_0, a[2]);
  for (size_t i = 0; i < count && ordinary; ++i) ordinary = take(weights[i], a[3 + i]);
  if (!ordinary || !a[0] || !a[3] || !a[4]) return {};
  py::gil_scoped_release no_gil;
  const Tensor &x = *a[0], &weight_ih = *a[3], &weight_hh = *a[4];
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble) return {};
  for (const Optional& t : a) {
    if (t && t->scalar_type() != x.scalar_type()) return {};
  }
  if (x.dim() != 3 || weight_ih.dim() != 2 || weight_hh.dim() != 2 || x.size(0) == 0 ||
      x.size(2) != weight_ih.size(1)) {
    return {};
  }
  if (!a[1]) {
    a[1] = at::zeros({x.size(1), weight_hh.size(1)}, x.options());
    if (has_c) a[2] = at::zeros({x.size(1), weight_hh.size(0) / gates}, x.options());
  }
  RECORD_FUNCTION("seqaccel::" + cell + "_forward", c10::ArrayRef<const c10::IValue>());
  const auto records = [](const Optional& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && std::any_of(a.begin(), a.end(), records)) {
    return std::apply([&](const auto&... each) { return RecurrentLayer::apply(cell, reverse, count, each...); }, a);
  }
  at::AutoDispatchBelowADInplaceOrView below;  // no views, which may not be detached in place
  const auto found = call_forward(cell, a, count, reverse, false);
  return outputs_of(found, has_c);
}

}  // namespace
}  // namespace seqaccel

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("layer", &seqaccel::layer);
  m.def("watch", &seqaccel::watch);
}
