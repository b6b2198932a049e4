"""Layouts of block-sparse attention: bool (query blocks, key blocks), true where a query block sees a key block.

All sizes but ``length`` and ``block_size`` count blocks. ``n`` is the number of blocks, ceil(length / block_size).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqaccel import _arguments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["big_bird", "dilated", "from_block_mask", "global_window", "longformer", "sliding_window", "strided"]
__all__ += ["top_k_layout"]


def _blocks(where: str, length: int, block_size: int, causal: bool, **counts: int) -> int:
    """The number of blocks, after checks; ``counts`` are numbers of blocks and their least values follow from names.

    At least 2 while compiling: torch.export would tie a graph to a size that may be 0 or 1, and what a layout says of
    blocks that a sequence does not have is not looked at.
    """
    _arguments.integer(where, "length", length, 0)
    _arguments.integer(where, "block_size", block_size, 1)
    _arguments.flag(where, "causal", causal)
    for name, value in counts.items():
        _arguments.integer(where, name, value, 0 if name.endswith("_blocks") else 1)
    n = (length + block_size - 1) // block_size
    return torch.sym_max(n, 2) if torch.compiler.is_compiling() else n


def _pairs(n: int, device: Any) -> tuple[Tensor, Tensor]:
    """Query blocks (n, 1) and key blocks (n)."""
    i = torch.arange(n, device=device)
    return i.unsqueeze(1), i


def _past(seen: Tensor, i: Tensor, j: Tensor, causal: bool) -> Tensor:
    return seen & (j <= i) if causal else seen


def _is_global(i: Tensor, j: Tensor, blocks: Sequence[int], where: str) -> Tensor:
    if not isinstance(blocks, Sequence):
        raise TypeError(f"{where}: expected global_blocks to be a list of ints, but got {type(blocks).__name__}")
    seen = torch.zeros_like(i, dtype=torch.bool)
    for block in blocks:
        _arguments.integer(where, "global_blocks", block, 0)
        seen = seen | (i == block) | (j == block)
    return seen


def sliding_window(
    length: int, window: int, *, block_size: int, causal: bool = False, device: torch.device | None = None
) -> Tensor:
    """A block sees itself and the ``window - 1`` blocks before it and, where not ``causal``, after it.

    Example:
        >>> sliding_window(4, 2, block_size=1, causal=True).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    n = _blocks("sliding_window", length, block_size, causal, window=window)
    i, j = _pairs(n, device)
    return _past((i - j).abs() < window, i, j, causal)


