"""One layer of each family at the same width, over the number of steps: what an LSTM's user would move to."""

import torch
import torch.nn.functional as F
from harness import Case, suite
from torch import nn

import seqaccel
import seqaccel.nn as snn

WIDTH, HEADS = 256, 4
LAYERS = {
    "hierarchical attention": lambda: snn.HierarchicalAttention(WIDTH, HEADS, batch_first=True),
    "LSTM": lambda: snn.LSTM(WIDTH, WIDTH, batch_first=True),
    "SRU": lambda: snn.SRU(WIDTH, WIDTH, num_layers=1),
    "TCN": lambda: snn.TCN(WIDTH, [WIDTH], kernel_size=3, dropout=0.0, use_norm=None),
}


class DenseAttention(nn.Module):
    """Causal dense attention with the projections of torch.nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@suite(
    [dict(T=T) for T in (128, 512, 2048, 8192)],
    [*(f"seqaccel[cpp] {name}" for name in LAYERS), "torch LSTM", "torch dense attention"],
)
def bench_sequence_length(T):
    """Training step of one sequence: forward, and backward to the input and every parameter."""
    modules = {f"seqaccel[cpp] {name}": make() for name, make in LAYERS.items()}
    modules |= {"torch LSTM": nn.LSTM(WIDTH, WIDTH, batch_first=True), "torch dense attention": DenseAttention()}

    def training(name, module):
        shape = {"TCN": (1, WIDTH, T), "SRU": (T, 1, WIDTH)}.get(name.split()[-1], (1, T, WIDTH))
        x = torch.randn(shape, requires_grad=True)
        grad = torch.randn_like(x)
        arguments = (x, x, x) if name.endswith("hierarchical attention") else (x,)

        def run():
            with seqaccel.backend("cpp" if name.startswith("seqaccel") else "auto"):
                output = module(*arguments)
                return torch.autograd.grad(
                    output[0] if isinstance(output, tuple) else output, [x, *module.parameters()], grad
                )

        return run

    return Case(
        {name: training(name, module) for name, module in modules.items()},
        flops=6 * 4 * T * WIDTH * WIDTH,  # of attention's four projections alone: a ceiling that all share
        bytes=4 * 4 * T * WIDTH,
    )
