"""sb3-contrib's recurrent policies: episodes that begin inside a sequence run in one call of their LSTM."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class


class _Policy(Unscriptable):
    """In front of the package's class, which runs a sequence with resets step by step in Python."""

    def _process_sequence(
        self: Any, features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: torch.nn.LSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The LSTM's output (n_seq * T, ·) and its last state, from features (n_seq * T, ·)."""
        if not isinstance(lstm, nn.LSTM) or lstm.bidirectional:
            return super()._process_sequence(features, lstm_states, episode_starts, lstm)  # type: ignore[misc]
        n_seq = lstm_states[0].shape[1]
        x = features.reshape(n_seq, -1, lstm.input_size).transpose(0, 1)
        reset = episode_starts.reshape(n_seq, -1).t() != 0
        output, last = lstm(x, lstm_states, reset=reset)
        return output.transpose(0, 1).flatten(0, 1), last


def policy(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``RecurrentActorCriticPolicy``, and of classes derived from it that leave ``_process_sequence`` as it is."""
    kind: Any = plain_class(module)
    for base in kind.__mro__:
        if base.__name__ == asked.name and base.__module__.partition(".")[0] == "sb3_contrib":
            if kind._process_sequence is not base._process_sequence:
                return "its own _process_sequence"
            needs = tuple(child for child in module.children() if isinstance(child, torch.nn.LSTM))
            return Swap("its episodes in one call", combined(_Policy, kind), needs=needs)
    return None
