"""What is shipped: every tile with the fullest epilogue, and each way of telling sequences apart."""

from __future__ import annotations

from typing import Any

from seqaccel.kernels._launch import Configuration
from seqaccel.kernels.conv import depthwise, product, taps, wavenet

_NUMBERS = {"threshold": "i64", "scale": "fp32"}
_EPILOGUE = {"ACTIVATION": "relu", "RELU": True, "DROPOUT": True}
_GATED = {"ACTIVATION": "gated", "RELU": True, "DROPOUT": True}
_NONE = {"ACTIVATION": "none", "RELU": False, "DROPOUT": False}
_TAPS = dict.fromkeys(("K", "down", "across", "side", "width"), "i32")


def _row(kernel: Any, pointers: dict[str, str], constexprs: dict[str, Any], *shape: int, **facts: Any) -> Configuration:
    """A row whose other pointers are absent, and whose other arguments are 32-bit integers."""
    signature = dict(pointers)
    for name in kernel.arg_names:
        if name in signature or name in constexprs:
            continue
        if name.startswith("p_"):
            constexprs = {**constexprs, name: None}
        else:
            signature[name] = _NUMBERS.get(name, "i32")
    return Configuration(kernel, signature, constexprs, *shape, **facts)


def _given(kind: str, *names: str) -> dict[str, str]:
    fixed = {"seed": "*i64", "active": "*u8", "partial": "*fp32", "sums": "*fp32", "taps": "*fp32", "bounds": "*i64"}
    fixed |= dict.fromkeys(("bound", "begin", "end", "row"), "*i32")
    return {"p_" + name: fixed.get(name, kind) for name in names}


def _products() -> list[Configuration]:
    rows = []
    epilogue = ("x", "weight", "bias", "residual", "seed", "y")
    segments = ("history", "bound", "row")
    for kind, p in (("ieee", "*fp32"), ("tf32", "*fp32"), ("half", "*bf16")):
        spills = 0 if kind == "ieee" else 544
        tiles = [(99 << 10, side, tile) for side, tile in product._PRODUCT[kind].items()]
        tiles += [(product._MORE, side, tile) for side, tile in product._PRODUCT_MORE.get(kind, {}).items()]
        wide = ("C",) if kind != "ieee" else ()
        for memory, side, (steps, depth, warps, stages) in tiles:
            precision = "tf32" if kind == "tf32" else "ieee"
            shape = {"GRID": False, "BO": side, "BT": steps, "BC": depth, "PRECISION": precision}
            facts = {"spills": spills, "least_shared": memory, "multiples_of_16": ("C",)}
            kernel = product.conv_product_kernel
            options = {"DIRECTION": -1, **_EPILOGUE, **shape}
            rows.append(_row(kernel, _given(p, *epilogue, "active"), options, warps, stages, **facts))
            if side >= 32:
                halves = {"DIRECTION": -1, **_GATED, **shape, "BO": side // 2}
                rows.append(_row(kernel, _given(p, *epilogue, "pre"), halves, warps, stages, **facts))
        options = {"DIRECTION": -1, **_EPILOGUE, **shape}
        rows.append(_row(kernel, _given(p, *epilogue, *segments), options, warps, product._WITH_HISTORY, **facts))
        for grid in (True, False):
            data = {"DIRECTION": 1, **_NONE, **shape, "GRID": grid}
            given = _given(p, "x", "weight", "y", *(() if grid else ("bound", "residual")))
            rows.append(_row(kernel, given, data, warps, stages, **facts))
        for side, (steps, warps, stages) in product._WEIGHT[kind].items():
            shape = {"GRID": False, "BO": side, "BC": side, "BT": steps, "PRECISION": precision}
            facts = {"spills": spills, "multiples_of_16": ("PO", "PC")}
            rows.append(_row(product.conv_weight_kernel, _given(p, "g", "x", "partial"), shape, warps, stages, **facts))
        given = _given(p, "g", "x", "begin", "partial")
        rows.append(_row(product.conv_weight_kernel, given, {**shape, "GRID": True}, warps, stages, **facts))
        tile = {"BC": product._STAGE, "BT": product._STAGE}
        rows.append(_row(product.conv_stage_kernel, _given(p, "x", "before", "staged"), tile, 4, multiples_of_16=wide))
        tile = {"BO": product._STAGE, "BT": product._STAGE}
        given = _given(p, "grad_y", "y", "seed", "g", "grad_residual", "sums")
        for options, more in ((_EPILOGUE, "active"), (_GATED, "pre")):
            rows.append(_row(product.conv_gradient_kernel, given | _given(p, more), {**options, **tile}, 8))
        parts = {"p_partial": "*fp32", "p_sum": p}
        rows.append(_row(product.conv_sum_kernel, parts, {"BP": 8, "BN": product._SUM}, 4))
    return rows


def _depthwise() -> list[Configuration]:
    rows, single = [], {"TAPS": 0, "REST": 0, "N": depthwise.STRIP, "V": 1}
    forward, backward = depthwise.conv_depthwise_kernel, depthwise.conv_depthwise_gradient_kernel
    for p, v in (("*fp32", 4), ("*bf16", 8)):
        vectors = {"GRID": False, "TAPS": 4, "REST": 3, "N": depthwise.STRIP // v, "V": v}
        given = _given(p, "x", "weight", "bias", "residual", "seed", "y", "active")
        rows.append(_row(forward, given, {**vectors, **_EPILOGUE}, 4, multiples_of_16=("T",)))
        given |= _given(p, "history", "begin", "row")
        rows.append(_row(forward, given, {"GRID": False, **single, **_EPILOGUE}, 4))
        rows.append(_row(forward, _given(p, "x", "weight", "y"), {"GRID": True, **single, **_NONE}, 4))
        given = _given(p, "grad_y", "y", "active", "seed", "x", "weight", "addend", "grad_x")
        given |= _given(p, "grad_residual", "taps", "sums")
        rows.append(_row(backward, given, {**vectors, **_EPILOGUE}, 4, multiples_of_16=("T", "L")))
        rows.append(_row(backward, given | _given(p, "end"), {"GRID": False, **single, **_EPILOGUE}, 4))
        for apart in (("end", "row"), ("bounds",)):
            given = _given(p, "grad_y", "y", "active", "seed", "folded", *apart)
            rows.append(_row(taps.conv_fold_kernel, given, {**_EPILOGUE, "BT": taps.FOLD}, 4))
    return rows


def _layers() -> list[Configuration]:
    rows = []
    for kind, p in (("ieee", "*fp32"), ("tf32", "*fp32"), ("half", "*bf16")):
        for side, (steps, depth, height, warps, stages) in wavenet.TILES[kind].items():
            shape = {"BG": side, "BT": steps, "BR": height, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
            forward, backward = wavenet.wavenet_forward_kernel, wavenet.wavenet_gate_kernel
            given = dict.fromkeys((name for name in forward.arg_names if name.startswith("p_")), p)
            wide = {"multiples_of_16": ("PC", "PG")}
            rows.append(_row(forward, given | {"p_first": "*i32"}, {**shape, "BC": depth}, warps, stages, **wide))
            given = dict.fromkeys((name for name in backward.arg_names if name.startswith("p_")), p)
            wide = {"multiples_of_16": ("PC", "PS", "PG", "P")}
            rows.append(_row(backward, given | {"p_sums": "*fp32"}, shape, warps, stages, **wide))
    return rows


CONFIGURATIONS = [*_products(), *_depthwise(), *_layers()]
