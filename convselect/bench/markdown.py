"""Markdown of the benchmarks' pages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table; columns in `left` are aligned to the left, others to the right. None is an empty cell."""
    rule = ["---" if column in left else "---:" for column in range(len(head))]
    return [_line(cells) for cells in (head, rule, *rows)]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
