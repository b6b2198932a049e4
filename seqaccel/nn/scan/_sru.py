"""Simple recurrent units."""

import copy
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqaccel import _arguments, functional
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.checkpoints import Checkpoints
from seqaccel.nn.scan._packed import padded, repacked
from seqaccel.nn.streaming import State, Streaming

__all__ = ["SRU", "SRUCell"]


def check_masks(title: str, input: Tensor, mask_pad: Tensor | None, reset: Tensor | None) -> None:
    """(T, B) for an input (T, B, I); padding may be marked by integers."""
    shape = tuple(input.shape[:2])
    if mask_pad is not None:
        if tuple(mask_pad.shape) != shape:
            raise ValueError(f"{title}: expected mask_pad to have shape {shape}, but got {tuple(mask_pad.shape)}")
        if mask_pad.is_floating_point():
            raise TypeError(f"{title}: expected mask_pad to be bool or integers, but got {mask_pad.dtype}")
    if reset is not None:
        _arguments.reset(title, reset, shape, input.device)


def by_direction(states: Tensor, directions: int) -> Tensor:
    """(layers * directions, B, H) from (layers, B, directions * H), as torch.nn has them."""
    layers, batch, width = states.shape
    split = states.view(layers, batch, directions, width // directions)
    return split.transpose(1, 2).reshape(layers * directions, batch, width // directions)


def _order(indices: Tensor | None) -> Any:
    return slice(None) if indices is None else indices


class SRUCell(Leaf, Checkpoints, nn.Module):
    r"""One layer of :class:`SRU`: a matrix product over all steps, then :func:`seqaccel.functional.sru`.

    Constructor, parameters and results are those of ``sru.SRUCell`` (package ``sru`` 2.6).

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        dropout: probability that a channel of ``r`` is dropped, the same for all steps. Default: 0.
        rnn_dropout: probability that a feature of the input is dropped, the same for all steps. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        n_proj: factorise the weight through this many features, where both of its sides have more. Default: 0, do not.
        use_tanh: apply tanh to the state. Default: ``False``.
        highway_bias: initial bias of the gate r. Default: 0.
        has_skip_term: add the (projected) input to the output through the highway connection. Default: ``True``.
        layer_norm: normalise the input of the matrix product. Default: ``False``.
        rescale: scale the skip term by :math:`\sqrt{1 + 2 e^b}`, b the ``highway_bias``. Default: ``True``.
        v1: no recurrent weights. Default: ``False``.
        custom_m: module that computes u (T, B, output_size * k) from the input, in place of the matrix product. It may
            return a second tensor (T, B, output_size * 2), added to the recurrent weights of each step.
        amp_recurrence_fp16: under autocast to float16, return float16 and not float32. Default: ``False``.
        normalize_after: with ``layer_norm``, normalise the output and not the input. Default: ``False``.
        weight_c_init: recurrent weights start uniform in [-weight_c_init, weight_c_init]. Default: variance 1/2.
        nn_rnn_compatible_return: return the state as (directions, B, hidden_size). Default: ``False``.
        device, dtype: of the parameters.

    Example:
        >>> import torch, seqaccel.nn
        >>> layer = seqaccel.nn.SRUCell(8, 16, bidirectional=True)
        >>> output, c_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 32]), torch.Size([3, 32]))
    """

    layer_norm: nn.LayerNorm | None
    scale_x: Tensor
    custom_m: Any

    _custom: ClassVar[str] = "custom_m"  # the attribute that has the module in the product's place

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        n_proj: int = 0,
        use_tanh: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        layer_norm: bool = False,
        rescale: bool = True,
        v1: bool = False,
        custom_m: nn.Module | None = None,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        nn_rnn_compatible_return: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _arguments.flags("SRU", nn_rnn_compatible_return=nn_rnn_compatible_return)
        _arguments.flags(
            "SRU", bidirectional=bidirectional, use_tanh=use_tanh, has_skip_term=has_skip_term, layer_norm=layer_norm,
            rescale=rescale, v1=v1, amp_recurrence_fp16=amp_recurrence_fp16, normalize_after=normalize_after,
        )  # fmt: skip
        _arguments.integer("SRU", "projection_size", n_proj, 0)
        _arguments.number("SRU", "highway_bias", highway_bias)
        if weight_c_init is not None:
            _arguments.number("SRU", "weight_c_init", weight_c_init)
        if custom_m is not None and not isinstance(custom_m, nn.Module):
            raise TypeError(f"SRU: expected custom_m to be a module, but got {type(custom_m).__name__}")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            _arguments.integer("SRU", name, size)
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, but got {size}")
        for name, p in (("dropout", dropout), ("rnn_dropout", rnn_dropout)):
            _arguments.number("SRU", name, p)
            if not 0 <= p <= 1:
                raise ValueError(f"{name} should be a number in range [0, 1], but got {p}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * 2 if bidirectional else hidden_size
        self.dropout = float(dropout)
        self.rnn_dropout = float(rnn_dropout)
        self.bidirectional = bidirectional
        self.use_tanh = use_tanh
        self.highway_bias = highway_bias
        self.has_skip_term = has_skip_term
        self.rescale = rescale
        self.v1 = v1
        setattr(self, self._custom, custom_m)
        self.amp_recurrence_fp16 = amp_recurrence_fp16
        self.normalize_after = normalize_after
        self.weight_c_init = weight_c_init
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        self.projection_size = n_proj if 0 < n_proj < min(input_size, self.output_size) else 0
        self.num_matrices = 4 if has_skip_term and input_size != self.output_size else 3
        where = {"device": device, "dtype": dtype}
        self.weight_proj: nn.Parameter | None = None
        if custom_m is None:
            inner = input_size
            if self.projection_size:
                inner = self.projection_size
                self.weight_proj = nn.Parameter(torch.empty(input_size, inner, **where))
            self.weight = nn.Parameter(torch.empty(inner, self.output_size * self.num_matrices, **where))
        self.weight_c = nn.Parameter(torch.empty(2 * self.output_size, **where))
        self.bias = nn.Parameter(torch.empty(2 * self.output_size, **where))
        self.register_buffer("scale_x", torch.ones(1, **where))
        normalized = self.output_size if normalize_after else input_size
        self.layer_norm = nn.LayerNorm(normalized, **where) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as the package does: unit variance of u, smaller gates, variance 1/2 of ``weight_c``."""
        scale = math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale and self.has_skip_term else 1.0
        custom_m = getattr(self, self._custom)
        with torch.no_grad():
            self.bias.zero_()
            self.bias[self.output_size :] = self.highway_bias
            self.scale_x.fill_(scale)
            if custom_m is None:
                for weight in (self.weight, self.weight_proj):
                    if weight is not None:
                        bound = math.sqrt(3.0 / weight.shape[0])
                        weight.uniform_(-bound, bound)
                matrices = self.weight.view(self.weight.shape[0], -1, self.num_matrices)
                matrices[..., 0] *= math.sqrt(1 - self.dropout)
                matrices *= math.sqrt(1 - self.rnn_dropout)
                if self.layer_norm is not None:
                    matrices *= 0.1
                if self.num_matrices == 4:
                    matrices[..., 3] *= scale
                if not self.v1:
                    matrices[..., 1:3] *= math.sqrt(0.5)
            elif hasattr(custom_m, "reset_parameters"):
                custom_m.reset_parameters()
            else:
                warnings.warn(
                    f"custom_m was not reset: {type(custom_m).__name__} has no reset_parameters()", stacklevel=2
                )
            if self.v1:
                self.weight_c.zero_()
                self.weight_c.requires_grad_(False)
            else:
                bound = math.sqrt(1.5) if self.weight_c_init is None else self.weight_c_init
                self.weight_c.uniform_(-bound, bound)

    def forward(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the layer.

        Args:
            input: (T, B, input_size), (B, input_size) for one step, or a ``PackedSequence``.
            c0: (B, output_size). Default: zero.
            mask_pad: (T, B), nonzero at padding. Default: no padding.
            reset: (T, B) bool, true where an episode begins: the state before its first step (against time: after its
                last) is zero, and so ``c0`` is not read where one begins at the first step. Default: none.

        Returns:
            The output (T, B, output_size), packed if the input was; and the last state (B, output_size), or
            (directions, B, hidden_size) with ``nn_rnn_compatible_return``.
        """
        if isinstance(input, PackedSequence):
            x, mask_pad = padded(type(self).__name__, input, mask_pad, reset)
            h, c_n = self._run(x, c0 if c0 is None else c0[_order(input.sorted_indices)], mask_pad, None)
            return repacked(h, input), self._laid_out(c_n[_order(input.unsorted_indices)])
        if not isinstance(input, Tensor):
            return self._instead("input", input, c0=c0, mask_pad=mask_pad, reset=reset)
        h, c_n = self._run(input, c0, mask_pad, reset)
        return h, self._laid_out(c_n)

    def _laid_out(self, c_n: Tensor) -> Tensor:
        if not self.nn_rnn_compatible_return:
            return c_n
        return by_direction(c_n.unsqueeze(0), 2 if self.bidirectional else 1)

    def _run(
        self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, reset: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        """The output and the last state (B, output_size)."""
        _arguments.optional_tensors("SRU", c0=c0, mask_pad=mask_pad, reset=reset)
        if input.dim() not in (2, 3):
            raise ValueError(f"SRU: expected input to be 2-D or 3-D, but got {input.dim()}-D")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        x = input if input.dim() == 3 else input.unsqueeze(0)
        if mask_pad is not None or reset is not None:
            check_masks("SRU", x, mask_pad, reset)
        batch = x.shape[1]
        skip = x if self.has_skip_term and self.num_matrices == 3 else None
        if self.layer_norm is not None and not self.normalize_after:
            x = self.layer_norm(x)
        if self.training and self.rnn_dropout > 0:
            x = x * self._dropout_mask(batch, self.input_size, self.rnn_dropout)
        mask_c = None
        if self.training and self.dropout > 0:
            mask_c = self._dropout_mask(batch, self.output_size, self.dropout)
        options: dict[str, Any] = {
            "mask_c": mask_c,
            "mask_pad": None if mask_pad is None else mask_pad.to(torch.bool),
            "scale_x": self.scale_x if self.rescale and skip is not None else None,
            "directions": 2 if self.bidirectional else 1,
            "use_tanh": self.use_tanh,
            "reset": reset,
        }
        h, c_n = self._layer(x, skip, c0, options, **attention)
        half = self.amp_recurrence_fp16 and torch.is_autocast_enabled(x.device.type)
        if half and torch.get_autocast_dtype(x.device.type) == torch.float16:
            h, c_n = h.half(), c_n.half()
        if self.layer_norm is not None and self.normalize_after:
            h = self.layer_norm(h)
        return h, c_n

    def _layer(
        self, x: Tensor, skip: Tensor | None, c0: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The product and the recurrence."""
        if self.custom_m is not None:
            u, weight_c = self._product(x)
            return functional.sru(u, skip, weight_c, self.bias, c0, **options)
        if self.weight_proj is not None:
            x = x @ self.weight_proj
        return functional.sru_layer(x, self.weight, skip, self.weight_c, self.bias, c0, **options)

    def _product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u (T, B, output_size * k) of ``custom_m``, and the recurrent weights."""
        result = self.custom_m(x)
        parts = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(parts) > 2:
            raise ValueError(f"SRU: expected custom_m to return 1 or 2 tensors, but got {len(parts)}")
        features = self.output_size * self.num_matrices
        if parts[0].shape[-1] != features:
            raise ValueError(f"SRU: expected custom_m to return {features} features, but got {parts[0].shape[-1]}")
        u = parts[0].reshape(x.shape[0], x.shape[1], features)
        if len(parts) == 1:
            return u, self.weight_c
        return u, parts[1] + self.weight_c

    def _dropout_mask(self, batch: int, features: int, p: float) -> Tensor:
        kept = self.bias.detach().new_empty(batch, features).bernoulli_(1 - p)
        return kept.div_(1 - p) if p < 1 else kept

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "projection_size": 0,
            "dropout": 0.0,
            "rnn_dropout": 0.0,
            "bidirectional": False,
            "highway_bias": 0.0,
            "use_tanh": False,
            "v1": False,
            "rescale": None,
            "has_skip_term": True,
            "normalize_after": False,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class SRU(Leaf, Streaming, nn.Module):
    r"""A stack of simple recurrent units with the constructor, state_dict and results of ``sru.SRU`` (``sru`` 2.6).

    .. math::
        u_t &= x_t W \\
        f_t &= \sigma(u^1_t + w_f \odot c_{t-1} + b_f) \\
        r_t &= \sigma(u^2_t + w_r \odot c_{t-1} + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot u^0_t \\
        h_t &= s_t + m \odot r_t \odot (g(c_t) - s_t)

    The skip term s is :math:`\alpha x` where the layer's input has the size of its output, else the fourth matrix
    :math:`u^3`; m is the dropout mask. Checkpoints of versions 2.x and 3.0 load.

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        num_layers: number of layers. Default: 2.
        dropout: probability that a channel of ``r`` is dropped, the same for all steps, on every layer but the last.
            Default: 0.
        rnn_dropout: probability that a feature of a layer's input is dropped, the same for all steps. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        projection_size: factorise each weight through this many features, where both of its sides have more.
            Default: 0, do not.
        use_tanh: g is tanh. Default: ``False``, the identity.
        layer_norm: normalise each layer's input. Default: ``False``.
        highway_bias: initial bias of the gate r. Default: 0.
        has_skip_term: use the skip term; ``False``: s = 0. Default: ``True``.
        rescale: :math:`\alpha = \sqrt{1 + 2 e^b}`, b the ``highway_bias``. Default: ``False``, 1.
        v1: :math:`w_f = w_r = 0`. Default: ``False``.
        nn_rnn_compatible_return: return the state as (num_layers * directions, B, hidden_size). Default: ``False``.
        custom_m: module, or one per layer, that computes u in place of the matrix product; see :class:`SRUCell`.
        proj_input_to_hidden_first: first project the input to the size of the output. Default: ``False``.
        amp_recurrence_fp16: under autocast to float16, return float16 and not float32. Default: ``False``.
        normalize_after: with ``layer_norm``, normalise each layer's output and not its input. Default: ``False``.
        weight_c_init: recurrent weights start uniform in [-weight_c_init, weight_c_init]. Default: variance 1/2.
        device, dtype: of the parameters.

    The streaming state is ``(c,)`` with c (B, num_layers, hidden_size).

    Source: Lei, Zhang, Wang, Dai and Artzi, *Simple Recurrent Units for Highly Parallelizable Recurrence*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.SRU(8, 16, num_layers=2)
        >>> output, c_n = model(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
        >>> state = model.init_state(batch_size=3)
        >>> y, state = model.step(torch.randn(3, 8), state)
        >>> y.shape
        torch.Size([3, 16])
    """

    rnn_lst: nn.ModuleList
    input_to_hidden: nn.Linear | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int = 0,
        use_tanh: bool = False,
        layer_norm: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = False,
        v1: bool = False,
        nn_rnn_compatible_return: bool = False,
        custom_m: nn.Module | list[nn.Module] | None = None,
        proj_input_to_hidden_first: bool = False,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _arguments.flags("SRU", nn_rnn_compatible_return=nn_rnn_compatible_return)
        _arguments.flags("SRU", proj_input_to_hidden_first=proj_input_to_hidden_first, bidirectional=bidirectional)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _arguments.integer("SRU", name, size)
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, but got {num_layers}")
        if isinstance(custom_m, (list, nn.ModuleList)) and len(custom_m) != num_layers:
            raise ValueError(f"SRU: expected one custom_m a layer, {num_layers}, but got {len(custom_m)}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * 2 if bidirectional else hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.projection_size = projection_size
        self.bidirectional = bidirectional
        self.use_layer_norm = layer_norm
        self.has_skip_term = has_skip_term
        self.num_directions = 2 if bidirectional else 1
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        self.amp_recurrence_fp16 = amp_recurrence_fp16
        self.input_to_hidden = None
        first_size = input_size
        if proj_input_to_hidden_first and input_size != self.output_size:
            first_size = self.output_size
            self.input_to_hidden = nn.Linear(input_size, self.output_size, bias=False, device=device, dtype=dtype)
        layers = []
        for i in range(num_layers):
            custom = custom_m[i] if isinstance(custom_m, (list, nn.ModuleList)) else copy.deepcopy(custom_m)
            layers.append(
                SRUCell(
                    first_size if i == 0 else self.output_size,
                    hidden_size,
                    dropout=dropout if i + 1 < num_layers else 0.0,
                    rnn_dropout=rnn_dropout,
                    bidirectional=bidirectional,
                    n_proj=projection_size,
                    use_tanh=use_tanh,
                    highway_bias=highway_bias,
                    has_skip_term=has_skip_term,
                    layer_norm=layer_norm,
                    rescale=rescale,
                    v1=v1,
                    custom_m=custom,
                    amp_recurrence_fp16=amp_recurrence_fp16,
                    normalize_after=normalize_after,
                    weight_c_init=weight_c_init,
                    device=device,
                    dtype=dtype,
                )
            )
        self.rnn_lst = nn.ModuleList(layers)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for layer in self.rnn_lst:
            if isinstance(layer, SRUCell):
                layer.reset_parameters()
        if self.input_to_hidden is not None:
            self.input_to_hidden.reset_parameters()

    def forward(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers.

        Args:
            input: (T, B, input_size), or a ``PackedSequence``.
            c0: (num_layers, B, output_size), output_size = directions * hidden_size. Default: zero.
            mask_pad: (T, B), nonzero at padding, where the state is carried over and the output is 0.
                Default: no padding.
            reset: (T, B) bool, true where an episode begins: the state before its first step (against time: after its
                last) is zero, and so ``c0`` is not read where one begins at the first step. Default: none.

        Returns:
            The output (T, B, output_size), packed if the input was; and the last state (num_layers, B, output_size), or
            (num_layers * directions, B, hidden_size) with ``nn_rnn_compatible_return``.

        Raises:
            ValueError: shapes that do not fit.
        """
        if isinstance(input, PackedSequence):
            x, mask_pad = padded("SRU", input, mask_pad, reset)
            output, c_n = self._run(x, c0 if c0 is None else c0[:, _order(input.sorted_indices)], mask_pad, None)
            return repacked(output, input), self._laid_out(c_n[:, _order(input.unsorted_indices)])
        if not isinstance(input, Tensor):
            return self._instead("input", input, c0=c0, mask_pad=mask_pad, reset=reset)
        output, c_n = self._run(input, c0, mask_pad, reset)
        return output, self._laid_out(c_n)

    def _laid_out(self, c_n: Tensor) -> Tensor:
        return by_direction(c_n, self.num_directions) if self.nn_rnn_compatible_return else c_n

    def _run(
        self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output and the last state (num_layers, B, output_size)."""
        _arguments.optional_tensors("SRU", c0=c0, mask_pad=mask_pad, reset=reset)
        if input.dim() != 3:
            raise ValueError(f"SRU: expected input to be 3-D (T, B, input_size), but got {input.dim()}-D")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        batch = input.shape[1]
        if c0 is not None and tuple(c0.shape) != (self.num_layers, batch, self.output_size):
            raise ValueError(f"Expected hidden size {(self.num_layers, batch, self.output_size)}, got {list(c0.shape)}")
        x = input if self.input_to_hidden is None else self.input_to_hidden(input)
        states = []
        for i, layer in enumerate(self.rnn_lst):
            x, c = layer(x, None if c0 is None else c0[i], mask_pad, reset)
            states.append(c)
        return x, torch.stack(states)

    def _require_causal(self) -> None:
        if self.bidirectional:
            raise RuntimeError("a bidirectional SRU sees the future: it cannot run on a stream")

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """``(c,)``, c (batch_size, num_layers, hidden_size), zero."""
        self._require_causal()
        _arguments.integer("SRU", "batch_size", batch_size, 0)
        shape = (batch_size, self.num_layers, self.hidden_size)
        return (self.rnn_lst[0].get_parameter("bias").detach().new_zeros(shape, device=device, dtype=dtype),)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (T, B, hidden_size) for a chunk (T, B, input_size), and the state after it."""
        self._require_causal()
        _arguments.tensor("SRU", "x", x)
        _arguments.states("SRU", "state", state, ("c",))
        output, c_n = self._run(x, state[0].transpose(0, 1), None, None)
        return output, (c_n.transpose(0, 1).clone(memory_format=torch.contiguous_format),)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (B, hidden_size) for one step (B, input_size), and the state after it."""
        _arguments.tensor("SRU", "x_t", x_t)
        if x_t.dim() != 2:
            raise ValueError(f"SRU: expected x_t to be 2-D (B, input_size), but got {x_t.dim()}-D")
        output, state = self.extend(x_t.unsqueeze(0), state)
        return output[0], state

    def reset(self, state: State, mask: Tensor) -> State:
        self._require_causal()
        return super().reset(state, mask)
