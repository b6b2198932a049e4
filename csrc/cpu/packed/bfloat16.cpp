// Operator rnn_forward_bfloat16: one layer, one direction, in bfloat16, without a backward pass. Weights and what they
// multiply are bfloat16; sums, biases, the cell's functions and the state are float32. The float32 operator runs
// instead where products of bfloat16 are no faster and the rows are enough for arithmetic to bind.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/packed/program.h"
#include "cpu/rnn/layer.h"

namespace seqaccel::packed {
using namespace rnn;
namespace {

// The batch from which on the kernels of float32 are faster. Only AMD's cores do twice as many multiply-adds on
// bfloat16; on an Intel core without AMX float32 takes 15% less time at 4 rows and 40% less at 16, but 10% more at 2
// (I = H = 256 and 512).
int64_t float_rows() { return active_isa() == Isa::avx512_bf16 && is_amd() ? std::numeric_limits<int64_t>::max() : 4; }

OptionalTensor to_float(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::to(*t, ScalarType::Float)) : std::nullopt;
}

Tensor to_bfloat16(const Tensor& t) { return torch::stable::to(t, ScalarType::BFloat16); }

float widen(uint16_t narrow) {
  const uint32_t bits = uint32_t(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t round_to_nearest(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

const uint16_t* data_of(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

std::vector<float> widened(const Tensor& t) {
  const Tensor dense = to_contiguous(t);
  std::vector<float> values(size_t(dense.numel()));
  std::transform(data_of(dense), data_of(dense) + values.size(), values.begin(), widen);
  return values;
}

// Copies rows of the state, `stride` apart, from or to [B, width].
void load_rows(const Tensor& from, float* rows, int64_t stride) {
  const std::vector<float> values = widened(from);
  const int64_t width = from.size(1);
  for (int64_t b = 0; b < from.size(0); ++b) std::copy_n(&values[size_t(b * width)], width, rows + b * stride);
}

void store_rows(Tensor& to, const float* rows, int64_t stride) {
  uint16_t* const out = static_cast<uint16_t*>(to.mutable_data_ptr());
  const int64_t width = to.size(1);
  for (int64_t b = 0; b < to.size(0); ++b) {
    std::transform(rows + b * stride, rows + b * stride + width, out + b * width, round_to_nearest);
  }
}

std::tuple<Tensor, Tensor, Tensor> rnn_forward_bfloat16(Text name, Tensor input, Tensor h_0, OptionalTensor c_0,
                                                        std::vector<OptionalTensor> weights, OptionalTensor lengths,
                                                        bool reverse, OptionalTensor reset) {
  constexpr ScalarType kDtype = ScalarType::BFloat16;
  const std::string& cell = name.value;
  STD_TORCH_CHECK(input.scalar_type() == kDtype, "seqaccel: expected input to be bfloat16");
  check_tensor(input, "input", {-1, -1, -1}, kDtype);
  const RnnCellEntry& kind = checked_rnn_cell(cell);
  const int64_t T = input.size(0), B = input.size(1), I = input.size(2);
  const auto [H, P] = check_weights(kind, weights, I, kDtype);
  STD_TORCH_CHECK(bool(weights[kWeightIh]), "seqaccel: expected weight_ih to be given");
  check_tensor(h_0, "h_0", {B, P}, kDtype);
  STD_TORCH_CHECK(bool(c_0) == kind.has_cell, "seqaccel: c_0 must be given just where the cell has it");
  if (c_0) check_tensor(*c_0, "c_0", {B, H}, kDtype);
  if (reset) check_tensor(*reset, "reset", {T, B}, ScalarType::Bool);
  if (B >= float_rows()) {
    std::vector<OptionalTensor> wide;
    for (const OptionalTensor& weight : weights) wide.push_back(to_float(weight));
    const auto [output, h_n, c_n, saved] = rnn_forward(name, *to_float(input), *to_float(h_0), to_float(c_0), wide,
                                                       lengths, {}, {}, reverse, false, reset);
    return {to_bfloat16(output), to_bfloat16(h_n), to_bfloat16(c_n)};
  }
  std::vector<int64_t> valid;
  if (lengths) {
    check_tensor(*lengths, "lengths", {B}, ScalarType::Long);
    const Tensor dense = to_contiguous(*lengths);
    for (int64_t b = 0; b < B; ++b) {
      valid.push_back(std::min(std::max(dense.const_data_ptr<int64_t>()[b], int64_t(0)), T));
    }
  }

  Tensor output = new_tensor(input, {T, B, P});
  Tensor h_n = new_tensor(input, {B, P});
  Tensor c_n = c_0 ? new_tensor(input, {B, H}) : new_tensor(input, {0});
  if (B == 0) return {output, h_n, c_n};
  input = to_contiguous(input);
  SessionProgram program(B, Precision::bfloat16);
  SeqaccelSessionLayer layer{};
  layer.kind = cell.c_str();
  layer.inputs = I;
  layer.hidden = H;
  layer.outputs = P;
  std::vector<Tensor> dense;
  std::vector<std::vector<float>> vectors;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i]) continue;
    if (kind.weights.shapes[i].multiplies()) {
      dense.push_back(to_contiguous(*weights[i]));
      layer.weights[i] = static_cast<const float*>(dense.back().const_data_ptr());
    } else {
      vectors.push_back(widened(*weights[i]));
      layer.weights[i] = vectors.back().data();
    }
  }
  program.add(layer, true);
  program.finish();
  const int64_t stride = program.layers()[0].stride;
  load_rows(to_contiguous(h_0), program.h(0), stride);
  if (c_0) load_rows(to_contiguous(*c_0), program.c(0), stride);
  const auto run = [&](int64_t first, int64_t steps) {
    std::vector<int64_t> within;  // of the lengths
    for (const int64_t length : valid) within.push_back(std::min(std::max(length - first, int64_t(0)), steps));
    program.run(data_of(input) + first * B * I, steps,
                static_cast<uint16_t*>(output.mutable_data_ptr()) + first * B * P, true, reverse,
                valid.empty() ? nullptr : within.data());
  };
  // Stretches of time between steps where any stream has a reset.
  std::vector<int64_t> begins{0};
  OptionalTensor mask = to_contiguous(reset);
  const bool* const restarts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const auto any = [&](int64_t t) { return restarts && std::memchr(restarts + t * B, true, size_t(B)) != nullptr; };
  for (int64_t t = 1; t < T; ++t) {
    if (any(t)) begins.push_back(t);
  }
  const auto clear = [&](int64_t t) {  // the state of the streams with a reset at t
    if (t >= T || !any(t)) return;
    for (int64_t b = 0; b < B; ++b) {
      if (!restarts[t * B + b] || (!valid.empty() && t >= valid[size_t(b)])) continue;
      std::fill_n(program.h(0) + b * stride, P, 0.0f);
      if (c_0 && !kind.constant) std::fill_n(program.c(0) + b * stride, H, 0.0f);
    }
  };
  for (size_t i = 0; i < begins.size(); ++i) {
    const size_t at = reverse ? begins.size() - 1 - i : i;
    const int64_t first = begins[at], end = at + 1 < begins.size() ? begins[at + 1] : T;
    clear(reverse ? end : first);
    run(first, end - first);
  }
  store_rows(h_n, program.h(0), stride);
  if (c_0) store_rows(c_n, program.c(0), stride);
  return {output, h_n, c_n};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "rnn_forward_bfloat16(str cell, Tensor input, Tensor h_0, Tensor? c_0, Tensor?[] weights, Tensor? lengths, "
      "bool reverse, Tensor? reset=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) { m.impl("rnn_forward_bfloat16", TORCH_BOX(&rnn_forward_bfloat16)); }

}  // namespace seqaccel::packed
