"""What a person wants to see of a step: scalars kept as the last field of a stage's state."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import axes
from curvax.objective import as_objective
from curvax.signal import Signal, Stage, stage
from curvax.trees import Tree

Figures = dict[str, jax.Array]


def unmeasured(*names: str) -> Figures:
    """Figures before the first measurement: NaN."""
    return {name: jnp.full((), jnp.nan, jnp.float32) for name in names}


def measured(scalars: dict[str, Any], over: tuple[str, ...] = (), weight: Any = None) -> Figures:
    """Figures in float32, averaged over axes by weight, then over all that their types show."""
    figures = {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}
    return axes.mean_over_visible(axes.mean(figures, over, weight))


def remeasured(state: Any, later: Any) -> Any:
    """`state` with the figures of `later`, a state of the same stages."""
    newer = lambda old, new: old._replace(figures=new.figures) if _measures(old) else old
    return jax.tree.map(newer, state, later, is_leaf=_measures)


class RecordState(NamedTuple):
    figures: Figures
    """name ↦ float32 scalar, as last measured."""


def record(**measures: Callable[..., Any]) -> Stage:
    """Adds figures of your own: `record(update_norm=lambda s, p: optax.tree.norm(s.updates))`.

    A measure of a third argument is handed the loss as well, which `curvax.analysis` measures:
    `record(random=lambda s, p, loss: random_sharpness(loss, p, 0.05).value)`.

    Args:
        measures: each `measure(signal, params) -> scalar` or `measure(signal, params, objective)
            -> scalar`, evaluated at every step at this place of the pipe.

    Returns:
        A stage that passes the signal on unchanged; `diagnostics(state)` finds the figures.

    Raises:
        ValueError: in `update`, a measure takes the loss and there is no `value_fn`.
    """
    of_loss = {name for name, measure in measures.items() if _takes_loss(measure)}

    def init(params: Tree) -> RecordState:
        del params
        return RecordState(unmeasured(*measures))

    def rule(
        signal: Signal, state: RecordState, params: Tree, value_fn: Any = None, **extra: Any
    ) -> Any:
        del state, extra
        objective = as_objective(value_fn, "record", params) if of_loss else None
        seen = lambda name: (signal, params, objective)[: 3 if name in of_loss else 2]
        found = {name: measure(*seen(name)) for name, measure in measures.items()}
        return signal, RecordState(measured(found))

    return stage(init, rule, evaluates_loss=bool(of_loss))


def _takes_loss(measure: Callable[..., Any]) -> bool:
    """Whether it needs a third argument."""
    parameters = inspect.signature(measure).parameters.values()
    return sum(each.default is each.empty for each in parameters) > 2


def diagnostics(state: Any) -> Figures:
    """All figures in an optimiser state, by name.

    A name that several stages measure is told apart by the place of its stage in the state:
    `surrogate_gap[0]`, `surrogate_gap[2]`.

    Args:
        state: what `tx.init` or `tx.update` returned, wrapped by whatever Optax wrappers.

    Returns:
        name ↦ float32 scalar, as last measured; NaN before the first measurement.
    """
    found = [(name, place, x) for place, figs in _walk(state, ()) for name, x in figs.items()]
    times = Counter(name for name, _, _ in found)
    return {name if times[name] == 1 else f"{name}[{place}]": x for name, place, x in found}


def _walk(state: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Figures]]:
    for below, node in jax.tree.leaves_with_path(state, is_leaf=_measures):
        if _measures(node):
            here = (*path, *below)
            yield ".".join(_step(entry) for entry in here if _step(entry)), dict(node.figures)
            yield from _walk(tuple(node[:-1]), here)


def _measures(node: Any) -> bool:
    return getattr(node, "_fields", ())[-1:] == ("figures",)


def _step(entry: Any) -> str:
    """Places in tuples and labels of partitions tell stages apart; names of fields do not."""
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return ""
    return jax.tree_util.keystr((entry,), simple=True)
