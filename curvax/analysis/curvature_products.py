"""A loss, a point and the name of a matrix ↦ v ↦ C v for the algorithms of `curvax.linalg`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.dataset_loss import Sweep
from curvax.analysis.evaluation.compiling import compiled_once
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature import empirical_fvp, fvp, ggnvp, hvp
from curvax.curvature.differentiability import check_mode
from curvax.devices.axes import AxisNames
from curvax.linear_operator import as_product
from curvax.objective import Objective

Matvec = Callable[[Tree], Tree]
Oracle = Callable[..., Matvec]
Curvature = str | Oracle
"""The name of a matrix, or `(objective, params) -> product`, such as `functools.partial(hvp,
mode="reverse-over-reverse")`: the same object at each call compiles once."""
Loss = Objective | Sweep | Callable[[Tree], jax.Array]

MATRICES: dict[str, Oracle] = {
    "hessian": hvp,
    "gauss_newton": ggnvp,
    "fisher": fvp,
    "empirical_fisher": empirical_fvp,
}


class Matrix(NamedTuple):
    """A curvature matrix wherever there is a loss and a point."""

    oracle: Oracle
    mean_over: AxisNames
    where: str
    """What is called, for its errors."""
    mode: str | None = None
    """Of an oracle that goes by its name; one of the caller's brings its own."""

    def product(self, objective: Objective, params: Tree) -> Matvec:
        """v ↦ C v, local to the device."""
        return self.oracle(objective, params, **({} if self.mode is None else {"mode": self.mode}))

    def at(self, objective: Objective | Sweep, params: Tree) -> Matvec:
        """v ↦ C v on trees in float32 or wider, whatever the dtype of the parameters.

        Raises:
            TypeError: a parameter is no floating array.
            ValueError: device axes that `mean_over` leaves open.
        """
        refuse_integers(params, self.where)
        if isinstance(objective, Sweep):
            return lambda v: objective.mean(_applied, params, v, of=self)
        local = objective.local_axes(params)
        over = checks.averaged_axes(self.mean_over, local, stage=self.where)
        product = as_product(self.product(objective, params))
        averaged = product.averaged(over, objective.batch_weight())
        return lambda v: trees.wide(averaged(v))


def matrix(curvature: Curvature, mean_over: AxisNames, where: str, mode: str = "auto") -> Matrix:
    """The matrix of a name or an oracle, and the mode of its products.

    Raises:
        ValueError: no such matrix, no such mode, or a mode for an oracle of the caller's own.
    """
    check_mode(mode)
    if callable(curvature):
        if mode != "auto":
            raise ValueError(
                f"`{where}(mode={mode!r})` is the mode of a curvature that goes by its name, and "
                "`curvature` is a callable. Give the mode to that: `functools.partial(hvp, "
                f"mode={mode!r})`."
            )
        return Matrix(curvature, mean_over, where)
    if curvature not in MATRICES:
        raise ValueError(
            f"`{where}` takes `curvature` as one of {', '.join(map(repr, MATRICES))}, or as a "
            f"callable `(objective, params) -> product`, and got {curvature!r}."
        )
    return Matrix(MATRICES[curvature], mean_over, where, mode)


def evaluate(
    run: Callable[..., Tree], objective: Loss, params: Tree, *arrays: Tree, **options: object
) -> Tree:
    """`run(objective, params, *arrays, **options)`: compiled once, or a loop on the host.

    Args:
        run: a function of its module, the same at each call.
        objective: an `Objective`, a `Sweep`, or a callable of the parameters.
        params: the point.
        *arrays: arguments of the compiled program.
        **options: static.
    """
    if isinstance(objective, Sweep):
        with jax.disable_jit():
            return run(objective, params, *arrays, **options)
    if not isinstance(objective, Objective):
        objective = Objective(objective)
    return compiled_once(run)(objective, params, *arrays, **options)


def refuse_integers(params: Tree, where: str) -> None:
    """Refuses parameters that have no derivative.

    Raises:
        TypeError: a leaf is no real floating array.
    """
    checks.refuse_complex(params, where)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not trees.is_float(leaf):
            raise TypeError(
                f"`{where}` differentiates with respect to every parameter, and the leaf "
                f"`{trees.label(trees.names(path))}` has dtype {jnp.result_type(leaf)}. Keep "
                "counters and tables out of the parameters: `objective.through(f)`, where `f` "
                "puts them back, is a loss of the rest."
            )


def _applied(objective: Objective, params: Tree, v: Tree, *, of: Matrix) -> Tree:
    return of.product(objective, params)(v)
