"""The coarsest floating-point precision in the trace of a function, for finite differences."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import Function, bodies

Vars = set[Any]

REDUCED = {"BF16_BF16_F32": 2.0**-7, "TF32_TF32_F32": 2.0**-10, "F16_F16": 2.0**-10}
"""ε of the operands of a matrix product, by the prefix of its algorithm's name."""

DEFAULT = {"tpu": 2.0**-7, "gpu": 2.0**-10}
"""ε of matrix products in float32 at default precision: bfloat16 on TPUs, TF32 on GPUs."""


def rounding(f: Function, params: Tree) -> float:
    """ε of the coarsest floats on the way from the parameters to f(params). Traces f once."""
    program = jax.make_jaxpr(f)(params).jaxpr
    own = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params) if trees.is_float(x)]
    steps = _roundings(program, set(program.invars), set(program.outvars))
    return max([*own, *steps], default=float(jnp.finfo(jnp.float32).eps))


def _roundings(jaxpr: Any, depends: Vars, wanted: Vars) -> Iterator[float]:
    """ε of every value that depends on variables in `depends` and that `wanted` ones depend on."""
    depends, needed = _dependents(jaxpr, depends), _needed(jaxpr, wanted)
    for eqn in jaxpr.eqns:
        unwanted = eqn.outvars and not needed & set(eqn.outvars)
        if unwanted or not depends & _variables(eqn.invars):
            continue
        yield from _of_equation(eqn, depends & needed)
        for body in bodies(eqn):
            yield from _roundings(body, *_within(eqn, body, depends, needed))


def _dependents(jaxpr: Any, roots: Vars) -> Vars:
    depends = set(roots)
    for eqn in jaxpr.eqns:
        if depends & _variables(eqn.invars):
            depends |= _reached(eqn, depends)
    return depends


def _reached(eqn: Any, depends: Vars) -> Vars:
    """The outputs of an equation that depend on variables in `depends`."""
    inner = bodies(eqn)
    if not inner or not all(_same_results(eqn, body) for body in inner):
        return set(eqn.outvars)
    found: Vars = set()
    for body in inner:
        inside, _ = _within(eqn, body, depends, set(eqn.outvars))
        reached = _dependents(body, inside)
        pairs = zip(body.outvars, eqn.outvars)
        found |= {outer for own, outer in pairs if _variables([own]) & reached}
    return found


def _same_results(eqn: Any, body: Any) -> bool:
    alike = eqn.primitive.name != "while" and len(body.outvars) > 0
    return alike and len(body.outvars) == len(eqn.outvars)


def _needed(jaxpr: Any, wanted: Vars) -> Vars:
    needed = set(wanted)
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= _variables(eqn.invars)
    return needed


def _within(eqn: Any, body: Any, depends: Vars, needed: Vars) -> tuple[Vars, Vars]:
    """(depends, needed) in the body of an equation; all variables if they cannot be matched."""
    inside, wanted = set(body.invars), _variables(body.outvars)
    if not body.outvars:  # a kernel, whose outputs are references that it writes to
        wanted = {var for inner in body.eqns for var in inner.outvars}
    if eqn.primitive.name != "while" and len(body.invars) <= len(eqn.invars):
        pairs = zip(reversed(body.invars), reversed(eqn.invars))
        inside = {own for own, outer in pairs if _variables([outer]) & depends}
    if _same_results(eqn, body):
        pairs = zip(body.outvars, eqn.outvars)
        wanted = _variables(own for own, outer in pairs if outer in needed)
    return (
        _fed_back(eqn, body, inside, wanted) if eqn.primitive.name == "scan" else (inside, wanted)
    )


def _fed_back(eqn: Any, body: Any, inside: Vars, wanted: Vars) -> tuple[Vars, Vars]:
    """(depends, needed) in the body of a scan, closed under its carries."""
    longer = lambda outer, inner: outer.aval.ndim > inner.aval.ndim
    sequences = sum(map(longer, eqn.invars, body.invars))
    carried = len(body.outvars) - sum(map(longer, eqn.outvars, body.outvars))
    first = len(body.invars) - sequences - carried
    carries = list(zip(body.invars[first:], body.outvars[:carried]))
    for _ in range(carried):
        reached, asked = _dependents(body, inside), _needed(body, wanted)
        inside = inside | {start for start, end in carries if _variables([end]) & reached}
        wanted = wanted | _variables(end for start, end in carries if start in asked)
    return inside, wanted


def _variables(found: Any) -> Vars:
    return {var for var in found if not isinstance(var, core.Literal)}


def _of_equation(eqn: Any, counted: Vars) -> Iterator[float]:
    for var in counted.intersection(eqn.outvars):
        dtype = getattr(var.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
            yield float(jnp.finfo(dtype).eps)
    if eqn.primitive.name == "reduce_precision":
        yield 2.0 ** -eqn.params["mantissa_bits"]
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        yield from _of_product(eqn)


def _of_product(eqn: Any) -> Iterator[float]:
    precision = eqn.params.get("precision")
    for one in precision if isinstance(precision, tuple) else (precision,):
        name = getattr(one, "name", "DEFAULT")
        if name == "DEFAULT" and eqn.invars[0].aval.dtype == jnp.float32:
            yield DEFAULT.get(jax.default_backend(), 0.0)
        if "_X" not in name:
            yield max((e for start, e in REDUCED.items() if name.startswith(start)), default=0.0)
