// What the two operators of a recurrent layer share: checks, lengths, and matrices of all time steps.
#pragma once

#include <algorithm>

#include "common/tensor.h"
#include "cpu/base/pool.h"
#include "cpu/matmul/product.h"
#include "cpu/rnn/rnn.h"

namespace seqaccel::rnn {

constexpr int64_t kFewRows = 32;  // a product of up to so many rows reads the weight in place

// The weights of every cell, in this order; the cell's own follow.
enum RnnWeight { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kCommonWeights };

using WeightList = std::vector<OptionalTensor>;

inline const OptionalTensor kNone;

// A part of a sequence between resets, in steps [first, first + length) of a stream.
struct Episode {
  int64_t stream, first, length;
  bool takes_state, gives_state;  // begins with the stream's h_0; ends with its h_n
};

// Which episodes of a stream a state belongs to; null: all.
using OfEpisode = bool Episode::*;

// A layer's arguments after the checks, contiguous and detached from autograd.
struct RnnLayer {
  const RnnCellEntry* cell;
  int64_t times, streams;                         // of the caller's tensors
  int64_t steps, batch, inputs, hidden, outputs;  // T, B, I, H, P: of the rows that the loops run
  Tensor input, h_0;
  OptionalTensor c_0;
  WeightList weights;
  OptionalTensor zoneout_h, zoneout_c;
  // With lengths or resets, see RnnRows. Empty if every sequence has all steps.
  std::vector<int64_t> lengths, order, first, running, offsets;
  // With resets: the rows. h_0 and c_0 are then those of episodes. Empty if there is no reset.
  std::vector<Episode> episodes;
  int64_t packed_rows;     // rows of a packed tensor
  bool is_packed = false;  // the caller's tensors are packed: [packed_rows, .] for [T, B, .]

