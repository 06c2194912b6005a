"""What goes on inside of a network ↦ a row for each block, a panel for each factor, a map."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from curvax.analysis import MlpBlockHessian
from curvax.plotting.canvas import LARGEST, axes_or_new, clean, mappings_of, numbers, runs_of
from curvax.plotting.rows import draw_rows

FACTORS = {
    "largest": f"{LARGEST} of the block",
    "input_norm": "inputs, ‖a‖₂",
    "weight_norm": "weights above, ‖W‖₂",
    "slope_norm": "slopes, ‖B‖$_F$",
    "bend_norm": "bends, ‖D‖$_F$",
    "active": "active units (share)",
}


def block_norms(norms: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The 2-norm of the weights (or of a gradient, or an update) in each block.

    Args:
        norms: `{block: norm}` of `block_norms`, or `{run: that}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes, a row for each block.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    return _rows(norms, ax, label, "block_norms", "norm ‖·‖₂ of the block")


def active_fraction(shares: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The share of active units at each activation.

    Chen, Hsieh & Gong, arXiv:2106.01548, Fig. 2.

    Args:
        shares: `{layer: share}` of `active_fraction`, or `{run: that}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes, a row for each activation, from 0 to 1.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    ax = _rows(shares, ax, label, "active_fraction", "share of active units")
    ax.set_xscale("linear")
    ax.set_xlim(0, 1)
    return ax


def activation_norms(norms: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The norm of what comes out of each activation, a mean over examples.

    Args:
        norms: `{layer: norm}` of `activation_norms`, or `{run: that}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes, a row for each activation.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    return _rows(norms, ax, label, "activation_norms", "norm ‖a‖₂ of the activations")


def attention_maps(
    maps: Mapping[str, Any],
    layer: str,
    *,
    example: int = 0,
    head: int | None = None,
    patches: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What every token of one example attends to, or where in its image the attention goes.

    Chen, Hsieh & Gong, arXiv:2106.01548, section 4.4.

    Args:
        maps: `{layer: [n, heads, queries, keys]}` of `attention_maps`.
        layer: which of them.
        example: which example.
        head: which head; their mean by default.
        patches: (rows, columns) of the image in patches: an image of what the class token attends
            to where there is one before the patches, of the mean over queries where not. By
            default the whole map.
        ax: where to; new axes by default.

    Returns:
        The axes, with a colour bar.

    Raises:
        ValueError: no such layer, or the patches are not as many as the keys.
    """
    if layer not in maps:
        raise ValueError(
            f"`attention_maps` knows the layers {', '.join(f'`{name}`' for name in maps)}, and was "
            f"asked for `{layer}`. Name one of them."
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


def mlp_block_hessians(results: Any, *, label: str | None = None) -> np.ndarray:
    """λ_max of each layer's block beside the sizes of what makes it up: which of them fell.

    Chen, Hsieh & Gong, arXiv:2106.01548, eq. 3 and 4, Table 3.

    Args:
        results: `{layer: MlpBlockHessian}` of `mlp_block_hessians`, or `{run: that}`.
        label: of one run in the legend.

    Returns:
        The axes, [2, 3], in a figure of their own: means over examples, a row for each layer.
        Factors that are 0, as the bends of the last layer, are left out.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
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
    """[queries, keys] ↦ [rows, columns]"""
    extra = attention.shape[1] - patches[0] * patches[1]
    if extra not in (0, 1):
        raise ValueError(
            f"`attention_maps` lays the keys out as `patches` of an image, with at most a class "
            f"token before them, and {attention.shape[1]} keys are not {patches[0]} × {patches[1]}."
            " Pass the rows and columns of patches."
        )
    received = attention[0, 1:] if extra else attention.mean(0)
    return received.reshape(patches)
