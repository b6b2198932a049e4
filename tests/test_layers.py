"""An import goes down only: nn -> functional -> backends, reference, kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What each layer may import of this package, itself included; what is not listed (info, …) may import all.
BELOW = {
    "_extension": {"_extension"},
    "backends": {"_extension", "backends"},
    "reference": {"reference"},
    "kernels": {"kernels"},
    "functional": {"_extension", "backends", "functional", "kernels", "reference"},
    "nn": {"functional", "nn"},
}
# Names that a layer knows nothing of.
UNKNOWN = {"reference": {"Function", "Module"}, "kernels": {"Function", "Module"}}


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
            target = rest.partition(".")[0]
            assert target in BELOW[layer], f"{path.name} (layer {layer}) imports {name}"
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & UNKNOWN.get(layer, set()), f"{path.name} (layer {layer}) uses autograd functions or modules"
