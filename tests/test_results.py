"""docs/results.md is what the records give."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import results


def test_the_page_is_that_of_the_records():
    assert results.PAGE.read_text() == results.page(), "run python -m benchmarks.results"


def test_tables_of_records():
    machine = {"cpu": "a CPU", "threads": 1}
    run = {
        "machine": machine,
        "versions": {"torch": "2.13.0+cpu"},
        "commit": "abc",
        "settings": {"layers": 2},
        "hidden_size": 8,
        "parameters": 1234,
    }
    base = {"set": "jsb", "model": "tcn", "epochs": 2, **run}
    records = [
        {**base, "use_torch": False, "test": 8.0, "seconds": 1.0},
        {**base, "use_torch": False, "test": 8.5, "seconds": 1.2},
        {**base, "use_torch": True, "test": 8.4, "seconds": 2.2},
    ]
    page = results.music(records)
    assert "| TCN | 2 | 8 | 1,234 | 2 | 8.25 (8.00 to 8.50) | 8.40 | 8.10 |" in page
    assert "a CPU, 1 thread; torch 2.13.0; commit `abc`." in page and "Nottingham" not in page
    assert "| TCN | JSB Chorales | 0.55 | 1.10 | 2.00 |" in results.music_time(records)


def test_table_of_synthetic_tasks():
    adding = {"task": "adding", "model": "tcn", "parameters": 70_000, "test": {"loss": 3e-5}, "published": 5.8e-5}
    bias = {"task": "forget-bias", "model": "bias-1", "parameters": 99, "published": None}
    records = [adding, {**bias, "test": {"right": 0.5}}, {**bias, "test": {"right": 1.0}}]
    page = results.synthetic(records)
    assert "| adding problem | TCN | 70,000 | 1 | 3.0e-05 | 5.8e-05 |" in page
    assert "| long lag, right answers | LSTM, forget bias 1 | 99 | 2 | 75.0% (50.0% to 100.0%) | – |" in page


def test_tables_of_parallel_in_time():
    count = {"sweeps": 1039, "chunks_redone": 2, "error": 3e-9}
    ages = [
        {"seconds": 0.0, "bits": 8.0, "contraction_factor": 0.5, "counts": {"4096": count}},
        {"seconds": 90.2, "bits": 2.5, "contraction_factor": None, "counts": {"4096": count}},
    ]
    records = [{"model": "stable-lstm", "trained": ages, "times": {"4096": {"sweeps": 9, "plain": 0.1, "parallel": 1}}}]
    page = results.sweeps(records)
    assert "| contraction factor | T = 4,096 |" in page and "| stable LSTM | 0 s | 8.000 | 0.500 | 1,039 |" in page
    assert "| stable LSTM | 90 s | 2.500 | ≥ 1 | 1,039 |" in page
    assert "| stable LSTM | 4,096 | 9 | 100 ms | 1,000 ms | 10.0 |" in results.sweep_times(records)
    assert results.redone(records).endswith("is 3e-09. 4 chunks ran again.")


def test_table_of_the_demo():
    pair = {"validation_bits": [2.5, 2.75], "tokens_per_second": [30_000.4, 20_000.0]}
    page = results.demo([{"model": "sru", "titles": ["SRU", "torch.nn.LSTM"], **pair}])
    assert "| SRU | torch.nn.LSTM | 2.500 (2.750) | 30,000 (20,000) | 1.50 |" in page


def test_table_of_packed_weights():
    bits = {"validation_bits": [2.5, 2.6], "quantized_bits": {"int8": 2.50123, "bfloat16": 2.499}}
    page = results.quantized([{"titles": ["LSTM", "torch.nn.LSTM"], "steps": 250, **bits}])
    assert "| steps | float32 | int8 | bfloat16 |" in page and "| LSTM | 250 | 2.5000 | 2.5012 | 2.4990 |" in page


def test_table_of_the_neural_gpu():
    run = {"steps": 1600, "seconds": 128.4, "unseen": {"8": 0.9963, "10": 0.767}, "settings": {"seed": 3}}
    page = results.neural_gpu([run])
    assert "| seed | steps | seconds | 8 bits | 10 bits |" in page and "| 3 | 1,600 | 128 | 99.63% | 76.70% |" in page
