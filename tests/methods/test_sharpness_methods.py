"""SAM's stages against formulas written out, naive loops, and autodiff through the perturbation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from small_problems import assert_trees_close, flat, net_batch, net_loss, net_params, quick_jit

import curvax as cx

PARAMS = net_params()
WEIGHTS, unravel = ravel_pytree(PARAMS)
IS_BIAS = flat(jax.tree.map_with_path(lambda path, x: 0 * x + ("bias" in str(path)), PARAMS)) == 1
IN_HIDDEN = (
    flat(jax.tree.map_with_path(lambda path, x: 0 * x + ("hidden" in str(path)), PARAMS)) == 1
)


def objective(**options: Any) -> cx.Objective:
    return cx.Objective(net_loss, net_batch(), **options)


def loss(weights: Any) -> jax.Array:
    """The loss of a flat vector of weights."""
    return net_loss(unravel(weights), net_batch())


GRADIENT = np.asarray(jax.grad(loss)(WEIGHTS))


def step(tx: Any, state: Any = None, params: Any = PARAMS, **extra: Any) -> tuple[Any, Any]:
    """(updates, state) after one step with the gradient and value of the objective."""
    value_fn = objective()
    _, grads = value_fn.value_and_grad(params)
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, value_fn=value_fn, **extra)


def perturbation(rho: Any, state: Any = None, grads: Any = None, **options: Any) -> np.ndarray:
    """ε̂, flat: at θ + ε̂ the loss ½‖· - θ‖² has the gradient ε̂, to the rounding of θ + ε̂."""
    square = lambda x, y: jnp.sum((x - y) ** 2)
    distance = lambda p: sum(jax.tree.leaves(jax.tree.map(square, p, PARAMS))) / 2
    tx = cx.sam_perturb(rho, **options)
    state = tx.init(PARAMS) if state is None else state
    grads = unravel(jnp.asarray(GRADIENT)) if grads is None else grads
    return flat(tx.update(grads, state, PARAMS, value_fn=distance)[0])


# Directions.


def direct_formula(g: np.ndarray, p: float) -> np.ndarray:
    """sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p), and its limits."""
    if p == 1:
        return np.sign(g) * (np.arange(g.size) == np.argmax(np.abs(g)))
    if p == np.inf:
        return np.sign(g)
    q = p / (p - 1)
    return np.sign(g) * np.abs(g) ** (q - 1) / (np.abs(g) ** q).sum() ** (1 / p)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_perturbation_is_the_formula_of_its_dual_norm(p):
    found = perturbation(0.3, p=p)
    np.testing.assert_allclose(found, 0.3 * direct_formula(GRADIENT, p), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(found, p), 0.3, rtol=1e-12)
    np.testing.assert_allclose(
        perturbation(0.3, ascent=cx.dual_norm(p)), found, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_perturbation_is_the_steepest_of_the_ball(p):
    found = GRADIENT @ perturbation(0.3, p=p)
    others = np.random.default_rng(0).normal(size=(1000, GRADIENT.size))
    others *= 0.3 / np.linalg.norm(others, p, axis=1, keepdims=True)
    assert np.all(others @ GRADIENT < found)


def test_one_norm_moves_one_weight_where_several_are_largest():
    grads = {"a": jnp.array([2.0, -2.0]), "b": jnp.array([2.0])}
    tx = cx.sam_perturb(0.3, p=1)
    distance = lambda p: (jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)) / 2
    zeros = jax.tree.map(jnp.zeros_like, grads)
    moved, _ = tx.update(grads, tx.init(zeros), zeros, value_fn=distance)
    assert_trees_close(moved, {"a": jnp.array([0.3, 0.0]), "b": jnp.zeros(1)}, tol=1e-15)


SCALINGS = {
    "asam": (cx.asam(0.01), np.where(IS_BIAS, 1.0, np.abs(WEIGHTS) + 0.01)),
    "asam_all": (cx.asam_all(), np.abs(WEIGHTS)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_adaptive_perturbation_is_its_formula(name):
    ascent, t = SCALINGS[name]
    expected = 0.3 * t**2 * GRADIENT / np.linalg.norm(t * GRADIENT)
    np.testing.assert_allclose(perturbation(0.3, ascent=ascent), expected, rtol=1e-12, atol=1e-15)


def test_weight_scaled_normalises_without_the_weights():
    expected = 0.3 * np.abs(WEIGHTS) * GRADIENT / np.linalg.norm(GRADIENT)
    found = perturbation(0.3, ascent=cx.weight_scaled())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_adaptive_perturbation_in_the_maximum_norm_is_its_formula():
    t = SCALINGS["asam"][1]
    expected = 0.3 * t * direct_formula(t * GRADIENT, np.inf)
    found = perturbation(0.3, ascent=cx.asam(0.01), p=np.inf)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_random_direction_ignores_the_gradient():
    ascent = cx.random_direction(4)
    found = perturbation(0.3, ascent=ascent)
    elsewhere = unravel(jnp.cos(WEIGHTS))
    np.testing.assert_array_equal(found, perturbation(0.3, ascent=ascent, grads=elsewhere))
    np.testing.assert_allclose(np.linalg.norm(found), 0.3, rtol=1e-12)
    assert abs(found @ GRADIENT) < 0.3 * np.linalg.norm(GRADIENT)
    assert np.abs(found - perturbation(0.3, ascent=cx.random_direction(5))).max() > 1e-3


def test_random_direction_is_drawn_for_each_step_and_leaf():
    tx = cx.sam_perturb(0.3, ascent=cx.random_direction(4))
    _, state = step(tx)
    first, second = (perturbation(0.3, s, ascent=cx.random_direction(4)) for s in (None, state))
    assert np.abs(first - second).max() > 1e-3
    parts = unravel(jnp.asarray(first))
    assert np.abs(flat(parts["hidden"])[:3] - flat(parts["out"])[:3]).max() > 1e-3


# Options of the radius, groups of leaves, masks.


def by_layer(hidden: float, out: float) -> np.ndarray:
    return np.where(IN_HIDDEN, hidden, out) * GRADIENT / np.linalg.norm(GRADIENT)


RADII = {
    "number": (0.3, by_layer(0.3, 0.3)),
    "tree prefix": ({"hidden": 0.1, "out": 0.3}, by_layer(0.1, 0.3)),
    "callable on the path": (lambda path: 0.1 if "hidden" in path else 0.3, by_layer(0.1, 0.3)),
    "schedule": (lambda count: 0.3 / (1 + count), by_layer(0.3, 0.3)),
    "Optax's schedule": (optax.linear_schedule(0.3, 0.0, 2), by_layer(0.3, 0.3)),
    "schedules by layer": (
        {"hidden": optax.constant_schedule(0.1), "out": lambda count: 0.3 - 0.1 * count},
        by_layer(0.1, 0.3),
    ),
}


@pytest.mark.parametrize("form", RADII)
def test_radius_can_be_a_number_a_tree_or_a_function_of_the_path(form):
    rho, expected = RADII[form]
    # Optax's schedules compute in float32.
    np.testing.assert_allclose(perturbation(rho), expected, rtol=1e-6)


def test_radius_follows_its_schedule():
    rho = lambda count: jnp.where(count == 0, 0.3, 0.1)
    _, state = step(cx.sam_perturb(rho))
    np.testing.assert_allclose(perturbation(rho), by_layer(0.3, 0.3), rtol=1e-12)
    np.testing.assert_allclose(perturbation(rho, state), by_layer(0.1, 0.1), rtol=1e-12)


def test_radius_can_be_traced():
    run = quick_jit(lambda rho: step(cx.sam_perturb(rho, steps=2))[0])
    assert_trees_close(run(0.3), step(cx.sam_perturb(0.3, steps=2))[0])


@pytest.mark.parametrize(
    "ascent",
    [
        {"hidden": cx.asam(0.01), "out": cx.dual_norm(2)},
        lambda path: cx.asam(0.01) if path[0] == "hidden" else cx.dual_norm(2),
    ],
    ids=["tree prefix", "callable on the path"],
)
def test_parameter_groups_have_their_own_scaling_under_one_norm(ascent):
    t = np.where(IN_HIDDEN, SCALINGS["asam"][1], 1.0)
    expected = 0.3 * t**2 * GRADIENT / np.linalg.norm(t * GRADIENT)
    np.testing.assert_allclose(perturbation(0.3, ascent=ascent), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "mask",
    [
        {"hidden": True, "out": False},
        lambda params: jax.tree.map_with_path(lambda path, x: "hidden" in str(path), params),
    ],
    ids=["tree prefix", "callable"],
)
def test_masked_leaves_stay_and_do_not_enter_the_norm(mask):
    masked = np.where(IN_HIDDEN, GRADIENT, 0.0)
    expected = 0.3 * masked / np.linalg.norm(masked)
    np.testing.assert_allclose(perturbation(0.3, mask=mask), expected, rtol=1e-12)
    drawn = perturbation(0.3, mask=mask, ascent=cx.random_direction(1))
    assert not drawn[~IN_HIDDEN].any()
    np.testing.assert_allclose(np.linalg.norm(drawn), 0.3, rtol=1e-12)
    # Their gradient is the perturbed one all the same.
    updates, _ = step(cx.sam_perturb(0.3, mask=mask))
    np.testing.assert_allclose(flat(updates), jax.grad(loss)(WEIGHTS + expected), rtol=1e-11)


# Several steps, and derivatives through all of them.


def in_jax(g: Any, p: float) -> jax.Array:
    q = p / (p - 1)
    return jnp.sign(g) * jnp.abs(g) ** (q - 1) / jnp.sum(jnp.abs(g) ** q) ** (1 / p)


def ascended(
    weights: Any, rho: float, p: float = 2, steps: int = 1, *, adaptive: bool = False,
    projected: bool = True, step_size: float | None = None,
) -> jax.Array:  # fmt: skip
    """θ + ε̂ by a loop over steps: the first of length ρ, later ones shorter, pulled back."""
    t = jnp.where(IS_BIAS, 1.0, jnp.abs(weights) + 0.01) if adaptive else jnp.ones(weights.size)
    epsilon = rho * in_jax(t * jax.grad(loss)(weights), p)
    for _ in range(steps - 1):
        g = jax.grad(loss)(weights + t * epsilon)
        epsilon += (rho / steps if step_size is None else step_size) * in_jax(t * g, p)
        length = jnp.sum(jnp.abs(epsilon) ** p) ** (1 / p)
        epsilon = jnp.where(projected & (length > rho), rho / length, 1.0) * epsilon
    return weights + t * epsilon


ASCENTS: dict[str, dict[str, Any]] = {
    "p=2": {},
    "p=3": {"p": 3},
    "ASAM": {"adaptive": True},
    "p=2, 3 steps": {"steps": 3},
    "p=3, 3 steps": {"p": 3, "steps": 3},
    "ASAM, 3 steps": {"adaptive": True, "steps": 3},
    "short steps": {"steps": 3, "step_size": 0.05},
    "free steps": {"steps": 3, "projected": False},
    "free steps of a length": {"steps": 2, "projected": False, "step_size": 0.05},
}


def stage_of(ascent_options: dict[str, Any], **more: Any) -> cx.Stage:
    options = {**ascent_options, **more}
    if options.pop("adaptive", False):
        options["ascent"] = cx.asam(0.01)
    return cx.sam_perturb(0.3, **options)


@pytest.fixture(scope="module", params=ASCENTS)
def ascent_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ASCENTS[request.param]


def test_several_ascent_steps_are_the_loop(ascent_options):
    naive = quick_jit(lambda w: jax.grad(loss)(ascended(w, 0.3, **ascent_options)))
    updates, _ = quick_jit(lambda p: step(stage_of(ascent_options), params=p))(PARAMS)
    np.testing.assert_allclose(flat(updates), naive(WEIGHTS), rtol=1e-11, atol=1e-13)


def test_second_order_is_autodiff_through_the_perturbation(ascent_options):
    naive = quick_jit(jax.grad(lambda w: loss(ascended(w, 0.3, **ascent_options))))
    tx = stage_of(ascent_options, second_order=True)
    updates, _ = quick_jit(lambda p: step(tx, params=p))(PARAMS)
    # The two sum the same terms in another order.
    np.testing.assert_allclose(flat(updates), naive(WEIGHTS), rtol=1e-12, atol=1e-13)


def test_second_order_records_the_first_order_gradient_norm():
    _, first = step(cx.sam_perturb(0.3))
    updates, second = step(cx.sam_perturb(0.3, second_order=True))
    assert_trees_close(cx.diagnostics(second), cx.diagnostics(first), tol=1e-6)
    norm = float(cx.diagnostics(second)["perturbed_gradient_norm"])
    assert abs(np.linalg.norm(flat(updates)) - norm) > 1e-3


def test_projected_ascent_stays_in_the_ball():
    def farthest(**options: Any) -> float:
        return float(np.linalg.norm(ascended(WEIGHTS, 0.3, steps=3, **options) - WEIGHTS))

    assert farthest() <= 0.3 + 1e-12
    assert farthest(projected=False) > 0.35


# Some steps only.


def test_sam_every_two_steps_is_clean_in_between():
    tx = cx.sam_perturb(0.3, every=2) | cx.record(
        perturbed=lambda signal, params: signal.perturbed,
        value_p=lambda signal, params: signal.perturbed_value,
    )
    state, perturbed = tx.init(PARAMS), step(cx.sam_perturb(0.3))[0]
    for t in range(4):
        updates, state = step(tx, state)
        found = cx.diagnostics(state)
        if t % 2 == 0:
            assert_trees_close(updates, perturbed)
            measured = {
                name: x for name, x in found.items() if name not in ("perturbed", "value_p")
            }
        else:
            np.testing.assert_array_equal(flat(updates), GRADIENT)
            assert np.isnan(found["value_p"])
            assert all(found[name] == x for name, x in measured.items())
        assert found["perturbed"] == (t % 2 == 0)


@pytest.mark.parametrize("project", [cx.gsam_project(0.4), cx.penalize_gap(0.4)])
def test_projections_pass_the_clean_gradient_of_skipped_steps(project):
    tx = cx.sam_perturb(0.3, every=2) | project
    _, state = step(tx)
    updates, _ = step(tx, state)
    np.testing.assert_array_equal(flat(updates), GRADIENT)


def test_look_sam_is_its_loop():
    def batch_at(t: Any) -> Any:
        return jax.tree.map(lambda x: x * (1 + 0.1 * t), net_batch())

    def run(params: Any, state: Any, t: Any) -> Any:
        value_fn = cx.Objective(net_loss, batch_at(t))
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    tx = cx.look_sam(optax.sgd(0.05), 0.3, every=3, alpha=0.6)
    gradient = quick_jit(jax.grad(lambda w, t: net_loss(unravel(w), batch_at(t))))
    params, state, w, kept = PARAMS, tx.init(PARAMS), WEIGHTS, np.zeros(WEIGHTS.size)
    run = quick_jit(run)
    for t in range(7):
        params, state = run(params, state, float(t))
        g = gradient(w, float(t))
        if t % 3 == 0:
            u = gradient(w + 0.3 * g / jnp.linalg.norm(g), float(t))
            kept = u - (u @ g) / (g @ g) * g
        else:
            u = g + 0.6 * jnp.linalg.norm(g) * kept / jnp.linalg.norm(kept)
        w = w - 0.05 * u
        np.testing.assert_allclose(flat(params), w, rtol=1e-10, atol=1e-12)


# Projections.


@pytest.fixture(scope="module")
def perturbed_gradient() -> np.ndarray:
    return np.asarray(jax.grad(loss)(WEIGHTS + 0.3 * GRADIENT / np.linalg.norm(GRADIENT)))


def orthogonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit = b / np.linalg.norm(b)
    return a - (a @ unit) * unit


def test_gsam_reduces_the_gap_with_the_perturbed_loss(perturbed_gradient):
    updates, _ = step(cx.sam_perturb(0.3) | cx.gsam_project(0.4))
    expected = perturbed_gradient - 0.4 * orthogonal(GRADIENT, perturbed_gradient)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_gsam_onto_the_clean_loss_is_its_formula(perturbed_gradient):
    updates, _ = step(cx.sam_perturb(0.3) | cx.gsam_project(0.4, onto="clean"))
    expected = GRADIENT + 0.4 * orthogonal(perturbed_gradient, GRADIENT)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_alpha_follows_its_schedule(perturbed_gradient):
    tx = cx.sam_perturb(0.3) | cx.gsam_project(lambda count: 0.4 * count)
    first, state = step(tx)
    second, _ = step(tx, state)
    np.testing.assert_allclose(flat(first), perturbed_gradient, rtol=1e-12)
    expected = perturbed_gradient - 0.4 * orthogonal(GRADIENT, perturbed_gradient)
    np.testing.assert_allclose(flat(second), expected, rtol=1e-11, atol=1e-13)


def test_penalty_is_the_gradient_of_the_penalised_loss():
    epsilon = 0.3 * GRADIENT / np.linalg.norm(GRADIENT)

    def penalised(w: Any) -> jax.Array:
        gap = loss(w + epsilon) - loss(w)
        return loss(w + epsilon) + 0.7 * gap

    updates, _ = step(cx.sam_perturb(0.3) | cx.penalize_gap(0.7))
    np.testing.assert_allclose(flat(updates), jax.grad(penalised)(WEIGHTS), rtol=1e-11, atol=1e-13)


def test_gsam_at_alpha_zero_is_sam():
    for make in (lambda: cx.gsam(optax.adamw(0.1), 0.3, 0.0), lambda: (
        cx.sam_perturb(0.3) | cx.penalize_gap(0.0) | optax.adamw(0.1)
    )):  # fmt: skip
        assert_trees_close(step(make())[0], step(cx.sam(optax.adamw(0.1), 0.3))[0])


BASES = {
    "sgd": lambda: optax.sgd(0.1, 0.9),
    "adamw": lambda: optax.adamw(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "adahessian": lambda: cx.adahessian(0.1),
}


@pytest.mark.parametrize("base", BASES)
def test_methods_at_radius_zero_are_their_base(base):
    expected, _ = step(BASES[base]())
    for method in (cx.sam(BASES[base](), 0.0), cx.gsam(BASES[base](), 0.0, 0.4)):
        updates, state = step(method)
        assert_trees_close(updates, expected, tol=1e-10)
        found = cx.diagnostics(state)
        assert found["sigma_max"] == 0
        np.testing.assert_allclose(found["cosine"], 1.0, rtol=1e-6)


def test_methods_are_their_pipes():
    base = lambda: optax.sgd(0.1)
    options: Any = dict(p=3, steps=2, ascent=cx.asam(0.01))
    spelled = {
        "sam": cx.sam_perturb(0.3, **options) | base(),
        "gsam": cx.sam_perturb(0.3, **options) | cx.gsam_project(0.4, onto="clean") | base(),
        "look_sam": (
            cx.sam_perturb(0.3, every=5, **options) | cx.keep_orthogonal(0.7) | base()
        ),
    }  # fmt: skip
    made = {
        "sam": cx.sam(base(), 0.3, **options),
        "gsam": cx.gsam(base(), 0.3, 0.4, onto="clean", **options),
        "look_sam": cx.look_sam(base(), 0.3, **options),
    }
    for name, tx in made.items():
        assert_trees_close(step(tx)[0], step(spelled[name])[0])


# Figures.


def test_sam_diagnostics_are_what_their_names_say(perturbed_gradient):
    _, state = step(cx.gsam(optax.adam(0.1), 0.3, 0.4))
    epsilon = 0.3 * GRADIENT / np.linalg.norm(GRADIENT)
    gap = loss(WEIGHTS + epsilon) - loss(WEIGHTS)
    norm, norm_p = np.linalg.norm(GRADIENT), np.linalg.norm(perturbed_gradient)
    expected = {
        "loss": loss(WEIGHTS),
        "perturbed_loss": loss(WEIGHTS + epsilon),
        "surrogate_gap": gap,
        "sigma_max": 2 * gap / 0.3**2,
        "cosine": GRADIENT @ perturbed_gradient / (norm * norm_p),
        "rho": 0.3,
        "gradient_norm": norm,
        "perturbed_gradient_norm": norm_p,
    }
    found = cx.diagnostics(state)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_surrogate_gap_is_nan_where_the_loss_is_unknown():
    tx = cx.sam_perturb(0.3)
    grads = jax.grad(objective())(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    with pytest.warns(UserWarning, match="`surrogate_gap`.*`value=value`.*Objective"):
        found = cx.diagnostics(state)
    unknown = {name for name, x in found.items() if np.isnan(x)}
    assert unknown == {"loss", "surrogate_gap", "sigma_max"}
    assert np.isnan(cx.diagnostics(state)["loss"])  # and is not told again
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective(), value=2.0)
    assert cx.diagnostics(state)["loss"] == 2.0


def test_estimator_before_sam_supplies_the_loss():
    tx = cx.hutchinson_diag() | cx.sam_perturb(0.3)
    _, state = tx.update(
        jax.grad(objective())(PARAMS), tx.init(PARAMS), PARAMS, value_fn=objective()
    )
    np.testing.assert_allclose(cx.diagnostics(state)["loss"], loss(WEIGHTS), rtol=1e-6)


# Groups of examples.


def group_gradients(m: int, method: Any, batch: Any = None) -> np.ndarray:
    """The update of each contiguous group on its own, [groups, parameters]."""
    whole, out = objective() if batch is None else cx.Objective(net_loss, batch), []
    groups = whole.groups(m)
    for i in range(whole.size // m):
        part = whole.on(jax.tree.map(lambda x, i=i: x[i], groups))
        _, grads = part.value_and_grad(PARAMS)
        out.append(flat(method.update(grads, method.init(PARAMS), PARAMS, value_fn=part)[0]))
    return np.array(out)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("m", [2, 8])
def test_per_group_is_the_loop_over_groups(m, sequential):
    inner = cx.sam_perturb(0.3) | cx.gsam_project(0.4)
    updates, _ = step(cx.per_group(m, inner, sequential=sequential))
    expected = group_gradients(m, inner).mean(axis=0)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)


def test_parts_within_a_group_receive_its_own_loss():
    """Some of Optax's parts need `value=`, as `reduce_on_plateau` does."""

    def times_loss(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any):
        return jax.tree.map(lambda u: u * value, updates), state

    part = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), times_loss)
    found, _ = step(cx.per_group(2, cx.sam_perturb(0.3) | part))
    groups = objective().groups(2)
    losses = [net_loss(PARAMS, jax.tree.map(lambda x, i=i: x[i], groups)) for i in range(4)]
    expected = np.array(losses) @ group_gradients(2, cx.sam_perturb(0.3)) / 4
    np.testing.assert_allclose(flat(found), expected, rtol=1e-11, atol=1e-13)
    plateau = cx.per_group(2, cx.sam_perturb(0.3) | optax.contrib.reduce_on_plateau())
    assert_trees_close(step(plateau)[0], step(cx.per_group(2, cx.sam_perturb(0.3)))[0])