  bool ragged() const { return !running.empty(); }
  bool padded() const { return ragged() && !is_packed; }
  // A new tensor with a row of `width` values for every step and sequence, padded or packed as the caller's are.
  Tensor new_rows(int64_t width) const {
    return is_packed ? new_pooled(input, {packed_rows, width}) : new_pooled(input, {times, streams, width});
  }
  void check_rows(const Tensor& t, const char* name, int64_t width) const {
    if (is_packed) return check_tensor(t, name, {packed_rows, width}, input.scalar_type());
    check_tensor(t, name, {times, streams, width}, input.scalar_type());
  }
  bool single() const { return input.scalar_type() == ScalarType::Float; }
  const Tensor& weight(int i) const { return *weights[size_t(i)]; }
  bool given() const { return !weights[kWeightIh]; }  // the input is W_ih x itself
  int64_t pre_width() const { return cell->pre * hidden; }
  int64_t saved_width() const { return cell->saved * hidden; }
  int64_t gate_rows() const { return cell->gates * hidden; }
  int64_t grad_width() const { return cell->norm ? 2 * gate_rows() : pre_width(); }  // values in a row of dL/dpre
  // The stride of the rows of dL/dpre: whole lines, and one more. Otherwise equal columns of all rows could share a few
  // lines of a cache (rows of 4 KB: the weights' gradients of LSTM (T, B, H) = (128, 64, 256) run at 283 GFLOP/s
  // instead of 301).
  int64_t grad_row() const {
    const int64_t line = single() ? 16 : 8;
    return (grad_width() + 2 * line - 1) / line * line;
  }
  int64_t input_width() const { return cell->inputs * hidden; }
  // A cell's own weights: weight_hr, or weight_mx and weight_mh, or the weights of units in the order of
  // weight_tensors.
  const OptionalTensor& weight_hr() const { return cell->projects ? weights[kCommonWeights] : kNone; }
  const Tensor& weight_mx() const { return weight(kCommonWeights); }
  const Tensor& weight_mh() const { return weight(kCommonWeights + 1); }
  int first_unit_tensor() const { return kCommonWeights + int(cell->projects); }
  OfEpisode takes_c() const { return cell->constant ? nullptr : &Episode::takes_state; }
  int64_t offset(int64_t t) const { return ragged() ? offsets[size_t(t)] : t * batch; }
  int64_t state_row(int64_t b) const { return order.empty() ? b : order[size_t(b)]; }
  int64_t padded_row(int64_t t, int64_t b) const { return t * streams + first[size_t(b)]; }
  // Rows of a step, on average where episodes begin and end at any time.
  int64_t usual_rows() const { return episodes.empty() ? batch : std::max<int64_t>(1, packed_rows / steps); }
  // The steps [begin, begin + count).
  RnnRows rows(int64_t begin, int64_t count) const {
    RnnRows rows{count, batch};
    rows.is_packed = is_packed;
    rows.streams = streams;
    rows.usual = usual_rows();
    if (ragged()) {
      rows.order = order.empty() ? nullptr : order.data();
      rows.first = first.data();
      rows.running = running.data() + begin;
      rows.offsets = offsets.data() + begin;
    }
    return rows;
  }
};

// The cell of a name; checks that there is one.
const RnnCellEntry& checked_rnn_cell(const std::string& name);

struct RnnSizes {
  int64_t hidden, outputs;  // H and P
};

// The sizes of a layer, from weight_hh. Checks the shapes of the weights.
RnnSizes check_weights(const RnnCellEntry& cell, const WeightList& weights, int64_t inputs, ScalarType dtype);

// `reset` [T, B]: where episodes begin. A pass in `reverse` begins each at its last step.
RnnLayer check_rnn_layer(const std::string& cell, const Tensor& input, const Tensor& h_0, const OptionalTensor& c_0,
                         const WeightList& weights, const OptionalTensor& lengths, const OptionalTensor& zoneout_h,
                         const OptionalTensor& zoneout_c, const OptionalTensor& reset, bool reverse);

// States [streams, W] as those of the rows: zero for episodes without. And back: zero for streams without. Where all
// episodes of a stream have the state, the way back adds theirs. Without episodes both are one.
Tensor states_of_rows(const RnnLayer& layer, const Tensor& states, OfEpisode has);
Tensor states_of_streams(const RnnLayer& layer, const Tensor& rows, OfEpisode has);

// The operator of float32 and float64: output, h_n, c_n, and (save) what the backward pass takes.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_forward(Text cell, Tensor input, Tensor h_0,
                                                                    OptionalTensor c_0, WeightList weights,
                                                                    OptionalTensor lengths, OptionalTensor zoneout_h,
                                                                    OptionalTensor zoneout_c, bool reverse, bool save,
                                                                    OptionalTensor reset);

// A contiguous tensor [T, B, N] as a matrix [T * B, N]; a matrix stays one.
Tensor as_rows(const Tensor& t);

// Rows [begin, begin + count) of the first dimension; columns of a matrix; the transpose of a matrix.
Tensor rows_of(const Tensor& t, int64_t begin, int64_t count);
Tensor columns_of(const Tensor& t, int64_t begin, int64_t count);
Tensor transposed(const Tensor& t);

// Convert padded [T, B, N] to packed rows [packed_rows, N], and back, with zeros where no row runs.
Tensor pack_rows(const RnnLayer& layer, const Tensor& padded);
void unpack_rows(const RnnLayer& layer, const Tensor& packed, Tensor& padded);

// The state h' before the step, for every packed row.
Tensor pack_previous(const RnnLayer& layer, const Tensor& output, bool reverse);

// Zeroes the padding of padded [T, B, N].
void zero_padding(const RnnLayer& layer, Tensor& padded);

inline void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the packed weights of a recurrent layer");
}

template <typename T>
RnnBlend<T> blend_of(const OptionalTensor& zoneout, int64_t first_value) {
  if (!zoneout) return {};
  const bool one = zoneout->numel() == 1;
  return {zoneout->const_data_ptr<T>() + (one ? 0 : first_value), one};
}

}  // namespace seqaccel::rnn
