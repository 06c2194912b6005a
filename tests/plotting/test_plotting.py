"""Pictures show the numbers that they are given, on the axes they are given; nothing else moves."""

import inspect
import re
from typing import Any

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm, to_rgba_array

from curvax import analysis
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
    matplotlib.use("agg")
    yield
    plt.close("all")


def filled(kind: Any, **fields: Any) -> Any:
    """A result of which a picture needs these fields alone."""
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


def line(scale=1.0):
    x = jnp.linspace(-1, 1, 9)
    return Landscape(scale * (1 + x**2), (x,))


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
"""What can be drawn run beside run on one axes: name ↦ a result of some size."""

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


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def labelled(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles))


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


def test_spectral_density_is_that_of_the_quadrature():
    found = spectrum()
    ax = plotting.spectral_density(found, width=0.5)
    grid, mean = ax.lines[0].get_data()
    expected, error = found.density.smoothed(jnp.asarray(grid), 0.5)
    shown = mean > ax.get_ylim()[0]
    np.testing.assert_allclose(mean[shown], expected[shown], rtol=1e-12)
    top = ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float((expected + error).max()))
    assert ax.get_yscale() == "log"


def test_every_peak_of_the_density_is_visible():
    nodes = jnp.array([[0.0, 1.0, 100.0]])
    density = SpectralDensity(nodes, jnp.array([[1 - 1e-6, 1e-6 - 1e-8, 1e-8]]))
    ax = plotting.spectral_density(density)
    grid, mean = ax.lines[0].get_data()
    assert mean[np.abs(grid - 100).argmin()] > 5 * ax.get_ylim()[0]


def test_runs_share_the_smoothing_width_of_the_density():
    ax = plotting.spectral_density({"SGD": spectrum(), "SAM": spectrum(0.1)})
    grids = [line.get_xdata() for line in ax.lines]
    np.testing.assert_array_equal(*grids)
    width = 0.01 * 11.5
    expected, _ = spectrum(0.1).density.smoothed(jnp.asarray(grids[1]), width)
    assert ax.lines[1].get_ydata().max() == pytest.approx(float(expected.max()))


def test_eigenvalues_are_hollow_where_not_converged():
    ax = plotting.eigenvalues(pairs(converged=(True, False, True)))
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [8, 4, 2])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [4])
    assert ax.lines[1].get_markerfacecolor() == "white"
    (bars,) = ax.collections
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [7.2, 8.8])


@pytest.mark.parametrize(("sign", "scale"), [(1.0, "log"), (-1.0, "linear")])
def test_scale_is_logarithmic_where_all_values_are_positive(sign, scale):
    ax = plotting.eigenvalues(pairs())
    assert plotting.eigenvalues(pairs(sign), ax=ax).get_yscale() == scale


def test_blocks_are_rows_from_the_top():
    ax = plotting.block_eigenvalues({"SGD": blocks(), "SAM": blocks(0.5, converged=False)})
    first, second, hollow = ax.lines
    assert list(first.get_ydata(orig=True)) == ["embedding", "block_0", "head"]
    np.testing.assert_array_equal(first.get_xdata(), [4, 1, 9])
    np.testing.assert_array_equal(second.get_xdata(), [2, 0.5, 4.5])
    np.testing.assert_array_equal(hollow.get_xdata(), [2, 0.5, 4.5])
    assert hollow.get_markerfacecolor() == "white"
    assert ax.yaxis_inverted()
    (joined,) = ax.collections
    np.testing.assert_array_equal(joined.get_segments()[0][:, 0], [2, 4])


def test_block_missing_in_one_run_leaves_the_rows_in_place():
    fewer = {name: x for name, x in blocks(0.5).items() if name != "block_0"}
    ax = plotting.block_eigenvalues({"SGD": blocks(), "SAM": fewer})
    np.testing.assert_array_equal(ax.lines[1].get_ydata(orig=False), [0, 2])


def test_active_fractions_are_shown_from_zero_to_one():
    ax = plotting.active_fraction(norms(0.1))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.4, 0.1, 0.9])
    assert ax.get_xlim() == (0, 1)
    assert ax.get_xscale() == "linear"


