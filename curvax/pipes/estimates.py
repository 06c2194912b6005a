"""The curvature that stages smooth and keep: a diagonal, or the arrays of Kronecker factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.pipes import requirements
from curvax.pipes.parts import name_of, parts_of
from curvax.pipes.signal import Signal, Stage, pipe, step


class Estimate(NamedTuple):
    """What a stage smooths or keeps."""

    tree: Tree
    """A diagonal, shaped like the parameters; or a tuple of the arrays of factors."""
    fine: Tree
    """Where it is finite: of a diagonal each entry, of factors each array, since a factor in parts
    is none."""
    structure: Any = None
    """Of the factors, as a pytree; None for a diagonal."""

    def into(self, signal: Signal, tree: Tree) -> Signal:
        """The signal with `tree` in place of this estimate.

        Entries of a diagonal that are not finite are NaN, so that `optax.apply_if_finite` sees
        them. Factors of a step that are not finite are left out: earlier ones serve.
        """
        if self.structure is None:
            shown = lambda fine, x: jnp.where(fine, x, jnp.nan)
            return signal._replace(diagonal=jax.tree.map(shown, self.fine, tree))
        return signal._replace(factors=jax.tree.unflatten(self.structure, tree))


def needed(signal: Signal, kept: Tree, stage: str, needs: str) -> Estimate:
    """The diagonal of a signal, or its Kronecker factors if it has no diagonal.

    Args:
        signal: the signal.
        kept: what the stage has kept, which the estimate is compared with.
        stage: the stage, for the message.
        needs: what it does with a diagonal, for the message.

    Raises:
        ValueError: no earlier stage set either, or the factors are not those of `kept`.
    """
    if signal.diagonal is not None or signal.factors is None:
        diagonal = requirements.needed_diagonal(signal.diagonal, stage, needs)
        return Estimate(diagonal, jax.tree.map(jnp.isfinite, diagonal))
    if not hasattr(signal.factors, "finite"):
        raise ValueError(
            f"`{stage}` smooths or keeps estimates of factors, and behind `in_eigenbasis` they are "
            f"eigenvectors. Put it before, or inside for the eigenvalues, `in_eigenbasis(... | "
            f"{stage}(...))`; `in_eigenbasis` has an `every=` of its own."
        )
    arrays, treedef = jax.tree.flatten(signal.factors)
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    if shapes(arrays) != shapes(kept):
        raise ValueError(
            f"`{stage}` keeps Kronecker factors from step to step, and its state was made for "
            f"{shapes(kept)}, not for the factors {shapes(arrays)} of this model. Their shapes "
            "follow from the model: give the stage that makes them an objective with the shapes of "
            f"training, `fisher_kronecker(like=objective)`, in the same pipe as `{stage}`."
        )
    return Estimate(tuple(arrays), tuple(jax.tree.leaves(signal.factors.finite())), treedef)


def estimating(stages: optax.GradientTransformation, around: str) -> Stage:
    """Stages that set and smooth an estimate, as a pipe.

    Args:
        stages: the stages.
        around: the call that they stand in, such as `every(k, ...)`, for the message.

    Raises:
        ValueError: a part is a plain Optax transformation, which changes the updates.
    """
    inner = pipe(stages)
    for part in parts_of(inner):
        if not isinstance(part, Stage):
            _refuse_change(name_of(part), around)
    return inner


def estimated(
    inner: Stage, signal: Signal, state: optax.OptState, params: Tree, around: str, **extra: Any
) -> tuple[Signal, optax.OptState]:
    """The signal behind stages that estimate.

    Raises:
        ValueError: a part changes the updates.
    """
    before, after = signal.updates, []
    for part, own in zip(parts_of(inner), state, strict=True):
        signal, new = step(part, signal, own, params, **extra)
        if not trees.same_leaves(signal.updates, before):
            _refuse_change(name_of(part), around)
        after.append(new)
    return signal, tuple(after)


def _refuse_change(name: str, around: str) -> None:
    own = "; `sam_perturb` has an `every=` of its own" if name == "sam_perturb" else ""
    raise ValueError(
        f"`{around}` takes stages that estimate a diagonal, and `{name}` inside it changes the "
        f"updates. Put it behind, `{around} | {name}(...)`{own}."
    )
