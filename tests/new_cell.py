"""Follows docs/adding-a-cell.md: puts its cells into a copy of the sources, builds and lints that and runs the tests.

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
TESTS = "coupled_lstm or CoupledLSTM or t_gru or TGRU or tables_agree or test_configurations or examples"

# What a cell has beside the page's code: the definition once more, as a loop over scalars; the head and the docstring
# of its module; its function.
LOOP = '''def coupled_lstm_step(w, x, h, c):
    """Greff et al.: what the forget gate leaves is the input gate."""
    v = [
        dot(w["weight_ih"][k], x) + dot(w["weight_hh"][k], h) + w["bias_ih"][k] + w["bias_hh"][k] for k in range(3 * H)
    ]
    f, g, o = (v[k * H : (k + 1) * H] for k in range(3))
    c = [sigma(f[j]) * c[j] + (1 - sigma(f[j])) * math.tanh(g[j]) for j in range(H)]
    return [sigma(o[j]) * math.tanh(c[j]) for j in range(H)], c


'''
HEAD = '''"""The LSTM whose input gate is what the forget gate leaves."""

from typing import Any

from seqaccel.nn.rnn._base import Recurrent
from seqaccel.nn.rnn._gru import _refuse


'''
DOCSTRING = r'''
    r"""Multi-layer long short-term memory with coupled input and forget gates.

    .. math::
        f_t, o_t &= \sigma(W_{f,o} x_t + b_{f,o} + U_{f,o} h_{t-1} + b'_{f,o}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Constructor, shapes, streams and errors are those of :class:`LSTM`, without ``proj_size`` and ``forget_bias``; its
    parameters have 3 * H rows, f, g and o one after the other.

    Source: Greff et al., *LSTM: a search space odyssey*, 2015, variant CIFG.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.CoupledLSTM(10, 20)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

'''
FUNCTION = '''def coupled_lstm(
    input: Tensor,
    state: Pair | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    zoneout: tuple[Factor, Factor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Pair]:
    """One layer and direction of a long short-term memory with coupled gates."""
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    return _with_cell_state("coupled_lstm", "coupled_lstm", input, state, weights, lengths, reverse, zoneout)


'''
COLUMN_LOOP = """def t_gru(u, c, w, b, *_):
    f = sigmoid(u[1] + b[0])
    c = f * c + (1 - f) * u[0]
    return np.tanh(u[2] + b[1]) * c, c


"""
COLUMN_HEAD = '''"""The strongly typed GRU."""

from seqaccel.nn.scan._base import Columns


'''
COLUMN_DOCSTRING = r'''
    r"""A stack of strongly typed GRUs.

    .. math::
        f_t, o_t &= \sigma(W_f x_t + b_f), \tanh(W_o x_t + b_o) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot W_z x_t \\
        h_t &= o_t \odot c_t

    Source: Balduzzi and Ghifary, *Strongly-typed recurrent neural networks*, 2016.

    Example:
        >>> import torch
        >>> from seqaccel.nn.scan import TGRU
        >>> output, c_n = TGRU(8, 16)(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """

'''


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
    first, body = block("class CoupledLSTM").split("\n", 1)
    row = on_the_page('"coupled_lstm": CellSpec(3, True),')
    # The least: the reference serves.
    yield "seqaccel/reference/rnn.py", "def project(", block("@_cell(") + "\n\n"
    yield "seqaccel/functional/rnn/_cells.py", '    "rnn_tanh":', f"    {row}\n"
    yield "seqaccel/nn/rnn/_coupled.py", "", HEAD + first + DOCSTRING + body
    export = "from seqaccel.nn.rnn._coupled import CoupledLSTM\n"
    yield "seqaccel/nn/rnn/__init__.py", "from seqaccel.nn.rnn._gru", export
    yield "seqaccel/nn/rnn/__init__.py", '    "GRUCell",', '    "CoupledLSTM",\n'
    # Its definition once more, by which it is tested.
    yield "tests/test_rnn_reference.py", "STEPS = {", LOOP
    yield "tests/test_rnn_reference.py", '    "layer_norm_lstm":', '    "coupled_lstm": coupled_lstm_step,\n'
    # Kernels.
    yield "csrc/common/product_cells.h", "// The GRU of normalised products", block("// Greff") + "\n"
    yield "csrc/common/product_cells.h", "    RnnTanhCell,", "    CoupledLstmCell,\n"
    yield "kernels/rnn/cells.py", "# ---- r, z = sigmoid", block("@triton.jit\ndef coupled") + "\n\n"
    # The column cell.
    first, body = block("class TGRU").split("\n", 1)
    row = on_the_page('"t_gru": Cell(_t_gru, 0, 2),')
    yield "seqaccel/reference/scan.py", "class Cell(NamedTuple):", block("def _t_gru") + "\n\n"
    yield "seqaccel/reference/scan.py", '    "sru": Cell(', f"    {row}\n"
    row = on_the_page('"t_gru": ColumnSpec(inputs=3, operations=17, biases=2, output_is_state=False),')
    yield "seqaccel/functional/scan/_cells.py", '    "sru": _SRU,', f"    {row}\n"
    yield "tests/test_scan_columns.py", "#: A value after a step", COLUMN_LOOP
    yield "tests/test_scan_columns.py", '    "sru": sru,', '    "t_gru": t_gru,\n'
    yield "csrc/common/column_cells.h", "// What stands for the input in the highway", block("// Balduzzi") + "\n"
    yield "csrc/common/column_cells.h", "    PoolCell<true>,", "    TGruCell,\n"
    yield "kernels/scan/cells.py", "# ---- QRNN.", block("@triton.jit\ndef t_gru") + "\n\n"
    for way, arguments in (("forward", "v, c, m, skip"), ("backward", "v, c, state, m, skip, dh, dc")):
        branch = '    elif CELL == "sru_tanh":\n        result = sru_tanh_' + way
        text = f'    elif CELL == "t_gru":\n        result = t_gru_{way}({arguments})\n'
        yield "kernels/scan/cells.py", branch, text
    yield "seqaccel/nn/scan/_t_gru.py", "", COLUMN_HEAD + first + COLUMN_DOCSTRING + body
    yield "seqaccel/nn/scan/__init__.py", "from seqaccel.nn.scan._sru_pp", "from seqaccel.nn.scan._t_gru import TGRU\n"
    yield "seqaccel/nn/scan/__init__.py", "for _name in __all__:", '__all__ += ["TGRU"]\n\n'
    # The public function.
    yield "seqaccel/functional/rnn/_functions.py", "def peephole_lstm(", FUNCTION
    yield "seqaccel/functional/rnn/_functions.py", '    "gru",', '    "coupled_lstm",\n'


def put(root: Path, file: str, line: str, text: str) -> None:
    path = root / file
    if not line:
        path.write_text(text)
        return
    before = path.read_text()
    assert len(re.findall(f"^{re.escape(line)}", before, re.MULTILINE)) == 1, f"{file}: {line!r} is not there once"
    after = re.sub(f"^{re.escape(line)}", lambda found: text + found[0], before, flags=re.MULTILINE)
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
