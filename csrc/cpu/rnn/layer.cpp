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

// Counts the rows that run at each step. length_of(b): that of row b, longest first.
template <class Length>
void count_rows(const Length& length_of, RnnLayer& layer) {
  layer.running.resize(size_t(layer.steps));
  layer.offsets.resize(size_t(layer.steps));
  int64_t running = layer.batch;
  layer.packed_rows = 0;
  for (int64_t t = 0; t < layer.steps; ++t) {
    while (running > 0 && length_of(running - 1) <= t) --running;
    layer.running[size_t(t)] = running;
    layer.offsets[size_t(t)] = layer.packed_rows;
    layer.packed_rows += running;
  }
}

// The lengths [streams], between 0 and all steps; empty if all sequences have all steps.
std::vector<int64_t> clamped_lengths(const Tensor& lengths, int64_t T) {
  const Tensor dense = to_contiguous(lengths);
  const int64_t* const data = dense.const_data_ptr<int64_t>();
  std::vector<int64_t> clamped(size_t(dense.size(0)), 0);
  bool whole = true;
  for (size_t b = 0; b < clamped.size(); ++b) {
    clamped[b] = std::min(std::max(data[b], int64_t(0)), T);
    whole = whole && clamped[b] == T;
  }
  return whole ? std::vector<int64_t>() : clamped;
}

// Sorts the rows, longest first.
void sort_rows(RnnLayer& layer) {
  layer.order.resize(size_t(layer.batch));
  std::iota(layer.order.begin(), layer.order.end(), int64_t(0));
  std::stable_sort(layer.order.begin(), layer.order.end(),
                   [&](int64_t a, int64_t b) { return layer.lengths[size_t(a)] > layer.lengths[size_t(b)]; });
  layer.first = layer.order;
  count_rows([&](int64_t b) { return layer.lengths[size_t(layer.order[size_t(b)])]; }, layer);
}

// The episodes of all streams, longest first; empty if no reset has an effect. A stream without steps is an episode.
std::vector<Episode> episodes_of(const RnnLayer& layer, const bool* reset, bool reverse) {
  const int64_t T = layer.times, B = layer.streams;
  if (T * B == 0 || std::memchr(reset, true, size_t(T * B)) == nullptr) return {};
  std::vector<Episode> found;
  std::vector<int64_t> places(size_t(T + 2), 0);  // at T - length + 1: how many are as long
  bool dropped = false;                           // h_0 of a stream
  for (int64_t b = 0; b < B; ++b) {
    const int64_t end = layer.lengths.empty() ? T : layer.lengths[size_t(b)];
    const bool drops = !reverse && end > 0 && reset[b];
    dropped = dropped || drops;
    int64_t first = 0, t = 0;
    do {
      do ++t;
      while (t < end && !reset[t * B + b]);
      t = std::min(t, end);
      const bool begins = first == 0, ends = t == end;
      found.push_back({b, first, t - first, reverse ? ends : begins && !drops, reverse ? begins : ends});
      ++places[size_t(T - (t - first) + 1)];
      first = t;
    } while (t < end);
  }
  if (int64_t(found.size()) == B && !dropped) return {};
  std::partial_sum(places.begin(), places.end(), places.begin());
  std::vector<Episode> sorted(found.size());
  for (const Episode& episode : found) sorted[size_t(places[size_t(T - episode.length)]++)] = episode;
  return sorted;
}

// Makes the episodes the layer's rows.
void take_episodes(std::vector<Episode> episodes, RnnLayer& layer) {
  layer.episodes = std::move(episodes);
  layer.batch = int64_t(layer.episodes.size());
  layer.h_0 = states_of_rows(layer, layer.h_0, &Episode::takes_state);
  if (layer.c_0) layer.c_0 = states_of_rows(layer, *layer.c_0, layer.takes_c());
  layer.steps = layer.episodes.front().length;
  if (layer.episodes.back().length == layer.times) return;  // in the order of the streams
  for (const Episode& episode : layer.episodes) layer.first.push_back(episode.first * layer.streams + episode.stream);
  count_rows([&](int64_t b) { return layer.episodes[size_t(b)].length; }, layer);
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
  layer.times = layer.steps;
  layer.streams = layer.batch;
}

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
  STD_TORCH_CHECK(weights[kWeightIh] || inputs == rows, "seqaccel: expected input to have ", rows,
                  " features without weight_ih, but got ", inputs);
  return sizes;
}

