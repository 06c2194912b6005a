"""An nnx module ↦ the role of each parameter, as declared by its layers.

A layer knows the shape that it was built with; further axes were stacked by `nnx.vmap` or
`nnx.scan`.
"""

from flax import nnx

from curvax import compat
from curvax.parameter_roles import roles
from curvax.parameter_roles.roles import ParamInfo, ParamRole, Path, Shape


def read(model: nnx.Module, shapes: dict[Path, Shape]) -> dict[Path, ParamInfo]:
    """The roles of all parameters; those of own modules follow from the layers around them."""
    attention = {
        (*path, name)
        for path, module in _modules(model)
        if isinstance(module, nnx.MultiHeadAttention)
        for name in (*roles.ATTENTION, "out")
    }
    known = {}
    for owner, module in _modules(model):
        for name, (role, built) in _declared(module, owner in attention).items():
            shape = shapes.get((*owner, name))
            depth = None if shape is None else roles.removed(shape, built)
            if shape is not None and depth is not None:
                known[*owner, name] = roles.placed(role, depth, len(shape))
    return roles.read(shapes, known)


def _modules(model: nnx.Module) -> list[tuple[Path, nnx.Module]]:
    return [(tuple(map(str, path)), module) for path, module in compat.iter_modules(model)]


def _declared(module: nnx.Module, attention: bool) -> dict[str, tuple[ParamRole, Shape]]:
    """Role and unstacked shape of each parameter of a Flax layer."""
    if isinstance(module, nnx.Embed):
        table = roles.linear(1, 1, kind="embedding")
        return {"embedding": (table, (module.num_embeddings, module.features))}
    if (kernel := _kernel(module, "attention" if attention else "dense")) is None:
        return {}
    role, shape = kernel
    ends = tuple(n for axis, n in enumerate(shape) if axis not in role.window + role.inputs)
    return {"kernel": kernel, "bias": (roles.vector("bias", len(ends)), ends)}


def _kernel(module: nnx.Module, kind: str) -> tuple[ParamRole, Shape] | None:
    match module:
        case nnx.Conv(kernel_size=size, kernel_shape=shape):
            return roles.convolution(len(size)), shape
        case nnx.ConvTranspose(kernel_size=size, kernel_shape=shape, transpose_kernel=flip):
            return roles.convolution(len(size), transposed=flip), shape
        case nnx.Linear(in_features=n, out_features=m):
            return roles.linear(1, 1, kind=kind), (n, m)
        case nnx.LinearGeneral(in_features=n, out_features=m, batch_axis=batch):
            role = roles.linear(len(n), len(m), kind=kind, batch=len(batch))
            return role, (*batch.values(), *n, *m)
    return None
