"""A tree of parameters ↦ the role of each leaf, in the layouts of Flax, Haiku and Equinox.

Flax names a kernel (*window, in, out) `kernel`; Haiku names it `w` in a module named `conv2_d` by
default; Equinox stores (out, in, *window) as `weight` of a class, which the tree still contains. A
leaf gets a window only where it is certain: a wrong axis would average over channels.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.parameter_roles import roles
from curvax.parameter_roles.roles import ParamInfo, ParamRole, Path, Shape

HAIKU_CONVOLUTION = re.compile(r"(?:.*_)?conv([123])_?d(_transpose)?(?:_\d+)?")
HAIKU_LINEAR = re.compile(r"(?:.*_)?linear(?:_\d+)?")
NAMED_CONVOLUTION = re.compile(r"(?<![a-z])conv(?!e)|conv(?:\d|_|$)", re.IGNORECASE)
NO_CONVOLUTION = re.compile(
    r"einsum|att(entio)?n|query|key|value|qkv|expert|moe|mlp|dense|linear", re.IGNORECASE
)
UNLESS_IN_CONVOLUTION = re.compile(r"^out$|proj|embed|lora", re.IGNORECASE)
# Sides of windows in use, from 2 x 2 for downsampling to 11 x 11 in AlexNet.
SIDES = range(2, 12)
KERNELS = (("kernel",), ("w",))


def param_infos(tree: Tree) -> dict[Path, ParamInfo]:
    """The role of each leaf of a tree, and the axes that stack layers."""
    shapes = shapes_of(tree)
    inside = {bare(path): shape for path, shape in shapes.items() if bare(path)}
    read = roles.read_roles(inside, known(tree, inside))
    return {path: read.get(bare(path), ParamInfo(roles.OTHER)) for path in shapes}


def bare(path: Path) -> Path:
    """A path without the final `value`, at which an nnx Variable holds its array."""
    return path[:-1] if path[-1:] == ("value",) else path


def shapes_of(tree: Tree) -> dict[Path, Shape]:
    """The shapes of the arrays of a tree, without the functions that an Equinox module holds."""
    leaves = jax.tree.leaves_with_path(tree)
    return {trees.names(path): tuple(jnp.shape(x)) for path, x in leaves if not callable(x)}


def known(tree: Tree, shapes: Mapping[Path, Shape]) -> dict[Path, ParamInfo]:
    """The leaves that the classes of Equinox or the names of Haiku identify."""
    by_class = {
        (*path, name): role
        for path, layer in _equinox_layers(tree)
        for name, role in _equinox_roles(layer).items()
    }
    found = {path: _placed(role, shapes[path]) for path, role in by_class.items() if path in shapes}
    for owner, layer in roles.layers(shapes).items():
        if owner and (haiku := _haiku_roles(owner[-1], layer)):
            found |= {(*owner, name): reading for name, reading in haiku.items()}
    return found


def _placed(role: tuple[ParamRole, int], shape: Shape) -> ParamInfo:
    """A role, with the leading axes beyond its own rank as stacked ones (`eqx.filter_vmap`)."""
    own, rank = role
    return roles.placed(own, tuple(range(len(shape) - rank)), len(shape))


def _equinox_layers(tree: Tree) -> Iterator[tuple[Path, Any]]:
    if (equinox := sys.modules.get("equinox")) is None:
        return
    nn = equinox.nn
    kinds = (
        nn.Conv, nn.ConvTranspose, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
        nn.BatchNorm,
    )  # fmt: skip
    layer = lambda x: isinstance(x, kinds)
    for path, x in jax.tree.leaves_with_path(tree, is_leaf=layer):
        if layer(x):
            yield trees.names(path), x


def _equinox_roles(layer: Any) -> dict[str, tuple[ParamRole, int]]:
    """Role and number of own axes of each parameter of an Equinox layer."""
    nn = sys.modules["equinox"].nn
    if isinstance(layer, (nn.Conv, nn.ConvTranspose)):
        n = layer.num_spatial_dims
        kernel = ParamRole("convolution", tuple(range(2, 2 + n)), (1,), (0,))
        return {"weight": (kernel, 2 + n), "bias": (roles.vector("bias", 1 + n), 1 + n)}
    if isinstance(layer, nn.Linear):
        return {
            "weight": (ParamRole("dense", (), (1,), (0,)), 2),
            "bias": (roles.vector("bias", 1), 1),
        }
    if isinstance(layer, nn.Embedding):
        return {"weight": (roles.linear(1, 1, kind="embedding"), 2)}
    rank = len(layer.shape) if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) else 1
    norm = (roles.vector("norm", rank), rank)
    return {"weight": norm, "bias": norm}


def _haiku_roles(module: str, layer: Mapping[str, Shape]) -> dict[str, ParamInfo]:
    """The parameters of a Haiku module, {w} or {w, b}, by its name and the shapes."""
    if "w" not in layer or not set(layer) <= {"w", "b"}:
        return {}
    kernel, bias = layer["w"], layer.get("b")
    role = _haiku_kernel(module.split("/")[-1], kernel, bias)
    if role is None:
        return {}
    depth = len(kernel) - len(role.window + role.inputs + role.outputs)
    stacked = tuple(range(depth))
    found = {"w": roles.placed(role, stacked, len(kernel))}
    if bias is None:
        return found
    # In the layout (n, c, h, w) a bias has an axis of size one for each axis of the window.
    ends = [kernel[depth + axis] for axis in role.outputs]
    if depth > len(bias) or math.prod(bias) != math.prod([*kernel[:depth], *ends]):
        return {}
    vector = roles.vector("bias", len(bias) - depth)
    return found | {"b": roles.placed(vector, stacked, len(bias))}


def _haiku_kernel(name: str, kernel: Shape, bias: Shape | None) -> ParamRole | None:
    rank = len(kernel)
    if match := HAIKU_CONVOLUTION.fullmatch(name):
        n = int(match[1])
        return roles.convolution(n, transposed=bool(match[2])) if rank >= n + 2 else None
    if HAIKU_LINEAR.fullmatch(name) or rank == 2:
        return roles.linear(1, 1) if rank >= 2 else None
    first, last = _square(kernel[:2]), _square(kernel[-2:])
    if rank == 4 and NAMED_CONVOLUTION.search(name) and first and not last:
        return roles.convolution(2, transposed="transpose" in name)
    return None


def _square(sides: Shape) -> bool:
    return len(set(sides)) == 1 and sides[0] in SIDES


def doubtful_windows(shapes: Mapping[Path, Shape], infos: Mapping[Path, ParamInfo]) -> list[Path]:
    """The leaves of unknown role that may be the kernel of a convolution.

    By the innermost name that decides; or by a square window at either end of the shape; or, with
    one window axis, by a small first axis. The last may instead be the number of heads in
    attention, if another kernel of three or more axes has that size behind its first axis.
    """
    high = {path: shape for path, shape in shapes.items() if len(shape) > 2}

    def heads(path: Path) -> bool:
        return any(shapes[path][0] in shape[1:] for other, shape in high.items() if other != path)

    def doubtful(path: Path) -> bool:
        if (named := _named_as_convolution(path)) is not None:
            return named
        shape = shapes[path]
        if len(shape) == 3:
            one_input = shape[1] == 1 < shape[2]
            kernel = bare(path)[-1:] in KERNELS and shape[0] in SIDES
            return kernel and (one_input or not heads(path))
        return any(_square(sides) and sides[0] > 2 for sides in (shape[:2], shape[-2:]))

    return [path for path in high if infos[path].role.kind == "other" and doubtful(path)]


def _named_as_convolution(path: Path) -> bool | None:
    """Whether the names of a path, the innermost first, are those of a convolution; None where
    they do not decide."""
    words = [word for name in reversed(bare(path)) for word in reversed(name.split("/"))]
    for word in words:
        if NAMED_CONVOLUTION.search(word):
            return True
        if NO_CONVOLUTION.search(word):
            return False
    return False if any(map(UNLESS_IN_CONVOLUTION.search, words)) else None
