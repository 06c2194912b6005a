"""An optimiser's text ↦ its peak learning rate, on which eigenvalues depend."""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from curvax.training.config.recipe import parts, vocabulary

_STRETCHED = ("cosine", "linear", "constant", "step_decay")
"""Schedules whose first argument is their peak."""


def peak_rate(text: str, names: Mapping[str, float]) -> float | None:
    """The peak learning rate of the last part of a pipe that has one.

        peak_rate("sam_perturb(rho) | adamw(cosine(lr))", {"lr": 1e-3})  # 0.001

    Args:
        text: an optimiser's text, as in `recipe.parse`.
        names: numbers that it may use.

    Returns:
        None if there is no such part, or its rate is neither a number nor a run schedule.
    """
    known = vocabulary()
    for part in reversed(parts(text)):
        match part:
            case ast.Call(func=ast.Name(id=name)) if _takes_a_rate(known.get(name)):
                return _rate(_first(part), names)
    return None


def _takes_a_rate(factory: Any) -> bool:
    """Whether the first argument is called `learning_rate`."""
    if not inspect.isfunction(factory):
        return False
    return next(iter(inspect.signature(factory).parameters), None) == "learning_rate"


def _rate(node: ast.expr | None, names: Mapping[str, float]) -> float | None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in _STRETCHED:
            return _rate(_first(node), names)
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name) if name in names:
            return float(names[name])
    return None


def _first(call: ast.Call) -> ast.expr | None:
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get("learning_rate") or next(iter(call.args), None)
