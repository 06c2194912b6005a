"""A function of an objective ↦ the same function, compiled once and cached for eager calls."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from curvax.arithmetic.trees import Tree
from curvax.objective import Objective

KEPT = 64
"""Compiled functions in the cache: a loss that is redefined for each call adds one each time."""


def compiled_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `f(objective, params, *arrays, **options)` at its first eager call.

    Batch, key, parameters and arrays are arguments of the compiled program; the functions of the
    objective and the options are static. A new batch of the same shape does not recompile. With
    traced arguments f is inlined into the surrounding trace.

    Args:
        f: a function of an `Objective` with a batch of arrays, of trees of arrays, and of static
            options by keyword.
    """

    @functools.wraps(f)
    def call(objective: Objective, params: Tree, *arrays: Tree, **options: Any) -> Any:
        dynamic = (objective.batch, objective.key, params, *arrays)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((dynamic, options))):
            return f(objective, params, *arrays, **options)
        fields = {
            "loss": objective.loss,
            "model": objective.model,
            "has_aux": objective.has_aux,
            "microbatch": objective.microbatch,
            "weight": objective.weight,
        }
        return _compiled(f, _Static(fields), _Static(options))(*dynamic)

    return call


@functools.lru_cache(maxsize=KEPT)
def _compiled(f: Callable[..., Any], fields: "_Static", options: "_Static") -> Any:
    static = dict(fields.values)
    loss = static.pop("loss")

    def run(batch: Tree, key: jax.Array | None, params: Tree, *arrays: Tree) -> Any:
        return f(Objective(loss, batch, key=key, **static), params, *arrays, **options.values)

    return jax.jit(run)


class _Static:
    """Hashable options, compared by value, or by identity where a value has no hash."""

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
        # The cached key keeps its values alive, so that their ids are not reused.
        return "id", id(value)
    return value
