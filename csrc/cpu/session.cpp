// The sessions' C functions: a stack of LSTM layers with its own copy of the weights and its own state, over the same
// kernels as the operators. Nothing is allocated during a step but the projection of a longer chunk.
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "common/session_table.h"
#include "matmul.h"
#include "rnn.h"

namespace seqaccel {
namespace {

constexpr int64_t kGates = 4;
constexpr int64_t kFewRows = 32;  // up to here the rows of a weight are read as they are

struct Layer {
  std::vector<float> weight_ih, weight_hh, bias;
  int64_t input_size;
};

struct LstmSession {
  int64_t batch, hidden_size;
  std::vector<Layer> layers;
  std::vector<float> state;  // [2, layers, B, H]
  std::vector<float> gates, outputs[2];
};

void* create(int64_t batch, int64_t hidden_size, int64_t num_layers, const SeqaccelLstmLayer* described) {
  try {
    auto session = std::make_unique<LstmSession>();
    session->batch = batch;
    session->hidden_size = hidden_size;
    const size_t rows = size_t(kGates * hidden_size);
    for (int64_t i = 0; i < num_layers; ++i) {
      const SeqaccelLstmLayer& from = described[i];
      Layer layer;
      layer.input_size = from.input_size;
      layer.weight_ih.assign(from.weight_ih, from.weight_ih + rows * size_t(from.input_size));
      layer.weight_hh.assign(from.weight_hh, from.weight_hh + rows * size_t(hidden_size));
      layer.bias.assign(rows, 0.0f);
      for (const float* bias : {from.bias_ih, from.bias_hh}) {
        for (size_t row = 0; bias != nullptr && row < rows; ++row) layer.bias[row] += bias[row];
      }
      session->layers.push_back(std::move(layer));
    }
    session->state.assign(size_t(2 * num_layers * batch * hidden_size), 0.0f);
    return session.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void destroy(void* session) { delete static_cast<LstmSession*>(session); }

void extend(void* opaque, const float* x, int64_t steps, float* y) {
  LstmSession& session = *static_cast<LstmSession*>(opaque);
  const RnnKernels& kernels = active_rnn_kernels();
  const RnnCellEntry& cell = *find_rnn_cell("lstm");
  const int64_t B = session.batch, H = session.hidden_size, rows = steps * B;
  const int64_t num_layers = int64_t(session.layers.size());
  session.gates.resize(size_t(rows * kGates * H));
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = session.layers[size_t(i)];
    const int64_t I = layer.input_size;
    float* out = y;
    if (i + 1 < num_layers) {
      session.outputs[i % 2].resize(size_t(rows * H));
      out = session.outputs[i % 2].data();
    }
    if (rows <= kFewRows) {
      kernels.row_product_float({rows, kGates * H, I, x, layer.weight_ih.data(), session.gates.data(), kGates * H});
    } else {
      matmul(Matmul<float>{rows, kGates * H, I, x, I, 1, layer.weight_ih.data(), 1, I, session.gates.data(), kGates * H,
                           false});
    }
    float* const h = session.state.data() + i * B * H;
    float* const c = session.state.data() + (num_layers + i) * B * H;
    RnnForward<float> forward{};
    forward.rows = {steps, B};
    forward.hidden = forward.outputs = H;
    forward.h_0 = forward.h_n = h;
    forward.c_0 = forward.c_n = c;
    forward.weight = layer.weight_hh.data();
    forward.bias = layer.bias.data();
    forward.x = session.gates.data();
    forward.x_row = kGates * H;
    forward.output = out;
    if (!cell.forward_float(forward)) throw std::bad_alloc();
    x = out;
  }
}

float* state(void* session) { return static_cast<LstmSession*>(session)->state.data(); }

const SeqaccelSessionTable kTable = {SEQACCEL_SESSION_TABLE_VERSION, create, destroy, extend, state};

}  // namespace
}  // namespace seqaccel

const SeqaccelSessionTable* seqaccel_session_table() { return &seqaccel::kTable; }
