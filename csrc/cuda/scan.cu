// Linear scan and SRU on a GPU, for the operators that csrc/cpu/scan.cpp declares.
//
// Linear scan. A block takes kChannels adjacent channels of one sequence and walks through time in tiles of kThreads /
// kChannels lanes times kSteps steps. A thread composes the affine maps of its kSteps steps in registers, the lanes
// compose theirs in shared memory, and each thread then runs its steps from the state that reaches it: every element is
// read once, 2 * kSteps loads are in flight a thread, and 32 adjacent channels make each access 128 contiguous bytes.
// Sequences of few channels give their threads to time instead: 8 channels x 32 lanes, 1 x 256. Where the blocks are
// fewer than the GPU runs at once, time is cut into chunks: a pass composes each chunk's map, a small one runs through
// the chunks, a last one is as above from the state that reaches a chunk. The inputs are read twice, by all of the GPU.
//
// SRU feeds its state back through the gates: its steps are sequential. A thread takes one column (batch x channel) and
// loads the next kAhead steps while it computes those at hand. The parameters' gradients are summed over time by the
// column's thread and over the batch by a second kernel, in a fixed order: no atomics.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <type_traits>

#include "common/scan_arguments.h"

namespace seqaccel {
namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

Tensor fresh_like(const Tensor& t) { return torch::stable::empty_like(t); }

unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "seqaccel: too many blocks for one launch: ", blocks);
  return unsigned(blocks);
}

// ---- linear scan ----

constexpr int kThreads = 256;
constexpr int kSteps = 8;
constexpr int64_t kEnoughBlocks = 264;    // 2 a multiprocessor of an H100: with fewer, time is cut into chunks
constexpr int64_t kChunkedBlocks = 1056;  // so that there are about as many

// a * x + b; a product of coefficients that overflowed does not spoil a state that is zero.
template <typename T>
__device__ T apply_map(T a, T x, T b) {
  return x == T(0) ? b : a * x + b;
}

// The composition of the maps of all lanes before this one, (a, b), and of all lanes, (total_a, total_b). A lane is a
// row of kChannels threads. Every thread of the block must call it.
template <typename T, int kChannels>
__device__ void compose_lanes(T& a, T& b, T& total_a, T& total_b) {
  constexpr int kLanes = kThreads / kChannels;
  __shared__ T shared_a[kThreads], shared_b[kThreads];
  const int thread = threadIdx.x, lane = thread / kChannels, channel = thread % kChannels;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    shared_a[thread] = a;
    shared_b[thread] = b;
    __syncthreads();
    if (lane >= distance) {
      b = apply_map(a, shared_b[thread - distance * kChannels], b);
      a *= shared_a[thread - distance * kChannels];
    }
    __syncthreads();
  }
  shared_a[thread] = a;
  shared_b[thread] = b;
  __syncthreads();
  total_a = shared_a[(kLanes - 1) * kChannels + channel];
  total_b = shared_b[(kLanes - 1) * kChannels + channel];
  a = lane ? shared_a[thread - kChannels] : T(1);
  b = lane ? shared_b[thread - kChannels] : T(0);
  __syncthreads();
}

// The chunks of time of one launch. Whole: one chunk, nothing in `a` and `b`. Else `reduce` writes each chunk's map,
// and `apply` finds in `b` the state before each chunk.
template <typename T>
struct Chunks {
  int64_t count, steps;
  T *a, *b;  // [batch, count, width]
};

enum class Pass { whole, reduce, apply };

// What a block has to do: its sequence, its channel (a thread's), its steps.
struct Place {
  int64_t batch, channel, chunk, begin, end;

  template <int kChannels, typename Parameters, typename T>
  __device__ static Place of(const Parameters& p, const Chunks<T>& chunks, std::integral_constant<int, kChannels>) {
    const int64_t blocks = (p.width + kChannels - 1) / kChannels, index = blockIdx.x / blocks;
    const int64_t begin = index % chunks.count * chunks.steps;
    return {index / chunks.count, blockIdx.x % blocks * kChannels + threadIdx.x % kChannels, index % chunks.count,
            begin, begin + chunks.steps < p.steps ? begin + chunks.steps : p.steps};
  }
};