def test_per_group_ignores_the_given_gradient():
    tx = cx.per_group(2, cx.sam_perturb(0.3))
    nonsense = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    updates, _ = tx.update(nonsense, tx.init(PARAMS), PARAMS, value_fn=objective(), value=jnp.nan)
    assert_trees_close(updates, step(tx)[0])


@pytest.mark.parametrize("sequential", [False, True])
def test_groups_are_averaged_by_their_weight(sequential):
    batch = {**net_batch(), "tokens": jnp.array([1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 0.5, 0.5])}
    weighted = cx.Objective(net_loss, batch, weight="tokens")
    tx = cx.per_group(2, cx.sam_perturb(0.3), sequential=sequential)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=weighted)
    each = group_gradients(2, cx.sam_perturb(0.3), batch)
    weights = np.asarray(batch["tokens"]).reshape(4, 2).sum(axis=1)
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-11, atol=1e-13)
    groups = weighted.groups(2)
    losses = [net_loss(PARAMS, jax.tree.map(lambda x, i=i: x[i], groups)) for i in range(4)]
    np.testing.assert_allclose(
        cx.diagnostics(state)["loss"], np.average(losses, weights=weights), rtol=1e-6
    )


@pytest.mark.parametrize("sequential", [False, True])
def test_per_group_keeps_the_state_of_one_pipe(sequential):
    inner = cx.sam_perturb(0.3, ascent=cx.random_direction(3)) | optax.ema(0.9, debias=False)
    tx = cx.per_group(2, inner, sequential=sequential)
    start = tx.init(PARAMS)
    chex.assert_trees_all_equal_structs(start, inner.init(PARAMS))
    updates, state = step(tx, start)
    assert state[0].step == state[1].count == 1
    # Moments are averaged: here each is a tenth of its group's gradient.
    assert_trees_close(updates, state[1].ema)
    _, later = step(tx, state)
    drawn = {str(jax.random.key_data(s[0].keys[0])) for s in (start, state, later)}
    assert len(drawn) == 3


