// SRU on a GPU, for the operators that csrc/cpu/scan/scan.cpp declares; the equations stand in csrc/cpu/scan/kernels.h.
//
// The state feeds back through the gates: the steps are sequential. A thread takes one column (batch x channel) and
// loads the next kAhead steps while it computes those at hand. The parameters' gradients are summed over time by the
// column's thread and over the batch by a second kernel, in a fixed order: no atomics.
#include "common/scan_arguments.h"
#include "cuda/launch.cuh"

namespace seqaccel::cuda::scan {
using namespace seqaccel::scan;
namespace {

constexpr int kColumns = 64;  // of a block: 8192 columns (B = 32, H = 256) make 128 blocks
constexpr int kAhead = 4;     // steps whose operands are loaded together

template <typename T>
__device__ T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// A column, and where its steps lie.
struct Column {
  int64_t index, channel, channels, columns, batch_row, batch, steps;
  bool reverse;

  template <typename Parameters>
  __device__ explicit Column(const Parameters& p)
      : index(int64_t(blockIdx.x) * blockDim.x + threadIdx.x),
        channels(p.shape.directions * p.shape.hidden),
        columns(p.shape.batch * channels),
        batch(p.shape.batch),
        steps(p.shape.steps) {
    channel = index % channels;
    batch_row = index / channels;
    reverse = channel >= p.shape.hidden;
  }

