"""Records what the `sru` package computes, for tests/test_sru_module.py.

    pip install sru==2.6.0 ninja     (or https://github.com/asappresearch/sru, branch master)
    python tests/sru_package.py tests/data/sru.npz

Each case holds the constructor's arguments, the state_dict, inputs, results and gradients of its float64 Python path,
and the results of its float32 C++ inference path. Dropout masks are drawn here and handed to the package.
"""

import copy
import json
import math
import random
import sys

import numpy as np
import torch

T, B = 4, 2

# name: (constructor's arguments, pass c0, pass mask_pad, training)
CASES = {
    "k4": ({"input_size": 3, "hidden_size": 4}, True, False, False),
    "k3": ({"input_size": 4, "hidden_size": 4, "num_layers": 1}, False, False, False),
    "rescale": ({"input_size": 4, "hidden_size": 4, "rescale": True, "highway_bias": -1.5}, True, False, False),
    "bidirectional": ({"input_size": 3, "hidden_size": 2, "bidirectional": True}, True, False, False),
    "bidirectional_padded": (
        {"input_size": 4, "hidden_size": 2, "bidirectional": True, "rescale": True, "nn_rnn_compatible_return": True},
        True,
        True,
        False,
    ),
    "padded": ({"input_size": 3, "hidden_size": 4}, True, True, False),
    "layer_norm": ({"input_size": 4, "hidden_size": 4, "layer_norm": True, "rescale": True}, False, False, False),
    "normalize_after": (
        {"input_size": 3, "hidden_size": 4, "layer_norm": True, "normalize_after": True},
        True,
        True,
        False,
    ),
    "projection": ({"input_size": 5, "hidden_size": 4, "projection_size": 2, "weight_c_init": 0.5}, True, False, False),
    "projection_too_wide": ({"input_size": 3, "hidden_size": 4, "projection_size": 3}, False, False, False),
    "input_to_hidden": ({"input_size": 3, "hidden_size": 4, "proj_input_to_hidden_first": True}, False, False, False),
    "v1": ({"input_size": 4, "hidden_size": 4, "v1": True}, True, False, False),
    "tanh": ({"input_size": 3, "hidden_size": 4, "use_tanh": True}, True, False, False),
    "no_skip": ({"input_size": 3, "hidden_size": 4, "has_skip_term": False, "rescale": True}, True, True, False),
    "dropout": (
        {"input_size": 4, "hidden_size": 4, "dropout": 0.4, "rnn_dropout": 0.3, "rescale": True},
        True,
        False,
        True,
    ),
    "custom": ({"input_size": 4, "hidden_size": 4, "num_layers": 1, "custom_m": "linear"}, True, False, False),
    "custom_weights": ({"input_size": 4, "hidden_size": 4, "num_layers": 1, "custom_m": "pair"}, True, False, False),
}


def random_cases(count: int) -> dict:
    """Cases of arguments drawn at random."""
    draw, cases = random.Random(0), {}
    for i in range(count):
        arguments = {"input_size": draw.randint(2, 5), "hidden_size": draw.randint(2, 5)}
        if draw.random() < 0.3:
            arguments["input_size"] = arguments["hidden_size"]
        for name, values in CHOICES.items():
            value = draw.choice(values)
            if value is not None:
                arguments[name] = value
        training = arguments.get("dropout", 0) > 0 or arguments.get("rnn_dropout", 0) > 0
        cases[f"random_{i}"] = arguments, draw.random() < 0.5, draw.random() < 0.4, training
    return cases


#: None leaves an argument out.
CHOICES = {
    "num_layers": (1, 2, 3),
    "dropout": (None, None, None, 0.3),
    "rnn_dropout": (None, None, None, 0.2),
    "bidirectional": (None, True),
    "projection_size": (None, None, 1, 2),
    "highway_bias": (None, -1.0),
    "layer_norm": (None, True),
    "normalize_after": (None, True),
    "rescale": (None, True),
    "has_skip_term": (None, None, False),
    "v1": (None, None, True),
    "use_tanh": (None, True),
    "nn_rnn_compatible_return": (None, True),
    "proj_input_to_hidden_first": (None, None, True),
}


class Pair(torch.nn.Module):
    """A custom_m that also returns recurrent weights for each step."""

    def __init__(self):
        super().__init__()
        self.u, self.v = torch.nn.Linear(4, 12), torch.nn.Linear(4, 8)

    def reset_parameters(self):
        pass

    def forward(self, x):
        return self.u(x), self.v(x)


def custom(name):
    """The module that a case names."""
    return {"linear": lambda: torch.nn.Linear(4, 12), "pair": Pair}[name]()


def main(path: str) -> None:
    import sru

    assert sru.__version__ == "2.6.0", sru.__version__
    torch.manual_seed(0)
    index, values = {}, []
    for name, (arguments, with_c0, padded, training) in {**CASES, **random_cases(30)}.items():
        keywords = dict(arguments)
        if "custom_m" in keywords:
            keywords["custom_m"] = custom(keywords["custom_m"])
        model = sru.SRU(**keywords).double().train(training)
        for parameter in (p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")):
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
        masks = []

        def mask(size, p, masks=masks):
            masks.append(torch.bernoulli(torch.full(size, 1 - p, dtype=torch.float64)) / (1 - p))
            return masks[-1]

        for layer in model.rnn_lst:
            layer.get_dropout_mask_ = mask
        inputs = {"x": torch.randn(T, B, keywords["input_size"], dtype=torch.float64, requires_grad=True)}
        if with_c0:
            inputs["c0"] = torch.randn(model.num_layers, B, model.output_size, dtype=torch.float64, requires_grad=True)
        mask_pad = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.bool) if padded else None
        output, c_n = model(inputs["x"], inputs.get("c0"), mask_pad)
        grads = {"output": torch.randn_like(output), "c_n": torch.randn_like(c_n)}
        ((output * grads["output"]).sum() + (c_n * grads["c_n"]).sum()).backward()
        record = {f"state/{k}": v for k, v in model.state_dict().items()}
        record |= {f"in/{k}": v for k, v in inputs.items()}
        record |= {f"gradout/{k}": v for k, v in grads.items()}
        record |= {f"grad/{k}": v.grad for k, v in inputs.items()}
        record |= {f"grad/{k}": v.grad for k, v in model.named_parameters() if v.grad is not None}
        record |= {f"mask/{i}": v for i, v in enumerate(masks)}
        record |= {"out/output": output, "out/c_n": c_n}
        if mask_pad is not None:
            record["in/mask_pad"] = mask_pad
        if not training:
            with torch.no_grad():
                single = copy.deepcopy(model).float().eval()
                c0 = inputs["c0"].float() if with_c0 else None
                record["inference/output"], record["inference/c_n"] = single(inputs["x"].float(), c0, mask_pad)
        index[name] = {"arguments": arguments, "tensors": {k: list(v.shape) for k, v in record.items()}}
        values += [v.detach().double().numpy().ravel() for v in record.values()]
    np.savez_compressed(path, index=np.array(json.dumps(index)), values=np.concatenate(values))


def load(path: str) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """By case: the constructor's arguments, and the tensors by name."""
    with np.load(path) as file:
        index, values = json.loads(str(file["index"])), torch.from_numpy(file["values"])
    cases, at = {}, 0
    for name, case in index.items():
        tensors = {}
        for key, shape in case["tensors"].items():
            tensors[key] = values[at : at + math.prod(shape)].view(shape)
            at += math.prod(shape)
        cases[name] = case["arguments"], tensors
    return cases


if __name__ == "__main__":
    main(sys.argv[1])
