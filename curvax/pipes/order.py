"""Errors for orders of stages in which a change of the gradient would be lost silently."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.objective import Objective

if TYPE_CHECKING:
    from curvax.pipes.signal import Signal

PASSING = ("identity", "snapshot", "monitor")
"""Optax's transformations that leave the updates unchanged."""


def refuse_part_before(part: str, stage: str) -> None:
    """Refuses a plain part before a stage that replaces the updates by a gradient of its own.

    Raises:
        ValueError: the part changes the updates.
    """
    if part not in PASSING:
        raise ValueError(
            f"`{stage}` replaces the updates by a gradient of its own, so that the change by "
            f"`{part}` would be lost. Put `{part}` behind: `{stage}(...) | {part}(...) | "
            f"base`, or in the base of a method, `curvax.sam(optax.chain({part}(...), base))`. "
            f"{_CURES}"
        )


def refuse_accumulation_before(part: Any, name: str, stage: str) -> None:
    """Refuses to accumulate gradients before a stage that evaluates the loss of one mini-batch.

    Raises:
        ValueError: the part is `optax.MultiSteps` over more than one batch, or `apply_every`.
    """
    steps = multi_steps_of(part)
    if name == "apply_every" or (steps and not _is_of_one(steps)):
        raise ValueError(
            f"`{name}` before `{stage}` passes it the gradients of k mini-batches, while `{stage}` "
            "evaluates the loss of the last one alone. Accumulate in the loss: "
            "`curvax.Objective(loss, batch, microbatch=n)` computes loss, gradient and curvature "
            "of the whole batch in the memory of n examples; or accumulate behind the stages: "
            f"`{stage}(...) | ... | optax.MultiSteps(base, k)`."
        )


def local_axes_of_gradient(
    signal: Signal, objective: Objective, params: Tree, stage: str
) -> frozenset[str]:
    """The local axes of the loss, before a stage that replaces the updates by another gradient.

    Raises:
        ValueError: the updates are not this device's gradient of the whole parameters.
    """
    local = objective.local_axes(params)
    checks.refuse_split(params, objective, stage=stage)
    refuse_changed_in_pipe(signal.updates, signal.gradient, stage)
    checks.refuse_summed(signal.updates, local - signal.averaged, stage=stage)
    return local


def refuse_changed_in_pipe(updates: Tree, gradient: Tree, stage: str) -> None:
    """Refuses updates that earlier parts of a pipe changed, before a stage that replaces them.

    Raises:
        ValueError: the updates are not the gradient.
    """
    if gradient is not None and not trees.same_leaves(updates, gradient):
        raise ValueError(
            f"`{stage}` replaces the updates by a gradient of its own, and an earlier part of the "
            f"pipe has changed them: that change would be lost. Put that part behind: "
            f"`{stage}(...) | optax.clip_by_global_norm(1.0) | base`. {_CURES}"
        )


def refuse_changed_gradient(objective: Objective, params: Tree, updates: Tree, stage: str) -> None:
    """Refuses updates that are not the gradient that the objective returned for these parameters.

    Raises:
        ValueError: the objective returned a gradient for them, and the updates are another one.
    """
    if objective.has_gradient_at(params) and objective.cached_gradient(params, updates) is None:
        raise ValueError(
            f"`{stage}` replaces the updates by the gradient at the perturbed parameters, and the "
            "updates that reached it are not the gradient that the objective returned for these "
            "parameters: a change in between, such as clipping, weight decay, a mask, or a mean "
            "over devices or batches, would be lost. Pass the gradient that "
            f"`objective.value_and_grad(params)` returned, and put the change behind: "
            f"`{stage}(...) | optax.clip_by_global_norm(1.0) | base`, or `curvax.sam(optax.chain("
            f"clip, base))`. {_CURES} "
            "A mean over devices is `mean_over=` (or `pmean_updates(axis)`) behind the stage; "
            "`sync_over=` averages the ascent gradient too. A scaled loss is `Objective(scale=)`."
        )


_CURES = (
    "Frozen weights are `sam_perturb(mask=)` before an `optax.freeze` behind the stage, or "
    '`curvax.partition({"train": stages, "freeze": optax.set_to_zero()}, labels)`; gradients are '
    "accumulated by `optax.MultiSteps(base, k)` behind the stage or by `Objective(microbatch=)`."
)


def refuse_multi_steps_around(stage: str, *, replaces_gradient: bool) -> None:
    """Refuses `optax.MultiSteps` around a stage that evaluates the loss, when it initialises the
    stage.

    Raises:
        ValueError: the call comes from a `MultiSteps` over more than one batch.
    """
    if not _inside_multi_steps():
        return
    behind = (
        f"Put it behind, `{stage}(...) | optax.MultiSteps(base, k)` or "
        "`curvax.sam(optax.MultiSteps(base, k))`, for the mean of the mini-batches' gradients at "
        "their own perturbed points; or a"
        if replaces_gradient
        else "A"
    )
    raise ValueError(
        f"`optax.MultiSteps` around `{stage}` passes it the mean gradient of k mini-batches and "
        f"the loss of the last one alone, so that the step would be that of the last mini-batch. "
        f"{behind}ccumulate in the loss: `curvax.Objective(loss, batch, microbatch=n)` computes "
        "loss, gradients and curvature of the whole batch in the memory of n examples."
    )


def _inside_multi_steps() -> bool:
    """Whether this call comes from `MultiSteps.init`."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        begins = frame.f_code is optax.MultiSteps.init.__code__
        if begins and not _is_of_one(frame.f_locals["self"]):
            return True
    return False


def _is_of_one(steps: optax.MultiSteps) -> bool:
    """Whether every mini-step is a step: `MultiSteps(tx, 1)` with an int, not a schedule."""
    k: Any = getattr(steps, "_every_k_schedule", None)
    constant = getattr(k, "__qualname__", "").startswith("MultiSteps.__init__")
    return constant and k(0) == 1


def refuse_unaveraged(local: frozenset[str], pipe: str) -> None:
    """Refuses to return updates that are local to each device.

    Raises:
        ValueError: they are.
    """
    if local:
        axis = sorted(local)[0]
        over = repr(axis) if len(local) == 1 else repr(tuple(sorted(local)))
        raise ValueError(
            f"`{pipe}` ends with each device's own updates, and the parameters of the devices "
            f"along {axis!r} would diverge. Average them in the pipe, as in `sam_perturb(...) "
            f"| pmean_updates({over}) | optax.adam(1e-3)`, or by `mean_over={over}` of a method. "
            "Write `pmean_updates(())` as the last stage if local updates are intended, or are "
            "averaged later; between stages write `|` or `curvax.pipe`, since `optax.chain` passes "
            "on the updates only."
        )


def multi_steps_of(part: Any) -> Any:
    """The `optax.MultiSteps` of a part, or None.

    Both the object and the result of its `gradient_transformation()` are recognised.
    """
    owner = getattr(getattr(part, "update", None), "__self__", None)
    return owner if isinstance(owner, optax.MultiSteps) else None
