"""Natural gradient, Gauss-Newton and Newton steps against dense solves and recorded runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from small_problems import (
    assert_trees_close,
    dense_hessian,
    flat,
    net,
    net_batch,
    net_params,
    quick_jit,
)
from trajectories import load_problem, recorded

import curvax as cx


def objective(batch=None, likelihood=None, **options):
    batch = net_batch() if batch is None else batch
    return cx.Objective(likelihood or cx.gaussian("y"), batch, model=net, **options)


def one_step(tx, params, value_fn):
    """(updates, state) of the first step."""

    @quick_jit
    def step(params, state):
        _, grads = value_fn.value_and_grad(params)
        return tx.update(grads, state, params, value_fn=value_fn)

    return step(params, tx.init(params))


def gauss_newton_matrix(value_fn, params):
    """½‖y - f‖² averaged: Jᵀ J / n, from the Jacobian."""
    x, unravel = ravel_pytree(params)
    outputs = lambda v: net(unravel(v), value_fn.batch)
    jacobian = np.asarray(jax.jacfwd(outputs)(x))
    return np.einsum("ncp,ncq->pq", jacobian, jacobian) / len(jacobian)


SOLVERS = {
    "cg": cx.cg(200, tol=1e-13),
    "dense": cx.dense(),
    "row_space": cx.row_space(),
    "cg with a preconditioner": cx.cg(200, tol=1e-13, preconditioner=0.75),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_is_the_dense_solve(solver):
    params, value_fn = net_params(), objective()
    tx = cx.pipe(
        cx.empirical_fisher_diag(),
        cx.gauss_newton_matvec(),
        cx.damp(0.1),
        cx.solve(SOLVERS[solver]),
        optax.scale_by_learning_rate(0.5),
    )
    updates, state = one_step(tx, params, value_fn)
    matrix = gauss_newton_matrix(value_fn, params)
    gradient = flat(jax.grad(value_fn)(params))
    expected = -0.5 * np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), gradient)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-9, atol=1e-11)
    assert float(cx.diagnostics(state)["damping"]) == pytest.approx(0.1)
    assert float(cx.diagnostics(state)["cg_residual"]) < 1e-10


METHODS = {
    "natural_gradient": cx.natural_gradient,
    "gauss_newton": cx.gauss_newton,
    "newton_cg": cx.newton_cg,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_solve_with_their_matrix(name):
    params, value_fn = net_params(), objective()
    updates, _ = one_step(METHODS[name](1.0, damping=3.0, solver=cx.dense()), params, value_fn)
    hessian = name == "newton_cg"
    matrix = dense_hessian(value_fn, params) if hessian else gauss_newton_matrix(value_fn, params)
    gradient = flat(jax.grad(value_fn)(params))
    expected = -np.linalg.solve(matrix + 3.0 * np.eye(len(matrix)), gradient)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-10, atol=1e-12)


class Recorded:
    """A file of matrices and natural-gradient runs on one problem."""

    def __init__(self, path):
        self.arrays = np.load(path)
        self.problem = load_problem(path.stem.removeprefix("curvature_"))
        with jax.numpy_rank_promotion("allow"):
            self.batch = self.problem.batch()

    def objective(self):
        def model(params, batch):
            with jax.numpy_rank_promotion("allow"):
                return self.problem.logits(params, batch)

        return cx.Objective(cx.categorical("Y"), self.batch, model=model)

    def keys(self, start):
        names = {k.split("/")[1] for k in self.arrays if k.startswith(start + "/")}
        return sorted(names)


@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_natural_gradient_steps_are_the_recorded_solutions(path):
    run = Recorded(path)
    params, value_fn = run.problem.params, run.objective()
    for name in run.keys("ngd"):
        lam = float(name.removeprefix("lam"))
        updates, _ = one_step(cx.natural_gradient(damping=lam, solver=cx.dense()), params, value_fn)
        expected = run.arrays[f"ngd/{name}/solution"]
        found = -np.asarray(run.problem.flatten(updates))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_natural_gradient_by_cg_gives_the_recorded_iterates(path):
    run = Recorded(path)
    params, value_fn = run.problem.params, run.objective()
    iterates = run.arrays["ngd/lam0.1/cg_iterates"]
    for k in (1, 2, 5):
        solver = cx.cg(k, tol=0.0)
        updates, state = one_step(cx.natural_gradient(damping=0.1, solver=solver), params, value_fn)
        found = -np.asarray(run.problem.flatten(updates))
        scale = np.abs(iterates[k - 1]).max()
        np.testing.assert_allclose(found, iterates[k - 1], rtol=0, atol=1e-10 * scale)
        assert int(cx.diagnostics(state)["cg_steps"]) == k


@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_natural_gradient_follows_the_recorded_trajectories(path):
    run = Recorded(path)
    value_fn = run.objective()
    for name in run.keys("ngd_traj"):
        lam, rate = (float(part[2 + (i == 0) :]) for i, part in enumerate(name.split("_")))
        tx = cx.natural_gradient(rate, damping=lam, solver=cx.dense())

        @quick_jit
        def step(params, state, tx=tx):
            loss, grads = value_fn.value_and_grad(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return optax.apply_updates(params, updates), state, loss

        params, state = run.problem.params, tx.init(run.problem.params)
        thetas, losses = [params], []
        for _ in range(len(run.arrays[f"ngd_traj/{name}/loss"])):
            params, state, loss = step(params, state)
            thetas.append(params)
            losses.append(loss)
        found = np.stack([np.asarray(run.problem.flatten(p)) for p in thetas])
        np.testing.assert_allclose(found, run.arrays[f"ngd_traj/{name}/theta"], atol=1e-9)
        np.testing.assert_allclose(losses, run.arrays[f"ngd_traj/{name}/loss"], atol=1e-10)


def random_gradients(steps=6):
    draw = lambda key: jax.tree.map(lambda x: jax.random.normal(key, x.shape), net_params())
    return [draw(jax.random.key(i)) for i in range(steps)]


ADAPTIVE = {
    "adam": (
        lambda: cx.pipe(
            cx.squared_gradient(),
            cx.ema_mean(0.99),
            optax.ema(0.9),
            cx.scale_by_power(0.5, eps=1e-6),
        ),
        lambda: optax.scale_by_adam(0.9, 0.99, eps=1e-6),
    ),
    "adam with eps inside the root": (
        lambda: cx.pipe(
            cx.squared_gradient(),
            cx.ema_mean(0.99),
            optax.ema(0.9),
            cx.scale_by_power(0.5, eps=1e-6, damping=1e-3),
        ),
        lambda: optax.scale_by_adam(0.9, 0.99, eps=1e-6, eps_root=1e-3),
    ),
    "rmsprop": (
        lambda: cx.pipe(
            cx.squared_gradient(),
            cx.ema_mean(0.9, debias=False),
            cx.scale_by_power(0.5, eps=0.0, damping=1e-8),
        ),
        lambda: optax.scale_by_rms(0.9, eps=1e-8),
    ),
    "adagrad": (
        lambda: cx.pipe(
            cx.squared_gradient(),
            cx.accumulate(0.1),
            cx.scale_by_power(0.5, eps=0.0, damping=1e-7),
        ),
        lambda: optax.scale_by_rss(0.1, eps=1e-7),
    ),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_diagonal_pipes_are_the_adaptive_methods_of_optax(name):
    ours, theirs = (build() for build in ADAPTIVE[name])
    params = net_params()
    state, state_of_theirs = ours.init(params), theirs.init(params)
    for grads in random_gradients():
        updates, state = ours.update(grads, state, params)
        expected, state_of_theirs = theirs.update(grads, state_of_theirs, params)
        assert_trees_close(updates, expected, 1e-13)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "estimator", [cx.squared_gradient, cx.empirical_fisher_diag, cx.fisher_diag, cx.exact_diag]
)
def test_diagonal_pipe_divides_the_gradient_by_a_power_of_the_damped_diagonal(estimator, power):
    params, value_fn = net_params(), objective()
    lam = 40.0  # The exact Hessian diagonal is not positive everywhere.
    kept: dict[str, Any] = {}
    keep = cx.stage(
        lambda params: optax.EmptyState(),
        lambda signal, state, params, **extra: (kept.update(d=signal.diagonal), (signal, state))[1],
    )
    tx = estimator() | keep | cx.scale_by_power(power, eps=0.0, damping=lam)
    gradient = value_fn.value_and_grad(params)[1]
    updates, _ = tx.update(gradient, tx.init(params), params, value_fn=value_fn)
    expected = flat(gradient) * (flat(kept["d"]) + lam) ** -power
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-12)


def written_out(estimate):
    """Sophia with options far from the defaults."""
    return cx.pipe(
        cx.every(2, estimate | cx.ema_mean(0.7, debias=False)),
        cx.ema_mean(0.0, debias=False, lag=1),
        optax.ema(0.8),
        cx.clip_by_diagonal(0.3, eps=1e-3, threshold=0.2),
        optax.add_decayed_weights(0.1, is_kernel),
        optax.scale_by_learning_rate(0.05),
    )


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


SHARED: dict[str, Any] = dict(
    b1=0.8, b2=0.7, every=2, probes=3, key=5, weight_decay=0.1, mask=is_kernel
)
SOPHIA: dict[str, Any] = dict(SHARED, eps=1e-3, gamma=0.3, threshold=0.2)
PIPES = {
    "diagonal_natural_gradient": (
        lambda: cx.diagonal_natural_gradient(0.05, damping=0.2, power=0.6, **SHARED),
        lambda: cx.pipe(
            cx.every(2, cx.fisher_diag(5, probes=3)),
            cx.ema_mean(0.7),
            optax.ema(0.8),
            cx.scale_by_power(0.6, eps=0.0, damping=0.2),
            optax.add_decayed_weights(0.1, is_kernel),
            optax.scale_by_learning_rate(0.05),
        ),
    ),
    "sophia_h": (
        lambda: cx.sophia_h(0.05, sampler=cx.gaussian_probe, **SOPHIA),
        lambda: written_out(cx.hutchinson_diag(5, probes=3, sampler=cx.gaussian_probe)),
    ),
    "sophia_g": (
        lambda: cx.sophia_g(0.05, **SOPHIA),
        lambda: written_out(cx.fisher_diag(5, probes=3)),
    ),
}


@pytest.mark.parametrize("name", PIPES)
def test_diagonal_methods_are_their_pipes(name):
    value_fn, ends = objective(), []
    for build in PIPES[name]:
        tx = build()

        @quick_jit
        def step(params, state, tx=tx):
            _, grads = value_fn.value_and_grad(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return optax.apply_updates(params, updates), state

        params, state = net_params(), tx.init(net_params())
        for _ in range(4):
            params, state = step(params, state)
        ends.append(params)
    assert_trees_close(ends[0], ends[1], 1e-13)


def test_ema_mean_lags_by_one_step():
    params = net_params()
    tx = cx.squared_gradient() | cx.ema_mean(0.0, lag=1) | cx.scale_by_power(1.0, eps=1.0)
    state, before = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for grads in random_gradients(3):
        updates, state = tx.update(grads, state, params)
        expected = jax.tree.map(lambda g, d: g / (d + 1), grads, before)
        assert_trees_close(updates, expected, 1e-14)
        before = jax.tree.map(jnp.square, grads)


def test_backtracking_in_a_pipe_takes_the_iterate_of_lowest_loss():
    """Ranked by the loss at θ - x: with little damping the last iterates lead too far."""
    params, value_fn = net_params(), objective()
    pipe = lambda solver: cx.fisher_matvec() | cx.damp(0.01) | cx.solve(solver)
    found, _ = one_step(pipe(cx.cg(9, tol=0.0, backtrack=True)), params, value_fn)
    kept = [one_step(pipe(cx.cg(k, tol=0.0)), params, value_fn)[0] for k in (1, 2, 3, 4, 5, 7, 9)]
    losses = [float(value_fn(optax.tree.sub(params, x))) for x in kept]
    best = next(i for i in range(len(kept) - 1, -1, -1) if i == 0 or losses[i - 1] >= losses[i])
    assert 0 < best < len(kept) - 1
    assert_trees_close(found, kept[best], 1e-9)


def test_row_space_without_damping_gives_the_step_of_least_norm():
    """Fewer outputs than parameters: of all solutions, the one of least norm."""
    params, value_fn = net_params(), objective(net_batch(3))
    tx = cx.natural_gradient(damping=0.0, solver=cx.row_space())
    updates, _ = one_step(tx, params, value_fn)
    matrix = gauss_newton_matrix(value_fn, params)
    gradient = flat(jax.grad(value_fn)(params))
    expected = -np.linalg.pinv(matrix, rcond=1e-10) @ gradient
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-6, atol=1e-8)
