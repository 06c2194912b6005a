"""Finds a loss that reduces over a device axis what it must not.

A loss that has averaged its own value has a gradient that is right in one regime and wrong in the
next (∂ pmean(L) is local under pmap, 1/n of the mean under shard_map), so it is refused.
Collectives inside the model, as in synchronised batch norm, act on arrays and are fine, but where
devices have weights: a device's gradient then holds terms of others, which count by theirs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from curvax import compat
from curvax.arithmetic.trees import Tree

Vars = set[Any]

EXCHANGES = ("psum", "all_gather", "all_to_all", "ragged_all_to_all", "ppermute", "reduce_scatter")


def refuse_reduced_output(traced: core.ClosedJaxpr, suspects: tuple[str, ...]) -> None:
    """Refuses a traced loss `params -> scalar` whose output is a sum over one of the axes.

    Raises:
        ValueError: it is.
    """
    jaxpr = traced.jaxpr
    found = _output_reductions(jaxpr, 0, set(jaxpr.invars)) & set(suspects)
    if found:
        axis = sorted(found)[0]
        raise ValueError(
            f"The loss averages its own value over the axis {axis!r}, so that its gradient is "
            "neither this device's nor the mean. Leave the reduction out of the loss (return the "
            "mean over this device's examples) and average afterwards: "
            f"`... | pmean_updates({axis!r})`, or `mean_over={axis!r}`."
        )


def refuse_shared_activations(
    loss: Callable[[Tree], jax.Array], params: Tree, suspects: list[set[str]]
) -> None:
    """Refuses a loss in whose derivative devices exchange something along all axes of one of these.

    Args:
        params: of the device, varying over all axes over which the loss does.

    Raises:
        ValueError: they do.
    """
    value, pullback = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    backward = jax.make_jaxpr(lambda pull, cotangent: pull(cotangent))
    for axes in _exchanges(backward(pullback, value).jaxpr):
        if any(suspect <= axes for suspect in suspects):
            raise ValueError(
                f"The devices along {sorted(axes)} count by the weights of their examples, and the "
                "loss takes means over them inside the model, as synchronised batch norm does: a "
                "device's gradient holds terms of the others, which count by other weights. Take "
                "the statistics of each device's own examples, or leave out the weights. (Under "
                "`check_vma=False` the weights of devices are taken to differ, since nothing tells "
                "that they do not; `check_vma=True` does.)"
            )


def depends(traced: core.ClosedJaxpr) -> bool:
    """Whether an output of a traced function is made of one of its arguments."""
    found = _dependents(traced.jaxpr, set(traced.jaxpr.invars))
    return any(not isinstance(var, core.Literal) and var in found for var in traced.jaxpr.outvars)


def _exchanges(jaxpr: Any) -> Iterator[set[str]]:
    """The axes of each exchange between devices."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith(EXCHANGES):
            named = eqn.params.get("axes", eqn.params.get("axis_name"))
            named = named if isinstance(named, tuple) else (named,)
            yield {axis for axis in named if isinstance(axis, str)}
        for inner in compat.bodies(eqn.params):
            yield from _exchanges(inner)


def _output_reductions(jaxpr: Any, output: int, depends: Vars) -> set[str]:
    """The axes summed over by scalars between the parameters and the given output."""
    depends = _dependents(jaxpr, depends)
    producer = {var: (eqn, i) for eqn in jaxpr.eqns for i, var in enumerate(eqn.outvars)}
    found: set[str] = set()
    seen: Vars = set()
    stack = [jaxpr.outvars[output]]
    while stack:
        var = stack.pop()
        if isinstance(var, core.Literal) or var in seen or var not in depends or var.aval.shape:
            continue
        seen.add(var)
        if var not in producer:
            continue
        eqn, i = producer[var]
        if eqn.primitive.name.startswith("psum"):
            found |= {axis for axis in eqn.params["axes"] if isinstance(axis, str)}
        for inner in compat.bodies(eqn.params):
            if i < len(inner.outvars):
                found |= _output_reductions(inner, i, _passed_down(eqn, inner, depends))
        stack.extend(eqn.invars)
    return found


def _dependents(jaxpr: Any, roots: Vars) -> Vars:
    depends = set(roots)
    for eqn in jaxpr.eqns:
        if any(not isinstance(var, core.Literal) and var in depends for var in eqn.invars):
            depends |= set(eqn.outvars)
    return depends


def _passed_down(eqn: Any, inner: Any, depends: Vars) -> Vars:
    pairs = zip(reversed(inner.invars), reversed(eqn.invars))
    return {var for var, outer in pairs if not isinstance(outer, core.Literal) and outer in depends}
