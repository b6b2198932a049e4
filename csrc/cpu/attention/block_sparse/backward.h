// Block-sparse attention, backward (attend_backward.h): five products per pair of query and key.
//
// A task is a segment of a key head's query blocks, for all query heads of that key head. It writes the gradients of
// its queries and adds to those of the keys that they see, in place or in blocks of its own. Those are then added in
// the order of the segments: no atomics, and the same bits for any number of threads.
#pragma once

#include "cpu/attention/attend_backward.h"
#include "cpu/attention/block_sparse/block_sparse.h"

namespace seqaccel::SEQACCEL_ISA::attention::block_sparse {

// Where a segment of one key head adds gradients.
template <typename T>
struct SegmentGrads {
  int64_t first, last;   // query blocks
  const int32_t* place;  // [key_blocks]
  T *key, *value;        // this head's keys
  ptrdiff_t key_row, value_row;
  T *partial_key, *partial_value;  // this head's blocks
};

template <typename S>
SegmentGrads<Compute<S>> segment_grads(const AttentionBackward<S>& p, int64_t b, int64_t g, int64_t segment) {
  const Attention<S>& f = p.forward;
  const int64_t plan = b * p.plan_batch + g * p.plan_head, rows = p.partial_blocks * f.layout.block_size;
  const int64_t* first = p.first + plan * (p.segments + 1) + segment;
  return {first[0],
          first[1],
          p.place + (plan * p.segments + segment) * f.layout.key_blocks,
          p.grad_key.at(b, g),
          p.grad_value.at(b, g),
          p.grad_key.time,
          p.grad_value.time,
          p.partial_key + (b * f.G + g) * rows * f.D,
          p.partial_value + (b * f.G + g) * rows * f.Dv};
}

// The rows of the gradients of key n, which lies in a key block at `place`.
template <typename S>
void point_at(Chunk<S>& c, const SegmentGrads<Compute<S>>& s, int32_t place, int64_t n, int64_t block_size, int64_t D,
              int64_t Dv) {
  if (place == kInPlace) {
    c.grad_key = s.key + n * s.key_row;
    c.grad_value = s.value + n * s.value_row;
    c.grad_key_row = s.key_row;
    c.grad_value_row = s.value_row;
  } else {
    const int64_t row = place * block_size + n % block_size;
    c.grad_key = s.partial_key + row * D;
    c.grad_value = s.partial_value + row * Dv;
    c.grad_key_row = D;
    c.grad_value_row = Dv;
  }
}

template <typename W, typename S>
void segment_tile(const AttentionBackward<S>& p, const SegmentGrads<Sum<W>>& s, int64_t b, int64_t h, int64_t block,
                  int64_t t, int64_t count, const GradTile<W>& q) {
  typedef Sum<W> T;
  constexpr int L = Lanes<T>;
  const Attention<S>& f = p.forward;
  const Layout& layout = f.layout;
  const bool* seen = layout.at(b, h, block);
  const int64_t g = h / (f.H / f.G), size = layout.block_size, reach = layout.reach(block);
  const int64_t last = layout.causal ? min_of(f.Tk, t + count) : f.Tk;
  const int vectors = int((count + L - 1) / L);
  fill_grad_tile(q, f.query.at(b, h) + t * f.query.time, f.query.time, p.grad_out.at(b, h) + t * p.grad_out.time,
                 p.grad_out.time, f.out.at(b, h) + t * f.out.time, f.out.time, f.lse + (b * f.H + h) * f.Tq + t, count,
                 f.D, f.Dv);
  for (int64_t key_block = 0; key_block < reach;) {
    if (!seen[key_block]) {
      ++key_block;
      continue;
    }
    // Neighbouring key blocks whose gradients are neighbours too.
    const int64_t first = key_block++;
    const int32_t place = s.place[first];
    while (key_block < reach && seen[key_block] &&
           s.place[key_block] == (place == kInPlace ? kInPlace : place + int32_t(key_block - first))) {
      ++key_block;
    }
    const int64_t begin = first * size, end = min_of(last, key_block * size);
    for (int64_t key = begin; key < end;) {
      const bool masked = layout.causal && key >= t;
      const int skipped = masked ? int((key - t) / L) : 0;
      const int64_t stop = masked ? t + (skipped + 1) * L : layout.causal ? t : end;
      Chunk<S> c;
      c.keys = min_of(kKeys, min_of(stop, end) - key);
      c.key = f.key.at(b, g) + key * f.key.time;
      c.value = f.value.at(b, g) + key * f.value.time;
      c.key_row = f.key.time;
      c.value_row = f.value.time;
      const int32_t at = place == kInPlace ? place : place + int32_t((key - begin) / size);
      point_at(c, s, at, key, size, f.D, f.Dv);
      chunk_backward_vectors(vectors - skipped, q, skipped, count, c, f.D, f.Dv, T(0), 0, masked);
      key += c.keys;
    }
  }
  end_grad_tile(q, p.grad_query.at(b, h) + t * p.grad_query.time, p.grad_query.time, count, f.D);
}

template <typename T>
void zero_rows(T* rows, ptrdiff_t row, ptrdiff_t n, ptrdiff_t width) {
  for (ptrdiff_t i = 0; i < n; ++i) memset(rows + i * row, 0, size_t(width) * sizeof(T));
}

template <typename W, typename S>
void segment_backward(const AttentionBackward<S>& p, int64_t b, int64_t g, int64_t segment, Sum<W>* workspace) {
  typedef Sum<W> T;
  const Attention<S>& f = p.forward;
  const int64_t size = f.layout.block_size, group = f.H / f.G;
  const SegmentGrads<T> s = segment_grads(p, b, g, segment);
  for (int64_t i = 0; i < f.layout.key_blocks; ++i) {
    if (s.place[i] == kUnseen) continue;
    Chunk<S> c;
    point_at(c, s, s.place[i], i * size, size, f.D, f.Dv);
    const int64_t keys = min_of(size, f.Tk - i * size);
    zero_rows(c.grad_key, c.grad_key_row, keys, f.D);
    zero_rows(c.grad_value, c.grad_value_row, keys, f.Dv);
  }
  const GradTile<W> q = make_grad_tile<W>(workspace, f.D, f.Dv, f.scale);
  for (int64_t block = s.first; block < s.last; ++block) {
    const int64_t end = min_of(f.Tq, (block + 1) * size);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t t = block * size; t < end; t += kColumns<W>) {
        segment_tile(p, s, b, h, block, t, min_of(kColumns<W>, end - t), q);
      }
    }
  }
}

