"""The polyphonic-music example: every model is causal and ignores padding; a queue goes on where it was stopped."""

import importlib.util
import io
import json
import pathlib
import sys

import pytest
import torch
from scipy.io import savemat

PATH = pathlib.Path(__file__).parent.parent / "examples" / "polyphonic_music.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("polyphonic_music", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests share the process
    return module


@pytest.fixture
def folder(example, monkeypatch, tmp_path):
    """Tiny data and a budget to match."""
    import numpy as np

    generator = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 6), ("valid", 3), ("test", 2)):
        rolls = np.empty((1, count), dtype=object)
        for i in range(count):
            rolls[0, i] = (generator.random((5 + 2 * i, 88)) < 0.05).astype(np.uint8)
        content[f"{part}data"] = rolls
    for name, data in list(example.SETS.items()):
        savemat(tmp_path / data.file, content)
        monkeypatch.setitem(example.SETS, name, example.dataclasses.replace(data, budget=40_000))
    return tmp_path


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_torchs_models_have_as_many_parameters(example, folder):
    common = ["--data", str(folder), "--epochs=1"]
    models = ["--model", *example.TORCH_MODELS]
    assert example.main([*common, "--out", str(folder / "ours"), *models]) == 0
    assert example.main([*common, "--out", str(folder / "torch"), "--model", "all", "--torch"]) == 0
    ours, others = records(folder / "ours"), records(folder / "torch")
    for name in example.TORCH_MODELS:
        assert ours[f"jsb-{name}-0"]["parameters"] == others[f"jsb-{name}-torch-0"]["parameters"] <= 40_000


def test_every_model_is_causal_and_ignores_padding(example, folder):
    rolls = example.load(folder / "JSB_Chorales.mat")["train"]
    (batch,) = example.batches_of(rolls, len(rolls))
    for model, settings in example.SETTINGS["nottingham"].items():
        network = example.Network(example.MODELS[model](32, settings), settings).eval()
        with torch.no_grad():
            total, frames = example.nll(network, batch)
            apart = [example.nll(network, roll[:, None])[0] for roll in rolls]
            changed = batch.clamp(min=0)
            first = network(changed)[:7]
            changed[7:] = 1 - changed[7:]
            torch.testing.assert_close(network(changed)[:7], first, msg=f"{model} sees what is to come")
        assert frames == sum(len(roll) - 1 for roll in rolls)
        torch.testing.assert_close(total, sum(apart), msg=f"{model} sees padding")


def test_a_stopped_queue_goes_on_and_ends_as_if_never_stopped(example, folder, monkeypatch, capsys):
    common = ["--data", str(folder), "--model", "gru", "tcn", "--seed", "0", "1", "--epochs=3", "--save-every=0"]
    assert example.main([*common, "--out", str(folder / "whole")]) == 0
    epochs = []
    whole_epoch = example.Training.epoch

    def stopped(self, *arguments):
        epochs.append(arguments)
        if len(epochs) in (3, 6):  # in the first run; in the second one
            raise KeyboardInterrupt
        whole_epoch(self, *arguments)

    monkeypatch.setattr(example.Training, "epoch", stopped)
    parts = [*common, "--out", str(folder / "parts")]
    assert [example.main(parts) for _ in range(3)] == [130, 130, 0]
    assert len(epochs) == 4 * 3 + 2
    assert example.main(parts) == 0 and len(epochs) == 4 * 3 + 2  # all records are there
    whole, found = records(folder / "whole"), records(folder / "parts")
    assert len(whole) == 4 and not list((folder / "parts").glob("*.pt"))
    for name, record in whole.items():
        assert record["curve"] == found[name]["curve"] and record["test"] == found[name]["test"]
        assert len(record["curve"]) == record["epochs"] == 3
    assert example.main([*parts, "--dropout=0.25"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_bad_data_is_one_line_and_exit_code_2(example, folder, monkeypatch, capsys):
    (folder / "other").mkdir()
    for arguments, message in (
        ([], "cannot be read"),
        (["--download"], "SHA-256"),
    ):
        monkeypatch.setattr(example.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"something else"))
        assert example.main(["--data", str(folder / "other"), "--out", str(folder / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "other" / "JSB_Chorales.mat").write_bytes(b"not MATLAB" * 100)
    assert example.main(["--data", str(folder / "other"), "--out", str(folder / "out")]) == 2
    assert "not a file of piano rolls" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.parse(["--torch", "--model", "sru"])
    assert "torch has no sru" in capsys.readouterr().err
