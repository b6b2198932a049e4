// Linear scan on a GPU, for the operators that csrc/cpu/scan/linear_scan.cpp declares.
//
// A block takes kChannels adjacent channels of one sequence and walks through time in tiles of kThreads / kChannels
// lanes times kSteps steps. A thread composes the affine maps of its kSteps steps in registers, the lanes compose
// theirs in shared memory, and each thread then runs its steps from the state that reaches it: every element is read
// once, 2 * kSteps loads are in flight a thread, and 32 adjacent channels make each access 128 contiguous bytes.
// Sequences of few channels give their threads to time instead: 8 channels x 32 lanes, 1 x 256. Where the blocks are
// fewer than the GPU runs at once, time is cut into chunks: a pass composes each chunk's map, a small one runs through
// the chunks, a last one is as above from the state that reaches a chunk. The inputs are read twice, by all of the GPU.
#include <algorithm>
#include <type_traits>

#include "common/scan_arguments.h"
#include "cuda/launch.cuh"

namespace seqaccel::cuda::scan {
using namespace seqaccel::scan;
namespace {

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

// The same scan against time, its coefficients one step off; see csrc/cpu/scan/linear_scan.h.
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CUDA, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace seqaccel::cuda::scan
