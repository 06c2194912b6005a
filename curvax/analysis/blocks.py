"""A layout, or patterns over paths ↦ a mask of the parameters of each block."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree


@runtime_checkable
class Divided(Protocol):
    """A layout: the blocks of a network by name, as in `curvax.layout(model, variables)`."""

    def blocks(self) -> Mapping[str, Iterable[tuple[Any, tuple[int, ...]]]]:
        """`{block: [(path of a leaf, index along its `depth` axes), ...]}`."""

    def __getitem__(self, path: Any) -> Any:
        """The entry at a path, with `depth`, the axes of the leaf that stack layers."""


Patterns = str | Iterable[str]
Blocks = Divided | Patterns | Mapping[str, Patterns]
Member = tuple[Path, dict[int, int]]
"""The path of a leaf, and the index of the block along each stacked axis."""


def block_masks(params: Tree, blocks: Blocks) -> dict[str, Tree]:
    """Builds a mask for each block: 1 on its parameters, 0 elsewhere.

    Args:
        params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
        blocks: as in `block_eigenvalues`.

    Returns:
        `{block: tree like params}`. A leaf has the size of the parameter along axes that stack
        layers and size 1 along all others, and broadcasts against the parameter.

    Raises:
        ValueError: a pattern without a match, or the layout of another model.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "c": jnp.ones(3)}
        >>> masks = analysis.block_masks(params, "*")
        >>> list(masks), masks["a"]["a"]["w"].item(), masks["a"]["c"].item()
        (['a', 'c'], 1.0, 0.0)
    """
    sizes = {_path(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    if isinstance(blocks, Divided):
        members, depth = _of_layout(blocks, sizes)
    else:
        members, depth = _of_patterns(blocks, list(sizes)), {}
    shapes = {
        path: tuple(n if axis in depth.get(path, ()) else 1 for axis, n in enumerate(shape))
        for path, shape in sizes.items()
    }
    return {name: _mask(params, shapes, of_block) for name, of_block in members.items()}


def _mask(params: Tree, shapes: dict[Path, tuple[int, ...]], members: list[Member]) -> Tree:
    masks = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for path, place in members:
        masks[path][tuple(place.get(axis, 0) for axis in range(masks[path].ndim))] = 1
    return jax.tree.map_with_path(lambda path, _: masks[_path(path)], params)


def _path(path: Any) -> Path:
    """The names of a path, without the final `value` of an nnx Variable."""
    names = trees.names(path)
    return names[:-1] if names[-1:] == ("value",) else names


def _of_layout(
    layout: Divided, paths: Mapping[Path, Any]
) -> tuple[dict[str, list[Member]], dict[Path, tuple[int, ...]]]:
    depth: dict[Path, tuple[int, ...]] = {}
    members: dict[str, list[Member]] = {}
    for name, leaves in layout.blocks().items():
        for path, place in leaves:
            if path not in paths:
                raise ValueError(
                    f"The layout has a parameter `{trees.label(path)}` in the block `{name}`, and "
                    "`params` has none at that path. Call `curvax.layout(model, variables)` with "
                    "the variables that are analysed."
                )
            depth[path] = layout[path].depth
            members.setdefault(name, []).append((path, dict(zip(depth[path], place))))
    return members, depth


def _of_patterns(
    patterns: Patterns | Mapping[str, Patterns], paths: list[Path]
) -> dict[str, list[Member]]:
    if isinstance(patterns, Mapping):
        each = {name: _matches(own, paths).values() for name, own in patterns.items()}
        found = {name: list(dict.fromkeys(chain(*own))) for name, own in each.items()}
    else:
        found = _matches(patterns, paths)
    return {name: [(path, {}) for path in own] for name, own in found.items()}


def _matches(patterns: Patterns, paths: list[Path]) -> dict[str, list[Path]]:
    """`{matching path: paths of the leaves at and below it}`."""
    found: dict[str, list[Path]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        steps = pattern.split("/")
        below = [p for p in paths if len(p) >= len(steps) and all(map(fnmatchcase, p, steps))]
        if not below:
            known = sorted({trees.label(p[:n]) for p in paths for n in range(1, len(p) + 1)})
            raise ValueError(
                f"No path of the parameters matches the pattern `{pattern}`; near it are "
                f"{get_close_matches(pattern, known, cutoff=0.0)}. A pattern starts at the root "
                "and has a name or a `*` for each level."
            )
        for path in below:
            found.setdefault(trees.label(path[: len(steps)]), []).append(path)
    return found
