"""Finds a loss that has already averaged its own value over the device axis.

Such a loss has a gradient that is right in one regime and wrong in the next (∂ pmean(L) is local
under pmap, 1/n of the mean under shard_map), so it is refused. Collectives inside the model, as in
synchronised batch norm, act on arrays and are fine: only a scalar reduced on its way to the output
counts.
"""

from typing import Any

from jax.extend import core

Vars = set[Any]


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
        for inner in _bodies(eqn):
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


def _bodies(eqn: Any) -> list[Any]:
    return [getattr(body, "jaxpr", body) for body in core.jaxprs_in_params(eqn.params)]
