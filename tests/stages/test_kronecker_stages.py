"""Stages of Kronecker factors: against the operator, a loop over steps, and on eight devices."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from kronecker_problems import assert_same
from small_problems import net, net_batch, net_params, quick_jit

import curvax as cx
from curvax.parameter_roles.layouts import Layout, Leaf

PARAMS = net_params()
STAGES = {
    "sampled": cx.fisher_kronecker,
    "exact": cx.gauss_newton_kronecker,
    "empirical": cx.empirical_fisher_kronecker,
}


def objective_of(batch: Any = None, **options: Any) -> cx.Objective:
    batch = net_batch() if batch is None else batch
    return cx.Objective(cx.gaussian("y"), batch, model=net, **options)


def moved(t: int) -> Any:
    return jax.tree.map(lambda x: x * (1 + 0.1 * t), PARAMS)


def factors_at(params: Any, fisher: str = "exact", t: int = 0) -> cx.KroneckerFactors:
    key = jax.random.fold_in(jax.random.key(0), t) if fisher == "sampled" else None
    return cx.kronecker_factors(objective_of(), params, fisher=fisher, key=key)


def signals(tx: cx.Stage, steps: int = 4) -> list[cx.Signal]:
    """The signals behind a stage at `moved(0)`, `moved(1)`, ..., from one compilation."""

    traced = []

    @quick_jit
    def run(state: Any, params: Any) -> Any:
        traced.append(params)
        objective = objective_of()
        signal = cx.Signal(objective.value_and_grad(params)[1])
        signal, state = tx.update(signal, state, params, value_fn=objective)
        return signal._replace(matvec=None, local=None, averaged=None, perturbed=None), state

    state, found = tx.init(PARAMS), []
    for t in range(steps):
        signal, state = run(state, moved(t))
        found.append(signal)
    assert len(traced) == 1
    return found


@pytest.mark.parametrize("fisher", STAGES)
def test_estimators_set_the_factors_of_the_operator_and_share_the_gradient(fisher):
    objective, params = objective_of(), PARAMS
    given = objective.value_and_grad(params)[1]
    stage = STAGES[fisher]()
    signal, _ = stage.update(cx.Signal(given), stage.init(params), params, value_fn=objective)
    assert_same(signal.factors, factors_at(params, fisher))
    assert signal.updates is not given
    assert_same(signal.updates, given, 1e-12)
    plain, _ = stage.update(given, stage.init(params), params, value_fn=objective)
    assert_same(plain, given, 1e-12)


def test_another_gradient_than_that_of_the_objective_is_kept():
    clipped = optax.tree.scale(0.1, objective_of().value_and_grad(PARAMS)[1])
    stage = cx.gauss_newton_kronecker()
    found, _ = stage.update(clipped, stage.init(PARAMS), PARAMS, value_fn=objective_of())
    assert found is clipped or all(x is y for x, y in zip(*map(jax.tree.leaves, (found, clipped))))


def test_labels_are_drawn_anew_in_every_step():
    stage = cx.fisher_kronecker(objective_of())
    for t, signal in enumerate(signals(stage, 2)):
        assert_same(signal.factors, factors_at(moved(t), "sampled", t))


@pytest.mark.parametrize("debias", [True, False])
def test_ema_mean_averages_factors(debias):
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.ema_mean(0.8, debias=debias)
    past = [factors_at(moved(t)) for t in range(4)]
    for t, signal in enumerate(signals(tx)):
        shares = [0.2 * 0.8 ** (t - i) for i in range(t + 1)]
        total = sum(shares) if debias else 1.0
        mean = lambda *xs, shares=shares, total=total: (
            sum(s * x for s, x in zip(shares, xs)) / total
        )
        assert_same(signal.factors, jax.tree.map(mean, *past[: t + 1]))


def test_accumulate_sums_factors():
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.accumulate()
    sums = jax.tree.map(lambda *xs: sum(xs), *(factors_at(moved(t)) for t in range(3)))
    assert_same(signals(tx, 3)[-1].factors, sums)


def test_every_keeps_factors_between_estimates():
    tx = cx.every(2, cx.gauss_newton_kronecker(objective_of()))
    for t, signal in enumerate(signals(tx)):
        assert_same(signal.factors, factors_at(moved(t - t % 2)))


@pytest.mark.parametrize("style", ["exact", "heuristic"])
def test_solve_is_the_solution_with_the_factors(style):
    tx = cx.gauss_newton_kronecker() | cx.damp(0.3) | cx.solve(cx.kronecker(style=style))
    for t, signal in enumerate(signals(tx, 2)):
        gradient = objective_of().value_and_grad(moved(t))[1]
        assert_same(signal.updates, factors_at(moved(t)).solve(gradient, 0.3, style))


@pytest.mark.parametrize("style", ["exact", "heuristic"])
def test_factorisations_have_a_clock_of_their_own(style):
    """Factors of every step, factorised in steps 0 and 3; exact solutions take λ of the step."""
    lam = lambda t: 0.3 * (1.0 + t)
    solver = cx.kronecker(3, style=style)
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.damp(lam) | cx.solve(solver)
    for t, signal in enumerate(signals(tx)):
        gradient, of = objective_of().value_and_grad(moved(t))[1], t - t % 3
        damping = lam(t if style == "exact" else of)
        assert_same(signal.updates, factors_at(moved(of)).solve(gradient, damping, style))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_scale_by_power_divides_in_the_eigenbasis(power):
    tx = cx.gauss_newton_kronecker() | cx.scale_by_power(power, eps=0.0, damping=0.3)
    gradient = objective_of().value_and_grad(PARAMS)[1]
    found = signals(tx, 1)[0].updates
    assert_same(found, factors_at(PARAMS).power(gradient, -power, 0.3))


def test_eps_is_added_to_the_power_of_the_eigenvalues():
    tx = cx.gauss_newton_kronecker() | cx.scale_by_power(0.5, eps=0.2, damping=0.3)
    gradient = objective_of().value_and_grad(PARAMS)[1]
    factors = factors_at(PARAMS)
    back = factors.scaled(signals(tx, 1)[0].updates, lambda d: jnp.sqrt(d + 0.3) + 0.2)
    assert_same(back, gradient)


def test_factors_are_the_product_of_stages_that_need_one():
    """The trust region shortens the step to √(δᵀCδ) = r, and the quadratic step is Newton's."""
    factors = factors_at(PARAMS)
    tx = cx.gauss_newton_kronecker() | cx.trust_region(0.1)
    delta = signals(tx, 1)[0].updates
    np.testing.assert_allclose(optax.tree.vdot(delta, factors(delta)), 0.01, rtol=1e-10)
    solved = cx.damp(0.3) | cx.solve(cx.kronecker())
    tx = cx.gauss_newton_kronecker() | solved | cx.quadratic_step(momentum=False)
    gradient = objective_of().value_and_grad(PARAMS)[1]
    assert_same(signals(tx, 1)[0].updates, factors.solve(gradient, 0.3), 1e-10)


