// Linear scan: c = coefficient * c + input, forward (coefficient a_t, input b_t) and backward (against time, with
// conj(a_{t+1}) and grad_h_t; the results are grad_b_t = c and grad_a_t = c conj(h_{t-1})).
//
// One loop serves both, and all types: narrow ones become float in registers, and complex numbers are rows of twice as
// many parts whose product mixes neighbours. Wide rows keep c in L1 and pass over each row in memory order. Rows that
// are narrower than a vector keep c in a register. A row of one number takes Lanes steps at once: their affine maps are
// composed in log2(Lanes) shuffles, four times the rate of the scalar chain.
//
// Sequences and blocks of columns are shared by the threads. Where they are too few, time is cut: with P threads into
// P + 1 chunks. At first one thread runs the first chunk while the others compose the maps of the next ones; then the
// state before each chunk is known, and all run a chunk. If a composed state is not finite, as when a product of
// coefficients overflows, the chunks run one after the other instead: the results are the loop's.
//
// An episode that begins in the middle of a sequence begins as the sequence does, without the row before it. In rows of
// at most a vector its first step is masked instead.
#pragma once

#include "cpu/base/narrow.h"
#include "cpu/base/shuffle.h"
#include "cpu/base/workspace.h"
#include "cpu/scan/blocks.h"
#include "cpu/scan/scan.h"

namespace seqaccel::SEQACCEL_ISA::scan {

constexpr int64_t kChunkElements = 1 << 14;   // a chunk of time has at least so many
constexpr int64_t kStreamedBytes = 16 << 20;  // outputs of this size leave the caches before they are read again

// What memory holds of a T, and of how many parts.
template <typename T>
struct Memory {
  using Part = T;
  static constexpr int kParts = 1;
};
template <typename R>
struct Memory<Complex<R>> {
  using Part = R;
  static constexpr int kParts = 2;
};

// ---- complex numbers: real and imaginary parts alternate ----

template <typename C, int ODD, int... I>
SEQACCEL_INLINE Vec<C> twice(Vec<C> v, LaneList<I...>) {
  return __builtin_shufflevector(v, v, (I - I % 2 + ODD)...);
}
template <typename C, int... I>
SEQACCEL_INLINE Vec<C> swapped(Vec<C> v, LaneList<I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}
template <typename C, int... I>
SEQACCEL_INLINE Vec<C> alternating(C real, C imag, LaneList<I...>) {
  return __builtin_shufflevector(broadcast(real), broadcast(imag), (I % 2 ? Lanes<C> + I : I)...);
}

template <typename C, int kParts>
SEQACCEL_INLINE Vec<C> multiply(Vec<C> x, Vec<C> y) {
  if constexpr (kParts == 1) return x * y;
  const LaneIndices<Lanes<C>> lanes;
  return twice<C, 0>(x, lanes) * y + twice<C, 1>(x, lanes) * alternating(C(-1), C(1), lanes) * swapped<C>(y, lanes);
}

template <typename C, int kParts>
SEQACCEL_INLINE Vec<C> conjugate(Vec<C> x) {
  if constexpr (kParts == 1) return x;
  return x * alternating(C(1), C(-1), LaneIndices<Lanes<C>>());
}

template <typename C, int kParts>
SEQACCEL_INLINE Vec<C> one() {
  return kParts == 1 ? broadcast(C(1)) : alternating(C(1), C(0), LaneIndices<Lanes<C>>());
}

// ---- maps composed over the lanes ----

template <typename C>
using Cut = typename VecTypes<C>::Int;

// Inclusive scan over the lanes of the maps y = a * x + b: a lane becomes the composition of those up to it (from it
// on, reversed).
template <typename C, int kParts, bool kReverse, int DISTANCE = kParts>
SEQACCEL_INLINE void compose_lanes(Vec<C>& a, Vec<C>& b) {
  if constexpr (DISTANCE < Lanes<C>) {
    const LaneIndices<Lanes<C>> lanes;
    b += multiply<C, kParts>(a, shift_lanes<C, DISTANCE, kReverse>(b, Vec<C>{}, lanes));
    a = multiply<C, kParts>(a, shift_lanes<C, DISTANCE, kReverse>(a, one<C, kParts>(), lanes));
    compose_lanes<C, kParts, kReverse, 2 * DISTANCE>(a, b);
  }
}

// The same of maps of which some forget what was before: a lane of `cut` is set if a map up to it does. Its `a` is of
// no meaning then.
template <typename C, int kParts, bool kReverse, int DISTANCE = kParts>
SEQACCEL_INLINE void compose_lanes(Vec<C>& a, Vec<C>& b, Cut<C>& cut) {
  if constexpr (DISTANCE < Lanes<C>) {
    const LaneIndices<Lanes<C>> lanes;
    const Vec<C> before = shift_lanes<C, DISTANCE, kReverse>(b, Vec<C>{}, lanes);
    b = cut ? b : b + multiply<C, kParts>(a, before);
    a = multiply<C, kParts>(a, shift_lanes<C, DISTANCE, kReverse>(a, one<C, kParts>(), lanes));
    cut |= (Cut<C>)shift_lanes<C, DISTANCE, kReverse>((Vec<C>)cut, Vec<C>{}, lanes);
    compose_lanes<C, kParts, kReverse, 2 * DISTANCE>(a, b, cut);
  }
}

// The numbers whose byte is not 0.
template <typename C, int kParts, int... I>
SEQACCEL_INLINE Cut<C> cut_lanes(const bool* p, LaneList<I...>) {
  typedef int8_t Bytes __attribute__((vector_size(Lanes<C>)));
  Bytes bytes = {};
  memcpy(&bytes, p, Lanes<C> / kParts);
  return __builtin_convertvector(__builtin_shufflevector(bytes, bytes, (I / kParts)...), Cut<C>) != 0;
}

// The last number of the scan in all lanes.
template <typename C, int kParts, bool kReverse, int... I>
SEQACCEL_INLINE Vec<C> last_number(Vec<C> v, LaneList<I...>) {
  return __builtin_shufflevector(v, v, ((kReverse ? 0 : Lanes<C> - kParts) + I % kParts)...);
}

// ---- steps ----

// One step, or that of the first row of a sequence.
template <typename S>
struct Row {
  const S *coefficient, *input;
  const S* other;  // backward: h_{t-1}; null: zero
  S *output, *product;

