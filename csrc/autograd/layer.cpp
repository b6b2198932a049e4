// Recurrent layers without lengths and zoneout, and their autograd node. functional/rnn/ does the same in Python, but
// Python takes as long as the kernels of a small problem.

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>

#include "autograd/node.h"

namespace seqaccel {
namespace {

using Arguments = std::array<Optional, 11>;  // input, h_0, c_0, and up to eight weights

c10::List<Optional> weights_of(const Arguments& a, size_t count) {
  return c10::List<Optional>(at::ArrayRef<Optional>(a.data() + 3, count));
}

torch::jit::Stack call_forward(const std::string& cell, const Arguments& a, size_t count, bool reverse, bool save,
                               const c10::IValue& reset) {
  static const auto rnn_forward = find("seqaccel::rnn_forward");
  torch::jit::Stack stack;
  torch::jit::push(stack, cell, a[0], a[1], a[2], weights_of(a, count), Optional(), Optional(), Optional(), reverse,
                   save, reset);
  rnn_forward.callBoxed(stack);
  return stack;
}

// `stacked`: h_n and c_n have the shape [1, B, .], as a module of one layer and direction returns them; else [B, .].
variable_list outputs_of(const torch::jit::Stack& found, bool has_c, bool stacked) {
  variable_list outputs{found[0].toTensor()};
  for (int i = 1; i < (has_c ? 3 : 2); ++i) {
    const Tensor& state = found[i].toTensor();
    // Nobody else has seen this tensor yet, so its sizes can change in place. unsqueeze would take 0.5 us.
    if (stacked) state.unsafeGetTensorImpl()->set_sizes_contiguous({1, state.size(0), state.size(1)});
    outputs.push_back(state);
  }
  return outputs;
}

// A tensor that shares the version counter of `t`, but no memory. It tells later whether `t` was modified.
Tensor watch(const Tensor& t) {
  Tensor watching = at::empty({0}, t.options().requires_grad(false));
  watching.unsafeGetTensorImpl()->set_version_counter(t.unsafeGetTensorImpl()->version_counter());
  return watching;
}

bool modified(const Tensor& watching) { return watching._version() != 0; }  // outputs are fresh: version 0

}  // namespace

// The name is shown in profiles. The output may be modified in place, as in torch's layers: backward then computes it
// again.
class RecurrentLayer : public torch::autograd::Function<RecurrentLayer> {
 public:
  static constexpr bool is_traceable = true;

  template <typename... T>
  static variable_list forward(AutogradContext* ctx, const std::string& cell, bool reverse, bool stacked, size_t count,
                               const c10::IValue& reset, const T&... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Arguments a{arguments...};
    const auto found = call_forward(cell, a, count, reverse, true, reset);
    const variable_list outputs = outputs_of(found, a[2].has_value(), stacked);
    variable_list saved{outputs[0].variable_data()};
    ctx->saved_data["output"] = watch(outputs[0]);
    for (const Optional& t : a) saved.push_back(t.value_or(Tensor()));
    for (const Tensor& t : found[3].toTensorVector()) saved.push_back(t);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["cell"] = cell;
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["count"] = int64_t(count);
    ctx->saved_data["reset"] = reset;
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const std::string cell = ctx->saved_data["cell"].toStringRef();
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const size_t count = ctx->saved_data["count"].toInt();
    const c10::IValue& reset = ctx->saved_data["reset"];
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
      if (outer[i].defined()) of_outputs[i] = i > 0 && outer[i].dim() == 3 ? outer[i].squeeze(0) : outer[i];
    }
    variable_list grads(5 + a.size());  // of forward's arguments
    const auto give = [&](size_t i, const Tensor& grad) {
      if (needs[i]) grads[5 + i] = grad;
    };
    if (at::GradMode::is_enabled() || std::any_of(outer.begin(), outer.end(), is_batched)) {
      const auto found = again(cell, reverse, at::ArrayRef<Optional>(a.data(), 3 + count),
                               at::ArrayRef<Optional>(of_outputs.data(), outer.size()), needs, reset);
      for (size_t i = 0; i < needs.size(); ++i) give(i, found[i]);
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    if (modified(ctx->saved_data["output"].toTensor())) {
      saved[0] = call_forward(cell, a, count, reverse, false, reset)[0].toTensor();
    }
    c10::List<bool> wanted{needs[0]};
    for (size_t i = 3; i < needs.size(); ++i) wanted.push_back(needs[i]);
    static const auto rnn_backward = find("seqaccel::rnn_backward");
    torch::jit::Stack stack;
    torch::jit::push(stack, cell, of_outputs[0], of_outputs[1], of_outputs[2], a[0], a[1], a[2], weights_of(a, count),
                     Optional(), Optional(), Optional(), saved[0],
                     c10::List<Tensor>(at::ArrayRef<Tensor>(saved).slice(1 + a.size())), reverse, wanted, reset);
    rnn_backward.callBoxed(stack);
    for (size_t i = 0; i < 3; ++i) give(i, stack[i].toTensor());
    const auto of_weights = stack[3].toTensorVector();
    for (size_t i = 0; i < count; ++i) give(3 + i, of_weights[i]);
    return grads;
  }

