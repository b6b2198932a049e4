"""Scans on a GPU, in Triton: ``linear_scan.py``, and ``columns.py`` for every cell that is elementwise in its state."""

from seqaccel.kernels.scan import columns, linear_scan
from seqaccel.kernels.scan.columns import column_backward, column_forward
from seqaccel.kernels.scan.linear_scan import linear_scan_backward, linear_scan_forward

__all__ = ["CONFIGURATIONS", "column_backward", "column_forward", "linear_scan_backward", "linear_scan_forward"]

#: What is shipped.
CONFIGURATIONS = [*linear_scan.CONFIGURATIONS, *columns.CONFIGURATIONS]