  SEQACCEL_INLINE Row moved(int64_t by) const {
    return {coefficient + by, input + by, other + by, output + by, product + by};
  }
};

// Which steps s - 1 and s of a scan do not see each other, as an episode begins between them.
struct Cuts {
  const bool* reset;  // of s = 0; null: there are none
  int64_t stride;

  SEQACCEL_INLINE bool at(int64_t s) const { return reset && reset[s * stride]; }
  // Those of steps [s, s + kSteps), in the order of memory.
  template <int kSteps>
  SEQACCEL_INLINE const bool* bytes(int64_t s) const {
    return reset + (stride > 0 ? s : -s - (kSteps - 1));
  }
  template <int kSteps>
  SEQACCEL_INLINE bool any(int64_t s) const {
    uint64_t words[(kSteps + 7) / 8] = {}, all = 0;
    memcpy(words, bytes<kSteps>(s), kSteps);
    for (uint64_t word : words) all |= word;
    return all != 0;
  }
  // The first of [s, end), or end.
  int64_t next(int64_t s, int64_t end) const {
    for (; s + 8 <= end; s += 8) {
      int64_t eight;
      memcpy(&eight, reset + (stride > 0 ? s : -s - 7), sizeof(eight));
      if (eight) break;
    }
    while (s < end && !at(s)) ++s;
    return s;
  }
};

// The steps of one sequence and one block of columns in the order of the scan; pointers are to step 0.
template <typename S>
struct Steps {
  int64_t length, stride;
  Row<S> first;
  const S* last_other;  // h_0 or null
  Cuts cuts;

