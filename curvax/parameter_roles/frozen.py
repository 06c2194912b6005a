"""A warning for leaves that SAM perturbs and a later part of the pipe keeps fixed."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree

BY_LEAF = (optax.MaskedState, optax.transforms.PartitionState)


def warn_of_frozen(parts: Sequence[Any], states: Sequence[Any], params: Tree) -> None:
    """Warns of leaves that a stage perturbs and a later part never trains.

    `part.init.perturbs(params)` gives a flag for each leaf, whether the stage perturbs it.
    """
    for number, part in enumerate(parts):
        perturbs = getattr(part.init, "perturbs", None)
        if perturbs is None:
            continue
        later = list(zip(parts, states, strict=True))[number + 1 :]
        frozen = [fixed(*part, params) for part in later if _treats_leaves_apart(part[1])]
        paths = [trees.names(path) for path, _ in jax.tree.leaves_with_path(params)]
        kept = [
            trees.label(path)
            for path, moves, *flags in zip(paths, perturbs(params), *frozen, strict=True)
            if moves and any(flags)
        ]
        if 0 < len(kept) < len(paths):
            _warn(kept)


def _warn(kept: list[str]) -> None:
    found = ", ".join(f"`{name}`" for name in kept[:3])
    more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
    warnings.warn(
        f"`sam_perturb` perturbs parameters that a later part of the pipe keeps fixed: "
        f"{found}{more}. They enter the norm of the gradient, and the loss is evaluated at their "
        "perturbed values. Exclude them by a mask that is False there: "
        "`sam_perturb(rho, mask=mask)`, `sam(base, rho, mask=mask)`.",
        stacklevel=2,
    )


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
