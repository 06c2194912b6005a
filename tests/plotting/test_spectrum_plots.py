"""Spectral densities, eigenvalues, blocks and kernels show their numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from plotted_results import blocks, kernel, legend_of, pairs, perceptron, plotting, spectrum
from plotted_results import flat_canvas as flat_canvas

from curvax.linalg import SpectralDensity


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