def test_groups_draw_their_own_directions():
    ascent = cx.random_direction(3)
    plain = lambda w, batch: jnp.mean(batch) * jnp.sum(w**3)
    w, same = jnp.ones(4), cx.Objective(plain, jnp.ones(4))
    tx = cx.per_group(1, cx.sam_perturb(0.3, ascent=ascent))
    grouped, _ = tx.update(w, tx.init(w), w, value_fn=same)
    single = cx.per_group(4, cx.sam_perturb(0.3, ascent=ascent))
    alone, _ = single.update(w, single.init(w), w, value_fn=same)
    # Examples that are all alike would give what one draw gives.
    assert np.abs(grouped - alone).max() > 1e-3


def test_groups_draw_probes_by_their_number():
    key, inner = jax.random.key(4), lambda key: cx.hutchinson_diag(key) | cx.scale_by_power(1.0)
    whole, found = objective(), step(cx.per_group(4, inner(key)))[0]
    expected = []
    for i in range(2):
        part = whole.on(jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], net_batch()))
        _, grads = part.value_and_grad(PARAMS)
        tx = inner(jax.random.fold_in(key, i))
        expected.append(flat(tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=part)[0]))
    np.testing.assert_allclose(flat(found), np.mean(expected, axis=0), rtol=1e-11)


