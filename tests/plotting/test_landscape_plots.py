"""Landscapes and trajectories: their axes, scales and limits."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm
from plotted_results import filled, legend_of, plane, plotting, trajectory
from plotted_results import flat_canvas as flat_canvas

from curvax.analysis import Landscape, Trajectory


def line(scale=1.0):
    x = jnp.linspace(-1, 1, 9)
    return Landscape(scale * (1 + x**2), (x,))


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
