"""A method's text ↦ its learning rate, where the text tells: what eigenvalues depend on."""

import ast
import inspect
from collections.abc import Mapping
from typing import TypeGuard

from curvax.recipe import vocabulary

_STRETCHED = ("cosine", "linear", "constant", "step_decay")
"""Schedules whose first argument is their peak."""


def peak_rate(text: str, names: Mapping[str, float]) -> float | None:
    """The learning rate, at its peak, of the last part of a pipe that has one.

        peak_rate("sam_perturb(rho) | adamw(cosine(lr))", {"lr": 1e-3})  # 0.001

    Args:
        text: a method's text, as `curvax.recipe` reads it.
        names: numbers that it may name.

    Returns:
        None where there is no such part, or its rate is no number and no schedule of the run.
    """
    node = ast.parse(text.strip().replace("\n", " "), mode="eval").body
    while isinstance(node, ast.BinOp) and not _takes_a_rate(node.right):
        node = node.left
    last = node.right if isinstance(node, ast.BinOp) else node
    return _rate(_first(last), names) if _takes_a_rate(last) else None


def _takes_a_rate(node: ast.expr) -> TypeGuard[ast.Call]:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            parameters = inspect.signature(vocabulary().get(name, dict)).parameters
            return next(iter(parameters), None) == "learning_rate"
    return False


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
