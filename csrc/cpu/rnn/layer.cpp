#include "cpu/rnn/layer.h"

#include <cstring>
#include <numeric>

namespace seqaccel::rnn {
namespace {

const char* const kWeightNames[] = {"weight_ih", "weight_hh", "bias_ih",  "bias_hh",  "weight 4",
                                    "weight 5",  "weight 6",  "weight 7", "weight 8", "weight 9"};

void check_zoneout(const OptionalTensor& zoneout, const char* name, bool taken, const RnnLayer& layer, int64_t width) {
  if (!zoneout) return;
  STD_TORCH_CHECK(taken, "seqaccel: the cell '", layer.cell->name, "' takes no ", name);
  if (zoneout->dim() <= 1 && zoneout->numel() == 1) {
    STD_TORCH_CHECK(zoneout->scalar_type() == layer.input.scalar_type(), "seqaccel: expected ", name,
                    " to have the dtype of the first tensor");
    STD_TORCH_CHECK(zoneout->is_cpu(), "seqaccel: expected ", name, " to be on the CPU");
    check_memory(*zoneout, name);
    return;
  }
  layer.check_rows(*zoneout, name, width);
}

// Sorts the rows, longest first, and counts those that run at each step. Does nothing if all sequences have all steps.
void sort_rows(const Tensor& lengths, RnnLayer& layer) {
  const Tensor dense = to_contiguous(lengths);
  const int64_t* data = dense.const_data_ptr<int64_t>();
  const int64_t T = layer.steps, B = layer.batch;
  std::vector<int64_t> clamped(size_t(B), 0);
  bool whole = true;
  for (int64_t b = 0; b < B; ++b) {
    clamped[size_t(b)] = std::min(std::max(data[b], int64_t(0)), T);
    whole = whole && clamped[size_t(b)] == T;
  }
  if (whole) return;
  layer.lengths = std::move(clamped);
  layer.order.resize(size_t(B));
  std::iota(layer.order.begin(), layer.order.end(), int64_t(0));
  std::stable_sort(layer.order.begin(), layer.order.end(),
                   [&](int64_t a, int64_t b) { return layer.lengths[size_t(a)] > layer.lengths[size_t(b)]; });
  layer.running.resize(size_t(T));
  layer.offsets.resize(size_t(T));
  int64_t running = B;
  layer.packed_rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    while (running > 0 && layer.lengths[size_t(layer.order[size_t(running - 1)])] <= t) --running;
    layer.running[size_t(t)] = running;
    layer.offsets[size_t(t)] = layer.packed_rows;
    layer.packed_rows += running;
  }
}

// The steps and sequences of a packed input [N, I]. `lengths` are sorted, longest first.
void check_packed(const Tensor& input, const OptionalTensor& lengths, RnnLayer& layer) {
  check_tensor(input, "input", {-1, -1}, input.scalar_type());
  STD_TORCH_CHECK(bool(lengths), "seqaccel: expected lengths of a packed input to be given");
  check_tensor(*lengths, "lengths", {-1}, ScalarType::Long);
  const Tensor dense = to_contiguous(*lengths);
  const int64_t* data = dense.const_data_ptr<int64_t>();
  layer.is_packed = true;
  layer.batch = dense.size(0);
  layer.steps = layer.batch ? data[0] : 0;
  layer.packed_rows = 0;
  for (int64_t b = 0, before = layer.steps; b < layer.batch; before = data[b++]) {
    STD_TORCH_CHECK(data[b] >= 0 && data[b] <= before,
                    "seqaccel: expected lengths of a packed input to be longest first");
    layer.packed_rows += data[b];
    STD_TORCH_CHECK(layer.packed_rows <= input.size(0), "seqaccel: expected lengths of a packed input to add up to ",
                    input.size(0));
  }
  STD_TORCH_CHECK(layer.packed_rows == input.size(0), "seqaccel: expected lengths of a packed input to add up to ",
                  input.size(0), ", but they add up to ", layer.packed_rows);
}

size_t value_bytes(const RnnLayer& layer) { return layer.single() ? 4 : 8; }

}  // namespace

const RnnCellEntry& checked_rnn_cell(const std::string& name) {
  const RnnCellEntry* const cell = find_rnn_cell(name.c_str());
  STD_TORCH_CHECK(cell != nullptr, "seqaccel: there is no recurrent cell '", name, "'");
  return *cell;
}

RnnSizes check_weights(const RnnCellEntry& cell, const WeightList& weights, int64_t inputs, ScalarType dtype) {
  const WeightShapes& expected = cell.weights;
  STD_TORCH_CHECK(int64_t(weights.size()) == expected.count, "seqaccel: expected ", int64_t(expected.count),
                  " weights of the cell '", cell.name, "', but got ", int64_t(weights.size()));
  for (int i = 0; i < expected.count; ++i) {
    STD_TORCH_CHECK(weights[size_t(i)] || expected.optional(i), "seqaccel: expected ", kWeightNames[i],
                    " of the cell '", cell.name, "' to be given");
  }
  const Tensor& weight_hh = *weights[kWeightHh];
  check_tensor(weight_hh, "weight_hh", {-1, -1}, dtype);
  const int64_t rows = weight_hh.size(0), H = rows / cell.gates;
  STD_TORCH_CHECK(rows > 0 && rows % cell.gates == 0, "seqaccel: expected weight_hh to have ", int64_t(cell.gates),
                  " H rows, but got shape ", shape_string(weight_hh));
  const bool projected = cell.projects && weights[kCommonWeights];
  const RnnSizes sizes{H, projected ? weight_hh.size(1) : H};
  STD_TORCH_CHECK(sizes.outputs > 0, "seqaccel: expected weight_hr to have at least one row");
  for (int i = 0; i < expected.count; ++i) {
    if (!weights[size_t(i)]) continue;
    const auto [first, second] = expected.shapes[i];
    const auto size = [&](char letter) -> int64_t {
      return letter == 'G'   ? rows
             : letter == 'H' ? H
             : letter == 'I' ? inputs
             : letter == 'P' ? sizes.outputs
                             : letter - '0';
    };
    if (second == 0) {
      check_tensor(*weights[size_t(i)], kWeightNames[i], {size(first)}, dtype);
    } else {
      check_tensor(*weights[size_t(i)], kWeightNames[i], {size(first), size(second)}, dtype);
    }
  }
  STD_TORCH_CHECK(weights[kWeightIh] || inputs == rows, "seqaccel: without weight_ih expected input to have ", rows,
                  " features, but got ", inputs);
  return sizes;
}

