"""Recurrent layers: drop-ins for torch.nn's, and the cells that torch has not, that also run on a stream."""

from seqaccel.nn.rnn._cells import GRUCell, LSTMCell, RNNCell
from seqaccel.nn.rnn._cfc import CfC, CfCCell
from seqaccel.nn.rnn._echo_state import EchoStateNetwork
from seqaccel.nn.rnn._gru import GRU, RNN, LayerNormGRU
from seqaccel.nn.rnn._ligru import LiGRU
from seqaccel.nn.rnn._lstm import LSTM, LayerNormLSTM, MultiplicativeLSTM, PeepholeLSTM

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CfC",
    "CfCCell",
    "EchoStateNetwork",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "MultiplicativeLSTM",
    "PeepholeLSTM",
    "RNNCell",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
