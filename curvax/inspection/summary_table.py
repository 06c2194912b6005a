"""Results ↦ the main number of each measure and run, for the table and the sentences."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from curvax.inspection.measures import DEVIATION, RHO
from curvax.inspection.phrasing import written
from curvax.inspection.runner import Results


class SummaryRow(NamedTuple):
    """One number of every run."""

    name: str
    title: str
    form: str
    values: dict[str, float]  # run ↦ number, where it is finite

    def said(self, run: str) -> str:
        return written(self.values[run], self.form)


class _Row(NamedTuple):
    name: str
    measure: str
    title: str
    form: str
    number: Callable[[Any], Any]  # of the measure's result


_ROWS = (
    _Row("loss", "surrogate_gap", "training loss L", "{:.3g}", lambda r: r[RHO].loss),
    _Row("largest", "eigenpairs", "λ_max of the Hessian", "{:.3g}", lambda r: r.values[0]),
    _Row(
        "smallest", "spectrum", "lowest eigenvalue seen by Lanczos", "{:.3g}", lambda r: r.smallest
    ),
    _Row("bulk_ratio", "eigenpairs", "λ₁/λ₅", "{:.2f}", lambda r: _bulk_ratio(r.values)),
    _Row("trace", "trace", "trace of the Hessian", "{:.3g}", lambda r: r.mean),
    _Row(
        "sharpness", "sharpness", f"sharpness at ρ = {RHO}", "{:.3g}", lambda r: r[RHO].value
    ),
    _Row(
        "m_sharpness", "m_sharpness", f"m-sharpness at ρ = {RHO}, smallest groups",
        "{:.3g}", lambda r: r[min(r)].value,
    ),
    _Row("gap", "surrogate_gap", f"2h/ρ² at ρ = {RHO}", "{:.3g}", lambda r: r[RHO].sigma_max),
    _Row(
        "gap_corrected", "surrogate_gap", f"2(h − ρ‖∇L‖)/ρ² at ρ = {RHO}", "{:.3g}",
        lambda r: r[RHO].sigma_max_corrected,
    ),
    _Row(
        "gradient_norm", "surrogate_gap", "‖∇L‖", "{:.3g}", lambda r: r[RHO].gradient_norm
    ),
    _Row(
        "angle", "gradient_angle", f"angle of ∇L and ∇L at the ascent to ρ = {RHO}", "{:.0f}°",
        lambda r: np.degrees(r[RHO].angle),
    ),
    _Row(
        "share", "alignment", "share of ‖∇L‖² along the top eigenvectors", "{:.0%}",
        lambda r: r.share,
    ),
    _Row(
        "random", "random_sharpness", f"rise of the test loss under N(0, {DEVIATION}²)", "{:.3g}",
        lambda r: r.value,
    ),
    _Row("kernel", "kernel", "condition number of the NTK", "{:.3g}", lambda r: r.condition.value),
)  # fmt: skip


def summary_rows(found: Results) -> dict[str, SummaryRow]:
    """The rows of all measures with results, by name."""
    rows = ((row, found.of(row.measure)) for row in _ROWS)
    every = (SummaryRow(r.name, r.title, r.form, _finite(r.number, runs)) for r, runs in rows)
    return {row.name: row for row in every if row.values}


def _finite(number: Callable[[Any], Any], runs: Mapping[str, Any]) -> dict[str, float]:
    values = {run: float(number(result)) for run, result in runs.items()}
    return {run: value for run, value in values.items() if np.isfinite(value)}


def _bulk_ratio(values: np.ndarray) -> float:
    return values[0] / values[4] if len(values) > 4 and values[4] > 0 else np.nan
