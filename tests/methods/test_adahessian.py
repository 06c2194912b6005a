"""AdaHessian's stages: estimates without bias, averages over the right weights, exact cases."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import (
    assert_trees_close,
    dense_hessian,
    flat,
    net_batch,
    net_loss,
    net_params,
    quick_jit,
)

import curvax as cx
from curvax.parameter_roles.roles import convolution

show_diagonal = cx.stage(
    lambda params: (), lambda s, state, params, **_: (s._replace(updates=s.diagonal), state)
)
"""Hands the diagonal out as the updates."""


def given_diagonal() -> cx.Stage:
    """An estimator that takes the diagonal from the extra arguments."""

    def rule(signal: cx.Signal, state: Any, params: Any, *, diagonal: Any, **_: Any) -> Any:
        return signal._replace(diagonal=diagonal), state

    return cx.stage(lambda params: (), rule)


def diagonal_of(estimator: cx.Stage, params: Any, value_fn: Any) -> Any:
    tx = estimator | show_diagonal
    return tx.update(params, tx.init(params), params, value_fn=value_fn)[0]


def changed(stages: cx.Stage, diagonal: Any) -> Any:
    """What stages make of a diagonal."""
    tx = given_diagonal() | stages | show_diagonal
    return tx.update(diagonal, tx.init(diagonal), diagonal, diagonal=diagonal)[0]


def steps_of(tx: cx.Stage, diagonals: Any) -> np.ndarray:
    """What comes out at each step of a pipe that is given these diagonals, one entry each."""
    tx, x = tx | show_diagonal, jnp.zeros(1)

    def step(state: Any, d: Any) -> Any:
        shown, state = tx.update(x, state, x, diagonal=d, value_fn=jnp.sum)
        return state, shown[0]

    return np.asarray(quick_jit(lambda d: jax.lax.scan(step, tx.init(x), d)[1])(diagonals[:, None]))


# The estimate.

# Off its diagonal as large as on it; leaves of equal shape, so that a probe shared by all of them
# would give row sums: (3, 4) for the 2 and 3 in the corner.
COUPLED = np.array([[2.0, 1.0, 0.5, 0.0], [1.0, 3.0, 0.0, -1.0], [0.5, 0.0, -1.0, 2.0],
                    [0.0, -1.0, 2.0, 1.5]])  # fmt: skip
LEAVES = {name: jnp.array([x]) for name, x in zip("abcd", (0.1, 0.2, 0.3, 0.4))}


def quadratic(params: Any) -> jax.Array:
    x = jnp.concatenate([params[name] for name in "abcd"])
    return 0.5 * x @ COUPLED @ x


def quadratic_over_examples(params: Any, batch: Any) -> jax.Array:
    """The same loss, each example with a share of the coupling of its own."""
    return jnp.mean(batch) * quadratic(params)


KEYS = jax.random.split(jax.random.key(11), 1000)


def many_diagonals(make: Any, value_fn: Any = quadratic) -> np.ndarray:
    """Estimates for many keys, [keys, 4]."""
    one = lambda key: diagonal_of(make(key), LEAVES, value_fn)
    return np.concatenate(list(quick_jit(jax.vmap(one))(KEYS).values()), axis=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(probes=3),
        dict(sampler=cx.gaussian_probe),
        dict(mode="reverse-over-reverse"),
    ],
    ids=["signs", "several probes", "normals", "reverse-over-reverse"],
)
def test_hutchinson_diag_is_unbiased_on_a_coupled_matrix(options):
    found = many_diagonals(lambda key: cx.hutchinson_diag(key, **options))
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(error > 0)
    assert np.all(np.abs(found.mean(axis=0) - np.diag(COUPLED)) < 4 * error)


def test_hutchinson_diag_has_the_variance_of_rademacher_probes():
    # Var (z ⊙ Az)ᵢ = Σ_{j≠i} Aᵢⱼ² for independent signs: neither one key nor one sign for all.
    expected = (COUPLED**2).sum(axis=1) - np.diag(COUPLED) ** 2
    found = many_diagonals(cx.hutchinson_diag).var(axis=0, ddof=1)
    np.testing.assert_allclose(found, expected, rtol=0.2)
    several = many_diagonals(lambda key: cx.hutchinson_diag(key, probes=4)).var(axis=0, ddof=1)
    np.testing.assert_allclose(several, expected / 4, rtol=0.2)


def test_hutchinson_probes_are_plus_and_minus_one():
    linear_in_pairs = lambda params: params["a"][0] * params["b"][0]
    found = many_diagonals(cx.hutchinson_diag, linear_in_pairs)[:, 0]
    assert set(np.unique(found)) == {-1.0, 1.0}
    assert abs(found.mean()) < 4 / np.sqrt(len(found))


def test_hutchinson_diag_is_exact_on_a_diagonal_hessian():
    params = net_params()
    quartic = lambda p: sum(jnp.sum(x**4) for x in jax.tree.leaves(p))
    expected = jax.tree.map(lambda x: 12 * x**2, params)
    for key in range(3):
        assert_trees_close(diagonal_of(cx.hutchinson_diag(key), params, quartic), expected)
    relative = cx.hutchinson_diag(probes=3)
    _, state = relative.update(params, relative.init(params), params, value_fn=quartic)
    assert cx.diagnostics(state)["diagonal_relative_error"] < 1e-12


@pytest.mark.parametrize("shards", [1, 4])
def test_relative_error_of_several_probes_is_their_standard_error(shards):
    value_fn = cx.Objective(quadratic_over_examples, jnp.ones(4))

    def run(key: jax.Array) -> Any:
        tx = cx.hutchinson_diag(key, probes=3, shards=shards) | show_diagonal
        diagonal, state = tx.update(LEAVES, tx.init(LEAVES), LEAVES, value_fn=value_fn)
        return optax.tree.norm(diagonal), cx.diagnostics(state)["diagonal_relative_error"]

    norm, relative = quick_jit(jax.vmap(run))(KEYS)
    variance = np.asarray((norm * relative) ** 2)
    expected = ((COUPLED**2).sum() - (np.diag(COUPLED) ** 2).sum()) / (3 * shards)
    error = variance.std(ddof=1) / np.sqrt(len(variance))
    assert abs(variance.mean() - expected) < 4 * error


def test_one_probe_records_no_standard_error():
    tx = cx.hutchinson_diag()
    _, state = tx.update(LEAVES, tx.init(LEAVES), LEAVES, value_fn=quadratic)
    assert cx.diagnostics(state) == {}


def test_probes_depend_on_key_and_step():
    tx = cx.hutchinson_diag(5) | show_diagonal
    start = tx.init(net_params())
    step = lambda state: tx.update(
        net_params(), state, net_params(), value_fn=cx.Objective(net_loss, net_batch())
    )
    first, state = step(start)
    second, _ = step(state)
    assert_trees_close(step(start)[0], first, tol=0)
    assert np.abs(flat(first) - flat(second)).max() > 1e-3
    typed = diagonal_of(
        cx.hutchinson_diag(jax.random.key(5)), net_params(), cx.Objective(net_loss, net_batch())
    )
    assert_trees_close(typed, first, tol=0)


def test_sampler_replaces_the_rademacher_probes():
    ones = lambda key, tree: jax.tree.map(jnp.ones_like, tree)
    objective = cx.Objective(net_loss, net_batch())
    found = diagonal_of(cx.hutchinson_diag(sampler=ones), net_params(), objective)
    rows = dense_hessian(objective, net_params()).sum(axis=1)
    np.testing.assert_allclose(flat(found), rows, rtol=1e-10, atol=1e-10)


def test_fraction_takes_the_first_part_of_the_batch():
    whole, half = cx.Objective(net_loss, net_batch(8)), cx.Objective(net_loss, net_batch(8))
    half = half.on(jax.tree.map(lambda x: x[:4], net_batch(8)))
    tx = cx.hutchinson_diag(fraction=0.5)
    assert_trees_close(
        diagonal_of(tx, net_params(), whole), diagonal_of(cx.hutchinson_diag(), net_params(), half)
    )
    # The gradient stays that of the whole batch.
    _, grads = whole.value_and_grad(net_params())
    updates, _ = tx.update(grads, tx.init(net_params()), net_params(), value_fn=whole)
    assert_trees_close(updates, grads, tol=0)


def test_hutchinson_diag_with_shards_is_the_mean_over_shards():
    key = jax.random.key(5)
    objective = cx.Objective(net_loss, net_batch(8))
    found = diagonal_of(cx.hutchinson_diag(key, shards=4), net_params(), objective)
    parts = []
    for i in range(4):
        z = cx.rademacher(jax.random.fold_in(jax.random.fold_in(key, 0), i), net_params())
        part = objective.on(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], net_batch(8)))
        parts.append(flat(z) * flat(cx.hvp(part, net_params())(z)))
    np.testing.assert_allclose(flat(found), np.mean(parts, axis=0), rtol=1e-12)


def test_shards_keep_the_estimate_unbiased_and_divide_its_variance():
    value_fn = cx.Objective(quadratic_over_examples, jnp.ones(4))
    one = many_diagonals(cx.hutchinson_diag, value_fn)
    several = many_diagonals(lambda key: cx.hutchinson_diag(key, shards=4), value_fn)
    error = several.std(axis=0, ddof=1) / np.sqrt(len(several))
    assert np.all(np.abs(several.mean(axis=0) - np.diag(COUPLED)) < 4 * error)
    np.testing.assert_allclose(several.var(axis=0), one.var(axis=0) / 4, rtol=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(probes=0), r"`probes` as a positive integer"),
        (dict(shards=0), r"`shards` as a positive integer"),
        (dict(fraction=0.0), r"`fraction` in \(0, 1\], and got 0\.0"),
        (dict(fraction=1.5), "got 1.5"),
    ],
)
def test_hutchinson_diag_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cx.hutchinson_diag(**options)


def test_shards_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"`hutchinson_diag\(shards=3\)`.* 8 examples"):
        diagonal_of(
            cx.hutchinson_diag(shards=3), net_params(), cx.Objective(net_loss, net_batch(8))
        )


# Sharing the gradient.


def test_sharing_the_gradient_gives_the_same_update():
    tx = cx.adahessian(0.1, block=None)

    @quick_jit
    def both(params: Any) -> Any:
        shared, apart = (cx.Objective(net_loss, net_batch()) for _ in range(2))
        _, grads = shared.value_and_grad(params)
        one, _ = tx.update(grads, tx.init(params), params, value_fn=shared)
        other, _ = tx.update(jax.grad(apart)(params), tx.init(params), params, value_fn=apart)
        return one, other

    assert_trees_close(*both(net_params()))


def test_hutchinson_diag_never_replaces_a_different_gradient():
    objective, tx = cx.Objective(net_loss, net_batch()), cx.hutchinson_diag()
    params = net_params()
    _, grads = objective.value_and_grad(params)
    elsewhere = jax.tree.map(lambda x: x + 1, params)
    own, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
    assert_trees_close(own, grads)
    assert own["out"]["kernel"] is not grads["out"]["kernel"]
    clipped = optax.tree.scale(0.5, grads)
    for given, at in ((clipped, params), (grads, elsewhere)):
        kept, _ = tx.update(given, tx.init(params), at, value_fn=objective)
        assert kept is given


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


# Preconditioning, and the whole method.


@pytest.mark.parametrize(
    "options",
    [dict(power=1.0), dict(power=0.5, eps=1e-3), dict(power=0.3, eps=0.1, damping=0.2),
     dict(power=0.0, eps=0.1)],
    ids=str,
)  # fmt: skip
def test_scale_by_power_divides_updates_by_a_power_of_the_diagonal(options):
    d, u = jnp.array([0.5, 2.0, 0.0]), jnp.array([1.0, -2.0, 3.0])
    tx = given_diagonal() | cx.scale_by_power(**options)
    found, _ = tx.update(u, tx.init(u), u, diagonal=d)
    k, eps, damping = options["power"], options.get("eps", 1e-8), options.get("damping", 0.0)
    np.testing.assert_allclose(found, u / ((d + damping) ** k + eps), rtol=1e-12)


def test_scale_by_power_follows_a_schedule_of_powers():
    u = jnp.array([1.0])
    tx = given_diagonal() | cx.scale_by_power(lambda step: 1 / (1 + step), eps=0.0)
    state, found = tx.init(u), []
    for _ in range(2):
        out, state = tx.update(u, state, u, diagonal=jnp.array([4.0]))
        found.append(out[0])
    np.testing.assert_allclose(found, [1 / 4, 1 / 2])


@pytest.mark.parametrize("options", [dict(power=1.1), dict(power=1, eps=-1.0),
                                     dict(power=1, damping=-1.0)])  # fmt: skip
def test_scale_by_power_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"`scale_by_power` takes"):
        cx.scale_by_power(**options)


def run(tx: Any, params: Any, make_objective: Any, steps: int = 4) -> Any:
    """The parameters after each step, stacked."""

    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        objective = make_objective(i)
        _, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps))[1])(params)


def separable(i: Any) -> cx.Objective:
    """Σ aᵢ x⁴ with a Hessian that probes read exactly, and that moves with the step."""
    scale = 1.0 + 0.1 * i
    loss = lambda p: scale * sum(jnp.sum((1 + jnp.arange(x.size).reshape(x.shape)) * x**4)
                                 for x in jax.tree.leaves(p))  # fmt: skip
    return cx.Objective(loss)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(b1=0.5, b2=0.9, eps=1e-2, power=0.5),
        dict(weight_decay=0.1, mask={"conv": {"kernel": True, "bias": False}}),
        dict(every=2),
        dict(b2=0.0, block=None),
    ],
    ids=["defaults", "numbers", "decay", "every", "bare"],
)
def test_adahessian_is_its_equations(options):
    """Against a loop in NumPy, by Algorithm 1 of the paper and the conventions of its code."""
    start = {"conv": {"kernel": normal(3, 3, 2, 2) / 3, "bias": normal(2)}}
    found = run(cx.adahessian(0.02, **options), start, separable)
    b1, b2 = options.get("b1", 0.9), options.get("b2", 0.999)
    eps, power = options.get("eps", 1e-4), options.get("power", 1.0)
    for name, leaf in start["conv"].items():
        x, m, v = np.array(leaf), 0.0, 0.0
        a = 1 + np.arange(x.size).reshape(x.shape)
        for t in range(4):
            scale = 1 + 0.1 * t
            m = b1 * m + (1 - b1) * 4 * scale * a * x**3
            if t % options.get("every", 1) == 0:
                d = 12 * scale * a * x**2
                if name == "kernel" and options.get("block", "auto") == "auto":
                    d = np.broadcast_to(d.mean(axis=(0, 1), keepdims=True), d.shape)
            v = b2 * v + (1 - b2) * d**2
            denominator = np.sqrt(v / (1 - b2 ** (t + 1))) ** power + eps
            decay = options.get("weight_decay", 0.0) * x if name == "kernel" else 0.0
            x = x - 0.02 * (m / (1 - b1 ** (t + 1)) / denominator + decay)
            np.testing.assert_allclose(found["conv"][name][t], x, rtol=1e-11, atol=1e-13)


def test_adahessian_is_its_pipe():
    spelled = (
        cx.hutchinson_diag(3, probes=2) | cx.spatial_average(2) | cx.ema_rms(0.9) | optax.ema(0.8)
        | cx.scale_by_power(0.5, eps=1e-3) | optax.scale_by_learning_rate(0.1)
    )  # fmt: skip
    method = cx.adahessian(0.1, 0.8, 0.9, eps=1e-3, power=0.5, block=2, probes=2, key=3)
    objective = lambda i: cx.Objective(net_loss, net_batch())
    assert_trees_close(run(method, net_params(), objective), run(spelled, net_params(), objective))


def test_adahessian_at_power_zero_is_gradient_descent_with_momentum():
    plain = optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(0.1 / (1 + 1e-4)))
    objective = lambda i: cx.Objective(net_loss, net_batch())
    flat_method = cx.adahessian(0.1, power=0.0)
    assert_trees_close(
        run(flat_method, net_params(), objective), run(plain, net_params(), objective)
    )


# Leaves without curvature.


def embedded_loss(params: Any, batch: Any) -> jax.Array:
    rows = params["embed"]["embedding"][batch["word"]]
    logits = jnp.tanh(rows) @ params["dense"]["kernel"] + params["dense"]["bias"][None, :]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


EMBEDDED = {
    "embed": {"embedding": normal(5, 3)},
    "dense": {"kernel": normal(3, 2), "bias": normal(2)},
}
WORDS = {"word": jnp.array([0, 3, 3, 1]), "label": jnp.array([0, 1, 0, 1])}


def test_partition_trains_the_embedding_by_adagrad_and_the_rest_by_adahessian():
    labels = {"embed": "table", "dense": "rest"}
    parts = {"table": optax.adagrad(0.3), "rest": cx.adahessian(0.1, key=2)}
    found = run(cx.partition(parts, labels), EMBEDDED, lambda i: cx.Objective(embedded_loss, WORDS))

    table, dense = EMBEDDED["embed"], EMBEDDED["dense"]
    table_state, dense_state = parts["table"].init(table), parts["rest"].init(dense)
    for t in range(4):
        whole = {"embed": table, "dense": dense}
        grads = jax.grad(embedded_loss)(whole, WORDS)
        alone = lambda dense, table=table: embedded_loss({"embed": table, "dense": dense}, WORDS)
        to_table, table_state = parts["table"].update(grads["embed"], table_state, table)
        to_dense, dense_state = parts["rest"].update(
            grads["dense"], dense_state, dense, value_fn=alone
        )
        table = optax.apply_updates(table, to_table)
        dense = optax.apply_updates(dense, to_dense)
        reached = jax.tree.map(lambda x, t=t: x[t], found)
        assert_trees_close(reached, {"embed": table, "dense": dense}, tol=1e-11)


def test_partition_refuses_a_label_without_stages_at_init():
    with pytest.raises(ValueError, match="nothing"):
        cx.partition({"a": optax.sgd(0.1)}, {"embed": "a", "dense": "nothing"}).init(EMBEDDED)
