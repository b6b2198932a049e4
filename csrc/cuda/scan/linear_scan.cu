// Linear scan on a GPU, for the operators that csrc/cpu/scan/linear_scan.cpp declares.
//
// A block takes kChannels adjacent channels of one sequence and walks through time in tiles of kThreads / kChannels
// lanes times kSteps steps. A thread composes the affine maps of its kSteps steps in registers, the lanes compose
// theirs in shared memory, and each thread then runs its steps from the state that reaches it: every element is read
// once, 2 * kSteps loads are in flight a thread, and 32 adjacent channels make each access 128 contiguous bytes.
// Sequences of few channels give their threads to time instead: 8 channels x 32 lanes, 1 x 256. Where the blocks are
// fewer than the GPU runs at once, time is cut into chunks: a pass composes each chunk's map, a small one runs through
// the chunks, a last one is as above from the state that reaches a chunk. The inputs are read twice, by all of the GPU.
//
// One kernel serves forward and backward (the same scan against time, its coefficients one step off), and all types:
// narrow ones are float in registers. Where an episode begins in the middle of a sequence the map before it is dropped:
// with `resets` a map whose coefficient is zero ignores what is before it, even if that is not finite.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// ---- numbers ----

// What registers hold of a T.
template <typename T>
struct Number {
  T value;

  __device__ static Number load(const T& from) { return {from}; }
  __device__ T stored() const { return value; }
  __device__ static Number of(float real) { return {T(real)}; }
  __device__ Number operator*(Number x) const { return {value * x.value}; }
  __device__ Number operator+(Number x) const { return {value + x.value}; }
  __device__ Number conjugate() const { return *this; }
  __device__ bool is_zero() const { return value == T(0); }
};

template <typename R>
struct Number<Complex<R>> {
  R real, imag;

  __device__ static Number load(const Complex<R>& from) { return {from.real, from.imag}; }
  __device__ Complex<R> stored() const { return {real, imag}; }
  __device__ static Number of(float real) { return {R(real), R(0)}; }
  __device__ Number operator*(Number x) const { return {real * x.real - imag * x.imag, real * x.imag + imag * x.real}; }
  __device__ Number operator+(Number x) const { return {real + x.real, imag + x.imag}; }
  __device__ Number conjugate() const { return {real, -imag}; }
  __device__ bool is_zero() const { return real == R(0) && imag == R(0); }
};

template <typename T>
struct Held {
  using Type = Number<T>;
  __device__ static Type load(const T& from) { return Type::load(from); }
  __device__ static T store(Type x) { return x.stored(); }
};
template <>
struct Held<BFloat16> {
  using Type = Number<float>;
  __device__ static Type load(BFloat16 from) { return {__uint_as_float(uint32_t(from.bits) << 16)}; }
  __device__ static BFloat16 store(Type x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x.value))}; }
};
template <>
struct Held<Float16> {
  using Type = Number<float>;
  __device__ static Type load(Float16 from) { return {__half2float(__ushort_as_half(from.bits))}; }
  __device__ static Float16 store(Type x) { return {__half_as_ushort(__float2half_rn(x.value))}; }
};

// a * x + b; a product of coefficients that overflowed does not spoil a state that is zero.
template <typename N>
__device__ N apply_map(N a, N x, N b, bool resets) {
  return x.is_zero() || (resets && a.is_zero()) ? b : a * x + b;
}

// The coefficient of two maps.
template <typename N>
__device__ N join(N a, N b, bool resets) {
  return resets && (a.is_zero() || b.is_zero()) ? N::of(0) : a * b;
}

