"""Smoothing of a diagonal over neighbouring weights."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree
from curvax.hyperparameters import injectable
from curvax.parameter_roles import roles_by_name
from curvax.pipes import requirements
from curvax.pipes.signal import Signal, Stage, stage

Block = None | int | tuple[int, ...]
BlockRule = Callable[[Path, jax.Array], Block]
LeafAxes = Mapping[Any, Any]
"""path ↦ the window, input and output axes of a leaf: a `Layout`, or roles by path."""


@injectable
def spatial_average(
    block: str | BlockRule | Block = "auto",
    *,
    magnitudes: bool = True,
    layout: LeafAxes | None = None,
) -> Stage:
    """Replaces the diagonal by its mean over blocks of neighbouring weights.

        D[ib + j] = 1/b Σₖ D[ib + k],   k = 1 … b

    Yao et al., AdaHessian, arXiv:2006.00719, eq. 10.

    Args:
        block: "auto" averages the kernels of convolutions over their window axes, in the layouts of
            Flax, Haiku and Equinox, and leaves other parameters alone; a leaf that may be such a
            kernel, but is not recognised, is left alone with a warning at `init`. An int b averages
            contiguous blocks of length b: along the inputs of a Flax `kernel` (the authors' [out,
            in] order), along other leaves as stored; leaves of rank 0 and 1 are left alone. A
            callable `(path, leaf) -> None, int or axes` decides for each leaf. None averages
            nothing.
        magnitudes: whether to average |D| (the authors' code) rather than D (eq. 10).
        layout: what `curvax.layout(model, variables)` returns, for models in which names alone do
            not show which axis is a window, an input, or a stack of layers.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: `block` is none of these; in `update`, an int that does not divide a leaf, or
            axes that a leaf does not have.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> tx = curvax.squared_gradient() | curvax.spatial_average()
        >>> g = {"Conv_0": {"kernel": jnp.arange(4.0).reshape(2, 2, 1, 1)}}
        >>> signal, state = tx.update(curvax.Signal(g), tx.init(g), g)
        >>> print(signal.diagonal["Conv_0"]["kernel"].ravel())
        [3.5 3.5 3.5 3.5]
    """
    checks.check_static("spatial_average", block=block)
    rule_of = _rule_of(block, layout)

    def rule(
        signal: Signal, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        del params, extra
        diagonal = requirements.needed_diagonal(
            signal.diagonal, "spatial_average", "averages a diagonal"
        )
        if magnitudes:
            diagonal = jax.tree.map(jnp.abs, diagonal)
        block_of, axes_of = rule_of(diagonal)
        averaged = trees.map_with_path(
            lambda path, d: _averaged(d, block_of(path, d), path, axes_of), diagonal
        )
        return signal._replace(diagonal=averaged), state

    def init(params: Tree) -> optax.EmptyState:
        if block == "auto" and layout is None:
            _warn_of_windows(params)
        return optax.EmptyState()

    return stage(init, rule)


def _rule_of(
    block: str | BlockRule | Block, layout: LeafAxes | None
) -> Callable[[Tree], tuple[BlockRule, LeafAxes]]:
    """tree ↦ the block of each leaf, and the axes of each leaf."""
    if block == "auto":
        decide = lambda axes_of: lambda path, leaf: axes_of[path].window or None
    elif callable(block):
        decide = lambda axes_of: block
    elif block is None:
        decide = lambda axes_of: lambda path, leaf: None
    elif isinstance(block, int) and not isinstance(block, bool) and block > 0:
        decide = lambda axes_of: lambda path, leaf: block if leaf.ndim > 1 else None
    else:
        raise ValueError(
            "`spatial_average` takes `block` as 'auto', a positive int, None, or a callable "
            f"`(path, leaf) -> None, int or axes`, and got {block!r}."
        )

    def rule_of(tree: Tree) -> tuple[BlockRule, LeafAxes]:
        axes_of = _recognised(tree) if layout is None else layout
        return decide(axes_of), axes_of

    return rule_of


def _recognised(tree: Tree) -> LeafAxes:
    """The role of each leaf by names, shapes and classes; without a window where in doubt."""
    return {path: info.role for path, info in roles_by_name.param_infos(tree).items()}


def _warn_of_windows(params: Tree) -> None:
    """Warns of leaves that may be kernels of convolutions and are not averaged."""
    shapes, infos = roles_by_name.shapes_of(params), roles_by_name.param_infos(params)
    doubtful = roles_by_name.doubtful_windows(shapes, infos)
    if doubtful:
        found = ", ".join(f"`{'/'.join(path)}` {shapes[path]}" for path in doubtful[:3])
        more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
        warnings.warn(
            f"`spatial_average` does not average over a window of {found}{more}: names and shapes "
            "do not show whether it is the kernel of a convolution, and which axes are its window. "
            "Pass `spatial_average(layout=curvax.layout(model, variables))`, which a method takes "
            "as `block=`, or a callable `(path, leaf) -> None or axes`; `block=None` averages "
            "nothing.",
            stacklevel=2,
        )


def _averaged(d: jax.Array, block: Block, path: Path, axes_of: LeafAxes) -> jax.Array:
    if block is None:
        return d
    if isinstance(block, int):
        return _block_means(d, block, path, axes_of)
    window = tuple(block)
    if any(not -d.ndim <= axis < d.ndim for axis in window):
        raise ValueError(
            f"`spatial_average` cannot average over the axes {window} of "
            f"`{trees.label(path)}`, which has shape {d.shape}. Return axes in "
            f"[-{d.ndim}, {d.ndim}), or None for no average."
        )
    return jnp.broadcast_to(jnp.mean(d, axis=window, keepdims=True), d.shape)


def _block_means(d: jax.Array, block: int, path: Path, axes_of: LeafAxes) -> jax.Array:
    if d.size % block:
        raise ValueError(
            f"`spatial_average` cuts each leaf into blocks of {block}, which does not divide the "
            f"{d.size} entries of `{trees.label(path)}` {d.shape}. Use a divisor, or a callable "
            "`(path, leaf) -> None, int or axes` that treats this leaf apart."
        )
    order = _inputs_last(d, path, axes_of)
    rows = d.transpose(order)
    means = jnp.mean(rows.reshape(-1, block), axis=1, keepdims=True)
    spread = jnp.broadcast_to(means, (means.size, block)).reshape(rows.shape)
    return spread.transpose([order.index(axis) for axis in range(d.ndim)])


def _inputs_last(d: jax.Array, path: Path, axes_of: LeafAxes) -> list[int]:
    """The axes in the order [stacked, outputs, inputs], so that blocks run along the inputs.

    A kernel that is not recognised ends in its output axis, as in Flax; any other leaf is taken as
    stored.
    """
    leaf = axes_of[path]
    inputs = [*leaf.window, *leaf.inputs] if "kernel" in path[-2:] else []
    if inputs:
        return [axis for axis in range(d.ndim) if axis not in inputs] + inputs
    everything = list(range(d.ndim))
    return everything[-1:] + everything[:-1] if "kernel" in path[-2:] else everything