  SEQACCEL_INLINE Row<S> row(int64_t s) const {
    Row<S> row = first.moved(s * stride);
    if (s == length - 1) row.other = last_other;
    return row;
  }
};

// What is carried from step to step: the state b, and where maps are composed the product of the coefficients. A row
// reads `now` and writes `next`, so that its last vector may overlap the one before.
template <typename C>
struct Carried {
  static constexpr int64_t kRoom = kBlockColumns + 128;
  alignas(64) C memory[2][2][Lanes<C> + kRoom];  // Lanes before each row, for `narrow`
  C *b = memory[0][0] + Lanes<C>, *b_next = memory[0][1] + Lanes<C>;
  C *a = memory[1][0] + Lanes<C>, *a_next = memory[1][1] + Lanes<C>;
  bool exists = true;  // false: nothing before the first step

  SEQACCEL_INLINE void flip() {
    C* const was_b = b;
    C* const was_a = a;
    b = b_next, b_next = was_b;
    a = a_next, a_next = was_a;
  }
};

// body(first column, count) for each vector of a row: the last one overlaps the one before, or a row is one part of
// one.
template <typename C, typename Body>
SEQACCEL_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + Lanes<C> <= n; i += Lanes<C>) body(i, Lanes<C>);
  if (i == n) return;
  if (n > Lanes<C>) {
    body(n - Lanes<C>, Lanes<C>);
  } else {
    body(0, int(n));
  }
}

template <typename S>
SEQACCEL_INLINE Vec<Compute<S>> get(const S* p, int count) {
  return count == Lanes<Compute<S>> ? load_wide(p) : load_wide(p, count);
}

template <typename S>
SEQACCEL_INLINE void put(S* p, Vec<Compute<S>> v, int count, bool streamed = false) {
  if (count < Lanes<Compute<S>>) return store_narrow(p, v, count);
  if (streamed) return stream_narrow(p, v);
  store_narrow(p, v);
}

// kCompose: nothing is written, and the product of the coefficients is carried too.
template <typename S, int kParts, bool kBackward, bool kCompose>
struct Loop {
  using C = Compute<S>;
  static constexpr int L = Lanes<C>, kSteps = L / kParts;
  using Lane = LaneIndices<L>;

  static SEQACCEL_INLINE Vec<C> times(Vec<C> x, Vec<C> y) { return multiply<C, kParts>(x, y); }
  static SEQACCEL_INLINE Vec<C> coefficient(const S* p, int count = L) {
    return kBackward ? conjugate<C, kParts>(get(p, count)) : get(p, count);
  }
  // Of lanes in `alone` the other is zero.
  static SEQACCEL_INLINE void write(const Row<S>& r, int64_t i, Vec<C> c, int count = L, bool streamed = false,
                                    Cut<C> alone = Cut<C>()) {
    if constexpr (kCompose) return;
    put(r.output + i, c, count, streamed);
    if constexpr (kBackward) {
      const Vec<C> product = r.other ? times(conjugate<C, kParts>(get(r.other + i, count)), c) : Vec<C>{};
      put(r.product + i, alone ? Vec<C>{} : product, count, streamed);
    }
  }

  static SEQACCEL_INLINE Cut<C> all_lanes(bool cut) {
    typedef decltype(Cut<C>{}[0] + Cut<C>{}[0]) Word;
    return Cut<C>{} - Word(cut);
  }

  enum class Before { nothing, added, multiplied };

