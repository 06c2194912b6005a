"""Eigenvalues in the eigenbasis of Kronecker factors: E-KFAC and SOAP, against dense matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kronecker_problems import assert_same
from small_problems import net, net_batch, net_params, quick_jit

import curvax as cx
from curvax.arithmetic import trees
from curvax.curvature.kronecker.corrected import corrections
from curvax.parameter_roles.layouts import Layout, Leaf

PARAMS = net_params()
ESTIMATORS = {
    "exact": cx.gauss_newton_kronecker,
    "sampled": cx.fisher_kronecker,
    "empirical": cx.empirical_fisher_kronecker,
}


def objective_of(batch: Any = None) -> cx.Objective:
    return cx.Objective(cx.gaussian("y"), net_batch() if batch is None else batch, model=net)


def factors_behind(tx: cx.Stage, params: Any = PARAMS, batch: Any = None) -> Any:
    objective = objective_of(batch)
    signal = cx.Signal(objective.value_and_grad(params)[1])
    return tx.update(signal, tx.init(params), params, value_fn=objective)[0].factors


def update(tx: cx.Stage, batch: Any = None) -> Any:
    objective = objective_of(batch)
    _, grads = objective.value_and_grad(PARAMS)
    return tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)[0]


# The problem in the eigenbasis


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("fisher", ESTIMATORS)
def test_eigenvalues_are_those_of_the_corrected_factors(fisher, bias):
    key = jax.random.key(0)
    tx = ESTIMATORS[fisher](bias=bias) | cx.in_eigenbasis(cx.fisher_eigenvalues(key))
    drawn: Any = {"key": jax.random.fold_in(key, 0)} if fisher == "sampled" else {}
    factors = cx.kronecker_factors(objective_of(), PARAMS, fisher=fisher, bias=bias, **drawn)
    expected = factors.corrected(objective_of(), PARAMS, **drawn)
    found = factors_behind(tx)
    assert_same(found(PARAMS), expected(PARAMS), 1e-12)
    np.testing.assert_allclose(found.trace(), expected.trace(), rtol=1e-12)


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_eigenvalues_are_the_diagonal_of_the_dense_fisher_matrix_in_the_basis(bias):
    """Q diag(D) Qᵀ with D = diag QᵀFQ, F of all parameters, for both ways to say it."""
    estimator = cx.gauss_newton_kronecker(bias=bias)
    found = factors_behind(estimator | cx.in_eigenbasis(cx.fisher_eigenvalues()))
    rotation = cx.materialize(found.out_of, PARAMS)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(len(rotation)), atol=1e-12)
    fisher = cx.materialize(lambda v: cx.fvp(objective_of(), PARAMS)(v), PARAMS)
    expected = jnp.diag(rotation.T @ fisher @ rotation)
    np.testing.assert_allclose(cx.materialize(found, PARAMS),
                               rotation @ jnp.diag(expected) @ rotation.T, atol=1e-12)  # fmt: skip
    exact = factors_behind(estimator | cx.in_eigenbasis(cx.exact_diag("fisher")))
    assert_same(exact(PARAMS), found(PARAMS), 1e-10)


def test_stages_inside_see_the_loss_as_a_function_of_turned_parameters():
    """The diagonal of the Hessian in the basis, which needs both the loss and the point."""
    found = factors_behind(cx.gauss_newton_kronecker() | cx.in_eigenbasis(cx.exact_diag("hessian")))
    rotation = cx.materialize(found.out_of, PARAMS)
    hessian = cx.materialize(
        lambda v: jax.jvp(jax.grad(objective_of()), (PARAMS,), (v,))[1], PARAMS
    )
    expected = rotation @ jnp.diag(jnp.diag(rotation.T @ hessian @ rotation)) @ rotation.T
    np.testing.assert_allclose(cx.materialize(found, PARAMS), expected, atol=1e-12)


def test_a_product_inside_is_that_of_the_basis():
    """(QᵀFQ)⁻¹Qᵀu, turned back by the factors, is what a stage inside may measure."""
    seen = {}

    def rule(signal, state, params=None, **extra):
        seen["inside"] = signal.matvec(signal.updates)
        seen["updates"], seen["gradient"] = signal.updates, signal.gradient
        return signal._replace(diagonal=signal.updates), state

    look = cx.stage(lambda params: optax.EmptyState(), rule)
    tx = cx.gauss_newton_kronecker() | cx.fisher_matvec() | cx.in_eigenbasis(look)
    factors = factors_behind(tx)
    grads = objective_of().value_and_grad(PARAMS)[1]
    assert_same(factors.out_of(seen["updates"]), grads)
    assert seen["gradient"] is seen["updates"]
    expected = cx.fvp(objective_of(), PARAMS)(grads)
    assert_same(factors.out_of(seen["inside"]), expected, 1e-12)


def test_bases_are_kept_between_changes():
    tx = cx.gauss_newton_kronecker(objective_of()) | cx.in_eigenbasis(
        cx.squared_gradient(), every=3
    )

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        objective = objective_of()
        signal = cx.Signal(objective.value_and_grad(params)[1])
        signal, state = tx.update(signal, state, params, value_fn=objective)
        return signal.updates, state

    state, bases = tx.init(PARAMS), []
    for t in range(5):
        _, state = step(jax.tree.map(lambda x, t=t: x * (1 + 0.1 * t), PARAMS), state)
        bases.append(state[1].bases)
    for kept in (bases[1], bases[2]):
        assert_same(kept, bases[0], 0)
    assert_same(bases[4], bases[3], 0)
    moved = [float(jnp.max(jnp.abs(x - y))) for x, y in
             zip(jax.tree.leaves(bases[3]), jax.tree.leaves(bases[0]))]  # fmt: skip
    assert max(moved) > 1e-3


@pytest.mark.parametrize("style", ["exact", "iteration"])
def test_factors_that_are_not_finite_leave_the_basis(style):
    """A sum of gradients whose second step is NaN: the parameters of later steps are finite."""
    tx = cx.gradient_kronecker() | cx.in_eigenbasis(
        cx.squared_gradient() | cx.ema_mean(0.9),
        every=1 if style == "iteration" else 2,
        style=style,
    )
    tx = tx | cx.scale_by_power(0.5)
    state = tx.init(PARAMS)
    for t in range(4):
        grads = jax.tree.map(lambda x, t=t: x + (jnp.nan if t in (0, 2) else t), PARAMS)
        updates, state = tx.update(grads, state, PARAMS)
        finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state[1].bases))
        assert finite
        assert bool(jnp.all(jnp.isfinite(updates["out"]["kernel"]))) == (t in (1, 3))


# E-KFAC


def test_ekfac_is_its_loop():
    tx = cx.ekfac(objective_of(), 0.5, damping=0.3, decay=0.8, eigenvalues_decay=0.6, bases_every=2)

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        objective = objective_of()
        grads = objective.value_and_grad(params)[1]
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params, state, other = PARAMS, tx.init(PARAMS), PARAMS
    sums, values, bases = None, None, ()
    for t in range(4):
        params, state = step(params, state)
        key = jax.random.fold_in(jax.random.key(0), t)
        new = cx.kronecker_factors(objective_of(), other, fisher="sampled", key=key)
        sums = faded(0.8, sums, new)
        averaged = jax.tree.map(lambda x, t=t: x / (1 - 0.8 ** (t + 1)), sums)
        if t % 2 == 0:
            bases = averaged.eigen().bases
        kept = cx.CorrectedFactors(bases, averaged.diagonals, averaged.structure)
        measured = corrections(kept, objective_of(), other, None, key, None)
        values = faded(0.6, values, measured.diagonal(PARAMS))
        eigenvalues = jax.tree.map(lambda x, t=t: x / (1 - 0.6 ** (t + 1)), values)
        gradient = objective_of().value_and_grad(other)[1]
        natural = kept.with_diagonal(eigenvalues).solve(gradient, 0.3)
        other = jax.tree.map(lambda x, u: x - 0.5 * u, other, natural)
        assert_same(params, other, 1e-9)


def faded(decay: float, mean: Any, new: Any) -> Any:
    """β m + (1 - β) x, from m = 0."""
    mean = jax.tree.map(jnp.zeros_like, new) if mean is None else mean
    return jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, mean, new)


def test_a_restricted_ekfac_has_factors_of_its_leaves():
    tx = cx.restrict(
        cx.ekfac(objective_of(), damping=0.3, bases_every=2),
        {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}},
    )
    updates = update(tx)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))
    assert_same(
        updates["hidden"]["bias"], objective_of().value_and_grad(PARAMS)[1]["hidden"]["bias"]
    )


# SOAP


LAYOUT = Layout(
    {
        ("kernel",): Leaf("dense", (4, 3), (), (0,), (1,), (), "kernel"),
        ("stacked",): Leaf("dense", (2, 3, 4), (), (1,), (2,), (0,), "stacked"),
        ("bias",): Leaf("bias", (3,), (), (), (0,), (), "bias"),
    }
)


def gradients(t: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), t), 3)
    shapes = {name: leaf.shape for (name,), leaf in LAYOUT.items()}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def slices(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every matrix [inputs, outputs], and the bias."""
    stacked = {f"stacked{n}": x for n, x in enumerate(tree["stacked"])}
    return {k: np.asarray(v) for k, v in {**tree, **stacked}.items() if k != "stacked"}


