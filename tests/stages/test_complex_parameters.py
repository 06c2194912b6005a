"""Complex parameters: refused where curvature is that of real ones, and split into such."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import flat, quick_jit

import curvax as cx
from curvax import analysis
from curvax.linalg import eigenpairs, exact_diagonal

KEYS = jax.random.split(jax.random.key(0), 4)
A = jax.random.normal(KEYS[0], (6, 2)) + 1j * jax.random.normal(KEYS[1], (6, 2))
B = jax.random.normal(KEYS[2], (6,)) + 0.5j
PARAMS = {"b": jnp.array([0.4]), "z": jnp.array([0.3 + 0.2j, -0.1 + 0.5j])}


def loss(params: Any) -> jax.Array:
    return jnp.mean(jnp.abs(jnp.tanh(A @ params["z"]) * params["b"] - B) ** 2)


def real_loss(parts: Any) -> jax.Array:
    x, y = parts["z"]
    return loss({"b": parts["b"], "z": x + 1j * y})


PARTS = {"b": PARAMS["b"], "z": (PARAMS["z"].real, PARAMS["z"].imag)}

METHODS = {
    "sam": cx.sam(optax.identity(), 0.05),
    "sam of several steps": cx.sam(optax.adam(0.1), 0.3, steps=2, p=np.inf),
    "second order": cx.sam(optax.sgd(0.1), 0.3, second_order=True),
    "gsam": cx.gsam(optax.sgd(0.1, momentum=0.9), 0.1, 0.4),
    "adahessian": cx.adahessian(0.1, weight_decay=0.01),
    "adahessian with probes": cx.adahessian(0.1, probes=3),
    "sophia": cx.sophia_h(0.1),
    "newton": cx.newton_cg(damping=1.0, solver=cx.dense()),
    "exact": cx.exact_diag() | cx.ema_rms(0.9) | cx.scale_by_power(1.0) | optax.sgd(0.1),
    "empirical": cx.squared_gradient() | cx.ema_mean(0.9) | cx.scale_by_power(0.5),
    "nested": cx.restrict(cx.sam(optax.sgd(0.1), 0.1), {"b": False, "z": True}),
}


def steps(tx: Any, objective: cx.Objective, params: Any, conjugated: bool) -> Any:
    """Parameters and updates of two steps; gradients by JAX's convention or by Optax's."""

    def step(params: Any, state: Any) -> Any:
        value, grads = objective.value_and_grad(params)
        grads = jax.tree.map(jnp.conj, grads) if conjugated else grads
        updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
        return optax.apply_updates(params, updates), state, updates

    step, state = quick_jit(step), tx.init(params)
    params, state, first = step(params, state)
    return params, first, step(params, state)[2]


@pytest.mark.parametrize("conjugated", [False, True], ids=["own gradient", "Optax's convention"])
@pytest.mark.parametrize("name", METHODS)
def test_split_methods_take_the_steps_of_the_real_problem(name, conjugated):
    wrapped = cx.split_real_and_imaginary(METHODS[name])
    found = steps(wrapped, cx.Objective(loss), PARAMS, conjugated)
    expected = steps(METHODS[name], cx.Objective(real_loss), PARTS, False)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours["z"], theirs["z"][0] + 1j * theirs["z"][1], rtol=1e-12)
        np.testing.assert_allclose(ours["b"], theirs["b"], rtol=1e-12)
        assert ours["z"].dtype == PARAMS["z"].dtype
        assert jnp.isrealobj(ours["b"])


def test_newton_step_solves_a_complex_least_squares_problem():
    quadratic = cx.Objective(lambda p: jnp.mean(jnp.abs(A @ p["z"] - B) ** 2))
    tx = cx.split_real_and_imaginary(cx.newton_cg(solver=cx.cg(50, tol=1e-12)))
    params = {"z": PARAMS["z"]}
    _, grads = quadratic.value_and_grad(params)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=quadratic)
    solution = jnp.linalg.lstsq(A, B)[0]
    moved: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["z"], solution, rtol=1e-8)


def test_diagnostics_are_those_of_the_real_problem():
    tx = cx.split_real_and_imaginary(cx.sam(optax.identity(), 0.05))
    objective = cx.Objective(loss)
    value, grads = objective.value_and_grad(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective, value=value)
    expected = np.linalg.norm(flat(jax.grad(real_loss)(PARTS)))
    np.testing.assert_allclose(cx.diagnostics(state)["gradient_norm"], expected, rtol=1e-6)


def test_split_of_a_plain_transformation_is_that_of_optax():
    tx = optax.adam(0.1)
    grads = jax.tree.map(jnp.conj, jax.grad(loss)(PARAMS))
    ours, theirs = cx.split_real_and_imaginary(tx), optax.contrib.split_real_and_imaginary(tx)
    found, _ = ours.update(grads, ours.init(PARAMS), PARAMS)
    expected, _ = theirs.update(grads, theirs.init(PARAMS), PARAMS)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-12)


@pytest.mark.parametrize("conjugated", [False, True])
def test_stages_inside_the_split_recognise_the_objectives_gradient(conjugated):
    """Estimators then share its backward pass, and changed gradients are recognised."""
    known = []

    def rule(signal: Any, state: Any, params: Any, *, value_fn: Any, **extra: Any) -> Any:
        known.append(value_fn.cached_gradient(params, signal.updates) is not None)
        return signal, state

    tx = cx.split_real_and_imaginary(cx.stage(lambda params: (), rule))
    objective = cx.Objective(loss)
    _, grads = objective.value_and_grad(PARAMS)
    grads = jax.tree.map(jnp.conj, grads) if conjugated else grads
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)
    assert known == [not conjugated]


@pytest.mark.parametrize(
    "tx",
    [
        *(METHODS[name] for name in ("sam", "gsam", "adahessian", "sophia", "newton", "exact")),
        cx.squared_gradient(),
        cx.ema_rms(0.9),
        cx.natural_gradient(),
        cx.gauss_newton_diag(),
        cx.empirical_fisher_diag(),
        cx.per_group(2, cx.sam_perturb(0.1)),
        cx.every(2, cx.hutchinson_diag()),
        optax.chain(optax.clip_by_global_norm(1.0), cx.sam(optax.sgd(0.1))),
        optax.inject_hyperparams(cx.scale_by_power)(power=1.0),
    ],
)
def test_stages_refuse_complex_parameters_at_init_and_name_the_cure(tx):
    with pytest.raises(TypeError, match=r"`z`.*complex.*split_real_and_imaginary"):
        tx.init(PARAMS)


def test_products_and_measures_refuse_complex_parameters():
    z, model = {"z": PARAMS["z"]}, lambda p, b: jnp.abs(b @ p["z"])
    batch = A.real
    objective = cx.Objective(lambda out, b: jnp.mean(out**2), batch, model=model)
    identity = lambda v: v
    for act in (
        lambda: cx.hvp(objective, z),
        lambda: cx.hvp(objective, z, mode="finite-differences"),
        lambda: cx.ggnvp(objective, z),
        lambda: cx.empirical_fvp(objective, z),
        lambda: analysis.top_eigenpairs(objective, z),
        lambda: analysis.sharpness(objective, z, 0.1),
        lambda: analysis.curvature_trace(objective, z),
        lambda: analysis.ntk(objective, z),
        lambda: cx.cg(3)(identity, z),
        lambda: cx.lanczos(identity, z, 2),
        lambda: cx.power_iteration(identity, z),
        lambda: eigenpairs(identity, z),
        lambda: cx.spectral_density(identity, {"z": A}, 2),
        lambda: cx.estimate_trace(identity, {"z": A}),
    ):
        with pytest.raises(TypeError, match=r"complex.*split_real_and_imaginary"):
            act()


def test_restrict_ignores_complex_leaves_outside_its_mask():
    mask = {"b": True, "z": False}
    tx, objective = cx.restrict(cx.sam(optax.sgd(0.1), 0.1), mask), cx.Objective(loss)
    _, grads = objective.value_and_grad(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)
    rest = lambda b: loss({"b": b, "z": PARAMS["z"]})
    g = jax.grad(rest)(PARAMS["b"])
    expected = -0.1 * jax.grad(rest)(PARAMS["b"] + 0.1 * g / jnp.linalg.norm(g))
    np.testing.assert_allclose(updates["b"], expected, rtol=1e-6)


def test_complex_outputs_raise_with_the_split_as_the_cure():
    model = lambda p, b: b @ (p + 1j * p)
    objective = cx.Objective(lambda z, b: jnp.mean(jnp.abs(z) ** 2), A, model=model)
    with pytest.raises(TypeError, match=r"complex.*z.real, z.imag"):
        cx.ggnvp(objective, jnp.ones(2))


@pytest.mark.parametrize("chunk", [None, 2])
def test_ntk_of_complex_outputs_raises_with_the_split_as_the_cure(chunk):
    model = lambda p, b: b @ (p + 1j * p)
    objective = cx.Objective(lambda z, b: jnp.mean(jnp.abs(z) ** 2), A, model=model)
    with pytest.raises(TypeError, match=r"complex.*z.real, z.imag"):
        analysis.ntk(objective, jnp.ones(2), chunk=chunk)


@pytest.mark.parametrize(
    "objective",
    [
        cx.Objective(lambda p: jnp.mean((A @ p) ** 2)),
        cx.Objective(cx.gaussian("y"), {"x": A, "y": B.real}, model=lambda p, b: b["x"] @ p),
    ],
)
def test_complex_loss_is_refused(objective):
    for act in (objective, objective.value_and_grad):
        with pytest.raises(TypeError, match=r"must be real, and is complex.*z.real, z.imag"):
            act(jnp.ones(2))


def test_measures_of_trees_refuse_complex_trees():
    for act in (
        lambda: analysis.block_norms(PARAMS),
        lambda: analysis.filter_normalised(PARAMS, PARAMS),
        lambda: analysis.random_directions(PARAMS),
        lambda: analysis.trajectory_directions([PARAMS, PARAMS, PARAMS]),
        lambda: analysis.alignment(PARAMS, [PARAMS]),
        lambda: cx.materialize(lambda v: v, PARAMS),
        lambda: exact_diagonal(lambda v: v, PARAMS),
    ):
        with pytest.raises(TypeError, match=r"z`.*complex"):
            act()


def test_solvers_refuse_complex_products():
    """A Hermitian matrix has real eigenvalues, and its products of real vectors are complex."""
    hermitian = lambda v: jnp.array([[2, 1j], [-1j, 3]]) @ v
    for act in (
        lambda v: cx.cg(3)(hermitian, v),
        lambda v: cx.steihaug(1.0)(hermitian, v),
        lambda v: cx.dense()(hermitian, v),
        lambda v: cx.lanczos(hermitian, v, 2),
        lambda v: cx.power_iteration(hermitian, v),
        lambda v: eigenpairs(hermitian, v),
        lambda v: cx.spectral_density(hermitian, v[None], 2),
        lambda v: cx.estimate_trace(hermitian, v[None]),
        lambda v: cx.estimate_diagonal(hermitian, v[None]),
    ):
        with pytest.raises(TypeError, match="complex"):
            act(jnp.ones(2))
