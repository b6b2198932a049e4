"""Layers whose recurrence is elementwise: a product over all steps, then a scan."""

from seqaccel.nn.scan._indrnn import IndRNN
from seqaccel.nn.scan._minimal import MinGRU, MinLSTM
from seqaccel.nn.scan._qrnn import QRNN
from seqaccel.nn.scan._sru import SRU, SRUCell
from seqaccel.nn.scan._sru_pp import SRUpp

__all__ = ["QRNN", "SRU", "IndRNN", "MinGRU", "MinLSTM", "SRUCell", "SRUpp"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
