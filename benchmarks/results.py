"""Writes docs/results.md from the records of training runs under benchmarks/results.

``python -m benchmarks.results`` writes the page and the curves of the synthetic tasks; with ``--check`` it only
compares the page, and exits with 1 if it differs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
STATIC = ROOT / "docs" / "static"

TITLES = {
    "rnn": "RNN",
    "lstm": "LSTM",
    "gru": "GRU",
    "tcn": "TCN",
    "peephole-lstm": "LSTM with peepholes",
    "layer-norm-lstm": "LSTM with layer norm",
    "mlstm": "multiplicative LSTM",
    "sru": "SRU",
    "sru++": "SRU++",
    "qrnn": "QRNN",
    "mingru": "minGRU",
    "minlstm": "minLSTM",
    "indrnn": "IndRNN",
    "wavenet": "WaveNet",
    "hierarchical": "hierarchical attention",
    "stable-lstm": "stable LSTM",
}
SETS = {"jsb": "JSB Chorales, 300,000 parameters", "nottingham": "Nottingham, 1,000,000 parameters"}
PUBLISHED = {  # Bai et al. 2018, table 1
    "jsb": {"rnn": 8.91, "lstm": 8.45, "gru": 8.43, "tcn": 8.10},
    "nottingham": {"rnn": 4.05, "lstm": 3.29, "gru": 3.46, "tcn": 3.07},
}


def read(folder: pathlib.Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def spread(values: list[float]) -> str:
    """The mean, and the lowest and highest of several."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def origin(records: list[dict]) -> str:
    """Machines and commits of records, in a sentence."""
    threads = {n: f"{n} thread{'s' * (n > 1)}" for n in (r["machine"]["threads"] for r in records)}
    machines = {f"{r['machine']['cpu']}, {threads[r['machine']['threads']]}" for r in records}
    versions = {f"torch {r['versions']['torch'].partition('+')[0]}" for r in records}
    commits = {f"commit `{r['commit']}`" for r in records}
    return "; ".join([" and ".join(sorted(machines)), *(", ".join(sorted(part)) for part in (versions, commits))]) + "."


def music(records: list[dict]) -> str:
    sections = []
    for data, title in SETS.items():
        found = [r for r in records if r["set"] == data]
        if not found:
            continue
        rows = []
        for model, name in TITLES.items():
            ours, torchs = ([r for r in found if r["model"] == model and r["use_torch"] == t] for t in (False, True))
            if ours:
                published = PUBLISHED[data].get(model)
                rows.append(
                    [
                        name,
                        str(ours[0]["settings"]["layers"]),
                        str(ours[0]["hidden_size"]),
                        f"{ours[0]['parameters']:,}",
                        str(len(ours)),
                        spread([r["test"] for r in ours]),
                        spread([r["test"] for r in torchs]) if torchs else "–",
                        f"{published:.2f}" if published else "–",
                    ]
                )
        header = ["model", "layers", "hidden size", "parameters", "seeds", "test NLL", "torch's modules", "published"]
        sections += [f"### {title}", table(header, rows), origin(found)]
    return "\n\n".join(sections)


def music_time(records: list[dict]) -> str:
    def seconds(data: str, model: str, use_torch: bool) -> float | None:
        found = [r for r in records if (r["set"], r["model"], r["use_torch"]) == (data, model, use_torch)]
        return statistics.median(r["seconds"] / r["epochs"] for r in found) if found else None

    rows = []
    for data in SETS:
        for model, name in TITLES.items():
            ours, torchs = (seconds(data, model, use_torch) for use_torch in (False, True))
            if ours and torchs:
                row = [name, SETS[data].partition(",")[0], f"{ours:.2f}", f"{torchs:.2f}", f"{torchs / ours:.2f}"]
                rows.append(row)
    return table(["model", "data", "seconds an epoch", "with torch's modules", "ratio"], rows)


