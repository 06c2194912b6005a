"""Results ↦ sentences about the differences between runs, and caveats.

The other runs are compared with the first. Runs are named in backticks.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from curvax.inspection.measures import RHO
from curvax.inspection.phrasing import listing, named, ratio
from curvax.inspection.runner import Results
from curvax.inspection.summary_table import SummaryRow, summary_rows

EQUAL_LOSS = 0.1
"""Relative difference up to which training losses count as equal."""

Lines = Iterator[str]


class RunFacts(NamedTuple):
    """Properties of a run that matter for reading its numbers."""

    model: str
    rate: float | None  # peak learning rate; None if it cannot be read from the text
    step: int
    steps: int
    normalised: bool  # the model keeps batch statistics


def findings(found: Results) -> list[str]:
    """Sentences about the results, the most informative first."""
    lines = summary_rows(found)
    parts = (
        _plain(lines, "largest", "The largest eigenvalue of the Hessian is {}."),
        _plain(lines, "sharpness", f"Within a ball of radius {RHO} the loss rises by {{}}."),
        _by_block(found),
        _plain(lines, "trace", "The trace of the Hessian is {}."),
        _plain(lines, "bulk_ratio", "The top stands out of the bulk by λ₁/λ₅ = {}."),
        _gap(lines),
        _plain(lines, "m_sharpness", f"In groups of few examples, within {RHO}, it rises by {{}}."),
        _active(found),
        _plain(lines, "share", "Of ‖∇L‖² the top eigenvectors hold {}."),
        _plain(lines, "kernel", "The neural tangent kernel has a condition number of {}."),
        _average(found),
    )
    return list(itertools.chain.from_iterable(parts))


def caveats(found: Results, facts: Mapping[str, RunFacts]) -> list[str]:
    """Sentences about how far the results can be compared."""
    parts = (
        _unfinished(facts),
        *((_models(facts), _rates(facts), _losses(found)) if len(facts) > 1 else ()),
        _unconverged(found),
        _singular(found),
        _rescaling(facts),
    )
    return list(itertools.chain.from_iterable(parts))


def _plain(lines: Mapping[str, SummaryRow], name: str, sentence: str) -> Lines:
    if name in lines:
        yield sentence.format(listing(lines[name].values, lines[name].form))


def _by_block(found: Results) -> Lines:
    values = {
        run: {name: float(block.value) for name, block in _leaves(blocks).items()}
        for run, blocks in found.of("blocks").items()
    }
    if not values:
        return
    base, *others = values
    sharpest = {run: max(own, key=own.__getitem__) for run, own in values.items()}
    listed = (f"`{block}` in `{run}` ({values[run][block]:.3g})" for run, block in sharpest.items())
    yield f"The block of largest eigenvalue is {', '.join(listed)}."
    for run in others:
        yield from _moved(
            values[base], values[run], f"From `{base}` to `{run}` λ_max changes most in", "{:.3g}"
        )


def _active(found: Results) -> Lines:
    shares = {
        run: {name: float(x) for name, x in inside.active.items()}
        for run, inside in found.of("inside").items()
    }
    for run in list(shares)[1:]:
        base = next(iter(shares))
        start = f"From `{base}` to `{run}` the share of active units changes most at"
        yield from _moved(shares[base], shares[run], start, "{:.0%}")


def _moved(base: Mapping[str, float], own: Mapping[str, float], start: str, form: str) -> Lines:
    """A sentence about where two runs differ by the largest and by the least factor."""
    factors = {
        name: max(own[name] / base[name], base[name] / own[name])
        for name in base
        if name in own and base[name] > 0 and own[name] > 0
    }
    if len(factors) < 2:
        return
    most, least = max(factors, key=factors.__getitem__), min(factors, key=factors.__getitem__)
    yield (
        f"{start} `{most}`, {form.format(base[most])} → {form.format(own[most])} "
        f"({ratio(own[most], base[most])}), and least {'at' if start.endswith('at') else 'in'} "
        f"`{least}` ({ratio(own[least], base[least])})."
    )


def _leaves(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks that contain no other blocks."""
    inner = lambda name: any(other.startswith(f"{name}/") for other in blocks)
    return {name: block for name, block in blocks.items() if not inner(name)}


