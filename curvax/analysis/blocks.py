"""Names, patterns over paths or a layout ↦ which parameters make up each block of a network."""

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
    """What names the blocks of a network: `curvax.layout(model, variables)` does."""

    def blocks(self) -> Mapping[str, Iterable[tuple[Any, tuple[int, ...]]]]:
        """For each block the paths of its leaves, each with its place along the leaf's `depth`."""

    def __getitem__(self, path: Any) -> Any:
        """The leaf at a path, which has the axes `depth` that stack layers."""


Patterns = str | Iterable[str]
Blocks = Divided | Patterns | Mapping[str, Patterns]
Member = tuple[Path, dict[int, int]]
"""The path of a leaf, and the place of the block along its stacked axes."""


def block_masks(params: Tree, blocks: Blocks) -> dict[str, Tree]:
    """For each block a tree of 1 where an entry belongs to it and 0 where not.

    Args:
        params: a tree of arrays, or of their shapes.
        blocks: as in `block_eigenvalues`.

    Returns:
        `{block: tree}`, a leaf of which has the size of the parameter along axes that stack layers
        and size 1 along all others.

    Raises:
        ValueError: a pattern matches nothing, or the layout is that of another model.
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
    """The names of a path; an nnx Variable's own array is called as the Variable."""
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
                    "the parameters have none there. Call `curvax.layout(model, variables)` for "
                    "the tree that is analysed."
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
    """The leaves below each path that matches one of the patterns."""
    found: dict[str, list[Path]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        steps = pattern.split("/")
        below = [p for p in paths if len(p) >= len(steps) and all(map(fnmatchcase, p, steps))]
        if not below:
            known = sorted({trees.label(p[:n]) for p in paths for n in range(1, len(p) + 1)})
            raise ValueError(
                f"No path of the parameters matches the pattern `{pattern}`; near it are "
                f"{get_close_matches(pattern, known, cutoff=0.0)}. A pattern goes from the root, a "
                "name or a `*` for each step."
            )
        for path in below:
            found.setdefault(trees.label(path[: len(steps)]), []).append(path)
    return found
