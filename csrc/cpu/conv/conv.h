#pragma once

#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/narrow.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::conv {

constexpr ptrdiff_t kZeros = -1;

// Time steps [begin, end) of a row of the batch, with row `history` of the history before them, or zeros (kZeros). A
// row of the history lies before one segment at most.
struct Segment {
  ptrdiff_t begin, end, history;
};

// What tap k meets: the time step `steps` from the present, in a column `columns` to the right.
struct Tap {
  ptrdiff_t steps, columns;
};

// Time steps are those of a sequence, or the elements of a grid, row after row of `width` columns. Of a grid's taps
// `column_taps` lie in each row, `column_dilation` apart and centred; the dilation is that between rows.
struct ConvShape {
  ptrdiff_t batch, in_channels, out_channels, length, kernel_size, dilation, groups;
  ptrdiff_t width = 1, column_taps = 1, column_dilation = 1;
  // Where rows of the batch are several sequences: those of row b are segments[first_segment[b] ...
  // first_segment[b + 1]), in order. Null: each row is one.
  const Segment* segments = nullptr;
  const ptrdiff_t* first_segment = nullptr;
  ptrdiff_t history_rows = 0;  // with segments
  // How many time steps the last tap lies ahead of the present: of a centred kernel half of its rows. Only without a
  // history, without segments and with one group.
  ptrdiff_t ahead = 0;

  // From the first tap to the last, in time steps: those before the first one that an output sees.
  ptrdiff_t context() const { return (kernel_size / column_taps - 1) * dilation * width; }
  // Time steps to either side, beyond the context, that an output sees.
  ptrdiff_t beside() const {
    const ptrdiff_t columns = column_taps / 2 * column_dilation;
    return ahead + (columns < width ? columns : width - 1);
  }
  ptrdiff_t group_in() const { return in_channels / groups; }
  ptrdiff_t group_out() const { return out_channels / groups; }
  // The depthwise kernels copy the context. The others take one of any length.
  bool has_short_context() const { return context() / 4 <= length || context() <= ptrdiff_t(1) << 18; }
  // Whether a row of several segments is calculated as one (reach.h): the first one alone has a history, and time steps
  // are counted in 32 bits.
  bool rows_as_one(bool has_history) const {
    return segments && (!has_history || history_rows == batch) && length + context() + beside() < ptrdiff_t(1) << 31;
  }
  bool depthwise() const { return group_in() == 1 && groups > 1 && column_taps == 1 && has_short_context(); }
  bool depthwise_grid() const {
    const bool as_one = !segments || rows_as_one(true);
    return group_in() == 1 && groups > 1 && column_taps > 1 && has_short_context() && as_one;
  }
  Tap tap(ptrdiff_t k) const {
    const ptrdiff_t columns = (k % column_taps - column_taps / 2) * column_dilation;
    return {ahead + columns - (kernel_size / column_taps - 1 - k / column_taps) * dilation * width, columns};
  }

  // Takes the segments of a shape with as many rows and time steps.
  void divide_as(const ConvShape& other) {
    segments = other.segments;
    first_segment = other.first_segment;
    history_rows = other.history_rows;
  }

  // Row b as one, with the history of its first segment.
  Segment row(ptrdiff_t b) const { return {0, length, segments ? segments[first_segment[b]].history : b}; }
  // The segment that time step t of row b lies in.
  Segment segment(ptrdiff_t b, ptrdiff_t t) const {
    if (!segments) return {0, length, b};
    ptrdiff_t low = first_segment[b], high = first_segment[b + 1];
    while (high - low > 1) {
      const ptrdiff_t middle = low + (high - low) / 2;
      (segments[middle].begin <= t ? low : high) = middle;
    }
    return segments[low];
  }
  // f(segment) for those of row b that have a time step in [begin, end).
  template <typename F>
  void for_segments(ptrdiff_t b, ptrdiff_t begin, ptrdiff_t end, const F& f) const {
    if (!segments) return f(Segment{0, length, b});
    for (ptrdiff_t i = first_segment[b]; i < first_segment[b + 1]; ++i) {
      if (segments[i].begin < end && segments[i].end > begin) f(segments[i]);
    }
  }
};

// y = relu?(residual + dropout(activation(conv(x) + bias))). A gated activation takes output channel o and, as the
// gate, o + O / 2: y and the residual have half of the O channels (Y).
struct ConvEpilogue {
  Activation activation;
  bool relu;
  double dropout;
  uint64_t seed;

  ptrdiff_t y_channels(const ConvShape& s) const { return is_gated(activation) ? s.out_channels / 2 : s.out_channels; }
};

// B batch, C and O input and output channels, Y those of y, T length, K taps, P = (K - 1) * dilation. All contiguous;
// null: absent.
template <typename T>
struct ConvForward {
  ConvShape shape;
  ConvEpilogue epilogue;
  const T* x;         // [B, C, T]
  const T* weight;    // [O, C / groups, K]
  const T* bias;      // [O]
  const T* residual;  // [B, Y, T]
  const T* history;   // [B, C, P], the time steps before x (or before a segment); null: zeros
  T* y;               // [B, Y, T]
  T* pre;             // [B, O, T] conv + bias, for the backward; may be null
  uint8_t* active;    // [B, O, T] where relu and dropout let the gradient through; may be null
  int threads;
};

template <typename T>
struct ConvBackward {
  ConvShape shape;
  ConvEpilogue epilogue;
  const T* grad_y;        // [B, Y, T]
  const T* y;             // the forward's, where the derivative is taken from it
  const T* pre;           // the forward's, or null
  const uint8_t* active;  // the forward's, or null
  const T* x;
  const T* weight;
  const T* history;
  const T* addend;   // [B, C, T], added to grad_x; null: zeros
  T* grad_x;         // null: not wanted, as for the others
  T* grad_weight;    // [O, C / groups, K]
  T* grad_bias;      // [O]
  T* grad_residual;  // [B, Y, T]
  T* grad_history;   // [B, C, P]
  int threads;
};

// A kernel returns false where the workspace could not be allocated.
struct ConvKernels {
  bool (*forward_float)(const ConvForward<float>& p);
  bool (*forward_double)(const ConvForward<double>& p);
  bool (*backward_float)(const ConvBackward<float>& p);
  bool (*backward_double)(const ConvBackward<double>& p);
};

struct ConvNarrowKernels {
  bool (*forward_bfloat16)(const ConvForward<BFloat16>& p);
  bool (*forward_float16)(const ConvForward<Float16>& p);
  // Products of pairs; null without AVX-512 BF16.
  bool (*forward_pairs)(const ConvForward<BFloat16>& p);
  // Not depthwise.
  bool (*backward_bfloat16)(const ConvBackward<BFloat16>& p);
  bool (*backward_float16)(const ConvBackward<Float16>& p);
  bool (*backward_pairs)(const ConvBackward<BFloat16>& p);
};

}  // namespace seqaccel::conv

SEQACCEL_DECLARE_KERNELS(conv, ConvKernels, conv_kernels)
SEQACCEL_DECLARE_KERNELS_BF16(conv, ConvNarrowKernels, conv_narrow_kernels)
