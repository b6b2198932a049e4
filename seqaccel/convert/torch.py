"""Layers of torch.nn."""

import torch

from seqaccel import nn

#: What each torch layer becomes. It has the same attributes and parameters, so that changing the class is enough.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces every torch.nn layer that has a drop-in here, in place.

    The layers are ``RNN``, ``LSTM``, ``GRU``, ``RNNCell``, ``LSTMCell`` and ``GRUCell``; subclasses of them are left
    alone. Parameters, buffers, hooks, names and the training mode stay what they are, so optimisers and checkpoints
    made before stay valid.

    A converted layer is a ``torch.nn.RNNBase`` (or ``RNNCellBase``) but not a ``torch.nn.LSTM``. Code that uses
    ``isinstance(layer, torch.nn.LSTM)`` to tell (h, c) from h must test ``layer.mode == "LSTM"``, or
    ``isinstance(layer, (torch.nn.LSTM, seqaccel.nn.LSTM))``.

    Args:
        model: any module.

    Returns:
        ``model``, or, if it is such a layer itself, the same object with its new class.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
        >>> type(seqaccel.convert(model)[0])
        <class 'seqaccel.nn.rnn.LSTM'>
    """
    if not isinstance(model, torch.nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"convert: expected model to be a torch.nn.Module, but got {kind}")
    for module in model.modules():
        replacement = REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
    return model
