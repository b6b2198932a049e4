"""The column cells: what every part above the kernels needs to know of each. A new cell is a row of ``CELLS``."""

import dataclasses

__all__ = ["CELLS", "ColumnSpec"]


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """A recurrence that is elementwise in its state; C = directions * H channels.

    Attributes:
        inputs: K, of u (T, B, C * K); the larger one where there is a choice.
        operations: of one value of the state.
        weights: rows of what multiplies the state, (rows * C,).
        biases: rows of the bias, (rows * C,).
        skip: has a skip term, and so K - 1 inputs where it is not one of them: SRU.
        interleaved: u is (T, B, directions, H, K) and the product's weight (I, C * K): SRU. The others have
            (T, B, directions, K, H) and (C * K, I), as torch.nn's gates lie.
        mask: the mask's shape, one letter a dimension; none where the cell takes no mask and no scale.
        output_is_state: h is the state, so that the backward pass needs nothing else of the forward pass.
        backends: the backends that have it.
    """

    inputs: int
    operations: int
    weights: int = 0
    biases: int = 0
    skip: bool = False
    interleaved: bool = False
    mask: str = ""
    output_is_state: bool = True
    backends: tuple[str, ...] = ("reference", "cpp", "triton", "cuda")

    def saves_states(self, padded: bool) -> bool:
        """Whether the backward pass needs the states beside h. ``padded``: there is a mask_pad."""
        return padded or not self.output_is_state


_SRU = ColumnSpec(
    inputs=4, operations=19, weights=2, biases=2, skip=True, interleaved=True, mask="BC", output_is_state=False
)  # fmt: skip
_INDRNN = ColumnSpec(inputs=1, operations=4, weights=1, biases=1)
_MINGRU = ColumnSpec(inputs=2, operations=9, biases=2)
_MINLSTM = ColumnSpec(inputs=3, operations=19, biases=3)

CELLS: dict[str, ColumnSpec] = {
    "sru": _SRU,
    "sru_tanh": _SRU,
    "fo_pool": ColumnSpec(inputs=3, operations=20, biases=3, mask="TBC", output_is_state=False),
    "f_pool": ColumnSpec(inputs=2, operations=14, biases=2, mask="TBC"),
    "indrnn_relu": _INDRNN,
    "indrnn_tanh": _INDRNN,
    "mingru": _MINGRU,
    "mingru_g": _MINGRU,
    "minlstm": _MINLSTM,
    "minlstm_g": _MINLSTM,
}
