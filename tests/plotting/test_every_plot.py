"""Every plot: its documentation, axes, labels, legends and refusals."""

import inspect
import re

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba_array
from plotted_results import (
    aligned,
    blocks,
    by_size,
    divergence,
    draws,
    gap,
    kernel,
    legend_of,
    norms,
    pairs,
    perceptron,
    plane,
    plotting,
    profile,
    spectrum,
    steps,
    trajectory,
)
from plotted_results import flat_canvas as flat_canvas

from curvax import analysis

MANY = {
    "spectral_density": spectrum,
    "eigenvalues": pairs,
    "block_eigenvalues": blocks,
    "sharpness_profile": profile,
    "m_sharpness": by_size,
    "random_sharpness": draws,
    "ntk_spectrum": lambda scale=1.0: scale * kernel(),
    "gradient_angles": steps,
    "alignment": aligned,
    "block_norms": norms,
    "active_fraction": lambda scale=1.0: norms(scale / 10),
    "activation_norms": norms,
}
"""Plots of several runs on the same axes: name ↦ a result of some size."""

SINGLE = {
    "landscape": plane,
    "landscape_surface": plane,
    "landscapes": lambda: {"SGD": plane(), "SAM": plane(0.1)},
    "trajectory": trajectory,
    "surrogate_gap": lambda: {0: gap(0.2, 0.1), 10: gap(0.1, 0.1)},
    "ntk": kernel,
    "fisher_kl": lambda: {0.1: divergence(0.1), 1.0: divergence(1.0)},
    "attention_maps": lambda: {"attention": np.full((1, 2, 4, 4), 0.25)},
    "mlp_block_hessians": perceptron,
}
ARGUMENTS = {"attention_maps": ("attention",)}
NO_AXES = ("landscapes", "mlp_block_hessians")


def draw(name, result, **options):
    return getattr(plotting, name)(result, *ARGUMENTS.get(name, ()), **options)


def test_every_plot_is_tested():
    assert {*MANY, *SINGLE} == set(plotting.__all__)
    assert list(plotting.__all__) == sorted(plotting.__all__)


@pytest.mark.parametrize("name", plotting.__all__)
def test_every_plot_is_documented(name):
    draw = getattr(plotting, name)
    text = inspect.getdoc(draw) or ""
    sections = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert sections == ["Args", "Returns", "Raises", "Examples"]
    described = re.findall(r"^    (\w+): ", text.partition("Args:")[2], re.MULTILINE)
    assert {*inspect.signature(draw).parameters} <= {*described}


@pytest.mark.parametrize("name", plotting.__all__)
def test_plot_changes_no_settings_and_returns_its_axes(name):
    before = dict(matplotlib.rcParams)
    made = draw(name, {**MANY, **SINGLE}[name]())
    assert dict(matplotlib.rcParams) == before
    assert all(isinstance(ax, plt.Axes) for ax in np.ravel(np.array(made, dtype=object)))
    np.ravel(np.array(made, dtype=object))[0].figure.canvas.draw()


@pytest.mark.parametrize("name", [name for name in plotting.__all__ if name not in NO_AXES])
def test_axes_are_labelled(name):
    ax = draw(name, {**MANY, **SINGLE}[name]())
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert ax.get_xlabel()
    assert ax.get_ylabel() or {"embedding", "layer0"} & {*rows}


@pytest.mark.parametrize("name", [name for name in plotting.__all__ if name not in NO_AXES])
def test_given_axes_are_drawn_on(name):
    flat = {} if name != "landscape_surface" else {"projection": "3d"}
    figure, ax = plt.subplots(subplot_kw=flat)
    assert draw(name, {**MANY, **SINGLE}[name](), ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", MANY)
def test_one_call_for_several_runs_equals_a_call_for_each(name):
    make = MANY[name]
    together = draw(name, {"SGD": make(), "SAM": make(0.5)})
    apart = draw(name, make(0.5), label="SAM", ax=draw(name, make(), label="SGD"))
    assert legend_of(together) == legend_of(apart)
    assert len(legend_of(together)) == 2
    assert all(name in text for name, text in zip(("SGD", "SAM"), legend_of(together)))


@pytest.mark.parametrize("name", MANY)
def test_runs_differ_in_colour(name):
    ax = draw(name, {"SGD": MANY[name](), "SAM": MANY[name](0.5)})
    handles = ax.get_legend().legend_handles
    first, second = (tuple(np.ravel(colour_of(handle))) for handle in handles)
    assert first != second


def colour_of(handle):
    """Of a line, of the bars of a histogram, or of error bars."""
    get = getattr(handle, "get_color", None) or handle.get_facecolor
    return to_rgba_array(get())


@pytest.mark.parametrize("name", MANY)
def test_one_run_without_a_label_has_no_legend(name):
    if name != "ntk_spectrum":
        assert draw(name, MANY[name]()).get_legend() is None


@pytest.mark.parametrize("name", MANY)
def test_label_with_several_runs_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` takes `label` for one run alone"):
        draw(name, {"SGD": MANY[name]()}, label="all")


@pytest.mark.parametrize("name", plotting.__all__)
def test_results_of_another_type_are_refused(name):
    if name == "attention_maps":
        return
    with pytest.raises(TypeError, match=f"`{name}` draws what `.*` returns.* and got a `str`"):
        draw(name, "runs/sgd")


@pytest.mark.parametrize("name", ["block_eigenvalues", "m_sharpness", "mlp_block_hessians"])
def test_results_of_another_type_inside_a_run_are_refused(name):
    inside = {"SGD": {**MANY, **SINGLE}[name](), "SAM": {"block": 1.0}}
    with pytest.raises(TypeError, match=rf"`{name}` draws what `{name}` returns.*`float`"):
        draw(name, inside)


@pytest.mark.parametrize("name", MANY)
def test_plot_without_runs_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` got nothing to draw"):
        draw(name, {})


def test_results_of_the_analysis_can_be_drawn():
    objective = lambda w: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w["w"] ** 2)
    point, direction = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, 0.0, 0.0])}
    found = analysis.landscape(objective, point, direction, span=1.0, points=3)
    np.testing.assert_allclose(plotting.landscape(found).lines[0].get_ydata(), [5, 6, 9])
    drawn = plotting.block_norms(analysis.block_norms(point)).lines[0]
    np.testing.assert_allclose(drawn.get_xdata(), [3**0.5])
