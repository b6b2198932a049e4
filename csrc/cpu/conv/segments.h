// The sequences that the rows of a batch consist of, from the arguments of an operator.
#pragma once

#include <cstring>
#include <vector>

#include "common/tensor.h"
#include "cpu/conv/checks.h"

namespace seqaccel::conv {

// The sequences that rows of the batch consist of; a shape points to them.
class Sequences {
 public:
  // `width`: time steps of the shape in one of reset's, the columns of a grid.
  Sequences(ConvShape& shape, const OptionalTensor& reset, const OptionalTensor& cu_seqlens, ptrdiff_t width = 1) {
    if (!reset && !cu_seqlens) return;
    segments_.reserve(1);  // not null, even where there is no step
    STD_TORCH_CHECK(!reset || !cu_seqlens, "seqaccel: expected reset or cu_seqlens, but got both");
    if (reset) {
      const ptrdiff_t steps = width > 0 ? shape.length / width : 0;
      check_tensor(*reset, "reset", {shape.batch, width > 0 ? steps : -1}, ScalarType::Bool);
      shape.history_rows = shape.batch;
      add_resets(shape.batch, steps, width, to_contiguous(*reset));
    } else {
      STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                      "seqaccel: expected cu_seqlens to have shape [sequences + 1], but got ",
                      shape_string(*cu_seqlens));
      check_tensor(*cu_seqlens, "cu_seqlens", {cu_seqlens->size(0)}, ScalarType::Long);
      STD_TORCH_CHECK(shape.batch == 1, "seqaccel: expected a batch of 1 with cu_seqlens, but got ", shape.batch);
      shape.history_rows = cu_seqlens->size(0) - 1;
      STD_TORCH_CHECK(shape.history_rows > 0 || shape.length == 0,
                      "seqaccel: expected cu_seqlens to have at least 2 offsets");
      add_offsets(shape, to_contiguous(*cu_seqlens));
    }
    shape.segments = segments_.data();
    shape.first_segment = first_.data();
  }
  Sequences(const Sequences&) = delete;

 private:
  // An episode begins from zeros; the steps before the first one go on from the history.
  void add_resets(ptrdiff_t batch, ptrdiff_t steps, ptrdiff_t width, const Tensor& reset) {
    const bool* const begins = reset.const_data_ptr<bool>();
    ptrdiff_t resets = 0;
    for (ptrdiff_t i = 0; i < batch * steps; ++i) resets += begins[i];
    segments_.reserve(batch + resets);
    for (ptrdiff_t b = 0; b < batch; ++b) {
      first_.push_back(segments_.size());
      const bool* const row = begins + b * steps;
      for (ptrdiff_t t = 0; t < steps;) {
        ptrdiff_t end = t + 1;
        if (end < steps && !row[end]) {
          const void* const next = memchr(row + end, 1, steps - end);
          end = next ? static_cast<const bool*>(next) - row : steps;
        }
        segments_.push_back({t * width, end * width, row[t] ? kZeros : b});
        t = end;
      }
    }
    first_.push_back(segments_.size());
  }

  // Offsets of any value stay within the row; the first sequence begins at 0 and the last one ends with the row.
  void add_offsets(const ConvShape& shape, const Tensor& cu_seqlens) {
    const int64_t* const offsets = cu_seqlens.const_data_ptr<int64_t>();
    first_.push_back(0);
    for (ptrdiff_t n = 0, begin = 0; n < shape.history_rows; ++n) {
      const ptrdiff_t most = shape.length, offset = offsets[n + 1];
      const ptrdiff_t end = n + 1 == shape.history_rows || offset > most ? most : offset < begin ? begin : offset;
      if (begin < end) segments_.push_back({begin, end, n});
      begin = end;
    }
    first_.push_back(segments_.size());
  }

  std::vector<Segment> segments_;
  std::vector<ptrdiff_t> first_;
};

}  // namespace seqaccel::conv
