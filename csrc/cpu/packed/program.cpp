#include "cpu/packed/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <stdexcept>

#include "common/column_list.h"
#include "cpu/base/pool.h"
#include "cpu/base/threads.h"

namespace seqaccel::packed {
namespace {

constexpr int64_t kChunkRows = 128;  // rows per chunk: with 2,048 gates their projections take 1 MB
// With fewer multiply-adds per step, or per step and layer, a second thread costs more than it brings: threads wait for
// each other behind every layer. (Two Zen 4 cores, 16 layers of 12,288: 14.7 us with one thread or two, and beside two
// busy processes 30 us and 84; 16 layers of 27,648: 34 us and 24.)
constexpr double kSmall = 65536, kSmallLayer = 16384;

// Layers that take a row at a time, with a gain and a bias for each element.
const std::map<std::string, LayerKind> kRowLayers = {
    {"layer_norm", LayerKind::layer_norm}, {"rms_norm", LayerKind::rms_norm}, {"batch_norm", LayerKind::batch_norm},
    {"softmax", LayerKind::softmax},       {"sum", LayerKind::sum},
};

const std::map<std::string, Unary> kUnary = {
    {"exp", Unary::exp},           {"log", Unary::log},           {"sqrt", Unary::sqrt},
    {"abs", Unary::abs},           {"softplus", Unary::softplus}, {"reciprocal", Unary::reciprocal},
    {"at_least", Unary::at_least}, {"at_most", Unary::at_most},
};

const std::map<std::string, Binary> kBinary = {
    {"add", Binary::add},       {"subtract", Binary::subtract}, {"multiply", Binary::multiply},
    {"divide", Binary::divide}, {"maximum", Binary::maximum},   {"minimum", Binary::minimum},
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Adds up the sizes of pieces, in values of 4 bytes, and says where each one begins.
class Layout {
 public:
  size_t add(std::initializer_list<int64_t> sizes) {
    const size_t at = bytes_;
    size_t bytes = 4;
    for (const int64_t size : sizes) fits_ = fits_ && !__builtin_mul_overflow(bytes, size_t(size), &bytes);
    fits_ = fits_ && !__builtin_add_overflow(bytes_, (bytes + 63) / 64 * 64, &bytes_) && bytes_ < SIZE_MAX / 2;
    return at;
  }
  // Throws std::bad_alloc where the product of sizes has no meaning.
  size_t bytes() const {
    if (!fits_) throw std::bad_alloc();
    return bytes_;
  }

 private:
  size_t bytes_ = 0;
  bool fits_ = true;
};

// Finds layers whose outputs can share memory: no later layer reads the earlier of the two.
struct Shares {
  std::vector<int64_t> widths;
  std::vector<size_t> of_layer;

  explicit Shares(const std::vector<SessionLayer>& layers) {
    std::vector<size_t> last_use(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      for (const int32_t from : {layers[i].source, layers[i].skip}) {
        if (from >= 0) last_use[size_t(from)] = i;
      }
      for (int64_t j = 0; j < layers[i].move_count; ++j) {
        if (layers[i].moves[j].source >= 0) last_use[size_t(layers[i].moves[j].source)] = i;
      }
    }
    std::vector<size_t> busy;  // the place is in use until this layer has run
    for (size_t i = 0; i + 1 < layers.size(); ++i) {
      size_t place = 0;
      while (place < widths.size() && busy[place] >= i) ++place;
      if (place == widths.size()) {
        widths.push_back(0);
        busy.push_back(0);
      }
      widths[place] = std::max(widths[place], layers[i].outputs * layers[i].frames);
      busy[place] = std::max(last_use[i], i);
      of_layer.push_back(place);
    }
  }
};

}  // namespace

void AlignedMemory::GiveBack::operator()(char* p) const { give_block({p, size}); }

AlignedMemory::AlignedMemory(size_t bytes, bool zero) {
  const Block block = take_block(bytes);
  if (!block.data) throw std::bad_alloc();
  memory_ = std::unique_ptr<char, GiveBack>(static_cast<char*>(block.data), GiveBack{block.size});
  if (zero) std::memset(block.data, 0, block.size);
}

SessionProgram::SessionProgram(int64_t batch, Precision precision, const SessionKernels& kernels)
    : kernels_(kernels), batch_(batch), precision_(precision) {}

SessionMatrix& SessionProgram::add_matrix(SessionLayer& layer, int index, int64_t gates, int64_t units,
                                          int64_t columns_0, const void* source_0, int64_t columns_1,
                                          const void* source_1, bool bfloat16) {
  SessionMatrix& m = layer.matrices[index];
  m.precision = precision_;
  m.interleaved = gates > 1;
  m.vectors = gates > 1 ? int32_t(gates) : 4;
  m.units = units;
  m.columns[0] = columns_0;
  m.columns[1] = columns_1;
  m.words[0] = kernels_.words(precision_, columns_0);
  m.words[1] = kernels_.words(precision_, columns_1);
  const int64_t block = m.interleaved ? kernels_.lanes : 4 * kernels_.lanes;
  m.blocks = (units + block - 1) / block;
  m.panel_words = (m.words[0] + m.words[1]) * m.vectors * kernels_.lanes;
  sources_.push_back({{source_0, source_1}, bfloat16, layers_.size(), index});
  return m;
}

const float* SessionProgram::keep(const float* values, int64_t count) {
  if (values == nullptr) return nullptr;
  weights_->kept.emplace_back(values, values + count);
  return weights_->kept.back().data();
}

int64_t SessionProgram::width_of(int32_t layer) const {
  const SessionLayer& l = layers_[size_t(std::max(layer, 0))];
  return layer >= 0 ? l.outputs * l.frames : l.kind == LayerKind::embedding ? 0 : l.inputs * l.frames;
}

int32_t SessionProgram::layer_before(int64_t back) const {
  const int64_t layer = int64_t(layers_.size()) - back;
  if (back < 1 || layer < -1) throw std::invalid_argument("a layer reaches back past the input of the session");
  return int32_t(layer);
}

int32_t SessionProgram::reached(int64_t back, int64_t features) const {
  const int32_t layer = layer_before(back);
  if (!layers_.empty() && features != width_of(layer)) {
    throw std::invalid_argument("a layer reads or adds an output that has another number of features");
  }
  return layer;
}

void SessionProgram::add(const SeqaccelSessionLayer& from, bool bfloat16) {
  const std::string name = from.kind;
  SessionLayer layer{};
  layer.inputs = from.inputs;
  layer.hidden = from.hidden;
  layer.outputs = from.outputs;
  layer.zoneout_h = float(from.zoneout_h);
  layer.zoneout_c = float(from.zoneout_c);
  layer.parameter = float(from.parameter);
  layer.taps = std::max<int64_t>(from.taps, 1);
  layer.dilation = std::max<int64_t>(from.dilation, 1);
  layer.heads = std::max<int64_t>(from.heads, 1);
  layer.relu = from.relu != 0;
  layer.frames = std::max<int64_t>(from.frames, 1);
  layer.source = reached(from.source > 0 ? from.source : 1, layer.inputs * layer.frames);
  layer.skip = from.skip > 0 ? reached(from.skip, layer.outputs * layer.frames) : kNoSkip;
  if (const int found = activation_of(from.kind); found > 0 && !is_gated(Activation(found))) {
    layer.kind = LayerKind::activation;
    layer.activation = Activation(found);
    layers_.push_back(layer);
    return;
  }
  layer.activation = Activation(std::max(activation_of(from.activation ? from.activation : "none"), 0));
  const int64_t I = layer.inputs, P = layer.outputs;
  const float* const* const w = from.weights;
  const bool gated = is_gated(layer.activation);
  if (name == "linear" || name == "conv") {
    layer.kind = name == "conv" && layer.taps > 1 ? LayerKind::conv : LayerKind::linear;
    add_matrix(layer, 0, gated ? 2 : 1, P, I * layer.taps, w[0], 0, nullptr, bfloat16);
    layer.bias = keep(w[1], gated ? 2 * P : P);
  } else if (name == "depthwise") {
    layer.kind = LayerKind::depthwise;
    layer.weights = keep(w[0], layer.taps * P);
    layer.bias = keep(w[1], P);
  } else if (const auto unary = kUnary.find(name); unary != kUnary.end()) {
    layer.kind = LayerKind::unary;
    layer.cell = int32_t(unary->second);
  } else if (const auto binary = kBinary.find(name); binary != kBinary.end()) {
    layer.kind = LayerKind::binary;
    layer.cell = int32_t(binary->second);
    if (layer.skip == kNoSkip || I != P) throw std::invalid_argument("a function of two values needs both");
  } else if (name == "gather") {
    add_moves(layer, from);
  } else if (name == "past") {
    layer.kind = LayerKind::past;
    layer.stride = round_up(P, kernels_.lanes);
    if (layer.hidden != P) throw std::invalid_argument("past: sizes that do not fit each other");
  } else if (name == "keep") {
    layer.kind = LayerKind::keep;
    if (layer.skip < 0 || layers_[size_t(layer.skip)].kind != LayerKind::past || I != P) {
      throw std::invalid_argument("keep: expected the layer that gives what it keeps");
    }
  } else if (name == "attention") {
    if (layer.skip == kNoSkip) throw std::invalid_argument("attention needs queries");
    layer.kind = LayerKind::attention;
  } else if (name == "hierarchical") {
    add_hierarchical(layer, from);
  } else if (name == "positions") {
    layer.kind = LayerKind::positions;
    layer.weights = keep(w[0], layer.hidden * P);
  } else if (name == "embedding") {
    layer.kind = LayerKind::embedding;
    layer.weights = keep(w[0], I * P);
  } else if (const auto row = kRowLayers.find(name); row != kRowLayers.end()) {
    layer.kind = row->second;
    layer.weights = keep(w[0], P);
    layer.bias = keep(w[1], P);
    if (P != (layer.kind == LayerKind::sum ? 1 : I))
      throw std::invalid_argument("a row has another number of features");
  } else {
    const rnn::RnnCellEntry* const cell = rnn::find_rnn_cell(from.kind);
    if (cell) {
      add_recurrent(layer, *cell, w, bfloat16);
    } else {
      add_column(layer, from);
    }
  }
  const bool each_row =
      layer.kind == LayerKind::linear || kRowLayers.count(name) || kUnary.count(name) || kBinary.count(name);
  if (layer.frames > 1 && !each_row) throw std::invalid_argument(name + " has one row per step");
  layers_.push_back(layer);
}

void SessionProgram::add_recurrent(SessionLayer& layer, const rnn::RnnCellEntry& cell, const float* const* w,
                                   bool bfloat16) {
  const int64_t I = layer.inputs, H = layer.hidden, P = layer.outputs, gates = cell.gates;
  layer.kind = LayerKind::recurrent;
  layer.cell = cell.index;
  layer.stride = round_up(std::max(H, P), kernels_.lanes) + kernels_.lanes;
  layer.normalised = cell.norm;
  if (layer.normalised) layer.parameter = 1e-5f;
  if (cell.extra) {
    add_matrix(layer, 0, 1, H, I, w[4], H, w[5], bfloat16);
    add_matrix(layer, 1, gates, H, I, w[0], H, w[1], bfloat16);
    layer.buffers = 1;
  } else if (cell.first > 0) {
    const int64_t value = bfloat16 ? 2 : 4;
    const auto rest = [&](const float* weight, int64_t columns) {
      return reinterpret_cast<const char*>(weight) + cell.first * H * columns * value;
    };
    add_matrix(layer, 0, cell.first, H, I, w[0], H, w[1], bfloat16);
    add_matrix(layer, 1, gates - cell.first, H, I, rest(w[0], I), H, rest(w[1], H), bfloat16);
    layer.buffers = 2;
  } else {
    add_matrix(layer, 0, gates, H, I, w[0], P, w[1], bfloat16);
    if (cell.projects && w[4]) add_matrix(layer, 1, 1, P, H, w[4], 0, nullptr, bfloat16);
    layer.buffers = cell.norm_c ? 2 : cell.projects ? 1 : 0;
  }
  // If h's part of the last gate is kept apart, so is its bias. Otherwise the two biases are summed.
  std::vector<float> bias(size_t((gates + cell.separate) * layer.stride), 0.0f);
  for (int64_t g = 0; g < gates; ++g) {
    const bool separate = cell.separate && g + 1 == gates;
    for (int64_t k = 0; k < H; ++k) {
      bias[size_t(g * layer.stride + k)] += w[2] ? w[2][g * H + k] : 0.0f;
      bias[size_t((g + separate) * layer.stride + k)] += w[3] ? w[3][g * H + k] : 0.0f;
    }
  }
  layer.bias = keep(bias.data(), int64_t(bias.size()));
  // The weights of units are the last weights of the cell. They are stored row after row.
  std::vector<float> rows;
  int tensor = cell.weights.count;
  for (int i = 0; i < 4 && cell.weight_tensors[i]; ++i) --tensor;
  for (int i = 0; i < 4 && cell.weight_tensors[i]; ++i, ++tensor) {
    for (const float *row = w[tensor], *end = row + cell.weight_tensors[i] * H; row < end; row += H) {
      rows.insert(rows.end(), row, row + H);
      rows.insert(rows.end(), size_t(layer.stride - H), 0.0f);
    }
  }
  if (!rows.empty()) layer.weights = keep(rows.data(), int64_t(rows.size()));
}

void SessionProgram::add_column(SessionLayer& layer, const SeqaccelSessionLayer& from) {
  const int64_t I = layer.inputs, H = layer.hidden;
  const auto* const cell = scan::find_column_cell(from.kind, from.matrices, from.skip > 0);
  if (cell == nullptr) throw std::invalid_argument(std::string("unknown layer '") + from.kind + "'");
  const bool window = from.weights[1] != nullptr;
  layer.kind = LayerKind::column;
  layer.cell = int32_t(cell - scan::kColumnCells.data());
  layer.stride = round_up(std::max(H, window ? I : 0), kernels_.lanes) + kernels_.lanes;
  add_matrix(layer, 0, cell->inputs, H, I, from.weights[0], window ? I : 0, from.weights[1]);
  std::vector<float> rows(size_t((cell->inputs + cell->weights) * layer.stride), 0.0f);
  const auto put = [&](const float* values, int64_t first, int64_t count) {
    for (int64_t k = 0; values && k < count; ++k) {
      std::copy(values + k * H, values + (k + 1) * H, rows.begin() + (first + k) * layer.stride);
    }
  };
  put(from.weights[2], cell->first_bias, cell->biases);
  put(from.weights[3], cell->inputs, cell->weights);
  layer.bias = keep(rows.data(), int64_t(rows.size()));
  layer.weights = layer.bias + cell->inputs * layer.stride;
}

void SessionProgram::add_hierarchical(SessionLayer& layer, const SeqaccelSessionLayer& from) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  layer.kind = LayerKind::hierarchical;
  const int64_t d = layer.outputs / layer.heads;
  layer.key_heads = (layer.inputs - layer.outputs) / (2 * d);
  layer.local_blocks = from.local_blocks;
  layer.levels = from.levels;
  layer.pool_rows = from.pool_rows;
  const auto times = [](int64_t a, int64_t b) { return __builtin_mul_overflow(a, b, &a) ? kMost : a; };
  std::vector<SessionLevel> levels;
  int64_t place = 0, span = 1;
  for (int64_t i = 0; i < from.levels; ++i) {
    const int64_t children = i == 0 ? from.block_size : from.fanout;
    const bool top = i + 1 == from.levels;
    SessionLevel level{};
    level.span = span;
    span = times(span, children);
    level.above = top && !from.limited ? 0 : span;
    level.slots = top ? from.top_slots : times(from.local_blocks, children);
    level.keys = place;
    place += 2 * times(level.slots, d);
    level.sums = place;
    place += i == 0 ? 0 : 2 * d;
    level.bias = from.mass_bias ? float(std::log(double(level.span))) : 0.0f;
    levels.push_back(level);
    if (place < 0 || place > kMost / 4) throw std::bad_alloc();
  }
  for (SessionLevel& level : levels) {
    level.moments = place;
    place += &level == &levels[0] ? 0 : 2;
  }
  if (layer.heads * d != layer.outputs || layer.key_heads < 1 ||
      layer.outputs + 2 * layer.key_heads * d != layer.inputs || layer.heads % layer.key_heads || levels.empty() ||
      layer.hidden != round_up(place, 16)) {
    throw std::invalid_argument("hierarchical attention: sizes that do not fit each other");
  }
  layer.weights = keep(from.weights[0], layer.pool_rows * layer.key_heads * d);
  weights_->levels.push_back(std::move(levels));
  layer.level = weights_->levels.back().data();
  if (from.parameter == 0.0) return;
  std::vector<double> frequencies;
  for (int64_t i = 0; i < d / 2; ++i) frequencies.push_back(std::pow(from.parameter, -2.0 * double(i) / double(d)));
  weights_->frequencies.push_back(std::move(frequencies));
  layer.frequencies = weights_->frequencies.back().data();
}

void SessionProgram::add_moves(SessionLayer& layer, const SeqaccelSessionLayer& from) {
  layer.kind = LayerKind::gather;
  std::vector<SessionMove> moves;
  for (int64_t i = 0; i < from.move_count; ++i) {
    const SessionMove move = {layer_before(from.moves[i][0]), from.moves[i][1], from.moves[i][2], from.moves[i][3]};
    const int64_t width = layers_.empty() ? layer.inputs * layer.frames : width_of(int32_t(move.source));
    if (move.count < 1 || move.from < 0 || move.to < 0 || move.count > width - move.from ||
        move.count > layer.outputs - move.to) {
      throw std::invalid_argument("gather: a piece lies outside of a layer");
    }
    moves.push_back(move);
  }
  weights_->moves.push_back(std::move(moves));
  layer.moves = weights_->moves.back().data();
  layer.move_count = from.move_count;
}

void SessionProgram::finish() {
  Layout panels;
  std::vector<size_t> at;
  for (const Source& source : sources_) {
    const SessionMatrix& m = layers_[source.layer].matrices[source.matrix];
    const int64_t rows = m.precision == Precision::int8 ? m.blocks : 0;
    at.push_back(panels.add({m.blocks, m.panel_words}));
    at.push_back(panels.add({rows, 2, m.vectors, kernels_.lanes}));
    at.push_back(panels.add({rows, 2, m.vectors, kernels_.lanes}));
  }
  weights_->panel_bytes = panels.bytes();
  weights_->panels = AlignedMemory(panels.bytes(), false);
  char* const memory = weights_->panels.get();
  std::vector<SessionPack> packs;
  for (size_t i = 0; i < sources_.size(); ++i) {
    const Source& source = sources_[i];
    SessionMatrix& m = layers_[source.layer].matrices[source.matrix];
    m.panels = reinterpret_cast<uint32_t*>(memory + at[3 * i]);
    m.scales = reinterpret_cast<float*>(memory + at[3 * i + 1]);
    m.offsets = reinterpret_cast<int32_t*>(memory + at[3 * i + 2]);
    packs.push_back({&m, {source.sources[0], source.sources[1]}, source.bfloat16});
  }
  if (!kernels_.pack(packs.data(), int64_t(packs.size()))) throw std::bad_alloc();
  sources_.clear();
  start();
}

// Starts all streams at zero.
void SessionProgram::start() {
  Layout state;
  std::vector<size_t> at;
  for (SessionLayer& l : layers_) {
    for (int i = 0; i < 3; ++i) at.push_back(state.add({batch_, l.stride}));
    at.push_back(state.add({l.buffers, batch_, l.stride}));
    const SessionMatrix& m = l.matrices[0];
    at.push_back(state.add({l.normalised ? m.blocks : 0, batch_, 2, m.vectors, kernels_.lanes}));
    const bool rings = l.kind == LayerKind::conv || l.kind == LayerKind::depthwise || l.kind == LayerKind::attention;
    const bool hierarchical = l.kind == LayerKind::hierarchical;
    l.slots = rings ? (l.taps - 1) * l.dilation + longest_chunk() : 0;
    l.kept = hierarchical ? l.key_heads * l.hidden : l.slots * l.inputs;
    l.ages = rings || hierarchical || l.kind == LayerKind::positions;
    at.push_back(state.add({batch_, hierarchical ? l.key_heads : l.slots, hierarchical ? l.hidden : l.inputs}));
    at.push_back(state.add({l.ages ? 2 : 0, batch_}));
  }
  state_ = AlignedMemory(state.bytes());
  for (size_t i = 0; i < layers_.size(); ++i) {
    SessionLayer& l = layers_[i];
    l.parity = 0;
    float** const pointers[] = {&l.h[0], &l.h[1], &l.c, &l.middle, &l.sums, &l.ring};
    for (size_t j = 0; j < 6; ++j) *pointers[j] = reinterpret_cast<float*>(state_.get() + at[7 * i + j]);
    l.position = l.ages ? reinterpret_cast<int64_t*>(state_.get() + at[7 * i + 6]) : nullptr;
    for (int64_t b = 0; b < batch_ && l.ages; ++b) start_stream(l, b);
  }
  run_.layers = layers_.data();
  run_.count = int64_t(layers_.size());
  run_.batch = batch_;
  for (const SessionLayer& l : layers_) {
    if (l.kind == LayerKind::attention) run_.work += 2.0 * double(l.taps) * double(l.outputs);
    for (int64_t i = 0; i < l.levels; ++i) run_.work += 1.5 * double(l.level[i].slots) * double(l.outputs);
    for (const SessionMatrix& m : l.matrices) {
      const double values = double(m.units * (m.interleaved ? m.vectors : 1));
      run_.work += double(l.frames) * double(m.columns[0] + m.columns[1]) * values;
    }
  }
}

void SessionProgram::start_stream(const SessionLayer& l, int64_t b) {
  std::memset(l.ring + b * l.kept, 0, size_t(l.kept) * sizeof(float));
  l.position[b] = 0;
  for (int64_t g = 0; g < l.key_heads; ++g) {
    float* const memory = l.ring + b * l.kept + g * l.hidden;
    for (int64_t i = 1; i < l.levels; ++i) memory[l.level[i].moments] = -std::numeric_limits<float>::infinity();
  }
}

std::unique_ptr<SessionProgram> SessionProgram::fork(int64_t batch) const {
  auto made = std::make_unique<SessionProgram>(batch, precision_, kernels_);
  made->layers_ = layers_;
  made->weights_ = weights_;
  made->start();
  return made;
}

size_t SessionProgram::weights(char* out, const char* from) {
  size_t bytes = 0;
  const auto move = [&](void* values, size_t count) {
    if (out) std::memcpy(out + bytes, values, count);
    if (from) std::memcpy(values, from + bytes, count);
    bytes += count;
  };
  move(weights_->panels.get(), weights_->panel_bytes);
  for (std::vector<float>& values : weights_->kept) move(values.data(), values.size() * sizeof(float));
  return bytes;
}

// What one step keeps the next one reads, so that their layers cannot run a chunk each.
int64_t SessionProgram::longest_chunk() const {
  const bool single =
      std::any_of(layers_.begin(), layers_.end(), [](const SessionLayer& l) { return l.kind == LayerKind::past; });
  return single ? 1 : std::max<int64_t>(1, kChunkRows / batch_);
}

void SessionProgram::grow(int64_t chunk, int threads) {
  if (chunk <= chunk_ && threads <= threads_) return;
  chunk = std::max(chunk, chunk_);
  threads = std::max(threads, threads_);
  const int64_t rows = chunk * batch_;
  int64_t projected = 0, words_of_x = 0, words_of_h = 0, gathered = 0, frames = 1;
  for (const SessionLayer& l : layers_) {
    frames = std::max(frames, l.frames);
    for (const SessionMatrix& m : l.matrices) {
      words_of_x = std::max(words_of_x, l.frames * m.words[0]);
      words_of_h = std::max({words_of_h, m.words[0], m.words[1]});
      projected = std::max(projected, m.blocks * m.vectors * kernels_.lanes);
    }
    if (l.kind == LayerKind::conv) gathered = std::max(gathered, rows * l.taps * l.inputs);
    if (l.kind == LayerKind::hierarchical) gathered = std::max(gathered, l.outputs + 4 * l.outputs / l.heads);
  }
  if (precision_ == Precision::float32) words_of_x = words_of_h = 0;
  run_.scratch_rows_at = round_up(rows * words_of_x, 16);
  run_.scales_at = run_.scratch_rows_at + round_up(batch_ * words_of_h, 16);
  run_.gathered_at = run_.scales_at + round_up(frames * rows + batch_, 16) + 16;
  run_.scratch_words = run_.gathered_at + round_up(gathered, 16);
  Layout layout;
  const size_t projected_at = layout.add({chunk > 1 ? rows : 0, projected});
  const size_t scratch_at = layout.add({threads, run_.scratch_words});
  std::vector<size_t> outputs_at;
  const Shares shares(layers_);
  for (const int64_t width : shares.widths) outputs_at.push_back(layout.add({rows, width}));
  chunk_ = threads_ = 0;  // holds if the allocation fails
  buffers_ = AlignedMemory();
  buffers_ = AlignedMemory(layout.bytes(), false);
  const auto at = [&](size_t offset) { return reinterpret_cast<float*>(buffers_.get() + offset); };
  run_.projected = at(projected_at);
  run_.scratch = reinterpret_cast<uint32_t*>(at(scratch_at));
  for (size_t i = 0; i + 1 < layers_.size(); ++i) layers_[i].output = at(outputs_at[shares.of_layer[i]]);
  layers_.back().output = nullptr;
  chunk_ = chunk;
  threads_ = threads;
}

int SessionProgram::team() const {
  const double work = run_.work * double(batch_);
  return work < kSmall || work < kSmallLayer * double(run_.count) ? 1 : team_size();
}

void SessionProgram::run(const void* x, int64_t steps, void* y, bool bfloat16, bool reverse, const int64_t* lengths,
                         const bool* advance) {
  if (steps == 0) return;
  const int64_t chunk = std::min(steps, longest_chunk());
  run_.threads = team();
  grow(chunk, run_.threads);
  run_.chunk = chunk;
  run_.x = x;
  run_.y = y;
  run_.steps = steps;
  run_.bfloat16 = bfloat16;
  run_.reverse = reverse;
  run_.lengths = lengths;
  run_.advance = advance;
  kernels_.run(&run_);
}

}  // namespace seqaccel::packed