def test_a_gradient_of_the_first_half_of_the_batch_does_not_replace_that_of_the_whole():
    tx = cx.gauss_newton_kronecker(fraction=0.5)
    half = jax.tree.map(lambda x: x[:4], net_batch())
    (signal,) = signals(tx, 1)
    assert_same(signal.factors, cx.kronecker_factors(objective_of(half), PARAMS))
    assert_same(signal.updates, objective_of().value_and_grad(PARAMS)[1], 1e-12)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_micro_batches_and_devices_give_the_factors_of_the_whole_batch(fisher):
    whole = factors_at(PARAMS, fisher)
    stage = STAGES[fisher](mean_over="batch")

    def of_device(params: Any, batch: Any) -> Any:
        objective = objective_of(batch)
        signal = cx.Signal(objective.value_and_grad(params)[1])
        return stage.update(signal, stage.init(params), params, value_fn=objective)[0].factors

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    assert_same(quick_jit(over)(PARAMS, net_batch()), whole)
    pieces = objective_of(microbatch=2)
    signal = cx.Signal(pieces.value_and_grad(PARAMS)[1])
    alone = STAGES[fisher]()
    found, _ = alone.update(signal, alone.init(PARAMS), PARAMS, value_fn=pieces)
    assert_same(found.factors, whole)
    assert_same(found.updates, objective_of().value_and_grad(PARAMS)[1], 1e-12)


