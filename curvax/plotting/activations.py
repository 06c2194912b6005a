"""Norms, shares of active units and attention inside a network ↦ rows for blocks, panels, maps."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from curvax.analysis import MlpBlockHessian
from curvax.plotting.canvas import LARGEST, axes_or_new, clean, mappings_of, numbers, runs_of
from curvax.plotting.docstrings import documented
from curvax.plotting.rows import draw_rows

FACTORS = {
    "largest": f"{LARGEST} of the block",
    "input_norm": "inputs, ‖a‖₂",
    "weight_norm": "weights above, ‖W‖₂",
    "slope_norm": "slopes, ‖B‖$_F$",
    "bend_norm": "bends, ‖D‖$_F$",
    "active": "active units (share)",
}


@documented
def block_norms(norms: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the 2-norm of each block of the weights, of a gradient or of an update.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3.

    Args:
        norms: `{block: norm}` from `analysis.block_norms`, or `{run: {block: norm}}`.

    Returns:
        The axes, with a row for each block and a dot for each run.

    Examples:
        >>> from curvax import plotting
        >>> ax = plotting.block_norms({"SGD": {"a": 1.0, "b": 2.0}, "SAM": {"a": 1.5, "b": 2.5}})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['SGD', 'SAM']
    """
    return _rows(norms, ax, label, "block_norms", "norm ‖·‖₂ of the block")


@documented
def active_fraction(shares: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the share of active units at each activation, from 0 to 1.

    Chen, Hsieh & Gong, arXiv:2106.01548, Fig. 2.

    Args:
        shares: `{layer: share}` from `analysis.active_fraction`, or `{run: {layer: share}}`.

    Returns:
        The axes, with a row for each activation and a dot for each run.

    Examples:
        >>> from curvax import plotting
        >>> ax = plotting.active_fraction({"block_0/mlp/gelu": 0.4, "block_1/mlp/gelu": 0.3})
        >>> ax.get_xlabel()
        'share of active units'
    """
    ax = _rows(shares, ax, label, "active_fraction", "share of active units")
    ax.set_xscale("linear")
    ax.set_xlim(0, 1)
    return ax


@documented
def activation_norms(norms: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the norm of the outputs of each activation, a mean over examples.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3.

    Args:
        norms: `{layer: norm}` from `analysis.activation_norms`, or `{run: {layer: norm}}`.

    Returns:
        The axes, with a row for each activation and a dot for each run.

    Examples:
        >>> from curvax import plotting
        >>> ax = plotting.activation_norms({"relu": 3.0, "relu_1": 4.0}, label="SAM")
        >>> ax.get_xlabel()
        'norm ‖a‖₂ of the activations'
    """
    return _rows(norms, ax, label, "activation_norms", "norm ‖a‖₂ of the activations")


@documented
def attention_maps(
    maps: Mapping[str, Any],
    layer: str,
    *,
    example: int = 0,
    head: int | None = None,
    patches: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the attention matrix of one example, or the attention over the patches of its image.

    Chen, Hsieh & Gong, arXiv:2106.01548, section 4.4.

    Args:
        maps: `{layer: [n, heads, queries, keys]}` from `analysis.attention_maps`.
        layer: a key of `maps`.
        example: index of the example.
        head: index of the head; by default the mean over heads.
        patches: (rows, columns) of patches in the image. The attention of the class token is drawn
            over them if there is one before the patches, else the mean over queries. By default
            the matrix [queries, keys] is drawn.

    Returns:
        The axes, with a colour bar.

    Raises:
        ValueError: an unknown layer, or `patches` that do not match the number of keys.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import plotting
        >>> maps = {"block_0/attention": jnp.full((1, 2, 4, 4), 0.25)}
        >>> ax = plotting.attention_maps(maps, "block_0/attention", patches=(2, 2))
        >>> ax.images[0].get_array().shape
        (2, 2)
    """
    if layer not in maps:
        raise ValueError(
            f"`attention_maps` knows the layers {', '.join(f'`{name}`' for name in maps)}, and got "
            f"`{layer}`. Pass one of them."
        )
    attention = numbers(maps[layer])[example]
    attention = attention.mean(0) if head is None else attention[head]
    shown = attention if patches is None else _over_image(attention, patches)
    ax = axes_or_new(ax)
    image = ax.imshow(shown, cmap="viridis", vmin=0, interpolation="nearest")
    ax.spines[:].set_visible(True)
    if patches is None:
        ax.set(xlabel="key", ylabel="query")
    else:
        ax.set(xticks=[], yticks=[])
    ax.figure.colorbar(image, ax=ax, label="attention")
    return ax


@documented
def mlp_block_hessians(results: Any, *, label: str | None = None) -> np.ndarray:
    """Draws λ_max of the Hessian block of each layer next to the norms of its factors.

    Chen, Hsieh & Gong, arXiv:2106.01548, eq. 3 and 4, Table 3.

    Args:
        results: `{layer: MlpBlockHessian}` from `analysis.mlp_block_hessians`, or
            `{run: {layer: MlpBlockHessian}}`.

    Returns:
        The axes, an array [2, 3] in a figure of their own: means over examples, with a row for each
        layer. Factors of value 0, such as the bends of the last layer, are left out.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> layer = analysis.MlpBlockHessian(*jnp.ones((8, 2)))
        >>> plotting.mlp_block_hessians({"layer0": layer, "layer1": layer}).shape
        (2, 3)
    """
    name = "mlp_block_hessians"
    runs = mappings_of(results, MlpBlockHessian, label, name=name, of=name)
    layers = max(map(len, runs.values()))
    size = (8.0, 2.4 + 0.5 * layers)
    figure, panels = plt.subplots(2, 3, figsize=size, sharey=True, layout="constrained")
    for ax, (factor, title) in zip(panels.flat, FACTORS.items()):
        means = {run: _means(found, factor) for run, found in runs.items()}
        draw_rows(means, clean(ax), title)
        handles = ax.get_legend_handles_labels()
        if ax.get_legend():
            ax.get_legend().remove()
    if any(runs):
        figure.legend(*handles, loc="outside upper right", ncols=len(runs), frameon=False)
    return panels


def _rows(results: Any, ax: Axes | None, label: str | None, name: str, xlabel: str) -> Axes:
    runs = runs_of(results, Mapping, label, name=name, of=name)
    values = {run: {b: float(x) for b, x in found.items()} for run, found in runs.items()}
    return draw_rows(values, ax, xlabel)


def _means(layers: Mapping[str, MlpBlockHessian], factor: str) -> dict[str, float]:
    means = {name: float(np.mean(numbers(getattr(x, factor)))) for name, x in layers.items()}
    return {name: value if value else np.nan for name, value in means.items()}


def _over_image(attention: np.ndarray, patches: tuple[int, int]) -> np.ndarray:
    """Attention [queries, keys] ↦ attention over the image [rows, columns]."""
    extra = attention.shape[1] - patches[0] * patches[1]
    if extra not in (0, 1):
        raise ValueError(
            f"`attention_maps` arranges the keys as `patches` of an image, after at most one class "
            f"token, and {attention.shape[1]} keys are not {patches[0]} × {patches[1]}. Pass the "
            "rows and columns of patches."
        )
    received = attention[0, 1:] if extra else attention.mean(0)
    return received.reshape(patches)
