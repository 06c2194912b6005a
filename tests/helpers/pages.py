"""The pages of the documentation: their Python code and the rows of their tables."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from repository import ROOT

DOCS = ROOT / "docs"


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The title of its section and the code of each block of Python."""
    title, code, language = "", "", None
    for line in page.read_text().splitlines():
        fence = re.match(r"```(\w*)$", line)
        if fence:
            if language == "python":
                yield title, code
            language, code = (fence[1] if language is None else None), ""
        elif language == "python":
            code += line + "\n"
        elif language is None and re.match(r"#+ ", line):
            title = line.lstrip("# ")


def sections(page: Path) -> dict[str, str]:
    """Title ↦ Python code of each section that has some, blocks of one section joined."""
    found: dict[str, str] = {}
    for title, code in blocks(page):
        found[title] = found.get(title, "") + code
    return found


class Row(NamedTuple):
    section: str
    cells: tuple[str, ...]


def rows(page: Path) -> list[Row]:
    """The rows of all tables of a page, without their heads."""
    title, found, inside = "", [], False
    for line in page.read_text().splitlines():
        if re.match(r"#+ ", line):
            title = re.sub(r" \{.*\}$", "", line.lstrip("# "))
        if re.match(r"\|[-:| ]+\|$", line):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside:
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            found.append(Row(title, tuple(x.strip().replace("\\|", "|") for x in cells)))
    return found
