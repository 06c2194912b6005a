"""A program evaluated with its sites tapped: activations out, perturbations of the results in.

The derivative in a perturbation at zero is the cotangent of the result, so that one backward pass
gives those of all sites.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from curvax import compat
from curvax.curvature.kronecker.sites import Site
from curvax.curvature.kronecker.values import Place
from curvax.curvature.kronecker.walk import inlined

Sites = dict[int, Site]
"""Sites by number."""
Arrays = dict[int, jax.Array]
"""An array for each of some sites, stacked along the scans between here and there."""


def run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], sites: Sites, shifts: Arrays,
    place: Place = (),
) -> tuple[list[Any], Arrays]:  # fmt: skip
    """The results of a program, and the activations at its sites.

    Args:
        jaxpr: a plain jaxpr.
        consts: the values of its constants.
        args: the values of its arguments.
        sites: the sites in it.
        shifts: what is added to the result of each site, or to the parameter if it is repeated.
        place: where the program is called.
    """
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    seen: Arrays = {}
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*place, number)
        own = {k: site for k, site in sites.items() if site.place[: len(here)] == here}
        values = [read(x) for x in eqn.invars]
        outs, inner = _equation(eqn, values, own, {k: shifts[k] for k in own if k in shifts}, here)
        seen |= inner
        env.update(zip(eqn.outvars, outs))
    return [read(x) for x in jaxpr.outvars], seen


def _equation(
    eqn: Any, values: list[Any], sites: Sites, shifts: Arrays, here: Place
) -> tuple[list[Any], Arrays]:
    if not sites:
        return compat.bind(eqn, values), {}
    if eqn.primitive.name == "scan":
        return _scan(eqn, values, sites, shifts, here)
    if (body := inlined(eqn)) is not None:
        inside = lambda values, shifts: run(body.jaxpr, body.consts, values, sites, shifts, here)
        if "prevent_cse" in eqn.params:
            options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
            inside = jax.checkpoint(inside, **options)
        return inside(values, shifts)
    return _site(eqn, values, sites, shifts)


def _site(eqn: Any, values: list[Any], sites: Sites, shifts: Arrays) -> tuple[list[Any], Arrays]:
    seen: Arrays = {}
    shifted = []
    for number, site in sites.items():
        if site.kind == "repeated":
            values[site.operand] = values[site.operand] + shifts[number]
            continue
        seen[number] = jnp.asarray(values[1 - site.operand])
        if site.kind != "factor":
            shifted.append(shifts[number])
    outs = compat.bind(eqn, values)
    return [out + shift for out, shift in zip(outs, shifted)] or outs, seen


def _scan(
    eqn: Any, values: list[Any], sites: Sites, shifts: Arrays, here: Place
) -> tuple[list[Any], Arrays]:
    closed, (fixed, carried) = compat.closed(eqn.params["jaxpr"]), compat.scan_arguments(eqn)
    consts, rest = values[:fixed], values[fixed:]

    def step(carry: list[Any], xs: Any) -> Any:
        xs, shifts = xs
        args = [*consts, *carry, *xs]
        outs, seen = run(closed.jaxpr, closed.consts, args, sites, shifts, here)
        return outs[:carried], (outs[carried:], seen)

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll") if k in eqn.params}
    start, xs = rest[:carried], (rest[carried:], shifts)
    carry, (ys, seen) = lax.scan(step, start, xs, **options)
    return [*carry, *ys], seen
