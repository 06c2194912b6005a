"""A function and a point ↦ its linear map and the transpose, from one set of residuals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
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


def linearized(
    f: Callable[[Tree], tuple[Tree, Any]], params: Tree, local: Any = (), *, mode: str = "auto"
) -> Linearized:
    """`f(params) -> (value, aux)` and its linear map at a point, traced once for both directions.

    How J v is taken is found at the first push: Jᵀ c alone asks for nothing but reverse mode.

    Args:
        f: the function.
        params: the point, typed as varying over `local`.
        local: the device axes over which tangents vary.
        mode: `"forward-over-reverse"`, J by forward mode; `"reverse-over-reverse"`, J as the
            transpose of Jᵀ, where a `custom_vjp` keeps forward mode out;
            `"finite-differences"`, of the values; `"auto"`, the first that JAX allows.
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
    """Refuses outputs of a model that are complex.

    Raises:
        TypeError: they are.
    """
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jax.tree.leaves(value)):
        raise TypeError(
            "Gauss-Newton, Fisher and tangent kernels are those of real outputs, and the model "
            "returns complex ones. Return their real and imaginary parts, "
            "`jnp.stack([z.real, z.imag], axis=-1)`, and take a loss of these."
        )


def _transpose(pull: Function, value: Tree, v: Tree) -> Tree:
    # A linear map is its own derivative, wherever that is taken; one that divides by the length of
    # its argument, or of a part of it, has none at 0.
    return jax.vjp(pull, jax.tree.map(_generic, value))[1](v)[0]


def _mode_of_push(
    mode: str, pushes: dict[str, Function], pull: Function, value: Tree, params: Tree
) -> str:
    """The first mode of J v that is asked for and that JAX allows.

    Raises:
        TypeError: it allows none.
    """
    if mode == "finite-differences":
        return mode
    what, why = "the outputs of this model", NO_FORWARD
    forward = not _blocked(pushes["forward-over-reverse"], params)
    if forward and mode != "reverse-over-reverse":
        return "forward-over-reverse"
    if mode != "forward-over-reverse":
        jax.make_jaxpr(pull)(value)  # where a `custom_vjp` of the caller's has a fault of its own
        why = refusal(pushes["reverse-over-reverse"], params)
        if not why:
            return "reverse-over-reverse"
    if mode != "auto":
        raise refuse_mode(mode, what, why)
    warn_of_differences(what, why)
    return "finite-differences"


def _blocked(jvp: Function, params: Tree) -> bool:
    """Whether forward mode meets a `custom_vjp`, which JAX refuses only when it compiles."""
    return any(map(blocks_forward, equations(jax.make_jaxpr(jvp)(params).jaxpr)))


def _generic(x: jax.Array) -> jax.Array:
    """Numbers between ½ and 1½ of which no sum or difference is likely to vanish."""
    places = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
    numbers = 0.5 + (places * 0.6180339887) % 1.0
    return jnp.zeros_like(x) + trees.laid_out_like(numbers, x)


def localized(objective: Objective, params: Tree) -> tuple[Tree, frozenset[str]]:
    """The parameters typed as varying over the device axes of the batch, and those axes."""
    params = trees.arrays(params)
    checks.refuse_complex(params, "A product with curvature")
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


def at_unit_size(objective: Objective, f: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
    """The linear map f, applied to v over a power of two near its largest entry, where the loss is
    scaled: passes in half precision would lose what is small in v, as they would of the loss."""
    if objective.scale is None:
        return f

    def sized(v: Tree) -> Tree:
        peaks = [jnp.max(jnp.abs(trees.widen(x)), initial=0.0) for x in jax.tree.leaves(v)]
        _, exponent = jnp.frexp(jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros(()))
        size = jnp.ldexp(jnp.ones(()), jnp.clip(exponent, -100, 100))
        return trees.scale(size, f(trees.scale(1 / size, v)))

    return sized


def unit_sized(objective: Objective, product: Product) -> Product:
    """The product with every application `at_unit_size`."""
    sized, root = functools.partial(at_unit_size, objective), product.root
    if root is not None:
        forward, transpose = sized(root.forward), sized(root.transpose)
        root = root._replace(forward=forward, transpose=transpose)
    return dataclasses.replace(product, curvature=sized(product.curvature), root=root)
