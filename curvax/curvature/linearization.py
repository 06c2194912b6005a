"""Linearisation of a function at a point: v ↦ J v and c ↦ Jᵀ c from one set of residuals."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.curvature.differentiability import (
    NO_FORWARD,
    Function,
    blocks_forward,
    equations,
    refusal,
    refuse_mode,
    warn_of_differences,
)
from curvax.curvature.finite_differences import differences
from curvax.devices import axes
from curvax.linear_operator import Product
from curvax.objective import Objective


class Linearized(NamedTuple):
    """The value of a function f at θ, and products with its Jacobian J."""

    value: Tree
    aux: Any
    push: Matvec
    """v ↦ J v for any tree v with the structure of θ."""
    pull: Matvec
    """c ↦ Jᵀ c."""


def linearized(
    f: Callable[[Tree], tuple[Tree, Any]],
    params: Tree,
    local: Iterable[str] = (),
    *,
    mode: str = "auto",
) -> Linearized:
    """Linearises a function at a point; it is traced once for both directions.

    The mode of J v is resolved at the first product with J, since Jᵀ c needs only reverse mode.

    Args:
        f: `f(params) -> (value, aux)`.
        params: the point θ, typed as varying over `local`.
        local: the device axes over which tangents vary.
        mode: how J v is computed: `"forward-over-reverse"`, by forward mode;
            `"reverse-over-reverse"`, as the transpose of Jᵀ, for a `custom_vjp`;
            `"finite-differences"`, by differences of the value; `"auto"`, the first of these that
            JAX supports.
    """
    value, jvp, aux = jax.linearize(f, params, has_aux=True)
    refuse_complex_values(value)
    transposed = jax.linear_transpose(jvp, params)
    pull = lambda c: transposed(c)[0]
    pushes = {
        "forward-over-reverse": jvp,
        "reverse-over-reverse": lambda v: _transpose(pull, value, v),
        "finite-differences": lambda v: differences(lambda p: f(p)[0], params)(v),
    }
    found = functools.cache(lambda: _mode_of_push(mode, pushes, pull, value, params))
    push = lambda v: pushes[found()](tangent(v, params, local))
    return Linearized(value, aux, push, pull)


def refuse_complex_values(value: Tree) -> None:
    """Raises if a model has complex outputs.

    Raises:
        TypeError: an output is complex.
    """
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jax.tree.leaves(value)):
        raise TypeError(
            "Gauss-Newton, Fisher and tangent kernels are defined for real outputs, and the model "
            "returns complex ones. Return their real and imaginary parts, "
            "`jnp.stack([z.real, z.imag], axis=-1)`, and write the loss for these."
        )


def _transpose(pull: Function, value: Tree, v: Tree) -> Tree:
    # The derivative of the linear map c ↦ Jᵀ c is the map itself at any c. It is taken at a c
    # without zeros, since a map that divides by the norm of (a part of) c has no derivative at 0.
    return jax.vjp(pull, jax.tree.map(_generic, value))[1](v)[0]


def _mode_of_push(
    mode: str, pushes: dict[str, Function], pull: Function, value: Tree, params: Tree
) -> str:
    """The mode of J v: the given one, or for "auto" the first that JAX supports.

    Raises:
        TypeError: JAX does not support the given mode.
    """
    if mode == "finite-differences":
        return mode
    what, why = "the outputs of this model", NO_FORWARD
    forward = not _blocked(pushes["forward-over-reverse"], params)
    if forward and mode != "reverse-over-reverse":
        return "forward-over-reverse"
    if mode != "forward-over-reverse":
        jax.make_jaxpr(pull)(value)  # raises the errors of the caller's own `custom_vjp`
        why = refusal(pushes["reverse-over-reverse"], params)
        if not why:
            return "reverse-over-reverse"
    if mode != "auto":
        raise refuse_mode(mode, what, why)
    warn_of_differences(what, why)
    return "finite-differences"


def _blocked(jvp: Function, params: Tree) -> bool:
    """Whether forward mode meets a `custom_vjp`; JAX itself would raise only at compilation."""
    return any(map(blocks_forward, equations(jax.make_jaxpr(jvp)(params).jaxpr)))


def _generic(x: jax.Array) -> jax.Array:
    """An array of numbers between ½ and 1½ whose sums and differences are unlikely to vanish."""
    places = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
    numbers = 0.5 + (places * 0.6180339887) % 1.0
    return jnp.zeros_like(x) + trees.laid_out_like(numbers, x)


def localized(objective: Objective, params: Tree) -> tuple[Tree, frozenset[str]]:
    """(parameters typed as varying over the device axes of the loss, these axes)"""
    params = trees.arrays(params)
    checks.refuse_complex(params, "A product with curvature")
    local = objective.local_axes(params)
    return axes.vary(params, local), local


def tangent(v: Tree, params: Tree, local: Iterable[str]) -> Tree:
    """v with the dtypes and the sharding of the parameters, typed as varying over `local`.

    Raises:
        ValueError: v has another tree structure.
    """
    found, wanted = str(jax.tree.structure(v)), str(jax.tree.structure(params))
    if found != wanted:
        raise ValueError(
            f"A curvature product takes a vector with the structure of the parameters, {wanted}, "
            f"and received {found}. Build it from the parameters with `jax.tree.map`."
        )
    return axes.vary(trees.laid_out_like(v, params), local)


def at_precision(precision: str | None, product: Product) -> Product:
    """The same product, evaluated at a given precision of matrix products."""

    def wrap(f: Matvec) -> Matvec:
        def wrapped(x: Tree) -> Tree:
            with jax.default_matmul_precision(precision):
                return f(x)

        return wrapped

    root = product.root
    if root is not None:
        root = root._replace(forward=wrap(root.forward), transpose=wrap(root.transpose))
    return dataclasses.replace(product, curvature=wrap(product.curvature), root=root)


def at_unit_size(objective: Objective, f: Matvec) -> Matvec:
    """The linear map f, evaluated at v divided by a power of two near its largest entry.

    Only if the loss is scaled: a pass in half precision would flush small entries of v to zero, as
    it would those of the gradient. The result is multiplied by the same power of two.
    """
    if objective.scale is None:
        return f

    def sized(v: Tree) -> Tree:
        peaks = [jnp.max(jnp.abs(trees.widen(x)), initial=0.0) for x in jax.tree.leaves(v)]
        _, exponent = jnp.frexp(jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros(()))
        size = jnp.ldexp(jnp.ones(()), jnp.clip(exponent, -100, 100))
        return trees.scale(size, f(trees.scale(1 / size, v)))

    return sized


def unit_sized(objective: Objective, product: Product) -> Product:
    """The same product, and its root, evaluated as in `at_unit_size`."""
    sized, root = functools.partial(at_unit_size, objective), product.root
    if root is not None:
        forward, transpose = sized(root.forward), sized(root.transpose)
        root = root._replace(forward=forward, transpose=transpose)
    return dataclasses.replace(product, curvature=sized(product.curvature), root=root)
