#include "cpu/testing/elementwise.h"

#include "common/tensor.h"

namespace seqaccel::testing {
namespace {

Tensor elementwise(Tensor input, Text name) {
  check_float_or_double(input, "input");
  check_tensor(input, "input", {-1}, input.scalar_type());
  const std::string& function = name.value;
  Elementary which = Elementary::exp;
  if (function == "sigmoid") {
    which = Elementary::sigmoid;
  } else if (function == "tanh") {
    which = Elementary::tanh;
  } else {
    STD_TORCH_CHECK(function == "exp", "seqaccel: unknown function '", function, "'");
  }
  const Tensor x = to_contiguous(input);
  Tensor y = torch::stable::empty_like(x);
  const ElementwiseKernels& kernels = active_elementwise_kernels();
  if (x.scalar_type() == ScalarType::Float) {
    kernels.apply_float(which, x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel());
  } else {
    kernels.apply_double(which, x.const_data_ptr<double>(), y.mutable_data_ptr<double>(), x.numel());
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) { m.def("elementwise(Tensor input, str function) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) { m.impl("elementwise", TORCH_BOX(&elementwise)); }

}  // namespace seqaccel::testing
