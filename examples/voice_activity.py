"""Voice activity of a 16 kHz stream, 32 ms at a time: the network of Silero VAD v5, in a Session.

    python examples/voice_activity.py

The network is rebuilt from its published shapes, with weights of its own: a short-time Fourier transform as a
convolution (258 filters of 256 samples, a hop of 128), four convolutions (129, 128, 64, 64 and 128 channels, strides 1,
2, 2 and 1), an LSTMCell of 128 units and a head. It is trained for a minute on bursts of harmonics in noise, made here.
Then one thread runs a stream chunk by chunk: the module, ONNX Runtime (if it is installed) and a Session, which takes
the module as it is.
"""

from __future__ import annotations

import argparse
import io
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqaccel

RATE, CHUNK, CONTEXT, WINDOW, HOP = 16000, 512, 64, 256, 128
State = tuple[Tensor, tuple[Tensor, Tensor]]


class VoiceActivity(nn.Module):
    """Probability of speech for each chunk of 512 samples."""

    def __init__(self) -> None:
        super().__init__()
        angle = 2 * math.pi * torch.outer(torch.arange(WINDOW // 2 + 1.0), torch.arange(float(WINDOW))) / WINDOW
        basis = torch.cat([angle.cos(), -angle.sin()]) * torch.hann_window(WINDOW)
        self.register_buffer("basis", basis.unsqueeze(1))  # [258, 1, 256]
        sizes, strides = [WINDOW // 2 + 1, 128, 64, 64, 128], [1, 2, 2, 1]
        convolutions = [
            nn.Conv1d(inputs, outputs, 3, stride, padding=1)
            for inputs, outputs, stride in zip(sizes, sizes[1:], strides, strict=False)
        ]
        self.encoder = nn.Sequential(*[layer for conv in convolutions for layer in (conv, nn.ReLU())])
        self.cell = nn.LSTMCell(128, 128)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(128, 1, 1), nn.Sigmoid())

    def init_state(self, batch_size: int) -> State:
        """The samples before the first chunk, and h and c."""
        zeros = self.basis.new_zeros
        return zeros(batch_size, CONTEXT), (zeros(batch_size, 128), zeros(batch_size, 128))

    def features(self, samples: Tensor) -> Tensor:
        """(B, 128) of 576 samples (B, 576)."""
        padded = F.pad(samples, (0, CONTEXT), mode="reflect").unsqueeze(1)  # [B, 1, 640]
        real, imaginary = F.conv1d(padded, self.basis, stride=HOP).chunk(2, 1)  # [B, 129, 4]
        return self.encoder(torch.sqrt(real**2 + imaginary**2 + 1e-12)).squeeze(-1)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, 512): the probability (B, 1)."""
        context, (h, c) = state
        h, c = self.cell(self.features(torch.cat([context, x_t], 1)), (h, c))
        return self.head(h.unsqueeze(-1)).squeeze(-1), (x_t[:, -CONTEXT:], (h, c))

    def forward(self, x_t: Tensor, context: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """A step with the state as tensors, as an ONNX graph has it: its LSTM is one operator there."""
        weights = list(self.cell.parameters())
        x = self.features(torch.cat([context, x_t], 1)).unsqueeze(0)
        h, c = torch.lstm(x, [h.unsqueeze(0), c.unsqueeze(0)], weights, True, 1, 0.0, False, False, False)[1:]
        return self.head(h[0].unsqueeze(-1)).squeeze(-1), x_t[:, -CONTEXT:], h[0], c[0]


def bursts(streams: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Samples (streams, chunks, 512), and 1 for the chunks of a burst.

    A burst is harmonics of a wandering pitch with the envelope of syllables, in noise.
    """
    count = chunks * CHUNK
    t = torch.arange(count) / RATE
    pitch = torch.empty(streams, 1).uniform_(90, 250) * (1 + 0.1 * torch.sin(2 * math.pi * t * 1.5))
    phase = 2 * math.pi * torch.cumsum(pitch, 1) / RATE
    voice = sum(torch.sin(k * phase + k) / k for k in range(1, 12))
    syllables = 0.6 + 0.4 * torch.sin(2 * math.pi * (t * torch.empty(streams, 1).uniform_(3, 6)))
    segments = torch.rand(streams, math.ceil(chunks / 12)) < 0.5
    active = segments.repeat_interleave(12, 1)[:, :chunks]
    gain = active.repeat_interleave(CHUNK, 1) * torch.empty(streams, 1).uniform_(0.05, 0.3)
    noise = torch.randn(streams, count) * torch.empty(streams, 1).uniform_(0.005, 0.03)
    return (voice * syllables * gain + noise).view(streams, chunks, CHUNK), active.float()


def run(model: VoiceActivity, x: Tensor) -> Tensor:
    """Probabilities (streams, chunks)."""
    state, found = model.init_state(len(x)), []
    for x_t in x.unbind(1):
        y_t, state = model.step(x_t, state)
        found.append(y_t)
    return torch.cat(found, 1)


def train(model: VoiceActivity, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for i in range(steps):
        x, active = bursts(16, 24)
        loss = F.binary_cross_entropy(run(model, x), active)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 20 == 0:
            print(f"step {i:4d}  loss {loss.item():.3f}")


def onnx_runner(model: VoiceActivity) -> Callable[[Tensor], float] | None:
    """Runs a chunk by ONNX Runtime, or None where it is not installed."""
    try:
        import onnxruntime  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    context, (h, c) = model.init_state(1)
    file, names = io.BytesIO(), ["x", "context", "h", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(1, CHUNK), context, h, c), file, input_names=names, dynamo=False, opset_version=17
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    state = [context.numpy(), h.numpy(), c.numpy()]

    def step(x_t: Tensor) -> float:
        y, *state[:] = session.run(None, dict(zip(names, [x_t.numpy(), *state], strict=True)))
        return float(y.item())

    return step


def microseconds(runners: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int = 15) -> dict[str, float]:
    """The median time of a chunk for each runner, in rounds that take turns."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, step in runners.items():
            begin = time.perf_counter()
            for x_t in x:
                step(x_t)
            times[name].append((time.perf_counter() - begin) / len(x) * 1e6)
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps; 0: random weights")
    parser.add_argument("--chunks", type=int, default=100, help="chunks of a timed round")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = VoiceActivity()
    train(model, options.steps)
    model.eval()
    torch.set_num_threads(1)
    x, active = bursts(1, options.chunks)
    session = seqaccel.Session(model, example=x[:, 0])
    with torch.no_grad():
        expected = run(model, x)[0]
        found = session.extend(x.transpose(0, 1)).flatten()
        difference = (found - expected).abs().max().item()
        right = ((found > 0.5) == (active[0] > 0.5)).float().mean().item()
        print(f"the session differs from the module by {difference:.1e}; {right:.0%} of the chunks are right")
        state = [model.init_state(1)]

        def module_step(x_t: Tensor) -> None:
            _, state[0] = model.step(x_t, state[0])

        onnx = onnx_runner(model)
        runners = {"module": module_step, **({"ONNX Runtime": onnx} if onnx else {}), "Session": session.step}
        print("one chunk of 32 ms, one thread:")
        for name, time_of in microseconds(runners, x[0].unsqueeze(1)).items():
            print(f"  {name:12s} {time_of:7.1f} us")


if __name__ == "__main__":
    main()
