// The table of scan kernels.
#pragma once

#include "common/scan.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::scan {

struct ScanKernels {
  void (*linear_forward_float)(const LinearScanForward<float>&);
  void (*linear_forward_double)(const LinearScanForward<double>&);
  void (*linear_backward_float)(const LinearScanBackward<float>&);
  void (*linear_backward_double)(const LinearScanBackward<double>&);
  void (*sru_forward_float)(const SruForward<float>&);
  void (*sru_forward_double)(const SruForward<double>&);
  void (*sru_backward_float)(const SruBackward<float>&);
  void (*sru_backward_double)(const SruBackward<double>&);
};

}  // namespace seqaccel::scan

SEQACCEL_DECLARE_KERNELS(scan, ScanKernels, scan_kernels)
