"""Scans: the linear scan and the recurrence of SRU."""

from seqaccel.functional.scan.linear_scan import linear_scan
from seqaccel.functional.scan.sru import sru, sru_layer

__all__ = ["linear_scan", "sru", "sru_layer"]