def test_landscape_of_a_line_is_a_curve():
    ax = plotting.landscape(line(0.5), label="SAM", ax=plotting.landscape(line(), label="SGD"))
    for drawn, scale in zip(ax.lines, (1, 0.5)):
        np.testing.assert_allclose(drawn.get_xdata(), line().coordinates[0])
        np.testing.assert_allclose(drawn.get_ydata(), line(scale).losses)
    assert legend_of(ax) == ["SGD", "SAM"]


def test_landscape_of_a_plane_has_its_first_direction_to_the_right():
    x, y = jnp.linspace(0, 1, 4), jnp.linspace(0, 2, 6)
    ax = plotting.landscape(Landscape(x[:, None] + 0 * y[None], (x, y)))
    levels = ax.collections[0].levels
    assert (levels[0], levels[-1]) == (0, 1)
    upright = [path.vertices[:, 0] for path in ax.collections[1].get_paths() if len(path.vertices)]
    assert all(np.ptp(column) < 1e-12 for column in upright)
    assert ax.get_xlim() == (0, 1)
    assert ax.get_ylim() == (0, 2)


@pytest.mark.parametrize("surface", [False, True])
def test_landscapes_share_one_scale(surface):
    panels = plotting.landscapes({"SGD": plane(), "SAM": plane(0.1)}, surface=surface)
    ends = [ax.collections[0].get_clim() for ax in panels]
    assert ends[0] == ends[1]
    low, high = np.log10([0.01, 5.1]) if surface else (0.01, 5.1)
    np.testing.assert_allclose(ends[0], (low, high))
    assert [ax.get_title() for ax in panels] == ["SGD", "SAM"]
    if surface:
        np.testing.assert_allclose([ax.get_zlim() for ax in panels], [(low, high)] * 2)


def test_lines_side_by_side_share_their_limits():
    panels = plotting.landscapes({"SGD": line(), "SAM": line(0.1)})
    assert panels[0].get_ylim() == panels[1].get_ylim()


@pytest.mark.parametrize(("logarithmic", "expected"), [(None, True), (True, True), (False, False)])
def test_a_plane_that_spans_a_factor_of_ten_is_logarithmic(logarithmic, expected):
    ax = plotting.landscape(plane(), logarithmic=logarithmic)
    assert isinstance(ax.collections[0].norm, LogNorm) is expected
    flat = Landscape(plane().losses + 10, plane().coordinates)
    assert not isinstance(plotting.landscape(flat).collections[0].norm, LogNorm)


def test_limits_are_the_given_ones():
    ax = plotting.landscape(plane(), limits=(0.5, 2.0), logarithmic=False)
    assert ax.collections[0].get_clim() == (0.5, 2.0)
    assert ax.collections[0].extend == "both"
    solid = plotting.landscape_surface(plane(), limits=(0.5, 2.0), logarithmic=False)
    assert solid.get_zlim() == (0.5, 2.0)


def test_infinite_and_nan_losses_are_left_blank():
    broken = plane().losses.at[0, 0].set(jnp.inf).at[1, 1].set(jnp.nan)
    ax = plotting.landscape(Landscape(broken, plane().coordinates))
    assert ax.collections[0].get_clim()[1] == pytest.approx(float(plane().losses.max()))
    with pytest.raises(ValueError, match="smaller `span=`"):
        plotting.landscape(Landscape(jnp.full((7, 5), jnp.nan), plane().coordinates))


def test_constant_landscape_is_drawn():
    plotting.landscape(Landscape(jnp.ones((7, 5)), plane().coordinates)).figure.canvas.draw()


def test_surfaces_refuse_lines_flat_axes_and_mixed_dimensions():
    with pytest.raises(ValueError, match=r"`plotting\.landscape`"):
        plotting.landscape_surface(line())
    with pytest.raises(TypeError, match="three-dimensional axes"):
        plotting.landscape_surface(plane(), ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="lines or planes"):
        plotting.landscapes({"SGD": plane(), "SAM": line()})


