// Column cells: one pass over memory each way, no barrier.
#include "cpu/base/shuffle.h"
#include "cpu/base/workspace.h"
#include "cpu/scan/blocks.h"
#include "cpu/scan/columns.h"

namespace seqaccel::SEQACCEL_ISA::scan {

// The value, calculated by itself: without this a compiler may make one operation of a product and the sum it goes
// into, in one loop and not in another, and gradients would depend on how columns lie in blocks.
template <typename V>
SEQACCEL_INLINE V rounded(V value) {
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(value);
#else
  return value;
#endif
}

constexpr int64_t kFlushSteps = 64;  // gradients of parameters are summed in two levels: error grows with 64 + T / 64

template <typename T>
struct ColumnFunctions {
  SEQACCEL_INLINE static Vec<T> sigmoid(Vec<T> x) { return sigmoid_vec<T>(x); }
  SEQACCEL_INLINE static Vec<T> tanh(Vec<T> x) { return tanh_vec<T>(x); }
};

// Columns that are adjacent, at one step: those of one row of the batch and one direction. Which pointers a cell reads,
// its traits say; the others are not looked at.
template <typename T>
struct Strip {
  const T *u, *x, *weight, *bias, *mask;
  const Compute<T>* prev;
  int64_t hidden, channels;  // from one input, and from one weight or bias, to the next
  Compute<T> scale;
  int64_t length;
};

template <class Cell, typename T>
using ColumnOf = Column<Cell, Vec<Compute<T>>, Compute<T>>;

// From `i` on: a whole vector, or n columns.
template <class Cell, bool kWhole, typename T>
SEQACCEL_INLINE ColumnOf<Cell, T> load_column(const Strip<T>& s, int64_t i, int n) {
  typedef Compute<T> C;
  const auto at = [=](const T* p) { return kWhole ? load_wide(p + i) : load_wide(p + i, n); };
  ColumnOf<Cell, T> u;
  if constexpr (!Cell::kInterleaved) {
    for (int k = 0; k < Cell::kInputs; ++k) u.in[k] = at(s.u + k * s.hidden);
  } else if constexpr (kWhole) {
    load_interleaved(s.u + i * Cell::kInputs, u.in);
  } else {
    T copy[Cell::kInputs * Lanes<C>] = {};
    for (int j = 0; j < n * Cell::kInputs; ++j) copy[j] = s.u[i * Cell::kInputs + j];
    load_interleaved(copy, u.in);
  }
  if (s.bias) {
    for (int k = 0; k < Cell::kBiases; ++k) u.in[Cell::kFirstBias + k] += at(s.bias + k * s.channels);
  }
  for (int k = 0; k < Cell::kWeights; ++k) u.weight[k] = s.weight ? at(s.weight + k * s.channels) : Vec<C>{};
  if constexpr (Cell::kReadsX) u.x = at(s.x);
  if constexpr (Cell::kMask != Mask::none) u.mask = s.mask ? at(s.mask) : broadcast(C(1));
  u.prev = kWhole ? load(s.prev + i) : load(s.prev + i, n);
  u.scale = s.scale;
  return u;
}

// Stores n lanes, or all.
template <bool kWhole, typename T>
SEQACCEL_INLINE void store_column(T* p, Vec<Compute<T>> v, int n) {
  if constexpr (kWhole) {
    store_narrow(p, v);
  } else {
    store_narrow(p, v, n);
  }
}

template <class Cell, bool kWhole, typename T>
SEQACCEL_INLINE void forward_vector(const Strip<T>& s, int64_t i, int n, T* h, T* c, Compute<T>* carry) {
  auto u = load_column<Cell, kWhole>(s, i, n);
  Cell::template forward<ColumnFunctions<Compute<T>>>(u);
  store_column<kWhole>(carry + i, u.state, n);
  store_column<kWhole>(h + i, Cell::kOutputIsState ? u.state : u.h, n);
  if (c) store_column<kWhole>(c + i, u.state, n);
}

template <class Cell, typename T>
SEQACCEL_INLINE void forward_strip(const Strip<T>& s, T* h, T* c, Compute<T>* carry) {
  constexpr int L = Lanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= s.length; i += L) forward_vector<Cell, true>(s, i, L, h, c, carry);
  if (i < s.length) forward_vector<Cell, false>(s, i, int(s.length - i), h, c, carry);
}

template <typename T>
struct StripGradients {
  const T *grad_h, *state;
  T *grad_u, *grad_x;
  Compute<T>* carry;  // dL/dstate, in and out
  Compute<T>* sums;   // gradients of the weights and the biases, kBlockColumns apart
};