@pytest.mark.parametrize("sequential", [False, True])
def test_per_group_hands_on_the_mean_loss_and_aux(sequential):
    def with_aux(w: Any, batch: Any) -> Any:
        return w * jnp.mean(batch), {"mean": jnp.mean(batch), "last": batch[-1].astype(int)}

    note: dict[str, Any] = {}

    def rule(signal: cx.Signal, state: Any, params: Any, **_: Any) -> Any:
        note["signal"] = signal
        return signal, state

    tx = cx.per_group(2, cx.sam_perturb(0.3), sequential=sequential)
    tx, w = tx | cx.stage(lambda params: (), rule), jnp.array(2.0)
    last = lambda path: "last" if path == ("last",) else None
    value_fn = cx.Objective(with_aux, jnp.arange(8.0), has_aux=True, reduce_aux=last)
    tx.update(w, tx.init(w), w, value_fn=value_fn)
    assert_trees_close(note["signal"].value, jnp.array(7.0))
    assert_trees_close(note["signal"].perturbed_value, jnp.array(2.3 * 3.5))
    assert_trees_close(note["signal"].aux, {"mean": jnp.array(3.5), "last": jnp.array(7)})


def test_groups_have_their_own_dropout_keys():
    def dropped(w: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.mean(batch * (w * jax.random.uniform(key, (), w.dtype)) ** 2)

    w, batch = jnp.array(1.0), jnp.ones(4)
    value_fn = cx.Objective(dropped, batch, key=jax.random.key(9))
    tx = cx.per_group(1, optax.identity())
    updates, _ = tx.update(w, tx.init(w), w, value_fn=value_fn)
    keys = [jax.random.fold_in(jax.random.key(9), i) for i in range(4)]
    expected = np.mean([2 * float(jax.random.uniform(key, (), w.dtype)) ** 2 for key in keys])
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_random_ascent_draws_at_each_of_its_steps():
    """Three unprojected steps of the same direction would be 1 + 2/3 of one step's length."""
    w = jnp.zeros(64)
    offset = lambda p: 0.5 * jnp.sum(p**2)  # its gradient at a point is the point
    tx = cx.sam_perturb(1.0, steps=3, projected=False, ascent=cx.random_direction(1))
    found, _ = tx.update(w, tx.init(w), w, value_fn=offset)
    same = 1 + 2 / 3
    independent = np.sqrt(1 + 2 / 9)
    length = float(jnp.linalg.norm(found))
    assert abs(length - independent) < 0.25 * (same - independent) + 0.2
    assert length < same - 0.1


def test_groups_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"3 does not divide its 8 "):
        step(cx.per_group(3, cx.sam_perturb(0.3)))
    with pytest.raises(ValueError, match=r"`m` as a positive integer"):
        cx.per_group(0, cx.sam_perturb(0.3))


