"""Packages with GPU kernels for the same jobs, each where it is installed (``benchmarks/peers-gpu.txt``).

Every function returns contenders by name, none where its package is missing. A contender gets tensors in the layout of
its package. Its results are compared with ours before it is timed. One whose first call fails is left out with a
warning: these packages compile and tune their kernels then.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Largest distance of a result from ours, of its norm, by bytes of a value. Float32 is multiplied in TF32.
TOLERANCES = {4: 1e-2, 2: 1e-1}
FLASHRNN = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "elman"}


def present(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def checked(
    name: str, run: Callable, expected: Sequence[Tensor], ordered: Callable = tuple
) -> dict[str, Callable[[], object]]:
    """``run`` by its name, once its results are ``expected``; ``ordered`` brings them into our layout."""
    try:
        results = run()
    except Exception as error:
        warnings.warn(f"{name} is left out: {type(error).__name__}: {error}", stacklevel=3)
        return {}
    for result, wanted in zip(ordered(results), expected, strict=True):
        result, wanted = result.detach(), wanted.detach()
        distance = float((result.float() - wanted.float()).norm() / wanted.float().norm())
        assert distance < TOLERANCES[wanted.dtype.itemsize], f"{name} is {distance:.1%} from our result"
    return {name: run}


class FlashRNN(torch.nn.Module):
    """A layer of ``torch.nn`` by flashrnn: one product over all steps, then its kernel for the recurrence.

    Its gates are torch's i, f, g, o. A GRU has recurrent gates n, r, z, those of the input r, z, n, and a bias for
    each of n of the state, r, z, n of the input.
    """

    def __init__(self, stock: torch.nn.RNNBase, backend: str = "cuda_fused") -> None:
        super().__init__()
        self.stock, self.backend = stock, backend

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, B, I): outputs (T, B, H), and the last states."""
        from flashrnn.flashrnn import flashrnn

        stock, H = self.stock, self.stock.hidden_size
        recurrent, bias = stock.weight_hh_l0.view(-1, 1, H, H), stock.bias_ih_l0 + stock.bias_hh_l0
        if stock.mode == "GRU":
            recurrent = recurrent.roll(1, 0)
            bias = torch.cat([stock.bias_hh_l0[2 * H :], bias[: 2 * H], stock.bias_ih_l0[2 * H :]])
        states, last = flashrnn(
            F.linear(x, stock.weight_ih_l0).unflatten(2, (-1, 1, H)).transpose(0, 1),  # [B, T, G, 1, H]
            recurrent,  # [G, 1, H, H]
            bias.view(-1, 1, H),
            function=FLASHRNN[stock.mode],
            backend=self.backend,
            dtype=str(x.dtype).removeprefix("torch."),
        )
        return states[0].squeeze(2).transpose(0, 1), last


def flashrnn(stock: torch.nn.RNNBase, make: Callable[[torch.nn.Module], Callable], expected: Sequence[Tensor]) -> dict:
    """``make`` gives a call of a module, for its gradients, or for its output and last state."""
    if not present("flashrnn") or stock.hidden_size > 768:  # its largest head
        return {}
    run = make(FlashRNN(stock))
    return checked("flashrnn", run, expected, lambda results: results[: len(expected)])


def scan(a: Tensor, b: Tensor, grad: Tensor, expected: Sequence[Tensor]) -> dict:
    """Gradients of a linear scan (B, T, D) by flash-linear-attention, whose coefficients are logarithms."""
    if not present("fla"):
        return {}
    from fla.ops.hgrn import chunk_hgrn

    log_a = a.detach().clamp_min(1e-6).log().requires_grad_()
    grad_a, grad_b = expected

    def run():
        return torch.autograd.grad(chunk_hgrn(b, log_a)[0], (log_a, b), grad)

    return checked("flash-linear-attention", run, (a.detach() * grad_a, grad_b))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, expected: Sequence[Tensor]) -> dict:
    """Gradients of a depthwise causal convolution (B, C, T) with SiLU, weight (C, 1, K).

    flash-linear-attention has tensors (B, T, C).
    """
    found = {}
    if present("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        def run():
            y = causal_conv1d_fn(x, weight.squeeze(1), bias, activation="silu")
            return torch.autograd.grad(y, (x, weight, bias), grad)

        found |= checked("causal-conv1d", run, expected)
    if present("fla"):
        from fla.modules.convolution import causal_conv1d

        rows, grad_rows = (t.detach().transpose(1, 2).contiguous() for t in (x, grad))
        rows.requires_grad_()

        def run_rows():
            y, _ = causal_conv1d(rows, weight.squeeze(1), bias, activation="silu")
            return torch.autograd.grad(y, (rows, weight, bias), grad_rows)

        found |= checked(
            "flash-linear-attention", run_rows, expected, lambda grads: (grads[0].transpose(1, 2), *grads[1:])
        )
    return found


def episodes(stock: torch.nn.LSTM, x: Tensor, reset: Tensor, grad: Tensor, expected: Sequence[Tensor]) -> dict:
    """Gradients of an LSTM over episodes (T, B, ·) by torchrl: its Triton kernels, and a padded batch of episodes."""
    if not present("torchrl"):
        return {}
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule

    (T, B, I), H = x.shape, stock.hidden_size
    rows, grad_rows, starts = (t.detach().transpose(0, 1).contiguous() for t in (x, grad, reset))
    rows.requires_grad_()
    zeros = x.new_zeros(B, T, 1, H)
    found = {}
    for backend in ("triton", "pad"):
        lstm = torch.nn.LSTM(I, H, batch_first=True, device=x.device, dtype=x.dtype)
        lstm.load_state_dict(stock.state_dict())
        module = LSTMModule(
            lstm=lstm,
            in_keys=["x", "h", "c"],
            out_keys=["y", ("next", "h"), ("next", "c")],
            default_recurrent_mode=True,
            recurrent_backend=backend,
        )

        def run(module=module, lstm=lstm):
            entries = {"x": rows, "h": zeros, "c": zeros, "is_init": starts.unsqueeze(2)}
            data = module(TensorDict(entries, [B, T], device=x.device))
            return torch.autograd.grad(data["y"], [rows, *lstm.parameters()], grad_rows)

        found |= checked(f"torchrl {backend}", run, expected, lambda grads: (grads[0].transpose(0, 1), *grads[1:]))
    return found