  template <Before kBefore>
  static SEQACCEL_INLINE void row(const Row<S>& r, Carried<C>& carried, int64_t n, bool streamed) {
    for_vectors<C>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
      Vec<C> c = get(r.input + i, count);
      if constexpr (kBefore == Before::added) c += load(carried.b + i);
      if constexpr (kBefore == Before::multiplied) {
        const Vec<C> a = coefficient(r.coefficient + i, count);
        c = times(a, load(carried.b + i)) + c;
        if constexpr (kCompose) store(carried.a_next + i, times(a, load(carried.a + i)));
      } else if constexpr (kCompose) {
        store(carried.a_next + i, Vec<C>{});  // (`added` is never composed)
      }
      store(carried.b_next + i, c);
      write(r, i, c, count, streamed);
    });
    carried.flip();
  }

  // Rows of at most a vector. It goes on into the rows after its own, which are written again in their turn:
  // against memory it begins before its row. Returns the first step that is left. With cuts s > 0.
  template <bool kCuts>
  static int64_t narrow(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried, int64_t n) {
    const int64_t ahead = p.stride < 0 ? L - n : 0, left = end - s - (L - 1) / n;
    Vec<C> b = load(carried.b - ahead), a = load(carried.a - ahead);
    Row<S> r = p.row(s).moved(-ahead);
#pragma GCC unroll 4
    for (int64_t i = 0; i < left; ++i) {
      const Vec<C> step = coefficient(r.coefficient);
      if constexpr (kCuts) {
        const Vec<C> input = load_wide(r.input);
        const Cut<C> cut = all_lanes(p.cuts.at(s + i));
        b = cut ? input : times(step, b) + input;
        if constexpr (kCompose) a = cut ? Vec<C>{} : times(step, a);
        write(r, 0, b, L, false, all_lanes(kBackward && p.cuts.at(s + i + 1)));
      } else {
        b = times(step, b) + load_wide(r.input);
        if constexpr (kCompose) a = times(step, a);
        write(r, 0, b);
      }
      r = r.moved(p.stride);
    }
    store(carried.b - ahead, b);
    store(carried.a - ahead, a);
    return left > 0 ? s + left : s;
  }

  // Rows of one number. With cuts s > 0.
  template <bool kReverse, bool kCuts>
  static int64_t numbers(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried) {
    constexpr int64_t kBehind = kReverse ? L - kParts : 0;
    Vec<C> b = last_number<C, kParts, true>(load(carried.b), Lane()),
           a = last_number<C, kParts, true>(load(carried.a), Lane());
    for (; end - s >= kSteps; s += kSteps) {
      const Row<S> r = p.row(s);
      Vec<C> map_a = coefficient(r.coefficient - kBehind), map_b = load_wide(r.input - kBehind);
      Cut<C> alone = {};
      if (kCuts && (p.cuts.template any<kSteps>(s) || (kBackward && p.cuts.at(s + kSteps)))) {
        Cut<C> cut = cut_lanes<C, kParts>(p.cuts.template bytes<kSteps>(s), Lane());
        if constexpr (kBackward) alone = cut_lanes<C, kParts>(p.cuts.template bytes<kSteps>(s + 1), Lane());
        compose_lanes<C, kParts, kReverse>(map_a, map_b, cut);
        map_b = cut ? map_b : times(map_a, b) + map_b;
        if constexpr (kCompose) {
          const Vec<C> product = times(last_number<C, kParts, kReverse>(map_a, Lane()), a);
          a = (Cut<C>)last_number<C, kParts, kReverse>((Vec<C>)cut, Lane()) ? Vec<C>{} : product;
        }
      } else {
        compose_lanes<C, kParts, kReverse>(map_a, map_b);
        map_b = times(map_a, b) + map_b;
        if constexpr (kCompose) a = times(last_number<C, kParts, kReverse>(map_a, Lane()), a);
      }
      b = last_number<C, kParts, kReverse>(map_b, Lane());
      write(r, -kBehind, map_b, L, false, alone);
    }
    store(carried.b, b);
    store(carried.a, a);
    return s;
  }

  // Rows of at most a vector; returns the first step that is left.
  template <bool kCuts>
  static SEQACCEL_INLINE int64_t vectors(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried, int64_t n) {
    if (kBackward && end == p.length) --end;  // the last row has another `other`
    if (n > kParts) return narrow<kCuts>(p, s, end, carried, n);
    return p.stride < 0 ? numbers<true, kCuts>(p, s, end, carried) : numbers<false, kCuts>(p, s, end, carried);
  }

  // Steps [s, end).
  static void run(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried, int64_t n, bool streamed) {
    if (!p.cuts.reset) return episode(p, s, end, carried, n, streamed);
    if (n <= L && s < end) {
      if (s == 0) episodes(p, s++, 1, carried, n, streamed);
      s = vectors<true>(p, s, end, carried, n);
    }
    episodes(p, s, end, carried, n, streamed);
  }

  // The same, one episode after another.
  static void episodes(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried, int64_t n, bool streamed) {
    while (s < end) {
      const bool begins = s > 0 && p.cuts.at(s);
      if (begins) carried.exists = false;
      const int64_t stop = p.cuts.next(s + 1, end), base = begins || s == 0 ? s : s - 1;
      const bool ends = stop < p.length && p.cuts.at(stop);
      const Steps<S> part = {
          (ends ? stop : p.length) - base, p.stride, p.first.moved(base * p.stride), ends ? nullptr : p.last_other, {}};
      episode(part, s - base, stop - base, carried, n, streamed);
      s = stop;
    }
  }

  static void episode(const Steps<S>& p, int64_t s, int64_t end, Carried<C>& carried, int64_t n, bool streamed) {
    if (s == end) return;
    if (s == 0 && !carried.exists) {
      row<Before::nothing>(p.row(s++), carried, n, streamed);
    } else if (s == 0 && kBackward) {
      row<Before::added>(p.row(s++), carried, n, streamed);
    }
    carried.exists = true;
    if (n <= L) s = vectors<false>(p, s, end, carried, n);
    for (; s < end; ++s) row<Before::multiplied>(p.row(s), carried, n, streamed);
  }
};

