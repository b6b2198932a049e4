#include "cpu/rnn/layer.h"

#include <cstring>
#include <numeric>

namespace seqaccel::rnn {
namespace {

int64_t weight_count(const RnnCellEntry& cell) {
  int64_t count = kCommonWeights + (cell.projects ? 1 : 0) + (cell.extra ? 2 : 0);
  for (int i = 0; i < 4 && cell.weight_tensors[i]; ++i) ++count;
  return count;
}

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

// Sorts the rows, longest first, and counts those that run at each step; nothing to do where all are whole.
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

// Steps and sequences of a packed input [N, I], from the sequences' lengths, longest first.
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

RnnLayer check_rnn_layer(const std::string& cell, const Tensor& input, const Tensor& h_0, const OptionalTensor& c_0,
                         const WeightList& weights, const OptionalTensor& lengths, const OptionalTensor& zoneout_h,
                         const OptionalTensor& zoneout_c) {
  const RnnCellEntry* const entry = find_rnn_cell(cell.c_str());
  STD_TORCH_CHECK(entry != nullptr, "seqaccel: there is no recurrent cell '", cell, "'");
  check_float_or_double(input, "input");
  const ScalarType dtype = input.scalar_type();
  if (input.dim() != 2) check_tensor(input, "input", {-1, -1, -1}, dtype);
  const int64_t expected = weight_count(*entry);
  STD_TORCH_CHECK(int64_t(weights.size()) == expected, "seqaccel: expected ", expected, " weights of the cell '", cell,
                  "', but got ", int64_t(weights.size()));
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool optional = i == kBiasIh || i == kBiasHh || (i == kCommonWeights && entry->projects);
    STD_TORCH_CHECK(weights[i] || optional, "seqaccel: expected weight ", int64_t(i), " of the cell '", cell,
                    "' to be given");
  }
  const Tensor& weight_hh = *weights[kWeightHh];
  check_tensor(weight_hh, "weight_hh", {-1, -1}, dtype);
  STD_TORCH_CHECK(weight_hh.size(0) > 0 && weight_hh.size(0) % entry->gates == 0,
                  "seqaccel: expected weight_hh to have ", int64_t(entry->gates), " H rows, but got shape ",
                  shape_string(weight_hh));
  const int64_t H = weight_hh.size(0) / entry->gates, P = weight_hh.size(1);
  RnnLayer layer{entry, input.size(0), input.size(1), input.size(input.dim() - 1), H, P, input, h_0};
  layer.packed_rows = layer.steps * layer.batch;
  if (input.dim() == 2) check_packed(input, lengths, layer);
  const int64_t rows = layer.gate_rows();
  check_tensor(*weights[kWeightIh], "weight_ih", {rows, layer.inputs}, dtype);
  if (weights[kBiasIh]) check_tensor(*weights[kBiasIh], "bias_ih", {rows}, dtype);
  if (weights[kBiasHh]) check_tensor(*weights[kBiasHh], "bias_hh", {rows}, dtype);
  if (entry->projects && weights[kCommonWeights]) {
    STD_TORCH_CHECK(P > 0, "seqaccel: expected weight_hr to have at least one row");
    check_tensor(*weights[kCommonWeights], "weight_hr", {P, H}, dtype);
  } else {
    check_tensor(weight_hh, "weight_hh", {rows, H}, dtype);
  }
  if (entry->extra) {
    check_tensor(*weights[kCommonWeights], "weight_mx", {H, layer.inputs}, dtype);
    check_tensor(*weights[kCommonWeights + 1], "weight_mh", {H, H}, dtype);
  }
  for (size_t i = 0; i < 4 && entry->weight_tensors[i]; ++i) {
    const Tensor& weight = *weights[size_t(layer.first_unit_tensor()) + i];
    const int64_t count = entry->weight_tensors[i];
    if (entry->norm) {
      check_tensor(weight, "weights of norms", {count * H}, dtype);
    } else {
      check_tensor(weight, "weights of units", {count, H}, dtype);
    }
  }
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
  layer.weights[kWeightIh] = detach(layer.weight(kWeightIh));
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
