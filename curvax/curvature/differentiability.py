"""A function and a point ↦ its traced program, and whether JAX can run its derivatives."""

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
"""How the names of those primitives start that JAX may differentiate once, but not twice."""

NO_FORWARD = "can't apply forward-mode autodiff (jvp) to a custom_vjp function."
"""What JAX says of `custom_lin`, but only when it compiles."""


def check_mode(mode: str) -> None:
    """Refuses what is no mode of differentiation.

    Raises:
        ValueError: it is none.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` is one of {MODES}, and was {mode!r}.")


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program and of all programs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def bodies(eqn: Any) -> list[Any]:
    """The programs within an equation."""
    return compat.bodies(eqn.params)


def is_opaque(f: Function, params: Tree) -> bool:
    """Whether a program has a part whose derivatives JAX takes from elsewhere, or may not have."""
    return any(
        eqn.primitive.name.startswith(OPAQUE) for eqn in equations(jax.make_jaxpr(f)(params).jaxpr)
    )


def replayed(f: Function, params: Tree) -> Function:
    """f as the program that it is at such parameters, for trials of its derivatives.

    The caller's code runs here, once, and what it raises comes through; what a trial raises
    afterwards is a refusal of JAX's.
    """
    program, shape = jax.make_jaxpr(f, return_shape=True)(params)
    run, treedef = core.jaxpr_as_fun(program), jax.tree.structure(shape)
    return lambda p: jax.tree.unflatten(treedef, run(*jax.tree.leaves(p)))


def refusal(derivative: Function, params: Tree) -> str:
    """Why JAX cannot run a derivative, empty if it can. Nothing is computed.

    Some refusals come with the trace, some only with the lowering: of `custom_lin`, and of the
    derivatives of kernels, which are lowered here each by itself.
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
    except Exception as error:  # of any type: JAX's own assertions are among them
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
    """Says that finite differences take the place of a derivative, and why."""
    warnings.warn(
        f"JAX does not differentiate {what} ({why}), so that finite differences take the place "
        "of its derivative: right to about the cube root of the precision squared, for two passes "
        'a product. `mode="finite-differences"` says that they are meant.',
        stacklevel=2,
    )


def refuse_mode(mode: str, what: str, why: str) -> TypeError:
    """The error of a mode that was asked for and that JAX refuses."""
    return TypeError(
        f"`mode={mode!r}` differentiates {what}, and JAX refuses: {why} Write "
        '`mode="auto"`, which takes the first mode that JAX allows, or '
        '`mode="finite-differences"`, which asks for no further derivative.'
    )
