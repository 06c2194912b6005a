"""Errors that give rule, value, cause and cure, before any work is lost."""

from typing import Any

import jax
import optax

from curvax import axes
from curvax.trees import Tree


def refuse_masked(tree: Tree, name: str) -> None:
    masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(masked, jax.tree.leaves(tree, is_leaf=masked))):
        raise TypeError(
            f"`{name}` was handed masked parameters, as `optax.masked` and `optax.partition` do; "
            "the loss cannot be evaluated on them. Use `curvax.restrict(stages, mask)` or "
            "`curvax.partition(stages_by_label, labels)`, which restrict `value_fn` too."
        )


def needed_diagonal(diagonal: Tree, stage: str, needs: str) -> Tree:
    """The diagonal of a signal.

    Raises:
        ValueError: no earlier stage gave one.
    """
    if diagonal is None:
        raise ValueError(
            f"`{stage}` {needs}, and no earlier stage gave one. Put an estimator before it, as in "
            f"`hutchinson_diag() | {stage}(...)`; between stages write `|` or `curvax.pipe`, since "
            "`optax.chain` hands on nothing but the updates."
        )
    return diagonal


def check_range(name: str, value: Any, low: float, high: float, *, stage: str) -> None:
    """Checks a static number against a closed range; tracers and schedules pass.

    Raises:
        ValueError: it lies outside.
    """
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise ValueError(f"`{stage}` takes `{name}` in [{low}, {high}], and got {value}.")


def check_static(stage: str, /, **options: Any) -> None:
    """Refuses arrays, traced or not, where the structure of the computation depends on the option.

    Raises:
        TypeError: an option is one.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise TypeError(
                f"`{name}` of `{stage}` decides what is computed and must be a plain Python value. "
                f"Under `inject_hyperparams`, write `optax.inject_hyperparams({stage}, "
                f"static_args={tuple(options)})`."
            )


def refuse_summed(updates: Tree, local: frozenset[str], *, stage: str) -> None:
    """Refuses a gradient that shard_map has already summed over the devices.

    Raises:
        ValueError: the loss varies over an axis over which no update does.
    """
    leaves = jax.tree.leaves(updates)
    missing = sorted(local - axes.varying(updates)) if axes.tracked() and leaves else []
    if missing:
        raise ValueError(
            f"`{stage}` was handed a gradient that does not vary over the axis {missing[0]!r}, "
            "while the loss does: under shard_map, `jax.grad` with replicated parameters has "
            "already summed it over the devices. Take it from "
            "`curvax.Objective(loss, batch).value_and_grad(params)`, which is local, and average "
            f"after the stages: `... | pmean_updates({missing[0]!r})`."
        )


def averaged_axes(
    mean_over: axes.AxisNames, local: frozenset[str], *, stage: str
) -> tuple[str, ...]:
    """The bound axes that `mean_over` names.

    Raises:
        ValueError: the loss is local to devices and `mean_over` says nothing; or it names an axis
            that is not bound where others are.
    """
    if mean_over is None and local:
        axis = sorted(local)[0]
        raise ValueError(
            f"`{stage}` runs under the device axis {axis!r}, where each device sees its own part "
            f"of the batch, and was not told to average. Write `mean_over={axis!r}`, or "
            "`mean_over=()` if each device is meant to keep its own."
        )
    return axes.bound(mean_over, where=f"`{stage}`")
