// The table of linear scans.
#include "cpu/scan/linear_scan.h"
#include "cpu/scan/scan.h"

namespace seqaccel::SEQACCEL_ISA::scan {

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels = {
    linear_scan_kernels<float>,   linear_scan_kernels<double>,         linear_scan_kernels<BFloat16>,
    linear_scan_kernels<Float16>, linear_scan_kernels<Complex<float>>, linear_scan_kernels<Complex<double>>,
};

}  // namespace seqaccel::SEQACCEL_ISA::scan
