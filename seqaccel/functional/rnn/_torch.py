"""torch's own recurrent operators as the backend ``torch``: one layer, one direction."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def _reverse_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...) with each sequence's valid steps in reverse order; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    last = lengths.to(x.device) - 1
    index = torch.where(t <= last, last - t, t)
    return x.gather(0, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def layer(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: list[Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as those of ``seqaccel.reference.rnn.layer``."""
    steps, batch = input.shape[:2]
    if steps == 0 or (batch == 0 and lengths is not None):
        return h_0.new_zeros(steps, *h_0.shape), h_0.clone(), None if c_0 is None else c_0.clone()
    weight_ih, weight_hh, *biases = weights[:4]
    has_biases = any(bias is not None for bias in biases)
    given = [weight_ih, weight_hh]
    if has_biases:
        given += [torch.zeros_like(weight_ih[:, 0]) if bias is None else bias for bias in biases]  # type: ignore[index]
    given += [weight for weight in weights[4:] if weight is not None]
    operator = getattr(torch._VF, cell)
    train = input.is_cuda and torch.is_grad_enabled()  # cuDNN's backward pass asks for it
    state = [part.contiguous() for part in (h_0, c_0) if part is not None]
    if reverse:
        input = _reverse_in_time(input, lengths)
    if lengths is None:
        state = [part.unsqueeze(0) for part in state]
        output, *last = operator(
            input, state if c_0 is not None else state[0], given, has_biases, 1, 0.0, train, False, False
        )
    else:
        packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        state = [part[packed.sorted_indices].unsqueeze(0) for part in state]
        data, *last = operator(
            packed.data, packed.batch_sizes, state if c_0 is not None else state[0], given, has_biases, 1, 0.0, train,
            False,
        )  # fmt: skip
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=steps)
        last = [part[:, packed.unsorted_indices] for part in last]
    if reverse:
        output = _reverse_in_time(output, lengths)
    return output, last[0][0], None if c_0 is None else last[1][0]


def all_layers(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    num_layers: int,
    *,
    has_biases: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers of a module on input (T, B, I), or (N, I) packed with ``batch_sizes``; states (layers, B, ·)."""
    if batch_sizes is None and input.shape[0] == 0:
        width = state[0].shape[-1] * (2 if bidirectional else 1)
        return input.new_zeros(0, input.shape[1], width), tuple(part.clone() for part in state)
    state = tuple(part.contiguous() for part in state)
    first = state if len(state) > 1 else state[0]
    # cuDNN's backward pass asks for a forward pass in training, which without dropout changes nothing else.
    train = training or torch.is_grad_enabled()
    options = (weights, has_biases, num_layers, dropout if training else 0.0, train, bidirectional)
    operator = getattr(torch._VF, cell)
    if batch_sizes is None:
        output, *last = operator(input, first, *options, False)
    else:
        output, *last = operator(input, batch_sizes, first, *options)
    return output, tuple(last)


def step(
    cell: str, input: Tensor, state: tuple[Tensor, ...] | None, weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """torch's operator of a single step: the new state from input (B, I) and (h,) or (h, c), by default zero."""
    if cell == "lstm":
        if state is None:
            state = (input.new_zeros(input.shape[0], weights[1].shape[1]),) * 2  # type: ignore[union-attr]
        return torch._VF.lstm_cell(input, state, *weights)  # type: ignore[arg-type]
    h = input.new_zeros(input.shape[0], weights[1].shape[1]) if state is None else state[0]  # type: ignore[union-attr]
    return (getattr(torch._VF, f"{cell}_cell")(input, h, *weights),)
