// What the autograd nodes share. They use torch's C++ API, so a build serves one torch version.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/extension.h>

namespace seqaccel {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

inline c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// Whether a gradient comes from a vmap over a backward pass.
inline bool is_batched(const Tensor& t) {
  constexpr auto keys = c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return t.defined() && t.key_set().has_any(keys);
}

// Whether a tensor is dense, on the CPU, and not under a transform, a tracer or a Python dispatch mode.
inline bool is_ordinary(const Tensor& t) {
  static const auto expected =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                           c10::DispatchKey::BackendSelect});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return t.layout() == c10::kStrided && expected.isSupersetOf((t.key_set() | local.included_) - local.excluded_);
}

// Converts an argument from Python; None leaves `t` empty. Returns false for a subclass of Tensor and for a tensor that
// is not ordinary.
inline bool take(const py::handle& given, Optional& t) {
  if (given.is_none()) return true;
  if (!THPVariable_CheckExact(given.ptr())) return false;
  t = THPVariable_Unpack(given.ptr());
  return is_ordinary(*t);
}

// Function modes want to see the call, and a node would lose the tangents of forward-mode AD.
inline bool python_must_run() {
  return at::impl::torch_function_mode_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

void bind_layers(py::module_& m);
void bind_convolutions(py::module_& m);

}  // namespace seqaccel