// ---- a call ----

// A call, forward or backward, with widths in parts.
template <typename S>
struct LinearScan {
  Sequences sequences;
  int64_t width;
  bool up;                        // the scan runs from low rows to high ones
  const bool* reset;              // [rows] or null
  const S *a, *input, *other;     // [rows, width]; other (backward): h
  const S *initial, *last_other;  // [count, width] or null; initial: h_0 or grad_h_last, last_other (backward): h_0
  S *output, *product, *final;    // final [count, width]: h_last or null, or grad_h_0
  bool streamed;
};

template <typename T, bool kBackward>
struct Call {
  using S = typename Memory<T>::Part;
  using C = Compute<S>;
  static constexpr int kParts = Memory<T>::kParts, L = Lanes<C>;
  using Run = Loop<S, kParts, kBackward, false>;
  using Compose = Loop<S, kParts, kBackward, true>;

  const LinearScan<S>& p;
  const int threads;
  int64_t blocks;  // of columns

  // At least a vector wide each, and whole lines of memory but for the last.
  static constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  int64_t column(int64_t block) const { return block == blocks ? p.width : p.width / kLine * block / blocks * kLine; }

  Steps<S> steps(int64_t n, int64_t column) const {
    const int64_t length = p.sequences.length(n), stride = p.up ? p.width : -p.width;
    const int64_t at = (p.sequences.begin(n) + (p.up ? 0 : length - 1)) * p.width + column;
    const int64_t edge = n * p.width + column, row = p.sequences.begin(n);
    const Cuts cuts = {p.reset ? p.reset + (p.up ? row : row + length) : nullptr, p.up ? 1 : -1};
    if constexpr (kBackward) {
      const Row<S> first = {p.a + at - stride, p.input + at, p.other + at + stride, p.output + at, p.product + at};
      return {length, stride, first, p.last_other && !drops(n) ? p.last_other + edge : nullptr, cuts};
    } else {
      return {length, stride, {p.a + at, p.input + at, p.input, p.output + at, p.output}, nullptr, cuts};
    }
  }

