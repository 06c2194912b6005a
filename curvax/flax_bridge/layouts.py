"""A Flax model ↦ the layout of its parameters, as declared by its modules."""

from typing import Any

from flax import linen as nn
from flax import nnx

from curvax import compat
from curvax.flax_bridge import linen_layers, nnx_layers
from curvax.parameter_roles import roles
from curvax.parameter_roles.layouts import Layout, assemble, layout_of_tree
from curvax.parameter_roles.roles_by_name import shapes_of


def layout(model: Any, variables: Any = None, *inputs: Any, **options: Any) -> Layout:
    """The layout of a model: role, axes and block of each parameter.

    An nnx module declares them. A linen module shows them when it is called: with `inputs`, one
    call is traced, without computing anything. The layers of an Equinox module are recognised by
    class. In any other tree (Haiku, plain dictionaries) names and neighbouring shapes are the
    evidence, and parameters in doubt are `other`, without axes.

    Args:
        model: a linen module, an nnx module, an Equinox module, or a tree of parameters.
        variables: the result of linen's `init`, or its `params` alone; shapes suffice.
        *inputs: example inputs of the linen module; shapes suffice.
        **options: further arguments of the linen module's `apply`, such as `train=False`.

    Returns:
        A `Layout`, a mapping from path to `Leaf`.

    Raises:
        TypeError: a linen module without its variables.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> from flax import linen as nn
        >>> model, x = nn.Conv(features=4, kernel_size=(3, 3)), jnp.zeros((1, 8, 8, 2))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> leaf = curvax.layout(model, variables, x)["kernel",]
        >>> leaf.kind, leaf.shape, leaf.window
        ('convolution', (3, 3, 2, 4), (0, 1))
    """
    if isinstance(model, nnx.Module):
        shapes = shapes_of(compat.as_pure(nnx.state(model, nnx.Param)))
        return assemble(shapes, nnx_layers.read(model, shapes))
    if not isinstance(model, nn.Module):
        return layout_of_tree(model)
    if variables is None:
        raise TypeError(
            "A linen module keeps no parameters. Pass its variables too, as in "
            "`layout(model, model.init(key, x))`."
        )
    variables = nn.meta.unbox(variables if "params" in variables else {"params": variables})
    shapes = shapes_of(variables["params"])
    infos = roles.read(shapes)
    if inputs:
        infos |= linen_layers.read(model, variables, inputs, options)
    return assemble(shapes, infos)
