"""A callback for Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqaccel import _arguments
from seqaccel.convert import convert, optimize, revert
from seqaccel.convert._model import Filter, check_filter

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_info
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities import rank_zero_info
    except ModuleNotFoundError as second:
        if second.name != "pytorch_lightning":
            raise
        raise ImportError("seqaccel.integrations.lightning needs lightning: pip install lightning") from None

__all__ = ["Convert"]


class Convert(Callback):
    """Converts the model when ``Trainer.fit`` starts: :func:`seqaccel.convert`, or :func:`seqaccel.optimize`.

    Parameters, buffers and the keys of the state_dict stay as they are. So optimizers, loggers and checkpoints, those
    of before included, do not notice.

    Args:
        config, filter_fn: as :func:`seqaccel.convert` takes them.
        fullgraph: torch.compile must be able to trace the whole model. Default: ``False``.
        optimize: measure the layers, and convert those that are faster. Default: ``False``.
        example_inputs: what ``optimize`` measures with, the arguments of the model's ``forward``: a tensor, a tuple or
            a mapping of keyword arguments. Default: the model's ``example_input_array``.
        report: log what was converted, on the first rank. Default: ``True``.
        revert: undo the conversion when ``fit`` ends. Default: ``False``.

    Attributes:
        report: the :class:`~seqaccel.convert.Report`, after ``fit`` has started; before that None.

    Raises:
        TypeError, ValueError: an argument does not fit; ``optimize`` has no example.

    Example::

        from seqaccel.integrations.lightning import Convert
        trainer = lightning.Trainer(callbacks=[Convert()])
        trainer.fit(model)
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_fn: Filter | None = None,
        *,
        fullgraph: bool = False,
        optimize: bool = False,
        example_inputs: Any = None,
        report: bool = True,
        revert: bool = False,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"Convert: expected config to be a mapping, but got {type(config).__name__}")
        check_filter("Convert", filter_fn)
        _arguments.flags("Convert", fullgraph=fullgraph, optimize=optimize, report=report, revert=revert)
        if optimize and fullgraph:
            raise ValueError("Convert: optimize and fullgraph exclude each other")
        self._config, self._filter_fn, self._fullgraph = config, filter_fn, bool(fullgraph)
        self._optimize, self._example_inputs = bool(optimize), example_inputs
        self._logs, self._reverts = bool(report), bool(revert)
        self.report: Any = None

    def on_fit_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        if self._optimize:
            self.report = optimize(
                pl_module, self._example(pl_module), self._config, self._filter_fn, progress=self._logs
            )
        else:
            options = {"fullgraph": self._fullgraph}
            _, self.report = convert(pl_module, self._config, self._filter_fn, report=True, **options)
        if self._logs:
            rank_zero_info(str(self.report))

    def _example(self, pl_module: Any) -> Any:
        example = self._example_inputs
        if example is None:
            example = getattr(pl_module, "example_input_array", None)
        if example is None:
            raise ValueError("Convert: optimize needs example_inputs, or a model with an example_input_array")
        device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, example)

    def on_fit_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        if self._reverts:
            revert(pl_module)
