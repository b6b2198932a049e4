// One sequence of a call, and where the keys and values of a level of its pyramid lie.
#pragma once

#include "cpu/attention/attend.h"
#include "cpu/attention/hierarchical/hierarchical.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

template <typename T>
SEQACCEL_INLINE Heads<T> within(Heads<T> heads, const Sequence& s) {
  heads.data += s.row * heads.batch + s.first * heads.time;
  return heads;
}

SEQACCEL_INLINE Sequence sequence_at(const Sequences& s, int64_t n, int64_t T) {
  return s.list ? s.list[n] : Sequence{n, 0, T, 0};
}

// Makes `part` the call as it is for one sequence alone: row 0 of the arrays, from position 0 on.
template <typename S>
void move_to(Attention<S>& part, const Attention<S>& p, const Sequence& s) {
  if (s.T != part.pyramid.T) {
    const Pyramid& whole = p.pyramid;
    part.pyramid = make_pyramid(s.T, whole.block_size, whole.fanout, whole.levels, whole.local_blocks, 0, whole.causal);
  }
  part.query = within(p.query, s);
  part.key = within(p.key, s);
  part.value = within(p.value, s);
  part.out = within(p.out, s);
  part.pooled_key = p.pooled_key + (s.row * p.G * p.nodes + s.node) * p.D;
  part.pooled_value = p.pooled_value + (s.row * p.G * p.nodes + s.node) * p.Dv;
  part.dropout_row = s.row * p.H * p.Tq + s.first;
  part.lse = p.lse + part.dropout_row;
}

template <typename S>
void move_to(Attention<S>& part, const Attention<S>& p, int64_t n) {
  move_to(part, p, sequence_at(p.sequences, n, p.pyramid.T));
}

template <typename S>
void move_to(AttentionBackward<S>& part, const AttentionBackward<S>& p, int64_t n) {
  const Attention<S>& f = p.forward;
  const Sequence s = sequence_at(f.sequences, n, f.pyramid.T);
  move_to(part.forward, f, s);
  part.grad_out = within(p.grad_out, s);
  part.grad_lse = p.grad_lse ? p.grad_lse + s.row * f.H * f.Tq + s.first : nullptr;
  part.grad_query = within(p.grad_query, s);
  part.grad_key = within(p.grad_key, s);
  part.grad_value = within(p.grad_value, s);
  part.segments = f.sequences.tasks(kSegments, n);
  part.partial = p.partial + f.sequences.tasks_before(kPartialRows, n) * f.G * (f.D + f.Dv);
  part.partial_pool = p.partial_pool + f.sequences.tasks_before(kPoolSums, n) * f.G * f.D;
}

// The call for the sequence that a thread is at.
template <typename Call>
struct Current {
  const Call& whole;
  int64_t sequence;
  Call part;

  explicit Current(const Call& p) : whole(p), sequence(-1), part(p) {}
  const Call& at(int64_t n) {
    if (n != sequence) move_to(part, whole, n);
    sequence = n;
    return part;
  }
};

// The children of a level are tokens, or nodes of the level below.
template <typename S>
SEQACCEL_INLINE Rows<S> level_rows(const Attention<S>& p, int64_t g, int level) {
  if (level == 0) return {p.key.at(0, g), p.value.at(0, g), p.key.time, p.value.time};
  const int64_t row = g * p.nodes + p.pyramid.offset[level];
  return {p.pooled_key + row * p.D, p.pooled_value + row * p.Dv, p.D, p.Dv};
}

// The element of dropout that a query draws for the first key of a level: tokens, then the nodes of all levels.
SEQACCEL_INLINE int64_t first_element(const Pyramid& p, int level) { return level == 0 ? 0 : p.T + p.offset[level]; }

template <typename S>
SEQACCEL_INLINE const S* pool_row(const Attention<S>& p, int64_t g, int level) {
  return p.pool_query + ((level < p.P ? level : p.P) - 1) * p.G * p.D + g * p.D;
}

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
