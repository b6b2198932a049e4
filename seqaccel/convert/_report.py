"""What ``convert`` and ``optimize`` say they did: a table."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One layer of a model."""

    path: str  #: its name in the model, or ``""`` for the model itself
    source: str  #: its class
    target: str  #: what it became, or ``""``
    reason: str  #: why it was left as it is, or ``""``


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value)


class Report:
    """A table with a row for each layer: ``str`` gives it as text, ``rich.print`` draws it.

    Attributes:
        title: what the table shows.
        header: the columns' names.
        rows: named tuples, in the model's order.
    """

    def __init__(self, title: str, header: Sequence[str], rows: Sequence[Any]) -> None:
        self.title, self.header, self.rows = title, tuple(header), list(rows)

    def _cells(self) -> list[list[str]]:
        return [[_text(value) for value in row] for row in self.rows]

    def __str__(self) -> str:
        lines = [list(self.header), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *map(str.rstrip, text)])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title)
        for name in self.header:
            table.add_column(name, overflow="fold")
        for row in self._cells():
            table.add_row(*map(Text, row))
        return table

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
