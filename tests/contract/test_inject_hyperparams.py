"""Every factory under `optax.inject_hyperparams`, with nothing named as static."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from small_problems import assert_trees_close, quick_jit

import curvax as cx
from curvax.hyperparameters import STATIC

BATCH = {"x": jax.random.normal(jax.random.key(1), (8, 4)), "y": jnp.arange(8) % 3}
PARAMS = {"k": jax.random.normal(jax.random.key(2), (4, 3)), "b": jnp.full(3, 0.1, float)}


def predict(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["k"]) + params["b"][None]


OBJECTIVE = cx.Objective(cx.categorical("y"), BATCH, model=predict)
SGD = optax.sgd(0.1)
KEY = jax.random.key(3, impl="rbg")
is_kernel = lambda params: {"k": True, "b": False}
by_path = lambda path: cx.asam(0.01) if path[-1] == "k" else cx.dual_norm(2)
labels = lambda params: {"k": "in", "b": "out"}
inner = cx.fisher_matvec() | cx.damp() | cx.solve(cx.cg(2))

# name ↦ (static options, {number: (first value, later value)})
METHODS: dict[str, tuple[dict[str, Any], dict[str, tuple[float, float]]]] = {
    "sam": (dict(base=SGD, ascent=by_path, steps=2, projected=False), dict(rho=(0.1, 0.3))),
    "gsam": (dict(base=SGD, p=3.0, mask=is_kernel), dict(rho=(0.1, 0.3), alpha=(0.4, 0.1))),
    "look_sam": (dict(base=SGD, second_order=True), dict(rho=(0.1, 0.3), every=(2, 3))),
    "entropy_sgd": (dict(base=SGD, steps=2), dict(scope=(0.1, 0.3), noise=(0.01, 0.0))),
    "adahessian": (dict(probes=2, block=2, mask=is_kernel), dict(learning_rate=(0.1, 0.2))),
    "sophia_h": (dict(sampler=cx.gaussian_probe, key=KEY), dict(learning_rate=(0.1, 0.2))),
    "sophia_g": (dict(probes=2), dict(learning_rate=(0.1, 0.2), gamma=(0.05, 0.01))),
    "diagonal_natural_gradient": (dict(key=5), dict(learning_rate=(0.1, 0.2))),
    "natural_gradient": (dict(samples=2), dict(learning_rate=(0.1, 0.2), damping=(1e-3, 0.1))),
    "gauss_newton": (dict(solver=cx.dense(), fraction=0.5), dict(damping=(1e-3, 0.1))),
    "hessian_free": (dict(solver=cx.cg(3)), dict(learning_rate=(0.1, 0.2))),
    "kfac": (
        dict(like=OBJECTIVE, key=4, factors_every=2, inverses_every=3, momentum="quadratic"),
        dict(learning_rate=(0.1, 0.2), damping=(0.3, 0.4), decay=(0.9, 0.8), radius=(0.1, 0.2)),
    ),
    "shampoo": (
        dict(largest=4, momentum=0.9),
        dict(learning_rate=(0.1, 0.2), damping=(0.3, 0.4), every=(2, 3)),
    ),
    "soap": (
        dict(style="exact", largest=4),
        dict(
            every=(2, 3),
            learning_rate=(0.1, 0.2),
            b1=(0.9, 0.8),
            b2=(0.9, 0.8),
            weight_decay=(0.1, 0.2),
        ),
    ),
    "ekfac": (
        dict(like=OBJECTIVE, key=4, factors_every=2, momentum="quadratic"),
        dict(
            bases_every=(3, 2),
            learning_rate=(0.1, 0.2),
            damping=(0.3, 0.4),
            eigenvalues_decay=(0.9, 0.8),
        ),
    ),
    "newton_cg": (dict(solver=cx.steihaug(0.3)), dict(learning_rate=(0.1, 0.2))),
}
STAGES: dict[str, tuple[dict[str, Any], dict[str, tuple[float, float]]]] = {
    "sam_perturb": (dict(steps=2), dict(rho=(0.1, 0.3), step_size=(0.02, 0.03))),
    "per_group": (dict(m=4, stages=cx.sam_perturb(0.1)), {}),
    "restrict": (dict(stages=cx.sam_perturb(0.1), mask=is_kernel), {}),
    "partition": (dict(stages_by_label={"in": cx.sam_perturb(0.1), "out": SGD}, labels=labels), {}),
    "levenberg_marquardt": (dict(stages=inner | SGD, reject=False), dict(damping=(0.3, 0.4))),
    "keep_orthogonal": ({}, dict(alpha=(0.7, 0.1))),
    "gsam_project": (dict(onto="clean"), dict(alpha=(0.7, 0.1))),
    "penalize_gap": ({}, dict(lam=(0.7, 0.1))),
    "every": (dict(stages=cx.hutchinson_diag()), dict(k=(2, 3))),
    "hutchinson_diag": (dict(probes=2, shards=2, sampler=cx.gaussian_probe), {}),
    "gauss_newton_diag": (dict(fraction=0.5), {}),
    "fisher_diag": (dict(key=4), {}),
    "empirical_fisher_diag": (dict(fraction=0.5), {}),
    "fisher_kronecker": (dict(like=OBJECTIVE, key=4), {}),
    "gauss_newton_kronecker": (dict(like=OBJECTIVE, fraction=0.5), {}),
    "empirical_fisher_kronecker": (dict(sharing="reduce"), {}),
    "gradient_kronecker": (dict(largest=4), {}),
    "fisher_eigenvalues": (dict(key=4, fraction=0.5), {}),
    "in_eigenbasis": (dict(stages=cx.squared_gradient(), style="iteration"), dict(every=(2, 3))),
    "exact_diag": (dict(curvature="fisher"), {}),
    "spatial_average": (dict(block=lambda path, leaf: None), {}),
    "ema_rms": ({}, dict(decay=(0.9, 0.5))),
    "ema_mean": (dict(debias=False, lag=1), dict(decay=(0.9, 0.5))),
    "accumulate": ({}, dict(initial=(0.1, 0.1))),
    "scale_by_power": ({}, dict(power=(0.5, 0.3), eps=(0.1, 0.2))),
    "clip_by_diagonal": ({}, dict(gamma=(0.5, 0.3))),
    "hessian_matvec": (dict(fraction=0.5), {}),
    "gauss_newton_matvec": (dict(fraction=0.5), {}),
    "fisher_matvec": (dict(samples=2, key=KEY), {}),
    "empirical_fisher_matvec": (dict(fraction=0.5), {}),
    "damp": ({}, dict(damping=(0.3, 0.1))),
    "solve": (dict(solver=cx.cg(2, warm_start=0.5)), {}),
    "trust_region": ({}, dict(radius=(1e-3, 1e-2))),
    "trajectory_loss": (
        dict(size=8, shape=3, lag=1, index=lambda batch: jnp.arange(8)),
        dict(strength=(0.3, 0.1), temperature=(1.0, 2.0)),
    ),
    "local_entropy": (
        dict(steps=4, split_batch=True, key=KEY),
        dict(scope=(0.3, 0.1), rate=(0.1, 0.2), decay=(0.7, 0.5), momentum=(0.0, 0.9)),
    ),
    "quadratic_step": (dict(momentum=False), {}),
    "split_real_and_imaginary": (dict(stages=cx.sam_perturb(0.1)), {}),
    "pmean_updates": (dict(axis_name="batch"), {}),
    "squared_gradient": ({}, {}),
}
BESIDE = {"record", "pipe", "stage"}  # which take no numbers
SOLVED = cx.fisher_matvec() | cx.damp(0.5)
BEFORE = {
    "keep_orthogonal": cx.sam_perturb(0.1), "gsam_project": cx.sam_perturb(0.1),
    "penalize_gap": cx.sam_perturb(0.1), "damp": cx.fisher_matvec(), "solve": SOLVED,
    "trust_region": SOLVED, "quadratic_step": SOLVED,
    "in_eigenbasis": cx.gauss_newton_kronecker(OBJECTIVE),
} | dict.fromkeys(
    ["spatial_average", "ema_rms", "ema_mean", "accumulate", "scale_by_power", "clip_by_diagonal"],
    cx.squared_gradient(),
)  # fmt: skip


AROUND = {"fisher_eigenvalues": lambda tx: cx.gauss_newton_kronecker() | cx.in_eigenbasis(tx)}


def two_steps(factory: Any, given: dict[str, Any], later: dict[str, float]) -> tuple[Any, int]:
    """Two injected steps with numbers changed in between, and how often they were traced."""
    tx = optax.inject_hyperparams(factory)(**given)
    traces: list[None] = []

    @quick_jit
    def step(state: Any) -> tuple[Any, Any]:
        traces.append(None)
        _, grads = OBJECTIVE.value_and_grad(PARAMS)
        return tx.update(grads, state, PARAMS, value_fn=OBJECTIVE)

    state = tx.init(PARAMS)
    jax.tree.map(jnp.asarray, state)
    first, state = step(state)
    hyperparams = dict(state.hyperparams)
    for name, value in later.items():
        # In the place of the old one, weakly typed where Optax made it so.
        hyperparams[name] = hyperparams[name] * 0 + value
    second, _ = step(state._replace(hyperparams=hyperparams))
    return (first, second), len(traces)


def by_hand(factory: Any, given: dict[str, Any], later: dict[str, float]) -> Any:
    """The same without injection: the second step is that of another transformation."""
    _, grads = OBJECTIVE.value_and_grad(PARAMS)
    tx = factory(**given)
    step = lambda tx, state: quick_jit(
        lambda s: tx.update(grads, s, PARAMS, value_fn=OBJECTIVE)
    )(state)  # fmt: skip
    first, state = step(tx, tx.init(PARAMS))
    second, _ = step(factory(**given | later), state)
    return first, second


@pytest.mark.parametrize("name", METHODS | STAGES)
def test_factory_is_injected_without_static_args(name):
    static, numbers = (METHODS | STAGES)[name]
    given = static | {number: start for number, (start, _) in numbers.items()}
    later = {number: value for number, (_, value) in numbers.items()}
    factory = getattr(cx, name)
    if name in BEFORE or name in AROUND:
        around = AROUND.get(name, lambda tx: BEFORE[name] | tx)
        whole = lambda factory, **given: around(factory(**given))
        factory = functools.wraps(factory)(functools.partial(whole, factory))
    found, traced = two_steps(factory, given, later)
    assert traced == 1
    assert_trees_close(found, by_hand(factory, given, later), 1e-10)


def test_injection_table_has_every_factory():
    makers = {
        name
        for name in cx.__all__
        if inspect.isfunction(getattr(cx, name))
        and inspect.signature(getattr(cx, name)).return_annotation in (cx.Stage, "Stage")
    }
    assert makers == {*METHODS, *STAGES, *BESIDE}


@pytest.mark.parametrize("name", METHODS)
def test_numbers_of_a_method_alone_are_hyperparams(name):
    static, numbers = METHODS[name]
    given = static | {number: start for number, (start, _) in numbers.items()}
    found = optax.inject_hyperparams(getattr(cx, name))(**given).init(PARAMS).hyperparams
    assert numbers.keys() <= found.keys()
    assert not STATIC & found.keys()
    assert all(x.shape == () for x in found.values())


def test_options_can_be_named_as_static():
    tx = optax.inject_hyperparams(cx.sam, static_args=("p", "steps"))(SGD, 0.1, steps=2)
    again = optax.inject_hyperparams(cx.sam)(SGD, 0.1, steps=2)
    assert_trees_close(tx.init(PARAMS), again.init(PARAMS))


def test_injected_schedules_are_recorded():
    halved = lambda count: 0.1 * 0.5**count
    tx = optax.inject_hyperparams(cx.sam)(SGD, halved)
    state = tx.init(PARAMS)
    _, grads = OBJECTIVE.value_and_grad(PARAMS)
    for number in range(2):
        updates, state = tx.update(grads, state, PARAMS, value_fn=OBJECTIVE)
        assert float(state.hyperparams["rho"]) == pytest.approx(0.1 * 0.5**number, rel=1e-12)
    plain = cx.sam(SGD, 0.05)
    expected, _ = plain.update(grads, plain.init(PARAMS), PARAMS, value_fn=OBJECTIVE)
    assert_trees_close(updates, expected)


def test_partial_factories_are_injected():
    factory = functools.partial(cx.gsam, SGD, steps=2)
    tx = optax.inject_hyperparams(factory)(rho=0.1, alpha=0.4)
    assert set(tx.init(PARAMS).hyperparams) == {"rho", "alpha"}


def test_large_seeds_are_kept():
    with jax.enable_x64(False):
        tx = optax.inject_hyperparams(cx.hutchinson_diag)(2**31 + 5)
        assert_trees_close(tx.init(PARAMS).inner_state, cx.hutchinson_diag(2**31 + 5).init(PARAMS))


OF_SAM = "('ascent', 'fraction', 'mask', 'p', 'steps')"


@pytest.mark.parametrize(
    ("factory", "static"),
    [
        (
            lambda steps: cx.sam_perturb(0.1, steps=steps),
            OF_SAM,
        ),
        (lambda p: cx.sam(SGD, 0.1, p=p), OF_SAM),
        (
            lambda probes: cx.sophia_h(0.1, probes=probes),
            "('fraction', 'key', 'probes', 'sampler', 'shards')",
        ),
        (lambda m: cx.per_group(m, cx.sam_perturb(0.1)), "('m',)"),
        (lambda lag: cx.ema_mean(0.9, lag=lag), "('lag',)"),
        (lambda block: cx.spatial_average(block), "('block', 'layout')"),
    ],
)
def test_own_factory_raises_with_its_static_args(factory, static):
    (option,) = inspect.signature(factory).parameters
    with pytest.raises(TypeError) as told:
        optax.inject_hyperparams(factory)(2).init(PARAMS)
    assert f"static_args={static}" in str(told.value)
    assert f"`{option}` of" in str(told.value)
    optax.inject_hyperparams(factory, static_args=(option,))(1).init(PARAMS)
