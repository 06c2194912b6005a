"""The figures of a report: their measures, sections, captions, drawings and alternative texts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from curvax import plotting
from curvax.inspection.measures import DEVIATION, RHO
from curvax.inspection.phrasing import listing
from curvax.plotting.canvas import clean

Runs = Mapping[str, Any]
"""Run ↦ the result of a measure."""


class FigureSpec(NamedTuple):
    """How one figure is made."""

    name: str
    measure: str
    section: str
    caption: str
    draw: Callable[..., Any]  # {run: result} ↦ axes of one figure
    alt: Callable[[Runs], str]
    also: str | None = None  # a second measure, whose results `draw` takes as its second argument


def _fields(runs: Runs, pick: Callable[[Any], Any]) -> dict[str, Any]:
    return {run: pick(result) for run, result in runs.items()}


def _numbers(what: str, pick: Callable[[Any], Any], form: str = "{:.3g}") -> Callable[[Runs], str]:
    """An alternative text: a description, and the main number of every run."""
    return lambda runs: f"{what} {listing(_fields(runs, lambda r: float(pick(r))), form)}."


def _over_radii(runs: Runs) -> Axes:
    ax = plotting.sharpness_profile(_fields(runs, lambda r: (list(r), list(r.values()))))
    ax.set(xscale="log", yscale="log")
    return ax


def _angles(runs: Runs) -> Axes:
    ax = plotting.gradient_angles(_fields(runs, lambda r: (list(r), list(r.values()))))
    ax.set(xscale="log", xlabel="radius ρ")
    return ax


def _gaps(runs: Runs, eigenpairs: Runs) -> np.ndarray:
    panels = _panels(len(runs), sharey=True)
    for ax, (run, gaps) in zip(panels, runs.items()):
        largest = eigenpairs.get(run)
        every = None if largest is None else dict.fromkeys(gaps, largest.values)
        plotting.surrogate_gap(gaps, every, xlabel="radius ρ", ax=ax)
        ax.set_xscale("log")
        ax.set_title(run, fontsize="medium")
        ax.label_outer()
    if all(np.nanmin(line.get_ydata()) > 0 for ax in panels for line in ax.lines):
        panels[0].set_yscale("log")
    _legend_below(panels)
    return panels


def _lines(runs: Runs) -> Axes:
    ax = None
    for run, slices in runs.items():
        ax = plotting.landscape(slices.line, ax=ax, label=run)
    assert ax is not None
    ax.set_xlabel("distance along the top eigenvector")
    return ax


def _attention(runs: Runs) -> np.ndarray:
    """A row per run, a column per layer: the mean over heads for the first example."""
    columns = max(map(len, runs.values()))
    size = (2.9 * columns + 0.4, 2.6 * len(runs) + 0.2)
    _, panels = plt.subplots(len(runs), columns, figsize=size, squeeze=False, layout="constrained")
    highest = max(float(x[0].mean(0).max()) for maps in runs.values() for x in maps.values())
    for row, (run, maps) in zip(panels, runs.items()):
        for ax, layer in zip(row, maps):
            plotting.attention_maps(maps, layer, ax=ax)
            ax.images[0].set_clim(0, highest)
            ax.set_title(f"{run}\n{layer}", fontsize="small")
    return panels


def _kernel_spectra(runs: Runs) -> Axes:
    ax = plotting.ntk_spectrum(_fields(runs, lambda r: r.eigenvalues))
    ax.legend(loc="upper right", frameon=False, fontsize="small")  # falling curves leave it free
    return ax


def _panels(count: int, **shared: Any) -> np.ndarray:
    size = (3.3 * count + 0.6, 3.4)
    _, panels = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained", **shared)
    return np.array([clean(ax) for ax in panels[0]])


def _legend_below(panels: np.ndarray) -> None:
    """One legend for all panels."""
    handles = panels[0].get_legend_handles_labels()
    for ax in panels:
        ax.get_legend().remove()
    place = dict(loc="outside lower center", ncols=len(handles[0]), frameon=False)
    panels[0].figure.legend(*handles, **place)


FIGURES = (
    FigureSpec(
        "eigenvalues",
        "eigenpairs",
        "Spectrum",
        "The largest eigenvalues of the Hessian of the training loss by rank. Bars are residuals: "
        "an eigenvalue lies within each.",
        lambda runs: plotting.eigenvalues(runs),
        _numbers("Largest eigenvalues by rank. The first is", lambda r: r.values[0]),
    ),
    FigureSpec(
        "density",
        "spectrum",
        "Spectrum",
        "How the eigenvalues are spread, on a logarithmic scale: most are near 0, a few stand out. "
        "The band is the standard error over probes.",
        lambda runs: plotting.spectral_density(runs),
        _numbers("Spectral density. The spectrum ends at", lambda r: r.largest),
    ),
    FigureSpec(
        "blocks",
        "blocks",
        "Block by block",
        "λ_max of each block of the network alone: where the curvature is, and where the runs "
        "differ. Hollow dots did not converge.",
        lambda runs: plotting.block_eigenvalues(runs),
        _numbers(
            "Largest eigenvalue of every block. That of the sharpest is",
            lambda r: max(float(block.value) for block in r.values()),
        ),
    ),
    FigureSpec(
        "factors",
        "perceptron",
        "Block by block",
        "The factors of a block's λ_max: inputs, weights above, first and second derivatives of "
        "the activation, share of active units. Means over examples.",
        lambda runs: plotting.mlp_block_hessians(runs),
        _numbers(
            "λ_max of every layer and its factors. λ_max of the first layer is",
            lambda r: next(iter(r.values())).largest.mean(),
        ),
    ),
    FigureSpec(
        "sharpness",
        "sharpness",
        "Sharpness",
        "The largest rise of the loss within a radius of ρ, found by three steps of ascent.",
        _over_radii,
        _numbers(f"Sharpness over the radius. At ρ = {RHO} it is", lambda r: r[RHO].value),
    ),
    FigureSpec(
        "m_sharpness",
        "m_sharpness",
        "Sharpness",
        f"The mean sharpness of groups of m examples, each in a ball of its own of radius {RHO}.",
        lambda runs: plotting.m_sharpness(runs),
        _numbers("m-sharpness over m. At the least m it is", lambda r: r[min(r)].value),
    ),
    FigureSpec(
        "random_sharpness",
        "random_sharpness",
        "Sharpness",
        "The rise of the loss on test examples under random perturbations of standard deviation "
        f"{DEVIATION}.",
        lambda runs: plotting.random_sharpness(runs),
        _numbers("Rise of the test loss, draw by draw. The mean is", lambda r: r.value),
    ),
    FigureSpec(
        "surrogate_gap",
        "surrogate_gap",
        "Sharpness",
        "λ_max as the surrogate gap h estimates it, by 2h/ρ² and without the part that is the "
        "gradient's, next to λ_max by Lanczos. The smaller ρ, the more of h is ρ‖∇L‖.",
        _gaps,
        _numbers(f"Estimates of λ_max over ρ. At ρ = {RHO} 2h/ρ² is", lambda r: r[RHO].sigma_max),
        also="eigenpairs",
    ),
    FigureSpec(
        "line",
        "landscape",
        "Landscapes",
        "The training loss along the top eigenvector of each run's Hessian, a vector of length 1.",
        _lines,
        _numbers(
            "Training loss along the top eigenvector. At one end it is",
            lambda r: r.line.losses[-1],
        ),
    ),
    FigureSpec(
        "plane",
        "landscape",
        "Landscapes",
        "The training loss in a plane of two random directions, the same for all runs and each "
        "filter scaled to the norm of that filter of the weights. One scale for all.",
        lambda runs: plotting.landscapes(_fields(runs, lambda r: r.plane)),
        _numbers("Training loss in a plane. Its highest value is", lambda r: r.plane.losses.max()),
    ),
    FigureSpec(
        "surface",
        "landscape",
        "Landscapes",
        "The same planes as surfaces, at one scale of heights.",
        lambda runs: plotting.landscapes(_fields(runs, lambda r: r.plane), surface=True),
        _numbers("The same as surfaces. The lowest loss is", lambda r: r.plane.losses.min()),
    ),
    FigureSpec(
        "active",
        "inside",
        "Inside the network",
        "The share of units that are active, at each activation: the fewer, the flatter the loss "
        "in the weights before them.",
        lambda runs: plotting.active_fraction(_fields(runs, lambda r: r.active)),
        _numbers(
            "Share of active units at each activation. At the first it is",
            lambda r: next(iter(r.active.values())),
            "{:.0%}",
        ),
    ),
    FigureSpec(
        "activations",
        "inside",
        "Inside the network",
        "The norm of the output of each activation, a mean over examples.",
        lambda runs: plotting.activation_norms(_fields(runs, lambda r: r.norms)),
        _numbers(
            "Norm of the activations. At the first it is", lambda r: next(iter(r.norms.values()))
        ),
    ),
    FigureSpec(
        "weights",
        "weights",
        "Inside the network",
        "The norm of the weights of each block. Larger weights make the same radius smaller.",
        lambda runs: plotting.block_norms(runs),
        _numbers("Norm of the weights of each block. The largest is", lambda r: max(r.values())),
    ),
    FigureSpec(
        "attention",
        "attention",
        "Inside the network",
        "The attention of every token of the first example, a mean over heads. One scale for all.",
        _attention,
        _numbers(
            "Attention maps. The largest weight in the first layer is",
            lambda r: next(iter(r.values()))[0].mean(0).max(),
        ),
    ),
    FigureSpec(
        "alignment",
        "alignment",
        "The gradient",
        "How much of the gradient's squared length lies along the first eigenvectors.",
        lambda runs: plotting.alignment(runs),
        _numbers(
            "Share of the gradient in the top eigenspace. In the end it is",
            lambda r: r.share,
            "{:.0%}",
        ),
    ),
    FigureSpec(
        "angle",
        "gradient_angle",
        "The gradient",
        "The angle between the gradient and that at the worst point within ρ, on which SAM and "
        "GSAM depend.",
        _angles,
        _numbers(
            f"Angle between the gradients. At ρ = {RHO} it is in degrees",
            lambda r: np.degrees(r[RHO].angle),
            "{:.0f}",
        ),
    ),
    FigureSpec(
        "kernel",
        "kernel",
        "Neural tangent kernel",
        "The eigenvalues of the neural tangent kernel of the first training examples. The faster "
        "they fall, the more unevenly a network learns.",
        _kernel_spectra,
        _numbers("Spectrum of the neural tangent kernel. κ is", lambda r: r.condition.value),
    ),
)