 private:
  // The gradients of all arguments by the reference, which is differentiable and takes batched gradients.
  static variable_list again(const std::string& cell, bool reverse, at::ArrayRef<Optional> inputs,
                             at::ArrayRef<Optional> outer, const std::vector<bool>& needs, const c10::IValue& reset) {
    py::gil_scoped_acquire gil;
    const py::object function = py::module_::import("seqaccel.functional.rnn._operator").attr("differentiate_again");
    variable_list found;
    for (const py::handle grad :
         function(cell, reverse, inputs.vec(), outer.vec(), needs, py::arg("reset") = reset.toOptional<Tensor>())) {
      found.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
    }
    return found;
  }
};

namespace {

// A row of functional/rnn/_cells.py. `shapes` has a string per weight: a letter per dimension, then `?` if the weight
// may be missing.
struct Cell {
  std::string title;  // names the forward pass in a profile
  int64_t gates;
  bool has_c;
  std::vector<std::string> shapes;
};

std::map<std::string, Cell>& cells() {
  static std::map<std::string, Cell> table;
  return table;
}

void add_cell(const std::string& name, int64_t gates, bool has_c, std::vector<std::string> shapes) {
  cells()[name] = {"seqaccel::" + name + "_forward", gates, has_c, std::move(shapes)};
}

struct Sizes {
  int64_t L, B, I, G, P, H;