def test_a_missing_mean_over_devices_is_refused():
    def of_device(params: Any, batch: Any) -> Any:
        objective = objective_of(batch)
        grads = objective.value_and_grad(params)[1]
        stage = cx.fisher_kronecker()
        return stage.update(grads, stage.init(params), params, value_fn=objective)[0]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    with pytest.raises(ValueError, match=r"`fisher_kronecker`.*mean_over"):
        jax.eval_shape(over, PARAMS, net_batch())


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "divided",
    [
        cx.damp(0.3) | cx.solve(cx.kronecker(divided_over="batch")),
        cx.in_eigenbasis(cx.fisher_eigenvalues(mean_over="batch"), divided_over="batch"),
    ],
    ids=["kronecker", "in_eigenbasis"],
)
def test_factors_of_each_device_are_not_divided_among_devices(divided, check):
    tx = cx.fisher_kronecker(mean_over=()) | cx.pmean_updates("batch") | divided

    def of_device(params: Any, batch: Any) -> Any:
        objective = objective_of(batch)
        grads = objective.value_and_grad(params)[1]
        return tx.update(grads, tx.init(params), params, value_fn=objective)[0]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs: Any = dict(in_specs=(P(), P("batch")), out_specs=P("batch"), check_vma=check)
    over = jax.shard_map(of_device, mesh=mesh, **specs)
    with pytest.raises(ValueError, match=r"each device's own over \['batch'\]"):
        jax.eval_shape(over, PARAMS, net_batch())


# Factors as a preconditioner


def steps_and_solution(preconditioner: Any, factors: Any, v: Any) -> tuple[int, Any]:
    solver = cx.cg(40, tol=1e-10, preconditioner=preconditioner)
    solution = solver(cx.Product(factors).damped(0.1), v, factors=factors)
    return int(solution.steps), solution.x


@pytest.mark.parametrize("style", ["exact", "heuristic"])
def test_factors_precondition_cg(style):
    """With the matrix itself as preconditioner CG takes one step."""
    factors = factors_at(PARAMS)
    preconditioner = cx.kronecker(style=style)
    steps, found = steps_and_solution(preconditioner, factors, moved(3))
    plain, _ = steps_and_solution(None, factors, moved(3))
    assert_same(found, factors.solve(moved(3), 0.1), 1e-8)
    assert steps == 1 if style == "exact" else steps < plain


def test_cg_preconditioned_in_a_pipe_solves_with_the_fisher_matrix():
    """Factors of the first step, kept for the second, and the product of each step."""
    solver = cx.cg(60, tol=1e-12, preconditioner=cx.kronecker(2), warm_start=0.5)
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.fisher_matvec() | cx.damp(0.3)
    for t, signal in enumerate(signals(tx | cx.solve(solver), 2)):
        fisher = cx.fvp(objective_of(), moved(t))
        back = jax.tree.map(lambda c, x: c + 0.3 * x, fisher(signal.updates), signal.updates)
        assert_same(back, signal.gradient, 1e-9)


def test_preconditioners_that_are_none_are_refused():
    with pytest.raises(ValueError, match="takes `kronecker\\(\\)` of the solvers"):
        cx.cg(3, preconditioner=cx.dense())
    tx = cx.fisher_matvec() | cx.damp(0.3) | cx.solve(cx.cg(3, preconditioner=cx.kronecker()))
    with pytest.raises(ValueError, match="no earlier stage gave any"):
        update(tx)
    kept = cx.solve(cx.steihaug(1.0, preconditioner=cx.kronecker(2)))
    tx = cx.fisher_kronecker() | cx.fisher_matvec() | kept
    with pytest.raises(ValueError, match="like=objective"):
        tx.init(PARAMS)


# K-FAC


def test_kfac_is_its_loop():
    tx = cx.kfac(objective_of(), 0.5, damping=0.3, decay=0.8, inverses_every=2, momentum=0.9, key=0)

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        objective = objective_of()
        grads = objective.value_and_grad(params)[1]
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    other, mean, weight = PARAMS, None, 0.0
    trace = jax.tree.map(jnp.zeros_like, PARAMS)
    for t in range(4):
        params, state = step(params, state)
        new = factors_at(other, "sampled", t)
        faded = lambda m, x: 0.8 * m + 0.2 * x
        zeros = jax.tree.map(jnp.zeros_like, new)
        mean = jax.tree.map(faded, zeros if mean is None else mean, new)
        weight = 0.8 * weight + 0.2
        if t % 2 == 0:
            kept = jax.tree.map(lambda m, weight=weight: m / weight, mean)
        natural = kept.solve(objective_of().value_and_grad(other)[1], 0.3, "heuristic")
        trace = jax.tree.map(lambda m, x: 0.9 * m + x, trace, natural)
        other = jax.tree.map(lambda x, u: x - 0.5 * u, other, trace)
        assert_same(params, other, 1e-10)


