"""The name of a curvature matrix, a loss and a point ↦ the product v ↦ C v for `curvax.linalg`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.curvature import empirical_fvp, fvp, ggnvp, hvp
from curvax.curvature.differentiability import check_mode
from curvax.devices.axes import AxisNames
from curvax.linear_operator import as_product
from curvax.objective import Objective

Oracle = Callable[..., Matvec]
CurvatureLike = str | Oracle
"""The name of a matrix, or a callable `(objective, params) -> product` such as
`functools.partial(hvp, mode="reverse-over-reverse")`. Each new callable compiles anew."""

MATRICES: dict[str, Oracle] = {
    "hessian": hvp,
    "gauss_newton": ggnvp,
    "fisher": fvp,
    "empirical_fisher": empirical_fvp,
}


class Matrix(NamedTuple):
    """A kind of curvature matrix, whose products follow from a loss and a point."""

    oracle: Oracle
    mean_over: AxisNames
    where: str
    """The public function, for error messages."""
    mode: str | None = None
    """Of the products of a named matrix; None for a callable, which has its own."""

    def product(self, objective: Objective, params: Tree) -> Matvec:
        """v ↦ C v of the local batch, before the mean over devices."""
        return self.oracle(objective, params, **({} if self.mode is None else {"mode": self.mode}))

    def at(self, objective: Objective | DatasetLoss, params: Tree) -> Matvec:
        """v ↦ C v in float32 or wider for any dtype of the parameters, averaged over devices.

        Raises:
            TypeError: a parameter is not a real floating array.
            ValueError: `mean_over` does not settle every device axis of the batch.
        """
        refuse_integers(params, self.where)
        if isinstance(objective, DatasetLoss):
            return lambda v: objective.mean(_applied, params, v, of=self)
        local = objective.local_axes(params)
        over = checks.averaged_axes(self.mean_over, local, stage=self.where)
        product = as_product(self.product(objective, params))
        averaged = product.averaged(over, objective.batch_weight())
        return lambda v: trees.wide(averaged(v))


def matrix(
    curvature: CurvatureLike, mean_over: AxisNames, where: str, mode: str = "auto"
) -> Matrix:
    """Checks `curvature` and `mode` and returns the matrix that they name.

    Raises:
        ValueError: an unknown name or mode, or a mode together with a callable.
    """
    check_mode(mode)
    if callable(curvature):
        if mode != "auto":
            raise ValueError(
                f"`{where}(mode={mode!r})` applies to a curvature by name, and `curvature` is a "
                f"callable. Set the mode there: `functools.partial(hvp, mode={mode!r})`."
            )
        return Matrix(curvature, mean_over, where)
    if curvature not in MATRICES:
        raise ValueError(
            f"`{where}` takes `curvature` as one of {', '.join(map(repr, MATRICES))}, or as a "
            f"callable `(objective, params) -> product`, and got {curvature!r}."
        )
    return Matrix(MATRICES[curvature], mean_over, where, mode)


def refuse_integers(params: Tree, where: str) -> None:
    """Refuses parameters that cannot be differentiated.

    Raises:
        TypeError: a leaf is not a real floating array.
    """
    checks.refuse_complex(params, where)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not trees.is_float(leaf):
            raise TypeError(
                f"`{where}` differentiates with respect to every parameter, and the leaf "
                f"`{trees.label(trees.names(path))}` has dtype {jnp.result_type(leaf)}. Take "
                "counters and tables out of the parameters; `objective.through(f)`, where `f` "
                "inserts them again, is the loss as a function of the remaining leaves."
            )


def _applied(objective: Objective, params: Tree, v: Tree, *, of: Matrix) -> Tree:
    return of.product(objective, params)(v)