  // The time of a step in the column's own order.
  __device__ int64_t time(int64_t step) const { return reverse ? steps - 1 - step : step; }
  __device__ int64_t at(int64_t step) const { return time(step) * columns + index; }
};

template <typename T, Highway kHighway, typename Parameters>
__device__ void load_step(const Parameters& p, int64_t at, T (&u)[3], T& skip) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
#pragma unroll
  for (int k = 0; k < 3; ++k) u[k] = p.u[at * K + k];
  if (kHighway == Highway::projected) {
    skip = p.u[at * K + 3];
  } else if (kHighway == Highway::input) {
    skip = p.x[at];
  } else {
    skip = T(0);
  }
}

template <typename T, Highway kHighway>
__global__ void __launch_bounds__(kColumns) sru_forward_kernel(const SruForward<T> p, const T* scale_pointer) {
  const Column column(p);
  if (column.index >= column.columns) return;
  const T scale = kHighway == Highway::input && scale_pointer ? *scale_pointer : T(1);
  const T forget_weight = p.weight_c[column.channel], reset_weight = p.weight_c[column.channels + column.channel];
  const T forget_bias = p.bias[column.channel], reset_bias = p.bias[column.channels + column.channel];
  const T drop = p.mask_c ? p.mask_c[column.index] : T(1);
  T c = p.c_0[column.index];
  T u[kAhead][3], skip[kAhead], next_u[kAhead][3], next_skip[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < column.steps) load_step<T, kHighway>(p, column.at(i), u[i], skip[i]);
  }
  for (int64_t start = 0; start < column.steps; start += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t step = start + kAhead + i;
      if (step < column.steps) load_step<T, kHighway>(p, column.at(step), next_u[i], next_skip[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t step = start + i;
      if (step < column.steps) {
        T h = T(0);
        if (!p.mask_pad || !p.mask_pad[column.time(step) * column.batch + column.batch_row]) {
          const T forget = sigmoid(u[i][1] + forget_weight * c + forget_bias);
          const T reset = sigmoid(u[i][2] + reset_weight * c + reset_bias) * drop;
          const T s = skip[i] * scale;
          c = u[i][0] + forget * (c - u[i][0]);
          const T activated = p.shape.use_tanh ? tanh(c) : c;
          h = s + reset * (activated - s);
        }
        p.h[column.at(step)] = h;
        if (p.c) p.c[column.at(step)] = c;
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int k = 0; k < 3; ++k) u[i][k] = next_u[i][k];
      skip[i] = next_skip[i];
    }
  }
  p.c_n[column.index] = c;
}

template <typename T, Highway kHighway>
__global__ void __launch_bounds__(kColumns) sru_backward_kernel(const SruBackward<T> p, const T* scale_pointer) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  const Column column(p);
  if (column.index >= column.columns) return;
  const T scale = kHighway == Highway::input && scale_pointer ? *scale_pointer : T(1);
  const T forget_weight = p.weight_c[column.channel], reset_weight = p.weight_c[column.channels + column.channel];
  const T forget_bias = p.bias[column.channel], reset_bias = p.bias[column.channels + column.channel];
  const T drop = p.mask_c ? p.mask_c[column.index] : T(1);
  T grad_c = p.grad_c_n ? p.grad_c_n[column.index] : T(0);
  T sums[4] = {T(0), T(0), T(0), T(0)};
  // Buffers of kAhead steps, last step first; c[i] is the state before step i, state the one after it.
  T u[kAhead][3], skip[kAhead], grad_h[kAhead], c[kAhead];
  T next_u[kAhead][3], next_skip[kAhead], next_grad_h[kAhead], next_c[kAhead];
  const auto load = [&](int64_t step, T(&u_to)[3], T& skip_to, T& grad_to, T& c_to) {
    if (step < 0) return;
    const int64_t at = column.at(step);
    load_step<T, kHighway>(p, at, u_to, skip_to);
    grad_to = p.grad_h[at];
    c_to = step ? p.c[column.at(step - 1)] : p.c_0[column.index];
  };
  const int64_t last = column.steps - 1;
  T state = column.steps ? p.c[column.at(last)] : T(0);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(last - i, u[i], skip[i], grad_h[i], c[i]);
  for (int64_t start = last; start >= 0; start -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      load(start - kAhead - i, next_u[i], next_skip[i], next_grad_h[i], next_c[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t step = start - i;
      if (step >= 0) {
        const int64_t at = column.at(step);
        T grad_u[4] = {T(0), T(0), T(0), T(0)};
        if (!p.mask_pad || !p.mask_pad[column.time(step) * column.batch + column.batch_row]) {
          const T forget = sigmoid(u[i][1] + forget_weight * c[i] + forget_bias);
          const T reset = sigmoid(u[i][2] + reset_weight * c[i] + reset_bias);
          const T s = skip[i] * scale;
          const T activated = p.shape.use_tanh ? tanh(state) : state;
          const T through = grad_h[i] * drop * reset;
          const T grad_state = grad_c + (p.shape.use_tanh ? through * (T(1) - activated * activated) : through);
          grad_u[0] = grad_state * (T(1) - forget);
          grad_u[1] = grad_state * (c[i] - u[i][0]) * (forget * (T(1) - forget));
          grad_u[2] = through * (activated - s) * (T(1) - reset);
          grad_u[3] = grad_h[i] - through;
          grad_c = grad_state * forget + grad_u[1] * forget_weight + grad_u[2] * reset_weight;
          sums[0] += grad_u[1] * c[i];
          sums[1] += grad_u[2] * c[i];
          sums[2] += grad_u[1];
          sums[3] += grad_u[2];
        }
#pragma unroll
        for (int k = 0; k < K; ++k) p.grad_u[at * K + k] = grad_u[k];
        if (kHighway == Highway::input) p.grad_x[at] = grad_u[3] * scale;
        state = c[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int k = 0; k < 3; ++k) u[i][k] = next_u[i][k];
      skip[i] = next_skip[i];
      grad_h[i] = next_grad_h[i];
      c[i] = next_c[i];
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) p.column_sums[k * column.columns + column.index] = sums[k];
  p.grad_c_0[column.index] = grad_c;
}

// out[k, channel] = sum over the batch of sums[k, batch, channel]; out is weight_c's gradient for k < 2, then bias's.
template <typename T>
__global__ void sum_columns_kernel(const T* sums, T* grad_weight_c, T* grad_bias, int64_t batch, int64_t channels) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 4 * channels) return;
  const T* column = sums + index / channels * batch * channels + index % channels;
  T total = T(0);
  for (int64_t b = 0; b < batch; ++b) total += column[b * channels];
  (index < 2 * channels ? grad_weight_c + index : grad_bias + (index - 2 * channels))[0] = total;
}

template <typename T>
void run_sru(const SruForward<T>& p, const T* scale, cudaStream_t stream) {
  const int64_t columns = p.shape.batch * p.shape.directions * p.shape.hidden;
  if (columns == 0) return;
  const unsigned blocks = grid_size((columns + kColumns - 1) / kColumns);
  switch (p.shape.highway) {
    case Highway::none:
      sru_forward_kernel<T, Highway::none><<<blocks, kColumns, 0, stream>>>(p, scale);
      break;
    case Highway::input:
      sru_forward_kernel<T, Highway::input><<<blocks, kColumns, 0, stream>>>(p, scale);
      break;
    default:
      sru_forward_kernel<T, Highway::projected><<<blocks, kColumns, 0, stream>>>(p, scale);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run_sru(const SruBackward<T>& p, const T* scale, cudaStream_t stream) {
  const int64_t channels = p.shape.directions * p.shape.hidden, columns = p.shape.batch * channels;
  if (columns > 0) {
    const unsigned blocks = grid_size((columns + kColumns - 1) / kColumns);
    switch (p.shape.highway) {
      case Highway::none:
        sru_backward_kernel<T, Highway::none><<<blocks, kColumns, 0, stream>>>(p, scale);
        break;
      case Highway::input:
        sru_backward_kernel<T, Highway::input><<<blocks, kColumns, 0, stream>>>(p, scale);
        break;
      default:
        sru_backward_kernel<T, Highway::projected><<<blocks, kColumns, 0, stream>>>(p, scale);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const unsigned blocks = grid_size((4 * channels + kThreads - 1) / kThreads);
  sum_columns_kernel<T>
      <<<blocks, kThreads, 0, stream>>>(p.column_sums, p.grad_weight_c, p.grad_bias, p.shape.batch, channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void sru_forward_typed(const SruShape& shape, const Tensor& u, const OptionalTensor& x, const Tensor& weight_c,
                       const Tensor& bias, const Tensor& c_0, const OptionalTensor& mask_c,
                       const OptionalTensor& mask_pad, const OptionalTensor& scale_x, Tensor& h, Tensor& c_n, Tensor* c,
                       cudaStream_t stream) {
  const SruForward<T> p = {shape,
                           u.const_data_ptr<T>(),
                           data_or_null<T>(x),
                           weight_c.const_data_ptr<T>(),
                           bias.const_data_ptr<T>(),
                           c_0.const_data_ptr<T>(),
                           data_or_null<T>(mask_c),
                           data_or_null<bool>(mask_pad),
                           T(1),
                           h.mutable_data_ptr<T>(),
                           c_n.mutable_data_ptr<T>(),
                           c ? c->mutable_data_ptr<T>() : nullptr};
  run_sru(p, data_or_null<T>(scale_x), stream);
}

std::tuple<Tensor, Tensor, Tensor> sru_forward(Tensor u, OptionalTensor x, Tensor weight_c, Tensor bias, Tensor c_0,
                                               OptionalTensor mask_c, OptionalTensor mask_pad, OptionalTensor scale_x,
                                               int64_t directions, bool use_tanh, bool save_c) {
  const SruShape shape = check_sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  u = to_contiguous(u);
  x = to_contiguous(x);
  weight_c = to_contiguous(weight_c);
  bias = to_contiguous(bias);
  c_0 = to_contiguous(c_0);
  mask_c = to_contiguous(mask_c);
  mask_pad = to_contiguous(mask_pad);
  Tensor h = fresh(u, {shape.steps, shape.batch, c_0.size(1)}), c_n = fresh_like(c_0);
  Tensor c = save_c ? fresh_like(h) : fresh(u, {0});
  Tensor* const saved = save_c ? &c : nullptr;
  const cudaStream_t stream = current_stream(u);
  if (u.scalar_type() == ScalarType::Float) {
    sru_forward_typed<float>(shape, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, h, c_n, saved, stream);
  } else {
    sru_forward_typed<double>(shape, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, h, c_n, saved, stream);
  }
  return {h, c_n, c};
}

struct SruGradientTensors {
  Tensor u, x, weight_c, bias, c_0, sums;
};

template <typename T>
void sru_backward_typed(const SruShape& shape, const Tensor& grad_h, const OptionalTensor& grad_c_n, const Tensor& u,
                        const OptionalTensor& x, const Tensor& weight_c, const Tensor& bias, const Tensor& c_0,
                        const OptionalTensor& mask_c, const OptionalTensor& mask_pad, const OptionalTensor& scale_x,
                        const Tensor& c, SruGradientTensors& g, cudaStream_t stream) {
  const SruBackward<T> p = {shape,
                            grad_h.const_data_ptr<T>(),
                            data_or_null<T>(grad_c_n),
                            u.const_data_ptr<T>(),
                            data_or_null<T>(x),
                            weight_c.const_data_ptr<T>(),
                            bias.const_data_ptr<T>(),
                            c_0.const_data_ptr<T>(),
                            data_or_null<T>(mask_c),
                            data_or_null<bool>(mask_pad),
                            T(1),
                            c.const_data_ptr<T>(),
                            g.u.mutable_data_ptr<T>(),
                            x ? g.x.mutable_data_ptr<T>() : nullptr,
                            g.weight_c.mutable_data_ptr<T>(),
                            g.bias.mutable_data_ptr<T>(),
                            g.c_0.mutable_data_ptr<T>(),
                            g.sums.mutable_data_ptr<T>()};
  run_sru(p, data_or_null<T>(scale_x), stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sru_backward(Tensor grad_h, OptionalTensor grad_c_n, Tensor u,
                                                                OptionalTensor x, Tensor weight_c, Tensor bias,
                                                                Tensor c_0, OptionalTensor mask_c,
                                                                OptionalTensor mask_pad, OptionalTensor scale_x,
                                                                Tensor c, int64_t directions, bool use_tanh) {
  const SruShape shape = check_sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh);
  const int64_t channels = c_0.size(1);
  const ScalarType dtype = u.scalar_type();
  check_operand(grad_h, "grad_h", {shape.steps, shape.batch, channels}, u, dtype);
  check_operand(grad_c_n, "grad_c_n", {shape.batch, channels}, u, dtype);
  check_operand(c, "c", {shape.steps, shape.batch, channels}, u, dtype);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  grad_h = to_contiguous(grad_h);
  grad_c_n = to_contiguous(grad_c_n);
  u = to_contiguous(u);
  x = to_contiguous(x);
  weight_c = to_contiguous(weight_c);
  bias = to_contiguous(bias);
  c_0 = to_contiguous(c_0);
  mask_c = to_contiguous(mask_c);
  mask_pad = to_contiguous(mask_pad);
  c = to_contiguous(c);
  SruGradientTensors g = {fresh_like(u),   x ? fresh_like(*x) : fresh(u, {0}),  fresh_like(weight_c), fresh_like(bias),
                          fresh_like(c_0), fresh(u, {4, shape.batch, channels})};
  const cudaStream_t stream = current_stream(u);
  if (dtype == ScalarType::Float) {
    sru_backward_typed<float>(shape, grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, g,
                              stream);
  } else {
    sru_backward_typed<double>(shape, grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, g,
                               stream);
  }
  return {g.u, g.x, g.weight_c, g.bias, g.c_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CUDA, m) {
  m.impl("sru_forward", TORCH_BOX(&sru_forward));
  m.impl("sru_backward", TORCH_BOX(&sru_backward));
}

}  // namespace seqaccel::cuda::scan
