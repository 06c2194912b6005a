"""What a person wants to see of a step: scalars kept as the last field of a stage's state.

Beside them stands which have been measured, since a NaN in the state would stop `jax_debug_nans`
and every check that a state is finite: not measured is 0 there, and NaN in `diagnostics` alone.
"""

import inspect
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.objective import as_objective
from curvax.objective.reductions import depends
from curvax.pipes.signal import Signal, Stage, stage

Metrics = dict[str, jax.Array]
"""name ↦ float32 scalar, 0 where not measured."""

Flags = Any
"""Whether each figure has been measured, in the order of their names, bool [n]; () for none."""

_warned: set[Any] = set()


class StageMetrics(NamedTuple):
    """The last two fields of the state of a stage that measures."""

    measured: Flags
    figures: Metrics


def no_metrics(*names: str) -> StageMetrics:
    """Metrics before the first measurement."""
    return metrics_of(dict.fromkeys(names))


def metrics_of(
    scalars: dict[str, Any],
    over: tuple[str, ...] = (),
    weight: Any = None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> StageMetrics:
    """Metrics in float32, averaged over axes by weight, then over all that their types show.

    Args:
        scalars: name ↦ scalar, or None where this step cannot know it.
        over: bound device axes.
        weight: what a device counts.
        known: name ↦ whether this step knows it, traced or not and the same on every device,
            where that is not sure.
    """
    flags = {name: known.get(name, x is not None) for name, x in scalars.items()}

    def number(name: str, x: Any) -> jax.Array:
        x = jnp.asarray(0 if x is None else x, jnp.float32)
        return jnp.where(flags[name], x, 0) if name in known else x

    figures = {name: number(name, x) for name, x in scalars.items()}
    stacked = jnp.stack([jnp.asarray(flags[name]) for name in sorted(flags)]) if flags else ()
    return StageMetrics(stacked, axes.mean_over_visible(axes.mean(figures, over, weight)))


def with_metrics_of(state: Any, later: Any) -> Any:
    """`state` with the figures of `later`, a state of the same stages."""
    seen = lambda node: {name: getattr(node, name) for name in StageMetrics._fields}
    newer = lambda old, new: old._replace(**seen(new)) if _measures(old) else old
    return jax.tree.map(newer, state, later, is_leaf=_measures)


def unflagged(state: Any) -> Any:
    """`state` as it was when NaN stood for not measured and nothing stood beside the figures."""

    def bare(node: Any) -> Any:
        if not _measures(node):
            return node
        fields = [name for name in node._fields if name != "measured"]
        make: Any = namedtuple
        return make("Older", fields)(*(unflagged(getattr(node, name)) for name in fields))

    return jax.tree.map(bare, state, is_leaf=_measures)


def flagged(older: Any, like: Any) -> Any:
    """What `unflagged` made of a state like `like`, with its flags read off the NaNs."""

    def whole(node: Any, old: Any) -> Any:
        if not _measures(node):
            return old
        numbers = {name: np.asarray(x) for name, x in sorted(old.figures.items())}
        known = [~np.isnan(x) for x in numbers.values()]
        flags = _placed(np.stack(known, axis=-1), node.measured) if known else ()
        figures = {
            name: _placed(np.nan_to_num(x), old.figures[name]) for name, x in numbers.items()
        }
        rest = [flagged(getattr(old, name), getattr(node, name)) for name in node._fields[:-2]]
        return type(node)(*rest, flags, figures)

    return jax.tree.map(whole, like, older, is_leaf=_measures)


def _placed(x: np.ndarray, like: Any) -> jax.Array:
    """The numbers of an array that every process has whole, laid out like another."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


class RecordState(NamedTuple):
    measured: Flags
    figures: Metrics
    """name ↦ float32 scalar, as last measured."""


def record(**measures: Callable[..., Any]) -> Stage:
    """Adds figures of your own: `record(update_norm=lambda s, p: optax.tree.norm(s.updates))`.

    A measure of a third argument is handed the loss as well, which `curvax.analysis` measures:
    `record(random=lambda s, p, loss: random_sharpness(loss, p, 0.05).value)`.

    Args:
        measures: each `measure(signal, params) -> scalar` or `measure(signal, params, objective)
            -> scalar`, evaluated at every step at this place of the pipe; None is not known.

    Returns:
        A stage that passes the signal on unchanged; `diagnostics(state)` finds the figures.

    Raises:
        ValueError: in `update`, a measure takes the loss and there is no `value_fn`.
    """
    of_loss = {name for name, measure in measures.items() if _takes_loss(measure)}

    def init(params: Tree) -> RecordState:
        del params
        return RecordState(*no_metrics(*measures))

    def rule(
        signal: Signal, state: RecordState, params: Tree, value_fn: Any = None, **extra: Any
    ) -> Any:
        del state, extra
        objective = as_objective(value_fn, "record", params) if of_loss else None
        seen = lambda name: (signal, params, objective)[: 3 if name in of_loss else 2]
        found, known = {}, {}
        for name, measure in measures.items():
            found[name] = measure(*seen(name))
            if _skips(signal) and _reads_climb(measure, *seen(name)):
                known[name] = signal.perturbed
        return signal, RecordState(*metrics_of(found, known=known))

    return stage(init, rule, evaluates_loss=bool(of_loss))


def _skips(signal: Signal) -> bool:
    """Whether this may be a step that `sam_perturb(every=)` skips, and has no perturbed loss."""
    return signal.perturbed_value is not None and not isinstance(signal.perturbed, bool | None)


def _reads_climb(measure: Callable[..., Any], signal: Any, *rest: Any) -> bool:
    """Whether a measure is made of the perturbed loss."""
    of_climb = lambda value: measure(signal._replace(perturbed_value=value), *rest)
    try:
        return depends(jax.make_jaxpr(of_climb)(signal.perturbed_value))
    except jax.errors.ConcretizationTypeError:  # it looks at the number itself
        return True


def _takes_loss(measure: Callable[..., Any]) -> bool:
    """Whether it needs a third argument."""
    parameters = inspect.signature(measure).parameters.values()
    return sum(each.default is each.empty for each in parameters) > 2


def diagnostics(state: Any) -> Metrics:
    """All figures in an optimiser state, by name.

    A name that several stages measure is told apart by the place of its stage in the state:
    `surrogate_gap[0]`, `surrogate_gap[2]`.

    Args:
        state: what `tx.init` or `tx.update` returned, wrapped by whatever Optax wrappers.

    Returns:
        name ↦ float32 scalar, as last measured; NaN before the first measurement, and where a step
        could not know it. For arrays on a device it waits for the step.

    Warns:
        UserWarning: once for each pipe, figures of the loss that no step can know.
    """
    stages = list(_stages(state, ()))
    _warn_of_unknowable(state, [node for _, node in stages])
    found = [(name, place, x) for place, node in stages for name, x in _shown(node).items()]
    times = Counter(name for name, _, _ in found)
    return {name if times[name] == 1 else f"{name}[{place}]": x for name, place, x in found}


def _stages(state: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Place and state of every stage that measures, those within others behind them."""
    for below, node in jax.tree.leaves_with_path(state, is_leaf=_measures):
        if _measures(node):
            here = (*path, *below)
            yield ".".join(_step(entry) for entry in here if _step(entry)), node
            yield from _stages(tuple(node[:-1]), here)


def _known(node: Any) -> dict[str, Any]:
    """name ↦ whether measured, a boolean array; those of stages without flags are."""
    flags, names = getattr(node, "measured", ()), sorted(node.figures)
    if isinstance(flags, tuple):
        return dict.fromkeys(names, np.True_)
    flags = flags if _traced(flags) else np.asarray(flags)
    return {name: flags[..., i] for i, name in enumerate(names)}


def _shown(node: Any) -> Metrics:
    """The figures of a stage, NaN where not measured."""
    known = _known(node)
    return {name: _or_nan(x, known[name]) for name, x in node.figures.items()}


def _or_nan(x: Any, known: Any) -> Any:
    if _traced(x) or _traced(known):
        return jnp.where(known, x, jnp.nan)
    if np.all(known):
        return x
    # Placed, not computed: `jax_debug_nans` looks at what operations give.
    return jax.device_put(np.where(known, np.asarray(x), np.float32(np.nan)))


def _warn_of_unknowable(state: Any, stages: list[Any]) -> None:
    """Says once that figures stay NaN where others of the same stage have been measured."""
    # What a user records may be unknown in this step alone.
    own = [node for node in stages if not isinstance(node, RecordState)]
    missing = sorted({name for node in own for name in _unknowable(_known(node))})
    pipe = jax.tree.structure(state), *map(jnp.shape, jax.tree.leaves(state))
    if missing and pipe not in _warned:
        _warned.add(pipe)
        warnings.warn(
            f"NaN for {', '.join(f'`{name}`' for name in missing)}: nothing told the step the loss "
            "at the parameters, and no forward pass is spent on a figure. Pass `value=value` to "
            "`tx.update`, or take the gradient from `curvax.Objective(...).value_and_grad` and "
            "pass that objective as `value_fn`.",
            stacklevel=3,
        )


def _unknowable(known: dict[str, Any]) -> list[str]:
    if any(map(_traced, known.values())):
        return []
    missing = [name for name, flag in known.items() if not np.any(flag)]
    return missing if len(missing) < len(known) else []


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _measures(node: Any) -> bool:
    return getattr(node, "_fields", ())[-1:] == ("figures",)


def _step(entry: Any) -> str:
    """Places in tuples and labels of partitions tell stages apart; names of fields do not."""
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return ""
    return jax.tree_util.keystr((entry,), simple=True)
