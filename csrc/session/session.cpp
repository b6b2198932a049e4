// seqaccel._session: a thin class over the table of C functions that _C exports. Shapes and dtypes have been checked by
// seqaccel/session.py; the interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/session_table.h"

namespace py = pybind11;

namespace {

// Layer, part, level, address of the values.
using Part = std::tuple<int64_t, char, int64_t, uintptr_t>;

class Session {
 public:
  Session(uintptr_t table, int64_t batch, const std::string& precision, const std::vector<py::dict>& layers)
      : table_(reinterpret_cast<const SeqaccelSessionTable*>(table)), batch_(batch) {
    if (table_->version != SEQACCEL_SESSION_TABLE_VERSION) {
      throw std::runtime_error("seqaccel._session and seqaccel._C come from different builds: reinstall seqaccel");
    }
    std::vector<SeqaccelSessionLayer> described;
    std::vector<std::string> texts;
    std::vector<std::vector<std::array<int64_t, 4>>> moves;
    texts.reserve(2 * layers.size());
    for (const py::dict& given : layers) {
      const auto integer = [&](const char* key) { return given[key].cast<int64_t>(); };
      const auto number = [&](const char* key) { return given[key].cast<double>(); };
      const auto text = [&](const char* key) { return texts.emplace_back(given[key].cast<std::string>()).c_str(); };
      SeqaccelSessionLayer layer{};
      layer.kind = text("kind");
      layer.activation = text("activation");
      layer.inputs = integer("inputs");
      layer.hidden = integer("hidden");
      layer.outputs = integer("outputs");
      layer.matrices = integer("matrices");
      layer.source = integer("source");
      layer.skip = integer("skip");
      layer.taps = integer("taps");
      layer.dilation = integer("dilation");
      layer.frames = integer("frames");
      moves.push_back(given["moves"].cast<std::vector<std::array<int64_t, 4>>>());
      layer.moves = reinterpret_cast<const int64_t (*)[4]>(moves.back().data());
      layer.move_count = int64_t(moves.back().size());
      layer.heads = integer("heads");
      layer.block_size = integer("block_size");
      layer.fanout = integer("fanout");
      layer.levels = integer("levels");
      layer.local_blocks = integer("local_blocks");
      layer.top_slots = integer("top_slots");
      layer.limited = given["limited"].cast<bool>();
      layer.mass_bias = given["mass_bias"].cast<bool>();
      layer.pool_rows = integer("pool_rows");
      layer.relu = given["relu"].cast<bool>();
      layer.zoneout_h = number("zoneout_h");
      layer.zoneout_c = number("zoneout_c");
      layer.parameter = number("parameter");
      const auto weights = given["weights"].cast<std::vector<uintptr_t>>();
      for (size_t i = 0; i < weights.size() && i < std::size(layer.weights); ++i) {
        layer.weights[i] = reinterpret_cast<const float*>(weights[i]);
      }
      described.push_back(layer);
    }
    session_ = table_->create(batch, precision.c_str(), int64_t(described.size()), described.data());
    if (session_ == nullptr) throw std::runtime_error(table_->error());
  }
  std::unique_ptr<Session> fork(int64_t batch) const {
    void* const made = table_->fork(session_, batch);
    if (made == nullptr) throw std::runtime_error(table_->error());
    return std::unique_ptr<Session>(new Session(table_, batch, made));
  }
  int64_t weights_size() const { return table_->weights(session_, nullptr, nullptr); }
  void read_weights(uintptr_t to) const { table_->weights(session_, reinterpret_cast<char*>(to), nullptr); }
  void write_weights(uintptr_t from) { table_->weights(session_, nullptr, reinterpret_cast<const char*>(from)); }
  std::string isa() const { return table_->isa(session_); }
  ~Session() { table_->destroy(session_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void extend(uintptr_t x, int64_t steps, uintptr_t y, uintptr_t advance) {
    check(table_->extend(session_, reinterpret_cast<const void*>(x), steps, reinterpret_cast<float*>(y),
                         reinterpret_cast<const bool*>(advance)));
  }

  void read_state(const std::vector<Part>& to) {
    std::vector<SeqaccelSessionPart> parts;
    for (const auto& [layer, part, level, out] : to) {
      parts.push_back({layer, part, level, reinterpret_cast<float*>(out), nullptr});
    }
    check(table_->state(session_, int64_t(parts.size()), parts.data()));
  }

  void write_state(const std::vector<Part>& from) {
    std::vector<SeqaccelSessionPart> parts;
    for (const auto& [layer, part, level, values] : from) {
      parts.push_back({layer, part, level, nullptr, reinterpret_cast<const float*>(values)});
    }
    check(table_->state(session_, int64_t(parts.size()), parts.data()));
  }

  void select(const std::vector<int64_t>& indices) {
    if (int64_t(indices.size()) != batch_) throw std::invalid_argument("seqaccel._session: an index a stream");
    check(table_->select(session_, indices.data()));
  }

 private:
  Session(const SeqaccelSessionTable* table, int64_t batch, void* session)
      : table_(table), batch_(batch), session_(session) {}
  void check(int status) const {
    if (status == SEQACCEL_SESSION_OUT_OF_RANGE) throw py::index_error(table_->error());
    if (status != SEQACCEL_SESSION_OK) throw std::runtime_error(table_->error());
  }

  const SeqaccelSessionTable* table_;
  int64_t batch_;
  void* session_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_session, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Session>(m, "Session")
      .def(py::init<uintptr_t, int64_t, const std::string&, const std::vector<py::dict>&>())
      .def("fork", &Session::fork, Unlocked())
      .def("weights_size", &Session::weights_size, Unlocked())
      .def("read_weights", &Session::read_weights, Unlocked())
      .def("write_weights", &Session::write_weights, Unlocked())
      .def("isa", &Session::isa, Unlocked())
      .def("extend", &Session::extend, py::arg("x"), py::arg("steps"), py::arg("y"), py::arg("advance") = 0, Unlocked())
      .def("read_state", &Session::read_state, Unlocked())
      .def("write_state", &Session::write_state, Unlocked())
      .def("select", &Session::select, Unlocked());
}
