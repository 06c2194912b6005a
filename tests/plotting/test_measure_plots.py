"""Plots of sharpness, gaps, angles, norms and attention show their numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from plotted_results import (
    aligned,
    by_size,
    divergence,
    draws,
    gap,
    legend_of,
    norms,
    plotting,
    profile,
    steps,
)
from plotted_results import flat_canvas as flat_canvas

from curvax.analysis import RandomSharpness


def labelled(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles))


def test_active_fractions_are_shown_from_zero_to_one():
    ax = plotting.active_fraction(norms(0.1))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.4, 0.1, 0.9])
    assert ax.get_xlim() == (0, 1)
    assert ax.get_xscale() == "linear"


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