def stable(records: list[dict]) -> str:
    """Perplexity of pairs, by the inputs that an output has seen."""
    header = ["model", "steps", "bytes in a step", "learning rate", *records[0]["truncated_bits"][0], "validation"]
    rows = []
    for record in records:
        settings = record["settings"]
        rates = (settings["learning_rate_of_ours"] or settings["learning_rate"], settings["learning_rate"])
        for title, rate, bits, whole in zip(
            record["titles"], rates, record["truncated_bits"], record["validation_bits"], strict=True
        ):
            if title == "stable LSTM":
                title = f"{title}, forget gates to {settings['forget']}"
            size = [str(settings["steps"]), f"{record['tokens_per_step']:,}", f"{rate:g}"]
            rows.append([title, *size, *(f"{2**value:.3f}" for value in bits.values()), f"{2**whole:.3f}"])
    return table(header, rows)


def demo(records: list[dict]) -> str:
    """A row a pair: ours, torch's in brackets."""
    rows = []
    for record in sorted(records, key=lambda record: list(DEMO).index(record["model"])):
        (ours, stock), bits, speed = (record[key] for key in ("titles", "validation_bits", "tokens_per_second"))
        row = [ours, stock, f"{bits[0]:.3f} ({bits[1]:.3f})", f"{speed[0]:,.0f} ({speed[1]:,.0f})"]
        rows.append([*row, f"{speed[0] / speed[1]:.2f}"])
    header = ["model", "instead of", "bits per byte (torch's)", "bytes per second (torch's)", "ratio"]
    return table(header, rows)


DEMO = ("lstm", "sru", "tcn", "attention")

DEMO_TEXT = """\
## Language models

`make demo`: byte-level language models of Python's standard library, each beside the same model of
torch's modules, or the one that people would take instead. A pair trains on the same batches in
turns. Bits per byte are of text that training has not seen."""


def quantized(records: list[dict]) -> str:
    header = ["model", "steps", "float32", *records[0]["quantized_bits"]]
    rows = []
    for record in records:
        values = (record["validation_bits"][0], *record["quantized_bits"].values())
        rows.append([record["titles"][0], str(record["steps"]), *(f"{value:.4f}" for value in values)])
    return table(header, rows)


TASKS = {  # what a record reports, and how
    "adding": ("adding problem", "loss", ".1e"),
    "copy": ("copy memory", "loss", ".1e"),
    "forget-bias": ("long lag, right answers", "right", ".1%"),
    "counting": ("counting, right up to n", "longest", ".0f"),
}


def synthetic(records: list[dict]) -> str:
    rows = []
    for task, (title, key, form) in TASKS.items():
        found = [r for r in records if r["task"] == task]
        for model in dict.fromkeys(r["model"] for r in found):
            runs = [r for r in found if r["model"] == model]
            values = sorted(r["test"][key] for r in runs)
            result = format(statistics.median(values), form)
            if len(values) > 1:
                result += f" ({values[0]:{form}} to {values[-1]:{form}})"
            published = "–" if runs[0]["published"] is None else format(runs[0]["published"], ".1e")
            name = TITLES.get(model, model.replace("bias-", "LSTM, forget bias "))
            rows.append([title, name, f"{runs[0]['parameters']:,}", str(len(runs)), result, published])
    curves = [
        f"![{title.partition(',')[0].capitalize()}: loss over training, and the test](static/synthetic-{task}.png)"
        for task, (title, *_) in TASKS.items()
        if any(r["task"] == task for r in records)
    ]
    return "\n\n".join([table(["task", "model", "parameters", "seeds", "test", "published"], rows), *curves])


def draw_synthetic(records: list[dict]) -> None:
    """The curves of the synthetic tasks, as the script itself draws them."""
    sys.path.insert(0, str(ROOT / "examples"))
    import synthetic

    for task in {r["task"] for r in records}:
        synthetic.plot(task, [r for r in records if r["task"] == task], STATIC / f"synthetic-{task}.png")