  int64_t operator[](char letter) const {
    switch (letter) {
      case 'L':
        return L;
      case 'B':
        return B;
      case 'I':
        return I;
      case 'G':
        return G;
      case 'P':
        return P;
      case 'H':
        return H;
      default:
        return letter - '0';
    }
  }
};

bool fits(const Optional& t, std::string_view shape, const Sizes& sizes, at::ScalarType dtype) {
  const bool optional = shape.back() == '?';
  if (!t) return optional;
  if (optional) shape.remove_suffix(1);
  if (t->scalar_type() != dtype || t->dim() != int64_t(shape.size())) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (t->size(i) != sizes[shape[i]]) return false;
  }
  return true;
}

// at::zeros without the dispatcher, in a sixth of the time.
Tensor zeros(int64_t rows, int64_t columns, const Tensor& like) {
  Tensor t = at::detail::empty_cpu({rows, columns}, like.options());
  if (t.nbytes()) std::memset(t.mutable_data_ptr(), 0, t.nbytes());
  return t;
}

// One layer and direction: output [T, B, P], h_n and, if the cell has it, c_n.
variable_list layer(const std::string& cell, const std::string& title, const Arguments& a, size_t count, bool reverse,
                    bool stacked, const c10::IValue& reset) {
  RECORD_FUNCTION(title, c10::ArrayRef<const c10::IValue>());
  const auto records = [](const Optional& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && std::any_of(a.begin(), a.end(), records)) {
    return std::apply(
        [&](const auto&... each) { return RecurrentLayer::apply(cell, reverse, stacked, count, reset, each...); }, a);
  }
  at::AutoDispatchBelowADInplaceOrView below;  // makes no views, which could not be detached in place
  return outputs_of(call_forward(cell, a, count, reverse, false, reset), a[2].has_value(), stacked);
}

// Runs all layers and directions: output [T, B, D * P] and (h_n [L, B, P], c_n [L, B, H] if the cell has it), where L
// is the number of lists of weights. Without `stacked` there is one list, and the states are [B, .]. States that are
// None are zero. `dropout` applies to the outputs between layers, `recurrent_dropout` to weight_hh. Returns nothing if
// Python has to run or to refuse the call: under function modes and forward-mode AD, whose tangents the node would
// lose, if sizes or dtypes do not fit, and if there are no steps.
std::optional<std::pair<Tensor, py::tuple>> layers(const std::string& name, const py::handle& input,
                                                   const py::handle& h_0, const py::handle& c_0,
                                                   const py::list& weights, int64_t directions, bool reverse,
                                                   bool stacked, double dropout, double recurrent_dropout,
                                                   const py::handle& reset) {
  const auto found = cells().find(name);
  if (found == cells().end()) return {};
  const Cell& cell = found->second;
  const size_t count = cell.shapes.size(), stack = weights.size();
  if (python_must_run()) return {};
  Optional x, h, c, begins;
  if (!take(input, x) || !take(h_0, h) || !take(c_0, c) || !take(reset, begins)) return {};
  std::vector<Arguments> calls(stack);
  for (size_t k = 0; k < stack; ++k) {
    const auto of_layer = weights[k].cast<py::list>();
    if (of_layer.size() != count) return {};
    for (size_t i = 0; i < count; ++i) {
      if (!take(of_layer[i], calls[k][3 + i])) return {};
    }
  }
  py::gil_scoped_release no_gil;
  if (!x || x->dim() != 3 || x->size(0) == 0) return {};
  const at::ScalarType dtype = x->scalar_type();
  if ((dtype != at::kFloat && dtype != at::kDouble) || c.has_value() != (h && cell.has_c)) return {};
  if (begins && (begins->scalar_type() != at::kBool || begins->sizes() != x->sizes().slice(0, 2))) return {};
  Sizes sizes{int64_t(stack), x->size(1), x->size(2), 0, 0, 0};
  for (size_t k = 0; k < stack; ++k) {
    const Optional& weight_hh = calls[k][4];
    if (!weight_hh || weight_hh->dim() != 2) return {};
    if (k && k % directions == 0) sizes.I = directions * sizes.P;
    sizes.G = weight_hh->size(0), sizes.P = weight_hh->size(1), sizes.H = sizes.G / cell.gates;
    bool projected = false;
    for (size_t i = 0; i < count; ++i) {
      if (!fits(calls[k][3 + i], cell.shapes[i], sizes, dtype)) return {};
      projected |= cell.shapes[i][0] == 'P' && calls[k][3 + i];
    }
    if (!calls[k][3] && sizes.I != sizes.G) return {};  // without weight_ih the input is W_ih x
    if (sizes.H * cell.gates != sizes.G || sizes.H == 0 || (!projected && sizes.P != sizes.H)) return {};
    const int first = stacked ? 0 : 1;  // letter
    if ((h && !fits(h, "LBP" + first, sizes, dtype)) || (c && !fits(c, "LBH" + first, sizes, dtype))) return {};
  }
  Tensor y = *x;
  variable_list h_n, c_n, outputs;
  for (size_t k = 0; k < stack; ++k) {
    Arguments& a = calls[k];
    if (k && k % directions == 0 && dropout > 0) y = at::dropout(y, dropout, true);
    if (recurrent_dropout > 0) a[4] = at::dropout(*a[4], recurrent_dropout, true);
    a[0] = y;
    a[1] = h ? (stacked ? h->select(0, k) : *h) : zeros(sizes.B, a[4]->size(1), *x);
    if (cell.has_c) a[2] = c ? (stacked ? c->select(0, k) : *c) : zeros(sizes.B, a[4]->size(0) / cell.gates, *x);
    variable_list found = layer(name, cell.title, a, count, reverse || k % directions == 1, stacked, begins);
    h_n.push_back(found[1]);
    if (cell.has_c) c_n.push_back(found[2]);
    outputs.push_back(std::move(found[0]));
    if (int64_t(outputs.size()) < directions) continue;
    y = directions == 1 ? outputs[0] : at::cat(outputs, -1);
    outputs.clear();
  }
  const auto joined = [&](const variable_list& parts) { return stack == 1 ? parts[0] : at::cat(parts); };
  h = joined(h_n);
  if (cell.has_c) c = joined(c_n);
  py::gil_scoped_acquire gil;
  return std::pair(y, cell.has_c ? py::tuple(py::make_tuple(*h, *c)) : py::tuple(py::make_tuple(*h)));
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("add_cell", &add_cell);
  m.def("layers", &layers);
  m.def("watch", &watch);
}

}  // namespace seqaccel
