// Owns a program of session.h: describes its layers, packs their weights, holds their state, runs them.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/session_table.h"
#include "cpu/packed/session.h"
#include "cpu/rnn/rnn.h"

namespace seqaccel::packed {

// Memory from the pool; throws std::bad_alloc.
class AlignedMemory {
 public:
  AlignedMemory() = default;
  explicit AlignedMemory(size_t bytes, bool zero = true);
  char* get() const { return memory_.get(); }

 private:
  struct GiveBack {
    size_t size;
    void operator()(char* p) const;
  };
  std::unique_ptr<char, GiveBack> memory_{nullptr, GiveBack{0}};
};

class SessionProgram {
 public:
  // A program keeps the kernels of the instruction set that was active when it was made.
  SessionProgram(int64_t batch, Precision precision, const SessionKernels& kernels = active_session_kernels());
  SessionProgram(const SessionProgram&) = delete;
  SessionProgram& operator=(const SessionProgram&) = delete;

  // Adds a layer behind the last one. With `bfloat16` the weights of its products are bfloat16, everything else
  // float32.
  void add(const SeqaccelSessionLayer& described, bool bfloat16 = false);
  // Packs the weights. It is called once, after the last layer.
  void finish();
  // Makes a program with streams of its own. Both hold the same weights.
  std::unique_ptr<SessionProgram> fork(int64_t batch) const;
  // Copies the packed weights to `out`, or from `from`, if either is not null, and returns their size in bytes. They
  // must come from the same kernels, and no other program may hold them while they are overwritten.
  size_t weights(char* out, const char* from);
  const char* isa() const { return kernels_.isa; }

  void run(const void* x, int64_t steps, void* y, bool bfloat16 = false, bool reverse = false,
           const int64_t* lengths = nullptr, const bool* advance = nullptr);

  const std::vector<SessionLayer>& layers() const { return layers_; }
  int64_t batch() const { return batch_; }
  // Starts a stream of a layer anew: what it keeps in place of a ring.
  static void start_stream(const SessionLayer& layer, int64_t b);
  // The state of a layer, [B, stride].
  float* h(int64_t layer) { return layers_[size_t(layer)].h[layers_[size_t(layer)].parity]; }
  float* c(int64_t layer) { return layers_[size_t(layer)].c; }

  std::mutex mutex;  // held by the thread that uses the session

 private:
  SessionMatrix& add_matrix(SessionLayer& layer, int index, int64_t gates, int64_t units, int64_t columns_0,
                            const void* source_0, int64_t columns_1 = 0, const void* source_1 = nullptr,
                            bool bfloat16 = false);
  void add_recurrent(SessionLayer& layer, const rnn::RnnCellEntry& cell, const float* const* weights, bool bfloat16);
  void add_column(SessionLayer& layer, const SeqaccelSessionLayer& from);
  void add_hierarchical(SessionLayer& layer, const SeqaccelSessionLayer& from);
  void add_moves(SessionLayer& layer, const SeqaccelSessionLayer& from);
  const float* keep(const float* values, int64_t count);
  // The number of the layer that lies `back` places before the next one. Throws if it has another number of features.
  int32_t reached(int64_t back, int64_t features) const;
  int32_t layer_before(int64_t back) const;
  // Values per step and stream that a layer, or the session's input (-1), gives.
  int64_t width_of(int32_t layer) const;
  int64_t longest_chunk() const;
  void start();
  void grow(int64_t chunk, int threads);
  int team() const;

  struct Source {
    const void* sources[2];
    bool bfloat16;
    size_t layer;
    int matrix;
  };

  // Programs share their weights and only read them.
  struct Weights {
    std::vector<std::vector<float>> kept;
    std::vector<std::vector<SessionLevel>> levels;
    std::vector<std::vector<double>> frequencies;
    std::vector<std::vector<SessionMove>> moves;
    AlignedMemory panels;
    size_t panel_bytes = 0;
  };

  const SessionKernels& kernels_;
  int64_t batch_;
  Precision precision_;
  std::vector<SessionLayer> layers_;
  std::vector<Source> sources_;
  std::shared_ptr<Weights> weights_ = std::make_shared<Weights>();
  AlignedMemory state_, buffers_;
  int64_t chunk_ = 0;
  int threads_ = 0;
  SessionRun run_{};
};

}  // namespace seqaccel::packed
