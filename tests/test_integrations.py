"""seqaccel inside Lightning and Keras. Both are large, so that the tests with the real packages run where they are
installed; those of the callback's protocol run everywhere."""

import importlib
import sys
import types

import pytest
import torch

import seqaccel
from seqaccel.convert import measure


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 4, batch_first=True)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.fixture
def convert(monkeypatch):
    """``Convert`` where Lightning is two names, and what it logs."""
    logged = []
    package, pytorch, utilities = (types.ModuleType(name) for name in ("lightning", "pytorch", "utilities"))
    pytorch.Callback, utilities.rank_zero_info = type("Callback", (), {}), logged.append
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", pytorch)
    monkeypatch.setitem(sys.modules, "lightning.pytorch.utilities", utilities)
    monkeypatch.delitem(sys.modules, "seqaccel.integrations.lightning", raising=False)
    kind = importlib.import_module("seqaccel.integrations.lightning").Convert
    yield kind, logged
    sys.modules.pop("seqaccel.integrations.lightning", None)


def test_lightning_callback(convert):
    kind, logged = convert
    model, callback = Tagger(), kind(revert=True)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert callback.report is None
    callback.on_fit_start(None, model)
    assert isinstance(model.lstm, seqaccel.nn.LSTM) and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [row.path for row in callback.report] == ["lstm"] and "seqaccel.nn.LSTM" in logged[0]
    callback.on_fit_end(None, model)
    assert type(model.lstm) is torch.nn.LSTM
    callback = kind({"LSTM": False}, fullgraph=True, report=False)
    callback.on_fit_start(None, model)
    assert type(model.lstm) is torch.nn.LSTM and len(logged) == 1
    callback.on_fit_end(None, model)


def test_lightning_callback_that_measures(convert, monkeypatch):
    kind, _ = convert
    monkeypatch.setattr(measure, "SECONDS", 1e-4)
    model = Tagger()
    with pytest.raises(ValueError, match="example_inputs"):
        kind(optimize=True).on_fit_start(None, model)
    model.example_input_array = torch.randn(2, 5, 3)
    callback = kind(optimize=True)
    callback.on_fit_start(None, model)
    assert [row.path for row in callback.report] in (["lstm"], ["lstm", "(model)"])
    assert isinstance(model.lstm, seqaccel.nn.LSTM) == all(row.faster for row in callback.report)


def test_lightning_callback_refuses(convert):
    kind, _ = convert
    for options in ({"config": 3}, {"filter_fn": 3}, {"fullgraph": "yes"}, {"revert": None}):
        with pytest.raises(TypeError, match=next(iter(options))):
            kind(**options)
    with pytest.raises(ValueError, match="exclude"):
        kind(optimize=True, fullgraph=True)


def test_lightning_is_not_needed(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "seqaccel.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("seqaccel.integrations.lightning")


def test_lightning_trainer(tmp_path):
    """Losses are those of the model as it was, and a checkpoint loads into it."""
    lightning = pytest.importorskip("lightning")
    from seqaccel.integrations.lightning import Convert

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.tagger, self.losses = Tagger(), []

        def training_step(self, batch, index):
            loss = torch.nn.functional.mse_loss(self.tagger(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    x, y = torch.randn(6, 5, 3), torch.randn(6, 5, 2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 2)
    losses, path = [], tmp_path / "model.ckpt"
    for callbacks in ([], [Convert(report=False)]):
        torch.manual_seed(0)
        model = Model()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data)
        losses.append(model.losses)
    assert isinstance(model.tagger.lstm, seqaccel.nn.LSTM)
    torch.testing.assert_close(*map(torch.tensor, losses))
    trainer.save_checkpoint(path)
    fresh = Model()
    fresh.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    torch.testing.assert_close(fresh.tagger(x), model.tagger(x))


@pytest.mark.parametrize("options", [{}, {"use_bias": False, "go_backwards": True}, {"reset_after": False}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_keras_layer(monkeypatch, kind, options):
    """Outputs, states and gradients are those of Keras' layer with the same weights; saved models load."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    from seqaccel.integrations import keras as ours

    if kind == "LSTM" and "reset_after" in options:
        return
    theirs, layer = (
        getattr(package, kind)(6, return_sequences=True, return_state=True, **options)
        for package in (keras.layers, ours)
    )
    x = torch.randn(3, 5, 4)
    theirs(x), layer(x)
    for variable in theirs.weights:
        variable.assign(torch.randn(variable.shape))
    layer.set_weights(theirs.get_weights())
    found = []
    for each in (theirs, layer):
        results = each(x)
        loss = sum((result * result).sum() for result in results)
        found.append([*results, *torch.autograd.grad(loss, [v.value for v in each.trainable_variables])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    torch.testing.assert_close(layer(x, mask=mask)[0], theirs(x, mask=mask)[0])


def test_keras_model(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    from seqaccel.integrations.keras import GRU, LSTM

    with pytest.raises(ValueError, match="expected activation to be 'tanh', but got 'relu'"):
        LSTM(3, activation="relu")
    model = keras.Sequential([keras.Input((None, 4)), LSTM(6, return_sequences=True, dropout=0.2), GRU(5)])
    model.compile("sgd", "mse")
    x, y = torch.randn(8, 7, 4).numpy(), torch.randn(8, 5).numpy()
    history = model.fit(x, y, epochs=3, batch_size=4, verbose=0).history["loss"]
    assert len(history) == 3 and history[-1] == history[-1]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    torch.testing.assert_close(
        torch.as_tensor(loaded.predict(x, verbose=0)), torch.as_tensor(model.predict(x, verbose=0))
    )
