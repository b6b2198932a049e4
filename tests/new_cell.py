"""Follows docs/adding-a-cell.md: puts its cell into a copy of the sources, builds that, lints it and runs the tests.

Run by ``make new-cell``, not by pytest: the build takes minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/adding-a-cell.md"
TESTS = "coupled_lstm or CoupledLSTM or tables_agree or test_configurations or examples"


def block(start: str) -> str:
    """The page's block of code that begins with ``start``."""
    blocks = re.findall(r"```\w+\n(.*?)```", (ROOT / PAGE).read_text(), re.DOTALL)
    found = [text for text in blocks if text.startswith(start)]
    assert len(found) == 1, f"{PAGE}: {len(found)} blocks begin with {start!r}"
    return found[0]


def on_the_page(text: str) -> str:
    """A piece of code that stands on the page within a sentence."""
    assert f"`{text}`" in re.sub(r"\s+", " ", (ROOT / PAGE).read_text()), text
    return text


def edits():
    """File, a line of it (its beginning), what is put before that line; if the line is empty the file is new."""
    struct, triton = block("// Greff"), block("@triton.jit")
    functions, row = triton.split('\n\n"coupled_lstm"')
    kernel = f'"coupled_lstm"{row}'
    yield "seqaccel/reference/rnn.py", "CELLS: dict", block("def coupled_lstm_cell") + "\n\n"
    yield "seqaccel/reference/rnn.py", '    "rnn_tanh":', '    "coupled_lstm": coupled_lstm_cell,\n'
    yield "tests/test_rnn_reference.py", "STEPS = {", block("def coupled_lstm_step") + "\n\n"
    yield "tests/test_rnn_reference.py", '    "layer_norm_lstm":', '    "coupled_lstm": coupled_lstm_step,\n'
    yield "seqaccel/functional/rnn/_cells.py", '    "rnn_tanh":', "    " + block('"coupled_lstm": CellSpec')
    yield "csrc/common/product_cells.h", "// The GRU of normalised products", struct + "\n"
    entry = on_the_page("kEntry<CoupledLstmCell>")
    yield "csrc/cpu/rnn/kernels.h", "extern const RnnKernels", "", ("kEntry<LstmCell>", f"{entry}, kEntry<LstmCell>")
    yield "csrc/cpu/packed/session.h", "  rnn_tanh,", "  coupled_lstm,\n"
    spec = on_the_page('{LayerKind::coupled_lstm, 3, true, 3, 0, {"GI", "GP", "G", "G"}}')
    yield "csrc/cpu/packed/program.cpp", '    {"rnn_tanh"', f'    {{"coupled_lstm", {spec}}},\n'
    step = on_the_page("recurrent_step<CoupledLstmCell>")
    case = f"    case LayerKind::coupled_lstm:\n      return recurrent_layer(t, l, {step});\n"
    yield "csrc/cpu/packed/kernels.h", "    case LayerKind::rnn_tanh:", case
    yield "kernels/rnn/cells.py", "# ---- traits ----", functions + "\n\n\n"
    yield "kernels/rnn/cells.py", '    "rnn_tanh":', f"    {kernel}"
    yield "kernels/rnn/checks.py", '    "rnn_tanh":', '    "coupled_lstm": _COMMON,\n'
    yield "seqaccel/nn/rnn/_coupled.py", "", block('"""The LSTM whose')
    yield (
        "seqaccel/nn/rnn/__init__.py",
        "from seqaccel.nn.rnn._gru",
        "from seqaccel.nn.rnn._coupled import CoupledLSTM\n",
    )
    yield "seqaccel/nn/rnn/__init__.py", '    "GRUCell",', '    "CoupledLSTM",\n'
    yield "seqaccel/nn/__init__.py", "    LSTM,", "    CoupledLSTM,\n"
    yield "seqaccel/nn/__init__.py", '    "GRUCell",', '    "CoupledLSTM",\n'
    yield "seqaccel/functional/rnn/_functions.py", "def peephole_lstm(", block("def coupled_lstm(") + "\n\n"
    yield "seqaccel/functional/rnn/__init__.py", "    gru,", "    coupled_lstm,\n"
    yield "seqaccel/functional/rnn/__init__.py", '    "gru",', '    "coupled_lstm",\n'
    yield "seqaccel/functional/__init__.py", "    gru,", "    coupled_lstm,\n"
    yield "seqaccel/functional/__init__.py", '    "gru",', '    "coupled_lstm",\n'
    yield "tests/test_rnn_module.py", '    ("PeepholeLSTM", {}),', '    ("CoupledLSTM", {}),\n'
    yield "tests/test_onnx.py", "        nn.MultiplicativeLSTM(4, 6,", "        nn.CoupledLSTM(4, 6),\n"
    yield "tests/test_session.py", '    "peephole_lstm":', '    "coupled_lstm": seqaccel.nn.CoupledLSTM,\n'


def put(root: Path, file: str, line: str, text: str, replaced: tuple[str, str] | None = None) -> None:
    path = root / file
    if not line:
        path.write_text(text)
        return
    before = path.read_text()
    assert len(re.findall(f"^{re.escape(line)}", before, re.MULTILINE)) == 1, f"{file}: {line!r} is not there once"
    after = re.sub(f"^{re.escape(line)}", lambda found: text + found[0], before, flags=re.MULTILINE)
    if replaced:
        assert replaced[0] in after, f"{file}: {replaced[0]!r} is not there"
        after = after.replace(*replaced, 1)
    path.write_text(after)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "seqaccel"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, root / file)
        for edit in edits():
            put(root, *edit)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(root),
            "SEQACCEL_CUDA": "0",
        }
        sources = sorted(str(p.relative_to(root)) for p in root.glob("csrc/**/*") if p.suffix in (".cpp", ".h"))

        def run(*command: str) -> None:
            print("$", *command[:4], flush=True)
            subprocess.run(command, cwd=root, env=environment, check=True)

        run("ruff", "check", "--fix", ".")
        run("ruff", "format", ".")
        run("clang-format", "-i", *sources)
        run("mypy")
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        (root / "seqaccel" / "kernels").symlink_to("../kernels")  # where an installed package has it (pyproject.toml)
        run(sys.executable, "-c", f"import seqaccel; assert seqaccel.__file__.startswith({scratch!r}), seqaccel")
        run(sys.executable, "-m", "pytest", "-q", "-k", TESTS)
    print(f"{PAGE}: its code builds and passes its tests")


if __name__ == "__main__":
    main()
