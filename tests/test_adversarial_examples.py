"""Attacks on inputs: loops written out, SAM around them, on devices, exact cases and errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_problems import assert_trees_close, quick_jit

import curvax as cx

N, EPSILON, MEAN, STD = 16, 0.1, (0.3, 0.5), (0.2, 0.4)
IMAGES = jax.random.uniform(jax.random.key(0), (N, 3, 2))
BATCH = {
    "image": (IMAGES - jnp.array(MEAN)[None, None]) / jnp.array(STD)[None, None],
    "label": jnp.arange(N) % 3,
    "w": 0.5 + jnp.arange(N) % 4,
}
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (6, 5)),
    "b": jax.random.normal(jax.random.key(2), (5, 3)),
}


def predict(params: Any, batch: Any) -> jax.Array:
    x = batch["image"].reshape(len(batch["image"]), -1)
    return jnp.tanh(x @ params["a"]) @ params["b"]


def objective_on(batch: Any = BATCH, **options: Any) -> cx.Objective:
    return cx.Objective(cx.categorical("label", weights="w"), batch, model=predict, **options)


def attack(**options: Any) -> cx.Attack:
    settled: dict[str, Any] = dict(steps=3, mean=MEAN, std=STD, random_start=False)
    return cx.pgd(options.pop("epsilon", EPSILON), **settled | options)


@functools.cache
def slope() -> Any:
    """∂/∂x of the loss, and the gradient in the parameters, on normalised inputs."""

    def loss(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        return objective_on(batch | {"image": x})(params)

    return jax.jit(jax.grad(loss, 1)), jax.jit(jax.grad(loss))


def looped(
    params: Any, norm: str, steps: int = 3, start: Any = 0.0, epsilon: float = EPSILON,
    step_size: float | None = None, batch: Any = BATCH,
) -> np.ndarray:  # fmt: skip
    """δ by projected gradient descent on images, written out example by example."""
    rate = 2.5 * epsilon / steps if step_size is None else step_size
    images = np.asarray(batch["image"]) * STD + MEAN
    delta = np.zeros_like(images) + start

    def project(delta: np.ndarray) -> np.ndarray:
        if norm == "linf":
            delta = np.clip(delta, -epsilon, epsilon)
        else:
            for i, d in enumerate(delta):
                delta[i] = d * min(1.0, epsilon / max(float(np.linalg.norm(d)), 1e-30))
        return np.clip(images + delta, 0, 1) - images

    delta = project(delta)
    for _ in range(steps):
        x = (images + delta - MEAN) / STD
        g = np.asarray(slope()[0](params, x, batch)) / STD
        if norm == "linf":
            along = np.sign(g)
        else:
            along = np.stack([one / np.linalg.norm(one) for one in g])
        delta = project(delta + rate * along)
    return delta


def at(params: Any, delta: np.ndarray, batch: Any = BATCH) -> Any:
    """The gradient in the parameters on moved inputs."""
    return slope()[1](params, batch["image"] + delta / np.array(STD), batch)


def ascended(gradient: Any) -> Any:
    """SAM's point for ρ = 0.3."""
    return optax.tree.add_scale(PARAMS, 0.3 / optax.tree.norm(gradient), gradient)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("options", [{}, {"microbatch": 4}], ids=["whole", "micro-batches"])
