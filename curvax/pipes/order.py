"""Refusals of compositions in whose order something would be lost without a word."""

import sys
from typing import Any

import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree

PASSING = ("identity", "snapshot", "monitor")
"""Optax's parts that leave the updates as they are."""


def refuse_part_before(part: str, stage: str) -> None:
    """Refuses a plain part before a stage that replaces the updates by a gradient of its own.

    Raises:
        ValueError: `part` is one that changes the updates.
    """
    if part not in PASSING:
        raise ValueError(
            f"`{stage}` replaces the updates by a gradient of its own, so that what `{part}` did "
            f"to them before would be lost. Put `{part}` behind: `{stage}(...) | {part}(...) | "
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
            f"`{name}` before `{stage}` hands it the gradients of k mini-batches, while `{stage}` "
            "evaluates the loss of the last one alone. Accumulate in the loss: "
            "`curvax.Objective(loss, batch, microbatch=n)` takes loss, gradient and curvature of "
            "the whole batch in the memory of n examples; or accumulate what the stages make of "
            f"each mini-batch, `{stage}(...) | ... | optax.MultiSteps(base, k)`."
        )


def refuse_changed_in_pipe(updates: Tree, gradient: Tree, stage: str) -> None:
    """Refuses updates that earlier parts of a pipe made of the clean gradient.

    Raises:
        ValueError: they are not the gradient.
    """
    if gradient is not None and not trees.same_leaves(updates, gradient):
        raise ValueError(
            f"`{stage}` replaces the updates by a gradient of its own, and an earlier part of the "
            f"pipe has changed them: that would be lost. Put what changes the updates behind: "
            f"`{stage}(...) | optax.clip_by_global_norm(1.0) | base`. {_CURES}"
        )


def refuse_changed_gradient(objective: Any, params: Tree, updates: Tree, stage: str) -> None:
    """Refuses updates in the place of the gradient that the objective gave at these parameters.

    Raises:
        ValueError: the objective gave a gradient there, and the updates are not that gradient.
    """
    if objective.has_gradient_at(params) and objective.cached_gradient(params, updates) is None:
        raise ValueError(
            f"`{stage}` takes a gradient of its own at the perturbed parameters, and the updates "
            "that reached it are not the gradient that the objective returned for these "
            "parameters: what was done to it in between, such as clipping, weight decay, a mask, "
            "a mean over devices or over batches, would be lost. Hand over the gradient "
            f"as `objective.value_and_grad(params)` returned it, and put the rest behind: "
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
    """Refuses `optax.MultiSteps` around a stage that evaluates the loss, while it initialises it.

    Raises:
        ValueError: the call comes from one that accumulates over more than one batch.
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
        f"`optax.MultiSteps` around `{stage}` hands it the mean gradient of k mini-batches and "
        f"the loss of the last one alone, so that the step would be that of the last mini-batch. "
        f"{behind}ccumulate in the loss: `curvax.Objective(loss, batch, microbatch=n)` takes loss, "
        "gradient, perturbed gradient and curvature of the whole batch in the memory of n examples."
    )


def _inside_multi_steps() -> bool:
    """Whether a call of `MultiSteps.init` is below this one on the stack."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        begins = frame.f_code is optax.MultiSteps.init.__code__
        if begins and not _is_of_one(frame.f_locals["self"]):
            return True
    return False


def _is_of_one(steps: optax.MultiSteps) -> bool:
    """Whether every mini-step is a step: `MultiSteps(tx, 1)`, of an int and no schedule."""
    k: Any = getattr(steps, "_every_k_schedule", None)
    constant = getattr(k, "__qualname__", "").startswith("MultiSteps.__init__")
    return constant and k(0) == 1


def refuse_unaveraged(local: frozenset[str], pipe: str) -> None:
    """Refuses to hand out updates that are one device's own.

    Raises:
        ValueError: they are.
    """
    if local:
        axis = sorted(local)[0]
        over = repr(axis) if len(local) == 1 else repr(tuple(sorted(local)))
        raise ValueError(
            f"`{pipe}` ends with updates of each device's own, and the parameters of the devices "
            f"along {axis!r} would drift apart. Average them in the pipe, as in `sam_perturb(...) "
            f"| pmean_updates({over}) | optax.adam(1e-3)`, or by `mean_over={over}` of a method. "
            "Write `pmean_updates(())` as the last stage if each device is meant to go its own "
            "way, or averages on its own later; between stages write `|` or `curvax.pipe`, since "
            "`optax.chain` hands on nothing but the updates."
        )


def multi_steps_of(part: Any) -> Any:
    """The `optax.MultiSteps` behind a part, or None.

    Either the object itself or what its `gradient_transformation()` returns.
    """
    owner = getattr(getattr(part, "update", None), "__self__", None)
    return owner if isinstance(owner, optax.MultiSteps) else None