def iterated(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The authors' step: columns in the order of qᵀMq, each in its place afterwards."""
    product = matrix @ basis
    order = np.argsort(-np.sum(basis * product, axis=0))
    out = np.empty_like(basis)
    out[:, order] = np.linalg.qr(product[:, order])[0]
    return out


@pytest.mark.parametrize("style", ["exact", "iteration"])
def test_soap_is_the_method_written_out(style):
    """The basis of step t is that of gradients before it, from the second step on."""
    tx = cx.soap(0.1, 0.9, 0.8, weight_decay=0.01, every=2, style=style, layout=LAYOUT)
    params = gradients(100)
    step = quick_jit(lambda g, state: tx.update(g, state, params))
    state, sides, bases = tx.init(params), dict[str, Any](), dict[str, Any]()
    first, second = dict[str, Any](), dict[str, Any]()
    for t in range(7):
        updates, state = step(gradients(t), state)
        found, at = slices(updates), slices(params)
        for name, g in slices(gradients(t)).items():
            left = right = np.eye(1)
            if g.ndim == 2 and t > 0:
                if t == 1 or (style == "exact" and t % 2 == 1):
                    bases[name] = [np.linalg.eigh(m)[1] for m in sides[name]]
                elif t % 2 == 1:
                    bases[name] = [iterated(m, q) for m, q in zip(sides[name], bases[name])]
                left, right = bases[name]
            plain = g.ndim == 1 or t == 0
            turn = lambda x, q=left, r=right, plain=plain: x if plain else q.T @ x @ r
            back = lambda x, q=left, r=right, plain=plain: x if plain else q @ x @ r.T
            if g.ndim == 2:
                old = sides.get(name, (0.0, 0.0))
                sides[name] = [0.8 * m + 0.2 * x for m, x in zip(old, (g @ g.T, g.T @ g))]
            first[name] = 0.9 * first.get(name, 0.0) + 0.1 * g
            second[name] = 0.8 * second.get(name, 0.0) + 0.2 * turn(g) ** 2
            mean, square = first[name] / (1 - 0.9 ** (t + 1)), second[name] / (1 - 0.8 ** (t + 1))
            expected = -0.1 * (back(turn(mean) / (np.sqrt(square) + 1e-8)) + 0.01 * at[name])
            np.testing.assert_allclose(found[name], expected, atol=1e-10)


def test_soap_with_the_identity_as_basis_is_adamw():
    tx = cx.soap(0.1, 0.9, 0.8, every=100, layout=LAYOUT)
    adamw = optax.adamw(0.1, 0.9, 0.8, eps=1e-8, weight_decay=0.01)
    params = gradients(100)
    state, other = tx.init(params), adamw.init(params)
    kept = [n for n, part in enumerate(state) if hasattr(part, "bases")]
    assert len(kept) == 1
    started = state[kept[0]]._replace(step=jnp.int32(1))  # no change of the basis is due
    state = (*state[: kept[0]], started, *state[kept[0] + 1 :])
    for t in range(3):
        updates, state = tx.update(gradients(t), state, params)
        expected, other = adamw.update(gradients(t), other, params)
        assert_same(updates, expected, 1e-12)


def test_kernels_with_a_large_side_take_the_step_of_adamw():
    tx, adamw = cx.soap(0.1, largest=2), optax.adamw(0.1, 0.95, 0.95, weight_decay=0.01)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_same(updates, adamw.update(PARAMS, adamw.init(PARAMS), PARAMS)[0], 1e-12)


def test_low_precision_parameters_are_turned_in_float32():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    tx = cx.soap(0.1, layout=LAYOUT, weight_decay=0.0)
    updates, state = tx.update(narrow, tx.init(narrow), narrow)
    expected, other = tx.update(wide, tx.init(wide), wide)
    for t in range(1, 4):
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(t))
        updates, state = tx.update(grads, state, narrow)
        expected, other = tx.update(jax.tree.map(trees.widen, grads), other, wide)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=2e-3)