RnnLayer check_rnn_layer(const std::string& cell, const Tensor& input, const Tensor& h_0, const OptionalTensor& c_0,
                         const WeightList& weights, const OptionalTensor& lengths, const OptionalTensor& zoneout_h,
                         const OptionalTensor& zoneout_c, const OptionalTensor& reset, bool reverse) {
  const RnnCellEntry* const entry = &checked_rnn_cell(cell);
  check_float_or_double(input, "input");
  const ScalarType dtype = input.scalar_type();
  if (input.dim() != 2) check_tensor(input, "input", {-1, -1, -1}, dtype);
  const int64_t I = input.size(input.dim() - 1);
  const auto [H, P] = check_weights(*entry, weights, I, dtype);
  RnnLayer layer{entry, input.size(0), input.size(1), input.size(0), input.size(1), I, H, P, input, h_0};
  layer.packed_rows = layer.steps * layer.batch;
  if (input.dim() == 2) check_packed(input, lengths, layer);
  STD_TORCH_CHECK(!reset || !layer.is_packed, "seqaccel: expected reset to be None for a packed input");
  if (reset) check_tensor(*reset, "reset", {layer.times, layer.streams}, ScalarType::Bool);
  check_tensor(h_0, "h_0", {layer.batch, layer.outputs}, dtype);
  STD_TORCH_CHECK(bool(c_0) == entry->has_cell, "seqaccel: expected c_0 to be ", entry->has_cell ? "given" : "None",
                  " for the cell '", cell, "'");
  if (c_0) check_tensor(*c_0, "c_0", {layer.batch, layer.hidden}, dtype);
  check_zoneout(zoneout_h, "zoneout_h", entry->zoneout, layer, layer.outputs);
  check_zoneout(zoneout_c, "zoneout_c", entry->zoneout && entry->has_cell, layer, layer.hidden);
  if (lengths) check_tensor(*lengths, "lengths", {layer.batch}, ScalarType::Long);

  layer.input = pooled_contiguous(input);
  layer.h_0 = to_contiguous(h_0);
  layer.c_0 = to_contiguous(c_0);
  layer.zoneout_h = to_contiguous(zoneout_h);
  layer.zoneout_c = to_contiguous(zoneout_c);
  for (const OptionalTensor& weight : weights) layer.weights.push_back(to_contiguous(weight));
  if (!layer.given()) layer.weights[kWeightIh] = detach(layer.weight(kWeightIh));
  if (entry->extra) layer.weights[kCommonWeights] = detach(layer.weight_mx());
  if (layer.packed_rows == 0) return layer;
  if (lengths) layer.lengths = clamped_lengths(*lengths, layer.steps);
  if (reset) {
    const Tensor dense = to_contiguous(*reset);
    std::vector<Episode> episodes = episodes_of(layer, dense.const_data_ptr<bool>(), reverse);
    if (!episodes.empty()) {
      take_episodes(std::move(episodes), layer);
      return layer;
    }
  }
  if (!layer.lengths.empty()) sort_rows(layer);
  return layer;
}

