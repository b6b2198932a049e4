// Where the heads of queries, keys and values lie.
#pragma once

#include <cstdint>

namespace seqaccel::attention {

// A [B, heads, T, D] array with a contiguous last dimension and these strides of the others.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, head, time;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

}  // namespace seqaccel::attention