# Bad input


def test_eigenvectors_are_kept_only_where_their_shapes_are_known():
    tx = cx.fisher_kronecker() | cx.in_eigenbasis(cx.squared_gradient(), every=2)
    with pytest.raises(ValueError, match="fisher_kronecker\\(like=objective\\)"):
        tx.init(PARAMS)


factors = cx.gauss_newton_kronecker
REFUSED = {
    "without factors": (lambda: cx.in_eigenbasis(cx.squared_gradient()), "needs Kronecker factors"),
    "alone": (lambda: cx.fisher_eigenvalues(), "inside `in_eigenbasis`"),
    "without a diagonal": (
        lambda: factors() | cx.in_eigenbasis(cx.fisher_matvec()), "takes a diagonal from the stages"
    ),
    "a plain part inside": (
        lambda: factors() | cx.in_eigenbasis(optax.ema(0.9)), "changes the updates"
    ),
    "a change inside": (
        lambda: factors() | cx.in_eigenbasis(cx.squared_gradient() | cx.scale_by_power(0.5)),
        "changes the updates",
    ),
    "averages behind": (
        lambda: factors() | cx.in_eigenbasis(cx.fisher_eigenvalues()) | cx.ema_mean(0.9),
        "behind `in_eigenbasis` they are eigenvectors",
    ),
    "kept behind": (
        lambda: cx.every(2, factors() | cx.in_eigenbasis(cx.fisher_eigenvalues())),
        "has an `every=` of its own",
    ),
    "inverses": (
        lambda: (
            factors()
            | cx.in_eigenbasis(cx.fisher_eigenvalues())
            | cx.damp(0.1)
            | cx.solve(cx.kronecker(style="heuristic"))
        ),
        "Use `style='exact'`",
    ),
    "factors of no model": (
        lambda: cx.gradient_kronecker() | cx.in_eigenbasis(cx.fisher_eigenvalues()),
        "of `gradient_kronecker` are of no model",
    ),
    "an unknown style": (
        lambda: cx.in_eigenbasis(cx.squared_gradient(), style="qr"), "is one of \\('exact'"
    ),
    "no steps": (lambda: cx.in_eigenbasis(cx.squared_gradient(), every=0), "every"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    make, cause = REFUSED[case]
    with pytest.raises(ValueError, match=cause):
        update(make())


# Eigenvalues

SEPARATE: dict[str, set[str]] = {"joint": set(), "separate": {"hidden/bias"}}


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_eigenvalues_and_condition_numbers_are_those_of_the_dense_blocks(bias):
    factors = cx.kronecker_factors(objective_of(), PARAMS, bias=bias)
    dense = np.linalg.eigvalsh(cx.materialize(factors, PARAMS))[::-1]
    found = factors.eigenvalues()
    assert set(found) == {"hidden/kernel", "out/kernel"} | SEPARATE[bias]
    together = np.sort(np.concatenate(list(found.values())))[::-1]
    np.testing.assert_allclose(together, dense, atol=1e-12)
    for name, values in found.items():
        assert np.all(np.diff(values) <= 0)
        condition = factors.condition_numbers(0.1)[name]
        np.testing.assert_allclose(condition, (values[0] + 0.1) / (values[-1] + 0.1), rtol=1e-12)


def test_layers_of_a_stack_have_eigenvalues_of_their_own():
    stage = cx.gradient_kronecker(LAYOUT)
    signal, _ = stage.update(cx.Signal(gradients(0)), stage.init(gradients(0)), gradients(0))
    values = signal.factors.eigenvalues()
    assert {name: x.shape for name, x in values.items()} == {
        "bias": (3,), "kernel": (12,), "stacked": (2, 12)
    }  # fmt: skip
    kernel = np.linalg.svd(gradients(0)["stacked"][1])[1]
    np.testing.assert_allclose(values["stacked"][1, 0], kernel[0] ** 2, rtol=1e-10)
