"""Models of other people's packages, built as their users build them: small real sizes, random data, no download.

Each function of ``MODELS`` returns a :class:`Subject`. ``benchmarks/packages.py`` runs them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

os.environ.setdefault("KERAS_BACKEND", "torch")


class Subject(NamedTuple):
    """A model, what it is called with in inference, and the loss of a training step."""

    model: torch.nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[], Tensor]
    size: str  #: for the table


class Row(NamedTuple):
    """A row of the table before it is measured."""

    build: Callable[[], Subject]
    needs: str | None  #: the module to import; ``None``: torch is enough


#: Name and row, in the table's order.
MODELS: dict[str, Row] = {}


def model(name: str, needs: str | None = None) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    def add(build: Callable[[], Subject]) -> Callable[[], Subject]:
        MODELS[name] = Row(build, needs)
        return build

    return add


def _quiet(*names: str) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


def _supervised(net: torch.nn.Module, inputs: tuple[Any, ...], size: str, pick: Any = lambda y: y) -> Subject:
    """A subject whose loss is the mean square of its (picked) output against random targets."""
    with torch.no_grad():
        target = torch.randn_like(pick(net(*inputs)))
    return Subject(net, inputs, lambda: F.mse_loss(pick(net(*inputs)), target), size)


# No package.


class LanguageModel(torch.nn.Module):
    """Embedding, three LSTM layers, logits."""

    def __init__(self, vocabulary: int = 256, hidden_size: int = 256, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, hidden_size)
        self.lstm = torch.nn.LSTM(hidden_size, hidden_size, 3, dropout=dropout)
        self.logits = torch.nn.Linear(hidden_size, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.lstm(self.embedding(tokens))[0])


@model("torch: LSTM language model")
def language_model(hidden_size: int = 256, steps: int = 64) -> Subject:
    net, tokens = LanguageModel(hidden_size=hidden_size), torch.randint(256, (steps + 1, 16))
    loss = lambda: F.cross_entropy(net(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())  # noqa: E731
    return Subject(net, (tokens[:-1],), loss, f"3 layers of {hidden_size}, 16×{steps} tokens")


@model("torch: causal convolutions")
def causal_convolutions(channels: int = 64) -> Subject:
    layers: list[torch.nn.Module] = []
    for dilation in (1, 2, 4, 8):
        layers.append(torch.nn.ConstantPad1d((2 * dilation, 0), 0.0))
        layers += [torch.nn.Conv1d(channels, channels, 3, dilation=dilation), torch.nn.ReLU()]
    net, x = torch.nn.Sequential(*layers), torch.randn(8, channels, 256)
    return _supervised(net, (x,), f"4 layers of {channels}, K=3, 8×256")


# Forecasting.

_TRAINER = dict(
    n_epochs=1,
    random_state=0,
    batch_size=32,
    pl_trainer_kwargs=dict(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ),
)  # fmt: skip


def _darts(made: Any, size: str) -> Subject:
    """The network that a darts model trains: ``fit`` has made it, and batches of 32 windows are random."""
    import numpy as np
    from darts import TimeSeries
    from darts.utils.data.torch_datasets.utils import ModuleStage, PLModuleInput

    _quiet("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "darts")
    series = TimeSeries.from_values(np.random.default_rng(0).standard_normal((400, 3)).astype("float32"))
    made.fit(series)
    net = made.model.cpu()
    steps = made.model.input_chunk_length
    inputs = (PLModuleInput(torch.randn(32, steps, 3), stage=ModuleStage.TRAIN),)
    return _supervised(net, inputs, size, lambda y: y.prediction)


@model("darts: TCNModel", "darts")
def darts_tcn() -> Subject:
    from darts.models import TCNModel

    made = TCNModel(
        96, 24, kernel_size=3, num_filters=64, num_layers=5, dropout=0.1, weight_norm=True, **_TRAINER
    )  # fmt: skip
    return _darts(made, "5 blocks of 64, K=3, weight norm, 32×96")


@model("darts: RNNModel LSTM", "darts")
def darts_lstm() -> Subject:
    from darts.models import RNNModel

    made = RNNModel(96, model="LSTM", hidden_dim=64, n_rnn_layers=2, dropout=0.1, training_length=96, **_TRAINER)
    return _darts(made, "2 layers of 64, 32×96")


@model("darts: BlockRNNModel GRU", "darts")
def darts_gru() -> Subject:
    from darts.models import BlockRNNModel

    made = BlockRNNModel(96, 24, model="GRU", hidden_dim=64, n_rnn_layers=2, dropout=0.1, **_TRAINER)
    return _darts(made, "2 layers of 64, 32×96")


def _forecasting_data() -> Any:
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import GroupNormalizer, TimeSeriesDataSet

    random = np.random.default_rng(0)
    frames = [
        pd.DataFrame(dict(time=range(160), group=str(g), value=random.standard_normal(160).cumsum() * 0.1, hour=0.0))
        for g in range(20)
    ]
    data = pd.concat(frames, ignore_index=True)
    data["hour"] = np.sin(data.time / 24)
    return TimeSeriesDataSet(
        data, time_idx="time", target="value", group_ids=["group"], max_encoder_length=96, min_encoder_length=96,
        max_prediction_length=24, min_prediction_length=24, time_varying_known_reals=["hour"],
        time_varying_unknown_reals=["value"], target_normalizer=GroupNormalizer(groups=["group"]),
    )  # fmt: skip


def _forecasting(kind: Any, size: str, **options: Any) -> Subject:
    _quiet("pytorch_lightning", "lightning")
    data = _forecasting_data()
    net = kind.from_dataset(data, **options)
    x, y = next(iter(data.to_dataloader(train=True, batch_size=64, num_workers=0)))
    return Subject(net, (x,), lambda: net.loss(net(x).prediction, y), size)


@model("pytorch-forecasting: TFT", "pytorch_forecasting")
def temporal_fusion_transformer() -> Subject:
    from pytorch_forecasting import TemporalFusionTransformer
    from pytorch_forecasting.metrics import QuantileLoss

    return _forecasting(
        TemporalFusionTransformer, "hidden 64, 2 LSTM layers, 64×(96+24)", hidden_size=64, lstm_layers=2, dropout=0.1,
        hidden_continuous_size=16, attention_head_size=4, loss=QuantileLoss(), log_interval=-1,
    )  # fmt: skip


@model("pytorch-forecasting: RecurrentNetwork GRU", "pytorch_forecasting")
def forecasting_gru() -> Subject:
    from pytorch_forecasting import RecurrentNetwork

    return _forecasting(
        RecurrentNetwork, "2 layers of 64, 64×(96+24)", cell_type="GRU", hidden_size=64, rnn_layers=2, dropout=0.1,
        log_interval=-1,
    )  # fmt: skip


@model("gluonts: DeepAR", "gluonts.torch")
def gluonts_deepar() -> Subject:
    from gluonts.torch.model.deepar.module import DeepARModel

    net = DeepARModel(
        freq="h", context_length=96, prediction_length=24, num_feat_dynamic_real=1, num_feat_static_real=1,
        num_feat_static_cat=1, cardinality=[1], num_layers=2, hidden_size=40, num_parallel_samples=20,
    )  # fmt: skip
    B, past = 32, net._past_length
    inputs = (
        torch.zeros(B, 1, dtype=torch.long), torch.zeros(B, 1), torch.randn(B, past, 1), torch.rand(B, past),
        torch.ones(B, past), torch.randn(B, 24, 1),
    )  # fmt: skip
    target = torch.rand(B, 24)
    loss = lambda: net.loss(*inputs, future_observed_values=torch.ones(B, 24), future_target=target).mean()  # noqa: E731
    return Subject(net, inputs, loss, "2 layers of 40, 32×(96+24), 20 samples")


# Reinforcement learning.


@model("sb3-contrib: RecurrentPPO policy", "sb3_contrib")
def recurrent_ppo() -> Subject:
    """The update of a rollout of 8 environments for 128 steps, two of whose episodes end on the way."""
    import gymnasium
    import numpy as np
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    policy = RecurrentActorCriticPolicy(
        gymnasium.spaces.Box(-1, 1, (24,), np.float32), gymnasium.spaces.Discrete(4), lambda _: 3e-4,
        lstm_hidden_size=128,
    )  # fmt: skip
    n, T = 8, 128
    zeros = lambda: torch.zeros(1, n, 128)  # noqa: E731
    states = RNNStates((zeros(), zeros()), (zeros(), zeros()))
    obs, actions, starts = torch.randn(n * T, 24), torch.randint(4, (n * T,)), torch.zeros(n * T)
    starts.view(n, T)[2, 40] = starts.view(n, T)[5, 90] = 1

    def loss() -> Tensor:
        values, log_prob, entropy = policy.evaluate_actions(obs, actions, states, starts)
        return F.mse_loss(values, torch.ones_like(values)) - log_prob.mean() - 0.01 * entropy.mean()

    return Subject(policy, (torch.randn(n, 24), states, torch.zeros(n), True), loss, "LSTM of 128, 8×128, resets")


def _torchrl(module: Any, states: dict[str, Tensor], size: str) -> Subject:
    from tensordict import TensorDict

    B, T = 8, 128
    is_init = torch.zeros(B, T, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[2, 40] = is_init[5, 90] = True
    data = TensorDict(dict(observation=torch.randn(B, T, 24), is_init=is_init, **states), [B, T])
    return _supervised(module, (data,), size, lambda td: td["features"])


@model("torchrl: LSTMModule, resets", "torchrl.modules")
def torchrl_lstm() -> Subject:
    from torchrl.modules import LSTMModule

    module = LSTMModule(
        24, 128, in_keys=["observation", "h", "c"], out_keys=["features", ("next", "h"), ("next", "c")],
        default_recurrent_mode=True,
    )  # fmt: skip
    states = dict(h=torch.zeros(8, 128, 1, 128), c=torch.zeros(8, 128, 1, 128))
    return _torchrl(module, states, "LSTM of 128, 8×128")


@model("torchrl: GRUModule, resets", "torchrl.modules")
def torchrl_gru() -> Subject:
    from torchrl.modules import GRUModule

    module = GRUModule(
        24, 128, in_keys=["observation", "h"], out_keys=["features", ("next", "h")], default_recurrent_mode=True
    )  # fmt: skip
    return _torchrl(module, dict(h=torch.zeros(8, 128, 1, 128)), "GRU of 128, 8×128")


# Speech and audio.


@model("speechbrain: CRDNN", "speechbrain.lobes.models.CRDNN")
def speechbrain_crdnn() -> Subject:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import LSTM

    net = CRDNN(
        input_shape=[4, 200, 40], cnn_channels=(16, 32), rnn_class=LSTM, rnn_layers=2, rnn_neurons=128, dnn_neurons=128
    )
    return _supervised(net, (torch.randn(4, 200, 40),), "2 bidirectional LSTM layers of 128, 4×200")


@model("speechbrain: GRU encoder", "speechbrain.nnet.RNN")
def speechbrain_gru() -> Subject:
    from speechbrain.nnet.RNN import GRU

    net = GRU(256, input_shape=[8, 200, 80], num_layers=2, bidirectional=True)
    return _supervised(net, (torch.randn(8, 200, 80),), "2 bidirectional layers of 256, 8×200", lambda y: y[0])


@model("openunmix: OpenUnmix", "openunmix.model")
def open_unmix() -> Subject:
    from openunmix.model import OpenUnmix

    net = OpenUnmix(nb_bins=513, hidden_size=256, max_bin=372)
    return _supervised(net, (torch.rand(2, 2, 513, 128),), "3 bidirectional layers of 128, 2×128 frames")


@model("asteroid: DPRNNTasNet", "asteroid.models")
def asteroid_dprnn() -> Subject:
    from asteroid.models import DPRNNTasNet

    net = DPRNNTasNet(2, bn_chan=64, hid_size=64, chunk_size=50, n_repeats=2, n_filters=64)
    return _supervised(net, (torch.randn(1, 8000),), "2 blocks of bidirectional LSTM of 64, 1 s at 8 kHz")


@model("asteroid: ConvTasNet, causal", "asteroid.models")
def asteroid_convtasnet() -> Subject:
    from asteroid.models import ConvTasNet

    net = ConvTasNet(
        2, n_blocks=4, n_repeats=2, bn_chan=64, hid_chan=128, skip_chan=64, n_filters=128, causal=True, norm_type="cgLN"
    )
    return _supervised(net, (torch.randn(1, 8000),), "8 depthwise blocks of 128, 1 s at 8 kHz")


@model("resemblyzer: VoiceEncoder", "resemblyzer")
def resemblyzer_encoder() -> Subject:
    from resemblyzer import VoiceEncoder

    return _supervised(VoiceEncoder("cpu", verbose=False), (torch.rand(4, 160, 40),), "3 LSTM layers of 256, 4×160")


@model("denoiser: Demucs", "denoiser.demucs")
def denoiser_demucs() -> Subject:
    from denoiser.demucs import Demucs

    return _supervised(Demucs(hidden=16, depth=4), (torch.randn(1, 1, 16000),), "2 LSTM layers of 128, 1 s at 16 kHz")


@model("demucs: HDemucs", "demucs.hdemucs")
def hybrid_demucs() -> Subject:
    from demucs.hdemucs import HDemucs

    net = HDemucs(["a", "b"], channels=8, depth=6, nfft=1024)
    return _supervised(net, (torch.randn(1, 2, 44100),), "bidirectional LSTM in 2 layers, 1 s at 44 kHz")


@model("pytorch-tcn: TCN", "pytorch_tcn")
def package_tcn() -> Subject:
    from pytorch_tcn import TCN

    net = TCN(24, [64, 64, 64, 64], kernel_size=3, dropout=0.1, causal=True)
    return _supervised(net, (torch.randn(8, 24, 256),), "4 blocks of 64, K=3, 8×256")


# Language.


@model("stanza: CharacterLanguageModel", "stanza.models.common.char_model")
def stanza_characters() -> Subject:
    from stanza.models.common.char_model import CharacterLanguageModel, CharVocab

    vocab = {"char": CharVocab([[chr(c) for c in range(32, 127)]])}
    args = dict(
        char_emb_dim=100, char_hidden_dim=512, char_num_layers=1, char_dropout=0.05, char_rec_dropout=0.0, cuda=False
    )  # fmt: skip
    net = CharacterLanguageModel(args, vocab)
    lengths = sorted(torch.randint(60, 121, (16,)).tolist(), reverse=True)
    chars = torch.randint(4, 90, (16, lengths[0]))
    loss = lambda: F.cross_entropy(net(chars, lengths)[2].flatten(0, 1), chars.flatten())  # noqa: E731
    return Subject(net, (chars, lengths), loss, "LSTM of 512, packed, 16×60…120 characters")


@model("stanza: CharacterModel", "stanza.models.common.char_model")
def stanza_words() -> Subject:
    """The tagger's character model: words of 1 to 12 letters, attention over a bidirectional LSTM."""
    from stanza.models.common.char_model import CharacterModel

    args = dict(char_emb_dim=100, char_hidden_dim=200, char_num_layers=1, dropout=0.33, char_rec_dropout=0)
    net = CharacterModel(args, {"char": range(100)}, bidirectional=True)
    sentences = [20, 18, 15, 14, 12, 11, 8, 2]
    words = sum(sentences)
    lengths = sorted(torch.randint(1, 13, (words,)).tolist(), reverse=True)
    chars = torch.randint(4, 100, (words, lengths[0]))
    inputs = (chars, chars == 0, list(range(words)), sentences, lengths)
    return _supervised(net, inputs, "bidirectional LSTM of 200, packed, 100 words", lambda y: y.data)


@model("keras: TorchModuleWrapper of a GRU", "keras")
def keras_gru() -> Subject:
    import keras

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = torch.nn.GRU(64, 128, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0][:, -1]

    net = keras.Sequential([keras.layers.TorchModuleWrapper(Last()), keras.layers.Dense(10)])
    x = torch.randn(16, 100, 64)
    net(x)
    return _supervised(net, (x,), "2 layers of 128, 16×100")