def test_trajectory_is_drawn_on_its_landscape():
    below = plotting.landscape(plane())
    ax = plotting.trajectory(trajectory(), ax=below)
    assert ax is below
    path, start, end = ax.lines[-3:]
    np.testing.assert_array_equal(path.get_xydata(), trajectory().coordinates)
    np.testing.assert_array_equal(start.get_xydata(), [[0.9, 0.5]])
    np.testing.assert_array_equal(end.get_xydata(), [[0, 0]])
    assert "70 %" in ax.get_xlabel()
    assert "20 %" in ax.get_ylabel()


def test_trajectory_along_one_direction_is_refused():
    with pytest.raises(ValueError, match="k=2"):
        plotting.trajectory(filled(Trajectory, coordinates=jnp.zeros((3, 1))))


def test_sharpness_profile_takes_results_or_numbers():
    ax = plotting.sharpness_profile({"SGD": profile(), "SAM": ([0.1, 0.2], [0.5, 1.5])})
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 3], [0.5, 1.5]]
    assert list(ax.lines[0].get_xdata()) == [0.1, 0.2]


def test_m_sharpness_shows_the_standard_error_over_groups():
    ax = plotting.m_sharpness(by_size())
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[4, 2.5], [16, 2.0]])
    half = float(np.std([1, 2, 3, 4], ddof=1) / 2)
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [2.5 - half, 2.5 + half])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "16"]


def test_surrogate_gap_shows_eigenvalue_estimates_and_the_gap_on_the_right():
    gaps = {0: gap(0.2, 0.1), 10: gap(0.1, 0.1)}
    ax = plotting.surrogate_gap(gaps, {0: 30.0, 10: jnp.array([15.0])})
    plain, corrected, true = (labelled(ax)[name] for name in legend_of(ax))
    np.testing.assert_allclose(plain.get_xydata(), [[0, 40], [10, 20]])
    np.testing.assert_allclose(corrected.get_ydata(), [38, 18])
    np.testing.assert_allclose(true.get_ydata(), [30, 15])
    (right,) = ax.child_axes
    ax.figure.canvas.draw()
    np.testing.assert_allclose(right.get_ylim(), 0.005 * np.array(ax.get_ylim()))
    assert "ρ = 0.1" in right.get_ylabel()


def test_gaps_of_several_radii_have_no_common_axis():
    ax = plotting.surrogate_gap({0.1: gap(0.2, 0.1), 0.2: gap(0.2, 0.2)}, xlabel="radius ρ")
    assert not ax.child_axes
    assert ax.get_xlabel() == "radius ρ"


def test_named_runs_are_dots_without_lines():
    ax = plotting.surrogate_gap({"SGD": gap(0.2, 0.1), "SAM": gap(0.1, 0.1)})
    assert {line.get_linestyle() for line in ax.lines} == {"None"}
    assert ax.get_xlabel() == ""


def test_random_sharpness_histogram_counts_all_draws_and_shows_mean_and_error():
    ax = plotting.random_sharpness({"SGD": draws(), "SAM": draws(0.1)})
    bars, errors = ax.containers[::2], ax.containers[1::2]
    assert [sum(bar.get_height() for bar in drawn) for drawn in bars] == [4, 4]
    for (_, _, (drawn,)), found in zip(errors, (draws(), draws(0.1))):
        ends = found.value - found.standard_error, found.value + found.standard_error
        np.testing.assert_allclose(drawn.get_segments()[0][:, 0], ends)


def test_random_sharpness_of_a_single_draw_is_drawn():
    one = RandomSharpness(jnp.array(0.2), jnp.array(jnp.nan), jnp.array(1.0), jnp.array([0.2]))
    plotting.random_sharpness(one).figure.canvas.draw()


def test_ntk_is_shown_as_a_matrix():
    gram = kernel()
    (image,) = plotting.ntk(gram).images
    np.testing.assert_allclose(image.get_array(), gram.reshape(6, 6))
    highest = float(jnp.abs(gram).max())
    assert image.get_clim() == (-highest, highest)
    assert plotting.ntk(jnp.abs(gram[:, 0, :, 0])).images[0].get_clim()[0] == 0


