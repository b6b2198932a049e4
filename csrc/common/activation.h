// The activations of convolutions and sessions, and their names.
#pragma once

#include <cstdint>
#include <cstring>

namespace seqaccel {

// glu and gated take two values: the second one's sigmoid times the first one, or times its tanh.
enum class Activation : int64_t {
  none,
  relu,
  leaky_relu,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  sigmoid,
  glu,
  gated,
  elu,
  hardswish,
};

constexpr const char* kActivations[] = {"none", "relu",    "leaky_relu", "silu",  "gelu", "gelu_tanh",
                                        "tanh", "sigmoid", "glu",        "gated", "elu",  "hardswish"};

constexpr bool is_gated(Activation a) { return a == Activation::glu || a == Activation::gated; }

// Its number, or -1.
inline int activation_of(const char* name) {
  int i = 0;
  for (const char* const known : kActivations) {
    if (std::strcmp(name, known) == 0) return i;
    ++i;
  }
  return -1;
}

}  // namespace seqaccel
