"""Damping, trust regions and the steps that Levenberg-Marquardt undoes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import (
    assert_trees_close,
    flat,
    net,
    net_batch,
    net_params,
    quick_jit,
)

import curvax as cx


def objective(batch=None):
    return cx.Objective(cx.gaussian("y"), net_batch() if batch is None else batch, model=net)


def stepper(tx, value_fn):
    @quick_jit
    def step(params, state):
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return updates, state

    return step


def fisher_solve(rate=1.0, *more):
    return cx.pipe(
        cx.fisher_matvec(),
        cx.damp(),
        cx.solve(cx.dense()),
        *more,
        optax.scale_by_learning_rate(rate),
    )


def figure(state, name):
    return float(cx.diagnostics(state)[name])


# -- levenberg_marquardt -------------------------------------------------------------------------


def test_reduction_ratio_is_that_of_loss_and_quadratic_model():
    params, value_fn, lam = net_params(), objective(), 0.3
    tx = cx.levenberg_marquardt(fisher_solve(), lam)
    updates, state = stepper(tx, value_fn)(params, tx.init(params))
    delta, gradient = flat(updates), flat(jax.grad(value_fn)(params))
    matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params))
    np.testing.assert_allclose(
        delta, -np.linalg.solve(matrix + lam * np.eye(len(matrix)), gradient), rtol=1e-9
    )
    change = float(value_fn(optax.apply_updates(params, updates)) - value_fn(params))
    kl = 0.5 * delta @ matrix @ delta
    assert change < 0
    assert figure(state, "reduction_ratio") == pytest.approx(change / (gradient @ delta + kl))
    assert figure(state, "kl") == pytest.approx(kl)
    assert figure(state, "damping") == pytest.approx(lam)


def quadratic_value(params):
    return 0.5 * jnp.sum(jnp.array([1.0, 10.0]) * params["x"] ** 2)


def newton_on_quadratic(rate, *more):
    return cx.pipe(
        cx.hessian_matvec(),
        cx.damp(),
        cx.solve(cx.dense()),
        *more,
        optax.scale_by_learning_rate(rate),
    )


def test_accurate_model_lowers_the_damping_by_a_third():
    params = {"x": jnp.array([1.0, 2.0])}
    tx = cx.levenberg_marquardt(newton_on_quadratic(1.0), 3.0)
    state = tx.init(params)
    for t in range(4):
        updates, state = stepper(tx, cx.Objective(quadratic_value))(params, state)
        assert figure(state, "reduction_ratio") == pytest.approx(1)
        assert figure(state, "damping") == pytest.approx(3 * (2 / 3) ** t)
        params = optax.apply_updates(params, updates)


def poor_model(rate=1.0):
    """A curvature half of the truth and no damping to speak of: an undershooting model."""
    half = cx.stage(
        lambda params: optax.EmptyState(),
        lambda signal, state, params, **extra: (
            signal._replace(matvec=cx.Product(lambda v: optax.tree.scale(0.1, v))),
            state,
        ),
    )
    return cx.pipe(half, cx.damp(), cx.solve(cx.dense()), optax.scale_by_learning_rate(rate))


def bowl(params):
    return 0.5 * jnp.sum(params["x"] ** 2)


@pytest.mark.parametrize(
    ("rate", "factor"),
    # With x = 1 and λ = 0.9 the solution is x, and δ = -rate.
    [(1.0, 1.0), (1.8, 1.5), (2.5, 4.0), (0.1, 2 / 3)],
)
def test_damping_follows_the_reduction_ratio(rate, factor):
    params = {"x": jnp.array([1.0])}
    tx = cx.levenberg_marquardt(poor_model(rate), 0.9)
    _, state = stepper(tx, cx.Objective(bowl))(params, tx.init(params))
    change, model = 0.5 * (1 - rate) ** 2 - 0.5, -rate + 0.05 * rate**2
    assert figure(state, "reduction_ratio") == pytest.approx(change / model)
    assert float(state.next_damping) == pytest.approx(0.9 * factor)


def without_figures(states):
    bare = lambda s: s._replace(measured=(), figures={}) if hasattr(s, "figures") else s
    return tuple(map(bare, states))


def test_rejected_step_restores_the_state_and_repeated_ones_reset_it():
    """Momentum points uphill: the first rejection keeps it, the second forgets it."""
    params = {"x": jnp.array([1.0])}
    tx = cx.levenberg_marquardt(
        cx.pipe(
            cx.hessian_matvec(),
            cx.damp(),
            cx.solve(cx.dense()),
            optax.trace(0.9),
            optax.scale_by_learning_rate(1.0),
        ),
        1.0,
    )
    uphill = tx.init(params)
    trace = {"x": jnp.array([-50.0])}
    inner = (*uphill.inner[:3], uphill.inner[3]._replace(trace=trace), *uphill.inner[4:])
    state = uphill._replace(inner=inner)
    step = stepper(tx, cx.Objective(bowl))

    updates, first = step(params, state)
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert_trees_close(first.inner[3].trace, trace)
    assert figure(first, "damping") == 1.0
    assert float(first.next_damping) == 4.0
    assert figure(first, "kl") == 0

    updates, second = step(params, first)
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert figure(second, "damping") == 4.0
    assert_trees_close(without_figures(second.inner), without_figures(tx.init(params).inner))
    assert int(second.rejected) == 2
    assert float(second.next_damping) == 16.0

    updates, third = step(params, second)
    assert float(updates["x"][0]) == pytest.approx(-1 / 17)
    assert int(third.rejected) == 0


def test_without_reject_the_step_is_kept_and_the_damping_rises():
    params = {"x": jnp.array([1.0])}
    tx = cx.levenberg_marquardt(poor_model(2.5), 0.9, reject=False)
    updates, state = stepper(tx, cx.Objective(bowl))(params, tx.init(params))
    assert float(updates["x"][0]) == pytest.approx(-2.5)
    assert float(state.next_damping) == pytest.approx(3.6)


def test_a_step_to_nan_is_undone():
    params = {"x": jnp.array([1.0])}
    loss = lambda p: jnp.sum(jnp.sqrt(p["x"]))
    tx = cx.levenberg_marquardt(poor_model(10.0), 0.1)
    updates, state = stepper(tx, cx.Objective(loss))(params, tx.init(params))
    assert float(updates["x"][0]) == 0
    assert float(state.next_damping) == pytest.approx(0.4)


def test_at_the_minimum_no_step_is_rejected_and_the_damping_stays():
    params = {"x": jnp.array([1e-12, 0.0])}
    loss = lambda p: 1.0 + quadratic_value(p)
    tx = cx.levenberg_marquardt(newton_on_quadratic(1.0), 1.0)
    updates, state = stepper(tx, cx.Objective(loss))(params, tx.init(params))
    assert float(updates["x"][0]) == pytest.approx(-0.5e-12)
    assert float(state.next_damping) == 1.0


def test_damping_recovers_from_zero_and_from_infinity():
    """Neither a model that is always right nor a batch with NaN leads to 0 or ∞."""
    tx = cx.levenberg_marquardt(newton_on_quadratic(1.0), 2.0)
    params, state = {"x": jnp.array([1.0, 2.0])}, tx.init({"x": jnp.zeros(2)})

    @quick_jit
    def after(state, scale):
        def once(state, _):
            value_fn = cx.Objective(lambda p: scale * quadratic_value(p))
            _, grads = value_fn.value_and_grad(params)
            return tx.update(grads, state, params, value_fn=value_fn)[1], None

        return jax.lax.scan(once, state, length=120)[0]

    low = after(state, 1.0)
    assert float(low.next_damping) == pytest.approx(2e-10)
    high = after(low, jnp.nan)
    assert int(high.rejected) == 120
    assert float(high.next_damping) == pytest.approx(2e10)
    assert float(after(high, 1.0).next_damping) < 2e10


def test_levenberg_marquardt_diagnostics_have_names():
    params, tx = {"x": jnp.array([1.0, 2.0])}, cx.levenberg_marquardt(newton_on_quadratic(1.0), 3.0)
    _, state = stepper(tx, cx.Objective(quadratic_value))(params, tx.init(params))
    found = {name: float(optax.tree.get(state, name)) for name in cx.diagnostics(state)}
    assert found.pop("cg_residual") < 1e-15
    assert found.pop("kl") == pytest.approx(0.5 * (1 / 16 + 10 * (20 / 13) ** 2))
    assert found == pytest.approx(
        {
            "damping": 3.0,
            "reduction_ratio": 1.0,
            "cg_steps": 2.0,
            "cg_reason": float(cx.StopReason.direct),
        }
    )


def test_damping_settles_where_ratios_need_no_change():
    """On a net the damping ends where ratios lie between ¼ and ¾, or the model is faithful."""
    params, value_fn = net_params(), objective()
    tx = cx.levenberg_marquardt(fisher_solve(), 100.0)
    state, step, losses = tx.init(params), stepper(tx, value_fn), []
    for _ in range(40):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(value_fn(params)))
    assert all(b <= a * (1 + 1e-14) for a, b in itertools.pairwise(losses))
    assert float(state.next_damping) < 1e-3


def test_key_of_an_inner_stage_survives_rejection():
    params, value_fn = net_params(), objective()
    inner = cx.pipe(
        cx.fisher_matvec(samples=1),
        cx.damp(),
        cx.solve(cx.dense()),
        optax.scale_by_learning_rate(-1.0),
    )
    tx = cx.levenberg_marquardt(inner, 1.0)
    updates, state = stepper(tx, value_fn)(params, tx.init(params))
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.inner[0].step) == 0


def test_damping_can_be_passed_to_update():
    params, value_fn = net_params(), objective()
    tx = fisher_solve()
    grads = value_fn.value_and_grad(params)[1]
    given, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn, damping=0.7)
    fixed = cx.natural_gradient(damping=0.7, solver=cx.dense())
    expected, _ = fixed.update(grads, fixed.init(params), params, value_fn=value_fn)
    assert_trees_close(given, expected, 1e-13)


def test_several_damp_stages_add_up():
    params, value_fn = net_params(), objective()
    once, twice = (
        cx.pipe(cx.fisher_matvec(), *map(cx.damp, parts), cx.solve(cx.dense()))
        for parts in ([0.75], [0.5, 0.25])
    )
    expected, _ = stepper(once, value_fn)(params, once.init(params))
    updates, _ = stepper(twice, value_fn)(params, twice.init(params))
    assert_trees_close(updates, expected)


def test_damp_follows_a_schedule():
    params, value_fn = net_params(), objective()
    tx = cx.pipe(
        cx.fisher_matvec(),
        cx.damp(optax.linear_schedule(1.0, 3.0, 2)),
        cx.solve(cx.dense()),
    )
    state, step = tx.init(params), stepper(tx, value_fn)
    for lam in (1.0, 2.0, 3.0, 3.0):
        _, state = step(params, state)
        assert figure(state, "damping") == pytest.approx(lam)


# -- trust_region --------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-3, 0.1, 10.0, 1e4])
def test_trust_region_limits_the_length_of_a_step(radius):
    params, value_fn = net_params(), objective()
    plain = cx.natural_gradient(3.0, damping=0.01, solver=cx.dense())
    bound = cx.natural_gradient(3.0, damping=0.01, solver=cx.dense(), radius=radius)
    free, _ = stepper(plain, value_fn)(params, plain.init(params))
    updates, state = stepper(bound, value_fn)(params, bound.init(params))
    matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params))
    length = lambda d: np.sqrt(flat(d) @ matrix @ flat(d))
    scale = min(1.0, radius / length(free))
    assert length(updates) <= radius * (1 + 1e-12)
    assert_trees_close(updates, optax.tree.scale(scale, free), 1e-11)
    assert figure(state, "kl") == pytest.approx(0.5 * length(updates) ** 2)
    assert figure(state, "trust_scale") == pytest.approx(scale)


def test_trust_region_radius_bounds_the_divergence_of_predictions():
    """KL of unit Gaussians is ½ the mean squared distance of their means: ½ r² in the small."""
    params, value_fn, radius = net_params(), objective(), 1e-4
    tx = cx.natural_gradient(100.0, damping=0.01, solver=cx.dense(), radius=radius)
    updates, _ = stepper(tx, value_fn)(params, tx.init(params))
    moved = net(optax.apply_updates(params, updates), net_batch()) - net(params, net_batch())
    kl = 0.5 * float(jnp.mean(jnp.sum(moved**2, axis=1)))
    assert kl == pytest.approx(0.5 * radius**2, rel=1e-2)


def test_trust_region_follows_a_schedule():
    params, value_fn = net_params(), objective()
    tx = cx.fisher_matvec() | cx.trust_region(optax.linear_schedule(1e-3, 3e-3, 2))
    state, step = tx.init(params), stepper(tx, value_fn)
    for radius in (1e-3, 2e-3, 3e-3, 3e-3):
        _, state = step(params, state)
        assert figure(state, "kl") == pytest.approx(0.5 * radius**2)


def test_trust_region_passes_a_step_of_negative_curvature():
    params = {"x": jnp.array([1.0, 0.1])}
    loss = lambda p: 0.5 * jnp.sum(jnp.array([-1.0, 2.0]) * p["x"] ** 2)
    tx = cx.hessian_matvec() | cx.trust_region(1e-3)
    updates, state = stepper(tx, cx.Objective(loss))(params, tx.init(params))
    np.testing.assert_allclose(updates["x"], [-1.0, 0.2], rtol=1e-14)
    assert figure(state, "trust_scale") == 1
    assert figure(state, "kl") == pytest.approx(0.5 * (-1 + 2 * 0.04))


# -- quadratic_step ------------------------------------------------------------------------------


def test_quadratic_step_minimises_the_damped_model():
    params, value_fn, lam = net_params(), objective(), 0.5
    direction = cx.pipe(cx.fisher_matvec(), cx.damp(lam), cx.solve(cx.cg(1)))
    tx = direction | cx.quadratic_step() | optax.scale_by_learning_rate(1.0)
    state, step, last = tx.init(params), stepper(tx, value_fn), None
    for _ in range(3):
        matrix = np.asarray(cx.materialize(cx.fvp(value_fn, params), params))
        matrix = matrix + lam * np.eye(len(matrix))
        gradient = flat(jax.grad(value_fn)(params))
        raw, _ = stepper(direction, value_fn)(params, direction.init(params))
        basis = [flat(raw)] if last is None else [flat(raw), last]
        span = np.stack(basis, axis=1)
        best = span @ np.linalg.solve(span.T @ matrix @ span, span.T @ gradient)
        updates, state = step(params, state)
        np.testing.assert_allclose(flat(updates), -best, rtol=1e-8, atol=1e-12)
        params, last = optax.apply_updates(params, updates), best


def test_quadratic_step_without_momentum_is_the_exact_line_search():
    params, value_fn, lam = net_params(), objective(), 0.5
    tx = cx.pipe(
        cx.gauss_newton_matvec(),
        cx.damp(lam),
        cx.quadratic_step(momentum=False),
    )
    updates, state = stepper(tx, value_fn)(params, tx.init(params))
    matrix = np.asarray(cx.materialize(cx.ggnvp(value_fn, params), params)) + lam * np.eye(21)
    g = flat(jax.grad(value_fn)(params))
    alpha = g @ g / (g @ matrix @ g)
    np.testing.assert_allclose(flat(updates), alpha * g, rtol=1e-10)
    assert figure(state, "step_size") == pytest.approx(alpha)
    assert figure(state, "momentum") == 0


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("curvatures", [(-1.0, -2.0), (-1.0, 0.5)])
def test_quadratic_step_without_a_minimum_keeps_the_direction(momentum, curvatures):
    h = jnp.array(curvatures)
    tx = cx.hessian_matvec() | cx.quadratic_step(momentum=momentum)
    state = tx.init({"x": jnp.zeros(2)})
    step = stepper(tx, cx.Objective(lambda p: 0.5 * jnp.sum(h * p["x"] ** 2)))
    for x in (jnp.array([1.0, 0.1]), jnp.array([1.0, -0.3])):
        updates, state = step({"x": x}, state)
        np.testing.assert_allclose(updates["x"], h * x, rtol=1e-14)
        assert figure(state, "step_size") == 1
        assert figure(state, "momentum") == 0


def test_quadratic_step_keeps_updates_in_the_dtype_of_the_parameters():
    params = {"x": jnp.array([1.0, 0.1], jnp.bfloat16)}
    tx, value_fn = cx.hessian_matvec() | cx.quadratic_step(), cx.Objective(quadratic_value)
    state = tx.init(params)
    wide = {"x": jnp.array([1.0, 1.0], jnp.float32)}
    _, after = tx.update(wide, state, params, value_fn=value_fn)
    assert after[1].previous["x"].dtype == jnp.bfloat16


# -- errors --------------------------------------------------------------------------------------


def refuse(tx, match, error=ValueError):
    params, value_fn = net_params(), objective()
    grads = value_fn.value_and_grad(params)[1]
    with pytest.raises(error, match=match):
        tx.update(grads, tx.init(params), params, value_fn=value_fn)


def test_solving_stages_raise_with_what_to_write():
    refuse(cx.solve(cx.cg(3)) | optax.sgd(0.1), "fisher_matvec")
    refuse(cx.damp(0.1) | optax.sgd(0.1), "no earlier stage gave one")
    refuse(cx.fisher_matvec() | cx.damp(), "levenberg_marquardt")
    refuse(cx.levenberg_marquardt(cx.sam_perturb(0.1)), "quadratic model")
    refuse(
        cx.pipe(cx.fisher_matvec(), cx.damp(1.0), cx.solve(cx.cg(3, preconditioner=0.5))), "diag"
    )
    with pytest.raises(TypeError, match=r"cg\(20\)"):
        cx.solve("cg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`fisher_ascent`.*cg\(20\)"):
        cx.fisher_ascent(solver=cx.cg)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping"):
        cx.damp(-1.0)
    with pytest.raises(TypeError, match="`damp` takes `damping` as a number"):
        cx.damp("1e-3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stays 0"):
        cx.levenberg_marquardt(fisher_solve(), 0.0)
    own = lambda rate, solver: cx.natural_gradient(rate, solver=solver)
    with pytest.raises(TypeError, match=r'static_args=\("solver",\)'):
        optax.inject_hyperparams(own)(1.0, cx.cg(3)).init(net_params())
    with pytest.raises(ValueError, match="'hessian'"):
        cx.exact_diag("hesian")
    with pytest.raises(ValueError, match="lag"):
        cx.ema_mean(0.9, lag=2)


def test_plain_callable_raises_with_the_objective_to_pass():
    params = net_params()
    loss = lambda p: jnp.sum(net(p, net_batch()) ** 2)
    for estimator in (cx.fisher_matvec, cx.gauss_newton_matvec, cx.fisher_diag):
        tx = estimator() | optax.sgd(0.1)
        with pytest.raises(ValueError, match="model=predict"):
            tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    tx = cx.empirical_fisher_diag() | optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"Objective\(loss, batch\)"):
        tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
