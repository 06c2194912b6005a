"""A tree of named shapes ↦ the role of each parameter, from the names and shapes around it.

The rank alone does not separate a convolution (h, w, in, out) from an attention kernel
(in, heads, dim) or from layers stacked by a scan (L, in, out). The evidence is: a bias has the
stacked and the output axes of its kernel; the scale of a normalisation has one axis; attention
has a query, a key and a value; neighbouring parameters are stacked together. Where this leaves a
doubt, the role is `other`.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

Axes = tuple[int, ...]
Path = tuple[str, ...]
Shape = tuple[int, ...]
Layer = Mapping[str, Shape]

ATTENTION = ("query", "key", "value")
SHIFTS = ("bias", "offset")
"""Names of the shift of a normalisation, in Flax and Haiku."""


class ParamRole(NamedTuple):
    """The role of a parameter in its layer, without axes that stack layers."""

    kind: str
    window: Axes = ()
    inputs: Axes = ()
    outputs: Axes = ()


class ParamInfo(NamedTuple):
    """A role, the axes that stack layers, and for each the number of path names above the stack."""

    role: ParamRole
    depth: Axes = ()
    levels: tuple[int, ...] = ()


OTHER = ParamRole("other")


def convolution(window: int, *, transposed: bool = False) -> ParamRole:
    """A Flax kernel (*window, in, out), or (*window, out, in) if it is stored transposed."""
    ends = ((window,), (window + 1,))
    return ParamRole("convolution", tuple(range(window)), *(ends[::-1] if transposed else ends))


def linear(inputs: int, outputs: int, *, kind: str = "dense", batch: int = 0) -> ParamRole:
    """A kernel (*batch, *in, *out)."""
    split = batch + inputs
    return ParamRole(kind, (), tuple(range(batch, split)), tuple(range(split, split + outputs)))


def vector(kind: str, rank: int) -> ParamRole:
    return ParamRole(kind, outputs=tuple(range(rank)))


def role(owner: Path, name: str, layer: Layer, *, attention: bool = False) -> ParamRole:
    """The role of the parameter `name` in an unstacked layer at the path `owner`."""
    rank = len(layer[name])
    if name == "kernel":
        return _kernel(owner, layer, attention)
    if name == "scale" or (name in SHIFTS and "scale" in layer and "kernel" not in layer):
        return vector("norm", rank)
    if name == "bias":
        return vector("bias", rank)
    if name in ("embedding", "embeddings") and rank == 2:
        return linear(1, 1, kind="embedding")
    if rank and any(word in name.lower() for word in ("embed", "cls", "token")):
        return ParamRole("embedding", outputs=(rank - 1,))
    return OTHER


def _kernel(owner: Path, layer: Layer, attention: bool) -> ParamRole:
    rank, bias = len(layer["kernel"]), layer.get("bias")
    if attention and rank in (2, 3):
        outputs = 1 if owner[-1] == "out" else rank - 1
        return linear(rank - outputs, outputs, kind="attention")
    if rank == 2:
        return linear(1, 1)
    if bias is not None and 2 <= len(bias) < rank:
        return linear(rank - len(bias), len(bias))
    if rank >= 3 and (_named_convolution(owner) or (bias is not None and rank >= 4)):
        return convolution(rank - 2)
    return OTHER


def _named_convolution(owner: Path) -> bool:
    return bool(owner) and owner[-1].lower().startswith("conv")


def layers(shapes: Mapping[Path, Shape]) -> dict[Path, dict[str, Shape]]:
    """The parameters grouped by the module that owns them."""
    grouped: dict[Path, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        grouped.setdefault(path[:-1], {})[path[-1]] = shape
    return grouped


def in_attention(owner: Path, owners: Mapping[Path, object]) -> bool:
    """Whether a layer is a projection of attention: query, key and value are siblings of it."""
    return (
        bool(owner)
        and owner[-1] in (*ATTENTION, "out")
        and all((*owner[:-1], name) in owners for name in ATTENTION)
    )


def read(
    shapes: Mapping[Path, Shape], known: Mapping[Path, ParamInfo] | None = None
) -> dict[Path, ParamInfo]:
    """The role of every parameter; `known` holds those that a module declared, with their depth."""
    infos = read_roles(shapes, known)
    levels = _levels({path: _sizes(shapes[path], r.depth) for path, r in infos.items()})
    return {path: r._replace(levels=levels[path]) for path, r in infos.items()}


def read_roles(
    shapes: Mapping[Path, Shape], known: Mapping[Path, ParamInfo] | None = None
) -> dict[Path, ParamInfo]:
    """As `read`, without the levels, which only the names of blocks need."""
    known = known or {}
    grouped = layers(shapes)
    depths = _depths(grouped, {path[:-1]: len(info.depth) for path, info in known.items()})
    infos = {}
    for path, shape in shapes.items():
        infos[path] = known.get(path) or _read(path, shape, grouped, depths[path[:-1]])
    return infos


def _read(path: Path, shape: Shape, grouped: Mapping[Path, Layer], depth: int | None) -> ParamInfo:
    if depth is None or depth > len(shape):
        return ParamInfo(OTHER)
    owner = path[:-1]
    layer = {name: s[depth:] for name, s in grouped[owner].items()}
    found = role(owner, path[-1], layer, attention=in_attention(owner, grouped))
    return placed(found, tuple(range(depth)), len(shape))


def placed(found: ParamRole, depth: Axes, rank: int, levels: tuple[int, ...] = ()) -> ParamInfo:
    """The role with its axes numbered in a stored leaf, in which the axes `depth` stack layers."""
    own = [axis for axis in range(rank) if axis not in depth]
    kind, *groups = found
    axes = (tuple(own[axis] for axis in group) for group in groups)
    return ParamInfo(ParamRole(kind, *axes), depth, levels)


def removed(outer: Shape, inner: Shape) -> Axes | None:
    """The axes without which `outer` is `inner`; the leading ones if there are several choices."""
    for axes in combinations(range(len(outer)), max(0, len(outer) - len(inner))):
        if tuple(size for axis, size in enumerate(outer) if axis not in axes) == inner:
            return axes
    return None


def _sizes(shape: Shape, depth: Axes) -> Shape:
    return tuple(shape[axis] for axis in depth)


def _depths(grouped: Mapping[Path, Layer], declared: Mapping[Path, int]) -> dict[Path, int | None]:
    """The number of leading stacked axes of each layer, None where it is not determined."""
    possible = {
        owner: (declared[owner],) if owner in declared else _possible_depths(owner, layer)
        for owner, layer in grouped.items()
    }
    certain = {owner: depths[0] for owner, depths in possible.items() if len(depths) == 1}

    def settle(owner: Path) -> int | None:
        if owner in certain:
            return certain[owner]
        home = _home(owner, grouped)
        below = [o for o in certain if o[: len(home)] == home]
        if not below:
            return 0 if _plain_convolution(owner, grouped[owner]) else None
        witness = min(below, key=lambda o: certain[o])
        depth = certain[witness]
        leading = {shape[:depth] for o in (witness, owner) for shape in grouped[o].values()}
        return depth if depth in possible[owner] and len(leading) == 1 else None

    return {owner: settle(owner) for owner in grouped}


def _plain_convolution(owner: Path, layer: Layer) -> bool:
    """A kernel without a bias that is a convolution by its name and its square window."""
    window = layer.get("kernel", ())[:-2]
    scanned = any("scan" in name.lower() for name in owner)
    return (
        _named_convolution(owner)
        and len(window) in (1, 2)
        and len(set(window)) == 1
        and not scanned
    )


def _home(owner: Path, grouped: Mapping[Path, Layer]) -> Path:
    """The module whose layers would be stacked together with this one."""
    if "kernel" not in grouped[owner] and any(
        len(o) > len(owner) and o[: len(owner)] == owner for o in grouped
    ):
        return owner
    return owner[:-2] if in_attention(owner, grouped) else owner[:-1]


def _possible_depths(owner: Path, layer: Layer) -> tuple[int, ...]:
    kernel, bias = layer.get("kernel"), layer.get("bias")
    if kernel is None:
        if "scale" in layer:
            return (max(0, len(layer["scale"]) - 1),)
        if set(layer) == {"embedding"}:
            return (max(0, len(layer["embedding"]) - 2),)
        return tuple(range(1 + min(map(len, layer.values()))))
    if bias is None:
        return tuple(range(max(1, len(kernel) - (2 if _named_convolution(owner) else 1))))
    if _named_convolution(owner):
        return (len(bias) - 1,)
    return tuple(n for n in range(len(bias)) if _explains(kernel, bias, n))


def _explains(kernel: Shape, bias: Shape, depth: int) -> bool:
    """Whether the bias is `depth` stacked axes of the kernel, then its output axes."""
    outputs = len(bias) - depth
    return (
        len(kernel) > len(bias)
        and kernel[:depth] == bias[:depth]
        and kernel[-outputs:] == bias[depth:]
    )


def _levels(sizes: Mapping[Path, Shape]) -> dict[Path, tuple[int, ...]]:
    """The depth in the path at which each stack begins: the outermost module whose leaves all share
    it.

    A wrapper that holds only the stacked module passes the stack on to it.
    """

    def uniform(prefix: Path, size: Shape) -> bool:
        below = [s for path, s in sizes.items() if path[: len(prefix)] == prefix]
        return all(s[: len(size)] == size for s in below)

    def begin(path: Path, size: Shape) -> int:
        level = next(n for n in range(len(path) + 1) if uniform(path[:n], size))
        while level < len(path) - 2 and len(_children(path[:level], sizes)) == 1:
            level += 1
        return level

    return {
        path: tuple(begin(path, size[: k + 1]) for k in range(len(size)))
        for path, size in sizes.items()
    }


def _children(prefix: Path, paths: Mapping[Path, object]) -> set[str]:
    return {path[len(prefix)] for path in paths if path[: len(prefix)] == prefix}