SYNTHETIC = """\
## Synthetic tasks

`examples/synthetic.py`. "Published" is table 1 of Bai et al. (2018) for the adding problem (600
steps, mean squared error) and copy memory (1,000 blanks, cross entropy): the TCN and the data are
theirs, recurrent models have as many parameters. Long lag: the first of 100 symbols is asked for at
the end, and one of eight answers is right by chance (Jozefowicz et al., 2015). A forget gate of bias
b keeps about sigmoid(b)^100 of its cell: half with 5, nothing with 1. Counting: strings a^n b^n,
trained on n of up to 10 and tested on n of up to 1,023 (Gers and Schmidhuber, 2001). With several
seeds, the median comes first, then the lowest and the highest."""

MUSIC = """\
## Polyphonic music

Negative log-likelihood (NLL) per frame; lower is better. `examples/polyphonic_music.py` trains every
model on binary piano rolls, with the splits and the budgets of parameters of Bai et al. (2018). With
several seeds, the mean comes first, then the lowest and the highest. "Published" is table 1 of that
paper. Settings of the RNN, LSTM, GRU and TCN were chosen by the validation NLL of a few runs with
seed 0; those of the others were not tuned. Each record holds the command that made it."""

MUSIC_TIME = """\
### Training time

CPU time of one epoch of training on one thread: the same script with seqaccel's modules and with
torch's (`--torch`)."""

STABLE = """\
## Stable recurrent nets

Perplexity per byte of language models that are kept stable, beside the same models that are not
(Miller and Hardt, 2019): `examples/train_language_model.py --stable`. Both have the same budget.
The paper bounds an LSTM's forget gates by 0.64. The columns with numbers are a truncated
evaluation: an output sees that many of the latest inputs. "all" is the full recurrence over the
same bytes. "validation" is the full recurrence over more text, in sequences of the length of
training."""

QUANTIZED = """\
## Packed weights

Bits per byte of the demo's language model on validation text, with the weights of its recurrent layer as
trained and packed by `seqaccel.quantize`: `examples/train_language_model.py --quantize`."""


def long_memory(records: list[dict]) -> str:
    rows = []
    for task in ("needle", "copy"):
        found = [r for r in records if r["task"] == task]
        for r in sorted(found, key=lambda r: -r["accuracy"]):
            name = "dense attention" if r["model"] == "dense" else TITLES[r["model"]]
            sizes = (f"{r[key]:,}" for key in ("length", "parameters", "steps", "trained_length"))
            rows.append([task, name, *sizes, f"{r['accuracy']:.1%}"])
    return table(["task", "model", "positions", "parameters", "steps", "trained on up to", "right"], rows)


def neural_gpu(records: list[dict]) -> str:
    lengths = list(records[0]["unseen"])
    rows = [
        [
            str(r["settings"]["seed"]),
            f"{r['steps']:,}",
            f"{r['seconds']:.0f}",
            *(f"{r['unseen'][n]:.2%}" for n in lengths),
        ]
        for r in records
    ]
    return table(["seed", "steps", "seconds", *(f"{n} bits" for n in lengths)], rows)


NEURAL_GPU = """\
## Binary addition

`examples/neural_gpu.py` trains a Neural GPU to add numbers of up to 8 bits. Seconds are CPU time. A
column counts the sums that are right in every bit, of pairs of numbers that training has not seen:
all such pairs of up to 8 bits, and 1,000 of each greater length."""

LONG_MEMORY = """\
## Recall over long sequences

`examples/long_memory.py`: every model trains for 300 seconds of CPU time of one thread, here of an
AMD EPYC (Zen 4), from short sequences to long ones as it gets them right. "Right" counts the answers
at full length on 100 sequences that training has not seen. Needle: three pairs of a key and a value
lie in noise, and the keys are asked for at the end; one of eight values is right by chance. Copy: ten
of eight symbols, 1,000 blanks, then the symbols again.

![The needle: right answers over training, and by where it lies](static/long-memory.png)

![Copy: right answers over training](static/long-memory-copy.png)"""


