"""Natural-gradient methods on eight devices equal those on one, under pmap and shard_map."""

import jax
import jax.numpy as jnp
import optax
import pytest
from device_problem import DEVICES, MAPPINGS, mesh, shards
from small_problems import assert_trees_close, net, net_batch, net_params

import curvax as cx

P = jax.sharding.PartitionSpec
EXAMPLES = 16

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


def make_batch():
    batch = net_batch(EXAMPLES)
    labels = jax.random.randint(jax.random.key(4), (EXAMPLES,), 0, 2)
    # Devices differ in how much their examples weigh.
    return batch | {"label": labels, "w": 1.0 + jnp.arange(EXAMPLES) % 5}


def one_step(tx, likelihood, params, state, batch):
    objective = cx.Objective(likelihood, batch, model=net)
    _, grads = objective.value_and_grad(params)
    updates, state = tx.update(grads, state, params, value_fn=objective)
    return optax.apply_updates(params, updates), state


def run(mapping, tx, likelihood, steps=2):
    """(parameters, state) after some steps; on one device with the whole batch for "jit"."""
    params, batch = net_params(), make_batch()
    step = lambda params, state, batch: one_step(tx, likelihood, params, state, batch)
    if mapping == "jit":
        mapped = jax.jit(step)
    elif mapping == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
        batch = shards(batch)
    else:
        mapped = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh(),
                in_specs=(P(), P(), P("batch")),
                out_specs=P(),
                check_vma=mapping == "shard_map",
            )
        )
    state = tx.init(params)
    for _ in range(steps):
        params, state = mapped(params, state, batch)
    return params, state


def over(axis, *stages):
    """A pipe of a product and a solve, and the learning rate."""
    matvec, *rest = stages
    return cx.pipe(
        matvec(mean_over=axis),
        cx.pmean_updates(axis),
        *rest,
        optax.scale_by_learning_rate(0.5),
    )


def like(likelihood):
    return cx.Objective(likelihood, make_batch(), model=net)


