"""A direction and parameters ↦ the direction with the norms of the filters of the parameters."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.directions import stack_of
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.linalg import bases
from curvax.parameter_roles import roles_by_name
from curvax.parameter_roles.roles import Path


class _Facts(NamedTuple):
    """The role, the output axes and the layer-stacking axes of a parameter."""

    kind: str
    outputs: tuple[int, ...]
    depth: tuple[int, ...]


def filter_normalised(
    direction: Tree,
    params: Tree,
    layout: Mapping[Any, Any] | None = None,
    *,
    biases: bool = False,
) -> Tree:
    """Scales each filter of a direction to the norm of that filter of the parameters.

        d_ij ← d_ij ‖θ_ij‖ / ‖d_ij‖

    A filter holds the incoming weights of one output unit: all axes of a kernel or table but its
    output axes, in each layer of a scanned depth. Landscapes along such directions are comparable
    between networks that differ in the scale of their weights. Li et al., arXiv:1712.09913,
    section 4.

    Args:
        direction: a tree like the parameters, or several stacked [k, ...].
        params: the point θ.
        layout: `curvax.layout(model, variables)`. By default the roles of parameters are inferred
            from names and shapes (Flax, Haiku, Equinox), and a parameter of unknown role is one
            filter.
        biases: scale biases and parameters of norms too, each as one vector; by default these
            entries become 0, as in the authors' code.

    Returns:
        A tree like `direction`, in float32 or wider.

    Raises:
        KeyError: the layout of another model.
        ValueError: the direction is not shaped like the parameters.
        TypeError: the parameters are complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}}
        >>> direction = {"dense": {"kernel": jnp.ones((2, 2))}}
        >>> found = analysis.filter_normalised(direction, params)["dense"]["kernel"]
        >>> [round(float(x), 3) for x in jnp.linalg.norm(found, axis=0)]
        [5.0, 1.0]
    """
    checks.refuse_complex(params, "filter_normalised")
    stack, _ = stack_of(direction, params, "filter_normalised")
    facts = _by_names(params) if layout is None else layout
    paths = [(trees.names(path), jnp.ndim(x)) for path, x in jax.tree.leaves_with_path(params)]
    inside = tuple(_inside(facts[path], rank, biases) for path, rank in paths)
    found = _scaled(stack, params, inside=inside)
    single = jnp.ndim(jax.tree.leaves(direction)[0]) == jnp.ndim(jax.tree.leaves(params)[0])
    return bases.row(found, 0) if single else found


@functools.partial(jax.jit, static_argnames="inside")
def _scaled(stack: Tree, params: Tree, *, inside: tuple[tuple[int, ...] | None, ...]) -> Tree:
    """Scales each vector of a stack; `inside` holds the axes of a filter for each leaf, or None."""

    def scaled(d: jax.Array, x: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
        if axes is None:
            return jnp.zeros_like(d)
        length = lambda y: jnp.sqrt(jnp.sum(y**2, axis=axes, keepdims=True))
        wanted = length(trees.widen(x))
        return jax.vmap(lambda one: one * trees.ratio(wanted, length(one)))(d)

    leaves, structure = jax.tree.flatten(stack)
    return jax.tree.unflatten(structure, map(scaled, leaves, jax.tree.leaves(params), inside))


def _inside(facts: _Facts, rank: int, biases: bool) -> tuple[int, ...] | None:
    """The axes within a filter, or None for a leaf that is set to 0."""
    apart = set(facts.depth)
    if facts.kind in ("bias", "norm") or rank - len(apart) < 2:
        if not biases:
            return None
    else:
        apart |= set(facts.outputs)
    return tuple(axis for axis in range(rank) if axis not in apart)


def _by_names(params: Tree) -> dict[Path, _Facts]:
    """Facts inferred from names, shapes and classes."""
    found = roles_by_name.param_infos(params)
    return {path: _Facts(r.role.kind, r.role.outputs, r.depth) for path, r in found.items()}
