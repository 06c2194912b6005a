"""Tables of what was measured, in tests/evidence next to the tests that write them."""

from collections.abc import Sequence
from typing import Any

from repository import EVIDENCE


def write(name: str, title: str, preface: str, head: Sequence[str], rows: Sequence[Any]) -> None:
    """tests/evidence/<name>.md: a title, how it was made, and a row of cells for each finding."""
    lines = [f"# {title}", "", preface, "", _row(head), "|" + "---|" * len(head)]
    lines += [_row([*row, *[""] * (len(head) - len(row))]) for row in rows]
    (EVIDENCE / f"{name}.md").write_text("\n".join(lines) + "\n")


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_text, cells)) + " |"


def _text(cell: Any) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