// The composition of the maps of all lanes before this one, (a, b), and of all lanes, (total_a, total_b). A lane is a
// row of kChannels threads. Every thread of the block must call it.
template <typename N, int kChannels>
__device__ void compose_lanes(N& a, N& b, N& total_a, N& total_b, bool resets) {
  constexpr int kLanes = kThreads / kChannels;
  __shared__ N shared_a[kThreads], shared_b[kThreads];
  const int thread = threadIdx.x, lane = thread / kChannels, channel = thread % kChannels;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    shared_a[thread] = a;
    shared_b[thread] = b;
    __syncthreads();
    if (lane >= distance) {
      b = apply_map(a, shared_b[thread - distance * kChannels], b, resets);
      a = join(a, shared_a[thread - distance * kChannels], resets);
    }
    __syncthreads();
  }
  shared_a[thread] = a;
  shared_b[thread] = b;
  __syncthreads();
  total_a = shared_a[(kLanes - 1) * kChannels + channel];
  total_b = shared_b[(kLanes - 1) * kChannels + channel];
  a = lane ? shared_a[thread - kChannels] : N::of(1);
  b = lane ? shared_b[thread - kChannels] : N::of(0);
  __syncthreads();
}

// ---- a call ----

// A call, forward or backward: c = coefficient c + input, forward with a_t and b_t, backward with conj(a_{t+1}) and
// grad_h_t, where the product is c conj(h_{t-1}).
template <typename T>
struct LinearScan {
  Sequences sequences;
  int64_t width;
  bool up;                        // the scan runs from low rows to high ones
  const bool* reset;              // [rows] or null: an episode begins
  const T *a, *input, *other;     // [rows, width]; other (backward): h
  const T *initial, *last_other;  // [count, width] or null; initial: h_0 or grad_h_last, last_other (backward): h_0
  T *output, *product, *final;    // final [count, width]: h_last or null, or grad_h_0
};

// The chunks of time of each sequence. Whole: one chunk, nothing in `a` and `b`. Else `reduce` writes each chunk's map,
// and `apply` finds in `b` the state before each chunk.
template <typename N>
struct Chunks {
  int64_t count;
  N *a, *b;  // [sequences, count, width]
};

enum class Pass { whole, reduce, apply };

template <typename T, int kChannels, bool kBackward, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2)
    linear_scan_kernel(const LinearScan<T> p, const Chunks<typename Held<T>::Type> chunks) {
  using H = Held<T>;
  using N = typename H::Type;
  constexpr int kTile = kThreads / kChannels * kSteps;
  const int64_t blocks = (p.width + kChannels - 1) / kChannels, index = blockIdx.x / blocks;
  const int64_t sequence = index / chunks.count, chunk = index % chunks.count;
  const int64_t channel = blockIdx.x % blocks * kChannels + threadIdx.x % kChannels;
  const bool valid = channel < p.width;
  const int64_t length = p.sequences.length(sequence);
  const int64_t tiles = (length + kTile - 1) / kTile, steps = (tiles + chunks.count - 1) / chunks.count * kTile;
  const int64_t begin = chunk * steps < length ? chunk * steps : length;
  const int64_t end = begin + steps < length ? begin + steps : length;
  const int64_t edge = sequence * p.width + channel, map = (sequence * chunks.count + chunk) * p.width + channel;
  const int64_t stride = p.up ? p.width : -p.width;  // from one step of the scan to the next
  const int64_t first_row = p.sequences.begin(sequence) + (p.up ? 0 : length - 1);
  const int64_t column = first_row * p.width + channel;
  const auto coefficient = [&](int64_t at) {
    const N a = H::load(p.a[at]);
    return kBackward ? a.conjugate() : a;
  };
  const bool resets = p.reset != nullptr;
  // Whether the scan's steps s - 1 and s do not see each other; of 0 and `length`, whether the state h_0 is dropped.
  const auto cut = [&](int64_t s) {
    if (!resets || (s == 0 && (kBackward || !p.up)) || (s == length && p.up)) return false;
    return p.reset[first_row + (p.up ? s : 1 - s)];
  };
  N state = N::of(0), product = N::of(1);
  if (kPass == Pass::whole && valid && p.initial) state = H::load(p.initial[edge]);
  if (kPass == Pass::apply && valid) state = chunks.b[map];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t first = start + threadIdx.x / kChannels * kSteps;
    const int here = !valid ? 0 : end - first < kSteps ? int(end - first) : kSteps;  // this thread's steps
    const int64_t at = column + first * stride;
    N a[kSteps], b[kSteps];  // all loads before the first store: the compiler may not move them past it
    N other[kBackward ? kSteps : 1];
    bool begins[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t row = at + i * stride;
      a[i] = N::of(1);
      begins[i] = i < here && cut(first + i);
      if (i < here && (!kBackward || first + i > 0)) a[i] = coefficient(kBackward ? row - stride : row);
      b[i] = i < here ? H::load(p.input[row]) : N::of(0);
      if constexpr (kBackward && kPass != Pass::reduce) {
        other[i] = N::of(0);
        if (i < here && first + i < length - 1 && !cut(first + i + 1))
          other[i] = H::load(p.other[row + stride]).conjugate();
        if (i < here && first + i == length - 1 && p.last_other && !cut(length)) {
          other[i] = H::load(p.last_other[edge]).conjugate();
        }
      }
    }
    N map_a = N::of(1), map_b = N::of(0), total_a, total_b;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      map_b = begins[i] ? b[i] : a[i] * map_b + b[i];
      map_a = begins[i] ? N::of(0) : join(a[i], map_a, resets);
    }
    compose_lanes<N, kChannels>(map_a, map_b, total_a, total_b, resets);
    if (kPass != Pass::reduce) {
      N c = apply_map(map_a, state, map_b, resets);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        c = begins[i] ? b[i] : a[i] * c + b[i];
        if (i < here) {
          p.output[at + i * stride] = H::store(c);
          if constexpr (kBackward) p.product[at + i * stride] = H::store(c * other[i]);
        }
      }
    }
    state = apply_map(total_a, state, total_b, resets);
    product = join(product, total_a, resets);
  }
  if (!valid || threadIdx.x >= kChannels) return;
  if (kPass == Pass::reduce) {
    chunks.a[map] = product;
    chunks.b[map] = state;
  } else if (p.final && end == length && (begin < length || chunk == 0)) {
    if (kBackward && length > 0) {
      state = cut(length) ? N::of(0) : coefficient(column + (length - 1) * stride) * state;
    }
    p.final[edge] = H::store(state);
  }
}

