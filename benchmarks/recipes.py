"""Times the recipes of docs/recipes.md beside what they stand in for.

    python -m benchmarks.recipes                # a table; Keras' layers are in it where Keras is installed
    python -m benchmarks.recipes --json FILE    # also writes a record, of which ``make report`` makes the page's table

The code is that of the page. Both sides first give the same results and gradients of x; then they take turns.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import packages  # chooses Keras' backend

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "recipes.md"
TOLERANCE = 1e-3  # of results and gradients, relative to the largest: logarithms lose digits


class Recipe(NamedTuple):
    """Two ways to compute a function of x, and the parameters that train."""

    name: str
    instead: str
    size: str
    run: Callable[[Tensor, bool], Tensor]  #: with the recipe or without
    x: Tensor
    parameters: list[Tensor]


def page_code() -> dict[str, Any]:
    """The names that the blocks of the page define."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


def min_gru(steps: int = 1024) -> Recipe:
    names, weight = page_code(), torch.randn(512, 256).mul_(256**-0.5).requires_grad_()
    sides = (names["logarithms"], names["min_gru"])
    run = lambda x, ours: sides[ours](x, weight)  # noqa: E731
    size = f"B=8, T={steps}, I=H=256"
    return Recipe("minGRU", "minGRU-pytorch's scan", size, run, torch.randn(8, steps, 256), [weight])


def by_steps(a: Tensor, b: Tensor, h_0: Tensor | None = None, *, return_last: bool) -> tuple[Tensor, Tensor]:
    """``linear_scan`` of (B, T, W) as a loop over the steps, as mamba_ssm's ``selective_scan_ref`` has it."""
    h, states = torch.zeros_like(b[:, 0]) if h_0 is None else h_0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1), h


def selective_scan(steps: int = 512) -> Recipe:
    names = page_code()
    module, sides = names["SelectiveScan"](128, 16), (by_steps, names["linear_scan"])

    def run(x: Tensor, ours: bool) -> Tensor:
        names["linear_scan"] = sides[ours]  # what the module's forward looks up
        return module(x)[0]

    size, x = f"B=2, T={steps}, 128 channels of 16 states", torch.randn(2, steps, 128)
    return Recipe("selective scan", "a loop over the steps", size, run, x, [*module.parameters()])


def keras_layer(name: str) -> Recipe:
    import keras

    from seqaccel.integrations import keras as ours

    x = torch.randn(16, 100, 64)
    layers = [kind(128, return_sequences=True) for kind in (getattr(keras.layers, name), getattr(ours, name))]
    for layer in layers:
        layer(x)
    layers[1].set_weights(layers[0].get_weights())
    run = lambda x, ours: layers[ours](x)  # noqa: E731
    parameters = [p for layer in layers for p in layer.parameters()]
    return Recipe(f"Keras' {name}", f"`keras.layers.{name}`", "128 units, 16×100×64", run, x, parameters)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "minGRU": min_gru,
    "selective scan": selective_scan,
    "Keras LSTM": lambda: keras_layer("LSTM"),
    "Keras GRU": lambda: keras_layer("GRU"),
}


def measured(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Checks a recipe and times inference, and forward and backward pass."""
    chosen = False

    def use(ours: bool) -> None:
        nonlocal chosen
        chosen = ours

    def training() -> list[Tensor]:
        x = recipe.x.clone().requires_grad_()
        for parameter in recipe.parameters:
            parameter.grad = None
        y = recipe.run(x, chosen)
        y.sum().backward()
        return [y.detach(), x.grad]

    def inference() -> Tensor:
        with torch.no_grad():
            return recipe.run(recipe.x, chosen)

    theirs = training()
    use(True)
    error = packages.difference(training(), theirs)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{recipe.name}: results differ by {error:.1e}")
    times = {
        name: packages.compared(run, use, seconds) for name, run in (("inference", inference), ("training", training))
    }
    return {"name": recipe.name, "instead": recipe.instead, "size": recipe.size, "error": error, **times}


def markdown(rows: list[dict[str, Any]]) -> str:
    header = ("recipe", "instead of", "size", "inference", "faster", "forward and backward", "faster")
    lines = [header, tuple("---" if i < 3 else "---:" for i in range(len(header)))]
    for row in rows:
        line = [row["name"], row["instead"], row["size"]]
        for before, after, ratio in (row["inference"], row["training"]):
            line += [f"{before * 1e3:.3g} → {after * 1e3:.3g} ms", f"{ratio:.1f}×"]
        lines.append(tuple(line))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_of(path: pathlib.Path) -> str:
    """What the page has of a record."""
    return packages.page_of_rows(path, markdown)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each time (default: 4)")
    parser.add_argument("--json", type=pathlib.Path, help="the record to write")
    options = parser.parse_args(arguments)
    rows = []
    for name, make in RECIPES.items():
        if name.startswith("Keras") and packages.installed("keras") is None:
            print(f"{name}: Keras is not installed", file=sys.stderr)
            continue
        torch.manual_seed(0)
        rows.append(measured(make(), options.seconds))
    print(markdown(rows), end="")
    if options.json:
        packages.write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
