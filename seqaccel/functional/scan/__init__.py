"""Scans: the linear scan, and the column cells: recurrences that are elementwise in their state."""

from seqaccel.functional.scan._cells import CELLS, ColumnSpec
from seqaccel.functional.scan.column_layer import column_layer
from seqaccel.functional.scan.indrnn import indrnn
from seqaccel.functional.scan.linear_scan import linear_scan
from seqaccel.functional.scan.minimal import min_gru, min_lstm
from seqaccel.functional.scan.pool import fo_pool
from seqaccel.functional.scan.sru import sru, sru_layer

__all__ = [
    "CELLS",
    "ColumnSpec",
    "column_layer",
    "fo_pool",
    "indrnn",
    "linear_scan",
    "min_gru",
    "min_lstm",
    "sru",
    "sru_layer",
]
