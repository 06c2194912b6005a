"""Tests, by tracing alone, whether JAX can compute given derivatives of a function."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from curvax import compat
from curvax.arithmetic.trees import Tree

Function = Callable[[Tree], Tree]

MODES = ("auto", "forward-over-reverse", "reverse-over-reverse", "finite-differences")

OPAQUE = (
    "custom_vjp", "custom_partitioning", "pallas_call", "pure_callback", "io_callback", "ffi_call",
    "while",
)  # fmt: skip
"""Prefixes of the names of primitives that JAX may differentiate once but not twice."""

NO_FORWARD = "can't apply forward-mode autodiff (jvp) to a custom_vjp function."
"""JAX's error for the primitive `custom_lin`, which it raises only at compilation."""


def check_mode(mode: str) -> None:
    """Checks the name of a mode of differentiation.

    Raises:
        ValueError: it is not in `MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` is one of {MODES}, and is {mode!r}.")


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, nested programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def bodies(eqn: Any) -> list[Any]:
    """The programs that an equation calls."""
    return compat.bodies(eqn.params)


def is_opaque(f: Function, params: Tree) -> bool:
    """Whether a function contains primitives with custom or missing derivatives."""
    return any(
        eqn.primitive.name.startswith(OPAQUE) for eqn in equations(jax.make_jaxpr(f)(params).jaxpr)
    )


def replayed(f: Function, params: Tree) -> Function:
    """f replaced by its trace at such parameters, for trials of its derivatives.

    The caller's code runs once, here, so that its own errors surface; errors raised in a trial are
    then JAX's.
    """
    program, shape = jax.make_jaxpr(f, return_shape=True)(params)
    run, treedef = core.jaxpr_as_fun(program), jax.tree.structure(shape)
    return lambda p: jax.tree.unflatten(treedef, run(*jax.tree.leaves(p)))


def refusal(derivative: Function, params: Tree) -> str:
    """JAX's error when it traces and lowers a derivative, or "" if it succeeds.

    Nothing is computed. Kernels are lowered one by one, since JAX raises some of their errors only
    at lowering.
    """
    try:
        kernels = {}
        for eqn in equations(jax.make_jaxpr(derivative)(params).jaxpr):
            if blocks_forward(eqn):
                return NO_FORWARD
            if eqn.primitive.name == "pallas_call":
                kernels[str(eqn.params.get("jaxpr")), _kinds(eqn)] = eqn
        for eqn in kernels.values():
            _lower(eqn)
    except Exception as error:  # JAX raises many types here, assertions included
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return ""


def blocks_forward(eqn: Any) -> bool:
    """Whether an equation is the `custom_vjp` that forward mode leaves, which none can compile.

    `custom_linear_solve`, of `jnp.linalg.solve` and implicit layers, only has a name like it.
    """
    return eqn.primitive.name == "custom_lin"


def _kinds(eqn: Any) -> tuple[Any, ...]:
    return tuple((var.aval.shape, var.aval.dtype) for var in eqn.invars)


def _lower(eqn: Any) -> None:
    apply = lambda *xs: eqn.primitive.bind(*xs, **eqn.params)
    jax.jit(apply).lower(*(jax.ShapeDtypeStruct(*kind) for kind in _kinds(eqn)))


def warn_of_differences(what: str, why: str) -> None:
    """Warns that finite differences replace a derivative, and why."""
    warnings.warn(
        f"JAX cannot differentiate {what} ({why}), so that finite differences replace its "
        "derivative: two passes a product, and a relative error of about ε^⅔ for floats of "
        'precision ε. Pass `mode="finite-differences"` to silence this warning.',
        stacklevel=2,
    )


def refuse_mode(mode: str, what: str, why: str) -> TypeError:
    """The error of an explicit mode that JAX does not support for this function."""
    return TypeError(
        f"`mode={mode!r}` differentiates {what}, and JAX cannot: {why} Write "
        '`mode="auto"`, which takes the first mode that JAX supports, or '
        '`mode="finite-differences"`, which needs no further derivative.'
    )
