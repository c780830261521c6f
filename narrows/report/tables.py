"""What all tables of the terminal share: no lines, aligned, nothing of a user's read as markup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 96
"""Characters from which all columns are shown."""

NAMES = ("machine", "key", "op class", "memory", "status", "phase", "held up by")
"""Columns that hold one short name, which is not broken."""


def grid(*columns: str) -> Table:
    """A table without lines; a column whose name starts with `>` is set to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            name.removeprefix(">"), justify="right" if right else "left",
            no_wrap=right or name in NAMES, overflow="fold",
        )  # fmt: skip
    return table


def plain(*cells: object) -> list[Text]:
    """Cells as they are: nothing of a user's is read as markup."""
    return [cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells]


def strong(text: str, style: str = "bold") -> Text:
    """Text in a style."""
    return Text(text, style=style)


def say(console: Console, *sentences: str) -> None:
    """Sentences, a paragraph each; empty ones are left out."""
    for sentence in filter(None, sentences):
        console.print(Text(sentence), soft_wrap=False)
