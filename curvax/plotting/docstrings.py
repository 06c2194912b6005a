"""A plotting function ↦ the same function, its docstring completed by what all of them share."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

ARGS = {
    "xlabel": "label of the x axis, used if the keys are numbers.",
    "ax": "axes to draw on; by default new ones in a figure of their own.",
    "label": "name of the run in the legend, for a single result.",
}
SECTIONS = {
    "Args": "",
    "Returns": "Returns:\n    The axes.",
    "Raises": """Raises:
    TypeError: an argument is not the documented result.
    ValueError: no result, or a `label` for several.""",
}

F = TypeVar("F", bound=Callable[..., Any])


def documented(draw: F) -> F:
    """Adds the shared arguments and sections that the docstring of `draw` does not have itself."""
    if draw.__doc__ is None:  # python -OO
        return draw
    paragraphs = inspect.cleandoc(draw.__doc__).split("\n\n")
    start = next(n for n, text in enumerate(paragraphs) if text.startswith("Args:"))
    own = {text.partition(":")[0]: text for text in paragraphs[start:]}
    own["Args"] += "".join(
        f"\n    {name}: {text}"
        for name, text in ARGS.items()
        if name in inspect.signature(draw).parameters
        and not re.search(rf"^    {name}:", own["Args"], re.MULTILINE)
    )
    draw.__doc__ = "\n\n".join([*paragraphs[:start], *(SECTIONS | own).values()])
    return draw