def test_pgd_is_its_loop(norm, options):
    method = attack(norm=norm)
    found = quick_jit(lambda p: method(objective_on(**options), p))(PARAMS)
    np.testing.assert_allclose(found, looped(PARAMS, norm), rtol=1e-10, atol=1e-12)
    start = jax.random.normal(jax.random.key(3), found.shape)
    method = attack(norm=norm, steps=2, step_size=0.02, unroll=True)
    again = quick_jit(lambda p, s: method(objective_on(), p, start=s))(PARAMS, start)
    expected = looped(PARAMS, norm, 2, np.asarray(start), step_size=0.02)
    np.testing.assert_allclose(again, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sam_under_attack_attacks_in_both_passes(norm):
    robust = cx.adversarial(objective_on(), attack(norm=norm))
    tx = cx.sam_perturb(0.3)

    @quick_jit
    def step(params: Any) -> Any:
        value, grads = robust.value_and_grad(params)
        return value, grads, tx.update(grads, tx.init(params), params, value_fn=robust)[0]

    value, grads, updates = step(PARAMS)
    delta = looped(PARAMS, norm)
    first = at(PARAMS, delta)
    moved = BATCH | {"image": BATCH["image"] + delta / np.array(STD)}
    np.testing.assert_allclose(value, objective_on(moved)(PARAMS), rtol=1e-10)
    assert_trees_close(grads, first, 1e-10)
    there = ascended(first)
    assert_trees_close(updates, at(there, looped(there, norm)), 1e-10)


def scored(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    del key
    outputs = predict(params, batch)
    right = outputs.argmax(-1) == batch["label"]
    return outputs, {"accuracy": jnp.mean(right), "right": right}


@pytest.mark.parametrize("joint", [False, True], ids=["adversarial", "one backward pass"])
def test_aux_is_that_of_the_attacked_batch_in_pieces_too(joint):
    def run(microbatch: int | None) -> Any:
        objective = cx.Objective(
            cx.categorical("label", weights="w"), BATCH, model=scored, has_aux=True,
            key=jax.random.key(4), microbatch=microbatch,
        )  # fmt: skip
        if joint:
            return attack().value_and_grad(objective, PARAMS)[:2]
        return cx.adversarial(objective, attack(random_start=True)).value_and_grad(PARAMS)

    whole, pieces = quick_jit(run, static_argnums=0)(None), quick_jit(run, static_argnums=0)(4)
    (_, aux), grads = pieces
    assert_trees_close(grads, whole[1], 1e-10)
    assert_trees_close(aux["accuracy"], whole[0][1]["accuracy"])
    np.testing.assert_array_equal(aux["right"], whole[0][1]["right"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_backward_pass_gives_the_gradient_and_the_last_step(norm):
    method = attack(norm=norm, steps=1)
    start = 0.05 * jax.random.normal(jax.random.key(5), IMAGES.shape)
    run = quick_jit(lambda p, s: method.value_and_grad(objective_on(), p, start=s))
    delta = looped(PARAMS, norm, 0, np.asarray(start), step_size=0.0)
    params = PARAMS
    for _ in range(3):  # replays of one batch: free adversarial training
        _, grads, found = run(params, jnp.asarray(delta))
        assert_trees_close(grads, at(params, delta), 1e-10)
        delta = looped(params, norm, 1, delta)
        np.testing.assert_allclose(found, delta, rtol=1e-10, atol=1e-12)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)


def test_zero_epsilon_is_the_loss_itself():
    for random_start in (False, True):
        robust = cx.adversarial(objective_on(), attack(epsilon=0.0, random_start=random_start))
        assert_trees_close(
            jax.jit(robust.value_and_grad)(PARAMS),
            jax.jit(objective_on().value_and_grad)(PARAMS),
            0,
        )


def test_sign_gradient_on_a_linear_model_is_its_closed_form():
    """max ℓ(x + δ) of a logistic loss is that of the margin y w·x - ε ‖w‖₁, or ‖w‖₂."""
    x, w = jax.random.normal(jax.random.key(6), (N, 4)), jnp.array([1.0, -2.0, 0.5, 3.0])
    y = jnp.where(jnp.arange(N) % 2, 1.0, -1.0)
    loss = lambda w, batch: jnp.mean(jax.nn.softplus(-y * (batch["image"] @ w)))
    objective = cx.Objective(loss, {"image": x})
    for norm, dual in (("linf", 1), ("l2", 2)):
        fast = cx.pgd(EPSILON, steps=1, random_start=False, norm=norm, bounds=(-9.0, 9.0))
        margin = y * (x @ w) - EPSILON * jnp.linalg.norm(w, dual)
        found = cx.adversarial(objective, fast)(w)
        np.testing.assert_allclose(found, jnp.mean(jax.nn.softplus(-margin)), rtol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_lies_in_the_ball_and_differs_between_examples_and_keys(norm):
    method = attack(norm=norm, random_start=True, mean=0.0, std=1.0, bounds=(-99.0, 99.0))
    starts = [np.asarray(method.start(objective_on(), jax.random.key(s))) for s in (0, 1)]
    order = np.inf if norm == "linf" else 2
    lengths = np.linalg.norm(np.reshape(starts[0], (N, -1)), order, axis=1)
    assert (lengths < EPSILON).all()
    assert (lengths > EPSILON / 4).all()
    rows = {tuple(np.asarray(row).ravel()) for start in starts for row in start}
    assert len(rows) == 2 * N


def under_devices(mapping: str, run: Any) -> Any:
    """The means over eight devices of what `run(batch)` gives on each one's part."""
    averaged = lambda batch: jax.tree.map(lambda x: jax.lax.pmean(x, "batch"), run(batch))
    if mapping == "pmap":
        parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCH)
        return jax.tree.map(lambda x: x[0], jax.pmap(averaged, "batch")(parts))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    check = mapping == "shard_map"
    mapped = jax.shard_map(averaged, mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=check)
    return quick_jit(mapped)(BATCH)


def unweighted(batch: Any) -> cx.Objective:
    return cx.Objective(cx.categorical("label"), batch, model=predict)


@pytest.mark.parametrize("mapping", ["shard_map", "unchecked", "pmap"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_devices_attack_as_one_device_does(mapping, norm):
    method, key = attack(norm=norm, random_start=True), jax.random.key(7)

    def run(batch: Any) -> Any:
        robust = cx.adversarial(unweighted(batch), method, key=key)
        value, grads = robust.value_and_grad(PARAMS)
        *joint, delta = method.value_and_grad(unweighted(batch), PARAMS, key=key)
        return value, grads, joint, jnp.mean(delta**2)

    assert_trees_close(under_devices(mapping, run), quick_jit(run)(BATCH), 1e-10)


def test_groups_attack_their_own_examples():
    """m-sharpness: each group of four ascends on its own, from the same random starts."""
    robust = cx.adversarial(objective_on(), attack(random_start=True), key=jax.random.key(8))
    tx = cx.per_group(4, cx.sam_perturb(0.3))

    @quick_jit
    def step(params: Any) -> Any:
        _, grads = robust.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=robust)[0]

    found = step(PARAMS)
    start = np.asarray(attack(random_start=True).start(objective_on(), jax.random.key(8)))
    total: Any = jax.tree.map(jnp.zeros_like, PARAMS)
    weights: Any = 0.0
    for i in range(0, N, 4):
        batch = {name: x[i : i + 4] for name, x in BATCH.items()}
        go = functools.partial(looped, norm="linf", start=start[i : i + 4], batch=batch)
        there = ascended(at(PARAMS, go(PARAMS), batch))
        weight = batch["w"].sum()
        total = optax.tree.add_scale(total, weight, at(there, go(there), batch))
        weights += weight
    assert_trees_close(found, optax.tree.scale(1 / weights, total), 1e-10)


def test_an_explicit_mesh_gives_the_numbers_of_one_device():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    method, key = attack(norm="l2", random_start=True), jax.random.key(9)
    run = jax.jit(
        lambda batch: cx.adversarial(objective_on(batch), method, key=key).value_and_grad(PARAMS)
    )
    expected = run(BATCH)
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, P("batch")))
        found = run(jax.tree.map(place, BATCH))
    assert_trees_close(jax.device_get(found), jax.device_get(expected), 1e-10)


def test_a_gauss_newton_product_is_that_on_the_attacked_inputs():
    robust = cx.adversarial(objective_on(), attack())
    moved = objective_on(BATCH | {"image": BATCH["image"] + looped(PARAMS, "linf") / np.array(STD)})
    product = lambda objective: quick_jit(lambda p: cx.ggnvp(objective, p)(PARAMS))(PARAMS)
    assert_trees_close(product(robust), product(moved), 1e-10)


def test_targets_of_an_autoencoder_stay_clean():
    batch = {"image": BATCH["image"].reshape(N, -1)}
    decode = lambda params, batch: jnp.tanh(batch["image"] @ params["a"]) @ params["a"].T
    objective = cx.Objective(cx.gaussian("image"), batch, model=decode)
    method = cx.pgd(EPSILON, steps=2, random_start=False, bounds=(-9.0, 9.0))
    loss = lambda x: (
        0.5 * jnp.mean(jnp.sum((decode(PARAMS, {"image": x}) - batch["image"]) ** 2, 1))
    )
    x = batch["image"]
    for _ in range(2):
        x = x + 1.25 * EPSILON * jnp.sign(jax.grad(loss)(x))
        x = jnp.clip(x, batch["image"] - EPSILON, batch["image"] + EPSILON)
    np.testing.assert_allclose(cx.adversarial(objective, method)(PARAMS), loss(x), rtol=1e-10)
    np.testing.assert_allclose(method(objective, PARAMS), x - batch["image"], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: cx.pgd(-0.1), "`epsilon` as a finite number, at least 0, and got -0.1"),
        (lambda: cx.pgd(float("nan")), "`epsilon`"),
        (lambda: cx.pgd(0.1, step_size=-1.0), "`step_size`"),
        (lambda: cx.pgd(0.1, steps=0), "`steps` as a positive integer"),
        (lambda: cx.pgd(0.1, norm="max"), "one of linf, l2, and got 'max'"),
        (lambda: cx.adversarial(objective_on(), cx.pgd(0.1, mean=MEAN, std=STD)), "no key"),
        (
            lambda: cx.adversarial(objective_on(), cx.pgd(0.1, random_start=False)),
            r"from 0.0 to 1.0, and 'image' has values from -.*`pgd\(..., mean=, std=\)`",
        ),
        (
            lambda: cx.adversarial(objective_on(), attack(inputs="x")),
            "the entry 'x' of the batch, and the batch has the entries 'image', 'label', 'w'",
        ),
        (
            lambda: cx.adversarial(
                objective_on(BATCH | {"image": jnp.zeros((N, 3, 2), jnp.uint8)}), attack()
            ),
            "dtype uint8. Convert the images",
        ),
        (lambda: cx.adversarial(cx.Objective(lambda w: w), attack()), "reads the batch"),
        (
            lambda: cx.adversarial(cx.Objective(lambda w, b: w, jnp.zeros(3)), attack()),
            "the batch has a",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()