def test_ntk_spectrum_is_that_of_the_matrix():
    gram = kernel()
    values = np.linalg.eigvalsh(np.asarray(gram).reshape(6, 6))[::-1]
    ax = plotting.ntk_spectrum({"kernel": gram, "values": jnp.asarray(values[::-1].copy())})
    for drawn in ax.lines:
        np.testing.assert_allclose(drawn.get_ydata(), values)
    assert legend_of(ax)[0] == f"kernel, κ = {values[0] / values[-1]:.3g}"


def test_singular_ntk_has_an_infinite_condition_number():
    ax = plotting.ntk_spectrum(jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 1, np.nan])
    assert legend_of(ax) == ["κ = inf"]


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2, 3)])
def test_array_that_is_not_a_kernel_is_refused(shape):
    with pytest.raises(ValueError, match="draws a kernel"):
        plotting.ntk(jnp.ones(shape))


def test_gradient_angles_are_in_degrees():
    ax = plotting.gradient_angles({"SGD": steps(), "SAM": ([0, 10], [0.1, 0.2])})
    for drawn in ax.lines:
        np.testing.assert_allclose(drawn.get_ydata(), np.degrees([0.1, 0.2]))


def test_alignment_grows_to_its_share():
    (drawn,) = plotting.alignment(aligned()).lines
    np.testing.assert_allclose(drawn.get_ydata(), [0.36, 0.61, 0.62])
    assert drawn.get_ydata()[-1] == pytest.approx(float(aligned().share))


def test_divergences_are_drawn_with_their_fisher_form():
    ax = plotting.fisher_kl({0.1: divergence(0.1), 1.0: divergence(1.0)}, label="SAM")
    assert legend_of(ax) == ["SAM: ½ dᵀF d", "SAM: KL(θ ‖ θ + d)", "SAM: KL(θ + d ‖ θ)"]
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.1, 0.011], [1.0, 2.0]])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_attention_maps_show_a_matrix_or_an_image():
    weights = np.random.default_rng(0).random((2, 3, 5, 5))
    shown = lambda **options: np.asarray(
        plotting.attention_maps({"a": weights}, "a", **options).images[0].get_array()
    )
    np.testing.assert_allclose(shown(), weights[0].mean(0))
    np.testing.assert_allclose(shown(example=1, head=2), weights[1, 2])
    of_token = weights[0].mean(0)[0, 1:].reshape(2, 2)
    np.testing.assert_allclose(shown(patches=(2, 2)), of_token)
    over_queries = weights[0].mean((0, 1)).reshape(1, 5)
    np.testing.assert_allclose(shown(patches=(1, 5)), over_queries)


def test_attention_maps_refuse_other_layers_and_patches():
    maps = {"a": np.ones((1, 1, 5, 5))}
    with pytest.raises(ValueError, match="knows the layers `a`"):
        plotting.attention_maps(maps, "b")
    with pytest.raises(ValueError, match="5 keys are not 3 × 3"):
        plotting.attention_maps(maps, "a", patches=(3, 3))


def test_mlp_block_hessians_have_a_panel_for_each_factor():
    panels = plotting.mlp_block_hessians({"SGD": perceptron(), "SAM": perceptron(0.1)})
    assert panels.shape == (2, 3)
    largest, bend, active = panels[0, 0], panels[1, 1], panels[1, 2]
    np.testing.assert_allclose(largest.lines[0].get_xdata(), [2, 2])
    np.testing.assert_allclose(largest.lines[1].get_xdata(), [0.2, 0.2])
    np.testing.assert_allclose(bend.lines[0].get_xdata(), [1, np.nan])
    np.testing.assert_allclose(active.lines[0].get_xdata(), [0.5, 0.5])
    assert [text.get_text() for text in panels[0, 0].figure.legends[0].get_texts()] == [
        "SGD",
        "SAM",
    ]


def test_results_of_the_analysis_can_be_drawn():
    objective = lambda w: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w["w"] ** 2)
    point, direction = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, 0.0, 0.0])}
    found = analysis.landscape(objective, point, direction, span=1.0, points=3)
    np.testing.assert_allclose(plotting.landscape(found).lines[0].get_ydata(), [5, 6, 9])
    drawn = plotting.block_norms(analysis.block_norms(point)).lines[0]
    np.testing.assert_allclose(drawn.get_xdata(), [3**0.5])