// The state before each chunk, in place of the chunks' b.
template <typename T, typename N>
__global__ void __launch_bounds__(kThreads)
    chunk_states_kernel(const Chunks<N> chunks, const T* first, int64_t sequences, int64_t width, bool resets) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= sequences * width) return;
  const N* const a = chunks.a + index / width * chunks.count * width + index % width;
  N* const b = chunks.b + (a - chunks.a);
  N state = first ? Held<T>::load(first[index]) : N::of(0);
  constexpr int kTogether = 8;  // loads in flight
  for (int64_t start = 0; start < chunks.count; start += kTogether) {
    N map_a[kTogether], map_b[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      map_a[i] = start + i < chunks.count ? a[(start + i) * width] : N::of(1);
      map_b[i] = start + i < chunks.count ? b[(start + i) * width] : N::of(0);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (start + i < chunks.count) b[(start + i) * width] = state;
      state = apply_map(map_a[i], state, map_b[i], resets);
    }
  }
}

// In one pass where sequences and channels are many; else in chunks of time, whose maps a first pass composes.
template <typename T, int kChannels, bool kBackward>
void run(const LinearScan<T>& p, const Tensor& like, cudaStream_t stream) {
  using N = typename Held<T>::Type;
  constexpr int64_t kTile = kThreads / kChannels * kSteps;
  const int64_t sequences = p.sequences.count, blocks = sequences * ((p.width + kChannels - 1) / kChannels);
  const int64_t tiles = (p.sequences.rows / sequences + kTile - 1) / kTile;  // of a sequence, on average
  if (blocks >= kEnoughBlocks || tiles < 4) {
    linear_scan_kernel<T, kChannels, kBackward, Pass::whole>
        <<<grid_size(blocks), kThreads, 0, stream>>>(p, Chunks<N>{1, nullptr, nullptr});
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int64_t count = std::min((kChunkedBlocks + blocks - 1) / blocks, tiles / 2);
  constexpr int64_t kValues = (sizeof(N) + sizeof(T) - 1) / sizeof(T);  // of T to hold an N
  Tensor maps = fresh(like, {2, sequences, count, p.width * kValues});
  N* const a = static_cast<N*>(maps.mutable_data_ptr());
  const Chunks<N> chunks = {count, a, a + sequences * count * p.width};
  linear_scan_kernel<T, kChannels, kBackward, Pass::reduce>
      <<<grid_size(blocks * count), kThreads, 0, stream>>>(p, chunks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned columns = grid_size((sequences * p.width + kThreads - 1) / kThreads);
  chunk_states_kernel<T, N>
      <<<columns, kThreads, 0, stream>>>(chunks, p.initial, sequences, p.width, p.reset != nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  linear_scan_kernel<T, kChannels, kBackward, Pass::apply>
      <<<grid_size(blocks * count), kThreads, 0, stream>>>(p, chunks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <bool kBackward, typename T>
void run(const LinearScan<T>& p, const Tensor& like, cudaStream_t stream) {
  if (p.sequences.count * p.width == 0) return;
  if (p.width > 8) {
    run<T, 32, kBackward>(p, like, stream);
  } else if (p.width > 1) {
    run<T, 8, kBackward>(p, like, stream);
  } else {
    run<T, 1, kBackward>(p, like, stream);
  }
}

std::tuple<Tensor, Tensor> linear_scan_forward(Tensor a, Tensor b, OptionalTensor h_0, OptionalTensor cu_seqlens,
                                               OptionalTensor reset, bool reverse, bool return_last) {
  cu_seqlens = to_contiguous(cu_seqlens);
  const Sequences sequences = check_linear_scan(a, h_0, cu_seqlens, reset);
  const int64_t width = a.size(2);
  check_operand(b, "b", {a.size(0), a.size(1), width}, a, a.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  a = to_contiguous(a);
  b = to_contiguous(b);
  h_0 = to_contiguous(h_0);
  reset = to_contiguous(reset);
  Tensor h = fresh_like(a), h_last = fresh(a, {return_last ? sequences.count : 0, width});
  for_linear_scan_type(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    run<false>(LinearScan<T>{sequences, width, !reverse, read<bool>(reset), read<T>(a), read<T>(b), nullptr,
                             read<T>(h_0), nullptr, write<T>(h), nullptr, return_last ? write<T>(h_last) : nullptr},
               a, current_stream(a));
  });
  return {h, h_last};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(Tensor grad_h, OptionalTensor grad_h_last, Tensor a, Tensor h,
                                                        OptionalTensor h_0, OptionalTensor cu_seqlens,
                                                        OptionalTensor reset, bool reverse) {
  cu_seqlens = to_contiguous(cu_seqlens);
  const Sequences sequences = check_linear_scan(a, h_0, cu_seqlens, reset);
  const int64_t width = a.size(2);
  const ScalarType dtype = a.scalar_type();
  check_operand(grad_h, "grad_h", {a.size(0), a.size(1), width}, a, dtype);
  check_operand(h, "h", {a.size(0), a.size(1), width}, a, dtype);
  check_operand(grad_h_last, "grad_h_last", {sequences.count, width}, a, dtype);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  grad_h = to_contiguous(grad_h);
  grad_h_last = to_contiguous(grad_h_last);
  a = to_contiguous(a);
  h = to_contiguous(h);
  h_0 = to_contiguous(h_0);
  reset = to_contiguous(reset);
  Tensor grad_a = fresh_like(a), grad_b = fresh_like(a), grad_h_0 = fresh(a, {sequences.count, width});
  for_linear_scan_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    run<true>(LinearScan<T>{sequences, width, reverse, read<bool>(reset), read<T>(a), read<T>(grad_h), read<T>(h),
                            read<T>(grad_h_last), read<T>(h_0), write<T>(grad_b), write<T>(grad_a), write<T>(grad_h_0)},
              a, current_stream(a));
  });
  return {grad_a, grad_b, grad_h_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CUDA, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace seqaccel::cuda::scan
