"""Functions whose names or behaviour differ between supported versions of JAX and Flax.

Supported are JAX 0.7.2 to 0.12 and Flax 0.11.2 to 0.12. Each function names the versions that need
it and its replacement once they are no longer supported.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core


def bodies(params: dict[str, Any]) -> list[Any]:
    """The programs among the parameters of an equation, as plain jaxprs.

    From JAX 0.10 on, `jax.extend.core.jaxprs_in_params`; before, only `jax.core` has it.
    """
    entries = (x for value in params.values() for x in (value if _is_many(value) else (value,)))
    return [getattr(x, "jaxpr", x) for x in entries if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def _is_many(value: Any) -> bool:
    return isinstance(value, tuple | list)


def closed(body: Any) -> Any:
    """A program as a `ClosedJaxpr`.

    From JAX 0.12 on, `Jaxpr` and `ClosedJaxpr` are one class, which holds the constants.
    """
    return body if hasattr(body, "consts") else core.ClosedJaxpr(body, ())


def bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Evaluates an equation.

    Up to JAX 0.9.1, `get_bind_params` returns functions, which precede the values, and parameters.
    """
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    out = eqn.primitive.bind(*functions, *values, **params)
    return out if eqn.primitive.multiple_results else [out]


def scan_arguments(eqn: core.JaxprEqn) -> tuple[int, int]:
    """(number of constants, number of carries) among the arguments of a scan.

    JAX 0.12 dropped `num_consts` and `num_carry` from the parameters. In all versions the arguments
    are constants, carries and sequences, and the results carries and sequences, and only sequences
    have one axis more than in the body.
    """
    body = eqn.params["jaxpr"]
    longer = lambda outer, inner: outer.aval.ndim > inner.ndim
    sequences = sum(map(longer, eqn.invars, body.in_avals))
    stacked = sum(map(longer, eqn.outvars, body.out_avals))
    carried = len(eqn.outvars) - stacked
    return len(eqn.invars) - sequences - carried, carried


def varying_axes(abstract: Any) -> frozenset[str]:
    """The device axes over which a value of this type varies, as far as types track it.

    From JAX 0.10 on, `manual_axis_type.varying`; before, `vma`, which may be None.
    """
    kind = getattr(abstract, "manual_axis_type", None)
    found = getattr(abstract, "vma", None) if kind is None else kind.varying
    return frozenset(found or ())


def cast_to_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Types a value as varying over axes over which it does not vary yet.

    From JAX 0.8.2 on, `lax.pcast`. Before, `lax.pvary`, whose transpose is a sum over devices even
    where types do not track what varies; it is not applied there.
    """
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    pvary: Any = lax.pvary  # type: ignore[attr-defined]
    return pvary(x, axes) if varying_axes(jax.eval_shape(lambda: pvary(0.0, axes))) else x


def manual_axes() -> tuple[str, ...]:
    """The device axes that `pmap` or `shard_map` bound here, without those of `vmap`.

    From JAX 0.10 on, the axes of the abstract mesh. JAX 0.7 (and 0.8 and 0.9 with
    `jax_pmap_shmap_merge` off) implements `pmap` without a mesh.
    """
    mesh = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return (*mesh, *(axis for axis in _axes_of_old_pmap() if axis not in mesh))


def _axes_of_old_pmap() -> tuple[str, ...]:
    """The bound axes that belong to neither a mesh nor a `vmap`.

    JAX lists all bound names without their origin. Those of a `vmap` are found in the frames of its
    batching interpreter on the call stack.
    """
    internals: Any = jax.core
    names = internals.unsafe_get_axis_names_DO_NOT_USE() if _has_old_pmap() else ()
    batched = frozenset(_axes_of_vmap(sys._getframe())) if names else ()
    return tuple(name for name in names if name not in batched)


def _has_old_pmap() -> bool:
    return hasattr(jax.config, "jax_pmap_shmap_merge") and not jax.config.jax_pmap_shmap_merge


def _axes_of_vmap(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        code = frame.f_code
        if code.co_name.startswith("_batch") and "axis_data" in code.co_varnames:
            yield frame.f_locals["axis_data"].name
        frame = frame.f_back


LAYOUTS = ("sharding_constraint", "optimization_barrier")
"""Primitives whose results equal their arguments."""


def origin(x: Any) -> Any:
    """The traced array from which x was made by resharding or by casts to wider floats alone.

    From JAX 0.10 on, a tracer stores the equation that made it. Before, x is its own origin.
    """
    while (eqn := getattr(x, "parent", None)) is not None:
        wider = eqn.primitive.name == "convert_element_type" and _widens(eqn.in_tracers[0], x)
        if not (wider or eqn.primitive.name in LAYOUTS):
            break
        x = eqn.in_tracers[next(i for i, var in enumerate(eqn.outvars) if var is x.val)]
    return x


def _widens(before: Any, after: Any) -> bool:
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (before, after)):
        return False
    # Not by promotion, which JAX refuses for types of eight bits, and if strict for all.
    old, new = jnp.finfo(before.dtype), jnp.finfo(after.dtype)
    return old.nmant <= new.nmant and old.nexp <= new.nexp


def as_pure(tree: Any) -> Any:
    """The values of an nnx state or of a tree of Variables.

    From Flax 0.12 on, `nnx.as_pure`; before, `nnx.pure`.
    """
    from flax import nnx

    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)


def iter_modules(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The submodules of an nnx module with their paths, the module itself last.

    From Flax 0.12 on, `nnx.iter_modules`; before, a method, which was deprecated later.
    """
    from flax import nnx

    return nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules()