def sweeps(records: list[dict]) -> str:
    """Of nets at several ages, by the length of the text."""
    lengths = list(records[0]["trained"][0]["counts"])
    rows = []
    for record in records:
        for each in record["trained"]:
            proven = each["contraction_factor"]
            row = [TITLES[record["model"]], f"{each['seconds']:.0f} s", f"{each['bits']:.3f}"]
            row.append(f"{proven:.3f}" if proven is not None and proven < 1 else "≥ 1")
            rows.append([*row, *(f"{each['counts'][length]['sweeps']:,}" for length in lengths)])
    header = ["model", "trained for", "bits per byte", "contraction factor"]
    return table([*header, *(f"T = {int(length):,}" for length in lengths)], rows)


def sweep_times(records: list[dict]) -> str:
    rows = []
    for record in records:
        for length, each in record["times"].items():
            seconds = (f"{each[way] * 1e3:,.0f} ms" for way in ("plain", "parallel"))
            ratio = f"{each['parallel'] / each['plain']:.1f}"
            rows.append([TITLES[record["model"]], f"{int(length):,}", str(each["sweeps"]), *seconds, ratio])
    return table(["model", "T", "sweeps", "step by step", "parallel in time", "ratio"], rows)


def redone(records: list[dict]) -> str:
    """What became of the results, in two sentences."""
    counts = [each for r in records for age in r["trained"] for each in age["counts"].values()]
    chunks, error = sum(each["chunks_redone"] for each in counts), max(each["error"] for each in counts)
    return f"The largest difference from the run step by step is {error:.0e}. {chunks} chunks ran again."


PARALLEL = """\
## Parallel in time

`seqaccel.functional.parallel_in_time` on the layer of byte-level language models of 384 units, batch 1:
`examples/parallel_in_time.py`. The models train on one thread and are looked at before, after a third
of that time and at its end. Sweeps go on until no h changes by more than 1e-6, in float64, on text that
training has not seen. The contraction factor is what `seqaccel.nn.utils.contraction_factor` proves of
the layer for every input: below 1 it forgets whatever it sees. From 1 on nothing is proven."""

PARALLEL_TIME = """\
Forward and backward pass of the trained layers in float32, sweeps until no h changes by more than 1e-5,
on one thread of a CPU, where sweeps do more work than the steps:"""


def page() -> str:
    parts = ["# Results", "`make report` makes this page from the records in `benchmarks/results`."]
    if records := read(RECORDS / "music"):
        parts += [MUSIC, music(records)]
    if records := read(RECORDS / "music-time"):
        parts += [MUSIC_TIME, music_time(records), origin(records)]
    if records := read(RECORDS / "synthetic"):
        parts += [SYNTHETIC, synthetic(records), origin(records)]
    if records := read(RECORDS / "long-memory"):
        parts += [LONG_MEMORY, long_memory(records)]
    if records := read(RECORDS / "neural-gpu"):
        parts += [NEURAL_GPU, neural_gpu(records), origin(records)]
    if records := read(RECORDS / "demo"):
        parts += [DEMO_TEXT, demo(records), origin([record["run"] for record in records])]
    if records := read(RECORDS / "stable"):
        parts += [STABLE, stable(records), origin([record["run"] for record in records])]
    if records := read(RECORDS / "quantized"):
        parts += [QUANTIZED, quantized(records), origin([record["run"] for record in records])]
    if records := sorted(read(RECORDS / "parallel-in-time"), key=lambda record: list(TITLES).index(record["model"])):
        parts += [PARALLEL, sweeps(records), redone(records), PARALLEL_TIME, sweep_times(records)]
        parts.append(origin([record[run] for record in records for run in ("run", "timed")]))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page would change")
    options = parser.parse_args()
    text = page()
    if options.check:
        if PAGE.read_text() != text:
            print(f"{PAGE} is not what the records give: run python -m benchmarks.results", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    if records := read(RECORDS / "synthetic"):
        draw_synthetic(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
