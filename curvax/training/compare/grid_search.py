"""`curvax compare --sweep`: a grid of settings, scored on held-out training examples."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from curvax.training.compare.comparison import Outcomes, values
from curvax.training.compare.report import format_summary
from curvax.training.compare.summary import Summary, summarise
from curvax.training.config.renamed import current
from curvax.training.runtime import run_dir
from curvax.training.runtime.errors import ConfigError
from curvax.training.selection_metric import SelectionMetric

MOST_FIELDS = 2
Fields = Mapping[str, Sequence[str]]


class Grid(NamedTuple):
    """The held-out scores of one method at every point of the grid."""

    metric: SelectionMetric
    method: str
    fields: Fields
    points: list[tuple[str, ...]]  # field values, the last field varying fastest
    scores: list[Summary]  # at each point

    @property
    def best(self) -> int:
        """The index of the best point; a point that diverged counts as worst."""
        return int(np.argmax([self.metric.key(score.mean) for score in self.scores]))

    @property
    def title(self) -> str:
        return f"held-out {self.metric.title}"

    def array(self, part: str) -> np.ndarray:
        """One field of the summaries, \"mean\" for instance, with an axis for each swept field."""
        values = [getattr(score, part) for score in self.scores]
        return np.reshape(values, [len(v) for v in self.fields.values()])


def read_fields(texts: Sequence[str]) -> dict[str, list[str]]:
    """`["rho=0.1,0.2"]` ↦ `{"rho": ["0.1", "0.2"]}`; commas inside brackets do not separate values.

    Raises:
        ConfigError: no `=`, a field named twice, or more than two fields.
    """
    fields: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = current(name)
        if not equals or not values or name in fields:
            raise ConfigError(
                f"`--sweep {text}` is not a list of values. Write each field once, as "
                "`--sweep rho=0.05,0.1,0.2`."
            )
        fields[name] = _split(values)
    if len(fields) > MOST_FIELDS:
        raise ConfigError(
            f"A sweep has one field (a curve) or two (a heat map), and got {len(fields)}: "
            f"{', '.join(fields)}."
        )
    return fields


def _split(values: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def grids(
    outcomes: Outcomes, methods: Sequence[str], fields: Fields, metric: SelectionMetric
) -> list[Grid]:
    """The outcomes of `comparison.grid`'s variants, by method and point."""
    points = list(itertools.product(*fields.values()))
    scores = [summarise(values(runs, metric.result_key)) for runs in outcomes.values()]
    size = len(points)
    return [
        Grid(metric, method, fields, points, scores[i * size : (i + 1) * size])
        for i, method in enumerate(methods)
    ]


def table(found: Sequence[Grid]) -> Table:
    """One row for each point, one column of held-out scores for each method."""
    page = Table(*found[0].fields, *(f"{grid.title}, {grid.method}" for grid in found))
    for number, point in enumerate(found[0].points):
        page.add_row(
            *point, *(format_summary(grid.scores[number], grid.metric.form) for grid in found)
        )
    return page


def best_points(found: Sequence[Grid], config_name: str) -> str:
    """A sentence for each method: its best point, and the command that tests it."""
    lines = []
    for grid in found:
        setting = [f"{field}={value}" for field, value in zip(grid.fields, grid.points[grid.best])]
        options = shlex.join(f"--{part}" for part in setting)
        score = grid.metric.form.format(grid.scores[grid.best].mean)
        lines.append(
            f"Best for {grid.method}: {', '.join(setting)}, {grid.title} {score}. To test it: "
            f"curvax compare {config_name} {options}"
        )
    return "\n".join([*lines, "The test set was not used."])


def write(folder: Path, found: Sequence[Grid]) -> None:
    """Writes sweep.json: every point of every method with its score."""
    page = {
        grid.method: [
            dict(zip(grid.fields, point)) | score._asdict()
            for point, score in zip(grid.points, grid.scores)
        ]
        for grid in found
    }
    run_dir.write_json(folder / "sweep.json", page)
