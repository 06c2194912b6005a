"""Sentences, tables and figures ↦ one self-contained HTML page, by the template page.html."""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from curvax.inspection.phrasing import ratio
from curvax.inspection.render import DPI, RenderedFigure
from curvax.inspection.runner import Omission
from curvax.inspection.summary_table import SummaryRow

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
    sections = groupby(content.figures, key=lambda figure: figure.section)
    values = content._asdict() | {
        "facts": list(dict.fromkeys(fact for run in content.about.values() for fact in run)),
        "figures": {section: list(figures) for section, figures in sections},
        "omissions": [_omitted(omission) for omission in content.omissions],
    }
    return _templates().get_template("page.html").render(values)


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(code=_code, slug=_slug, css_size=_css_size, base64=_base64)
    templates.globals.update(ratio=ratio)
    return templates


def _omitted(omission: Omission) -> str:
    runs = ", ".join(f"`{run}`" for run in omission.runs)
    return f"{_KINDS[omission.kind]}: {omission.measure} ({runs}). {omission.reason}"


def _code(text: str) -> Markup:
    """Escapes a text, and turns names in backticks into code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _css_size(png: bytes) -> tuple[int, int]:
    """Width and height of a figure in CSS pixels, of which there are 96 in an inch."""
    width, height = struct.unpack(">II", png[16:24])
    return int(96 / DPI * width), int(96 / DPI * height)


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
