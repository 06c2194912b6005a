"""A linen module and its inputs ↦ the role of each parameter, from one traced call.

Inside `nn.scan` and `nn.vmap` a module sees a slice of the parameters that its parent sees stacked:
the axis that disappears is the depth, wherever it is.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from curvax.parameter_roles.roles import (
    Axes,
    ParamInfo,
    ParamRole,
    Path,
    Shape,
    convolution,
    in_attention,
    layers,
    linear,
    placed,
    removed,
    role,
)
from curvax.parameter_roles.roles_by_name import shapes_of


def read(
    model: nn.Module, variables: Mapping[str, Any], inputs: tuple[Any, ...], options: dict[str, Any]
) -> dict[Path, ParamInfo]:
    """The roles of the parameters of all modules that one call of the model reaches."""
    shapes = shapes_of(variables["params"])
    modules, views = _watch(model, variables, inputs, options)
    grouped = layers(shapes)
    infos = {}
    for path, shape in shapes.items():
        if (owner := path[:-1]) in views:
            found = _role(modules[owner], path, views[owner], in_attention(owner, grouped))
            depth, levels = _depth(path, shape, views)
            infos[path] = placed(found, depth, len(shape), levels)
    return infos


def _watch(
    model: nn.Module, variables: Mapping[str, Any], inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[dict[Path, nn.Module], dict[Path, dict[Path, Shape]]]:
    """Each module by its path, and the shapes of the parameters as the module sees them."""
    modules: dict[Path, nn.Module] = {(): model}
    views: dict[Path, dict[Path, Shape]] = {(): shapes_of(variables["params"])}

    def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.path not in views:
            modules[module.path] = module
            views[module.path] = shapes_of(module.variables.get("params", {}))
        return call(*args, **kwargs)

    def call(variables: Any, rngs: Any, *inputs: Any) -> Any:
        return model.apply(variables, *inputs, **{"rngs": rngs, "mutable": True, **options})

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(look):
        jax.eval_shape(call, variables, rngs, *inputs)
    return modules, views


def _role(module: nn.Module, path: Path, view: Mapping[Path, Shape], attention: bool) -> ParamRole:
    name = path[-1]
    layer = {own[0]: shape for own, shape in view.items() if len(own) == 1}
    match module:
        case nn.Conv(kernel_size=size) if name == "kernel":
            return convolution(_length(size))
        case nn.ConvTranspose(kernel_size=size, transpose_kernel=flip) if name == "kernel":
            return convolution(_length(size), transposed=flip)
        case nn.DenseGeneral(features=features, axis=axis, batch_dims=batch) if name == "kernel":
            kind = "attention" if attention else "dense"
            return linear(_length(axis), _length(features), batch=len(batch), kind=kind)
    return role(path[:-1], name, layer, attention=attention)


def _length(value: Any) -> int:
    return 1 if isinstance(value, int) else len(value)


def _depth(
    path: Path, shape: Shape, views: Mapping[Path, Mapping[Path, Shape]]
) -> tuple[Axes, tuple[int, ...]]:
    """The axes of a leaf that stack layers, and the number of path names above each stack."""
    own, depth, levels = list(range(len(shape))), [], []
    for level in range(1, len(path)):
        seen = views.get(path[:level], {}).get(path[level:], shape)
        gone = [own[axis] for axis in removed(shape, seen) or ()]
        depth += gone
        levels += [level] * len(gone)
        own = [axis for axis in own if axis not in gone]
        shape = seen
    return tuple(depth), tuple(levels)
