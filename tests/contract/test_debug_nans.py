"""Training under `jax_debug_nans`: no state and no update of a finite step has a NaN in it."""

import re
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import net, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.arithmetic.trees import is_float
from curvax.pipes import diagnostics

SGD = optax.scale_by_learning_rate(0.1)
SAM_UNKNOWN = ("loss", "sigma_max", "surrogate_gap")


@pytest.fixture(autouse=True)
def debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


def split() -> cx.Objective:
    return cx.Objective(cx.gaussian("y"), net_batch(), model=net)


def plain() -> cx.Objective:
    return cx.Objective(net_loss, net_batch())


METHODS = {
    "sam": lambda: cx.sam(optax.sgd(0.1)),
    "gsam": lambda: cx.gsam(optax.sgd(0.1), 0.05, 0.4),
    "gsam onto clean": lambda: cx.gsam(optax.sgd(0.1), 0.05, 0.4, onto="clean"),
    "look_sam": lambda: cx.look_sam(optax.sgd(0.1), 0.05, every=2),
    "entropy_sgd": lambda: cx.entropy_sgd(optax.sgd(0.1), 0.1, steps=3),
    "sam of second order": lambda: cx.sam(optax.sgd(0.1), 0.05, second_order=True, steps=2),
    "asam": lambda: cx.sam(optax.sgd(0.1), 0.5, ascent=cx.asam(0.01)),
    "every other step": lambda: cx.sam_perturb(0.05, every=2) | SGD,
    "penalize_gap": lambda: cx.sam_perturb(0.05, every=2) | cx.penalize_gap(0.3) | SGD,
    "per_group": lambda: cx.per_group(4, cx.sam_perturb(0.05) | cx.gsam_project(0.1)) | SGD,
    "partition": lambda: cx.partition(
        {"a": cx.sam_perturb(0.1) | SGD, "b": cx.hutchinson_diag(probes=2) | SGD},
        {"hidden": "a", "out": "b"},
    ),
    "adahessian": lambda: cx.adahessian(0.1),
    "adahessian, two probes": lambda: cx.adahessian(0.1, probes=2, every=2),
    "sophia_h": lambda: cx.sophia_h(0.1, every=2),
    "sophia_g": lambda: cx.sophia_g(0.1),
    "diagonal_natural_gradient": lambda: cx.diagonal_natural_gradient(0.1),
    "natural_gradient": lambda: cx.natural_gradient(damping=1e-2),
    "hessian_free": lambda: cx.hessian_free(),
    "newton_cg": lambda: cx.newton_cg(damping=1e-2),
    "levenberg_marquardt": lambda: cx.levenberg_marquardt(
        cx.fisher_matvec() | cx.damp() | cx.solve(cx.cg(3)) | cx.quadratic_step() | SGD
    ),
    "trust_region": lambda: (
        cx.gauss_newton_matvec() | cx.solve(cx.steihaug(0.1)) | SGD | cx.trust_region(0.01)
    ),
    "record": lambda: cx.record(before=lambda s, p: s.value) | cx.sam_perturb(0.05, every=2) | SGD,
}


def assert_finite(*trees: Any) -> None:
    """Of every number; random keys are none."""
    chex.assert_tree_all_finite([x for x in jax.tree.leaves(trees) if is_float(x)])


def trained(make: Any, *, jit: bool, steps: int = 3) -> Any:
    """(initial state, final state, initial and final diagnostics) of a training."""
    tx, params = make(), net_params()
    first = state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        objective = split()
        value, gradient = objective.value_and_grad(params)
        updates, state = tx.update(gradient, state, params, value_fn=objective, value=value)
        return optax.apply_updates(params, updates), state, cx.diagnostics(state)

    run = quick_jit(step) if jit else step
    for _ in range(steps):
        params, state, figures = run(params, state)
        assert_finite(params, state)
    return first, state, figures


@pytest.mark.parametrize("name", METHODS)
def test_a_jitted_training_has_no_nan(name):
    first, state, figures = trained(METHODS[name], jit=True)
    assert_finite(first)
    assert all(np.isnan(x) for x in cx.diagnostics(first).values())
    shown = cx.diagnostics(state)
    assert all(np.isfinite(x) for x in shown.values())
    for figure, x in shown.items():
        assert x.dtype == jnp.float32
        assert x == figures[figure]


@pytest.mark.parametrize("name", ["sam", "look_sam", "adahessian", "hessian_free", "record"])
def test_an_eager_training_has_no_nan(name):
    first, state, _ = trained(METHODS[name], jit=False, steps=2)
    assert_finite(first, state)
    assert all(np.isfinite(x) for x in cx.diagnostics(state).values())


def loss_unknown(tx: Any, state: Any, scale: float = 1.0) -> Any:
    params, f = net_params(), plain()
    gradient = jax.grad(lambda p: scale * f(p))(params)
    return tx.update(gradient, state, params, value_fn=f)


