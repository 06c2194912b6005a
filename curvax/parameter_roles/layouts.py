"""A tree of parameters ↦ its layout: role, axes and block of each leaf.

The axes of a convolution's window, of inputs and of outputs; the axes that stack layers (`nn.scan`,
`nn.vmap`, `nnx.scan`, `nnx.vmap`); and the block of the network that a leaf belongs to.
"""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp

from curvax.parameter_roles import roles, roles_by_name
from curvax.parameter_roles.roles import Axes, ParamInfo, Path, Shape
from curvax.parameter_roles.roles_by_name import bare

COMPONENT = re.compile("attention|attn|mlp|ffn|feed_?forward", re.IGNORECASE)
NUMBERED = re.compile(r"(.*?)_?\d+")


class Leaf(NamedTuple):
    """The role of one parameter.

    Attributes:
        kind: `convolution`, `dense`, `attention` (the kernel of a projection), `embedding` (tables,
            positions, tokens), `norm`, `bias`, or `other` where it is unknown.
        shape: its stored shape.
        window: the window axes of a convolution.
        inputs: the axes that the forward pass sums over.
        outputs: the output axes; all own axes of a bias or norm.
        depth: the axes that stack layers, outermost first.
        block: the attention, MLP, repeated block or top-level module that it belongs to, as a path
            with `*` for the number of a stacked layer: `block_*/attention`.
    """

    kind: str
    shape: Shape
    window: Axes
    inputs: Axes
    outputs: Axes
    depth: Axes
    block: str


class Member(NamedTuple):
    """A leaf, or the slice of a stacked leaf, that belongs to a block."""

    path: Path
    place: tuple[int, ...]
    """The index along each `depth` axis of the leaf."""


class Layout(Mapping[Path, Leaf]):
    """A mapping from path to `Leaf`, with names from the root of the optimiser's parameters.

    Called as `layout(path, leaf)` it returns the window axes of a convolution and None for other
    parameters, which makes it a `block=` of `spatial_average`.
    """

    def __init__(self, leaves: Mapping[Path, Leaf]):
        self._leaves = dict(leaves)

    def __getitem__(self, path: Path) -> Leaf:
        """The leaf at a path.

        Raises:
            KeyError: there is no such parameter; the message names the nearest ones.
        """
        known = self._leaves
        # nnx.Optimizer initialises a transformation with Variables, whose arrays sit at `value`.
        path = path if path in known else bare(path)
        if path not in known:
            label, labels = "/".join(path), ["/".join(p) for p in known]
            raise KeyError(
                f"The layout has no parameter `{label}`; the nearest are "
                f"{get_close_matches(label, labels, cutoff=0.0)}. It belongs to other parameters: "
                "call `layout(model, variables)` for the tree that the optimiser receives."
            )
        return known[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __call__(self, path: Path, leaf: Any) -> Axes | None:
        """The window axes of a convolution's kernel, None for other parameters.

        Raises:
            ValueError: the leaf has another rank than the one in the layout.
        """
        known = self[path]
        if jnp.ndim(leaf) != len(known.shape):
            raise ValueError(
                f"The layout has `{'/'.join(path)}` with shape {known.shape}, and the parameter "
                f"has shape {jnp.shape(leaf)}. Call `layout(model, variables)` for the tree that "
                "the optimiser receives."
            )
        return known.window or None

    def blocks(self) -> dict[str, list[Member]]:
        """The members of every block by name, with stacked layers numbered like unrolled ones.

        `block_3` has all leaves of layer 3 and `block_3/attention` those of its attention, whether
        `block` is scanned or `block_3` is a module of its own.
        """
        found: dict[str, list[Member]] = {}
        for path, leaf in self.items():
            for place in product(*(range(leaf.shape[axis]) for axis in leaf.depth)):
                parts = leaf.block.replace("*", "{}").format(*place).split("/")
                for n in range(len(parts)):
                    name = "/".join(parts[: n + 1])
                    found.setdefault(name, []).append(Member(path, place))
        return found


def layout_of_tree(tree: Any) -> Layout:
    """The layout of a tree, by names (Flax, Haiku), classes (Equinox) and shapes."""
    shapes = {bare(path): shape for path, shape in roles_by_name.shapes_of(tree).items()}
    return assemble(shapes, roles.read(shapes, roles_by_name.known(tree, shapes)))


def assemble(shapes: Mapping[Path, Shape], infos: Mapping[Path, ParamInfo]) -> Layout:
    """The layout of parameters with these shapes and roles."""
    repeated = _repeated(shapes)
    return Layout(
        {
            path: Leaf(
                shape=shape,
                depth=infos[path].depth,
                block=_block(path, infos[path], repeated),
                **infos[path].role._asdict(),
            )
            for path, shape in shapes.items()
        }
    )


def _repeated(shapes: Mapping[Path, Shape]) -> set[Path]:
    """The modules of numbered families that hold modules themselves: block_0, block_1."""
    modules = {path[:n] for path in shapes for n in range(1, len(path) - 1)}
    families: dict[tuple[Path, str], set[Path]] = {}
    for module in modules:
        if match := NUMBERED.fullmatch(module[-1]):
            families.setdefault((module[:-1], match[1]), set()).add(module)
    return {module for family in families.values() if len(family) > 1 for module in family}


def _block(path: Path, info: ParamInfo, repeated: set[Path]) -> str:
    """The innermost attention or MLP around a leaf, else the repeated block, else the top-level
    module.
    """
    components = [n for n in range(1, len(path)) if COMPONENT.search(path[n - 1])]
    numbered = [n for n in range(1, len(path)) if path[:n] in repeated]
    end = max([*components[-1:], *numbered[:1], *info.levels, 0])
    own = [path[n] + "_*" * info.levels.count(n + 1) for n in range(end)]
    embeds = info.role.kind == "embedding" or "embed" in path[0].lower()
    top = "embedding" if embeds else path[0]
    return "/".join(["*"] * info.levels.count(0) + (own or [top]))
