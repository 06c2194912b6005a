"""`jax_numpy_dtype_promotion="strict"`: no stage, product or solver mixes types unasked."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from small_problems import net, net_batch, net_params

import curvax as cx
from curvax.linalg import eigenpairs

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def objective(likelihood: Any, **options: Any) -> cx.Objective:
    batch = net_batch(dtype=jnp.float32)
    batch |= {"class": jnp.arange(8) % 2, "yes": (batch["y"] > 0).astype(jnp.float32)}
    batch |= {"count": jnp.round(jnp.abs(batch["y"]))}
    return cx.Objective(likelihood, batch, model=net, **options)


SGD = optax.scale(-0.1)
schedule = lambda step: jnp.float32(0.05)
PIPES = {
    "sam": lambda: cx.sam_perturb(schedule),
    "sam, p = 3": lambda: cx.sam_perturb(0.05, p=3, steps=2),
    "second order": lambda: cx.sam_perturb(0.05, second_order=True, steps=2),
    "asam": lambda: cx.sam_perturb(0.5, ascent=cx.asam()),
    "fisher_ascent": lambda: cx.sam_perturb(0.5, ascent=cx.fisher_ascent()),
    "gsam": lambda: cx.sam_perturb(0.05) | cx.gsam_project(0.4),
    "penalize_gap": lambda: cx.sam_perturb(0.05) | cx.penalize_gap(0.4),
    "look_sam": lambda: cx.sam_perturb(0.05, every=2) | cx.keep_orthogonal(0.4),
    "local_entropy": lambda: cx.local_entropy(schedule, steps=3, rate=schedule),
    "per_group": lambda: cx.per_group(4, cx.sam_perturb(0.05)),
    "one by one": lambda: cx.per_group(4, cx.sam_perturb(0.05), sequential=True),
    "hutchinson_diag": lambda: (
        cx.hutchinson_diag(probes=2) | cx.spatial_average() | cx.ema_rms(0.9) | cx.scale_by_power(1)
    ),
    "every": lambda: cx.every(2, cx.hutchinson_diag(shards=2)) | cx.ema_rms(0.9),
    "gauss_newton_diag": lambda: (
        cx.gauss_newton_diag(probes=2) | cx.ema_mean(0.9) | cx.clip_by_diagonal(0.1)
    ),
    "fisher_diag": lambda: cx.fisher_diag() | cx.ema_mean(0.9, lag=1) | cx.clip_by_diagonal(0.1),
    "empirical_fisher_diag": lambda: (
        cx.empirical_fisher_diag() | cx.accumulate(0.1) | cx.scale_by_power(0.5)
    ),
    "squared_gradient": lambda: cx.squared_gradient() | cx.scale_by_power(schedule),
    "exact_diag": lambda: cx.exact_diag() | cx.ema_rms(0.1),
    "cg": lambda: (
        cx.fisher_matvec() | cx.damp(0.1) | cx.solve(cx.cg(4, warm_start=0.5, progress=0.1))
        | cx.quadratic_step()
    ),
    "backtrack": lambda: cx.gauss_newton_matvec() | cx.solve(cx.cg(4, backtrack=True)),
    "preconditioned": lambda: (
        cx.fisher_diag() | cx.fisher_matvec(samples=2) | cx.damp(0.1)
        | cx.solve(cx.cg(4, preconditioner=0.75))
    ),
    "dense": lambda: cx.hessian_matvec() | cx.damp(0.1) | cx.solve(cx.dense()),
    "row_space": lambda: cx.fisher_matvec() | cx.solve(cx.row_space()),
    "trust_region": lambda: (
        cx.empirical_fisher_matvec() | cx.damp(0.1) | cx.solve(cx.steihaug(0.1))
        | cx.trust_region(0.01)
    ),
    "levenberg_marquardt": lambda: cx.levenberg_marquardt(
        cx.fisher_matvec() | cx.damp() | cx.solve(cx.cg(3)) | SGD
    ),
    "record": lambda: cx.sam_perturb(0.1, every=2) | cx.record(a=lambda s, p: s.perturbed_value),
}  # fmt: skip
LIKELIHOODS = {
    "gaussian": cx.gaussian("y"),
    "categorical": cx.categorical("class"),
    "bernoulli": cx.bernoulli("yes"),
    "poisson": cx.poisson("count"),
}


def traces(make: Any, objective: Any, dtype: Any = jnp.float32) -> None:
    """Traces a step and its diagnostics; strict promotion raises while tracing."""
    tx, params = make() | SGD, net_params(dtype)
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any) -> Any:
        value, gradient = objective.value_and_grad(params)
        updates, state = tx.update(gradient, state, params, value_fn=objective, value=value)
        return optax.apply_updates(params, updates), cx.diagnostics(state)

    moved, figures = jax.eval_shape(step, params, state)
    assert all(x.dtype == dtype for x in jax.tree.leaves(moved))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(figures))


@pytest.mark.parametrize("name", PIPES)
def test_stages_run_under_strict_promotion(name):
    traces(PIPES[name], objective(cx.gaussian("y")))


@pytest.mark.filterwarnings("ignore:`sam_perturb` on parameters in half precision")
@pytest.mark.parametrize("name", PIPES)
def test_stages_in_half_precision_run_under_strict_promotion(name):
    batch = net_batch(dtype=jnp.bfloat16) | {"class": jnp.arange(8) % 2}
    for likelihood in (cx.categorical("class"), cx.gaussian("y")):
        traces(PIPES[name], cx.Objective(likelihood, batch, model=net), jnp.bfloat16)


@pytest.mark.parametrize("name", ["sam", "hutchinson_diag", "cg", "gauss_newton_diag"])
def test_stages_over_microbatches_run_under_strict_promotion(name):
    traces(PIPES[name], objective(cx.gaussian("y"), microbatch=4))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", ["cg", "fisher_diag", "gauss_newton_diag", "row_space"])
def test_stages_of_every_likelihood_run_under_strict_promotion(name, likelihood):
    traces(PIPES[name], objective(LIKELIHOODS[likelihood]))


MEASURES = {
    "hvp": lambda f, p: cx.hvp(f, p)(p),
    "ggnvp": lambda f, p: cx.ggnvp(f, p)(p),
    "fvp": lambda f, p: cx.fvp(f, p, samples=2, key=jax.random.key(0))(p),
    "empirical_fvp": lambda f, p: cx.empirical_fvp(f, p)(p),
    "lanczos": lambda f, p: cx.lanczos(cx.hvp(f, p), p, 3),
    "recurrence": lambda f, p: cx.lanczos(cx.hvp(f, p), p, 3, keep_basis=False),
    "power_iteration": lambda f, p: cx.power_iteration(cx.hvp(f, p), p),
    "eigenpairs": lambda f, p: eigenpairs(cx.hvp(f, p), p, 2),
    "estimate_trace": lambda f, p: cx.estimate_trace(cx.hvp(f, p), twice(p)),
    "estimate_diagonal": lambda f, p: cx.estimate_diagonal(cx.hvp(f, p), twice(p)),
    "spectral_density": lambda f, p: cx.spectral_density(cx.hvp(f, p), twice(p), 3),
    "materialize": lambda f, p: cx.materialize(cx.hvp(f, p), p),
    "sharpness": lambda f, p: cx.sharpness(f, p, 0.1),
    "surrogate_gap": lambda f, p: cx.surrogate_gap(f, p, 0.1),
    "ntk": lambda f, p: cx.ntk(f, p),
}


def twice(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x, x]), params)


@pytest.mark.parametrize("name", MEASURES)
def test_products_and_measures_run_under_strict_promotion(name):
    f = objective(cx.categorical("class"))
    jax.eval_shape(lambda p: MEASURES[name](f, p), net_params(jnp.float32))
