"""Diagnostics: scalar metrics of a step, kept as the last fields of a stage's state.

Flags in the state say which metrics have been measured. An unmeasured metric is 0 in the state,
since a NaN there would stop `jax_debug_nans` and every check that states are finite; `diagnostics`
returns it as NaN.
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
import optax

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, ValueFn
from curvax.devices import axes
from curvax.objective import as_objective
from curvax.objective.reductions import depends
from curvax.pipes.signal import Signal, Stage, stage

Metrics = dict[str, jax.Array]
"""name ↦ float32 scalar, 0 where not measured."""

Flags = Any
"""Whether each metric has been measured, in the order of their names, bool [n]; () for none."""

_warned: set[Any] = set()


class StageMetrics(NamedTuple):
    """The last two fields of the state of a stage with metrics."""

    measured: Flags
    figures: Metrics


def no_metrics(*names: str) -> StageMetrics:
    """Metrics of these names, none of them measured."""
    return metrics_of(dict.fromkeys(names))


def metrics_of(
    scalars: Mapping[str, Scalar | None],
    over: tuple[str, ...] = (),
    weight: jax.Array | None = None,
    known: Mapping[str, bool | jax.Array] = MappingProxyType({}),
) -> StageMetrics:
    """Metrics in float32: the weighted mean over `over`, then over all axes that the types show.

    Args:
        scalars: name ↦ scalar, or None where it is unknown in this step.
        over: bound device axes.
        weight: the weight of this device in the mean.
        known: name ↦ whether it is known in this step, a bool, traced or not, equal on all devices;
            for metrics that may be unknown.
    """
    flags = {name: known.get(name, x is not None) for name, x in scalars.items()}

    def number(name: str, x: Scalar | None) -> jax.Array:
        x = jnp.asarray(0 if x is None else x, jnp.float32)
        return jnp.where(flags[name], x, 0) if name in known else x

    figures = {name: number(name, x) for name, x in scalars.items()}
    stacked = jnp.stack([jnp.asarray(flags[name]) for name in sorted(flags)]) if flags else ()
    return StageMetrics(stacked, axes.mean_over_visible(axes.mean(figures, over, weight)))


def with_metrics_of(state: optax.OptState, later: optax.OptState) -> optax.OptState:
    """`state` with the metrics of `later`, a state of the same stages."""
    seen = lambda node: {name: getattr(node, name) for name in StageMetrics._fields}
    newer = lambda old, new: old._replace(**seen(new)) if _measures(old) else old
    return jax.tree.map(newer, state, later, is_leaf=_measures)


def unflagged(state: optax.OptState) -> optax.OptState:
    """`state` in the format of earlier versions: no flags, and NaN for unmeasured metrics."""

    def bare(node: Any) -> Any:
        if not _measures(node):
            return node
        fields = [name for name in node._fields if name != "measured"]
        make: Any = namedtuple
        return make("Older", fields)(*(unflagged(getattr(node, name)) for name in fields))

    return jax.tree.map(bare, state, is_leaf=_measures)


def flagged(older: optax.OptState, like: optax.OptState) -> optax.OptState:
    """A state of earlier versions in the format of `like`, with flags from its NaNs."""

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
    """An array that every process holds whole, sharded like another."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


class RecordState(NamedTuple):
    measured: Flags
    figures: Metrics
    """name ↦ float32 scalar, as last measured."""


def record(**measures: Callable[..., Any]) -> Stage:
    """Records metrics of your own at its place in the pipe.

    Args:
        **measures: name ↦ `measure(signal, params) -> scalar`, evaluated at every step; None stands
            for unknown. A measure with a third argument also receives the loss, as an `Objective`,
            for the measures of `curvax.analysis`:
            `record(random=lambda s, p, loss: random_sharpness(loss, p, 0.05).value)`.

    Returns:
        A stage that passes the signal on unchanged; `diagnostics(state)` returns the metrics.

    Raises:
        ValueError: in `update`, a measure takes the loss and `value_fn` is missing.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> norm = lambda signal, params: jnp.sqrt(jnp.sum(signal.updates**2))
        >>> tx, g = curvax.record(norm=norm) | optax.sgd(0.1), jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(g, tx.init(g), g)
        >>> float(curvax.diagnostics(state)["norm"])
        5.0
    """
    of_loss = {name for name, measure in measures.items() if _takes_loss(measure)}

    def init(params: Tree) -> RecordState:
        del params
        return RecordState(*no_metrics(*measures))

    def rule(
        signal: Signal,
        state: RecordState,
        params: Tree,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, RecordState]:
        del state, extra
        objective = as_objective(value_fn, "record", params) if of_loss else None
        seen = lambda name: (signal, params, objective)[: 3 if name in of_loss else 2]
        found: dict[str, Scalar] = {}
        known: dict[str, Any] = {}
        for name, measure in measures.items():
            found[name] = measure(*seen(name))
            if _skips(signal) and _uses_perturbed_loss(measure, *seen(name)):
                known[name] = signal.perturbed
        return signal, RecordState(*metrics_of(found, known=known))

    return stage(init, rule, evaluates_loss=bool(of_loss))


