"""Finds collectives in a traced loss under which its gradient would be wrong.

1. A loss must not average its own value: the gradient of pmean(L) is the local gradient under
   `pmap` but 1/n of the mean gradient under `shard_map`.
2. Collectives on activations, as in synchronised batch norm, are allowed unless devices have
   different weights: a device's gradient then contains terms of other devices' examples, which
   would be multiplied by this device's weight instead of theirs.
3. They also mix what each device draws for itself, as the probes of `hutchinson_diag(shards=)`.
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
    """Raises if the output of a traced loss `params -> scalar` is a sum over one of the axes.

    Args:
        traced: the loss.
        suspects: device axes.

    Raises:
        ValueError: the loss reduces its own value over one of `suspects`.
    """
    jaxpr = traced.jaxpr
    found = _output_reductions(jaxpr, 0, set(jaxpr.invars)) & set(suspects)
    if found:
        axis = sorted(found)[0]
        raise ValueError(
            f"The loss averages its own value over the axis {axis!r}, so that its gradient is "
            "neither this device's nor the mean. Remove the reduction from the loss (return the "
            "mean over this device's examples) and average afterwards: "
            f"`... | pmean_updates({axis!r})`, or `mean_over={axis!r}`."
        )


def refuse_shared_activations(
    loss: Callable[[Tree], jax.Array], params: Tree, suspects: list[set[str]]
) -> None:
    """Raises if the backward pass of a loss communicates along all axes of one of `suspects`.

    Args:
        loss: `params -> scalar`.
        params: typed as varying over all axes over which the loss varies.
        suspects: sets of device axes over which the weights of devices may differ.

    Raises:
        ValueError: it communicates.
    """
    for axes in exchanged(loss, params):
        if any(suspect <= axes for suspect in suspects):
            raise ValueError(
                f"The devices along {sorted(axes)} count by the weights of their examples, and the "
                "loss averages over them inside the model, as synchronised batch norm does: a "
                "device's gradient contains terms of other devices' examples, which have other "
                "weights. Compute the statistics from each device's own examples, or remove the "
                "weights. (Under `check_vma=False` types do not show whether the weights of "
                "devices differ, and they are assumed to; use `check_vma=True` if they do not.)"
            )


def exchanged(loss: Callable[[Tree], jax.Array], params: Tree) -> Iterator[set[str]]:
    """The device axes along which the backward pass of a loss communicates, for each collective.

    Args:
        loss, params: as in `refuse_shared_activations`.
    """
    value, pullback = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    backward = jax.make_jaxpr(lambda pull, cotangent: pull(cotangent))
    return _exchanges(backward(pullback, value).jaxpr)


def depends(traced: core.ClosedJaxpr) -> bool:
    """Whether an output of a traced function depends on one of its arguments."""
    found = _dependents(traced.jaxpr, set(traced.jaxpr.invars))
    return any(not isinstance(var, core.Literal) and var in found for var in traced.jaxpr.outvars)


def _exchanges(jaxpr: Any) -> Iterator[set[str]]:
    """The axes of each collective."""
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