template <typename T, int kChannels, Pass kPass>
__global__ void __launch_bounds__(kThreads)
    linear_scan_forward_kernel(const LinearScanForward<T> p, const Chunks<T> chunks) {
  constexpr int kTile = kThreads / kChannels * kSteps;
  const Place place = Place::of(p, chunks, std::integral_constant<int, kChannels>());
  const bool valid = place.channel < p.width;
  const int64_t column = place.batch * p.steps * p.width + place.channel;
  const int64_t edge = (place.batch * chunks.count + place.chunk) * p.width + place.channel;
  const int64_t stride = p.reverse ? -p.width : p.width;  // from one step of the scan to the next
  T state = T(0), coefficient = T(1);
  if (kPass == Pass::whole && valid && p.h_0) state = p.h_0[place.batch * p.width + place.channel];
  if (kPass == Pass::apply && valid) state = chunks.b[edge];
  for (int64_t start = place.begin; start < place.end; start += kTile) {
    const int64_t first = start + threadIdx.x / kChannels * kSteps;
    const int here = !valid ? 0 : place.end - first < kSteps ? int(place.end - first) : kSteps;  // this thread's steps
    const int64_t at = column + (p.reverse ? p.steps - 1 - first : first) * p.width;
    T a[kSteps], b[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      a[i] = i < here ? p.a[at + i * stride] : T(1);
      b[i] = i < here ? p.b[at + i * stride] : T(0);
    }
    T map_a = T(1), map_b = T(0), total_a, total_b;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      map_b = a[i] * map_b + b[i];
      map_a *= a[i];
    }
    compose_lanes<T, kChannels>(map_a, map_b, total_a, total_b);
    if (kPass != Pass::reduce) {
      T h = apply_map(map_a, state, map_b);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        h = a[i] * h + b[i];
        if (i < here) p.h[at + i * stride] = h;
      }
    }
    state = apply_map(total_a, state, total_b);
    coefficient *= total_a;
  }
  if (kPass == Pass::reduce && valid && threadIdx.x < kChannels) {
    chunks.a[edge] = coefficient;
    chunks.b[edge] = state;
  }
}

// The same scan against time, its coefficients one step off; see csrc/cpu/scan_kernels.h.
template <typename T, int kChannels, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2)
    linear_scan_backward_kernel(const LinearScanBackward<T> p, const Chunks<T> chunks) {
  constexpr int kTile = kThreads / kChannels * kSteps;
  const Place place = Place::of(p, chunks, std::integral_constant<int, kChannels>());
  const bool valid = place.channel < p.width;
  const int64_t column = place.batch * p.steps * p.width + place.channel;
  const int64_t edge = place.batch * p.width + place.channel;
  const int64_t chunk_edge = (place.batch * chunks.count + place.chunk) * p.width + place.channel;
  const int64_t stride = p.reverse ? p.width : -p.width;  // from one step of the backward scan to the next
  T state = T(0), coefficient = T(1);
  if (kPass == Pass::apply && valid) state = chunks.b[chunk_edge];
  for (int64_t start = place.begin; start < place.end; start += kTile) {
    const int64_t first = start + threadIdx.x / kChannels * kSteps;
    const int here = !valid ? 0 : place.end - first < kSteps ? int(place.end - first) : kSteps;  // this thread's steps
    const int64_t at = column + (p.reverse ? first : p.steps - 1 - first) * p.width;
    T a[kSteps], b[kSteps], before[kSteps];  // all loads before the first store: the compiler may not move them past it
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      a[i] = i < here && first + i > 0 ? p.a[at + (i - 1) * stride] : T(1);
      b[i] = i < here ? p.grad_h[at + i * stride] : T(0);
      if (kPass != Pass::reduce) {
        before[i] = T(0);
        if (i < here && first + i < p.steps - 1) before[i] = p.h[at + (i + 1) * stride];
        if (i < here && first + i == p.steps - 1 && p.h_0) before[i] = p.h_0[edge];
      }
    }
    T map_a = T(1), map_b = T(0), total_a, total_b;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      map_b = a[i] * map_b + b[i];
      map_a *= a[i];
    }
    compose_lanes<T, kChannels>(map_a, map_b, total_a, total_b);
    if (kPass != Pass::reduce) {
      T grad = apply_map(map_a, state, map_b);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        grad = a[i] * grad + b[i];
        if (i < here) {
          p.grad_b[at + i * stride] = grad;
          p.grad_a[at + i * stride] = grad * before[i];
          if (first + i == p.steps - 1) p.grad_h_0[edge] = p.a[at + i * stride] * grad;
        }
      }
    }
    state = apply_map(total_a, state, total_b);
    coefficient *= total_a;
  }
  if (kPass == Pass::reduce && valid && threadIdx.x < kChannels) {
    chunks.a[chunk_edge] = coefficient;
    chunks.b[chunk_edge] = state;
  }
  if (p.steps == 0 && valid && threadIdx.x < kChannels) p.grad_h_0[edge] = T(0);
}