// Adds the segments' gradients of one key block.
template <typename S>
void add_partial(const AttentionBackward<S>& p, int64_t b, int64_t g, int64_t block) {
  typedef Compute<S> T;
  const Attention<S>& f = p.forward;
  const int64_t size = f.layout.block_size, begin = block * size, keys = min_of(size, f.Tk - begin);
  for (int64_t i = 0; i < p.segments; ++i) {
    const SegmentGrads<T> s = segment_grads(p, b, g, i);
    if (s.place[block] < 0) continue;
    Chunk<S> c;
    point_at(c, s, s.place[block], begin, size, f.D, f.Dv);
    for (int64_t n = 0; n < keys; ++n) {
      add_scaled(s.key + (begin + n) * s.key_row, T(1), c.grad_key + n * f.D, f.D);
      add_scaled(s.value + (begin + n) * s.value_row, T(1), c.grad_value + n * f.Dv, f.Dv);
    }
  }
}

template <typename W, typename S>
int64_t backward_workspace(int64_t D, int64_t Dv) {
  return (grad_tile_elements<W, S>(D, Dv) + 31) / 16 * 16;
}

template <typename W, typename S>
void attention_backward(const AttentionBackward<S>& p) {
  const Attention<S>& f = p.forward;
  const int64_t heads = f.B * f.G, share = backward_workspace<W, S>(f.D, f.Dv), blocks = f.layout.key_blocks;
#pragma omp parallel if (f.B * f.H * f.Tq > 256)
  {
    Sum<W>* const workspace = f.workspace + omp_get_thread_num() * share;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * p.segments; ++i) {
      const int64_t head = i / p.segments;
      segment_backward<W>(p, head / f.G, head % f.G, i % p.segments, workspace);
    }
    if (p.partial_blocks > 0) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * blocks; ++i) {
        const int64_t head = i / blocks;
        add_partial(p, head / f.G, head % f.G, i % blocks);
      }
    }
  }
}

template <typename W, typename S = W>
constexpr Backward<S> kBackward = {backward_workspace<W, S>, attention_backward<W, S>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::block_sparse
