// seqaccel._session: a thin class over the table of C functions that _C exports. Shapes and dtypes have been checked by
// seqaccel/session.py; the interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/session_table.h"

namespace py = pybind11;

namespace {

// Kind; inputs, hidden, outputs; addresses of the weights (0: none); zoneout of h and of c, parameter.
using Layer = std::tuple<std::string, std::tuple<int64_t, int64_t, int64_t>, std::vector<uintptr_t>,
                         std::tuple<double, double, double>>;

class Session {
 public:
  Session(uintptr_t table, int64_t batch, const std::string& precision, const std::vector<Layer>& layers)
      : table_(reinterpret_cast<const SeqaccelSessionTable*>(table)), batch_(batch) {
    if (table_->version != SEQACCEL_SESSION_TABLE_VERSION) {
      throw std::runtime_error("seqaccel._session and seqaccel._C come from different builds: reinstall seqaccel");
    }
    std::vector<SeqaccelSessionLayer> described;
    for (const auto& [kind, sizes, weights, numbers] : layers) {
      SeqaccelSessionLayer layer{};
      layer.kind = kind.c_str();
      std::tie(layer.inputs, layer.hidden, layer.outputs) = sizes;
      for (size_t i = 0; i < weights.size() && i < std::size(layer.weights); ++i) {
        layer.weights[i] = reinterpret_cast<const float*>(weights[i]);
      }
      std::tie(layer.zoneout_h, layer.zoneout_c, layer.parameter) = numbers;
      described.push_back(layer);
    }
    session_ = table_->create(batch, precision.c_str(), int64_t(described.size()), described.data());
    if (session_ == nullptr) throw std::runtime_error(table_->error());
  }
  ~Session() { table_->destroy(session_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void extend(uintptr_t x, int64_t steps, uintptr_t y) {
    if (table_->extend(session_, reinterpret_cast<const void*>(x), steps, reinterpret_cast<float*>(y)) != 0) {
      throw py::index_error(table_->error());
    }
  }

  void read_state(int64_t layer, char part, uintptr_t out) {
    table_->state(session_, layer, part, reinterpret_cast<float*>(out), nullptr);
  }

  void write_state(int64_t layer, char part, uintptr_t from) {
    table_->state(session_, layer, part, nullptr, reinterpret_cast<const float*>(from));
  }

  void select(const std::vector<int64_t>& indices) {
    if (int64_t(indices.size()) != batch_ || table_->select(session_, indices.data()) != 0) {
      throw std::runtime_error("seqaccel._session: select failed");
    }
  }

 private:
  const SeqaccelSessionTable* table_;
  int64_t batch_;
  void* session_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_session, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Session>(m, "Session")
      .def(py::init<uintptr_t, int64_t, const std::string&, const std::vector<Layer>&>())
      .def("extend", &Session::extend, Unlocked())
      .def("read_state", &Session::read_state)
      .def("write_state", &Session::write_state)
      .def("select", &Session::select);
}
