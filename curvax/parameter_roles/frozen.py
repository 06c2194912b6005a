"""A warning for leaves that a stage moves for an evaluation and a later part keeps fixed."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree

BY_LEAF = (optax.MaskedState, optax.transforms.PartitionState)


def warn_of_frozen(parts: Sequence[Any], states: Sequence[Any], params: Tree) -> None:
    """Warns of leaves that a stage moves and a later part never trains.

    `part.init.moves` of such a stage is a function of the parameters, which gives a flag for each
    leaf, and a text to warn with, in which `{leaves}` stands for their names.
    """
    for number, part in enumerate(parts):
        moves, text = getattr(part.init, "moves", (None, ""))
        if moves is None:
            continue
        later = list(zip(parts, states, strict=True))[number + 1 :]
        frozen = [fixed(*part, params) for part in later if _treats_leaves_apart(part[1])]
        paths = [trees.names(path) for path, _ in jax.tree.leaves_with_path(params)]
        kept = [
            trees.label(path)
            for path, moved, *flags in zip(paths, moves(params), *frozen, strict=True)
            if moved and any(flags)
        ]
        if 0 < len(kept) < len(paths):
            warnings.warn(text.format(leaves=_listed(kept)), stacklevel=2)


def _listed(kept: list[str]) -> str:
    found = ", ".join(f"`{name}`" for name in kept[:3])
    return f"{found} and {len(kept) - 3} more" if len(kept) > 3 else found


def fixed(part: optax.GradientTransformation, state: Any, params: Tree) -> list[bool]:
    """For each leaf, whether its update is independent of all gradients, as in `set_to_zero`."""
    update = lambda u: part.update(u, state, params)[0]
    try:
        traced = jax.make_jaxpr(update)(params).jaxpr
    except Exception:  # a part that needs further arguments cannot be traced
        return [False] * len(jax.tree.leaves(params))
    moving = set(traced.invars)
    literal = lambda x: hasattr(x, "val")
    for eqn in traced.eqns:
        if any(x in moving for x in eqn.invars if not literal(x)):
            moving.update(eqn.outvars)
    return [literal(x) or x not in moving for x in traced.outvars]


def _treats_leaves_apart(state: Any) -> bool:
    kind = lambda x: isinstance(x, BY_LEAF)
    return any(map(kind, jax.tree.leaves(state, is_leaf=kind)))
