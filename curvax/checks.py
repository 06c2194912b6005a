"""Errors that give rule, value, cause and cure, before any work is lost."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import hyperparameters
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes


def refuse_masked(tree: Tree, name: str) -> None:
    masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(masked, jax.tree.leaves(tree, is_leaf=masked))):
        raise TypeError(
            f"`{name}` was handed masked parameters, as `optax.masked` and `optax.partition` do; "
            "the loss cannot be evaluated on them. Use `curvax.restrict(stages, mask)` or "
            "`curvax.partition(stages_by_label, labels)`, which restrict `value_fn` too."
        )


def refuse_unlike(updates: Tree, params: Tree, name: str) -> None:
    """Refuses updates that are not those of the parameters.

    Raises:
        ValueError: they have another number of leaves.
    """
    counts = len(jax.tree.leaves(updates)), len(jax.tree.leaves(params))
    if params is not None and counts[0] != counts[1]:
        raise ValueError(
            f"`{name}` was handed a gradient of {counts[0]} arrays for parameters of {counts[1]}. "
            "Take the gradient at the parameters that the optimiser is given: in nnx, the same "
            "filter for both, `nnx_loss(model, fn, wrt=filter)` and `nnx.Optimizer(model, tx, "
            "wrt=filter)`; in Equinox, `tx.update(grads, state, eqx.filter(model, "
            "eqx.is_inexact_array))`; under `optax.lookahead`, whose parameters are a pair, the "
            "stages by themselves before it."
        )


def refuse_no_value(value: Any) -> None:
    """Refuses what is no loss in the place of `value`.

    Raises:
        TypeError: it is neither None nor a scalar.
    """
    if value is not None and not (trees.is_leaf(value) and _is_scalar(value)):
        raise TypeError(
            "`tx.update(..., value=)` takes the loss at the parameters, a scalar, and got "
            f"{_kind_of(value)}. With an aux it is the first part of what `value_and_grad` "
            "returned, `(value, aux), grads = objective.value_and_grad(params)`; losses of "
            "examples are averaged before."
        )


def _is_scalar(x: Any) -> bool:
    return isinstance(x, numbers.Number) or (hasattr(x, "dtype") and jnp.shape(x) == ())


def _kind_of(x: Any) -> str:
    shape = f" of shape {jnp.shape(x)}" if hasattr(x, "dtype") else ""
    return f"a {type(x).__name__}{shape}" if not hasattr(x, "dtype") else f"an array{shape}"


def refuse_complex(tree: Tree, name: str) -> None:
    """Refuses complex numbers where curvature is that of a function of real ones.

    JAX's gradient of a real loss in complex parameters is the conjugate of the direction in which
    the loss rises, and products without conjugates are no inner products.

    Raises:
        TypeError: a leaf is complex.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"`{name}` takes real numbers, and the leaf `{trees.label(trees.names(path))}` has "
                f"dtype {jnp.result_type(leaf)}. Write `curvax.split_real_and_imaginary(stages)`, "
                "which hands down real and imaginary parts, `value_fn` included; for a product or "
                "a measure pass the parts and `objective.through(f)`, where `f` puts them together."
            )


def refuse_local(local: frozenset[str], *, stage: str) -> None:
    """Refuses updates that are one device's own where all devices must go the same way.

    Raises:
        ValueError: they are.
    """
    if local:
        axis = sorted(local)[0]
        raise ValueError(
            f"`{stage}` was handed the updates of one device, and each device of {axis!r} would "
            f"go its own way. Put `pmean_updates({axis!r})` before it (`mean_over=` in a method), "
            "or `pmean_updates(())` if that is meant."
        )


def check_range(name: str, value: Any, low: float, high: float, *, stage: str) -> None:
    """Checks a static number against a closed range; arrays and schedules pass.

    Raises:
        TypeError: it is a text.
        ValueError: it lies outside.
    """
    if isinstance(value, str):
        raise TypeError(
            f"`{stage}` takes `{name}` as a number or a schedule, and got the text {value!r}. "
            "Drop the quotes."
        )
    if isinstance(value, numbers.Real) and not low <= float(value) <= high:
        raise ValueError(f"`{stage}` takes `{name}` in [{low}, {high}], and got {value}.")


