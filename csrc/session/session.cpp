// seqaccel._session: a thin class over the table of C functions that _C exports. Every argument has been checked by
// seqaccel/session.py; the interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/session_table.h"

namespace py = pybind11;

namespace {

// Addresses of weight_ih, weight_hh, bias_ih, bias_hh (0: none), then the input size.
using LayerAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;

const float* pointer(uintptr_t address) { return reinterpret_cast<const float*>(address); }

class LstmSession {
 public:
  LstmSession(uintptr_t table, int64_t batch, int64_t hidden_size, const std::vector<LayerAddresses>& layers)
      : table_(reinterpret_cast<const SeqaccelSessionTable*>(table)),
        batch_(batch),
        hidden_size_(hidden_size),
        num_layers_(int64_t(layers.size())),
        kept_(size_t(2 * num_layers_ * batch * hidden_size)) {
    if (table_->version != SEQACCEL_SESSION_TABLE_VERSION) {
      throw std::runtime_error("seqaccel._session and seqaccel._C come from different builds: reinstall seqaccel");
    }
    std::vector<SeqaccelLstmLayer> described;
    for (const auto& [weight_ih, weight_hh, bias_ih, bias_hh, input_size] : layers) {
      described.push_back({pointer(weight_ih), pointer(weight_hh), pointer(bias_ih), pointer(bias_hh), input_size});
    }
    session_ = table_->create(batch, hidden_size, num_layers_, described.data());
    if (session_ == nullptr) throw std::bad_alloc();
  }
  ~LstmSession() { table_->destroy(session_); }
  LstmSession(const LstmSession&) = delete;
  LstmSession& operator=(const LstmSession&) = delete;

  void extend(uintptr_t x, int64_t steps, uintptr_t y) {
    table_->extend(session_, pointer(x), steps, reinterpret_cast<float*>(y));
  }

  void read_state(uintptr_t out) const {
    std::memcpy(reinterpret_cast<float*>(out), table_->state(session_), kept_.size() * sizeof(float));
  }

  void write_state(uintptr_t from) {
    std::memcpy(table_->state(session_), pointer(from), kept_.size() * sizeof(float));
  }

  // Stream b becomes a copy of what stream indices[b] was; -1 starts it anew.
  void select(const std::vector<int64_t>& indices) {
    float* const state = table_->state(session_);
    std::memcpy(kept_.data(), state, kept_.size() * sizeof(float));
    const size_t row = size_t(hidden_size_) * sizeof(float);
    for (int64_t layer = 0; layer < 2 * num_layers_; ++layer) {
      for (int64_t b = 0; b < batch_; ++b) {
        float* to = state + (layer * batch_ + b) * hidden_size_;
        const int64_t from = indices.at(size_t(b));
        if (from < 0) {
          std::memset(to, 0, row);
        } else {
          std::memcpy(to, kept_.data() + (layer * batch_ + from) * hidden_size_, row);
        }
      }
    }
  }

 private:
  const SeqaccelSessionTable* table_;
  int64_t batch_, hidden_size_, num_layers_;
  std::vector<float> kept_;
  void* session_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_session, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<LstmSession>(m, "LstmSession")
      .def(py::init<uintptr_t, int64_t, int64_t, const std::vector<LayerAddresses>&>())
      .def("extend", &LstmSession::extend, Unlocked())
      .def("read_state", &LstmSession::read_state, Unlocked())
      .def("write_state", &LstmSession::write_state, Unlocked())
      .def("select", &LstmSession::select, Unlocked());
}