  // Whether an episode begins at the first step of sequence n, which its state h_0 does not reach then.
  bool drops(int64_t n) const {
    return p.reset && p.up != kBackward && p.sequences.length(n) > 0 && p.reset[p.sequences.begin(n)];
  }

  void begin(int64_t n, int64_t column, int64_t count, Carried<C>& carried) const {
    carried.exists = p.initial != nullptr && (kBackward || !drops(n));
    if (!carried.exists) return;
    const S* const initial = p.initial + n * p.width + column;
    for_vectors<C>(count, [&](int64_t i, int some) { store(carried.b + i, get(initial + i, some)); });
  }

  void finish(const Steps<S>& s, int64_t n, int64_t column, int64_t count, const Carried<C>& carried) const {
    if (p.final == nullptr) return;
    S* const final = p.final + n * p.width + column;
    const S* const a = kBackward && s.length > 0 ? s.first.coefficient + s.length * s.stride : nullptr;
    for_vectors<C>(count, [&](int64_t i, int some) {
      Vec<C> c = carried.exists ? load(carried.b + i) : Vec<C>{};
      if (a) c = drops(n) ? Vec<C>{} : Run::times(Run::coefficient(a + i, some), c);
      put(final + i, c, some);
    });
  }

  void whole(int64_t n, int64_t block) const {
    const int64_t first = column(block), count = column(block + 1) - first;
    Carried<C> carried;
    begin(n, first, count, carried);
    const Steps<S> s = steps(n, first);
    Run::run(s, 0, s.length, carried, count, p.streamed);
    finish(s, n, first, count, carried);
    if (p.streamed) fence_stores();
  }

  // Sequence n, by `parts` threads for each block of columns. False: not enough memory for the chunks' maps.
  bool in_chunks(int64_t n, int64_t parts) const {
    Workspace workspace;
    C *a, *b, *states;  // [parts, width]: the chunks' maps, and the state after each
    workspace.reserve(a, parts * p.width);
    workspace.reserve(b, parts * p.width);
    workspace.reserve(states, parts * p.width);
    if (!workspace.allocate()) return false;
    const int64_t length = p.sequences.length(n);
    // Maps are composed in three quarters of a scan's time, backward in half: so long is the first chunk.
    constexpr int64_t kFirst = kBackward ? 2 : 3;
    const auto bound = [&](int64_t chunk) {
      return chunk ? length * (4 * chunk - 4 + kFirst) / (4 * parts + kFirst) : 0;
    };
    const auto copy = [](C* to, const C* from, int64_t count) { memcpy(to, from, size_t(count) * sizeof(C)); };
    const int64_t tasks = blocks * parts;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t chunk = task % parts, first = column(task / parts), count = column(task / parts + 1) - first;
      const Steps<S> s = steps(n, first);
      Carried<C> carried;
      if (chunk == 0) {
        begin(n, first, count, carried);
        Run::run(s, 0, bound(1), carried, count, p.streamed);
        if (p.streamed) fence_stores();
      } else {
        for_vectors<C>(count, [&](int64_t i, int) {
          store(carried.b + i, Vec<C>{});
          store(carried.a + i, one<C, kParts>());
        });
        Compose::run(s, bound(chunk), bound(chunk + 1), carried, count, false);
        copy(a + chunk * p.width + first, carried.a, count);
      }
      copy((chunk ? b : states) + chunk * p.width + first, carried.b, count);
    }
    bool finite = true;
    for (int64_t chunk = 1; chunk < parts; ++chunk) {
      const int64_t at = chunk * p.width;
      for_vectors<C>(p.width, [&](int64_t i, int some) {
        const Vec<C> before = load(states + at - p.width + i, some);
        const Vec<C> state = Run::times(load(a + at + i, some), before) + load(b + at + i, some);
        store(states + at + i, state, some);
        finite = finite && horizontal_sum<C>(state * C(0)) == C(0);
      });
    }
    const int64_t together = finite ? 1 : parts;  // chunks of a task
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; task += together) {
      const int64_t chunk = task % parts, first = column(task / parts), count = column(task / parts + 1) - first;
      const Steps<S> s = steps(n, first);
      Carried<C> carried;
      copy(carried.b, states + chunk * p.width + first, count);
      Run::run(s, bound(chunk + 1), bound(chunk + 1 + together), carried, count, p.streamed);
      if (chunk + together == parts) finish(s, n, first, count, carried);
      if (p.streamed) fence_stores();
    }
    return true;
  }

  void run() {
    const int64_t count = p.sequences.count;
    if (p.width == 0 || (p.sequences.rows == 0 && p.final == nullptr)) return;
    const int64_t wanted = count >= threads ? 1 : (threads + count - 1) / count;
    const int64_t most = p.width / kLine, least = (p.width + kBlockColumns - 1) / kBlockColumns;
    blocks = wanted < most ? wanted : most;
    blocks = blocks < least ? least : blocks;
    // In chunks a sequence takes 2 / (parts + 1) of its time: worth it for those that would take longer than that.
    const int64_t parts = threads / blocks;
    int64_t longest = p.sequences.rows;
    if (parts > 1) longest = 2 * p.sequences.rows / (parts + 1);
    const auto is_long = [&](int64_t n) {
      const int64_t length = p.sequences.length(n);
      return parts > 1 && length > longest && length * p.width >= (parts + 1) * kChunkElements;
    };
    for (int64_t n = 0; n < count && parts > 1; ++n) {
      if (!is_long(n)) continue;
      if (!in_chunks(n, parts)) {
        for (int64_t block = 0; block < blocks; ++block) whole(n, block);
      }
    }
    const int64_t tasks = count * blocks;
#pragma omp parallel for schedule(dynamic, 1 + tasks / (16 * threads)) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
      if (!is_long(task / blocks)) whole(task / blocks, task % blocks);
    }
  }
};

