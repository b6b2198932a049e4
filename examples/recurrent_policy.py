"""Trains a policy with a memory by PPO, on rollouts that hold several episodes.

    python examples/recurrent_policy.py                  # a minGRU
    python examples/recurrent_policy.py --model sru

The task is a T-maze (Bakker 2001). At the first step the agent sees a sign that points left or right. It walks through
a corridor, whose length differs from episode to episode. At the junction it must turn to the side of the sign, which it
sees no more. A policy without memory is right half of the time.

All environments run at once. A rollout has the same number of steps of each, so an episode may begin and end anywhere
within it. For the update the rollout is one batch of sequences, and ``reset=`` tells the network where episodes begin.
Each is calculated as if it ran alone, from the state that the rollout began with or from zero: there is no padding, and
no loop over episodes. The curve and a record of the run are written to the folder ``--out``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import seqaccel.nn as snn

MODELS = {"mingru": snn.MinGRU, "minlstm": snn.MinLSTM, "sru": snn.SRU, "lstm": snn.LSTM}


class TMaze:
    """``count`` mazes. Actions: 0 walks on, 1 and 2 turn left and right.

    A step sees (B, 4): the sign to the left or to the right at the first step, whether it is at the junction, and
    noise. A turn at the junction ends the episode with the reward 1 or -1. A turn in the corridor and a step on at the
    junction cost 0.1 and lead nowhere. After ``most`` steps an episode ends without a reward.
    """

    features, actions = 4, 3

    def __init__(self, count: int, shortest: int, longest: int, generator: torch.Generator) -> None:
        self.shortest, self.longest, self.most, self.generator = shortest, longest, 2 * longest + 2, generator
        self.side = torch.zeros(count, dtype=torch.int64)
        self.length, self.place, self.age = (torch.zeros_like(self.side) for _ in range(3))
        self._begin(torch.ones(count, dtype=torch.bool))

    def _begin(self, mask: Tensor) -> None:
        count = len(mask)
        side = torch.randint(1, 3, (count,), generator=self.generator)
        length = torch.randint(self.shortest, self.longest + 1, (count,), generator=self.generator)
        self.side, self.length = torch.where(mask, side, self.side), torch.where(mask, length, self.length)
        self.place, self.age = self.place.masked_fill(mask, 0), self.age.masked_fill(mask, 0)

    def see(self) -> Tensor:
        first = self.age == 0
        noise = torch.randn(len(first), generator=self.generator)
        signs = [first & (self.side == side) for side in (1, 2)]
        return torch.stack([*(s.float() for s in signs), (self.place == self.length).float(), 0.1 * noise], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rewards, which episodes end, and which of these turned to the right side; new ones begin."""
        junction, turn = self.place == self.length, action > 0
        right = junction & (action == self.side)
        reward = torch.where(junction & turn, 2.0 * right.float() - 1, -0.1 * (junction | turn).float())
        self.place, self.age = self.place + (~junction & ~turn), self.age + 1
        ends = (junction & turn) | (self.age == self.most)
        self._begin(ends)
        return reward, ends, right