RnnLayer check_rnn_layer(const std::string& cell, const Tensor& input, const Tensor& h_0, const OptionalTensor& c_0,
                         const WeightList& weights, const OptionalTensor& lengths, const OptionalTensor& zoneout_h,
                         const OptionalTensor& zoneout_c) {
  const RnnCellEntry* const entry = &checked_rnn_cell(cell);
  check_float_or_double(input, "input");
  const ScalarType dtype = input.scalar_type();
  if (input.dim() != 2) check_tensor(input, "input", {-1, -1, -1}, dtype);
  const int64_t I = input.size(input.dim() - 1);
  const auto [H, P] = check_weights(*entry, weights, I, dtype);
  RnnLayer layer{entry, input.size(0), input.size(1), I, H, P, input, h_0};
  layer.packed_rows = layer.steps * layer.batch;
  if (input.dim() == 2) check_packed(input, lengths, layer);
  check_tensor(h_0, "h_0", {layer.batch, layer.outputs}, dtype);
  STD_TORCH_CHECK(bool(c_0) == entry->has_cell, "seqaccel: expected c_0 to be ", entry->has_cell ? "given" : "None",
                  " for the cell '", cell, "'");
  if (c_0) check_tensor(*c_0, "c_0", {layer.batch, layer.hidden}, dtype);
  check_zoneout(zoneout_h, "zoneout_h", entry->zoneout, layer, layer.outputs);
  check_zoneout(zoneout_c, "zoneout_c", entry->zoneout && entry->has_cell, layer, layer.hidden);
  if (lengths) check_tensor(*lengths, "lengths", {layer.batch}, ScalarType::Long);

  layer.input = to_contiguous(detach(input));
  layer.h_0 = to_contiguous(h_0);
  layer.c_0 = to_contiguous(c_0);
  layer.zoneout_h = to_contiguous(zoneout_h);
  layer.zoneout_c = to_contiguous(zoneout_c);
  for (const OptionalTensor& weight : weights) layer.weights.push_back(to_contiguous(weight));
  if (!layer.given()) layer.weights[kWeightIh] = detach(layer.weight(kWeightIh));
  if (entry->extra) layer.weights[kCommonWeights] = detach(layer.weight_mx());
  if (lengths && layer.packed_rows > 0) sort_rows(*lengths, layer);
  return layer;
}

Tensor as_rows(const Tensor& t) {
  return t.dim() == 2 ? t : view_of(t, {t.size(0) * t.size(1), t.size(2)}, {t.size(2), 1});
}

Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  Extents sizes = sizes_of(t);
  if (count == sizes[0]) return t;
  sizes[0] = count;
  return view_of(t, sizes, strides_of(t), begin * t.stride(0));
}

Tensor columns_of(const Tensor& t, int64_t begin, int64_t count) {
  if (count == t.size(1)) return t;
  return view_of(t, {t.size(0), count}, {t.stride(0), t.stride(1)}, begin * t.stride(1));
}

Tensor transposed(const Tensor& t) { return view_of(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

Tensor pack_rows(const RnnLayer& layer, const Tensor& padded) {
  Tensor packed = new_tensor(padded, {layer.packed_rows, padded.size(2)});
  const size_t bytes = size_t(padded.size(2)) * value_bytes(layer);
  const char* const from = static_cast<const char*>(padded.const_data_ptr());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  for (int64_t t = 0; t < layer.steps && bytes; ++t) {
    for (int64_t b = 0; b < layer.running[size_t(t)]; ++b, to += bytes) {
      std::memcpy(to, from + size_t(t * layer.batch + layer.order[size_t(b)]) * bytes, bytes);
    }
  }
  return packed;
}

void unpack_rows(const RnnLayer& layer, const Tensor& packed, Tensor& padded) {
  const size_t bytes = size_t(padded.size(2)) * value_bytes(layer);
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  char* const to = static_cast<char*>(padded.mutable_data_ptr());
  for (int64_t t = 0; t < layer.steps && bytes; ++t) {
    for (int64_t b = 0; b < layer.running[size_t(t)]; ++b, from += bytes) {
      std::memcpy(to + size_t(t * layer.batch + layer.order[size_t(b)]) * bytes, from, bytes);
    }
  }
  zero_padding(layer, padded);
}

void zero_padding(const RnnLayer& layer, Tensor& padded) {
  const size_t bytes = size_t(padded.size(2)) * value_bytes(layer);
  char* const to = static_cast<char*>(padded.mutable_data_ptr());
  for (int64_t t = 0; t < layer.steps && bytes; ++t) {
    for (int64_t b = layer.running[size_t(t)]; b < layer.batch; ++b) {
      std::memset(to + size_t(t * layer.batch + layer.order[size_t(b)]) * bytes, 0, bytes);
    }
  }
}

}  // namespace seqaccel::rnn
