"""The axes of inputs and outputs of every kernel, in the form that Optax's Muon takes."""

from collections.abc import Callable, Collection
from typing import Any

import jax
from optax import contrib

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.parameter_roles.layouts import Layout, Leaf

KERNELS = ("dense", "attention", "convolution")


def matrix_axes(layout: Layout, *, kinds: Collection[str] = KERNELS) -> Callable[[Tree], Tree]:
    """The axes of every kernel as a matrix of inputs and outputs, for `optax.contrib.muon`.

    By default Muon takes arrays of exactly two axes. In a model that stacks its layers by `nn.scan`
    these are the stacked biases and scales, and no kernel; a kernel of `DenseGeneral`, with axes of
    heads, is none either. Here the axes that stack layers stay apart, and the window of a
    convolution is an input. Embeddings, biases and norms are left to Muon's Adam.

    Args:
        layout: the axes of each parameter, from `curvax.layout`.
        kinds: the kinds of `Leaf` that are matrices.

    Returns:
        A function of the parameters to a tree with `optax.contrib.MuonDimensionNumbers` for every
        kernel, and None for other leaves.

    Raises:
        KeyError: in the function, a parameter is not in the layout.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, flax.linen as nn, curvax
        >>> from curvax.flax_bridge import matrix_axes
        >>> model = nn.MultiHeadDotProductAttention(num_heads=2)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3, 4)))
        >>> axes = matrix_axes(curvax.layout(model, variables, jnp.ones((1, 3, 4))))
        >>> axes(variables["params"])["out"]["kernel"]
        MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
        >>> tx = optax.contrib.muon(3e-2, muon_weight_dimension_numbers=axes)
    """

    def of_leaf(leaf: Leaf) -> Any:
        inputs = (*leaf.window, *leaf.inputs)
        if leaf.kind not in kinds or not inputs or not leaf.outputs:
            return None
        return contrib.MuonDimensionNumbers(inputs, leaf.outputs)

    def of_tree(params: Tree) -> Tree:
        of = lambda path, x: of_leaf(layout[trees.names(path)])
        return jax.tree_util.tree_map_with_path(of, params)

    return of_tree
