"""A function and a point ↦ its linear map and the transpose, from one set of residuals."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import axes, compat, trees
from curvax.objective import Objective
from curvax.products import Product
from curvax.trees import Tree

LossAndGradient = tuple[tuple[jax.Array, Any], Tree]
"""((L, aux), ∇L)"""


class Linearized(NamedTuple):
    """f at a point θ: its value, and its Jacobian J from one set of residuals."""

    value: Tree
    aux: Any
    push: Callable[[Tree], Tree]
    """v ↦ J v, where v is any tree with the structure of θ."""
    pull: Callable[[Tree], Tree]
    """c ↦ Jᵀ c."""


def linearized(f: Callable[[Tree], tuple[Tree, Any]], params: Tree, local: Any = ()) -> Linearized:
    """`f(params) -> (value, aux)` and its linear map at a point, traced once for both directions.

    Where a `custom_vjp` keeps forward mode out, J is the transpose of Jᵀ.

    Args:
        f: the function.
        params: the point, typed as varying over `local`.
        local: the device axes over which tangents vary.
    """
    value, jvp, aux = jax.linearize(f, params, has_aux=True)
    transposed = jax.linear_transpose(jvp, params)
    pull = lambda c: transposed(c)[0]
    if calls("custom_lin", jvp, params):
        # A linear map is its own derivative, wherever that is taken.
        _, back = jax.vjp(pull, jax.tree.map(jnp.zeros_like, value))
        jvp = lambda v: back(v)[0]
    return Linearized(value, aux, lambda v: jvp(tangent(v, params, local)), pull)


def localized(objective: Objective, params: Tree) -> tuple[Tree, frozenset[str]]:
    """The parameters typed as varying over the device axes of the batch, and those axes."""
    params = trees.arrays(params)
    local = objective.local_axes(params)
    return axes.vary(params, local), local


def tangent(v: Tree, params: Tree, local: Any) -> Tree:
    """v with the dtypes of the parameters, varying and laid out like them.

    Raises:
        ValueError: v has another structure.
    """
    found, wanted = str(jax.tree.structure(v)), str(jax.tree.structure(params))
    if found != wanted:
        raise ValueError(
            f"A curvature product takes a vector with the structure of the parameters, {wanted}, "
            f"and got {found}."
        )
    return axes.vary(trees.laid_out_like(v, params), local)


def at_precision(precision: Any, product: Product) -> Product:
    """The product with every application at a precision of matrix products."""

    def wrap(f: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
        def wrapped(x: Tree) -> Tree:
            with jax.default_matmul_precision(precision):
                return f(x)

        return wrapped

    root = product.root
    if root is not None:
        root = root._replace(forward=wrap(root.forward), transpose=wrap(root.transpose))
    return dataclasses.replace(product, curvature=wrap(product.curvature), root=root)


def calls(primitive: str, f: Callable[[Tree], Any], params: Tree) -> bool:
    """Whether the traced f has a primitive of that name, or one that starts so.

    What forward mode meets in a `custom_vjp`, `custom_lin`, JAX refuses only when it compiles.
    """
    return any(name.startswith(primitive) for name in _primitives(jax.make_jaxpr(f)(params).jaxpr))


def _primitives(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for body in compat.bodies(eqn.params):
            yield from _primitives(body)
