// The table of linear scans.
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
};

}  // namespace seqaccel::scan

SEQACCEL_DECLARE_KERNELS(scan, ScanKernels, scan_kernels)
