"""The operators as functions."""

from seqaccel.functional.rnn import lstm
from seqaccel.functional.scan import linear_scan, sru

__all__ = ["linear_scan", "lstm", "sru"]
