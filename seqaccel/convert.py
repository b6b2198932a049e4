"""Swap the layers of an existing model."""

import torch

from seqaccel import nn

__all__ = ["convert"]

#: What each torch layer becomes. It has the same attributes and parameters, so that changing the class is enough.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {torch.nn.LSTM: nn.LSTM}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every torch.nn layer of a model that has a drop-in here that drop-in, in place.

    Parameters, buffers, hooks, names and the training mode stay what they are, so that optimisers and checkpoints made
    before go on working. Subclasses of a torch layer are left alone. Now: ``torch.nn.LSTM``.

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
    for module in model.modules():
        replacement = REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
    return model