def test_adaptive_kfac_minimises_a_quadratic_in_a_few_steps():
    """A deep linear model whose loss falls to the noise: twenty steps, where λ also falls."""
    x, w = net_batch()["x"], jax.random.normal(jax.random.key(5), (4, 2))
    batch = {"x": x, "y": x @ w}
    predict = lambda p, b: b["x"] @ p["a"] @ p["b"]
    params = {"a": 0.5 * jnp.eye(4), "b": 0.5 * jnp.ones((4, 2))}
    tx = cx.kfac(
        cx.Objective(cx.gaussian("y"), batch, model=predict), momentum="quadratic", adaptive=True
    )

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        objective = cx.Objective(cx.gaussian("y"), batch, model=predict)
        value, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
        return value, optax.apply_updates(params, updates), state

    state, values = tx.init(params), []
    for _ in range(20):
        value, params, state = step(params, state)
        values.append(float(value))
    assert values[-1] < 1e-6 * values[0]
    assert cx.diagnostics(state)["damping"] < 1e-3
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))


def test_hyperparameters_are_injected():
    make = optax.inject_hyperparams(cx.kfac)
    tx = make(like=objective_of(), learning_rate=0.5, damping=0.3, radius=1.0)
    assert set(tx.init(PARAMS).hyperparams) >= {"learning_rate", "damping", "decay", "radius"}
    grads = objective_of().value_and_grad(PARAMS)[1]
    run = lambda tx: tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective_of())[0]
    plain = cx.kfac(objective_of(), 0.5, damping=0.3, radius=1.0)
    assert_same(run(tx), run(plain), 1e-10)


def test_state_holds_plain_arrays_and_no_batch():
    """So that any checkpoint of a pytree holds it, and `like` costs no memory."""
    state = cx.kfac(objective_of(), 1.0).init(PARAMS)
    sizes = [x.size for x in jax.tree.leaves(state)]
    factors = [x.size for x in jax.tree.leaves(factors_at(PARAMS))]
    assert sum(sizes) < 2 * sum(factors) + 20
    named = jax.tree_util.tree_leaves_with_path(state)
    kinds = {type(entry).__name__ for path, _ in named for entry in path}
    assert kinds <= {"SequenceKey", "GetAttrKey", "DictKey"}


# Errors


def update(tx: Any, batch: Any = None) -> Any:
    objective = objective_of(batch)
    grads = objective.value_and_grad(PARAMS)[1]
    return tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)


@pytest.mark.parametrize(
    "keep",
    [cx.ema_mean(0.9), cx.accumulate()],
    ids=["ema_mean", "accumulate"],
)
def test_factors_are_kept_only_where_their_shapes_are_known(keep):
    with pytest.raises(ValueError, match=r"(?s)keeps Kronecker factors.*like=objective"):
        update(cx.fisher_kronecker() | keep)


def test_shapes_of_factorisations_are_needed_before_the_first_step():
    tx = cx.fisher_kronecker() | cx.damp(0.1) | cx.solve(cx.kronecker(5))
    with pytest.raises(ValueError, match=r"(?s)`kronecker\(every=5\)`.*like=objective"):
        tx.init(PARAMS)


def test_another_model_than_that_of_init_is_refused():
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.ema_mean(0.9)
    wide = {"x": net_batch()["x"], "y": jnp.zeros((8, 2))}
    halved = lambda p, b: b["x"][:, :4] @ p["hidden"]["kernel"] @ p["out"]["kernel"]
    objective = cx.Objective(cx.gaussian("y"), wide, model=halved)
    grads = objective.value_and_grad(PARAMS)[1]
    with pytest.raises(ValueError, match="not for the factors"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)