namespace {

// Rows of equal size, as bytes.
template <class Byte>
struct Rows {
  Byte* data;
  size_t bytes, stride = bytes;
  Byte* operator[](int64_t row) const { return data + size_t(row) * stride; }
};

size_t row_bytes(const Tensor& t) { return size_t(t.size(t.dim() - 1)) * size_t(t.element_size()); }
Rows<const char> read_rows(const Tensor& t) { return {static_cast<const char*>(t.const_data_ptr()), row_bytes(t)}; }
Rows<char> write_rows(const Tensor& t) { return {static_cast<char*>(t.mutable_data_ptr()), row_bytes(t)}; }

// Adds the rows of all episodes to those of their streams.
template <typename T>
void add_rows(const RnnLayer& layer, const Tensor& rows, const Tensor& states) {
  const int64_t width = rows.size(1);
  for (int64_t b = 0; b < layer.batch; ++b) {
    const T* const from = rows.const_data_ptr<T>() + b * width;
    T* const to = states.mutable_data_ptr<T>() + layer.episodes[size_t(b)].stream * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
}

}  // namespace

Tensor states_of_rows(const RnnLayer& layer, const Tensor& states, OfEpisode has) {
  if (layer.episodes.empty()) return states;
  Tensor rows = new_tensor(states, {layer.batch, states.size(1)});
  const auto to = write_rows(rows);
  const auto from = read_rows(states);
  for (int64_t b = 0; b < layer.batch; ++b) {
    const Episode& episode = layer.episodes[size_t(b)];
    if (!has || episode.*has) {
      std::memcpy(to[b], from[episode.stream], to.bytes);
    } else {
      std::memset(to[b], 0, to.bytes);
    }
  }
  return rows;
}

Tensor states_of_streams(const RnnLayer& layer, const Tensor& rows, OfEpisode has) {
  if (layer.episodes.empty()) return rows;
  Tensor states = new_tensor(rows, {layer.streams, rows.size(1)});
  torch::stable::zero_(states);
  if (!has) {
    (layer.single() ? add_rows<float> : add_rows<double>)(layer, rows, states);
    return states;
  }
  const auto to = write_rows(states);
  const auto from = read_rows(rows);
  for (int64_t b = 0; b < layer.batch; ++b) {
    const Episode& episode = layer.episodes[size_t(b)];
    if (episode.*has) std::memcpy(to[episode.stream], from[b], to.bytes);
  }
  return states;
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

namespace {

constexpr int64_t kCopyBytes = int64_t(1) << 18;  // fewer are copied by one thread

// Calls copy(packed row, t, b) for every row that runs.
template <class Copy>
void for_rows(const RnnLayer& layer, size_t bytes, const Copy& copy) {
  const bool small = layer.packed_rows * int64_t(bytes) < kCopyBytes;
#pragma omp parallel for schedule(dynamic, 1) if (!small)
  for (int64_t t = 0; t < layer.steps; ++t) {
    const int64_t packed = layer.offset(t);
    for (int64_t b = 0; b < layer.running[size_t(t)]; ++b) copy(packed + b, t, b);
  }
}

}  // namespace

Tensor pack_rows(const RnnLayer& layer, const Tensor& padded) {
  Tensor packed = new_pooled(padded, {layer.packed_rows, padded.size(2)});
  const auto to = write_rows(packed);
  const auto from = read_rows(padded);
  for_rows(layer, to.bytes,
           [&](int64_t row, int64_t t, int64_t b) { std::memcpy(to[row], from[layer.padded_row(t, b)], to.bytes); });
  return packed;
}

void unpack_rows(const RnnLayer& layer, const Tensor& packed, Tensor& padded) {
  const auto to = write_rows(padded);
  auto from = read_rows(packed);
  from.stride = size_t(packed.stride(0)) * size_t(packed.element_size());
  for_rows(layer, to.bytes,
           [&](int64_t row, int64_t t, int64_t b) { std::memcpy(to[layer.padded_row(t, b)], from[row], to.bytes); });
  zero_padding(layer, padded);
}

Tensor pack_previous(const RnnLayer& layer, const Tensor& output, bool reverse) {
  Tensor packed = new_pooled(output, {layer.packed_rows, layer.outputs});
  const auto to = write_rows(packed);
  const auto from = read_rows(output), first = read_rows(layer.h_0);
  for_rows(layer, to.bytes, [&](int64_t row, int64_t t, int64_t b) {
    const int64_t earlier = reverse ? t + 1 : t - 1;
    const bool inner = earlier >= 0 && earlier < layer.steps && b < layer.running[size_t(earlier)];
    const auto at = [&] { return layer.is_packed ? layer.offset(earlier) + b : layer.padded_row(earlier, b); };
    std::memcpy(to[row], inner ? from[at()] : first[layer.state_row(b)], to.bytes);
  });
  return packed;
}

void zero_padding(const RnnLayer& layer, Tensor& padded) {
  const auto to = write_rows(padded);
  for (int64_t b = 0; b < int64_t(layer.lengths.size()); ++b) {
    for (int64_t t = layer.lengths[size_t(b)]; t < layer.times; ++t) {
      std::memset(to[t * layer.streams + b], 0, to.bytes);
    }
  }
}

}  // namespace seqaccel::rnn
