// The sessions' C functions: a program of layers with its own packed weights and its own state.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/packed/program.h"

namespace seqaccel::packed {
namespace {

thread_local std::string last_error;

template <class Function>
int guarded(Function function) {
  try {
    function();
    return SEQACCEL_SESSION_OK;
  } catch (const std::bad_alloc&) {
    last_error = "seqaccel: not enough memory for a Session of this batch_size, module and chunk";
  } catch (const std::out_of_range& error) {
    last_error = error.what();
    return SEQACCEL_SESSION_OUT_OF_RANGE;
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return SEQACCEL_SESSION_FAILED;
}

// A session's program, for one thread at a time.
class Program {
 public:
  explicit Program(void* session) : program_(*static_cast<SessionProgram*>(session)), lock_(program_.mutex) {}
  SessionProgram* operator->() const { return &program_; }

 private:
  SessionProgram& program_;
  std::lock_guard<std::mutex> lock_;
};

void* create(int64_t batch, const char* precision, int64_t count, const SeqaccelSessionLayer* layers) {
  std::unique_ptr<SessionProgram> made;
  const int failed = guarded([&] {
    const std::string name = precision;
    const Precision held = name == "int8"       ? Precision::int8
                           : name == "bfloat16" ? Precision::bfloat16
                                                : Precision::float32;
    made = std::make_unique<SessionProgram>(batch, held);
    for (int64_t i = 0; i < count; ++i) made->add(layers[i]);
    made->finish();
  });
  return failed ? nullptr : made.release();
}

void* fork(void* session, int64_t batch) {
  std::unique_ptr<SessionProgram> made;
  const int failed = guarded([&] { made = Program(session)->fork(batch); });
  return failed ? nullptr : made.release();
}

int64_t weights(void* session, char* out, const char* from) { return int64_t(Program(session)->weights(out, from)); }

const char* isa(void* session) { return Program(session)->isa(); }

void destroy(void* session) { delete static_cast<SessionProgram*>(session); }

int extend(void* session, const void* x, int64_t steps, float* y, const bool* advance) {
  return guarded([&] {
    const Program p(session);
    const SessionLayer &first = p->layers().front(), &last = p->layers().back();
    if (steps > 0 && ((first.inputs > 0 && !x) || (last.outputs > 0 && !y))) {
      throw std::invalid_argument(
          "x: expected a tensor with memory, and outside FakeTensorMode, which gives none to y");
    }
    if (first.kind == LayerKind::embedding) {
      const int64_t* const indices = static_cast<const int64_t*>(x);
      for (int64_t i = 0; i < steps * p->batch(); ++i) {
        if (indices[i] < 0 || indices[i] >= first.inputs) {
          throw std::out_of_range("x: index " + std::to_string(indices[i]) + " is out of range for an embedding of " +
                                  std::to_string(first.inputs));
        }
      }
    }
    for (const SessionLayer& l : p->layers()) {
      for (int64_t b = 0; b < p->batch() && l.kind == LayerKind::positions; ++b) {
        if ((advance == nullptr || advance[b]) && l.position[b] > l.hidden - steps) {
          throw std::out_of_range("x: a stream of " + std::to_string(l.position[b]) + " steps, and " +
                                  std::to_string(steps) + " more, is longer than the embedding of " +
                                  std::to_string(l.hidden) + " positions");
        }
      }
    }
    p->run(x, steps, y, false, false, nullptr, advance);
    const int64_t width = last.outputs * last.frames;
    for (int64_t i = 0; advance && i < steps * p->batch(); ++i) {
      if (!advance[i % p->batch()]) std::memset(y + i * width, 0, size_t(width) * sizeof(float));
    }
  });
}

// The inputs that a convolution or attention keeps, [batch, (taps - 1) * dilation, inputs], oldest first.
void ring(const SessionLayer& l, int64_t batch, float* out, const float* from) {
  const int64_t seen = (l.taps - 1) * l.dilation;
  for (int64_t i = 0; i < batch * seen; ++i) {
    const int64_t b = i / seen, slot = (l.position[b] - seen + i % seen + l.slots) % l.slots;
    float* const row = l.ring + (b * l.slots + slot) * l.inputs;
    const size_t bytes = size_t(l.inputs) * sizeof(float);
    if (out) {
      std::memcpy(out + i * l.inputs, row, bytes);
    } else {
      std::memcpy(row, from + i * l.inputs, bytes);
    }
  }
}

// The ages of streams, int64.
void ages(const SessionLayer& l, int64_t batch, void* out, const void* from) {
  if (out) {
    std::memcpy(out, l.position, size_t(batch) * sizeof(int64_t));
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    l.position[b] = std::clamp(static_cast<const int64_t*>(from)[b], int64_t(0), int64_t(1) << 62);
  }
}

// A part of a level of the pyramids, [batch, key heads, width].
void part_of_level(const SessionLayer& l, int64_t batch, char part, int64_t number, float* out, const float* from) {
  if (number < 0 || number >= l.levels) throw std::invalid_argument("there is no such level");
  const SessionLevel& level = l.level[number];
  const int64_t d = l.outputs / l.heads, ring = level.slots * d;
  const int64_t place = part == 'k'   ? level.keys
                        : part == 'v' ? level.keys + ring
                        : part == 's' ? level.sums
                        : part == 't' ? level.sums + d
                                      : level.moments + (part == 'w');
  const int64_t width = part == 'k' || part == 'v' ? ring : part == 's' || part == 't' ? d : 1;
  for (int64_t i = 0; i < batch * l.key_heads; ++i) {
    float* const values = l.ring + i * l.hidden + place;
    const size_t bytes = size_t(width) * sizeof(float);
    if (out) {
      std::memcpy(out + i * width, values, bytes);
    } else {
      std::memcpy(values, from + i * width, bytes);
    }
  }
}

int state(void* session, int64_t count, const SeqaccelSessionPart* parts) {
  return guarded([&] {
    const Program p(session);
    for (int64_t i = 0; i < count; ++i) {
      if (!(parts[i].out || parts[i].from)) throw std::invalid_argument("state_dict: a tensor has no memory");
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto& [layer, part, number, out, from] = parts[i];
      const SessionLayer& l = p->layers()[size_t(layer)];
      if (part == 'r' || part == 'm') {
        ring(l, p->batch(), out, from);
        continue;
      }
      if (part == 'a') {
        ages(l, p->batch(), out, from);
        continue;
      }
      if (std::strchr("kvstgw", part)) {
        part_of_level(l, p->batch(), part, number, out, from);
        continue;
      }
      if (part == 'p') {
        const size_t bytes = size_t(p->batch() * l.kept) * sizeof(float);
        std::memcpy(out ? out : l.ring, out ? l.ring : from, bytes);
        continue;
      }
      if (part == 'n') {
        const int64_t most = l.taps - 1;
        for (int64_t b = 0; b < p->batch(); ++b) {
          if (out) {
            out[b] = float(std::min(l.position[b], most));
          } else {
            l.position[b] = from[b] > 0.0f ? int64_t(std::min(from[b], float(most))) : 0;
          }
        }
        continue;
      }
      float* const rows = part == 'c' ? p->c(layer) : p->h(layer);
      const int64_t width = part == 'c' ? l.hidden : part == 'x' ? l.inputs : l.outputs;
      for (int64_t b = 0; b < p->batch(); ++b) {
        float* const row = rows + b * l.stride;
        if (out) {
          std::memcpy(out + b * width, row, size_t(width) * sizeof(float));
        } else {
          std::memcpy(row, from + b * width, size_t(width) * sizeof(float));
        }
      }
    }
  });
}

int select(void* session, const int64_t* indices) {
  return guarded([&] {
    const Program p(session);
    std::vector<float> kept;
    std::vector<int64_t> positions;
    for (size_t i = 0; i < p->layers().size(); ++i) {
      const SessionLayer& l = p->layers()[i];
      for (int64_t b = 0; b < p->batch() && l.position; ++b) {
        if (b == 0) {
          kept.assign(l.ring, l.ring + p->batch() * l.kept);
          positions.assign(l.position, l.position + p->batch());
        }
        const int64_t from = indices[b];
        if (from < 0) {
          SessionProgram::start_stream(l, b);
        } else {
          l.position[b] = positions[size_t(from)];
          std::memcpy(l.ring + b * l.kept, kept.data() + from * l.kept, size_t(l.kept) * sizeof(float));
        }
      }
      if (l.stride == 0) continue;
      for (float* const rows : {p->h(int64_t(i)), p->c(int64_t(i))}) {
        kept.assign(rows, rows + p->batch() * l.stride);
        for (int64_t b = 0; b < p->batch(); ++b) {
          float* const to = rows + b * l.stride;
          const size_t bytes = size_t(l.stride) * sizeof(float);
          if (indices[b] < 0) {
            std::memset(to, 0, bytes);
          } else {
            std::memcpy(to, kept.data() + indices[b] * l.stride, bytes);
          }
        }
      }
    }
  });
}

const char* error() { return last_error.c_str(); }

const SeqaccelSessionTable kTable = {
    SEQACCEL_SESSION_TABLE_VERSION, create, fork, weights, isa, destroy, extend, state, select, error,
};

}  // namespace
}  // namespace seqaccel::packed

const SeqaccelSessionTable* seqaccel_session_table() { return &seqaccel::packed::kTable; }
