"""Scans: the linear scan, and the column cells: recurrences that are elementwise in their state."""

from seqaccel.functional.scan._cells import CELLS, ColumnSpec
from seqaccel.functional.scan.column_layer import column_layer
from seqaccel.functional.scan.indrnn import indrnn
from seqaccel.functional.scan.linear_scan import join_summaries, linear_scan, scan_summary
from seqaccel.functional.scan.minimal import min_gru, min_lstm
from seqaccel.functional.scan.pool import fo_pool
from seqaccel.functional.scan.sru import sru, sru_layer

__all__ = [
    "CELLS",
    "ColumnSpec",
    "column_layer",
    "fo_pool",
    "indrnn",
    "join_summaries",
    "linear_scan",
    "min_gru",
    "min_lstm",
    "scan_summary",
    "sru",
    "sru_layer",
]
