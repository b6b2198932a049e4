"""Scans on a GPU, in Triton: ``linear_scan.py`` (linear in the state) and ``sru.py``."""

from seqaccel.kernels.scan import linear_scan, sru
from seqaccel.kernels.scan.linear_scan import linear_scan_backward, linear_scan_forward
from seqaccel.kernels.scan.sru import sru_backward, sru_forward

__all__ = ["CONFIGURATIONS", "linear_scan_backward", "linear_scan_forward", "sru_backward", "sru_forward"]

#: What is shipped.
CONFIGURATIONS = [*linear_scan.CONFIGURATIONS, *sru.CONFIGURATIONS]
