"""The demo: bad input ends in one line and exit code 2; a resumed run is the run that was not interrupted."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

DEMO = pathlib.Path(__file__).parent.parent / "examples" / "train_language_model.py"
TINY = ["--batch-size=2", "--length=40", "--hidden-size=64", "--num-layers=1", "--validation-bytes=80", "--sample=8"]


def demo(*arguments: object, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("SEQACCEL_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, str(DEMO), "--threads=2", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} green bottles, hanging on the wall\n" for i in range(200)))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe" * 100, "not UTF-8 text"),
        (b"abc\0def" * 100, "not text"),
        (b"short", "needs"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, content, message):
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    done = demo("--data", path, "--model=lstm", "--steps=1", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("arguments", [["--device=cuda:99"], ["--device=nonsense"], ["--backend=cuda"]])
def test_what_is_not_there_is_one_line_and_exit_code_2(tmp_path, text, arguments):
    done = demo("--data", text, "--model=lstm", "--steps=1", *TINY, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train_language_model: "), done.stderr
    assert "Traceback" not in done.stderr


def test_output_folder_that_is_a_file(tmp_path, text):
    done = demo("--data", text, "--out", text, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("model", ["sru", "tcn", "attention"])
def test_every_model_trains_beside_torchs(tmp_path, text, model):
    assert demo("--data", text, "--model", model, *TINY, "--steps=2", "--out=out", cwd=tmp_path).returncode == 0
    (results,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["titles"]) == 2 and len(results["bits"][0]) == 2


def test_stable_beside_unstable(tmp_path, text):
    common = ["--data", text, "--stable", *TINY, "--out=out"]
    done = demo(*common, "--steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for results in json.loads((tmp_path / "out" / "results.json").read_text()):
        assert results["names"] == ["stable", "unstable"] and len(results["bits"]) == 2
        assert results["settings"]["steps"] == 2 and results["settings"]["forget"] in (0.64, 0.9)
        for bits in results["truncated_bits"]:
            assert list(bits) == ["13", "25", "50", "100", "all"]
        stable = results["truncated_bits"][0]
        assert abs(stable["100"] - stable["all"]) < 1e-3
    refused = demo(*common, "--model=sru", cwd=tmp_path)
    assert refused.returncode == 2 and "sru goes without --stable" in refused.stderr


def test_resumed_run_equals_uninterrupted_run(tmp_path, text):
    common = ["--data", text, "--model=lstm", *TINY]
    assert demo(*common, "--steps=4", "--out=whole", cwd=tmp_path).returncode == 0
    assert demo(*common, "--steps=2", "--out=parts", cwd=tmp_path).returncode == 0
    done = demo(*common, "--steps=4", "--out=parts", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text())[0] for name in ("whole", "parts"))
    assert len(whole["titles"]) == 2 and len(whole["bits"][0]) == 4
    for key in ("bits", "validation_bits", "text"):
        assert whole[key] == parts[key], key
    assert (tmp_path / "parts" / "training.png").stat().st_size > 1000


def test_packed_weights_cost_few_bits(tmp_path, text):
    common = ["--data", text, *TINY, "--steps=40", "--no-compare", "--quantize", "--out=out"]
    done = demo(*common, "--model=lstm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = json.loads((tmp_path / "out" / "results.json").read_text())
    (exact,), packed = results["validation_bits"], results["quantized_bits"]
    assert list(packed) == ["int8", "bfloat16"] and exact < 7
    assert all(0 < abs(bits - exact) < 0.02 for bits in packed.values())
    refused = demo(*common, "--model=tcn", cwd=tmp_path)
    assert refused.returncode == 2 and "--quantize" in refused.stderr


def test_other_settings_and_damaged_checkpoints_are_refused(tmp_path, text):
    common = ["--data", text, "--model=lstm", "--no-compare", "--steps=1", "--out=out", *TINY]
    assert demo(*common, cwd=tmp_path).returncode == 0
    done = demo(*common, "--resume", "--seed=5", cwd=tmp_path)
    assert done.returncode == 2 and "other settings (seed)" in done.stderr
    (tmp_path / "out" / "lstm.pt").write_bytes(b"not a checkpoint")
    done = demo(*common, "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "not a checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_the_convolutional_translator_streams():
    path = DEMO.with_name("sequence_to_sequence.py")
    spec = importlib.util.spec_from_file_location("sequence_to_sequence", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.convolutional(argparse.Namespace(num_layers=2)).double().eval()
    source, padding = example.encode(["12345", "987", "1"])
    target = torch.randint(128, (3, 9))
    with torch.no_grad():
        logits = model(source, target, padding)
        state = model.init_state(source, padding)
        first, state = model.extend(target[:, :4], state)
        last = []
        for t in range(4, 9):
            y, state = model.step(target[:, t], state)
            last.append(y)
        torch.testing.assert_close(torch.cat([first, torch.stack(last, 1)], 1), logits)
        torch.testing.assert_close(model(source[1:2, :4], target[1:2], padding[1:2, :4]), logits[1:2])


@pytest.mark.parametrize("model", ["pervasive", "convolutional", "gnmt"])
def test_sequence_to_sequence(tmp_path, model):
    script = DEMO.with_name("sequence_to_sequence.py")
    small = [
        f"--model={model}",
        "--steps=2",
        "--batch-size=2",
        "--num-layers=1",
        "--growth-rate=4",
        "--unseen=4",
        "--check-every=1",
    ]
    command = [sys.executable, str(script), *small, "--beam-size=2", "--goal=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 4 unseen strings are right") == 3
    assert subprocess.run([*command, "--goal=1"], cwd=tmp_path, capture_output=True, check=False).returncode == 1
    refused = subprocess.run([*command, "--steps=0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--steps" in refused.stderr


@pytest.mark.parametrize("model", ["wavenet", "lstm"])
def test_audio_effect(tmp_path, model):
    script = DEMO.with_name("audio_effect.py")
    small = ["--steps=2", "--batch-size=2", "--samples=64", "--seconds=0.1", f"--model={model}"]
    done = subprocess.run(
        [sys.executable, str(script), *small], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in ("of the energy", "blocks and the whole sound agree to", "real-time factor", "largest block"):
        assert line in done.stdout
    refused = subprocess.run([sys.executable, str(script), "--block=0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--block" in refused.stderr


@pytest.mark.parametrize(
    ("task", "models"), [("needle", ["hierarchical", "dense", "lstm", "sru", "tcn"]), ("copy", ["tcn"])]
)
def test_long_memory(tmp_path, task, models):
    script = DEMO.with_name("long_memory.py")
    small = ["--length=64", "--steps=2", "--tokens=64", "--hidden-size=32", "--check=2", "--unseen=4", "--out=out"]
    command = [sys.executable, str(script), f"--task={task}", *small]
    command.append(f"--model={'all' if len(models) > 1 else models[0]}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert {record["model"] for record in records} == set(models)
    for record in records:
        assert record["steps"] == 2 and record["length"] == 64 and 0 <= record["accuracy"] <= 1
        assert record["curve"][-1] == [record["seconds"], record["accuracy"]]
    assert (tmp_path / "out" / f"{task}.png").stat().st_size > 1000
    refused = subprocess.run([*command, "--hidden-size=33"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--hidden-size" in refused.stderr


def test_parallel_in_time(tmp_path, text):
    script = DEMO.with_name("parallel_in_time.py")
    small = [
        "--data",
        str(text),
        "--seconds=0.05",
        "--hidden-size=8",
        "--lengths",
        "16",
        "65",
        "--rounds=1",
        "--out=out",
    ]
    command = [sys.executable, str(script), *small]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("--stage", "train", "count").returncode == 0
    before = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    done = run()
    assert done.returncode == 0, done.stderr
    assert set(before) == {"lstm.json", "stable-lstm.json", "gru.json"}
    for name, old in before.items():
        record = json.loads((tmp_path / "out" / name).read_text())
        assert record["trained"] == json.loads(old)["trained"]
        assert [each["steps"] > 0 for each in record["trained"]] == [False, True, True]
        for counts in [*(each["counts"] for each in record["trained"]), record["times"]]:
            assert list(counts) == ["16", "65"] and all(1 < each["sweeps"] <= 65 for each in counts.values())
        if name == "stable-lstm.json":
            assert all(each["contraction_factor"] < 1 for each in record["trained"])
    refused = run("--seed=1")
    assert refused.returncode == 2 and "made with other settings" in refused.stderr


def test_neural_gpu(tmp_path):
    script = DEMO.with_name("neural_gpu.py")
    small = ["--bits=4", "--test", "9", "--steps=2", "--channels=4", "--batch-size=2", "--out=out"]
    command = [sys.executable, str(script), *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # it has learnt nothing yet
    assert done.stdout.count("unseen sums are right") == 2
    record = json.loads((tmp_path / "out" / "addition-0.json").read_text())
    assert record["steps"] == 2 and set(record["unseen"]) == {"4", "9"} and record["command"].endswith("--out=out")
    refused = subprocess.run([*command, "--bits=0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--bits" in refused.stderr


@pytest.mark.parametrize("task", ["adding", "copy", "forget-bias", "counting"])
def test_synthetic(tmp_path, task):
    script = DEMO.with_name("synthetic.py")
    small = ["--steps=3", "--check-every=2", "--length=6", "--batch-size=2", "--unseen=4", "--out=out", "--model=all"]
    command = [sys.executable, str(script), f"--task={task}", *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(records) == done.stdout.count(f"{task}, ") == {"forget-bias": 3, "counting": 2}.get(task, 4)
    for record in records:
        assert record["steps"] == 3 and [step for step, *_ in record["curve"]] == [2, 3]
        assert record["settings"]["length"] == 6 and record["test"]["loss"] > 0
    assert (tmp_path / "out" / f"{task}.png").stat().st_size > 1000


def test_synthetic_refuses(tmp_path):
    script = DEMO.with_name("synthetic.py")
    small = ["--task=counting", "--model=lstm", "--steps=1", "--unseen=1", "--out=out"]
    command = [sys.executable, str(script), *small]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    for more, message in (("--length=3", "made with other settings"), ("--model=tcn", "counting has lstm")):
        done = subprocess.run([*command, more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_resumed_synthetic_run_is_the_whole_run(monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    example = importlib.import_module("synthetic")
    task = example.TASKS["copy"]
    settings = dataclasses.replace(task.settings, length=8, batch_size=2, check_every=2)
    valid = example.unseen(task, settings, 2, example.VALID_SEED)

    def training():
        torch.manual_seed(0)
        return example.Training(task, example.Convolutional(1, 4, 10, 0.2), settings)

    whole, part, resumed = training(), training(), training()
    for _ in range(2):
        whole.advance(0, valid)
    torch.manual_seed(0)
    training()
    part.advance(0, valid)
    saved = part.state_dict()
    torch.manual_seed(7)
    resumed.load_state_dict(saved)
    resumed.advance(0, valid)
    assert resumed.curve == whole.curve and resumed.step == 4


@pytest.mark.parametrize("model", ["mingru", "sru", "lstm"])
def test_recurrent_policy(tmp_path, model):
    script = DEMO.with_name("recurrent_policy.py")
    small = ["--updates=2", "--environments=4", "--steps=8", "--hidden-size=8", "--unseen=4", "--out=out"]
    command = [sys.executable, str(script), f"--model={model}", *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 4 unseen mazes are solved" in done.stdout
    record = json.loads((tmp_path / "out" / f"{model}.json").read_text())
    assert len(record["curve"]) == 2 and 0 <= record["share"] <= 1
    assert (tmp_path / "out" / f"{model}.png").stat().st_size > 1000
    refused = subprocess.run([*command, "--longest=3"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--longest" in refused.stderr
