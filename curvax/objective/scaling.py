"""Gradients of a loss that is multiplied by a scale, as models in float16 need it."""

from collections.abc import Callable
from typing import Any

import jax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree


def scaled(tree: Tree, scale: Any) -> Tree:
    """A cotangent times the scale, in float32 or wider; unchanged if the scale is None."""
    return tree if scale is None else trees.scale(scale, trees.wide(tree))


def unscaled(tree: Tree, scale: Any) -> Tree:
    """A gradient of a scaled loss over the scale, in float32 or wider; unchanged if it is None."""
    if scale is None:
        return tree
    return jax.tree.map(lambda x: (x / scale).astype(x.dtype), trees.wide(tree))


def at_scale(pull: Callable[[Tree], Tree], scale: Any) -> Callable[[Tree], Tree]:
    """c ↦ Jᵀ c by a backward pass of scaled cotangents; `pull` itself if the scale is None."""
    return pull if scale is None else lambda c: unscaled(pull(scaled(c, scale)), scale)


def differentiated(
    loss: Callable[[Tree], tuple[jax.Array, Any]],
    params: Tree,
    scale: Any,
    share: jax.Array | None,
) -> tuple[tuple[jax.Array, Any], Tree]:
    """((L, aux), ∇L) of a loss `params -> (L, aux)`, differentiated as `scale`·`share`·L.

    States that are overwritten by their gradients keep that factor, other gradients are divided by
    it. None stands for a factor of one.
    """
    if scale is None and share is None:
        return trees.differentiated(loss, params)

    def multiplied(params: Tree) -> tuple[jax.Array, Any]:
        value, aux = loss(params)
        return scaled(value if share is None else share * value, scale), (value, aux)

    def divided(path: trees.Path, g: jax.Array) -> jax.Array:
        if trees.is_overwritten(path):
            return g
        g = unscaled(g, scale)
        return g if share is None else trees.ratio(trees.widen(g), share).astype(g.dtype)

    (_, out), grads = trees.differentiated(multiplied, params)
    return out, trees.map_with_path(divided, grads)
