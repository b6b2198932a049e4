// Whether this library has code that a GPU, and its driver, can run.
#include <cuda_runtime.h>

namespace seqaccel {
namespace {

__global__ void any_kernel() {}

}  // namespace
}  // namespace seqaccel

// Returns why there is none, or null. Does not change the current device. seqaccel/_extension.py calls it.
extern "C" __attribute__((visibility("default"))) const char* seqaccel_cuda_error(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, seqaccel::any_kernel);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // clears the error
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