template <typename S>
inline bool on_lines(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

template <typename T, bool kBackward>
void linear_scan(LinearScan<typename Memory<T>::Part> p) {
  using S = typename Memory<T>::Part;
  const int64_t elements = p.sequences.rows * p.width, bytes = elements * int64_t(sizeof(S));
  p.streamed = kNonTemporalStores && bytes >= kStreamedBytes && p.width * int64_t(sizeof(S)) % 64 == 0 &&
               on_lines(p.output) && on_lines(p.product);
  Call<T, kBackward>{p, elements < kSerialElements ? 1 : omp_get_max_threads(), 1}.run();
}

template <typename T>
void linear_scan_forward(const LinearScanForward<T>& p) {
  using S = typename Memory<T>::Part;
  linear_scan<T, false>({p.sequences, p.width * Memory<T>::kParts, !p.reverse, p.reset, reinterpret_cast<const S*>(p.a),
                         reinterpret_cast<const S*>(p.b), nullptr, reinterpret_cast<const S*>(p.h_0), nullptr,
                         reinterpret_cast<S*>(p.h), nullptr, reinterpret_cast<S*>(p.h_last), false});
}

template <typename T>
void linear_scan_backward(const LinearScanBackward<T>& p) {
  using S = typename Memory<T>::Part;
  linear_scan<T, true>({p.sequences, p.width * Memory<T>::kParts, p.reverse, p.reset, reinterpret_cast<const S*>(p.a),
                        reinterpret_cast<const S*>(p.grad_h), reinterpret_cast<const S*>(p.h),
                        reinterpret_cast<const S*>(p.grad_h_last), reinterpret_cast<const S*>(p.h_0),
                        reinterpret_cast<S*>(p.grad_b), reinterpret_cast<S*>(p.grad_a),
                        reinterpret_cast<S*>(p.grad_h_0), false});
}

template <typename T>
constexpr LinearScanKernels<T> linear_scan_kernels = {linear_scan_forward<T>, linear_scan_backward<T>};

}  // namespace seqaccel::SEQACCEL_ISA::scan
