"""Layers of the package speechbrain."""

from typing import Any

import torch
from torch import Tensor

from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class
from seqaccel.functional import ligru


class _Layer(Unscriptable):
    """speechbrain's layer, whose loop over steps runs in our kernels."""

    def _ligru_cell(self: Any, w: Tensor, ht: Tensor) -> Tensor:
        """States (B, T, H) from the normalised products w (B, T, 2 H)."""
        mask = None
        if self.training and self.dropout:
            mask = self._sample_drop_mask(w).to(w.dtype)
        kind = "tanh" if isinstance(self.act, torch.nn.Tanh) else "relu"
        h_0 = ht.to(w.dtype).expand(w.shape[0], -1)
        output, _ = ligru(w.transpose(0, 1), h_0, None, self.u.weight, mask=mask, nonlinearity=kind)
        return output.transpose(0, 1)


def layer(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``speechbrain.nnet.RNN.LiGRU_Layer``, a layer of ``LiGRU``."""
    kind: Any = plain_class(module)
    if (kind.__name__, kind.__module__.partition(".")[0]) != ("LiGRU_Layer", "speechbrain"):
        return None
    act = getattr(module, "act", None)
    if not isinstance(act, (torch.nn.ReLU, torch.nn.Tanh)):
        title = getattr(act, "__name__", type(act).__name__)
        return f"its nonlinearity is {title}: expected ReLU or Tanh"
    return Swap("seqaccel.functional.ligru", combined(_Layer, kind))