CATEGORICAL = cx.categorical("label")
WEIGHTED = cx.categorical("label", weights="w")
CASES = {
    "natural_gradient, cg": (
        lambda axis: cx.natural_gradient(damping=1.0, solver=cx.cg(5), mean_over=axis),
        CATEGORICAL,
    ),
    "natural_gradient, dense, weighted": (
        lambda axis: cx.natural_gradient(damping=1.0, solver=cx.dense(), mean_over=axis),
        WEIGHTED,
    ),
    "natural_gradient, row_space": (
        lambda axis: cx.natural_gradient(damping=1.0, solver=cx.row_space(), mean_over=axis),
        WEIGHTED,
    ),
    "natural_gradient, sampled": (
        lambda axis: cx.natural_gradient(
            damping=1.0, solver=cx.cg(4), samples=2, radius=0.3, momentum=0.9, mean_over=axis
        ),
        CATEGORICAL,
    ),
    "gauss_newton, adaptive": (
        lambda axis: cx.gauss_newton(
            damping=1.0, solver=cx.cg(4, warm_start=0.9), adaptive=True, mean_over=axis
        ),
        cx.gaussian("y"),
    ),
    "hessian_free": (
        lambda axis: cx.hessian_free(
            solver=cx.cg(6, tol=0.0, progress=5e-4, warm_start=0.95, backtrack=True),
            mean_over=axis,
        ),
        WEIGHTED,
    ),
    "newton_cg, steihaug": (
        lambda axis: cx.newton_cg(damping=0.1, solver=cx.steihaug(0.5, 6), mean_over=axis),
        CATEGORICAL,
    ),
    "empirical Fisher, preconditioned": (
        lambda axis: cx.pipe(
            cx.empirical_fisher_diag(mean_over=axis),
            over(
                axis,
                cx.empirical_fisher_matvec,
                cx.damp(1.0),
                cx.solve(cx.cg(4, preconditioner=0.75)),
                cx.quadratic_step(),
            ),
        ),
        WEIGHTED,
    ),
    "diagonal_natural_gradient": (
        lambda axis: cx.diagonal_natural_gradient(0.1, damping=0.1, probes=2, mean_over=axis),
        WEIGHTED,
    ),
    "gauss_newton_diag in shards": (
        lambda axis: (
            cx.gauss_newton_diag(shards=8, mean_over=axis)
            | cx.pmean_updates(axis)
            | cx.scale_by_power(1.0, eps=0.1)
            | optax.sgd(0.1)
        ),
        CATEGORICAL,
    ),
    "sophia_g": (lambda axis: cx.sophia_g(0.1, every=2, mean_over=axis), CATEGORICAL),
    "sophia_h": (lambda axis: cx.sophia_h(0.1, every=2, mean_over=axis), CATEGORICAL),
    "kfac": (
        lambda axis: cx.kfac(
            like(CATEGORICAL), 0.5, damping=0.3, momentum=0.9, radius=0.3, mean_over=axis
        ),
        CATEGORICAL,
    ),
    "kfac, quadratic, weighted, stale": (
        lambda axis: cx.kfac(
            like(WEIGHTED),
            damping=1.0,
            momentum="quadratic",
            inverses_every=2,
            factors_every=2,
            adaptive=True,
            mean_over=axis,
        ),
        WEIGHTED,
    ),
    "ekfac": (
        lambda axis: cx.ekfac(
            like(WEIGHTED), 0.5, damping=0.3, bases_every=2, momentum="quadratic", mean_over=axis
        ),
        WEIGHTED,
    ),
    # Gradients of a softmax have rank 1 here, and bases that follow from rounding.
    "soap": (lambda axis: cx.soap(0.1, eps=0.1, every=2, mean_over=axis), cx.gaussian("y")),
    "gauss_newton_kronecker": (
        lambda axis: (
            cx.gauss_newton_kronecker(like(WEIGHTED), mean_over=axis)
            | cx.accumulate()
            | cx.pmean_updates(axis)
            | cx.scale_by_power(0.5, damping=0.1)
            | optax.sgd(0.1)
        ),
        WEIGHTED,
    ),
    "exact_diag": (
        lambda axis: (
            cx.exact_diag("fisher", mean_over=axis)
            | cx.pmean_updates(axis)
            | cx.scale_by_power(1.0, eps=0.1)
            | optax.sgd(0.1)
        ),
        CATEGORICAL,
    ),
    "squared_gradient": (
        lambda axis: (
            cx.pmean_updates(axis)
            | cx.squared_gradient()
            | cx.ema_mean(0.9)
            | cx.scale_by_power(0.5, eps=0.1)
            | optax.sgd(0.1)
        ),
        WEIGHTED,
    ),
    "SAM in the Fisher metric, synced": (
        lambda axis: cx.sam(
            optax.sgd(0.1),
            0.3,
            ascent=cx.fisher_ascent(0.5, solver=cx.cg(4)),
            sync_over=axis,
            mean_over=axis,
        ),
        CATEGORICAL,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, likelihood = CASES[request.param]
    return build("batch"), likelihood, run("jit", build("batch"), likelihood)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_method_on_eight_devices_equals_that_on_one(case, mapping, request):
    tx, likelihood, (expected, state_of_one) = case
    params, state = run(mapping, tx, likelihood)
    assert_trees_close(params, expected, 1e-11)
    if "SAM" not in request.node.name:  # SAM's diagnostics are means over the devices
        assert_trees_close(state, state_of_one, 1e-5)


def test_sam_in_the_fisher_metric_is_local_by_default():
    tx = cx.sam(
        optax.sgd(0.1), 0.3, ascent=cx.fisher_ascent(0.5, solver=cx.cg(4)), mean_over="batch"
    )
    found, _ = run("shard_map", tx, CATEGORICAL, steps=1)
    alone = cx.sam_perturb(0.3, ascent=cx.fisher_ascent(0.5, solver=cx.cg(4)))
    params, total = net_params(), None
    pieces = shards(make_batch())
    for i in range(DEVICES):
        objective = cx.Objective(CATEGORICAL, jax.tree.map(lambda x, i=i: x[i], pieces), model=net)
        g = objective.value_and_grad(params)[1]
        u, _ = alone.update(g, alone.init(params), params, value_fn=objective)
        total = u if total is None else jax.tree.map(jnp.add, total, u)
    expected = jax.tree.map(lambda p, u: p - 0.1 * u / DEVICES, params, total)
    assert_trees_close(found, expected, 1e-11)


REFUSED = {
    "fisher_matvec": (cx.fisher_matvec() | cx.damp(1.0), "mean_over='batch'"),
    "fisher_diag": (cx.fisher_diag(), "mean_over='batch'"),
    "empirical_fisher_diag": (cx.empirical_fisher_diag(), "mean_over='batch'"),
    "solve": (
        cx.fisher_matvec(mean_over="batch") | cx.damp(1.0) | cx.solve(cx.cg(2)),
        "pmean_updates",
    ),
    "squared_gradient": (cx.squared_gradient(), "pmean_updates"),
    "squared_gradient, kept": (cx.every(2, cx.squared_gradient()), "pmean_updates"),
    "levenberg_marquardt": (cx.levenberg_marquardt(cx.fisher_matvec()), "mean_over='batch'"),
    "shards": (cx.fisher_diag(shards=3, mean_over="batch"), "multiple of the 8 devices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_missing_mean_over_devices_is_refused(name):
    tx, match = REFUSED[name]
    for mapping in MAPPINGS:
        with pytest.raises(ValueError, match=match):
            run(mapping, tx | cx.pmean_updates("batch"), CATEGORICAL, steps=1)
