"""A method's text ↦ its learning rate, where the text tells: what eigenvalues depend on."""

import ast
from collections.abc import Mapping

_STRETCHED = ("cosine", "linear", "constant", "step_decay")
"""Schedules whose first argument is their peak."""


def peak_rate(text: str, names: Mapping[str, float]) -> float | None:
    """The learning rate of the last part of a pipe, at its peak.

        peak_rate("sam_perturb(rho) | adamw(cosine(lr))", {"lr": 1e-3})  # 0.001

    Args:
        text: a method's text, as `curvax.recipe` reads it.
        names: numbers that it may name.

    Returns:
        None where the last part does not begin with a number or a schedule of the run.
    """
    node = ast.parse(text.strip().replace("\n", " "), mode="eval").body
    while isinstance(node, ast.BinOp):
        node = node.right
    return _rate(node, names, outermost=True)


def _rate(
    node: ast.expr | None, names: Mapping[str, float], outermost: bool = False
) -> float | None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if outermost or name in _STRETCHED:
            return _rate(_first(node), names)
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name) if name in names:
            return float(names[name])
    return None


def _first(call: ast.Call) -> ast.expr | None:
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get("learning_rate") or next(iter(call.args), None)
