"""A survey ↦ its figures, each with what it shows in words for those who do not see it."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from curvax.inspection.figures import FIGURES
from curvax.inspection.runner import Omission, Results

DPI = 150


class RenderedFigure(NamedTuple):
    """A drawn result."""

    name: str
    section: str
    caption: str
    alt: str
    png: bytes


def draw(found: Results) -> Iterator[RenderedFigure | Omission]:
    """A figure for each result that there is; one that cannot be drawn is an omission."""
    for spec in FIGURES:
        runs = found.of(spec.measure)
        if not runs:
            continue
        open_before = set(plt.get_fignums())
        try:
            png, alt = _png(spec.draw(runs, found)), spec.alt(runs)
        except Exception as error:  # the numbers and the other figures are worth having
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            yield Omission(f"figure of {spec.name}", tuple(runs), "failed", reason)
        else:
            yield RenderedFigure(spec.name, spec.section, spec.caption, alt, png)
        finally:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)


def _png(drawn: Any) -> bytes:
    """The figure of some axes."""
    content = io.BytesIO()
    figure = np.ravel(drawn)[0].figure
    figure.savefig(content, format="png", dpi=DPI, bbox_inches="tight")
    return content.getvalue()