def check_decay(name: str, value: Any, *, stage: str) -> None:
    """Checks a static decay; arrays and schedules pass.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if isinstance(value, numbers.Real) and not 0 <= float(value) < 1:
        raise ValueError(f"`{stage}` takes `{name}` in [0, 1), and got {value}.")


def check_static(stage: str, /, **options: Any) -> None:
    """Refuses arrays, traced or not, where the structure of the computation depends on the option.

    Raises:
        TypeError: an option is one.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            static = tuple(sorted({*hyperparameters.static_options(stage), *options}))
            raise TypeError(
                f"`{name}` of `{stage}` decides what is computed and must be a plain Python value, "
                f"known before tracing, and is an array of {value.dtype}. "
                "`optax.inject_hyperparams` makes arrays of numbers; in curvax's own factories "
                "such options stay plain, and for a factory of yours name those that it "
                f"takes: `optax.inject_hyperparams(..., static_args={static!r})`."
            )


def check_count(stage: str, /, **options: Any) -> None:
    """Refuses what is no positive integer known before tracing.

    Raises:
        TypeError, ValueError: an option is an array, no integer, or below 1.
    """
    check_static(stage, **options)
    for name, value in options.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{stage}` takes `{name}` as a positive integer, and got {value!r}.")


def refuse_summed(updates: Tree, local: frozenset[str], *, stage: str) -> None:
    """Refuses a gradient that has been summed over the devices, by shard_map or a stage.

    Raises:
        ValueError: the loss varies over an axis over which no update does.
    """
    leaves = jax.tree.leaves(updates)
    missing = sorted(local - axes.varying(updates)) if axes.tracked() and leaves else []
    if missing:
        raise ValueError(
            f"`{stage}` was handed a gradient that does not vary over the axis {missing[0]!r}, "
            "while the loss does: under shard_map, `jax.grad` with replicated parameters has "
            "already summed it over the devices, or an earlier stage has averaged it. Take it from "
            "`curvax.Objective(loss, batch).value_and_grad(params)`, which is local, and average "
            f"after the stages: `... | pmean_updates({missing[0]!r})`."
        )


def refuse_split(params: Tree, objective: Any, *, stage: str) -> None:
    """Refuses parameters of which each device along a mapped axis has a part of its own.

    Norms and products would be those of a device's part, and solvers would stop at different steps
    on devices that still exchange activations. Types tell so where `check_vma=True`.

    Raises:
        ValueError: they vary over an axis over which the loss does not.
    """
    own = axes.varying(params) - objective.local_axes(params) - {*objective.joined}
    if own:
        axis = sorted(own)[0]
        raise ValueError(
            f"`{stage}` takes norms over all parameters, and they are split along the mapped axis "
            f"{axis!r}: each device would take that of its own part. Leave that axis to the "
            "compiler, `jax.shard_map(step, axis_names={'batch'}, ...)` with the axis of the batch "
            "alone, or run under `jit`."
        )


def averaged_axes(
    mean_over: axes.AxisNames, local: frozenset[str], *, stage: str, partly: bool = False
) -> tuple[str, ...]:
    """The bound axes that `mean_over` names.

    Args:
        local: the axes over which the loss is known to be each device's own.
        partly: whether the rest may be averaged later.

    Raises:
        ValueError: `mean_over` names an axis that is not bound where others are, or says nothing
            of an axis in `local`.
    """
    found = axes.bound(mean_over, where=f"`{stage}`")
    missing = sorted(local - set(found))
    if missing and mean_over is None:
        over = missing[0] if len(missing) == 1 else tuple(missing)
        form = f"{stage}({{!r}})" if stage == "pmean_updates" else "mean_over={!r}"
        raise ValueError(
            f"`{stage}` runs under the device axis {missing[0]!r}, where each device sees its own "
            f"part of the batch, and was not told to average. Write `{form.format(over)}`, or "
            f"`{form.format(())}` if each device is meant to keep its own."
        )
    # Without types, `local` holds every manual axis, also one that only splits the model.
    if missing and found and axes.tracked() and not partly:
        raise ValueError(
            f"`{stage}` averages over {mean_over!r} alone, and the loss varies over "
            f"{sorted(local)}. Name them all: `mean_over={tuple(sorted(local))}`."
        )
    return found
