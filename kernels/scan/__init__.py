"""Scans on a GPU, in Triton: ``linear_scan.py`` (linear in the state), ``columns.py`` (elementwise) and ``sru.py``."""

from seqaccel.kernels.scan import columns, linear_scan, sru
from seqaccel.kernels.scan.columns import column_backward, column_forward
from seqaccel.kernels.scan.linear_scan import linear_scan_backward, linear_scan_forward
from seqaccel.kernels.scan.sru import sru_backward, sru_forward

__all__ = ["CONFIGURATIONS", "column_backward", "column_forward", "linear_scan_backward", "linear_scan_forward"]
__all__ += ["sru_backward", "sru_forward"]

#: What is shipped.
CONFIGURATIONS = [*linear_scan.CONFIGURATIONS, *columns.CONFIGURATIONS, *sru.CONFIGURATIONS]
