"""TorchRL's LSTMModule and GRUModule: all episodes of a batch of trajectories run as one packed sequence."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class

_LAYERS = {"LSTMModule": ("lstm", (torch.nn.LSTM, nn.LSTM)), "GRUModule": ("gru", (torch.nn.GRU, nn.GRU))}


class _Episodes:
    """The E episodes of trajectories (B, T), the longest first; a step is a number below N = B * T."""

    def __init__(self, is_init: Tensor) -> None:
        begins = is_init.clone()
        begins[:, 0] = True
        begins = begins.flatten()
        steps = torch.arange(len(begins), device=begins.device)
        first = steps[begins]
        lengths = first.diff(append=first.new_full((1,), len(begins)))
        longest = lengths.argsort(descending=True, stable=True)
        rank = torch.empty_like(longest).index_copy(0, longest, steps[: len(longest)])
        episode = begins.cumsum(0) - 1
        time = steps - first[episode]
        sizes = time.bincount()
        self.first = first[longest]  # [E] their first steps
        self.last = self.first + lengths[longest] - 1  # [E]
        self.places = (sizes.cumsum(0) - sizes)[time] + rank[episode]  # [N] where a packed sequence has the steps
        self.steps = torch.empty_like(steps).index_copy(0, self.places, steps)  # [N] the steps as that has them
        self.batch_sizes = sizes.cpu()


@torch.compiler.disable  # the number of episodes is the size of tensors
def _run(layer: Any, input: Tensor, stored: tuple[Tensor, ...], is_init: Tensor) -> tuple[Tensor, ...]:
    """All episodes of input (B, T, I), each from the states (B, T, layers, ·) that are stored with its first step.

    Returns the output (B, T, ·) and, laid out as the stored ones, the states after the last step of each episode; they
    are zero at the other steps.
    """

    def called(input: Any, states: list[Tensor]) -> tuple[Any, list[Tensor]]:
        hx = [part.transpose(0, 1).contiguous() for part in states]
        output, last = layer(input, tuple(hx) if len(hx) > 1 else hx[0])
        return output, [part.transpose(0, 1) for part in (last if len(hx) > 1 else (last,))]

    shape = input.shape[:2]
    is_init = is_init.reshape(shape)
    if not is_init[:, 1:].any():
        output, last = called(input, [part[:, 0] for part in stored])
        return output, *(pad(part.unsqueeze(1), (0, 0, 0, 0, shape[1] - 1, 0)) for part in last)
    episodes = _Episodes(is_init)
    packed = PackedSequence(input.flatten(0, 1).index_select(0, episodes.steps), episodes.batch_sizes)
    output, last = called(packed, [part.flatten(0, 1).index_select(0, episodes.first) for part in stored])
    results = [output.data.index_select(0, episodes.places)]
    for part in last:
        results.append(part.new_zeros(len(episodes.steps), *part.shape[1:]).index_copy(0, episodes.last, part))
    return tuple(result.unflatten(0, shape) for result in results)


class _Module(Unscriptable):
    """In front of the package's class, whose backend "triton" gives these methods the trajectories as they are."""

    def _lstm_triton_with_resets(self: Any, input: Tensor, h: Tensor, c: Tensor, is_init: Tensor) -> Any:
        if not isinstance(self.lstm, _LAYERS["LSTMModule"][1]):  # its make_python_based was called
            return self._lstm_pad_with_resets(input, h, c, is_init)
        return _run(self.lstm, input, (h, c), is_init)

    def _gru_triton_with_resets(self: Any, input: Tensor, h: Tensor, is_init: Tensor) -> Any:
        if not isinstance(self.gru, _LAYERS["GRUModule"][1]):
            return self._gru_pad_with_resets(input, h, is_init)
        return _run(self.gru, input, (h,), is_init)


def module(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``LSTMModule`` and ``GRUModule``, and of classes derived from them that leave ``forward`` as it is."""
    m: Any = module
    kind: Any = plain_class(module)
    for base in kind.__mro__:
        if base.__name__ in _LAYERS and base.__module__.partition(".")[0] == "torchrl":
            name, layers = _LAYERS[base.__name__]
            if kind.forward is not base.forward:
                return "its own forward"
            if not hasattr(base, f"_{name}_triton_with_resets"):
                return "not the module that torchrl 0.14 has"
            if m.recurrent_backend != "pad" and not isinstance(m, _Module):
                return f"its recurrent_backend is {m.recurrent_backend}"
            if not isinstance(getattr(m, name), layers):
                return "python_based"
            return Swap("its episodes in one call", combined(_Module, kind), {"recurrent_backend": "triton"})
    return None
