// Rows of several segments as one: how far the taps of each time step may reach.
#pragma once

#include "cpu/base/dropout.h"
#include "cpu/conv/conv.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// How many time steps of its segment lie before each of a row, and after it. Null: the row is one segment.
template <typename T>
struct Reach {
  typedef decltype(Mask<T>{}[0] + Mask<T>{}[0]) Count;
  const Count *before = nullptr, *after = nullptr;

  SEQACCEL_INLINE Reach from(ptrdiff_t t) const { return before ? Reach{before + t, after + t} : *this; }
  // Whether no tap of time steps [t, t + n) leaves their segment, the furthest `steps` away.
  SEQACCEL_INLINE bool holds_before(ptrdiff_t t, ptrdiff_t n, ptrdiff_t steps) const {
    return !before || (before[t] >= steps && after[t] >= n - 1);
  }
  SEQACCEL_INLINE bool holds_after(ptrdiff_t t, ptrdiff_t n, ptrdiff_t steps) const {
    return !before || after[t] >= n - 1 + steps;
  }
  // The counts of time steps [t, t + Lanes): those past the row are of no meaning.
  static SEQACCEL_INLINE Mask<T> lanes(const Count* counts, ptrdiff_t t) {
    return (Mask<T>)load(reinterpret_cast<const T*>(counts + t));
  }
};

// values[i] = 0 where counts[i] < steps, i < n: what a tap `steps` away finds in another segment.
template <typename Count, typename D>
SEQACCEL_INLINE void clear_beyond(const Count* counts, ptrdiff_t steps, ptrdiff_t n, D* values) {
  typedef Compute<D> T;
  static_assert(sizeof(Count) == sizeof(T));
  for (ptrdiff_t i = 0; i < n; i += Lanes<T>) {
    const Mask<T> inside = Reach<T>::lanes(counts, i) >= Count(steps);
    if constexpr (kNarrow<D>) {
      for (ptrdiff_t j = 0; j < Lanes<T> && i + j < n; ++j) values[i + j].bits = inside[j] ? values[i + j].bits : 0;
    } else {
      const int m = n - i < Lanes<T> ? int(n - i) : Lanes<T>;
      store_some(values + i, inside ? load_some(values + i, m) : Vec<T>{}, m);
    }
  }
}

// f(first, end) for the time steps of [begin, end) that have `steps` before them in their segment; neighbours together.
template <typename T, typename F>
SEQACCEL_INLINE void for_reaching(const Reach<T>& reach, ptrdiff_t steps, ptrdiff_t begin, ptrdiff_t end, const F& f) {
  ptrdiff_t from = begin, to = reach.before ? begin : end;
  for (ptrdiff_t t = to; t < end;) {
    const ptrdiff_t missing = steps - reach.before[t], first = missing > 0 ? t + missing : t;
    t += reach.after[t] + 1;
    const ptrdiff_t last = t < end ? t : end;
    if (first >= last) continue;
    if (first > to) {
      if (from < to) f(from, to);
      from = first;
    }
    to = last;
  }
  if (from < to) f(from, to);
}

// The reaches of all rows, if rows are calculated as one.
template <typename T>
struct Reaches {
  typedef typename Reach<T>::Count Count;
  const ConvShape& s;
  const bool exist;
  Count *before, *after;  // [batch, length], and a vector

  Reaches(const ConvShape& shape, bool has_history) : s(shape), exist(shape.rows_as_one(has_history)) {}
  Reach<T> of(ptrdiff_t b) const {
    const bool several = exist && s.first_segment[b + 1] - s.first_segment[b] > 1;
    return several ? Reach<T>{before + b * s.length, after + b * s.length} : Reach<T>();
  }
  ptrdiff_t size() const { return exist ? s.batch * s.length + Lanes<T> : 0; }

  // By the whole team.
  void fill() const {
    if (!exist) return;
#pragma omp for schedule(static)
    for (ptrdiff_t b = 0; b < s.batch; ++b) {
      const ptrdiff_t first = s.first_segment[b], last = s.first_segment[b + 1];
      if (last - first < 2) continue;
      for (ptrdiff_t i = first; i < last; ++i) {
        const Count n = Count(s.segments[i].end - s.segments[i].begin);
        const Count earlier = i == first ? Count(s.context() + s.beside()) : 0;  // steps of the history or zeros
        Count* const own_before = before + b * s.length + s.segments[i].begin;
        Count* const own_after = after + b * s.length + s.segments[i].begin;
        for (Count t = 0; t < n; ++t) own_before[t] = earlier + t, own_after[t] = n - 1 - t;
      }
    }
  }

  // f(segment, reach) for what time steps [begin, end) of row b are calculated in: the row as one, or the segments.
  template <typename F>
  SEQACCEL_INLINE void for_parts(ptrdiff_t b, ptrdiff_t begin, ptrdiff_t end, const F& f) const {
    if (exist) return f(s.row(b), of(b));
    s.for_segments(b, begin, end, [&](const Segment& segment) { f(segment, Reach<T>()); });
  }
};

}  // namespace seqaccel::SEQACCEL_ISA::conv
