"""Smoothing a diagonal over neighbouring weights."""

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
from curvax.parameter_roles import layers
from curvax.pipes import requirements
from curvax.pipes.signal import Signal, Stage, stage

Block = None | int | tuple[int, ...]
BlockRule = Callable[[Path, jax.Array], Block]
Facts = Mapping[Any, Any]
"""path ↦ the window, input and output axes of a leaf."""


@injectable
def spatial_average(
    block: str | BlockRule | Block = "auto", *, magnitudes: bool = True, layout: Any = None
) -> Stage:
    """Replaces the diagonal by its mean over a block of neighbouring weights.

        D[ib + j] = 1/b Σₖ D[ib + k],   k = 1 … b

    Yao et al., AdaHessian, arXiv:2006.00719, eq. 10.

    Args:
        block: `"auto"` averages a convolution over its window axes and nothing else: Flax's and
            Haiku's kernels, of linen and nnx, and those of Equinox's layers. A leaf that may be one
            and of which names and shapes do not tell it stays, with a warning at `init`. An int is
            the length of contiguous blocks along the inputs of a Flax `kernel` (its output axis
            moved first, as in the authors' [out, in]), along any other leaf as stored; leaves of
            rank 0 and 1 stay. A callable `(path, leaf) -> None, int or axes` decides for each
            leaf, None being no average.
        magnitudes: average |D|, as the authors' code does; False averages the signed values, as
            eq. 10 is written.
        layout: what `curvax.flax_bridge.layout(model, variables)` returns, where names alone do
            not tell which axis is a window, an input, or a scanned depth.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: a block that is no such thing; later, one that does not divide its leaf.
    """
    checks.check_static("spatial_average", block=block)
    rule_of = _rule_of(block, layout)

    def rule(signal: Signal, state: Any, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        diagonal = requirements.needed_diagonal(
            signal.diagonal, "spatial_average", "averages a diagonal"
        )
        if magnitudes:
            diagonal = jax.tree.map(jnp.abs, diagonal)
        decide, facts = rule_of(diagonal)
        averaged = trees.map_with_path(
            lambda path, d: _averaged(d, decide(path, d), path, facts), diagonal
        )
        return signal._replace(diagonal=averaged), state

    def init(params: Tree) -> optax.EmptyState:
        if block == "auto" and layout is None:
            _warn_of_windows(params)
        return optax.EmptyState()

    return stage(init, rule)


def _rule_of(block: Any, layout: Any) -> Callable[[Tree], tuple[BlockRule, Facts]]:
    """tree ↦ the rule that says for each of its leaves what to average, and what each leaf is."""
    if block == "auto":
        decide = lambda facts: lambda path, leaf: facts[path].window or None
    elif callable(block):
        decide = lambda facts: block
    elif block is None:
        decide = lambda facts: lambda path, leaf: None
    elif isinstance(block, int) and not isinstance(block, bool) and block > 0:
        decide = lambda facts: lambda path, leaf: block if leaf.ndim > 1 else None
    else:
        raise ValueError(
            "`spatial_average` takes `block` as 'auto', a positive int, None, or a callable "
            f"`(path, leaf) -> None, int or axes`, and got {block!r}."
        )

    def rule_of(tree: Tree) -> tuple[BlockRule, Facts]:
        facts = _facts(tree) if layout is None else layout
        return decide(facts), facts

    return rule_of


def _facts(tree: Tree) -> Facts:
    """What each leaf is by names, shapes and classes: the doubtful has no window."""
    return {path: info.role for path, info in layers.param_infos(tree).items()}


def _warn_of_windows(params: Tree) -> None:
    """Says which leaves may be convolutions and are not averaged."""
    shapes, read = layers.shapes_of(params), layers.param_infos(params)
    doubtful = [path for path in shapes if layers.doubtful_window(path, shapes[path], read[path])]
    if doubtful:
        found = ", ".join(f"`{'/'.join(path)}` {shapes[path]}" for path in doubtful[:3])
        more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
        warnings.warn(
            f"`spatial_average` does not average over a window of {found}{more}: names and shapes "
            "do not tell whether it is a convolution's kernel, and along which axes its window "
            "lies. Pass `spatial_average(layout=curvax.layout(model, variables))`, which a method "
            "takes as `block=`, or a callable `(path, leaf) -> None or axes`; `block=None` "
            "averages nothing.",
            stacklevel=2,
        )


def _averaged(d: jax.Array, block: Block, path: Path, facts: Facts) -> jax.Array:
    if block is None:
        return d
    if isinstance(block, int):
        return _block_means(d, block, path, facts)
    window = tuple(block)
    if any(not -d.ndim <= axis < d.ndim for axis in window):
        raise ValueError(
            f"`spatial_average` was told to average the axes {window} of "
            f"`{trees.label(path)}`, which has shape {d.shape}."
        )
    return jnp.broadcast_to(jnp.mean(d, axis=window, keepdims=True), d.shape)


def _block_means(d: jax.Array, block: int, path: Path, facts: Facts) -> jax.Array:
    if d.size % block:
        raise ValueError(
            f"`spatial_average` cuts each leaf into blocks of {block}, which does not divide the "
            f"{d.size} entries of `{trees.label(path)}` {d.shape}. Use a divisor, or a callable "
            "`(path, leaf) -> None, int or axes` that treats this leaf apart."
        )
    order = _inputs_last(d, path, facts)
    rows = d.transpose(order)
    means = jnp.mean(rows.reshape(-1, block), axis=1, keepdims=True)
    spread = jnp.broadcast_to(means, (means.size, block)).reshape(rows.shape)
    return spread.transpose([order.index(axis) for axis in range(d.ndim)])


def _inputs_last(d: jax.Array, path: Path, facts: Facts) -> list[int]:
    """The axes in the order [stacked, outputs, inputs], so that blocks run along the inputs.

    A kernel of which nothing is known ends in its output axis, as Flax's do; any other leaf is
    taken as stored.
    """
    leaf = facts[path]
    inputs = [*leaf.window, *leaf.inputs] if "kernel" in path[-2:] else []
    if inputs:
        return [axis for axis in range(d.ndim) if axis not in inputs] + inputs
    everything = list(range(d.ndim))
    return everything[-1:] + everything[:-1] if "kernel" in path[-2:] else everything