def _gap(lines: Mapping[str, SummaryRow]) -> Lines:
    if not {"gap", "gap_corrected", "largest"} <= lines.keys():
        return
    plain, corrected, largest = (lines[n].values for n in ("gap", "gap_corrected", "largest"))
    listed = [
        f"{plain[run]:.3g} and {corrected[run]:.3g} in `{run}`, where it is {largest[run]:.3g}"
        for run in largest
        if run in plain and run in corrected
    ]
    yield (
        f"The surrogate gap at ρ = {RHO} estimates λ_max, by 2h/ρ² and less the part of the "
        f"gradient, at {'; '.join(listed)}."
    )


def _average(found: Results) -> Lines:
    results = found.of("random_sharpness")
    if not results:
        return
    values = {run: float(r.value) for run, r in results.items()}
    unclear = [run for run, r in results.items() if abs(r.value) <= 2 * r.standard_error]
    falls = [run for run in results if values[run] < 0 and run not in unclear]
    ends = []
    if falls:
        ends += [
            f"it falls in {named(falls)}, where the condition of SAM's Theorem 2 does not hold"
        ]
    if unclear:
        ends += [f"in {named(unclear)} that is within two standard errors of nothing"]
    listed = listing(values, "{:+.2g}")
    end = ", and ".join(ends) or "the condition of SAM's Theorem 2 holds there"
    yield f"Under random perturbations the test loss changes by {listed}; {end}."


def _unfinished(facts: Mapping[str, RunFacts]) -> Lines:
    for run, own in facts.items():
        if own.step < own.steps:
            yield f"`{run}` is measured at step {own.step} of {own.steps}, before its end."


def _models(facts: Mapping[str, RunFacts]) -> Lines:
    models = {run: own.model for run, own in facts.items()}
    if len(set(models.values())) > 1:
        yield (
            "The models differ. Radii, eigenvalues and traces are in units of each model's own "
            "weights: what compares across models is each one's change between two methods."
        )


def _rates(facts: Mapping[str, RunFacts]) -> Lines:
    rates = {run: own.rate for run, own in facts.items() if own.rate is not None}
    unknown = [run for run, own in facts.items() if own.rate is None]
    if unknown:
        yield (
            f"The learning rate of {named(unknown)} could not be read from the method's text. "
            "Eigenvalues compare only at equal learning rates."
        )
    elif len(set(rates.values())) > 1:
        yield (
            f"The learning rates differ ({listing(rates, '{:g}', compared=False)}), and a larger "
            "one by itself leads to smaller eigenvalues: compare at equal learning rates before "
            "you credit the method."
        )
    else:
        yield f"The learning rates are equal at their peak, {next(iter(rates.values())):g}."


def _losses(found: Results) -> Lines:
    line = summary_rows(found).get("loss")
    if line is None or len(line.values) < 2:
        return
    low, high = min(line.values.values()), max(line.values.values())
    listed = listing(line.values, line.form, compared=False)
    if high - low > EQUAL_LOSS * abs(high):
        yield (
            f"The training losses differ ({listed}). The curvature of a loss changes with its "
            "value, so not all of the difference is one of flatness."
        )
    else:
        yield f"The training losses are equal to {EQUAL_LOSS:.0%} ({listed})."


def _unconverged(found: Results) -> Lines:
    pairs = found.of("eigenpairs")
    open_ = [run for run, found_ in pairs.items() if not found_.converged[0]]
    if open_:
        yield f"λ_max of {named(open_)} did not converge: its residual bounds its error."
    count = sum(not b.converged for own in found.of("blocks").values() for b in own.values())
    if count:
        yield f"{count} eigenvalues of blocks did not converge; they are drawn hollow."


def _singular(found: Results) -> Lines:
    conditions = {run: kernel.condition for run, kernel in found.of("kernel").items()}
    unsure = [run for run, condition in conditions.items() if not condition.converged]
    if unsure:
        yield (
            f"The smallest eigenvalue of the neural tangent kernel of {named(unsure)} is not large "
            "compared with rounding errors: its condition number is at most an order of magnitude."
        )


def _rescaling(facts: Mapping[str, RunFacts]) -> Lines:
    if any(own.normalised for own in facts.values()):
        yield (
            "The model has batch norm, so that its weights can be rescaled without changing its "
            "outputs, and eigenvalues change with them: compare them together with weight norms."
        )