def global_window(
    length: int,
    window: int,
    global_blocks: int = 1,
    *,
    block_size: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """:func:`sliding_window`; the first ``global_blocks`` blocks also see all blocks and are seen by all.

    With ``causal`` this is a window with attention sinks (Xiao et al., "Efficient streaming language models with
    attention sinks", 2023).
    """
    n = _blocks("global_window", length, block_size, causal, window=window, global_blocks=global_blocks)
    i, j = _pairs(n, device)
    seen = ((i - j).abs() < window) | (i < global_blocks) | (j < global_blocks)
    return _past(seen, i, j, causal)


def strided(
    length: int,
    window: int,
    stride: int,
    *,
    block_size: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """:func:`sliding_window` and every ``stride``-th block from the own one on.

    Source: Child et al., "Generating long sequences with sparse transformers", 2019.
    """
    n = _blocks("strided", length, block_size, causal, window=window, stride=stride)
    i, j = _pairs(n, device)
    return _past(((i - j).abs() < window) | ((i - j) % stride == 0), i, j, causal)


def big_bird(
    length: int,
    window: int,
    global_blocks: int = 1,
    random_blocks: int = 1,
    *,
    block_size: int,
    seed: int,
    num_heads: int | None = None,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """:func:`global_window` and ``random_blocks`` blocks drawn for each query block from those it does not see yet.

    ``seed`` decides what is drawn, on every device. ``num_heads``: each head draws its own, (num_heads, n, n).

    Source: Zaheer et al., "Big Bird: Transformers for longer sequences", 2020.
    """
    counts = dict(window=window, global_blocks=global_blocks, random_blocks=random_blocks)
    n = _blocks("big_bird", length, block_size, causal, **counts)
    _arguments.integer("big_bird", "seed", seed)
    if num_heads is not None:
        _arguments.integer("big_bird", "num_heads", num_heads, 1)
    layout = global_window(length, window, global_blocks, block_size=block_size, causal=causal)
    layout = layout.expand(num_heads or 1, n, n)
    free = (~layout).tril() if causal else ~layout
    score = torch.rand(layout.shape, generator=torch.Generator().manual_seed(seed))
    rank = score.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    layout = (layout | (free & (rank < random_blocks))).to(device)
    return layout if num_heads is not None else layout[0]


def longformer(
    length: int,
    window: int,
    global_blocks: Sequence[int] = (0,),
    *,
    dilation: int = 1,
    block_size: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """A window with gaps: the ``window - 1`` nearest blocks on each side at multiples of ``dilation``, and the own one.

    The blocks listed in ``global_blocks`` also see all blocks and are seen by all.

    Source: Beltagy et al., "Longformer: The long-document transformer", 2020.
    """
    n = _blocks("longformer", length, block_size, causal, window=window, dilation=dilation)
    i, j = _pairs(n, device)
    near = ((i - j).abs() < window * dilation) & ((i - j) % dilation == 0)
    return _past(near | _is_global(i, j, global_blocks, "longformer"), i, j, causal)


def dilated(
    length: int,
    kernel_size: int,
    dilation: int = 1,
    *,
    block_size: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Each block sees the ``kernel_size`` nearest of the blocks at multiples of ``dilation`` from it.

    At the ends the window stays full and is no longer centred. Where ``causal``, it is the ``kernel_size`` last ones up
    to the block itself, fewer at the start. As NATTEN's ``na1d``, of blocks.

    Raises:
        ValueError: not causal, and ``kernel_size * dilation`` is more than the number of blocks; or ``kernel_size`` is
            even.

    Source: Hassani and Shi, "Dilated neighborhood attention transformer", 2022.
    """
    n = _blocks("dilated", length, block_size, causal, kernel_size=kernel_size, dilation=dilation)
    if not causal and kernel_size % 2 == 0:
        raise ValueError(f"dilated: expected kernel_size to be odd, but got {kernel_size}; or pass causal=True")
    if not causal and kernel_size * dilation > n:
        raise ValueError(
            f"dilated: expected kernel_size * dilation to be at most the number of blocks, {n}, "
            f"but got {kernel_size} * {dilation}"
        )
    i, j = _pairs(n, device)
    place = i // dilation
    if causal:
        first = place - (kernel_size - 1)
    else:
        size = (n - i % dilation + dilation - 1) // dilation  # of the own group
        first = torch.minimum((place - kernel_size // 2).clamp_min(0), size - kernel_size)
    other = j // dilation
    seen = (other >= first) & (other < first + kernel_size) & (j % dilation == i % dilation)
    return _past(seen, i, j, causal)


def _means(t: Tensor, block_size: int) -> Tensor:
    """(B, heads, n, D): the mean of each block of ``t`` (B, heads, T, D)."""
    T = t.shape[2]
    if not torch.compiler.is_compiling():
        block_size = min(block_size, max(T, 1))  # a block beyond the sequence is padded with zeros
    n = (T + block_size - 1) // block_size
    padded = torch.nn.functional.pad(t, (0, 0, 0, n * block_size - T)).unflatten(2, (n, block_size)).sum(3)
    count = (T - block_size * torch.arange(n, device=t.device)).clamp(max=block_size)
    return padded / count.unsqueeze(-1)


def top_k_layout(query: Tensor, key: Tensor, k: int, *, block_size: int, causal: bool = False) -> Tensor:
    """The ``k`` key blocks whose mean scores highest with each query block, the first of equal ones.

    A query block is its mean. Where ``causal``, it is its first query, since a mean would tell a query of those after
    it. Its own block is then always among the k, and the others are complete blocks before it. No gradient flows
    through the choice.

    Args:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D); H is a multiple of G.
        k: how many key blocks a query block sees, at least 1; fewer where there are no more.
        block_size: positions a block has.
        causal: see above. Default: ``False``

    Returns:
        (B, H, query blocks, key blocks), bool.

    Source: Lu et al., "MoBA: Mixture of block attention", 2025; Yuan et al., "Native sparse attention", 2025.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 1, 4, 300, 16)
        >>> top_k_layout(q, k, 3, block_size=32, causal=True).sum(-1)[0, 0]
        tensor([1, 2, 3, 3, 3, 3, 3, 3, 3, 3])
    """
    _arguments.tensors("top_k_layout", query=query, key=key)
    _arguments.integer("top_k_layout", "k", k, 1)
    _arguments.integer("top_k_layout", "block_size", block_size, 1)
    _arguments.flag("top_k_layout", "causal", causal)
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "top_k_layout: expected query (B, H, Tq, D) and key (B, G, Tk, D), but got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    for name, t in (("query", query), ("key", key)):
        if not t.is_floating_point():
            raise TypeError(f"top_k_layout: expected {name} to be floating point, but got {t.dtype}")
    if key.device != query.device:
        raise ValueError(f"top_k_layout: expected key to be on query's device, {query.device}, but got {key.device}")
    H, G = query.shape[1], key.shape[1]
    if G < 1 or H % G:
        raise ValueError(f"top_k_layout: expected query's heads, {H}, to be a multiple of key's heads, {G}")
    with torch.no_grad():
        rows = query[:, :, ::block_size] if causal else _means(query, block_size)
        columns = _means(key, block_size).repeat_interleave(H // G, dim=1)
        score = torch.einsum("bhid,bhjd->bhij", rows.float(), columns.float())
        i = torch.arange(score.shape[2], device=score.device).unsqueeze(1)
        j = torch.arange(score.shape[3], device=score.device)
        if causal:
            score = score.masked_fill(j > i, -torch.inf).masked_fill(j == i, torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = rank < k
        return chosen & (j <= i) if causal else chosen


def _is_block_mask(layout: Any) -> bool:
    """Whether it is FlexAttention's ``BlockMask``, without importing it."""
    return type(layout).__name__ == "BlockMask" and hasattr(layout, "kv_num_blocks")


def resolved(layout: "Tensor | BlockMask", block_size: int) -> tuple[Tensor, bool]:
    """A layout, and whether it is causal within blocks, from a layout or a ``BlockMask``."""
    if isinstance(layout, Tensor):
        return layout, False
    if _is_block_mask(layout):
        return from_block_mask(layout, block_size=block_size)
    kind = "None" if layout is None else type(layout).__name__
    raise TypeError(f"block_sparse_attention: expected layout to be a Tensor or a BlockMask, but got {kind}")


def _partial_kind(mask: Any, partial: Tensor, size: tuple[int, int]) -> tuple[bool, bool]:
    """Whether ``mask_mod`` is true in all of the ``partial`` blocks (B, H, nq, nk), and whether it is causality."""
    Tq, Tk = mask.seq_lengths
    all_true = all_causal = True
    blocks = partial.nonzero()
    at_once = max(1, (1 << 22) // (size[0] * size[1]))
    for some in blocks.split(at_once) if len(blocks) else ():
        b, h, i, j = some.unbind(1)
        q = (i * size[0]).unsqueeze(1) + torch.arange(size[0], device=i.device)
        k = (j * size[1]).unsqueeze(1) + torch.arange(size[1], device=i.device)
        shape = (len(some), size[0], size[1])
        inside = ((q < Tq).unsqueeze(2) & (k < Tk).unsqueeze(1)).reshape(-1)
        parts = (b[:, None, None], h[:, None, None], q.unsqueeze(2), k.unsqueeze(1))
        positions = tuple(t.expand(shape).reshape(-1)[inside] for t in parts)
        seen = torch.vmap(mask.mask_mod)(*positions)
        all_true = all_true and bool(seen.all())
        all_causal = all_causal and bool((seen == (positions[3] <= positions[2])).all())
    return all_true, all_causal


def from_block_mask(block_mask: "BlockMask", *, block_size: int) -> tuple[Tensor, bool]:
    """The layout of a FlexAttention ``BlockMask``, and whether it is causal within blocks.

    Args:
        block_mask: whose partial blocks are full in fact (its ``mask_mod`` is constant within blocks), or are those
            that causality, key position <= query position, cuts.
        block_size: divides the mask's block sizes.

    Returns:
        The layout (B, H, query blocks, key blocks), and ``causal`` for
        :func:`~seqaccel.functional.block_sparse_attention`.

    Raises:
        ValueError: ``mask_mod`` masks single positions in another way; or sizes do not fit.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, i, j: j <= i, 1, 1, 256, 256, device="cpu")
        >>> layout, causal = from_block_mask(mask, block_size=128)
        >>> layout.shape, causal
        (torch.Size([1, 1, 2, 2]), True)
    """
    where = "from_block_mask"
    if not _is_block_mask(block_mask):
        raise TypeError(f"{where}: expected block_mask to be a BlockMask, but got {type(block_mask).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{where}: a BlockMask cannot be converted while compiling; convert it before, and pass the layout"
        )
    _arguments.integer(where, "block_size", block_size, 1)
    size = block_mask.BLOCK_SIZE
    if any(s % block_size for s in size):
        raise ValueError(
            f"{where}: expected block_size to divide the mask's block sizes, {tuple(size)}, but got {block_size}"
        )
    layout = block_mask.to_dense().bool()
    full = torch.zeros_like(layout)
    indices, count = block_mask.full_kv_indices, block_mask.full_kv_num_blocks
    if indices is not None and count is not None:
        valid = torch.arange(indices.shape[-1], device=indices.device) < count.unsqueeze(-1)
        full.scatter_(-1, indices.long(), valid)
    all_true, causal = _partial_kind(block_mask, layout & ~full, size)
    if not all_true:
        i = torch.arange(full.shape[-2], device=full.device).unsqueeze(1) * size[0]
        j = torch.arange(full.shape[-1], device=full.device) * size[1] + size[1] - 1
        if not causal or bool((full & (j > i)).any()):
            raise ValueError(
                f"{where}: mask_mod masks single positions other than by causality (key <= query), which blocks of "
                f"{block_size} cannot express; use torch.nn.attention.flex_attention, or a smaller block size that "
                "the mask does not cut"
            )
    for dim, part, length in ((-2, size[0], block_mask.seq_lengths[0]), (-1, size[1], block_mask.seq_lengths[1])):
        layout = layout.repeat_interleave(part // block_size, dim=dim).narrow(
            dim, 0, (length + block_size - 1) // block_size
        )
    return layout, not all_true
