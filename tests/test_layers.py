"""An import goes down only: nn -> functional -> backends, reference, kernels; and so does an include of csrc."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What each layer may import of this package, itself included; what is not listed (info, …) may import all.
BELOW = {
    "_arguments": {"_arguments"},
    "_common": {"_common"},
    "_extension": {"_extension"},
    "backends": {"_extension", "backends"},
    "reference": {"reference"},
    "kernels": {"kernels"},
    "functional": {"_arguments", "_common", "_extension", "backends", "functional", "kernels", "reference"},
    "nn": {"_arguments", "_common", "functional", "nn"},
    "convert": {"_arguments", "convert", "functional", "nn"},
}
# Names that a layer knows nothing of.
UNKNOWN = {"reference": {"Function", "Module"}, "kernels": {"Function", "Module"}}
# What each folder of csrc may include, itself besides.
_BASE = {"common", "cpu/base"}
ROOMS: dict[str, set[str]] = {
    "common": set(),
    "cpu/base": {"common"},
    "cpu/matmul": _BASE,
    "cpu/rnn": _BASE | {"cpu/matmul"},
    "cpu/packed": _BASE | {"cpu/matmul", "cpu/rnn"},
    "cpu/scan": _BASE,
    "cpu/conv": _BASE | {"cpu/matmul"},
    "cpu/attention": _BASE,
    "cpu/attention/additive": _BASE | {"cpu/attention"},
    "cpu/attention/block_sparse": _BASE | {"cpu/attention"},
    "cpu/attention/decoder": _BASE | {"cpu/attention/additive", "cpu/rnn"},
    "cpu/attention/hierarchical": _BASE | {"cpu/attention"},
    "cpu/attention/memory": _BASE | {"cpu/attention"},
    "cpu/testing": _BASE,
    "cuda": {"common"},
    "cuda/scan": {"common", "cuda"},
    "session": {"common"},
    "autograd": set(),
}


def layer_files() -> list[tuple[str, pathlib.Path]]:
    found = []
    for layer in BELOW:
        folder = ROOT / "kernels" if layer == "kernels" else ROOT / "seqaccel" / layer
        paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        assert paths, f"no files in layer {layer}"
        found += [(layer, path) for path in paths]
    return found


def imported(tree: ast.AST, package: list[str]) -> set[str]:
    """Full names of what a file of ``package`` imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return names


@pytest.mark.parametrize(("layer", "path"), layer_files(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_imports_go_down(layer: str, path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text())
    place = ROOT / "kernels" if layer == "kernels" else ROOT / "seqaccel"
    folders = [] if path.parent == place else list(path.parent.relative_to(place).parts)
    package = ["seqaccel", *(["kernels"] if layer == "kernels" else []), *folders]
    for name in imported(tree, package):
        head, _, rest = name.partition(".")
        if head == "seqaccel":
            target, _, inner = rest.partition(".")
            assert target in BELOW[layer], f"{path.name} (layer {layer}) imports {name}"
            assert target == layer or not re.search(r"(^|\.)_", inner), (
                f"{path.name} (layer {layer}) imports {name}, which is private"
            )
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    below = BELOW[layer] - {layer}
    for node in nodes:
        of_below = isinstance(node.value, ast.Name) and node.value.id in below
        assert not (of_below and node.attr.startswith("_")), f"{path.name} uses {ast.unparse(node)}"
    attributes = {node.attr for node in nodes}
    assert not attributes & UNKNOWN.get(layer, set()), f"{path.name} (layer {layer}) uses autograd functions or modules"


NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.relative_to(ROOT / "csrc").as_posix())
def test_includes_go_down(path: pathlib.Path) -> None:
    room, text = path.parent.relative_to(ROOT / "csrc").as_posix(), path.read_text()
    for name in re.findall(r'#\s*include "([^"]+)"', text):
        assert (ROOT / "csrc" / name).is_file(), f"{path.name} includes {name}: not a path from csrc's root"
        target = pathlib.PurePosixPath(name).parent.as_posix()
        assert target in ROOMS[room] | {room}, f"{path.name} (in {room}) includes {name}"
    if room.startswith("cpu/"):  # each folder is a namespace
        inner = room.removeprefix("cpu/").replace("/", "::")
        for name in re.findall(r"^namespace seqaccel(.*) {$", text, re.MULTILINE):
            opened = name.removeprefix("::SEQACCEL_ISA").replace("inline ", "")
            assert opened == f"::{inner}", f"{path.name} opens namespace seqaccel{name}"
