"""What JAX and Flax call differently between the versions that curvax runs on.

These are JAX 0.7.2 to 0.12 and Flax 0.11.2 to 0.12. Each function says which versions need it and
what takes its place once they are no longer supported.
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

    `jax.extend.core.jaxprs_in_params` stands from JAX 0.10 on; before, `jax.core` has it alone.
    """
    entries = (x for value in params.values() for x in (value if _is_many(value) else (value,)))
    return [getattr(x, "jaxpr", x) for x in entries if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def _is_many(value: Any) -> bool:
    return isinstance(value, tuple | list)


def closed(body: Any) -> Any:
    """A program with its constants.

    From JAX 0.12 on `Jaxpr` and `ClosedJaxpr` are one class that holds them.
    """
    return body if hasattr(body, "consts") else core.ClosedJaxpr(body, ())


def bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """The results of an equation.

    Up to JAX 0.9.1 `get_bind_params` gives functions, which come before the values, and parameters.
    """
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    out = eqn.primitive.bind(*functions, *values, **params)
    return out if eqn.primitive.multiple_results else [out]


def scan_arguments(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many arguments of a scan are constants, and how many are carried.

    JAX 0.12 no longer has `num_consts` and `num_carry` among the parameters. In every version the
    arguments are constants, carries and sequences, the results carries and sequences, and of
    these the sequences alone have an axis more than what the body takes and gives.
    """
    body = eqn.params["jaxpr"]
    longer = lambda outer, inner: outer.aval.ndim > inner.ndim
    sequences = sum(map(longer, eqn.invars, body.in_avals))
    stacked = sum(map(longer, eqn.outvars, body.out_avals))
    carried = len(eqn.outvars) - stacked
    return len(eqn.invars) - sequences - carried, carried


def varying_axes(abstract: Any) -> frozenset[str]:
    """The device axes over which a value of this type is known to vary.

    `manual_axis_type.varying` from JAX 0.10 on, `vma` up to 0.9 (None where nothing is tracked).
    """
    kind = getattr(abstract, "manual_axis_type", None)
    found = getattr(abstract, "vma", None) if kind is None else kind.varying
    return frozenset(found or ())


def cast_to_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The value typed as varying over axes over which it does not yet.

    `lax.pcast` from JAX 0.8.2 on. Before there is `lax.pvary`, whose transpose is a sum over
    devices even where types do not track what varies: there it is left out.
    """
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    pvary: Any = lax.pvary  # type: ignore[attr-defined]
    return pvary(x, axes) if varying_axes(jax.eval_shape(lambda: pvary(0.0, axes))) else x


def manual_axes() -> tuple[str, ...]:
    """The device axes that pmap or shard_map bound here, and not those of vmap.

    JAX 0.7 (and 0.8 and 0.9 with `jax_pmap_shmap_merge` off) implements pmap without shard_map, so
    that no mesh shows its axis. From 0.10 on the mesh alone tells.
    """
    mesh = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return (*mesh, *(axis for axis in _axes_of_old_pmap() if axis not in mesh))


def _axes_of_old_pmap() -> tuple[str, ...]:
    """The bound axes that belong to neither a mesh nor a vmap.

    JAX keeps one list of bound names without their origin. A vmap, and it alone, is at work in a
    frame of its batching interpreter that holds the name.
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
"""Primitives whose results are their arguments."""


def origin(x: Any) -> Any:
    """What a traced array was before it was only laid out anew, or cast to a wider float.

    JAX 0.10 keeps the equation that made a tracer; where it does not, an array is its own origin.
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

    `nnx.as_pure` from Flax 0.12 on; 0.11 calls it `nnx.pure`.
    """
    from flax import nnx

    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)


def iter_modules(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The modules of an nnx module with their paths, itself last.

    `nnx.iter_modules` from Flax 0.12 on; 0.11 has it as a method alone, deprecated later.
    """
    from flax import nnx

    return nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules()
