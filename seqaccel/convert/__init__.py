"""Swap the layers of an existing model, and take over the weights of other packages: one file per source."""

from seqaccel.convert import locuslab as locuslab  # so that checkpoints load
from seqaccel.convert import pytorch_tcn as pytorch_tcn
from seqaccel.convert import sru as sru
from seqaccel.convert._model import convert, revert
from seqaccel.convert._report import Report
from seqaccel.convert.haste import from_haste
from seqaccel.convert.measure import benchmark, optimize
from seqaccel.convert.mingru import from_mingru
from seqaccel.convert.mlstm import from_mlstm
from seqaccel.convert.qrnn import from_qrnn
from seqaccel.convert.torch import REPLACEMENTS, patch_torch, unpatch_torch

__all__ = ["REPLACEMENTS", "Report", "convert", "from_haste", "from_mingru", "from_mlstm", "from_qrnn"]
__all__ += ["benchmark", "optimize", "patch_torch", "revert", "unpatch_torch"]