def heuristic() -> cx.Stage:
    return cx.solve(cx.kronecker(style="heuristic"))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: update(cx.fisher_matvec() | cx.solve(cx.kronecker())), "no earlier stage gave"),
        (lambda: update(cx.fisher_kronecker() | cx.damp(0.0) | heuristic()), "positive"),
        (lambda: cx.kronecker(0), "positive integer"),
        (lambda: cx.kronecker(style="fast"), "is one of"),
        (lambda: cx.fisher_kronecker(sharing="sum"), r"fisher_kronecker\(sharing=\)"),
        (lambda: cx.fisher_kronecker(fraction=2.0), r"\(0, 1\]"),
        (lambda: cx.kfac(objective_of(), momentum="nesterov"), "'nesterov'"),
        (
            lambda: (cx.gauss_newton_kronecker(objective_of()) | cx.accumulate(0.1)).init(PARAMS),
            "from 0",
        ),
    ],
)
def test_bad_input_is_refused(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()


def test_batches_that_are_not_finite_never_reach_the_parameters():
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.ema_mean(0.9) | cx.damp(0.1)
    tx = tx | cx.solve(cx.kronecker(2)) | optax.sgd(0.1)
    fine, spoilt = net_batch(), dict(net_batch(), x=net_batch()["x"].at[0, 0].set(jnp.nan))

    @partial(jax.jit)
    def step(params: Any, state: Any, batch: Any) -> Any:
        objective = objective_of(batch)
        grads = objective.value_and_grad(params)[1]
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, tx.init(PARAMS), fine)
    after, spoilt_state = step(params, state, spoilt)
    assert_same(after, params, 0)
    mean = lambda state: jax.tree.map(lambda x: x / state[1].weight, state[1].mean)
    assert_same(mean(spoilt_state), mean(state), 1e-12)
    later, _ = step(after, spoilt_state, fine)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(later))
    assert not np.array_equal(later["out"]["kernel"], after["out"]["kernel"])


def test_a_batch_of_one_example_has_factors():
    one = jax.tree.map(lambda x: x[:1], net_batch())
    tx = cx.gauss_newton_kronecker(objective_of(one)) | cx.ema_mean(0.9) | cx.damp(0.1)
    updates, _ = update(tx | cx.solve(cx.kronecker()), one)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))


def test_a_restricted_method_has_factors_of_its_leaves():
    """The kernels by K-FAC, the bias by SGD; the loss is that of the kernels alone."""
    tx = cx.partition(
        {"kfac": cx.kfac(objective_of(), damping=0.3), "sgd": optax.sgd(1.0)},
        {"hidden": {"kernel": "kfac", "bias": "sgd"}, "out": {"kernel": "kfac"}},
    )
    updates, _ = update(tx)
    bias = PARAMS["hidden"]["bias"]
    kernels = {"hidden": {"kernel": PARAMS["hidden"]["kernel"]}, "out": PARAMS["out"]}
    fill = lambda p: {"hidden": {"kernel": p["hidden"]["kernel"], "bias": bias}, "out": p["out"]}
    alone = objective_of().through(fill)
    key = jax.random.fold_in(jax.random.key(0), 0)
    factors = cx.kronecker_factors(alone, kernels, fisher="sampled", key=key)
    step = factors.solve(alone.value_and_grad(kernels)[1], 0.3, "heuristic")
    assert_same({"hidden": {"kernel": updates["hidden"]["kernel"]}, "out": updates["out"]},
                jax.tree.map(jnp.negative, step))  # fmt: skip


# Shampoo


