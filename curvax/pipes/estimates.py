"""The curvature that stages smooth and keep: a diagonal, or the arrays of Kronecker factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.pipes import requirements
from curvax.pipes.signal import Signal


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
