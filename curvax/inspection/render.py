"""Results ↦ rendered figures, with captions and alternative texts."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from curvax.inspection.figures import FIGURES
from curvax.inspection.runner import Omission, Results

DPI = 150


class RenderedFigure(NamedTuple):
    """A figure as PNG."""

    name: str
    section: str
    caption: str
    alt: str
    png: bytes


def draw(found: Results) -> Iterator[RenderedFigure | Omission]:
    """Draws a figure for every measure with results; a failure becomes an omission."""
    for spec in FIGURES:
        runs = found.of(spec.measure)
        if not runs:
            continue
        open_before = set(plt.get_fignums())
        try:
            also = () if spec.also is None else (found.of(spec.also),)
            png, alt = _png(spec.draw(runs, *also)), spec.alt(runs)
        except Exception as error:  # numbers and other figures are still useful
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
