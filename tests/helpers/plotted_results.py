"""Small results of every measure, to be plotted."""

from typing import Any

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from curvax import plotting as pictures
from curvax.analysis import (
    Alignment,
    BlockEigenvalue,
    FisherKL,
    GradientAngle,
    Landscape,
    MlpBlockHessian,
    MSharpness,
    RandomSharpness,
    Sharpness,
    Spectrum,
    SurrogateGap,
    Trajectory,
)
from curvax.linalg import Eigenpairs, SpectralDensity

plotting: Any = pictures
"""Without the types of matplotlib, which know of no array that it is one."""


@pytest.fixture(autouse=True)
def flat_canvas():
    """Draws without a screen, in every module that imports it."""
    matplotlib.use("agg")
    yield
    plt.close("all")


def filled(kind: Any, **fields: Any) -> Any:
    """A result with these fields alone, those that a plot needs."""
    return kind(**{name: fields.get(name) for name in kind._fields})


def spectrum(scale=1.0):
    nodes = scale * jnp.array([[-1.0, 0.0, 2.0, 10.0], [-1.5, 0.1, 2.0, 9.0]])
    weights = jnp.array([[0.1, 0.8, 0.09, 0.01], [0.1, 0.8, 0.08, 0.02]])
    return Spectrum(SpectralDensity(nodes, weights), nodes.max(), nodes.min(), jnp.array(5.0))


def pairs(scale=1.0, converged=(True, True, True)):
    values = scale * jnp.array([8.0, 4.0, 2.0])
    bars = dict(residuals=0.1 * values, converged=jnp.array(converged))
    return filled(Eigenpairs, values=values, **bars)


def blocks(scale=1.0, converged=True):
    one = lambda x: BlockEigenvalue(jnp.array(scale * x), jnp.array(0.0), jnp.array(converged))
    return {"embedding": one(4.0), "block_0": one(1.0), "head": one(9.0)}


def norms(scale=1.0):
    return {name: x.value for name, x in blocks(scale).items()}


def plane(scale=1.0):
    x, y = jnp.linspace(-1, 1, 7), jnp.linspace(-2, 2, 5)
    return Landscape(scale * (0.1 + x[:, None] ** 2 + y[None] ** 2), (x, y))


def trajectory():
    return filled(
        Trajectory,
        coordinates=jnp.array([[0.9, 0.5], [0.4, 0.6], [0.0, 0.0]]),
        explained=jnp.array([0.7, 0.2]),
    )


def profile(scale=1.0):
    return [0.1, 0.2], [filled(Sharpness, value=jnp.array(scale * x)) for x in (1.0, 3.0)]


def by_size(scale=1.0):
    groups = {4: jnp.array([1.0, 2.0, 3.0, 4.0]), 16: jnp.array([2.0])}
    return {m: MSharpness(scale * g.mean(), scale * g) for m, g in groups.items()}


def gap(h, rho):
    estimates = dict(sigma_max=2 * h / rho**2, sigma_max_corrected=2 * (h - rho * 0.1) / rho**2)
    return filled(SurrogateGap, gap=h, **estimates)


def draws(scale=1.0):
    rises = scale * jnp.array([-0.1, 0.2, 0.3, 0.8])
    return RandomSharpness(rises.mean(), jnp.std(rises, ddof=1) / 2, jnp.array(0.75), rises)


def kernel():
    jacobian = np.random.default_rng(0).normal(size=(6, 9))
    return jnp.asarray((jacobian @ jacobian.T).reshape(3, 2, 3, 2))


def aligned(scale=1.0):
    cosines = scale * jnp.array([0.6, -0.5, 0.1])
    return Alignment(jnp.sum(cosines**2), cosines)


def divergence(d):
    return FisherKL(jnp.array(d**2), jnp.array(d**2 + d**3), jnp.array(d**2 - d**3 / 2))


def perceptron(scale=1.0):
    def layer(bend):
        sizes = dict(largest=scale, input_norm=scale, slope_norm=scale, bend_norm=bend)
        by_example = {name: jnp.array([x, 3 * x]) for name, x in sizes.items()}
        shared = dict(weight_norm=jnp.array(2.0), active=jnp.array([0.25, 0.75]))
        return filled(MlpBlockHessian, **by_example, **shared)

    return {"layer0": layer(0.5), "layer1": layer(0.0)}


def steps(scale=1.0):
    angles = [scale * x for x in (0.1, 0.2)]
    return [0, 10], [filled(GradientAngle, angle=jnp.array(x)) for x in angles]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]
