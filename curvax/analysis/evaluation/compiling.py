"""A measure of a loss ↦ the same, compiled once where it is called outside of any trace."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from curvax.arithmetic.trees import Tree
from curvax.objective import Objective

KEPT = 64
"""Compiled measures in memory: a loss defined anew for every call would fill it otherwise."""


def compiled_once(measure: Callable[..., Any]) -> Callable[..., Any]:
    """`measure(objective, params, *arrays, **options)`, compiled at its first eager call.

    Batch, key, parameters and arrays are arguments of what is compiled, the functions of the
    objective and the options are static: a new batch of the same shape compiles nothing. What is
    called with traced values is traced along.

    Args:
        measure: a function of an `Objective` with a batch of arrays, trees of arrays, and static
            options by keyword.
    """

    @functools.wraps(measure)
    def call(objective: Objective, params: Tree, *arrays: Tree, **options: Any) -> Any:
        dynamic = (objective.batch, objective.key, params, *arrays)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((dynamic, options))):
            return measure(objective, params, *arrays, **options)
        recipe = {
            "loss": objective.loss,
            "model": objective.model,
            "has_aux": objective.has_aux,
            "microbatch": objective.microbatch,
            "weight": objective.weight,
        }
        return _compiled(measure, _Static(recipe), _Static(options))(*dynamic)

    return call


@functools.lru_cache(maxsize=KEPT)
def _compiled(measure: Callable[..., Any], recipe: "_Static", options: "_Static") -> Any:
    half = dict(recipe.values)
    loss = half.pop("loss")

    def run(batch: Tree, key: jax.Array | None, params: Tree, *arrays: Tree) -> Any:
        return measure(Objective(loss, batch, key=key, **half), params, *arrays, **options.values)

    return jax.jit(run)


class _Static:
    """Options by name that are equal if their values are, or are the same where they do not say."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self._key = tuple((name, _identity(value)) for name, value in sorted(values.items()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


def _identity(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        # The values live as long as their key does, so that no id is given away twice.
        return "id", id(value)
    return value