// The state before each chunk, in place of the chunks' b.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    chunk_states_kernel(const Chunks<T> chunks, const T* first, int64_t batch, int64_t width) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= batch * width) return;
  const T* const a = chunks.a + index / width * chunks.count * width + index % width;
  T* const b = chunks.b + (a - chunks.a);
  T state = first ? first[index] : T(0);
  constexpr int kTogether = 8;  // loads in flight
  for (int64_t start = 0; start < chunks.count; start += kTogether) {
    T map_a[kTogether], map_b[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      map_a[i] = start + i < chunks.count ? a[(start + i) * width] : T(1);
      map_b[i] = start + i < chunks.count ? b[(start + i) * width] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (start + i < chunks.count) b[(start + i) * width] = state;
      state = apply_map(map_a[i], state, map_b[i]);
    }
  }
}

template <typename T, int kChannels, Pass kPass>
void launch_linear(const LinearScanForward<T>& p, const Chunks<T>& chunks, unsigned blocks, cudaStream_t stream) {
  linear_scan_forward_kernel<T, kChannels, kPass><<<blocks, kThreads, 0, stream>>>(p, chunks);
}

template <typename T, int kChannels, Pass kPass>
void launch_linear(const LinearScanBackward<T>& p, const Chunks<T>& chunks, unsigned blocks, cudaStream_t stream) {
  linear_scan_backward_kernel<T, kChannels, kPass><<<blocks, kThreads, 0, stream>>>(p, chunks);
}

template <typename T>
const T* first_state(const LinearScanForward<T>& p) {
  return p.h_0;
}

template <typename T>
const T* first_state(const LinearScanBackward<T>&) {
  return nullptr;
}