template <class Cell, bool kWhole, typename T>
SEQACCEL_INLINE void backward_vector(const Strip<T>& s, const StripGradients<T>& g, int64_t i, int n) {
  typedef Compute<T> C;
  const auto narrow = [=](const T* p) { return kWhole ? load_wide(p + i) : load_wide(p + i, n); };
  const auto wide = [=](const C* p) { return kWhole ? load(p + i) : load(p + i, n); };
  auto u = load_column<Cell, kWhole>(s, i, n);
  u.state = narrow(g.state);
  u.grad_h = narrow(g.grad_h);
  u.grad_state = wide(g.carry);
  if constexpr (Cell::kOutputIsState) u.grad_state += u.grad_h;
  Cell::template backward<ColumnFunctions<C>>(u);
  store_column<kWhole>(g.carry + i, u.grad_state, n);
  if constexpr (!Cell::kInterleaved) {
    for (int k = 0; k < Cell::kInputs; ++k) store_column<kWhole>(g.grad_u + k * s.hidden + i, u.grad_in[k], n);
  } else if constexpr (kWhole) {
    store_interleaved(g.grad_u + i * Cell::kInputs, u.grad_in);
  } else {
    T copy[Cell::kInputs * Lanes<C>];
    store_interleaved(copy, u.grad_in);
    for (int j = 0; j < n * Cell::kInputs; ++j) g.grad_u[i * Cell::kInputs + j] = copy[j];
  }
  if constexpr (Cell::kReadsX) store_column<kWhole>(g.grad_x + i, u.grad_x, n);
  C* sum = g.sums;
  for (int k = 0; k < Cell::kWeights; ++k, sum += kBlockColumns) {
    store_column<kWhole>(sum + i, wide(sum) + rounded(u.grad_weight[k]), n);
  }
  for (int k = 0; k < Cell::kBiases; ++k, sum += kBlockColumns) {
    store_column<kWhole>(sum + i, wide(sum) + u.grad_in[Cell::kFirstBias + k], n);
  }
}

template <class Cell, typename T>
SEQACCEL_INLINE void backward_strip(const Strip<T>& s, const StripGradients<T>& g) {
  constexpr int L = Lanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= s.length; i += L) backward_vector<Cell, true>(s, g, i, L);
  if (i < s.length) backward_vector<Cell, false>(s, g, i, int(s.length - i));
}

template <typename T>
SEQACCEL_INLINE void widen_row(Compute<T>* to, const T* from, int64_t n) {
  constexpr int L = Lanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load_wide(from + i));
  if (i < n) store(to + i, load_wide(from + i, int(n - i)), int(n - i));
}

template <typename T>
SEQACCEL_INLINE void narrow_row(T* to, const Compute<T>* from, int64_t n) {
  constexpr int L = Lanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_narrow(to + i, load(from + i));
  if (i < n) store_narrow(to + i, load(from + i, int(n - i)), int(n - i));
}

