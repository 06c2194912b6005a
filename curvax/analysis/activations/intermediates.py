"""A function and its arguments ↦ the values in the middle of it, by the names of their modules.

The function is traced and run equation by equation, into its calls, rematerialised parts and scans,
so that no model has to be told what to hand out. What a value is called goes by `jax.named_scope`,
under which Flax linen runs every module.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from curvax import compat
from curvax.analysis.activations.recognition import recognised

WRAPPED = re.compile(r"\w+\((.*)\)")
"""A scope under a transformation of JAX, `vmap(block)`."""

Name = tuple[str, ...]


class Seen(NamedTuple):
    """A value on its way through an activation or a softmax."""

    before: jax.Array
    after: jax.Array


def intermediates(f: Callable[..., Any], *args: Any) -> dict[Name, Seen]:
    """What goes into and comes out of every activation and softmax of `f(*args)`.

    Returns:
        `{(scope, …, kind): Seen}`, where the kind is `relu`, `gelu`, …, `softmax`; of equal names
        the second ends in `_1`. What a scan stacks is told apart by a number at its outermost
        scope: `block_0`, `block_1`, as if it were unrolled. Bodies of `while` and `cond` are not
        looked into.
    """
    traced = jax.make_jaxpr(f)(*args)
    return _run(traced.jaxpr, traced.consts, jax.tree.leaves(args))[1]


def _run(
    jaxpr: core.Jaxpr, consts: Iterable[Any], args: Iterable[Any]
) -> tuple[list[Any], dict[Name, Seen]]:
    """The outputs of a program, and what is seen on the way."""
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    found, seen = recognised(jaxpr), dict[Name, Seen]()
    for number, eqn in enumerate(jaxpr.eqns):
        values, scope = [read(x) for x in eqn.invars], _scope(eqn)
        if number in found:
            outs, inner = _plain(eqn, values)
        elif eqn.primitive.name == "scan":
            outs, inner = _scan(eqn, values)
        elif (body := _body(eqn.params)) is not None:
            outs, inner = _run(body.jaxpr, body.consts, values)
        else:
            outs, inner = _plain(eqn, values)
        env.update(zip(eqn.outvars, outs))
        if number in found:
            kind, before, after = found[number]
            inner = {(kind,): Seen(read(before), read(after))}
        for name, value in inner.items():
            _add(seen, (*scope, *name), value)
    return [read(x) for x in jaxpr.outvars], seen


def _plain(eqn: core.JaxprEqn, values: list[Any]) -> tuple[list[Any], dict[Name, Seen]]:
    return compat.bind(eqn, values), {}


def _body(params: dict[str, Any]) -> core.ClosedJaxpr | None:
    """The program that a call, a rematerialised part or a custom derivative runs once."""
    if "branches" in params or "cond_jaxpr" in params:
        return None
    body = params.get("call_jaxpr", params.get("jaxpr"))
    return body if body is None else compat.closed(body)


def _scan(eqn: core.JaxprEqn, values: list[Any]) -> tuple[list[Any], dict[Name, Seen]]:
    closed, (fixed, carried) = eqn.params["jaxpr"], compat.scan_arguments(eqn)
    consts, rest = values[:fixed], values[fixed:]

    def step(carry: list[Any], xs: list[Any]) -> Any:
        outs, seen = _run(closed.jaxpr, closed.consts, [*consts, *carry, *xs])
        names.extend(name for name in seen if name not in names)
        return outs[:carried], (outs[carried:], list(seen.values()))

    names: list[Name] = []
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, (ys, stacked) = lax.scan(step, rest[:carried], rest[carried:], length, reverse)
    layers = {
        (f"{name[0]}_{n}", *name[1:]): jax.tree.map(lambda x, n=n: x[n], value)
        for n in range(length)
        for name, value in zip(names, stacked)
    }
    return [*carry, *ys], layers


def _scope(eqn: core.JaxprEqn) -> Name:
    """The modules that an equation belongs to; scopes of methods, `block.add`, are left out."""
    steps = []
    for step in str(eqn.source_info.name_stack).split("/"):
        while match := WRAPPED.fullmatch(step):
            step = match[1]
        if step and "." not in step:
            steps.append(step)
    return tuple(steps)


def _add(seen: dict[Name, Seen], name: Name, value: Seen) -> None:
    free, n = name, 0
    while free in seen:
        n += 1
        free = (*name[:-1], f"{name[-1]}_{n}")
    seen[free] = value
