#include "autograd/node.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  seqaccel::bind_layers(m);
  seqaccel::bind_convolutions(m);
}