class Policy(torch.nn.Module):
    """Logits of the actions (T, B, A) and values (T, B) of what is seen (T, B, F), and the state after it."""

    def __init__(self, model: str, hidden_size: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(TMaze.features, hidden_size)
        self.memory: Any = MODELS[model](hidden_size, hidden_size)
        self.actor = torch.nn.Linear(hidden_size, TMaze.actions)
        self.critic = torch.nn.Linear(hidden_size, 1)

    def forward(self, seen: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Tensor, Any]:
        """``reset`` (T, B): an episode begins."""
        h, state = self.memory(torch.tanh(self.encoder(seen)), state, reset=reset)
        return self.actor(h), self.critic(h).squeeze(-1), state


def part_of(state: Any, streams: Tensor) -> Any:
    """The state of some streams."""
    if isinstance(state, Tensor):
        return state[:, streams]
    return None if state is None else tuple(part_of(part, streams) for part in state)


def rollout(
    policy: Policy, maze: TMaze, steps: int, state: Any, begins: Tensor
) -> tuple[dict[str, Tensor], Any, Tensor]:
    """What happens in ``steps`` steps, (T, B) each; the state after them, and where the next step begins an episode."""
    kept: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for _ in range(steps):
        seen = maze.see()
        logits, value, state = policy(seen[None], state, begins[None])
        action = torch.multinomial(logits[0].softmax(-1), 1, generator=maze.generator).squeeze(1)
        log_probability = logits[0].log_softmax(-1).gather(1, action.unsqueeze(1)).squeeze(1)
        reward, ends, right = maze.step(action)
        values = (seen, action, log_probability, value[0], reward, begins, ends, right)
        for name, now in zip(NAMES, values, strict=True):
            kept[name].append(now)
        begins = ends
    return {name: torch.stack(rows) for name, rows in kept.items()}, state, begins


NAMES = ("seen", "action", "log_probability", "value", "reward", "begins", "ends", "right")


def advantages(found: dict[str, Tensor], last: Tensor, discount: float, smoothing: float) -> Tensor:
    """Generalised advantage estimates (T, B); ``last`` (B,) is the value after the rollout."""
    going = 1 - found["ends"].float()
    following = torch.cat([found["value"][1:], last[None]])
    error = found["reward"] + discount * going * following - found["value"]
    total, rows = torch.zeros_like(last), []
    for t in reversed(range(len(error))):
        total = error[t] + discount * smoothing * going[t] * total
        rows.append(total)
    return torch.stack(rows[::-1])


def update(policy: Policy, optimizer: torch.optim.Optimizer, found: dict[str, Tensor], state: Any, gain: Tensor,
           options: argparse.Namespace) -> None:  # fmt: skip
    """Epochs of PPO over parts of the streams; every part runs from the state that the rollout began with."""
    goal, gain = gain + found["value"], (gain - gain.mean()) / (gain.std() + 1e-8)
    for _ in range(options.epochs):
        for streams in torch.randperm(gain.shape[1]).chunk(options.parts):
            own = {name: t[:, streams] for name, t in found.items()}
            logits, value, _ = policy(own["seen"], part_of(state, streams), own["begins"])
            log = logits.log_softmax(-1)
            ratio = (log.gather(2, own["action"].unsqueeze(2)).squeeze(2) - own["log_probability"]).exp()
            clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
            loss = -torch.minimum(ratio * gain[:, streams], clipped * gain[:, streams]).mean()
            loss = loss + 0.5 * (value - goal[:, streams]).square().mean()
            loss = loss + options.entropy * (log.exp() * log).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


def success(found: dict[str, Tensor]) -> tuple[int, int]:
    """Episodes that end at the right side, and all that end."""
    return int(found["right"].sum()), int(found["ends"].sum())


def train(policy: Policy, options: argparse.Namespace) -> list[tuple[int, float]]:
    """The share of episodes that end at the right side after each update, by the steps so far."""
    generator = torch.Generator().manual_seed(options.seed)
    maze = TMaze(options.environments, options.shortest, options.longest, generator)
    optimizer = torch.optim.Adam(policy.parameters(), options.learning_rate)
    state, begins, curve = None, torch.ones(options.environments, dtype=torch.bool), []
    per_update, recent = options.steps * options.environments, 0.5
    with tqdm(range(options.updates), desc=options.model, unit="update", disable=None) as bar:
        for done in bar:
            with torch.no_grad():
                first = state
                found, state, begins = rollout(policy, maze, options.steps, state, begins)
                last = policy(maze.see()[None], state, begins[None])[1][0]
                gain = advantages(found, last, options.discount, options.smoothing)
            update(policy, optimizer, found, first, gain, options)
            right, ended = success(found)
            recent = 0.8 * recent + 0.2 * (right / ended if ended else recent)
            curve.append(((done + 1) * per_update, right / ended if ended else 0.0))
            bar.set_postfix(right=f"{recent:.1%}")
            if recent > options.goal:
                break
    return curve


@torch.no_grad()
def test(policy: Policy, options: argparse.Namespace) -> float:
    """The share of right turns in new mazes."""
    maze = TMaze(options.unseen, options.shortest, options.longest, torch.Generator().manual_seed(options.seed + 1))
    begins = torch.ones(options.unseen, dtype=torch.bool)
    found, _, _ = rollout(policy, maze, maze.most, None, begins)
    first = found["ends"].int().cumsum(0).cumsum(0) == 1  # the first end of each maze
    return float((found["right"] & first).sum() / options.unseen)


def plot(curve: list[tuple[int, float]], title: str, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    panel.plot(*zip(*curve, strict=True), marker=".", label=title)
    panel.axhline(0.5, color="grey", linewidth=0.8, linestyle=":", label="without memory")
    panel.set(xlabel="steps of all environments", ylabel="right turns", ylim=(-0.02, 1.02))
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="mingru", help="the policy's memory (default: mingru)")
    add("--updates", type=int, default=200, help="most updates (default: 200)")
    add("--goal", type=float, default=0.98, help="share of right turns that ends the training (default: 0.98)")
    add("--environments", type=int, default=64, help="mazes at once (default: 64)")
    add("--steps", type=int, default=64, help="steps of a rollout (default: 64)")
    add("--shortest", type=int, default=6, help="shortest corridor (default: 6)")
    add("--longest", type=int, default=12, help="longest corridor (default: 12)")
    add("--hidden-size", type=int, default=64, help="width of the policy (default: 64)")
    add("--learning-rate", type=float, default=3e-3)
    add("--epochs", type=int, default=4, help="epochs of an update (default: 4)")
    add("--parts", type=int, default=4, help="parts of the streams in an epoch (default: 4)")
    add("--clip", type=float, default=0.2, help="how far an update moves a probability (default: 0.2)")
    add("--entropy", type=float, default=0.01, help="weight of the entropy (default: 0.01)")
    add("--discount", type=float, default=0.98)
    add("--smoothing", type=float, default=0.95, help="lambda of the advantages (default: 0.95)")
    add("--unseen", type=int, default=1000, help="mazes of the test (default: 1000)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/recurrent-policy"), help="folder for what is written")
    options = parser.parse_args()
    positive = ("updates", "environments", "steps", "shortest", "hidden_size", "epochs", "parts", "unseen", "threads")
    for name in positive:
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    if options.longest < options.shortest:
        parser.error("argument --longest: must be at least --shortest")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    policy, began = Policy(options.model, options.hidden_size), time.perf_counter()
    curve = train(policy, options)
    seconds, share = time.perf_counter() - began, test(policy, options)
    print(
        f"{options.model}: {share:.1%} of {options.unseen} unseen mazes are solved "
        f"({curve[-1][0]:,} steps of training, {seconds:.0f} s)"
    )
    record = {"model": options.model, "seed": options.seed, "seconds": seconds, "share": share, "curve": curve}
    (options.out / f"{options.model}.json").write_text(json.dumps(record, indent=1))
    plot(curve, options.model, options.out / f"{options.model}.png")
    print(f"wrote {options.out / options.model}.png and a record beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
