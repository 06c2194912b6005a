"""A Flax model ↦ what each of its parameters is, as its modules tell it."""

from typing import Any

from flax import linen as nn
from flax import nnx

from curvax import compat
from curvax.flax_bridge import linen_roles, nnx_roles
from curvax.parameter_roles import roles
from curvax.parameter_roles.layers import shapes_of
from curvax.parameter_roles.layouts import Layout, assemble, layout_of_tree


def layout(model: Any, variables: Any = None, *inputs: Any, **options: Any) -> Layout:
    """What each parameter of a model is.

    An nnx module tells it. A linen module tells it when it is called: with `inputs` one call is
    traced, at no cost in FLOPs. The layers of an Equinox module are known by their classes. Else,
    as in Haiku's trees, names and neighbouring shapes are the evidence (a bias has the axes of its
    kernel's outputs, attention has a query, a key and a value), and what they leave doubtful is
    `other`, with no axes.

    Args:
        model: a linen module, an nnx module, an Equinox module, or a tree of parameters.
        variables: what linen's `init` gave, or its `params` alone; shapes suffice.
        *inputs: an example of what the model is called with; shapes suffice.
        **options: further arguments of the linen module's `apply`, such as `train=False`.

    Raises:
        TypeError: a linen module without its variables.
    """
    if isinstance(model, nnx.Module):
        shapes = shapes_of(compat.as_pure(nnx.state(model, nnx.Param)))
        return assemble(shapes, nnx_roles.read(model, shapes))
    if not isinstance(model, nn.Module):
        return layout_of_tree(model)
    if variables is None:
        raise TypeError(
            "A linen module keeps no parameters. Pass them too, as in "
            "`layout(model, model.init(key, x))`."
        )
    variables = nn.meta.unbox(variables if "params" in variables else {"params": variables})
    shapes = shapes_of(variables["params"])
    infos = roles.read(shapes)
    if inputs:
        infos |= linen_roles.read(model, variables, inputs, options)
    return assemble(shapes, infos)
