"""A survey ↦ its pictures, each with what it shows in words for those who do not see it."""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvax import plotting
from curvax.inspection.measures import DEVIATION, RHO, RHOS
from curvax.inspection.survey import Omission, Survey
from curvax.inspection.words import listing
from curvax.plotting.canvas import clean

DPI = 150
Runs = Mapping[str, Any]


class Picture(NamedTuple):
    """A drawn result."""

    name: str
    section: str
    caption: str
    alt: str
    png: bytes


class _Plan(NamedTuple):
    name: str
    measure: str
    section: str
    caption: str
    draw: Callable[[Runs], Any]  # {run: result} ↦ axes, or several in one figure
    alt: Callable[[Runs], str]


def draw(found: Survey) -> Iterator[Picture | Omission]:
    """A picture for each result that there is; one that cannot be drawn is an omission."""
    for plan in _PLANS:
        runs = found.of(plan.measure)
        if not runs:
            continue
        try:
            png, alt = _png(plan.draw(runs)), plan.alt(runs)
        except Exception as error:  # the numbers and the other pictures are worth having
            plt.close("all")
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            yield Omission(f"picture of {plan.name}", tuple(runs), "failed", reason)
        else:
            yield Picture(plan.name, plan.section, plan.caption, alt, png)


def _png(drawn: Any) -> bytes:
    figure = np.ravel(drawn)[0].figure
    assert isinstance(figure, Figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return content.getvalue()


def _fields(runs: Runs, pick: Callable[[Any], Any]) -> dict[str, Any]:
    return {run: pick(result) for run, result in runs.items()}


def _numbers(what: str, pick: Callable[[Any], Any], form: str = "{:.3g}") -> Callable[[Runs], str]:
    """An alternative text: what is shown, and its main number for every run."""
    return lambda runs: f"{what}: {listing(_fields(runs, lambda r: float(pick(r))), form)}."


def _over_radii(runs: Runs) -> Axes:
    return plotting.sharpness_profile(_fields(runs, lambda r: (list(r), list(r.values()))))


def _gaps(runs: Runs) -> np.ndarray:
    size = (3.4 * len(runs) + 0.6, 3.4)
    figure, panels = plt.subplots(
        1, len(runs), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (run, (gaps, largest)) in zip(panels[0], runs.items()):
        every = dict.fromkeys(gaps, largest)
        plotting.surrogate_gap(gaps, every, xlabel="radius ρ", ax=clean(ax))
        ax.set_title(run, fontsize="medium")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for ax in panels[0]:
        ax.get_legend().remove()
        ax.set(xscale="log")
        ax.label_outer()
    return panels
