"""Checks of options, parameters and updates, with errors that say what to write instead."""

import numbers
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import hyperparameters
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes


def refuse_masked(tree: Tree, name: str) -> None:
    """Raises on the masked parameters of `optax.masked` and `optax.partition`.

    Raises:
        TypeError: a node is an `optax.MaskedNode`.
    """
    masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(masked, jax.tree.leaves(tree, is_leaf=masked))):
        raise TypeError(
            f"`{name}` received masked parameters, from `optax.masked` or `optax.partition`, and "
            "the loss cannot be evaluated on them. Use `curvax.restrict(stages, mask)` or "
            "`curvax.partition(stages_by_label, labels)`, which restrict `value_fn` too."
        )


def refuse_unlike(updates: Tree, params: Tree, name: str) -> None:
    """Raises if the updates cannot be those of the parameters.

    Raises:
        ValueError: they have another number of leaves.
    """
    counts = len(jax.tree.leaves(updates)), len(jax.tree.leaves(params))
    if params is not None and counts[0] != counts[1]:
        raise ValueError(
            f"`{name}` received a gradient of {counts[0]} arrays for parameters of {counts[1]}. "
            "Compute the gradient at the parameters that the optimiser receives: in nnx, use the "
            "same filter for both, `nnx_loss(model, fn, wrt=filter)` and `nnx.Optimizer(model, tx, "
            "wrt=filter)`; in Equinox, write `tx.update(grads, state, eqx.filter(model, "
            "eqx.is_inexact_array))`; with `optax.lookahead`, whose parameters are a pair, run the "
            "stages before it."
        )


def refuse_no_value(value: Any) -> None:
    """Checks the `value` of an update.

    Raises:
        TypeError: it is neither None nor a scalar.
    """
    if value is not None and not (trees.is_leaf(value) and _is_scalar(value)):
        raise TypeError(
            "`tx.update(..., value=)` takes the loss at the parameters, a scalar, and received "
            f"{_kind_of(value)}. With an aux, unpack it first, "
            "`(value, aux), grads = objective.value_and_grad(params)`; average the losses of "
            "examples with `jnp.mean`."
        )


def _is_scalar(x: Any) -> bool:
    return isinstance(x, numbers.Number) or (hasattr(x, "dtype") and jnp.shape(x) == ())


def _kind_of(x: Any) -> str:
    shape = f" of shape {jnp.shape(x)}" if hasattr(x, "dtype") else ""
    return f"a {type(x).__name__}{shape}" if not hasattr(x, "dtype") else f"an array{shape}"


def warn_renamed(old: str, new: str) -> None:
    """Warns, from a module's `__getattr__`, that a public name has been renamed."""
    warnings.warn(
        f"`{old}` is now `{new}`; the old name will be removed. Write `{new}`.",
        DeprecationWarning,
        stacklevel=3,
    )


def refuse_complex(tree: Tree, name: str) -> None:
    """Raises on complex leaves, for which curvature is not defined here.

    JAX's gradient of a real loss in complex parameters is the conjugate of the direction of
    steepest ascent, and Σ aᵢbᵢ without a conjugate is not an inner product.

    Raises:
        TypeError: a leaf is complex.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"`{name}` takes real numbers, and the leaf `{trees.label(trees.names(path))}` has "
                f"dtype {jnp.result_type(leaf)}. Write `curvax.split_real_and_imaginary(stages)`, "
                "which passes real and imaginary parts to the stages and adapts `value_fn`; for a "
                "product or a measure pass the parts and `objective.through(f)`, where `f` joins "
                "them."
            )


def refuse_local(local: frozenset[str], *, stage: str) -> None:
    """Raises if updates differ between devices in a stage that must act equally on all.

    Args:
        local: the device axes over which the updates differ.
        stage: the name of the stage.

    Raises:
        ValueError: `local` is not empty.
    """
    if local:
        axis = sorted(local)[0]
        raise ValueError(
            f"`{stage}` received updates that are each device's own along {axis!r}, so that the "
            f"devices would diverge. Put `pmean_updates({axis!r})` before it (`mean_over=` in a "
            "method), or `pmean_updates(())` if the devices are meant to diverge."
        )


def check_range(name: str, value: Any, low: float, high: float, *, stage: str) -> None:
    """Checks that a static number lies in [low, high]; arrays and schedules are not checked.

    Raises:
        TypeError: the value is a string.
        ValueError: it is out of range.
    """
    if isinstance(value, str):
        raise TypeError(
            f"`{stage}` takes `{name}` as a number or a schedule, and got the string {value!r}. "
            "Remove the quotes."
        )
    if isinstance(value, numbers.Real) and not low <= float(value) <= high:
        raise ValueError(f"`{stage}` takes `{name}` in [{low}, {high}], and got {value}.")


def check_decay(name: str, value: Any, *, stage: str) -> None:
    """Checks that a static decay lies in [0, 1); arrays and schedules are not checked.

    Raises:
        ValueError: it is out of range.
    """
    if isinstance(value, numbers.Real) and not 0 <= float(value) < 1:
        raise ValueError(f"`{stage}` takes `{name}` in [0, 1), and got {value}.")


def check_fraction(fraction: float, stage: str) -> None:
    """Refuses a fraction outside (0, 1], or one that is not a plain number.

    Raises:
        ValueError: it is outside.
        TypeError: it is an array.
    """
    check_static(stage, fraction=fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"`{stage}` takes `fraction` in (0, 1], and got {fraction}.")


def check_static(stage: str, /, **options: Any) -> None:
    """Raises if an option that determines the structure of the computation is a JAX array.

    Raises:
        TypeError: an option is an array, traced or not.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            static = tuple(sorted({*hyperparameters.static_options(stage), *options}))
            raise TypeError(
                f"`{name}` of `{stage}` determines what is computed and must be a plain Python "
                f"value, known before tracing, and is an array of {value.dtype}. "
                "`optax.inject_hyperparams` converts numbers to arrays, except for such options "
                "of curvax's own factories; in a factory of yours exclude those that it takes, "
                f"`optax.inject_hyperparams(..., static_args={static!r})`."
            )


