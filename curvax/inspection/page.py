"""Sentences, tables and figures ↦ one self-contained HTML page."""

import base64
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from curvax.inspection.phrasing import ratio
from curvax.inspection.render import DPI, RenderedFigure
from curvax.inspection.runner import Omission
from curvax.inspection.summary_table import SummaryRow

_STYLE = Path(__file__).with_name("page.css")
_WIDE = 600
"""Width in CSS pixels above which a figure has a row of its own."""
_KINDS = {
    "budget": "Left out for lack of time",
    "inapplicable": "Does not apply",
    "failed": "Failed",
}


class Content(NamedTuple):
    """The content of a page."""

    title: str
    lead: str
    findings: Sequence[str]
    caveats: Sequence[str]
    about: Mapping[str, Mapping[str, str]]
    """{run: {property: value}}"""
    rows: Sequence[SummaryRow]
    figures: Sequence[RenderedFigure]
    omissions: Sequence[Omission]
    closing: str


def page(content: Content) -> str:
    """The whole page; names in backticks become code."""
    parts = list(_parts(content))
    contents = "".join(
        f'<li><a href="#{_slug(heading)}">{escape(heading)}</a></li>' for heading, _ in parts
    )
    body = "\n".join(
        f'<section aria-labelledby="{_slug(heading)}">'
        f'<h2 id="{_slug(heading)}">{escape(heading)}</h2>\n{inside}</section>'
        for heading, inside in parts
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(content.title)}</title>
<link rel="icon" href="data:,">
<style>
{_STYLE.read_text()}</style>
</head>
<body>
<header>
<h1>{escape(content.title)}</h1>
<p class="lead">{_marked(content.lead)}</p>
</header>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>
{body}
</main>
<footer>{_marked(content.closing)}</footer>
</body>
</html>
"""


def _parts(content: Content) -> Iterator[tuple[str, str]]:
    yield "In short", _list(content.findings) + _aside(content.caveats)
    yield "The runs", _about(content.about)
    if content.rows:
        yield "The numbers", _numbers(content.rows, list(content.about))
    for section, figures in groupby(content.figures, key=lambda figure: figure.section):
        yield section, f'<div class="figures">{"".join(map(_figure, figures))}</div>\n'
    if content.omissions:
        yield "What is not here", _omitted(content.omissions)


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_marked(s)}</li>' for s in sentences)}</ul>\n"


def _aside(caveats: Sequence[str]) -> str:
    if not caveats:
        return ""
    title = "<p><strong>Read with care.</strong></p>"
    return f'<aside aria-label="Caveats">{title}{_list(caveats)}</aside>'


def _about(runs: Mapping[str, Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for facts in runs.values() for name in facts))
    rows = [(name, [_cell(facts.get(name, "")) for facts in runs.values()]) for name in names]
    return _table(list(runs), rows)


def _numbers(rows: Sequence[SummaryRow], runs: list[str]) -> str:
    cells = [(row.title, [_number(row, run, runs[0]) for run in runs]) for row in rows]
    note = "<p>In small print: compared with the first run.</p>" if len(runs) > 1 else ""
    return _table(runs, cells) + note


def _number(row: SummaryRow, run: str, first: str) -> str:
    if run not in row.values:
        return _cell("–")
    compared = ""
    if run != first and first in row.values:
        words = ratio(row.values[run], row.values[first])
        compared = f"<small>{escape(words)}</small>" if words else ""
    return f'<td class="number">{escape(row.said(run))}{compared}</td>'


def _table(runs: list[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    heads = "".join(f'<th scope="col"><code>{escape(run)}</code></th>' for run in runs)
    lines = "".join(
        f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>\n' for title, cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n"
    )


def _cell(text: str) -> str:
    return f"<td>{_marked(text)}</td>"


def _figure(figure: RenderedFigure) -> str:
    width, height = (int(96 / DPI * pixels) for pixels in struct.unpack(">II", figure.png[16:24]))
    content = base64.b64encode(figure.png).decode()
    wide = ' class="wide"' if width > _WIDE else ""
    return (
        f'<figure id="figure-{figure.name}"{wide}><img src="data:image/png;base64,{content}" '
        f'width="{width}" height="{height}" alt="{escape(figure.alt)}">'
        f"<figcaption>{_marked(figure.caption)}</figcaption></figure>\n"
    )


def _omitted(omissions: Sequence[Omission]) -> str:
    sentences = (
        f"{_KINDS[each.kind]}: {each.measure} ({', '.join(f'`{run}`' for run in each.runs)}). "
        f"{each.reason}"
        for each in omissions
    )
    return _list(list(sentences))


def _marked(text: str) -> str:
    """Escapes a text, and turns names in backticks into code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")
