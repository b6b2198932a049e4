// The operator of an echo state network's reservoir.
#include "cpu/rnn/echo.h"

#include "common/tensor.h"
#include "cpu/base/threads.h"

namespace seqaccel::rnn {
namespace {

Tensor echo_state(Tensor drive, Tensor h_0, Tensor rows, Tensor columns, Tensor weight, double leak_rate,
                  OptionalTensor reset) {
  check_tensor(drive, "drive", {-1, -1, -1}, drive.scalar_type());
  check_float_or_double(drive, "drive");
  const int64_t steps = drive.size(0), batch = drive.size(1), units = drive.size(2);
  STD_TORCH_CHECK(units < INT32_MAX, "seqaccel: the shape ", shape_string(drive), " of drive is too large");
  check_tensor(h_0, "h_0", {batch, units}, drive.scalar_type());
  check_tensor(rows, "rows", {units + 1}, ScalarType::Int);
  check_tensor(columns, "columns", {-1}, ScalarType::Int);
  check_tensor(weight, "weight", {columns.size(0)}, drive.scalar_type());
  if (reset) check_tensor(*reset, "reset", {steps, batch}, ScalarType::Bool);
  Tensor output = new_tensor(drive, {steps, batch, units});
  if (output.numel() == 0) return output;
  drive = to_contiguous(drive);
  h_0 = to_contiguous(h_0);
  rows = to_contiguous(rows);
  columns = to_contiguous(columns);
  weight = to_contiguous(weight);
  reset = to_contiguous(reset);
  const EchoKernels& kernels = active_echo_kernels();
  STD_TORCH_CHECK(
      kernels.valid(rows.const_data_ptr<int32_t>(), columns.const_data_ptr<int32_t>(), units, columns.size(0)),
      "seqaccel: expected rows to rise from 0 to the number of columns, and columns to be units from 0 to ", units - 1);
  int64_t room = 2;
  STD_TORCH_CHECK(fits(room, units) && fits(room, batch + 64), "seqaccel: not enough memory: the shape ",
                  shape_string(drive), " of drive is too large");
  const auto run = [&](auto zero, auto kernel) {
    using T = decltype(zero);
    const std::vector<T> zeros(reset ? size_t(units) : 0);
    const bool done = kernel({steps, batch, units, T(leak_rate), drive.const_data_ptr<T>(), h_0.const_data_ptr<T>(),
                              rows.const_data_ptr<int32_t>(), columns.const_data_ptr<int32_t>(),
                              weight.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
                              reset ? reset->const_data_ptr<bool>() : nullptr, zeros.data(), team_size()});
    STD_TORCH_CHECK(done, "seqaccel: not enough memory for the states of ", batch, " streams");
  };
  if (drive.scalar_type() == ScalarType::Float) {
    run(0.0f, kernels.run_float);
  } else {
    run(0.0, kernels.run_double);
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "echo_state(Tensor drive, Tensor h_0, Tensor rows, Tensor columns, Tensor weight, float leak_rate, "
      "Tensor? reset=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) { m.impl("echo_state", TORCH_BOX(&echo_state)); }

}  // namespace seqaccel::rnn
