"""Recurrent layers: drop-ins for torch.nn's, with the same parameters, that also run on a stream."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqaccel.functional.rnn import lstm
from seqaccel.nn.streaming import Streaming

__all__ = ["LSTM"]

Hidden = tuple[Tensor, Tensor]


class LSTM(Streaming, torch.nn.RNNBase):
    r"""Multi-layer long short-term memory: torch.nn.LSTM on our kernels.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + b_{i,f,o} + U_{i,f,o} h_{t-1} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Parameters, their names, initialisation and state_dict are torch.nn.LSTM's, and so are the layouts of inputs and
    outputs.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each fed with the output of the one below. Default: 1.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        batch_first: input and output are (B, T, ·), not (T, B, ·). Default: ``False``.
        dropout: probability of zeroing an output of any layer but the last, in training. Default: 0.
        bidirectional: a second set of weights runs from the last step to the first; outputs are concatenated. Default:
            ``False``.
        proj_size: P > 0: h is projected to P features by ``weight_hr``. Only the backends ``reference`` and ``torch``
            have it; on the default backend ``torch`` serves. Default: 0, no projection.
        device, dtype: of the parameters.

    Shapes, with D directions and L layers:
        - ``forward(input, hx=None)``: input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) unbatched, or a
          PackedSequence; hx = (h_0, c_0), (D * L, B, P or H) and (D * L, B, H), by default zero. Returns output
          (T, B, D * (P or H)) and (h_n, c_n).
        - streaming: the state is (h, c), (B, L, P or H) and (B, L, H). A bidirectional module does not stream.

    Raises:
        ValueError, RuntimeError: what torch.nn.LSTM raises for inputs that do not fit.

    Source: Hochreiter and Schmidhuber, *Long short-term memory*, 1997; torch.nn.LSTM.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> state = lstm.init_state(3)
        >>> y_t, state = lstm.step(torch.randn(3, 10), state)
        >>> y_t.shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    def _layer_weights(self, index: int) -> list[Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one layer and direction."""
        weights: list[Tensor | None] = [getattr(self, name) for name in self._all_weights[index]]
        projection = weights.pop() if self.proj_size > 0 else None
        if not self.bias:
            weights += [None, None]
        return [*weights, projection]

    def _run(self, input: Tensor, hx: Hidden | None, lengths: Tensor | None) -> tuple[Tensor, Hidden]:
        """All layers on input (T, B, I); hx as forward's."""
        directions = 2 if self.bidirectional else 1
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                input = torch.nn.functional.dropout(input, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                output, (h, c) = lstm(
                    input,
                    None if hx is None else (hx[0][index], hx[1][index]),
                    *self._layer_weights(index),  # type: ignore[arg-type]
                    lengths=lengths,
                    reverse=direction == 1,
                )
                outputs.append(output)
                last_h.append(h)
                last_c.append(c)
            input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return input, (torch.stack(last_h), torch.stack(last_c))

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Hidden, batch_sizes: Tensor | None) -> None:  # type: ignore[override]
        self.check_input(input, batch_sizes)
        self.check_hidden_size(
            hidden[0], self.get_expected_hidden_size(input, batch_sizes), "Expected hidden[0] size {}, got {}"
        )
        self.check_hidden_size(
            hidden[1], self.get_expected_cell_size(input, batch_sizes), "Expected hidden[1] size {}, got {}"
        )

    def permute_hidden(self, hx: Hidden, permutation: Tensor | None) -> Hidden:  # type: ignore[override]
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def forward(
        self, input: Tensor | PackedSequence, hx: Hidden | None = None
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            self.check_input(input, None)
        else:
            expected, kind = (3, "batched") if batched else (2, "unbatched")
            if hx[0].dim() != expected or hx[1].dim() != expected:
                raise RuntimeError(
                    f"For {kind} {expected}-D input, hx and cx should also be {expected}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            if not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            self.check_forward_args(input, hx, None)
        output, (h_n, c_n) = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
        return output, (h_n, c_n)

    def _forward_packed(self, input: PackedSequence, hx: Hidden | None) -> tuple[PackedSequence, Hidden]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            self.check_input(data, batch_sizes)
        else:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, last = self._run(padded, hx, lengths)
        packed = pack_padded_sequence(output, lengths)
        return (
            PackedSequence(packed.data, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(last, unsorted_indices),
        )

    def _check_streams(self) -> None:
        if self.bidirectional:
            raise RuntimeError("LSTM: a bidirectional module cannot run on a stream: it needs the end of the sequence")

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Hidden:
        self._check_streams()
        weight = getattr(self, self._all_weights[0][0])
        device, dtype = device or weight.device, dtype or weight.dtype
        outputs = self.proj_size or self.hidden_size
        return (
            torch.zeros(batch_size, self.num_layers, outputs, device=device, dtype=dtype),
            torch.zeros(batch_size, self.num_layers, self.hidden_size, device=device, dtype=dtype),
        )

    def extend(self, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        self._check_streams()
        if x.dim() != 3:
            raise ValueError(f"LSTM: expected a chunk to have 3 dimensions, but got {x.dim()}")
        hx = (state[0].transpose(0, 1), state[1].transpose(0, 1))
        self.check_forward_args(x, hx, None)
        output, (h, c) = self._run(x.transpose(0, 1) if self.batch_first else x, hx, None)
        state = (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        return output.transpose(0, 1) if self.batch_first else output, state

    def step(self, x_t: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        if x_t.dim() != 2:
            raise ValueError(f"LSTM: expected one step (B, input_size), but got {x_t.dim()} dimensions")
        time_dim = 1 if self.batch_first else 0
        output, state = self.extend(x_t.unsqueeze(time_dim), state)
        return output.squeeze(time_dim), state
