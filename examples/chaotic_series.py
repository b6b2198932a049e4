"""An echo state network predicts a chaotic series: Mackey-Glass, or NARMA-10.

    python examples/chaotic_series.py
    python examples/chaotic_series.py --series narma --units 200

Mackey-Glass (delay 17, a value per unit of time): the network is fitted to predict the next value and then runs on its
own output for 84 steps, from many places of the series at once. NARMA-10: it is fitted to the output of a nonlinear
moving average of ten steps, whose input it sees. Both print the root mean square error over the standard deviation.
"""

import argparse
import time

import torch
from torch import Tensor

import seqaccel

WARM_UP = 200  # steps until the reservoir has forgotten its first state
AHEAD = 84


def mackey_glass(length: int, delay: int = 17, substeps: int = 10) -> Tensor:
    """x' = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x, by Runge-Kutta of order 4; (length,), float64."""
    h, back = 1.0 / substeps, delay * substeps
    x = [1.2] * (back + 1)

    def slope(now: float, then: float) -> float:
        return 0.2 * then / (1 + then**10) - 0.1 * now

    for _ in range((length + 1000) * substeps):
        now, then, next_then = x[-1], x[-1 - back], x[-back]
        middle = (then + next_then) / 2
        a = slope(now, then)
        b = slope(now + h / 2 * a, middle)
        c = slope(now + h / 2 * b, middle)
        d = slope(now + h * c, next_then)
        x.append(now + h / 6 * (a + 2 * b + 2 * c + d))
    return torch.tensor(x[-length * substeps :: substeps], dtype=torch.float64)


def narma(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Input and output of NARMA-10, (length,), float64."""
    u = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2
    inputs, y = u.tolist(), [0.0] * 10
    for t in range(9, length - 1):
        y.append(0.3 * y[t] + 0.05 * y[t] * sum(y[t - 9 : t + 1]) + 1.5 * inputs[t - 9] * inputs[t] + 0.1)
    return u, torch.tensor(y, dtype=torch.float64)


def nrmse(found: Tensor, wanted: Tensor, deviation: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / deviation)


@torch.no_grad()
def mackey_glass_error(units: int, steps: int, seed: int) -> float:
    """84 steps ahead, from 100 places behind the ``steps`` that are fitted."""
    series = mackey_glass(steps + 100 * 30 + AHEAD)
    x = torch.tanh(series - 1).view(-1, 1, 1)
    model = seqaccel.nn.EchoStateNetwork(
        1, units, 1, dtype=torch.float64, spectral_radius=0.95, connectivity=min(1.0, 10 / units),
        bias_scaling=0.2, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    model.fit(x[: steps - 1], x[1:steps], ridge=1e-8, washout=WARM_UP)
    starts = torch.arange(steps, steps + 100 * 30, 30)
    y, state = model(torch.cat([x[start - WARM_UP : start] for start in starts.tolist()], 1))
    y = y[-1]
    for _ in range(AHEAD - 1):
        y, state = model.step(y, state)
    return nrmse(torch.atanh(y[:, 0]) + 1, series[starts + AHEAD - 1], series.std())


@torch.no_grad()
def narma_error(units: int, steps: int, seed: int) -> float:
    """On as many steps again behind those that are fitted."""
    u, y = (series.view(-1, 1, 1) for series in narma(2 * steps, seed))
    model = seqaccel.nn.EchoStateNetwork(
        1, units, 1, dtype=torch.float64, spectral_radius=0.9, connectivity=min(1.0, 10 / units),
        input_scaling=0.2, bias_scaling=0.2, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    state = model.fit(u[:steps], y[:steps], ridge=1e-8, washout=WARM_UP)
    found, _ = model(u[steps:], state)
    return nrmse(found, y[steps:], y.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", choices=("mackey-glass", "narma"), default="mackey-glass")
    parser.add_argument("--units", type=int, default=1000, help="of the reservoir (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="that are fitted (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.units < 1 or args.steps < 2 * WARM_UP:
        parser.error(f"--units must be at least 1 and --steps at least {2 * WARM_UP}")
    started = time.perf_counter()
    error = {"mackey-glass": mackey_glass_error, "narma": narma_error}[args.series](args.units, args.steps, args.seed)
    print(f"{args.series}, {args.units} units: NRMSE {error:.2e} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
