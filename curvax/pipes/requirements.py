"""What a stage needs from earlier stages, or an error that shows where to put them."""

from typing import Any

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.linear_operator import Product, as_product


def needed_diagonal(diagonal: Tree, stage: str, needs: str) -> Tree:
    """The diagonal of a signal.

    Raises:
        ValueError: no earlier stage set one.
    """
    if diagonal is None:
        raise ValueError(
            f"`{stage}` {needs}, and no earlier stage gave one. Put an estimator before it, as in "
            f"`hutchinson_diag() | {stage}(...)`; between stages write `|` or `curvax.pipe`, since "
            "`optax.chain` passes on the updates only."
        )
    return diagonal


def needed_matvec(matvec: Matvec | None, factors: Any, stage: str, needs: str) -> Product:
    """The curvature product of a signal; that of its Kronecker factors if it has no other.

    Raises:
        ValueError: no earlier stage set one.
    """
    if matvec is None:
        matvec = factors
    if matvec is None:
        raise ValueError(
            f"`{stage}` {needs}, and no earlier stage gave one. Put one before it, as in "
            f"`fisher_matvec() | {stage}(...)`; between stages write `|` or `curvax.pipe`, since "
            "`optax.chain` passes on the updates only."
        )
    return as_product(matvec)
