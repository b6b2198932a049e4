"""What the operators refuse: a kernel must not read out of bounds whatever a raw call or an exported graph holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqaccel.kernels.rnn.cells import CELLS


def _refuse(message: str) -> None:
    raise RuntimeError(f"rnn: {message}")


def check(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    reset: Tensor | None = None,
) -> dict[str, int]:
    """The sizes, by their letters; RuntimeError if ranks, sizes, dtypes or devices do not fit together."""
    if cell not in CELLS:
        _refuse(f"no cell {cell!r}; there are {', '.join(CELLS)}")
    spec = CELLS[cell]
    shapes = spec.weights
    if len(weights) != len(shapes):
        _refuse(f"expected {len(shapes)} weights of {cell}, but got {len(weights)}")
    if input.dim() != 3 or weights[1] is None or weights[1].dim() != 2 or weights[1].shape[0] % spec.gates:
        _refuse("expected input (T, B, I) and weight_hh (G * H, P)")
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        _refuse(f"backend 'triton' takes float32, float16 and bfloat16, but got {input.dtype}")
    weight_hh = weights[1]
    assert weight_hh is not None
    sizes = dict(zip("TBI", input.shape, strict=True))
    sizes |= {"G": weight_hh.shape[0], "H": weight_hh.shape[0] // spec.gates, "P": weight_hh.shape[1], "3": 3}
    projected = spec.projects and weights[4] is not None
    if not sizes["H"] or (sizes["P"] != sizes["H"] and not projected):
        _refuse(f"expected weight_hh to have {sizes['H']} columns, but got {sizes['P']}")
    if (c_0 is not None) != spec.has_c:
        _refuse(f"{cell} has {'a' if spec.has_c else 'no'} c_0")
    named = [(f"weights[{i}]", w, letters) for i, (w, letters) in enumerate(zip(weights, shapes, strict=True))]
    for i, (name, w, _) in enumerate(named):
        if w is None and i not in (2, 3) and not (spec.projects and i == 4) and not (spec.given and i == 0):
            _refuse(f"{cell} needs {name}")
    if weights[0] is None and sizes["I"] != sizes["G"]:
        _refuse(f"without weight_ih expected input to have {sizes['G']} features, but got {sizes['I']}")
    zones = [("zoneout_h", zoneout_h, "TBP"), ("zoneout_c", zoneout_c, "TBH")]
    for name, tensor, letters in [*named, ("h_0", h_0, "BP"), ("c_0", c_0, "BH"), *zones]:
        if tensor is None or (letters[0] == "T" and tensor.numel() == 1):
            continue
        shape = tuple(sizes[letter] for letter in letters)
        if tuple(tensor.shape) != shape:
            _refuse(f"expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")
    for name, tensor, _ in [*named, ("h_0", h_0, ""), ("c_0", c_0, ""), *zones]:
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            _refuse(f"expected {name} to be {input.dtype} on {input.device}, as input is")
    if lengths is not None and (
        lengths.dtype != torch.int64 or tuple(lengths.shape) != (sizes["B"],) or lengths.device != input.device
    ):
        _refuse(f"expected lengths to be torch.int64 of shape ({sizes['B']},) on {input.device}")
    if reset is not None and (
        reset.dtype != torch.bool or reset.shape != input.shape[:2] or reset.device != input.device
    ):
        _refuse(f"expected reset to be torch.bool of shape {tuple(input.shape[:2])} on {input.device}")
    return sizes


def check_backward(
    cell: str,
    grads: Sequence[tuple[Tensor | None, str]],
    output: Tensor,
    saved: Sequence[Tensor],
    expected: Sequence[tuple[tuple[int, ...], bool]],
    sizes: dict[str, int],
    needs: Sequence[bool],
) -> None:
    """The rest of what rnn_backward takes; ``grads`` with the letters of their shapes."""
    for tensor, letters in [*grads, (output, "TBP")]:
        shape = tuple(sizes[letter] for letter in letters)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != output.device):
            _refuse(f"expected a gradient or output to have shape {shape}, but got {tuple(tensor.shape)}")
    if len(saved) != len(expected):
        _refuse(f"expected {len(expected)} saved tensors, but got {len(saved)}")
    for tensor, (shape, wide) in zip(saved, expected, strict=True):
        dtype = torch.float32 if wide else output.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != output.device:
            _refuse(f"expected a saved tensor to be {dtype} of shape {shape}, but got {tuple(tensor.shape)}")
    weights = len(CELLS[cell].weights)
    if len(needs) != 1 + weights:
        _refuse(f"expected {1 + weights} needs, but got {len(needs)}")