@pytest.mark.parametrize("every", [1, 2])
def test_unknown_loss_is_flagged_as_nan_in_diagnostics(every):
    tx = cx.sam_perturb(0.05, every=every) | cx.record(mine=lambda s, p: s.value)
    state = tx.init(net_params())
    for _ in range(2):
        _, state = jax.jit(lambda s: loss_unknown(tx, s))(state)
        assert_finite(state)
        _, eager = loss_unknown(tx, tx.init(net_params()))
        assert_finite(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = cx.diagnostics(state)
    unknown = {name for name, x in figures.items() if np.isnan(x)}
    assert unknown == {*SAM_UNKNOWN, "mine"}
    assert all(optax.tree.get(state, name) == 0 for name in SAM_UNKNOWN)


def test_unknown_loss_warns_once_with_the_cure():
    tx = cx.sam_perturb(0.05) | optax.trace(0.3) | optax.trace(0.2)
    state = tx.init(net_params())
    cx.diagnostics(state)  # not measured yet: nothing to say
    _, state = loss_unknown(tx, state)
    cure = r"`loss`, `sigma_max`, `surrogate_gap`.*`value=value`.*curvax\.Objective"
    with pytest.warns(UserWarning, match=re.compile(cure, re.DOTALL)) as caught:
        cx.diagnostics(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    _, state = loss_unknown(tx, state)
    cx.diagnostics(state)


def test_loss_passed_at_a_later_step_is_recorded():
    tx = cx.sam_perturb(0.05)
    _, state = loss_unknown(tx, tx.init(net_params()))
    params, f = net_params(), plain()
    value, gradient = jax.value_and_grad(f)(params)
    _, state = tx.update(gradient, state, params, value_fn=f, value=value)
    np.testing.assert_allclose(cx.diagnostics(state)["loss"], value, rtol=1e-6)


def test_computed_nan_stays_nan():
    jax.config.update("jax_debug_nans", False)
    f = cx.Objective(lambda p, b: net_loss(p, b) * jnp.inf, net_batch())
    tx, params = cx.sam_perturb(0.05), net_params()
    value, gradient = f.value_and_grad(params)
    _, state = tx.update(gradient, tx.init(params), params, value_fn=f, value=value)
    for name in ("gradient_norm", "perturbed_loss"):
        assert not np.isfinite(optax.tree.get(state, name))


def test_diagnostics_of_stacked_states_are_stacked():
    tx = cx.sam_perturb(0.05)
    params = jax.vmap(lambda i: jax.tree.map(lambda x: (1 + i) * x, net_params()))(jnp.arange(2.0))
    states = jax.vmap(tx.init)(params)
    assert np.isnan(cx.diagnostics(states)["rho"]).all()

    def step(params: Any, state: Any) -> Any:
        f = plain()
        value, gradient = f.value_and_grad(params)
        return tx.update(gradient, state, params, value_fn=f, value=value)[1]

    states = jax.jit(jax.vmap(step))(params, states)
    found = cx.diagnostics(states)["loss"]
    expected = jax.vmap(lambda p: net_loss(p, net_batch()))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), states, jax.vmap(tx.init)(params))
    assert np.isfinite(cx.diagnostics(mixed)["loss"]).tolist() == [True, False]


def test_standard_error_of_one_probe_is_nan_without_a_nan_operation():
    probes = jnp.ones((1, 3))
    assert np.isnan(cx.estimate_diagonal(lambda v: 2 * v, probes).standard_error).all()
    assert np.isnan(cx.estimate_trace(lambda v: 2 * v, probes).standard_error)
    density = cx.spectral_density(lambda v: v, probes, 1)
    assert np.isnan(density.moment(lambda x: x)[1])


class Run(NamedTuple):
    step: jax.Array
    opt_state: Any


def test_checkpoint_with_nan_for_unknown_diagnostics_is_restored(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="checkpoints are Orbax's")
    from curvax.training.checkpoints import Checkpoints

    tx = cx.levenberg_marquardt(cx.fisher_matvec() | cx.damp() | cx.solve(cx.cg(3)) | SGD)
    tx = cx.sam_perturb(0.1) | tx | cx.record(mine=lambda s, p: 7.0)
    fresh, params, f = tx.init(net_params()), net_params(), split()
    value, gradient = f.value_and_grad(params)
    _, state = tx.update(gradient, fresh, params, value_fn=f, value=value)
    older = diagnostics.unflagged((fresh[0], *state[1:]))
    nan = {name: jax.device_put(np.float32(np.nan)) for name in fresh[0].figures}
    older = (older[0]._replace(figures=nan), *older[1:])

    kept: Any = Checkpoints(tmp_path / "checkpoints")
    kept.save(Run(jnp.int32(3), older), {"epoch": 1})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    found, place = kept.restore(jax.tree.map(shape, Run(jnp.int32(0), fresh)))
    kept.close()
    assert place == {"epoch": 1}
    chex.assert_trees_all_equal(found.opt_state, (fresh[0], *state[1:]))
    assert_finite(found)
    shown = cx.diagnostics(found.opt_state)
    assert np.isnan(shown["rho"])
    assert shown["mine"] == 7
    assert np.isfinite(shown["reduction_ratio"])
