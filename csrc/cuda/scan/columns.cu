// Column cells on a GPU, for the operators that csrc/cpu/scan/columns.cpp declares.
//
// The state feeds back through the gates: the steps are sequential. A thread takes one column (sequence x channel) and
// loads a step's operands kAhead steps before it computes the step. The backward kernel walks the other way and
// calculates the gates again. The parameters' gradients are summed over time by the column's thread and over the batch
// by a second kernel, in a fixed order: no atomics.
#include "common/column_arguments.h"
#include "cuda/launch.cuh"
#include "cuda/narrow.cuh"

namespace seqaccel::cuda::scan {
using namespace seqaccel::scan;
namespace {

constexpr int kColumns = 64;  // of a block: 8192 columns (B = 32, H = 256) make 128 blocks
// Blocks that a multiprocessor has registers for. Without this number nvcc 13 takes as few as 72 registers a thread in
// float64 and spills, on sm_90a.
constexpr int kBlocks = 8;

// Steps; of float64 fewer, whose values take twice the registers.
template <typename T>
constexpr int kAhead = sizeof(T) == 8 ? 2 : 4;

template <typename C>
struct Functions {
  __host__ __device__ static C sigmoid(C x) { return C(1) / (C(1) + exp(-x)); }
  __host__ __device__ static C tanh(C x) { return ::tanh(x); }
};

template <class Cell, typename T>
using ColumnOf = Column<Cell, Compute<T>, Compute<T>>;

// A column of the grid, and where its steps lie. A step is counted in the column's own order.
struct Place {
  int64_t index;                    // sequence * channels + channel
  int64_t sequence, channel, unit;  // unit: of the direction
  int64_t channels, columns;
  int64_t rows, row;     // of the tensors [steps, rows, channels], and the column's
  int64_t first, steps;  // first: the time of the first step
  bool exists, reverse;

  __device__ explicit Place(const ColumnShape& shape)
      : index(int64_t(blockIdx.x) * blockDim.x + threadIdx.x),
        channels(shape.directions * shape.hidden),
        columns(shape.batch * channels) {
    exists = index < columns;
    sequence = index / channels;
    channel = index % channels;
    reverse = channel >= shape.hidden;
    unit = reverse ? channel - shape.hidden : channel;
    int64_t begin = 0, end = shape.steps;
    rows = shape.batch;
    row = sequence;
    if (shape.starts && exists) {
      // Whatever the offsets are: within the tensors, and every step belongs to a sequence.
      const auto within = [&](int64_t at, int64_t least) { return min(max(at, least), shape.steps); };
      if (sequence > 0) begin = within(shape.starts[sequence], 0);
      if (sequence + 1 < shape.batch) end = within(shape.starts[sequence + 1], begin);
      rows = 1;
      row = 0;
    }
    steps = end - begin;
    first = reverse ? end - 1 : begin;
  }

  __device__ int64_t time(int64_t step) const { return reverse ? first - step : first + step; }
  // A step's place in [steps, rows].
  __device__ int64_t at(int64_t step) const { return time(step) * rows + row; }
  // Whether an episode begins at a step: the state before it is zero.
  __device__ bool begins(const bool* reset, int64_t step) const {
    return reset && (!reverse || step > 0) && reset[(time(step) + (reverse ? 1 : 0)) * rows + row];
  }
};

// What a step reads, as memory holds it.
template <class Cell, typename T>
struct Operands {
  T in[Cell::kInputs], x, mask;
  bool padding, begins;
};

// What a column has for all steps.
template <class Cell, typename T>
struct Constants {
  typedef Compute<T> C;
  C weight[Cell::kWeights + 1], bias[Cell::kBiases + 1], c_0, mask, scale;

