"""Numbers ↦ phrases that compare them."""

import math
from collections.abc import Mapping

ALIKE = 1.05
"""The ratio up to which two numbers count as the same."""


def written(value: float, form: str) -> str:
    """A formatted number, without an exponent below ten million."""
    text = form.format(value)
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e7 else text


def ratio(value: float, base: float) -> str:
    """`26 times smaller`, `31% larger`, `about the same`; "" if signs differ or one is infinite."""
    if not 0 < value * base < math.inf:
        return ""
    larger, factor = abs(value) > abs(base), max(value / base, base / value)
    if factor < ALIKE:
        return "about the same"
    word = "larger" if larger else "smaller"
    if factor < 2:
        return f"{abs(value / base - 1):.0%} {word}"
    return f"{_round(factor)} times {word}"


def listing(values: Mapping[str, float], form: str, *, compared: bool = True) -> str:
    """``119 in `sgd` and 4.5 in `sam` (26 times smaller)``: compares with the first value."""
    (first, base), *others = values.items()
    parts = [f"{written(base, form)} in `{first}`"]
    for run, value in others:
        words = ratio(value, base) if compared else ""
        parts.append(f"{written(value, form)} in `{run}`" + (f" ({words})" if words else ""))
    return _and(parts)


def named(runs: list[str] | tuple[str, ...]) -> str:
    """`` `sgd`, `sam` and `gsam` ``"""
    return _and([f"`{run}`" for run in runs])


def _and(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _round(factor: float) -> str:
    """Rounds to two digits, without an exponent."""
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return f"{round(factor / unit) * unit:,.{1 if factor < 9.95 else 0}f}"