def _skips(signal: Signal) -> bool:
    """Whether `sam_perturb(every=)` may skip this step, so that there is no perturbed loss."""
    return signal.perturbed_value is not None and not isinstance(signal.perturbed, bool | None)


def _uses_perturbed_loss(measure: Callable[..., Any], signal: Any, *rest: Any) -> bool:
    """Whether a measure depends on the perturbed loss."""
    of_perturbed = lambda value: measure(signal._replace(perturbed_value=value), *rest)
    try:
        return depends(jax.make_jaxpr(of_perturbed)(signal.perturbed_value))
    except jax.errors.ConcretizationTypeError:  # the measure looks at the value
        return True


def _takes_loss(measure: Callable[..., Any]) -> bool:
    """Whether a measure has a third argument."""
    parameters = inspect.signature(measure).parameters.values()
    return sum(each.default is each.empty for each in parameters) > 2


def diagnostics(state: optax.OptState) -> Metrics:
    """Returns all metrics in an optimiser state, by name.

    A name that several stages use is followed by the place of the stage in the state:
    `surrogate_gap[0]`, `surrogate_gap[2]`.

    Args:
        state: what `tx.init` or `tx.update` returned, in any Optax wrappers.

    Returns:
        name ↦ float32 scalar, as last measured; NaN before the first measurement, and where it was
        unknown in the last step. For arrays on a device the call waits for the step.

    Warns:
        UserWarning: once per pipe, metrics need the loss and no step knows it.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx, w = curvax.sam(optax.sgd(0.1), rho=0.1), jnp.array([3.0, 4.0])
        >>> value, grads = jax.value_and_grad(loss)(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=loss, value=value)
        >>> metrics = curvax.diagnostics(state)
        >>> round(float(metrics["surrogate_gap"]), 3), round(float(metrics["gradient_norm"]), 3)
        (0.505, 5.0)
    """
    stages = list(_stages(state, ()))
    _warn_of_unknowable(state, [node for _, node in stages])
    found = [(name, place, x) for place, node in stages for name, x in _shown(node).items()]
    times = Counter(name for name, _, _ in found)
    return {name if times[name] == 1 else f"{name}[{place}]": x for name, place, x in found}


def _stages(state: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Place and state of every stage with metrics, in order, outer stages before inner ones."""
    for below, node in jax.tree.leaves_with_path(state, is_leaf=_measures):
        if _measures(node):
            here = (*path, *below)
            yield ".".join(_step(entry) for entry in here if _step(entry)), node
            yield from _stages(tuple(node[:-1]), here)


def _known(node: Any) -> dict[str, Any]:
    """name ↦ whether measured, a boolean array; always True for states without flags."""
    flags, names = getattr(node, "measured", ()), sorted(node.figures)
    if isinstance(flags, tuple):
        return dict.fromkeys(names, np.True_)
    flags = flags if _traced(flags) else np.asarray(flags)
    return {name: flags[..., i] for i, name in enumerate(names)}


def _shown(node: Any) -> Metrics:
    """The metrics of a stage, NaN where not measured."""
    known = _known(node)
    return {name: _or_nan(x, known[name]) for name, x in node.figures.items()}


def _or_nan(x: Any, known: Any) -> Any:
    if _traced(x) or _traced(known):
        return jnp.where(known, x, jnp.nan)
    if np.all(known):
        return x
    # A copy of a NumPy array: `jax_debug_nans` checks the results of operations only.
    return jax.device_put(np.where(known, np.asarray(x), np.float32(np.nan)))


def _warn_of_unknowable(state: Any, stages: list[Any]) -> None:
    """Warns once of metrics that stay NaN while others of the same stage have been measured."""
    # A metric of `record` may be unknown in this step only.
    own = [node for node in stages if not isinstance(node, RecordState)]
    missing = sorted({name for node in own for name in _unknowable(_known(node))})
    pipe = jax.tree.structure(state), *map(jnp.shape, jax.tree.leaves(state))
    if missing and pipe not in _warned:
        _warned.add(pipe)
        warnings.warn(
            f"NaN for {', '.join(f'`{name}`' for name in missing)}: the step did not know the loss "
            "at the parameters, and no forward pass is spent on a metric. Pass `value=value` to "
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
    """The place in a tuple, or a label; "" for the name of a field."""
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return ""
    return jax.tree_util.keystr((entry,), simple=True)