template <typename C>
SEQACCEL_INLINE void add_row(C* to, const C* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// The columns of a block, in runs of one row of the batch and one direction.
class Run {
 public:
  Run(const ColumnShape& shape, int64_t first, int64_t last)
      : shape_(shape), last_(last), column(first), local(0), row(first / (shape.directions * shape.hidden)) {
    direction = first / shape.hidden % shape.directions;
    unit = first % shape.hidden;
    measure();
  }
  explicit operator bool() const { return column < last_; }
  void next() {
    column += length;
    local += length;
    unit = 0;
    if (++direction == shape_.directions) {
      direction = 0;
      ++row;
    }
    measure();
  }

 private:
  void measure() { length = shape_.hidden - unit < last_ - column ? shape_.hidden - unit : last_ - column; }

  const ColumnShape& shape_;
  int64_t last_;

 public:
  int64_t column, local;  // where it begins: of all columns, of the block's
  int64_t row, direction, unit, length;
};

// Where the steps of the rows of a block lie: step t of row b is row first + b + t * stride of the tensors.
struct Timeline {
  int64_t first, stride, steps;

  // Of a packed batch the block lies in one row.
  Timeline(const ColumnShape& shape, int64_t row) {
    if (shape.starts == nullptr) {
      first = 0;
      stride = shape.batch;
      steps = shape.steps;
      return;
    }
    first = shape.starts[row] - row;
    stride = 1;
    steps = shape.starts[row + 1] - shape.starts[row];
  }
  // Step `step` of the run's direction.
  int64_t time(const Run& run, int64_t step) const { return run.direction ? steps - 1 - step : step; }
  int64_t at(const Run& run, int64_t time) const { return first + run.row + time * stride; }
};

template <class Cell, typename T>
struct ColumnLoop {
  typedef Compute<T> C;
  static constexpr int kParameters = Cell::kWeights + Cell::kBiases;
  const ColumnOperands& p;
  const ColumnShape& shape = p.shape;
  const int64_t channels = shape.directions * shape.hidden, columns = shape.batch * channels;
  const T* const c_0 = static_cast<const T*>(p.c_0);
  const C scale = p.scale ? load_wide(static_cast<const T*>(p.scale), 1)[0] : C(1);

  // The value of a run's first column in a tensor [steps, batch, directions, hidden].
  int64_t value(const Run& run, int64_t at) const { return at * channels + run.direction * shape.hidden + run.unit; }
  // The same in u.
  int64_t input(const Run& run, int64_t at) const {
    constexpr int K = Cell::kInputs;
    return (at * channels + run.direction * shape.hidden) * K + run.unit * (Cell::kInterleaved ? K : 1);
  }

  Strip<T> strip(const Run& run, int64_t at, const C* prev) const {
    const auto from = [](const void* p, int64_t offset) { return p ? static_cast<const T*>(p) + offset : nullptr; };
    const int64_t channel = run.direction * shape.hidden + run.unit;
    return {from(p.u, input(run, at)),
            from(p.x, value(run, at)),
            from(p.weight, channel),
            from(p.bias, channel),
            from(p.mask, Cell::kMask == Mask::step ? value(run, at) : run.column),
            prev,
            shape.hidden,
            channels,
            scale,
            run.length};
  }

  bool padded(const Timeline& line, const Run& run, int64_t time) const {
    return p.mask_pad && p.mask_pad[line.at(run, time)];
  }
  // Whether an episode begins at this step of the run: the state before it is zero.
  bool begins(const Timeline& line, const Run& run, int64_t time) const {
    return p.reset && time + run.direction < line.steps && p.reset[line.at(run, time + run.direction)];
  }

  void forward(const ColumnForward& out, int64_t first, int64_t last) const {
    T *const h = static_cast<T*>(out.h), *const c = static_cast<T*>(out.c);
    const Timeline line(shape, first / channels);
    alignas(64) C carry[kBlockColumns];
    widen_row(carry, c_0 + first, last - first);
    for (int64_t step = 0; step < line.steps; ++step) {
      for (Run run(shape, first, last); run; run.next()) {
        const int64_t time = line.time(run, step), at = line.at(run, time), to = value(run, at);
        C* const state = carry + run.local;
        if (begins(line, run, time)) memset(state, 0, size_t(run.length) * sizeof(C));
        if (padded(line, run, time)) {
          memset(h + to, 0, size_t(run.length) * sizeof(T));
          if (c) narrow_row(c + to, state, run.length);
        } else {
          forward_strip<Cell>(strip(run, at, state), h + to, c ? c + to : nullptr, state);
        }
      }
    }
    narrow_row(static_cast<T*>(out.c_n) + first, carry, last - first);
  }

  // `totals` [kParameters, columns]: the parameters' gradients before the sum over the batch.
  void backward(const ColumnBackward& out, C* totals, int64_t first, int64_t last) const {
    const T *const c = static_cast<const T*>(out.c), *const grad_h = static_cast<const T*>(out.grad_h);
    T *const grad_u = static_cast<T*>(out.grad_u), *const grad_x = static_cast<T*>(out.grad_x);
    const int64_t n = last - first;
    const Timeline line(shape, first / channels);
    alignas(64) C carry[kBlockColumns], prev[kBlockColumns], initial[kBlockColumns];
    alignas(64) C sums[(kParameters ? kParameters : 1) * kBlockColumns];
    widen_row(initial, c_0 + first, n);
    memset(carry, 0, size_t(n) * sizeof(C));
    if (out.grad_c_n) widen_row(carry, static_cast<const T*>(out.grad_c_n) + first, n);
    for (int k = 0; k < kParameters; ++k) {
      memset(sums + k * kBlockColumns, 0, size_t(n) * sizeof(C));
      memset(totals + k * columns + first, 0, size_t(n) * sizeof(C));
    }
    for (int64_t step = line.steps - 1; step >= 0; --step) {
      for (Run run(shape, first, last); run; run.next()) {
        const int64_t time = line.time(run, step), at = line.at(run, time), to = value(run, at);
        const bool starts = begins(line, run, time);
        C* const grad = carry + run.local;
        if (padded(line, run, time)) {
          zero(grad_u + input(run, at), run.length);
          if constexpr (Cell::kReadsX) memset(grad_x + to, 0, size_t(run.length) * sizeof(T));
        } else {
          const C* before = initial + run.local;
          if (starts) {
            memset(prev, 0, size_t(run.length) * sizeof(C));
            before = prev;
          } else if (step) {
            before = state_before(c + value(run, line.at(run, time + (run.direction ? 1 : -1))), prev, run);
          }
          backward_strip<Cell>(strip(run, at, before), {grad_h + to, c + to, grad_u + input(run, at),
                                                        grad_x ? grad_x + to : nullptr, grad, sums + run.local});
        }
        if (starts) memset(grad, 0, size_t(run.length) * sizeof(C));
      }
      if (step % kFlushSteps == 0) {
        for (int k = 0; k < kParameters; ++k) {
          add_row(totals + k * columns + first, sums + k * kBlockColumns, n);
          memset(sums + k * kBlockColumns, 0, size_t(n) * sizeof(C));
        }
      }
    }
    narrow_row(static_cast<T*>(out.grad_c_0) + first, carry, n);
  }

 private:
  // States that memory holds as T, as they are calculated with.
  static const C* state_before(const T* c, C* prev, const Run& run) {
    if constexpr (kNarrow<T>) {
      widen_row(prev, c, run.length);
      return prev;
    } else {
      return c;
    }
  }
  void zero(T* grad_u, int64_t length) const {
    if constexpr (Cell::kInterleaved) {
      memset(grad_u, 0, size_t(length) * Cell::kInputs * sizeof(T));
    } else {
      for (int k = 0; k < Cell::kInputs; ++k) memset(grad_u + k * shape.hidden, 0, size_t(length) * sizeof(T));
    }
  }
};

// Calls block(first, last) for blocks of columns that cover all of them; those of a packed batch lie in one row each.
template <typename C, typename Block>
SEQACCEL_INLINE void for_blocks(const ColumnShape& shape, const Block& block) {
  const int64_t channels = shape.directions * shape.hidden, rows = shape.starts ? shape.batch : 1;
  const int64_t columns = shape.batch * channels / (rows ? rows : 1);
  const int64_t elements = (shape.starts ? channels : shape.batch * channels) * shape.steps;
  if (columns == 0) return;
  const int threads = elements < kSerialElements ? 1 : omp_get_max_threads();
  const int64_t width = block_columns<C>(columns, rows, threads), blocks = (columns + width - 1) / width;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < rows * blocks; ++task) {
    const int64_t first = task / blocks * columns + task % blocks * width, end = (task / blocks + 1) * columns;
    block(first, first + width < end ? first + width : end);
  }
}

