"""Teaches a translation model to rewrite strings, and decodes new ones step by step.

    python examples/sequence_to_sequence.py                 # reverse and sort digits, then dates to ISO form
    python examples/sequence_to_sequence.py --task dates --beam-size 4

The tasks are made here: ``reverse`` and ``sort`` take strings of 1 to 10 digits, ``dates`` takes dates as people write
them ("3rd of May, 1987"). The models (``--model``):

    pervasive      one network over the grid of target and source positions (:class:`seqaccel.nn.PervasiveAttention`)
    convolutional  an encoder and a decoder of gated convolutions, with attention in every layer of the decoder (Gehring
                   et al., "Convolutional sequence to sequence learning", 2017); made here of the package's parts
    gnmt           recurrent encoder and decoder with additive attention (:class:`seqaccel.nn.GNMT`)

Training sees the whole target at once. Decoding runs token by token through the streaming protocol. Training of a task
ends when enough unseen strings come out right to the last character.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from seqaccel import nn
from seqaccel.functional import multiplicative_attention

HALF = 0.5**0.5  # keeps the variance of a sum of two
END = "\n"
VOCABULARY = 128
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]


def digits(draw: random.Random) -> str:
    return "".join(draw.choice("0123456789") for _ in range(draw.randint(1, 10)))


def reverse(draw: random.Random) -> tuple[str, str]:
    text = digits(draw)
    return text, text[::-1]


def sort(draw: random.Random) -> tuple[str, str]:
    text = digits(draw)
    return text, "".join(sorted(text))


def dates(draw: random.Random) -> tuple[str, str]:
    day = datetime.date.fromordinal(draw.randint(693596, 766644))  # of the years 1900 to 2099
    month = MONTHS[day.month - 1]
    suffix = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    form = draw.choice(
        (
            "{d} {month} {y}",
            "{month} {d}, {y}",
            "{d}{suffix} of {month}, {y}",
            "{short} {d}{suffix} {y}",
            "{d}.{m}.{y}",
            "{d:02}/{m:02}/{y}",
        )
    )
    text = form.format(d=day.day, m=day.month, y=day.year, month=month, short=month[:3], suffix=suffix)
    return text, day.isoformat()


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"reverse": reverse, "sort": sort, "dates": dates}


def pervasive(options: argparse.Namespace) -> nn.PervasiveAttention:
    return nn.PervasiveAttention(
        VOCABULARY,
        VOCABULARY,
        embedding_dim=32,
        num_layers=options.num_layers or 6,
        growth_rate=options.growth_rate,
        kernel_size=5,
        max_positions=40,
        dropout=0.0,
    )


class GatedConvolution(torch.nn.Module):
    """dropout, a convolution with GLU; x (B, T, C). Centred where ``centred``, else causal: then it streams."""

    def __init__(self, channels: int, kernel_size: int, dropout: float, centred: bool) -> None:
        super().__init__()
        self.conv = nn.CausalConv1d(channels, 2 * channels, kernel_size, activation="glu", channels_last=True)
        torch.nn.init.normal_(self.conv.weight, std=(4 * (1 - dropout) / (kernel_size * channels)) ** 0.5)
        torch.nn.init.zeros_(self.conv.bias)
        self.dropout, self.later = dropout, kernel_size // 2 if centred else 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.conv(F.pad(x, (0, 0, 0, self.later)))[:, self.later :]

    def extend(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        return self.conv.extend(F.dropout(x, self.dropout, self.training), state)


class ConvolutionalTranslator(nn.Streaming, torch.nn.Module):
    r"""Gehring et al. (2017): gated convolutions on both sides, attention in every layer of the decoder.

    With embeddings e of the source and g of the target, each with its position's, and u = :math:`\sqrt{1/2}`,

    .. math::
        x^{l} &= u\,(x^{l-1} + \mathrm{GLU}(K_l * x^{l-1})), \quad z = W x^L \\
        h^{l} &= \mathrm{GLU}(K'_l * y^{l-1}), \quad q^l = u\,(W_l h^l + b_l + g), \quad
        c^l = \sqrt{S} \sum_j \mathrm{softmax}_j(q^l \cdot z_j)\, u\,(z_j + e_j) \\
        y^{l} &= u\,(y^{l-1} + u\,(h^l + V_l c^l))

    The convolutions K of the source are centred, those K' of the target causal. S is the length of the source.

    State of B streams: ``(keys, values, valid, position, histories)``: z and u (z + e), (B, S, embedding_dim); which
    positions of the source count, (B, S); the number of tokens so far, (B,); for each layer what its convolution sees.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding_dim: int,
        channels: int,
        num_layers: int,
        kernel_size: int,
        max_positions: int,
        dropout: float,
    ) -> None:
        super().__init__()
        Embedding, Linear, List = torch.nn.Embedding, torch.nn.Linear, torch.nn.ModuleList
        self.dropout, self.num_layers = dropout, num_layers
        self.source_tokens, self.target_tokens = (Embedding(vocabulary, embedding_dim) for _ in range(2))
        self.source_positions, self.target_positions = (Embedding(max_positions, embedding_dim) for _ in range(2))
        for table in (self.source_tokens, self.target_tokens, self.source_positions, self.target_positions):
            torch.nn.init.normal_(table.weight, std=0.1)
        self.source_in, self.target_in = (Linear(embedding_dim, channels) for _ in range(2))
        self.source_out, self.target_out = (Linear(channels, embedding_dim) for _ in range(2))
        self.encoder = List(GatedConvolution(channels, kernel_size, dropout, centred=True) for _ in range(num_layers))
        self.decoder = List(GatedConvolution(channels, kernel_size, dropout, centred=False) for _ in range(num_layers))
        self.queries = List(Linear(channels, embedding_dim) for _ in range(num_layers))
        self.contexts = List(Linear(embedding_dim, channels) for _ in range(num_layers))
        self.logits = Linear(embedding_dim, vocabulary)

    def init_state(self, source: Tensor, source_padding_mask: Tensor) -> tuple:  # type: ignore[override]
        """The state of the streams that will be decoded from ``source`` (B, S); the mask is true at padding."""
        valid = ~source_padding_mask
        counts = valid.unsqueeze(2)
        embedded = self.source_tokens(source) + self.source_positions.weight[: source.shape[1]]
        embedded = F.dropout(embedded, self.dropout, self.training)
        x = self.source_in(embedded) * counts
        for layer in self.encoder:
            x = HALF * (x + layer(x)) * counts  # padding stays zero, as what lies beyond a sequence is
        z = scaled_gradient(self.source_out(x), 0.5 / self.num_layers)  # every layer of the decoder adds to it
        position = torch.zeros(len(source), dtype=torch.int64, device=source.device)
        histories = tuple(layer.conv.init_state(len(source)) for layer in self.decoder)
        return z, HALF * (z + embedded), valid, position, histories

    def extend(self, target: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """target (B, T): logits (B, T, vocabulary) of the tokens that follow, and the state after it."""
        keys, values, valid, position, histories = state
        at = position.unsqueeze(1) + torch.arange(target.shape[1], device=target.device)
        embedded = F.dropout(self.target_tokens(target) + self.target_positions(at), self.dropout, self.training)
        y, root = self.target_in(embedded), valid.sum(1).sqrt().view(-1, 1, 1)
        after = []
        for layer, query, context, history in zip(self.decoder, self.queries, self.contexts, histories, strict=True):
            h, history = layer.extend(y, history)
            q = HALF * (query(h) + embedded)
            seen = root * multiplicative_attention(q, keys, values, mask=valid)
            y = HALF * (y + HALF * (h + context(seen)))
            after.append(history)
        out = F.dropout(self.target_out(y), self.dropout, self.training)
        return self.logits(out), (keys, values, valid, position + target.shape[1], tuple(after))

    def step(self, target_t: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """target_t (B,): logits (B, vocabulary) and the state after it."""
        logits, state = self.extend(target_t.unsqueeze(1), state)
        return logits.squeeze(1), state

    def forward(self, source: Tensor, target: Tensor, source_padding_mask: Tensor) -> Tensor:
        """source (B, S), target (B, T): logits (B, T, vocabulary)."""
        return self.extend(target, self.init_state(source, source_padding_mask))[0]


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by ``factor``."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


def convolutional(options: argparse.Namespace) -> ConvolutionalTranslator:
    return ConvolutionalTranslator(
        VOCABULARY,
        embedding_dim=64,
        channels=128,
        num_layers=options.num_layers or 3,
        kernel_size=5,
        max_positions=40,
        dropout=0.0,
    )


def gnmt(options: argparse.Namespace) -> nn.GNMT:
    layers = options.num_layers or 2
    return nn.GNMT(VOCABULARY, VOCABULARY, 128, layers, embedding_dim=32, input_feeding=False, dropout=0.0)


#: A model is called with source, target and the source's padding mask, and returns the logits of the tokens that
#: follow. Its ``init_state`` takes source and mask, its ``step`` tokens.
MODELS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "pervasive": pervasive,
    "convolutional": convolutional,
    "gnmt": gnmt,
}


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, L), the bytes of the texts with END behind each and zeros after it; and which are padding."""
    rows = [torch.tensor(list((text + END).encode())) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, tokens == 0


def decode(model: Any, texts: list[str], beam_size: int) -> list[str]:
    """What the model makes of the texts."""
    source, padding = encode(texts)
    start = torch.full((len(texts),), ord(END))
    with torch.no_grad():
        state = model.init_state(source, padding)
        tokens, _ = nn.decoding.beam_search(model, state, start, end=ord(END), max_length=32, beam_size=beam_size)
    return [bytes(row).decode(errors="replace").partition(END)[0] for row in tokens.tolist()]


def train(name: str, options: argparse.Namespace) -> bool:
    """Trains one model; returns whether it reached the goal."""
    task, draw = TASKS[name], random.Random(options.seed)
    torch.manual_seed(options.seed)
    unseen: dict[str, str] = {}
    while len(unseen) < options.unseen:
        text, wanted = task(draw)
        if len(text) > 3:  # of shorter ones there are too few
            unseen[text] = wanted
    model = MODELS[options.model](options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps, pct_start=0.1)
    right, began = 0.0, time.perf_counter()
    with tqdm(range(1, options.steps + 1), desc=name, unit="step", disable=None) as bar:
        for step in bar:
            pairs = []
            while len(pairs) < options.batch_size:
                text, wanted = task(draw)
                if text not in unseen:
                    pairs.append((text, wanted))
            source, padding = encode([text for text, _ in pairs])
            target, _ = encode([END + wanted for _, wanted in pairs])  # END begins it too
            logits = model(source, target[:, :-1], padding)
            loss = F.cross_entropy(logits.transpose(1, 2), target[:, 1:], ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % options.check_every == 0 or step == options.steps:
                model.eval()
                found = decode(model, list(unseen), 1)
                model.train()
                right = sum(a == b for a, b in zip(found, unseen.values(), strict=True)) / len(unseen)
                bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right:.1%}")
                if right >= options.goal and step >= options.check_every:
                    break
    seconds = time.perf_counter() - began
    model.eval()
    found = decode(model, list(unseen), options.beam_size)
    right = sum(a == b for a, b in zip(found, unseen.values(), strict=True)) / len(unseen)
    outcome = f"{right:.1%} of {len(unseen)} unseen strings are right to the last character"
    print(f"{name}: {outcome} ({step} steps, {seconds:.0f} s)")
    for text, made in list(zip(unseen, found, strict=True))[:3]:
        print(f"    {text:>24} -> {made}")
    return right >= options.goal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all", help="what to learn (default: all)")
    parser.add_argument("--model", choices=[*MODELS], default="pervasive", help="what learns (default: pervasive)")
    parser.add_argument("--steps", type=int, default=1500, help="most training steps of a task (default: 1500)")
    parser.add_argument("--batch-size", type=int, default=64, help="strings a step (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at the peak of one cycle (default: 3e-3)")
    parser.add_argument("--num-layers", type=int, help="layers (default: pervasive 6, convolutional 3, gnmt 2)")
    parser.add_argument("--growth-rate", type=int, default=24, help="pervasive: channels of a layer (default: 24)")
    parser.add_argument("--beam-size", type=int, default=1, help="hypotheses kept in the last decoding (default: 1)")
    parser.add_argument("--unseen", type=int, default=500, help="strings kept out of training (default: 500)")
    parser.add_argument("--check-every", type=int, default=100, help="steps between two tests (default: 100)")
    parser.add_argument("--goal", type=float, default=0.99, help="share of right strings that ends it (default: 0.99)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("steps", "batch_size", "num_layers", "growth_rate", "beam_size", "unseen", "check_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    reached = [train(name, options) for name in (TASKS if options.task == "all" else [options.task])]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