def check_count(stage: str, /, **options: Any) -> None:
    """Checks that options are positive Python integers.

    Raises:
        TypeError: an option is an array.
        ValueError: it is not an integer, or below 1.
    """
    check_static(stage, **options)
    for name, value in options.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{stage}` takes `{name}` as a positive integer, and got {value!r}.")


def check_sampler(stage: str, sampler: Any) -> None:
    """Checks that random trees are drawn by a callable.

    Raises:
        TypeError: it is not callable.
    """
    check_static(stage, sampler=sampler)
    if not callable(sampler):
        raise TypeError(
            f"`{stage}(sampler=)` takes a callable `sampler(key, tree) -> tree`, such as "
            f"`rademacher` or `gaussian_probe`, and got {sampler!r}."
        )


def refuse_summed(updates: Tree, local: frozenset[str], *, stage: str) -> None:
    """Raises if a gradient has been summed or averaged over devices too early.

    Raises:
        ValueError: the loss varies over a device axis over which no update varies.
    """
    leaves = jax.tree.leaves(updates)
    missing = sorted(local - axes.varying(updates)) if axes.tracked() and leaves else []
    if missing:
        raise ValueError(
            f"`{stage}` received a gradient that does not vary over the axis {missing[0]!r}, "
            "while the loss does: under `shard_map`, `jax.grad` with replicated parameters has "
            "already summed it over the devices, or an earlier stage has averaged it. Use the "
            "local gradient of `curvax.Objective(loss, batch).value_and_grad(params)`, and average "
            f"after the stages: `... | pmean_updates({missing[0]!r})`."
        )


def refuse_split(params: Tree, objective: Any, *, stage: str) -> None:
    """Raises if parameters are sharded along a mapped axis, as in manual tensor parallelism.

    Norms and inner products would be those of a device's shard, and solvers would stop at different
    steps on devices that still exchange activations. Detected only with `check_vma=True`.

    Raises:
        ValueError: the parameters vary over an axis over which the loss does not.
    """
    own = axes.varying(params) - objective.local_axes(params) - {*objective.joined}
    if own:
        axis = sorted(own)[0]
        raise ValueError(
            f"`{stage}` takes norms over all parameters, and they are split along the mapped axis "
            f"{axis!r}: each device would take the norm of its own shard. Leave that axis to the "
            "compiler, `jax.shard_map(step, axis_names={'batch'}, ...)` with only the axis of the "
            "batch, or run under `jit`."
        )


def averaged_axes(
    mean_over: axes.AxisNames, local: frozenset[str], *, stage: str, option: str = "mean_over",
    partly: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """The bound device axes that an option `mean_over` names.

    Args:
        mean_over: None, the name of an axis, or several.
        local: the axes over which the loss differs between devices.
        stage: the name of the stage.
        option: the name of the option.
        partly: whether other axes may be averaged over by a later stage.

    Raises:
        ValueError: `mean_over` names an axis that is not bound although others are, or does not
            mention an axis in `local`.
    """
    found = axes.bound(mean_over, where=f"`{stage}`")
    missing = sorted(local - set(found))
    if missing and mean_over is None:
        over = missing[0] if len(missing) == 1 else tuple(missing)
        form = f"{stage}({{!r}})" if stage == "pmean_updates" else f"{option}={{!r}}"
        raise ValueError(
            f"`{stage}` runs under the device axis {missing[0]!r}, where each device has its own "
            "part of the batch, and no axis to average over was given. Write "
            f"`{form.format(over)}` to average, or `{form.format(())}` if each device is meant to "
            "keep its own result."
        )
    # Without types, `local` contains all bound axes, even one that only shards the model.
    if missing and found and axes.tracked() and not partly:
        raise ValueError(
            f"`{stage}` averages only over {mean_over!r}, and the loss varies over "
            f"{sorted(local)}. Name all of them: `{option}={tuple(sorted(local))}`."
        )
    return found
