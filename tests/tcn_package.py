"""Records what the package `pytorch-tcn` computes, for tests/test_tcn_options.py.

    pip install pytorch-tcn==1.2.3
    python tests/tcn_package.py tests/data/tcn.npz

Each case holds the state_dict, x, y and the gradients of the sum of y times a weight, in float64.
"""

import sys

import numpy as np
import torch

# Arguments of both constructors.
CASES = {
    "defaults": dict(num_inputs=3, num_channels=[5, 5, 4], kernel_size=4),
    "dilations": dict(num_inputs=3, num_channels=[4, 4], kernel_size=3, dilations=[3, 1]),
    "dilation_reset": dict(num_inputs=3, num_channels=[4] * 5, kernel_size=2, dilation_reset=4),
    "no_norm": dict(num_inputs=3, num_channels=[4, 6], kernel_size=3, use_norm=None, activation="tanh"),
    "leaky_relu": dict(num_inputs=4, num_channels=[4, 6], kernel_size=3, activation="leaky_relu"),
    "gate": dict(num_inputs=3, num_channels=[4, 4], kernel_size=3, use_gate=True),
    "skip": dict(num_inputs=3, num_channels=[5, 4, 6, 6], kernel_size=3, use_skip_connections=True),
    "skip_gelu": dict(
        num_inputs=6, num_channels=[6, 4], kernel_size=3, use_skip_connections=True, activation="gelu",
        kernel_initializer="normal",
    ),
    "skip_one_level": dict(num_inputs=3, num_channels=[4], kernel_size=3, use_skip_connections=True,
                           activation="sigmoid"),
    "all": dict(
        num_inputs=3, num_channels=[4, 5, 4], kernel_size=3, dilations=[1, 3, 2], use_gate=True,
        use_skip_connections=True, activation="tanh", input_shape="NLC", output_projection=2,
        output_activation="sigmoid",
    ),
}  # fmt: skip


def main(path: str) -> None:
    from pytorch_tcn import TCN

    arrays = {}
    for number, (name, arguments) in enumerate(CASES.items()):
        torch.manual_seed(number)
        module = TCN(**arguments, dropout=0.0).double()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) / 2)
        x = torch.randn(2, arguments["num_inputs"], 13, dtype=torch.float64)
        x = (x.transpose(1, 2) if arguments.get("input_shape") == "NLC" else x).contiguous().requires_grad_()
        y = module(x)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        values = {"x": x, "y": y, "weight": weight, "grad.x": x.grad}
        values |= {f"state.{key}": t for key, t in module.state_dict().items()}
        values |= {f"grad.{key}": p.grad for key, p in module.named_parameters()}
        arrays |= {f"{name}/{key}": t.detach().numpy() for key, t in values.items()}
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