template <class Cell, typename T>
bool column_forward(const ColumnForward& p) {
  const ColumnLoop<Cell, T> loop{p.in};
  for_blocks<Compute<T>>(p.in.shape, [&](int64_t first, int64_t last) { loop.forward(p, first, last); });
  return true;
}

template <class Cell, typename T>
bool column_backward(const ColumnBackward& p) {
  typedef Compute<T> C;
  const ColumnLoop<Cell, T> loop{p.in};
  Workspace workspace;
  C* totals = nullptr;
  workspace.reserve(totals, loop.kParameters * loop.columns);
  if (!workspace.allocate()) return false;
  for_blocks<C>(p.in.shape, [&](int64_t first, int64_t last) { loop.backward(p, totals, first, last); });
  alignas(64) C sum[kBlockColumns];
  for (int k = 0; k < loop.kParameters; ++k) {
    T* const grad = static_cast<T*>(k < Cell::kWeights ? p.grad_weight : p.grad_bias);
    if (!grad) continue;
    T* const row = grad + (k < Cell::kWeights ? k : k - Cell::kWeights) * loop.channels;
    for (int64_t first = 0; first < loop.channels; first += kBlockColumns) {
      const int64_t n = loop.channels - first < kBlockColumns ? loop.channels - first : kBlockColumns;
      memset(sum, 0, size_t(n) * sizeof(C));
      for (int64_t b = 0; b < p.in.shape.batch; ++b) {
        add_row(sum, totals + (k * p.in.shape.batch + b) * loop.channels + first, n);
      }
      narrow_row(row + first, sum, n);
    }
  }
  return true;
}

template <class Cell>
constexpr ColumnKernels kColumnKernels = {
    {column_forward<Cell, float>, column_forward<Cell, double>, column_forward<Cell, BFloat16>,
     column_forward<Cell, Float16>},
    {column_backward<Cell, float>, column_backward<Cell, double>, column_backward<Cell, BFloat16>,
     column_backward<Cell, Float16>},
};

template <class... Cells>
constexpr ColumnTable table_of(CellList<Cells...>) {
  return {{kColumnKernels<Cells>...}};
}

extern const ColumnTable column_table;
const ColumnTable column_table = table_of(ColumnCells{});

}  // namespace seqaccel::SEQACCEL_ISA::scan