# GSAM's schedule.


def test_rho_schedule_follows_the_learning_rate():
    lr = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 10, 100, 3e-5)
    rho = cx.rho_schedule(lr, 0.6, 0.1, lr_max=3e-3, lr_min=3e-5)
    np.testing.assert_allclose([rho(10), rho(100)], [0.6, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rho(55), 0.1 + 0.5 * (lr(55) - 3e-5) / (3e-3 - 3e-5), rtol=1e-6)
    # Below lr_min the line is followed, down to 0 and no further.
    np.testing.assert_allclose(rho(0), 0.1 - 0.5 * 3e-5 / (3e-3 - 3e-5), rtol=1e-5)
    steep = cx.rho_schedule(lr, 0.6, 0.0, lr_max=3e-3, lr_min=3e-5)
    assert steep(0) == 0


def test_rho_schedule_of_a_constant_learning_rate_is_rho_max():
    rho = cx.rho_schedule(optax.constant_schedule(0.1), 0.6, 0.1, lr_max=0.1, lr_min=0.1)
    assert rho(3) == 0.6


@pytest.mark.parametrize(
    "options", [dict(rho_max=-0.1, rho_min=0.0, lr_max=1.0), dict(rho_max=0.1, rho_min=-1.0,
    lr_max=1.0), dict(rho_max=0.1, rho_min=0.0, lr_max=0.1, lr_min=0.2)],
)  # fmt: skip
def test_rho_schedule_refuses_wrong_ranges(options):
    with pytest.raises(ValueError, match="`rho_schedule` takes rho_max, rho_min >= 0"):
        cx.rho_schedule(optax.constant_schedule(0.1), **options)


# What is refused.

PREFIX = r"must be a prefix of the parameters"
REFUSED = {
    "no norm": (lambda: cx.sam_perturb(0.1, p=0.5), r"p in \[1, ∞\], and p was 0\.5"),
    "no norm of a rule": (lambda: cx.dual_norm(0.5), r"p in \[1, ∞\]"),
    "a negative radius": (lambda: cx.sam_perturb(-0.1), r"`rho` in \[0"),
    "no steps": (lambda: cx.sam_perturb(0.1, steps=0), r"`steps` as a positive integer"),
    "every no step": (lambda: cx.sam_perturb(0.1, every=0), r"`every` as a positive integer"),
    "a negative eta": (lambda: cx.asam(-1.0), "eta=-1"),
    "an unknown side": (
        lambda: cx.gsam_project(0.1, onto="both"), "'perturbed' or 'clean', and got 'both'"
    ),
    "a rule that is none": (
        lambda: cx.sam_perturb(0.1, ascent="asam").init(PARAMS), r"`dual_norm\(2\)` or `asam"
    ),
    "a rule without parentheses": (
        lambda: cx.sam_perturb(0.1, ascent=cx.asam_all).init(PARAMS), "asam_all"
    ),
    "several norms": (
        lambda: cx.sam_perturb(
            0.1, ascent={"hidden": cx.dual_norm(1), "out": cx.dual_norm(2)}
        ).init(PARAMS),
        r"p in \[1, 2\]\. Give them the same p",
    ),
    "rules for other parameters": (
        lambda: cx.sam_perturb(0.1, ascent={"body": cx.asam()}).init(PARAMS), PREFIX
    ),
    "a mask for other parameters": (
        lambda: cx.sam_perturb(0.1, mask={"body": True}).init(PARAMS), PREFIX
    ),
    "radii for other parameters": (lambda: step(cx.sam_perturb({"body": 0.1})), PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_sam_errors_say_what_is_wrong(wrong):
    act, message = REFUSED[wrong]
    with pytest.raises((TypeError, ValueError), match=message):
        act()