  __device__ Constants(const ColumnOperands& p, const Place& place) {
    const auto read = [](const void* from, int64_t at) { return widen(static_cast<const T*>(from)[at]); };
    for (int k = 0; k < Cell::kWeights; ++k) {
      weight[k] = p.weight ? read(p.weight, k * place.channels + place.channel) : C(0);
    }
    for (int k = 0; k < Cell::kBiases; ++k) bias[k] = p.bias ? read(p.bias, k * place.channels + place.channel) : C(0);
    c_0 = read(p.c_0, place.index);
    mask = Cell::kMask == Mask::column && p.mask ? read(p.mask, place.index) : C(1);
    scale = Cell::kScale && p.scale ? read(p.scale, 0) : C(1);
  }
};

// The first input of a column in a row of u, and how far the next one is.
template <class Cell>
__device__ int64_t input_at(const Place& place, int64_t step) {
  constexpr int K = Cell::kInputs;
  return (place.at(step) * place.channels + place.channel - place.unit) * K + place.unit * (Cell::kInterleaved ? K : 1);
}
template <class Cell>
__device__ int64_t input_stride(const ColumnShape& shape) {
  return Cell::kInterleaved ? 1 : shape.hidden;
}

template <class Cell, typename T>
__device__ __forceinline__ void load_step(const ColumnOperands& p, const Place& place, int64_t step,
                                          Operands<Cell, T>& to) {
  const int64_t at = place.at(step), value = at * place.channels + place.channel;
  const T* const u = static_cast<const T*>(p.u) + input_at<Cell>(place, step);
#pragma unroll
  for (int k = 0; k < Cell::kInputs; ++k) to.in[k] = u[k * input_stride<Cell>(p.shape)];
  if constexpr (Cell::kReadsX) to.x = static_cast<const T*>(p.x)[value];
  if constexpr (Cell::kMask == Mask::step) {
    if (p.mask) to.mask = static_cast<const T*>(p.mask)[value];
  }
  to.padding = p.mask_pad && p.mask_pad[at];
  to.begins = place.begins(p.reset, step);
}

// The cell's operands but for the state.
template <class Cell, typename T>
__device__ __forceinline__ void prepare(const ColumnOperands& p, const Constants<Cell, T>& constants,
                                        const Operands<Cell, T>& from, ColumnOf<Cell, T>& u) {
#pragma unroll
  for (int k = 0; k < Cell::kInputs; ++k) u.in[k] = widen(from.in[k]);
#pragma unroll
  for (int k = 0; k < Cell::kBiases; ++k) u.in[Cell::kFirstBias + k] += constants.bias[k];
#pragma unroll
  for (int k = 0; k < Cell::kWeights; ++k) u.weight[k] = constants.weight[k];
  if constexpr (Cell::kReadsX) u.x = widen(from.x);
  u.mask = constants.mask;
  if constexpr (Cell::kMask == Mask::step) {
    if (p.mask) u.mask = widen(from.mask);
  }
  u.scale = constants.scale;
}

template <class Cell, typename T>
__global__ void __launch_bounds__(kColumns, kBlocks) column_forward_kernel(const ColumnForward p) {
  typedef Compute<T> C;
  const Place place(p.in.shape);
  if (!place.exists) return;
  const Constants<Cell, T> constants(p.in, place);
  T *const h = static_cast<T*>(p.h), *const c = static_cast<T*>(p.c);
  ColumnOf<Cell, T> u;
  u.state = constants.c_0;
  Operands<Cell, T> loaded[kAhead<T>];
#pragma unroll
  for (int i = 0; i < kAhead<T>; ++i) {
    if (i < place.steps) load_step(p.in, place, i, loaded[i]);
  }
  for (int64_t start = 0; start < place.steps; start += kAhead<T>) {
#pragma unroll
    for (int i = 0; i < kAhead<T>; ++i) {
      const int64_t step = start + i;
      if (step < place.steps) {
        Operands<Cell, T> next;
        if (step + kAhead<T> < place.steps) load_step(p.in, place, step + kAhead<T>, next);
        u.prev = loaded[i].begins ? C(0) : u.state;
        C out = C(0);
        if (loaded[i].padding) {
          u.state = u.prev;
        } else {
          prepare(p.in, constants, loaded[i], u);
          Cell::template forward<Functions<C>>(u);
          out = Cell::kOutputIsState ? u.state : u.h;
        }
        const int64_t value = place.at(step) * place.channels + place.channel;
        h[value] = narrow<T>(out);
        if (c) c[value] = narrow<T>(u.state);
        loaded[i] = next;
      }
    }
  }
  static_cast<T*>(p.c_n)[place.index] = narrow<T>(u.state);
}

template <class Cell, typename T>
__global__ void __launch_bounds__(kColumns, kBlocks) column_backward_kernel(const ColumnBackward p, Compute<T>* sums) {
  typedef Compute<T> C;
  const Place place(p.in.shape);
  if (!place.exists) return;
  const Constants<Cell, T> constants(p.in, place);
  const T *const grad_h = static_cast<const T*>(p.grad_h), *const c = static_cast<const T*>(p.c);
  // A step's operands, the gradient of its output, and the state after the step before.
  struct Loaded {
    Operands<Cell, T> in;
    T grad_h, prev;
  };
  const auto load = [&](int64_t step, Loaded& to) {
    load_step(p.in, place, step, to.in);
    to.grad_h = grad_h[place.at(step) * place.channels + place.channel];
    if (step > 0) to.prev = c[place.at(step - 1) * place.channels + place.channel];
  };
  ColumnOf<Cell, T> u;
  u.grad_state = p.grad_c_n ? widen(static_cast<const T*>(p.grad_c_n)[place.index]) : C(0);
  C grad_weight[Cell::kWeights + 1] = {}, grad_bias[Cell::kBiases + 1] = {};
  T state = T{};  // after the step at hand
  if (place.steps) state = c[place.at(place.steps - 1) * place.channels + place.channel];
  Loaded loaded[kAhead<T>];
#pragma unroll
  for (int i = 0; i < kAhead<T>; ++i) {
    if (i < place.steps) load(place.steps - 1 - i, loaded[i]);
  }
  for (int64_t start = place.steps - 1; start >= 0; start -= kAhead<T>) {
#pragma unroll
    for (int i = 0; i < kAhead<T>; ++i) {
      const int64_t step = start - i;
      if (step >= 0) {
        Loaded next;
        if (step >= kAhead<T>) load(step - kAhead<T>, next);
#pragma unroll
        for (int k = 0; k < Cell::kInputs; ++k) u.grad_in[k] = C(0);
        u.grad_x = C(0);
        if (!loaded[i].in.padding) {
          prepare(p.in, constants, loaded[i].in, u);
          u.prev = loaded[i].in.begins ? C(0) : step == 0 ? constants.c_0 : widen(loaded[i].prev);
          u.state = widen(state);
          u.grad_h = widen(loaded[i].grad_h);
          if constexpr (Cell::kOutputIsState) u.grad_state += u.grad_h;
          Cell::template backward<Functions<C>>(u);
#pragma unroll
          for (int k = 0; k < Cell::kWeights; ++k) grad_weight[k] += u.grad_weight[k];
#pragma unroll
          for (int k = 0; k < Cell::kBiases; ++k) grad_bias[k] += u.grad_in[Cell::kFirstBias + k];
        }
        if (loaded[i].in.begins) u.grad_state = C(0);
        T* const grad_u = static_cast<T*>(p.grad_u) + input_at<Cell>(place, step);
#pragma unroll
        for (int k = 0; k < Cell::kInputs; ++k) grad_u[k * input_stride<Cell>(p.in.shape)] = narrow<T>(u.grad_in[k]);
        if constexpr (Cell::kReadsX) {
          static_cast<T*>(p.grad_x)[place.at(step) * place.channels + place.channel] = narrow<T>(u.grad_x);
        }
        state = loaded[i].prev;
        loaded[i] = next;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < Cell::kWeights; ++k) sums[k * place.columns + place.index] = grad_weight[k];
#pragma unroll
  for (int k = 0; k < Cell::kBiases; ++k) sums[(Cell::kWeights + k) * place.columns + place.index] = grad_bias[k];
  static_cast<T*>(p.grad_c_0)[place.index] = narrow<T>(u.grad_state);
}

// out[k, channel] = sum over the batch of sums[k, batch, channel]: the gradient of the weight, then of the bias.
template <typename T>
__global__ void sum_columns_kernel(const Compute<T>* sums, T* grad_weight, T* grad_bias, int64_t weights, int64_t batch,
                                   int64_t channels, int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  T* const out = index < weights ? grad_weight : grad_bias;
  if (!out) return;
  const Compute<T>* column = sums + index / channels * batch * channels + index % channels;
  Compute<T> total = Compute<T>(0);
  for (int64_t b = 0; b < batch; ++b) total += column[b * channels];
  out[index < weights ? index : index - weights] = narrow<T>(total);
}

template <class Cell, typename T>
void run_forward(const ColumnForward& p, cudaStream_t stream) {
  const int64_t columns = p.in.shape.batch * p.in.shape.directions * p.in.shape.hidden;
  if (columns == 0) return;
  column_forward_kernel<Cell, T><<<grid_size((columns + kColumns - 1) / kColumns), kColumns, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Cell, typename T>
void run_backward(const ColumnBackward& p, void* scratch, cudaStream_t stream) {
  const int64_t channels = p.in.shape.directions * p.in.shape.hidden, columns = p.in.shape.batch * channels;
  Compute<T>* const sums = static_cast<Compute<T>*>(scratch);
  if (columns > 0) {
    column_backward_kernel<Cell, T><<<grid_size((columns + kColumns - 1) / kColumns), kColumns, 0, stream>>>(p, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t count = (Cell::kWeights + Cell::kBiases) * channels;
  sum_columns_kernel<T><<<grid_size((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      sums, static_cast<T*>(p.grad_weight), static_cast<T*>(p.grad_bias), Cell::kWeights * channels, p.in.shape.batch,
      channels, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Of a cell and each type of value, in the order of column_dtype.
struct ColumnKernels {
  void (*forward[4])(const ColumnForward&, cudaStream_t);
  void (*backward[4])(const ColumnBackward&, void*, cudaStream_t);
};

template <class Cell>
constexpr ColumnKernels kernels_of() {
  return {
      {run_forward<Cell, float>, run_forward<Cell, double>, run_forward<Cell, BFloat16>, run_forward<Cell, Float16>},
      {run_backward<Cell, float>, run_backward<Cell, double>, run_backward<Cell, BFloat16>,
       run_backward<Cell, Float16>}};
}

template <class... Cells>
constexpr std::array<ColumnKernels, sizeof...(Cells)> table_of(CellList<Cells...>) {
  return {{kernels_of<Cells>()...}};
}

constexpr auto kKernels = table_of(ColumnCells{});

std::tuple<Tensor, Tensor, Tensor> column_forward(Text cell, Tensor u, OptionalTensor x, OptionalTensor weight,
                                                  OptionalTensor bias, Tensor c_0, OptionalTensor mask,
                                                  OptionalTensor scale, OptionalTensor mask_pad, OptionalTensor reset,
                                                  OptionalTensor cu_seqlens, int64_t directions, bool save) {
  ColumnTensors t = {u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens};
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const ColumnCall call = ColumnCall::check(cell.value, t, directions);
  ColumnResults made(call, t, save, fresh);
  const ColumnForward p = {call.operands(t), made.h.mutable_data_ptr(), made.c_n.mutable_data_ptr(),
                           made.kept ? made.c.mutable_data_ptr() : nullptr};
  kKernels[call.cell].forward[call.dtype](p, current_stream(u));
  return {made.h, made.c_n, made.c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> column_backward(Text cell, Tensor grad_h, OptionalTensor grad_c_n,
                                                                   Tensor u, OptionalTensor x, OptionalTensor weight,
                                                                   OptionalTensor bias, Tensor c_0, OptionalTensor mask,
                                                                   OptionalTensor scale, OptionalTensor mask_pad,
                                                                   OptionalTensor reset, OptionalTensor cu_seqlens,
                                                                   Tensor c, int64_t directions) {
  ColumnTensors t = {u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens};
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const ColumnCall call = ColumnCall::check(cell.value, t, directions);
  const int64_t channels = t.c_0.size(1);
  const ScalarType dtype = t.u.scalar_type();
  check_operand(grad_h, "grad_h", {call.shape.steps, call.rows, channels}, t.u, dtype);
  check_operand(grad_c_n, "grad_c_n", {call.shape.batch, channels}, t.u, dtype);
  check_operand(c, "c", {call.shape.steps, call.rows, channels}, t.u, dtype);
  grad_h = to_contiguous(grad_h);
  grad_c_n = to_contiguous(grad_c_n);
  c = to_contiguous(c);
  ColumnGradients g(t, fresh);
  const int64_t parameters = call.traits.weights + call.traits.biases;
  Tensor sums = torch::stable::new_empty(t.u, {parameters * call.shape.batch * channels},
                                         dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  const auto out = [](Tensor& to, bool wanted) { return wanted ? to.mutable_data_ptr() : nullptr; };
  const ColumnBackward p = {call.operands(t),
                            grad_h.const_data_ptr(),
                            grad_c_n ? grad_c_n->const_data_ptr() : nullptr,
                            c.const_data_ptr(),
                            out(g.u, true),
                            out(g.x, t.x.has_value()),
                            out(g.weight, t.weight.has_value()),
                            out(g.bias, t.bias.has_value()),
                            out(g.c_0, true)};
  kKernels[call.cell].backward[call.dtype](p, sums.mutable_data_ptr(), current_stream(u));
  return {g.u, g.x, g.weight, g.bias, g.c_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CUDA, m) {
  m.impl("column_forward", TORCH_BOX(&column_forward));
  m.impl("column_backward", TORCH_BOX(&column_backward));
}

}  // namespace seqaccel::cuda::scan