// In one pass where sequences and channels are many; else in chunks of time, whose maps a first pass composes.
template <typename T, int kChannels, typename Parameters>
void run_linear(const Parameters& p, const Tensor& like, cudaStream_t stream) {
  constexpr int64_t kTile = kThreads / kChannels * kSteps;
  const int64_t blocks = p.batch * ((p.width + kChannels - 1) / kChannels);
  const int64_t tiles = (p.steps + kTile - 1) / kTile;
  if (blocks >= kEnoughBlocks || tiles < 4) {
    launch_linear<T, kChannels, Pass::whole>(p, Chunks<T>{1, p.steps, nullptr, nullptr}, grid_size(blocks), stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int64_t wanted = std::min((kChunkedBlocks + blocks - 1) / blocks, tiles / 2);
  const int64_t steps = (tiles + wanted - 1) / wanted * kTile, count = (p.steps + steps - 1) / steps;
  Tensor maps = fresh(like, {2, p.batch, count, p.width});
  T* const a = maps.mutable_data_ptr<T>();
  const Chunks<T> chunks = {count, steps, a, a + p.batch * count * p.width};
  launch_linear<T, kChannels, Pass::reduce>(p, chunks, grid_size(blocks * count), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned columns = grid_size((p.batch * p.width + kThreads - 1) / kThreads);
  chunk_states_kernel<T><<<columns, kThreads, 0, stream>>>(chunks, first_state(p), p.batch, p.width);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch_linear<T, kChannels, Pass::apply>(p, chunks, grid_size(blocks * count), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename Parameters>
void run_linear(const Parameters& p, const Tensor& like, cudaStream_t stream) {
  if (p.batch * p.width == 0) return;
  if (p.width > 8) {
    run_linear<T, 32>(p, like, stream);
  } else if (p.width > 1) {
    run_linear<T, 8>(p, like, stream);
  } else {
    run_linear<T, 1>(p, like, stream);
  }
}

template <typename T>
void linear_forward(const std::array<int64_t, 3>& sizes, bool reverse, const Tensor& a, const Tensor& b,
                    const OptionalTensor& h_0, Tensor& h, cudaStream_t stream) {
  run_linear<T>(LinearScanForward<T>{sizes[0], sizes[1], sizes[2], reverse, a.const_data_ptr<T>(),
                                     b.const_data_ptr<T>(), data_or_null<T>(h_0), h.mutable_data_ptr<T>()},
                h, stream);
}

Tensor linear_scan_forward(Tensor a, Tensor b, OptionalTensor h_0, bool reverse) {
  const std::array<int64_t, 3> sizes = check_linear_scan(a, "a");
  const ScalarType dtype = a.scalar_type();
  check_operand(b, "b", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h_0, "h_0", {sizes[0], sizes[2]}, a, dtype);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  a = to_contiguous(a);
  b = to_contiguous(b);
  h_0 = to_contiguous(h_0);
  Tensor h = fresh_like(a);
  const cudaStream_t stream = current_stream(a);
  if (dtype == ScalarType::Float) {
    linear_forward<float>(sizes, reverse, a, b, h_0, h, stream);
  } else {
    linear_forward<double>(sizes, reverse, a, b, h_0, h, stream);
  }
  return h;
}

template <typename T>
void linear_backward(const std::array<int64_t, 3>& sizes, bool reverse, const Tensor& grad_h, const Tensor& a,
                     const Tensor& h, const OptionalTensor& h_0, Tensor& grad_a, Tensor& grad_b, Tensor& grad_h_0,
                     cudaStream_t stream) {
  run_linear<T>(
      LinearScanBackward<T>{sizes[0], sizes[1], sizes[2], reverse, grad_h.const_data_ptr<T>(), a.const_data_ptr<T>(),
                            h.const_data_ptr<T>(), data_or_null<T>(h_0), grad_a.mutable_data_ptr<T>(),
                            grad_b.mutable_data_ptr<T>(), grad_h_0.mutable_data_ptr<T>()},
      grad_a, stream);
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(Tensor grad_h, Tensor a, Tensor h, OptionalTensor h_0,
                                                        bool reverse) {
  const std::array<int64_t, 3> sizes = check_linear_scan(a, "a");
  const ScalarType dtype = a.scalar_type();
  check_operand(grad_h, "grad_h", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h, "h", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h_0, "h_0", {sizes[0], sizes[2]}, a, dtype);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  grad_h = to_contiguous(grad_h);
  a = to_contiguous(a);
  h = to_contiguous(h);
  h_0 = to_contiguous(h_0);
  Tensor grad_a = fresh_like(a), grad_b = fresh_like(a), grad_h_0 = fresh(a, {sizes[0], sizes[2]});
  const cudaStream_t stream = current_stream(a);
  if (dtype == ScalarType::Float) {
    linear_backward<float>(sizes, reverse, grad_h, a, h, h_0, grad_a, grad_b, grad_h_0, stream);
  } else {
    linear_backward<double>(sizes, reverse, grad_h, a, h, h_0, grad_a, grad_b, grad_h_0, stream);
  }
  return {grad_a, grad_b, grad_h_0};
}

// ---- SRU; the equations stand in csrc/cpu/scan_kernels.h ----

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
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  m.impl("sru_forward", TORCH_BOX(&sru_forward));
  m.impl("sru_backward", TORCH_BOX(&sru_backward));
}

}  // namespace seqaccel
