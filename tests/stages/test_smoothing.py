"""`spatial_average`, `ema_rms` and `every` against averages written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagonals import given_diagonal, show_diagonal
from small_problems import assert_trees_close, flat, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.parameter_roles.roles import convolution


def changed(stages: cx.Stage, diagonal: Any) -> Any:
    """The diagonal after some stages."""
    tx = given_diagonal() | stages | show_diagonal
    return tx.update(diagonal, tx.init(diagonal), diagonal, diagonal=diagonal)[0]


def steps_of(tx: cx.Stage, diagonals: Any) -> np.ndarray:
    """The updates at each step of a pipe that receives these diagonals, one entry each."""
    tx, x = tx | show_diagonal, jnp.zeros(1)

    def step(state: Any, d: Any) -> Any:
        shown, state = tx.update(x, state, x, diagonal=d, value_fn=jnp.sum)
        return state, shown[0]

    return np.asarray(quick_jit(lambda d: jax.lax.scan(step, tx.init(x), d)[1])(diagonals[:, None]))


# Averages over neighbours.

N = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.array(N.normal(size=shape))


@pytest.mark.parametrize(
    ("module", "shape", "bias", "axes"),
    [
        ("Conv_0", (3, 3, 2, 4), (4,), (0, 1)),
        ("conv1", (3, 3, 2, 4), None, (0, 1)),
        ("conv_1d", (5, 2, 4), (4,), (0,)),
        ("Conv_3d", (2, 3, 3, 2, 4), (4,), (0, 1, 2)),
        ("ScannedConv", (6, 3, 3, 2, 4), (6, 4), (1, 2)),
        ("Dense_0", (3, 4), (4,), ()),
        ("query", (6, 2, 3), (2, 3), ()),
        ("blocks", (6, 3, 4), (6, 4), ()),
    ],
)
def test_spatial_average_auto_averages_convolution_windows_alone(module, shape, bias, axes):
    leaves = {"kernel": normal(*shape)}
    if bias is not None:
        leaves["bias"] = normal(*bias)
    found = changed(cx.spatial_average(), {module: leaves})[module]
    size = np.abs(leaves["kernel"])
    expected = np.broadcast_to(size.mean(axis=axes, keepdims=True) if axes else size, shape)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-14)
    if bias is not None:
        np.testing.assert_array_equal(found["bias"], np.abs(leaves["bias"]))


def test_spatial_average_averages_each_leaf_alone():
    # Of leaves in a row each has its own values, those of rank 3 included.
    leaves = {f"conv_{i}": {"kernel": normal(*s)} for i, s in enumerate([(3, 2, 4), (3, 2, 4)])}
    found = changed(cx.spatial_average(), leaves)
    for name, leaf in leaves.items():
        expected = np.abs(leaf["kernel"]).mean(axis=0, keepdims=True)
        np.testing.assert_allclose(found[name]["kernel"], np.broadcast_to(expected, (3, 2, 4)))


def blocks_last(rows: np.ndarray, block: int) -> np.ndarray:
    """Means over contiguous blocks of the row-major entries."""
    return np.repeat(rows.reshape(-1, block).mean(axis=1), block).reshape(rows.shape)


@pytest.mark.parametrize(
    ("path", "shape", "to_rows"),
    [
        (("dense", "kernel"), (6, 4), (1, 0)),
        (("conv", "kernel"), (3, 3, 2, 4), (3, 0, 1, 2)),
        (("query", "kernel"), (6, 2, 3), (1, 2, 0)),
        (("embed", "embedding"), (5, 6), (0, 1)),
        (("of_unknown_role", "kernel"), (2, 3, 4), (2, 0, 1)),
    ],
)
def test_integer_block_averages_blocks_along_the_inputs(path, shape, to_rows):
    d = normal(*shape)
    projection = lambda: {"kernel": normal(6, 2, 3), "bias": normal(2, 3)}
    tree: Any = {name: projection() for name in ("query", "key", "value")}
    tree.setdefault(path[0], {})[path[1]] = d
    found = changed(cx.spatial_average(2), tree)[path[0]][path[1]]
    expected = blocks_last(np.abs(d).transpose(to_rows), 2).transpose(np.argsort(to_rows))
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_integer_block_leaves_vectors_unchanged():
    d = {"bias": normal(3), "scale": normal()}
    assert_trees_close(changed(cx.spatial_average(2), d), jax.tree.map(jnp.abs, d), tol=0)


def test_callable_block_decides_for_each_leaf():
    d = {"a": normal(4, 3), "b": normal(6), "c": normal(2, 2)}
    blocks: dict[str, Any] = {"a": (0,), "b": 3, "c": None}
    rule = lambda path, leaf: blocks[path[0]]
    found = changed(cx.spatial_average(rule), d)
    size = jax.tree.map(np.abs, d)
    np.testing.assert_allclose(
        found["a"], np.broadcast_to(size["a"].mean(0, keepdims=True), (4, 3)), rtol=1e-14
    )
    np.testing.assert_allclose(found["b"], blocks_last(size["b"], 3), rtol=1e-14)
    np.testing.assert_array_equal(found["c"], size["c"])


def test_spatial_average_of_signed_values_may_cancel():
    d = {"conv": {"kernel": jnp.array([1.0, -1.0, 3.0]).reshape(3, 1, 1)}}
    signed = changed(cx.spatial_average(magnitudes=False), d)["conv"]["kernel"]
    np.testing.assert_allclose(signed.ravel(), np.ones(3))
    sizes = changed(cx.spatial_average(), d)["conv"]["kernel"]
    np.testing.assert_allclose(sizes.ravel(), np.full(3, 5 / 3))


def test_spatial_average_of_none_changes_nothing():
    d = {"conv": {"kernel": normal(3, 3, 2, 2)}}
    assert_trees_close(changed(cx.spatial_average(None, magnitudes=False), d), d, tol=0)


def test_spatial_average_prefers_a_layout_to_names():
    params = {"stem": {"kernel": normal(2, 3, 4)}}
    size = jax.tree.map(jnp.abs, params)
    with pytest.warns(UserWarning, match=r"does not average over a window of `stem/kernel`"):
        assert_trees_close(changed(cx.spatial_average(), params), size, tol=0)
    layout = {("stem", "kernel"): convolution(1)}
    found = changed(cx.spatial_average(layout=layout), params)["stem"]["kernel"]
    mean = np.mean(size["stem"]["kernel"], axis=0, keepdims=True)
    np.testing.assert_allclose(found, np.broadcast_to(mean, (2, 3, 4)), rtol=1e-14)


@pytest.mark.parametrize("block", [0, -2, 2.5, True, "rows"])
def test_block_of_a_wrong_kind_is_refused(block):
    with pytest.raises(ValueError, match=r"'auto', a positive int, None, or a callable"):
        cx.spatial_average(block)


def test_a_block_that_does_not_divide_names_leaf_size_and_block():
    with pytest.raises(ValueError, match=r"blocks of 5.*12 entries of `dense/kernel` \(4, 3\)"):
        changed(cx.spatial_average(5), {"dense": {"kernel": normal(4, 3)}})


def test_axes_that_a_leaf_lacks_are_refused():
    with pytest.raises(ValueError, match=r"axes \(2,\) of `a`, which has shape \(2, 2\)"):
        changed(cx.spatial_average(lambda path, leaf: (2,)), {"a": normal(2, 2)})


# Averages over steps.

SEQUENCE = np.array([1.0, -3.0, 0.5, 2.0, -1.0, 4.0, 0.25])


def rms_so_far(sequence: np.ndarray, decay: float) -> np.ndarray:
    """√( (1-β) Σᵢ βᵗ⁻ⁱ Dᵢ² / (1-βᵗ) ) at each t, by the sum itself."""
    out = []
    for t in range(1, len(sequence) + 1):
        weights = (1 - decay) * decay ** np.arange(t - 1, -1, -1)
        out.append(np.sqrt((weights * sequence[:t] ** 2).sum() / (1 - decay**t)))
    return np.array(out)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_ema_rms_is_its_formula(decay):
    np.testing.assert_allclose(
        steps_of(given_diagonal() | cx.ema_rms(decay), SEQUENCE),
        rms_so_far(SEQUENCE, decay),
        rtol=1e-12,
    )


def test_ema_rms_at_decay_zero_is_the_magnitude():
    np.testing.assert_allclose(
        steps_of(given_diagonal() | cx.ema_rms(0.0), SEQUENCE), np.abs(SEQUENCE), rtol=1e-15
    )


def test_ema_rms_follows_a_schedule_of_decays():
    decays = np.array([0.9, 0.5, 0.0, 0.7, 0.99, 0.2, 0.5])
    table = jnp.array(decays)
    found = steps_of(given_diagonal() | cx.ema_rms(lambda step: table[step]), SEQUENCE)
    for t in range(len(SEQUENCE)):
        # Each square keeps (1-β) of its step and the β of all later ones.
        weights = [(1 - decays[i]) * decays[i + 1 : t + 1].prod() for i in range(t + 1)]
        expected = np.average(SEQUENCE[: t + 1] ** 2, weights=weights)
        np.testing.assert_allclose(found[t], np.sqrt(expected), rtol=1e-12)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_ema_rms_refuses_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"`decay` in .* got {decay}"):
        cx.ema_rms(decay)


def every_of(k: Any, stages: Any = None) -> cx.Stage:
    """`every` around an estimator that takes the diagonal from the extra arguments."""
    return cx.every(k, given_diagonal() if stages is None else given_diagonal() | stages)


HELD = SEQUENCE[[0, 0, 0, 3, 3, 3, 6]]


@pytest.mark.parametrize("k", [3, jnp.array(3)])
def test_every_hands_on_the_kept_diagonal(k):
    np.testing.assert_array_equal(steps_of(every_of(k), SEQUENCE), HELD)


def test_kept_diagonal_enters_a_later_average_at_each_step():
    found = steps_of(every_of(3) | cx.ema_rms(0.9), SEQUENCE)
    np.testing.assert_allclose(found, rms_so_far(HELD, 0.9), rtol=1e-12)


def test_average_inside_every_counts_refreshes_alone():
    found = steps_of(every_of(3, cx.ema_rms(0.9)), SEQUENCE)
    refreshed = rms_so_far(SEQUENCE[::3], 0.9)
    np.testing.assert_allclose(found, refreshed[[0, 0, 0, 1, 1, 1, 2]], rtol=1e-12)


def test_a_kept_step_changes_neither_gradient_nor_inner_state():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    tx = cx.every(2, cx.hutchinson_diag() | cx.ema_rms(0.9))
    _, grads = objective.value_and_grad(params)
    updates, refreshed = tx.update(grads, tx.init(params), params, value_fn=objective)
    assert updates is grads
    updates, kept = tx.update(grads, refreshed, params, value_fn=objective)
    assert updates is grads
    assert (refreshed.step, kept.step) == (1, 2)
    assert_trees_close((kept.diagonal, kept.inner), (refreshed.diagonal, refreshed.inner), tol=0)
    _, again = tx.update(grads, kept, params, value_fn=objective)
    assert np.abs(flat(again.diagonal) - flat(kept.diagonal)).max() > 1e-3


def test_every_refuses_zero_steps():
    with pytest.raises(ValueError, match=r"`k` as a positive integer, and got 0"):
        cx.every(0, cx.hutchinson_diag())
