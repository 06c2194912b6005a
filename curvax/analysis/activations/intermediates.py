"""A function and its arguments ↦ the inputs and outputs of its activations, by module names.

The function is traced to a jaxpr, which is evaluated equation by equation, including its calls,
rematerialised parts and scans, so that a model needs no hooks. Names come from `jax.named_scope`,
which Flax linen enters for every module.
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
"""The name of a scope under a transformation of JAX, such as `vmap(block)`."""

Name = tuple[str, ...]


class Activation(NamedTuple):
    """The input and the output of an activation function or a softmax."""

    before: jax.Array
    after: jax.Array


def intermediates(f: Callable[..., Any], *args: Any) -> dict[Name, Activation]:
    """Collects the input and output of every activation and softmax in `f(*args)`.

    Returns:
        `{(scope, …, kind): Activation}`, where the kind is `relu`, `gelu`, …, `softmax`. The
        second of two equal names ends in `_1`. Iterations of a scan are numbered at its outermost
        scope, `block_0`, `block_1`, as if it were unrolled. Bodies of `while` and `cond` are
        skipped.
    """
    traced = jax.make_jaxpr(f)(*args)
    return _run(traced.jaxpr, traced.consts, jax.tree.leaves(args))[1]


def _run(
    jaxpr: core.Jaxpr, consts: Iterable[Any], args: Iterable[Any]
) -> tuple[list[Any], dict[Name, Activation]]:
    """The outputs of a jaxpr, and the activations in it."""
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    found, seen = recognised(jaxpr), dict[Name, Activation]()
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
            inner = {(kind,): Activation(read(before), read(after))}
        for name, value in inner.items():
            _add(seen, (*scope, *name), value)
    return [read(x) for x in jaxpr.outvars], seen


def _plain(eqn: core.JaxprEqn, values: list[Any]) -> tuple[list[Any], dict[Name, Activation]]:
    return compat.bind(eqn, values), {}


def _body(params: dict[str, Any]) -> core.ClosedJaxpr | None:
    """The jaxpr of a call, a rematerialised part or a custom derivative, which runs once."""
    if "branches" in params or "cond_jaxpr" in params:
        return None
    body = params.get("call_jaxpr", params.get("jaxpr"))
    return body if body is None else compat.closed(body)


def _scan(eqn: core.JaxprEqn, values: list[Any]) -> tuple[list[Any], dict[Name, Activation]]:
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
    """The modules around an equation; scopes of methods such as `block.add` are left out."""
    steps = []
    for step in str(eqn.source_info.name_stack).split("/"):
        while match := WRAPPED.fullmatch(step):
            step = match[1]
        if step and "." not in step:
            steps.append(step)
    return tuple(steps)


def _add(seen: dict[Name, Activation], name: Name, value: Activation) -> None:
    free, n = name, 0
    while free in seen:
        n += 1
        free = (*name[:-1], f"{name[-1]}_{n}")
    seen[free] = value
