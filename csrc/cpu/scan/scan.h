// The table of scan kernels.
#pragma once

#include "common/scan.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::scan {

template <typename T>
struct LinearScanKernels {
  void (*forward)(const LinearScanForward<T>&);
  void (*backward)(const LinearScanBackward<T>&);
};

struct ScanKernels {
  LinearScanKernels<float> linear_float;
  LinearScanKernels<double> linear_double;
  LinearScanKernels<BFloat16> linear_bfloat16;
  LinearScanKernels<Float16> linear_float16;
  LinearScanKernels<Complex<float>> linear_complex_float;
  LinearScanKernels<Complex<double>> linear_complex_double;
  void (*sru_forward_float)(const SruForward<float>&);
  void (*sru_forward_double)(const SruForward<double>&);
  void (*sru_backward_float)(const SruBackward<float>&);
  void (*sru_backward_double)(const SruBackward<double>&);
};

}  // namespace seqaccel::scan

SEQACCEL_DECLARE_KERNELS(scan, ScanKernels, scan_kernels)