def quarter_root(matrix: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors @ jnp.diag(values**-0.25) @ vectors.T


def matrices_of(t: int) -> dict[str, jax.Array]:
    """Gradients of a kernel, of four stacked ones, of a projection of two heads, and of a bias."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), t), 4)
    shapes = {"kernel": (4, 3), "stacked": (2, 3, 4), "heads": (4, 2, 3), "bias": (3,)}
    return {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items())}


AXES = {
    "kernel": ((0,), (1,), ()),
    "stacked": ((1,), (2,), (0,)),
    "heads": ((0,), (1, 2), ()),
    "bias": ((), (0,), ()),
}
LAYOUT = Layout(
    {
        (name,): Leaf("bias" if name == "bias" else "dense", matrices_of(0)[name].shape, (),
                      inputs, outputs, depth, name)
        for name, (inputs, outputs, depth) in AXES.items()
    }
)  # fmt: skip


@pytest.mark.parametrize(("decay", "every"), [(None, 1), (0.8, 1), (0.8, 3)])
def test_shampoo_is_the_method_written_out(decay, every):
    """With `every` above 1 the roots of the kernels are those of an earlier step."""
    tx = cx.shampoo(0.5, decay=decay, damping=0.0, every=every, layout=LAYOUT)
    params = jax.tree.map(jnp.zeros_like, matrices_of(0))
    update = quick_jit(lambda g, state: tx.update(g, state, params))
    state, total = tx.init(params), dict[str, Any]()
    for t in range(6):
        grads = matrices_of(t)
        updates, state = update(grads, state)
        sides: dict[str, Any] = {"bias": (jnp.square(grads["bias"]),)}
        for name, matrix in slices(grads).items():
            sides[name] = (matrix.T @ matrix, matrix @ matrix.T)
        fade = (lambda m, x: m + x) if decay is None else (lambda m, x: 0.8 * m + 0.2 * x)
        total = {n: tuple(map(fade, total.get(n, (0.0, 0.0)), x)) for n, x in sides.items()}
        if t % every == 0:
            last, kept = t, total
    weight_at = lambda t: 1.0 if decay is None else 1 - 0.8 ** (t + 1)
    weight = weight_at(5)
    found = slices(updates)
    for name, matrix in slices(matrices_of(5)).items():
        right, left = (quarter_root(x / weight_at(last)) for x in kept[name])
        np.testing.assert_allclose(found[name], -0.5 * left @ matrix @ right, rtol=1e-8)
    expected = -0.5 * matrices_of(5)["bias"] / jnp.sqrt(total["bias"][0] / weight)
    np.testing.assert_allclose(updates["bias"], expected, rtol=1e-10)


def test_devices_that_divide_the_roots_take_the_steps_of_one():
    tx = cx.gradient_kronecker() | cx.scale_by_power(0.5, every=2, divided_over="batch")
    alone, divided = tx.init(PARAMS), tx.init(PARAMS)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    step = lambda g, state: tx.update(g, state, PARAMS)
    mapped = quick_jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P()), out_specs=P()))
    assert "all_reduce" in mapped.lower(PARAMS, divided).as_text()
    for t in range(3):
        grads = moved(t)
        expected, alone = quick_jit(step)(grads, alone)
        found, divided = mapped(grads, divided)
        assert_same(found, expected, 1e-9)


def test_a_clock_of_decompositions_needs_factors():
    tx = cx.squared_gradient() | cx.scale_by_power(0.5, every=2)
    with pytest.raises(ValueError, match=r"`gradient_kronecker\(\)`.*leave `every` out"):
        tx.init(PARAMS)


def slices(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Every matrix [outputs, inputs]."""
    stacked = {f"stacked{n}": x.T for n, x in enumerate(tree["stacked"])}
    return {"kernel": tree["kernel"].T, "heads": tree["heads"].reshape(4, 6).T} | stacked


def test_sides_follow_from_names_without_a_layout():
    """As for the net with the layout of its model: the kernels have factors, the bias a square."""
    tx = cx.gradient_kronecker()
    signal, _ = tx.update(cx.Signal(PARAMS), tx.init(PARAMS), PARAMS)
    kinds = {name: line.treatment for name, line in signal.factors.report().items()}
    assert kinds == {"hidden/bias": "diagonal", "hidden/kernel": "kronecker",
                     "out/kernel": "kronecker"}  # fmt: skip
    inputs, outputs = signal.factors.factors_of("hidden/kernel")
    kernel = PARAMS["hidden"]["kernel"]
    np.testing.assert_allclose(inputs, kernel @ kernel.T, rtol=1e-12)
    np.testing.assert_allclose(outputs, kernel.T @ kernel, rtol=1e-12)


def test_kernels_with_a_large_side_are_divided_by_their_squares():
    tx = cx.gradient_kronecker(largest=3) | cx.scale_by_power(0.5, eps=0.0)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_same(updates["hidden"], jax.tree.map(jnp.sign, PARAMS["hidden"]))


def test_factors_of_the_gradient_have_the_product_and_the_solution_of_their_root():
    tx = cx.gradient_kronecker()
    signal, _ = tx.update(cx.Signal(PARAMS), tx.init(PARAMS), PARAMS)
    v = moved(3)
    solved = signal.factors.solve(v, 0.1)
    back = jax.tree.map(lambda x, y: x + 0.1 * y, signal.factors(solved), solved)
    assert_same(back, v)
    kernel = PARAMS["out"]["kernel"]
    norm = jnp.sum(jnp.linalg.svd(kernel)[1])  # tr (KKᵀ)^½
    only = jax.tree.map(jnp.zeros_like, PARAMS) | {"out": PARAMS["out"]}
    single, _ = tx.update(cx.Signal(only), tx.init(PARAMS), PARAMS)
    # An eigenvalue that is 0 to rounding has a root near 1e-8.
    np.testing.assert_allclose(single.factors.trace(), norm**2, rtol=1e-7)
    with pytest.raises(ValueError, match="root of their product"):
        signal.factors.solve(v, 0.1, style="heuristic")
