"""The trajectory loss: its loop written out, on devices, special cases and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import curvax as cx

SIZE, CLASSES, BATCH, LAG = 16, 3, 8, 2
STRENGTH, TEMPERATURE = 0.7, 1.5
TOLERANCE: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
INPUTS = jax.random.normal(jax.random.key(0), (SIZE, 4))
LABELS = jnp.arange(SIZE) % CLASSES
WEIGHTS = 0.5 + jnp.arange(SIZE) % 4
# Five epochs, in an order of their own.
ROWS = [
    part
    for epoch in range(5)
    for part in np.split(np.random.default_rng(epoch).permutation(SIZE), SIZE // BATCH)
]


def params() -> Any:
    return {"kernel": 0.5 * jax.random.normal(jax.random.key(1), (4, CLASSES))}


def predict(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"]) @ params["kernel"]


def batch_of(rows: Any) -> Any:
    rows = jnp.asarray(rows)
    return {"x": INPUTS[rows], "label": LABELS[rows], "w": WEIGHTS[rows], "index": rows}


def stage(**options: Any) -> cx.Stage:
    options = {"strength": STRENGTH, "temperature": TEMPERATURE, "lag": LAG} | options
    return cx.trajectory_loss(SIZE, CLASSES, **options) | optax.sgd(0.3)


def weighted(batch: Any, **options: Any) -> cx.Objective:
    loss = cx.categorical("label", weights="w")
    return cx.Objective(loss, batch, model=predict, **options)


def plain(batch: Any) -> cx.Objective:
    def loss(outputs: jax.Array, batch: Any) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
        return jnp.sum(batch["w"] * each) / jnp.sum(batch["w"])

    return cx.Objective(loss, batch, model=predict, weight="w")


def trained(tx: Any, objective_of: Any = weighted, rows: Any = ROWS) -> tuple[Any, Any]:
    @jax.jit
    def step(w: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        objective = objective_of(batch)
        _, grads = objective.value_and_grad(w)
        updates, state = tx.update(grads, state, w, value_fn=objective)
        return optax.apply_updates(w, updates), state

    w = params()
    state = tx.init(w)
    for part in rows:
        w, state = step(w, state, batch_of(part))
    return w, state


def written_out(site_mean: bool) -> tuple[Any, np.ndarray]:
    """SGD on the loss as in the paper; (parameters, outputs of the last visits)."""
    w = params()
    memory: list[list[np.ndarray]] = [[] for _ in range(SIZE)]

    def loss(w: Any, batch: Any, old: jax.Array, known: jax.Array) -> jax.Array:
        z = predict(w, batch)
        share = batch["w"] / batch["w"].sum()
        crossed = optax.softmax_cross_entropy_with_integer_labels(z, batch["label"])
        p, q = (jax.nn.softmax(x / TEMPERATURE) for x in (old, z))
        divergence = TEMPERATURE**2 * jnp.sum(p * jnp.log(p / q), axis=1) * known
        penalty = divergence.mean() if site_mean else share @ divergence
        return share @ crossed + STRENGTH * penalty

    gradient = jax.jit(jax.grad(loss))
    for rows in ROWS:
        known = np.array([len(memory[i]) >= LAG for i in rows], float)
        old = [memory[i][-LAG] if len(memory[i]) >= LAG else np.zeros(CLASSES) for i in rows]
        outputs = predict(w, batch_of(rows))
        w_grad = gradient(w, batch_of(rows), jnp.stack(jnp.asarray(old)), known)
        w = jax.tree.map(lambda x, g: x - 0.3 * g, w, w_grad)
        for i, z in zip(rows, outputs):
            memory[i].append(np.asarray(z))
    return w, np.array([own[-LAG:] for own in memory])


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found, expected)


@pytest.mark.parametrize("objective_of", [weighted, plain])
def test_trajectory_loss_is_its_loop(objective_of):
    w, state = trained(stage(), objective_of)
    expected, memory = written_out(site_mean=objective_of is plain)
    assert_close(w, expected)
    kept = np.sort(np.moveaxis(np.asarray(state[0].outputs, float), 0, 1), axis=1)
    np.testing.assert_allclose(kept, np.sort(memory, axis=1), **TOLERANCE)
    assert (state[0].visits == 5).all()


@pytest.mark.parametrize(
    "reduce_aux", [None, "mean", lambda path: "mean"], ids=["found", "named", "by path"]
)
def test_aux_keys_and_microbatches_change_nothing(reduce_aux):
    def scored(batch: Any) -> cx.Objective:
        def model(w: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
            del key
            outputs = predict(w, batch)
            return outputs, {"right": jnp.mean(outputs.argmax(-1) == batch["label"])}

        loss = cx.categorical("label")
        key = jax.random.key(3)
        options: Any = dict(has_aux=True, key=key, microbatch=2, reduce_aux=reduce_aux)
        return cx.Objective(loss, batch, model=model, **options)

    whole = lambda batch: cx.Objective(cx.categorical("label"), batch, model=predict)
    assert_close(trained(stage(), scored)[0], trained(stage(), whole)[0])


def test_zero_strength_is_the_base_and_the_first_visits_have_no_divergence():
    base = trained(optax.sgd(0.3))[0]
    assert_close(trained(stage(strength=0.0))[0], base)
    first = ROWS[: LAG * SIZE // BATCH]
    assert_close(trained(stage(), rows=first)[0], trained(optax.sgd(0.3), rows=first)[0])


@pytest.mark.parametrize("mapping", ["shard_map", "unchecked", "pmap"])
def test_devices_remember_what_one_device_remembers(mapping):
    tx = (
        cx.trajectory_loss(
            SIZE, CLASSES, strength=STRENGTH, temperature=TEMPERATURE, lag=LAG, sync_over="batch"
        )
        | cx.pmean_updates("batch")
        | optax.sgd(0.3)
    )

    def step(w: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        objective = weighted(batch)
        _, grads = objective.value_and_grad(w)
        updates, state = tx.update(grads, state, w, value_fn=objective)
        return optax.apply_updates(w, updates), state

    if mapping == "pmap":
        parts = lambda x: x.reshape(8, -1, *x.shape[1:])
        run = jax.pmap(step, "batch", in_axes=(None, None, 0), out_axes=None)
    else:
        parts = lambda x: x
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (P(), P(), P("batch"))
        check = mapping == "shard_map"
        run = jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
        )
    w = params()
    state = tx.init(w)
    for rows in ROWS:
        w, state = run(w, state, jax.tree.map(parts, batch_of(rows)))
    expected, alone = trained(stage())
    assert_close(w, expected)
    np.testing.assert_array_equal(state[0].visits, alone[0].visits)
    assert_close(state[0].outputs, alone[0].outputs)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_batches_sharded_over_a_mesh_change_nothing(kind):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    place = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, P("batch")))
    with jax.set_mesh(mesh):
        sharded = lambda batch: weighted(jax.tree.map(place, batch))
        found = trained(stage(), sharded)[0]
    assert_close(jax.device_get(found), jax.device_get(trained(stage())[0]))


def test_a_number_outside_gives_nan_and_is_not_remembered():
    tx = stage()
    state, w = tx.init(params()), params()
    batch = batch_of(range(BATCH)) | {"index": jnp.arange(BATCH) + SIZE - BATCH + 1}
    objective = weighted(batch)
    _, grads = objective.value_and_grad(w)
    updates, after = tx.update(grads, state, w, value_fn=objective)
    assert np.isnan(updates["kernel"]).any()
    assert after[0].visits.sum() == BATCH - 1


def test_outputs_that_are_not_finite_are_not_remembered():
    tx = stage()
    batch = batch_of(range(BATCH))
    batch["x"] = batch["x"].at[2].set(jnp.nan)
    objective = weighted(batch)
    _, grads = objective.value_and_grad(params())
    _, after = tx.update(grads, tx.init(params()), params(), value_fn=objective)
    assert after[0].visits.tolist() == [1, 1, 0, 1, 1, 1, 1, 1] + [0] * 8
    assert np.isfinite(after[0].outputs).all()


def test_outputs_of_weight_0_may_be_nan():
    """As those of padding may be, in a likelihood."""
    batch = batch_of(range(BATCH))
    batch["shift"] = jnp.zeros((BATCH, 1)).at[2].set(jnp.nan)
    batch["w"] = batch["w"].at[2].set(0.0)
    shifted = lambda w, batch: predict(w, batch) + batch["shift"]
    objective = cx.Objective(cx.categorical("label", weights="w"), batch, model=shifted)
    tx, w = stage(lag=1), params()
    state = tx.init(w)
    for _ in range(2):
        _, grads = objective.value_and_grad(w)
        updates, state = tx.update(grads, state, w, value_fn=objective)
        assert np.isfinite(updates["kernel"]).all()
    assert state[0].visits[2] == 0


def update(tx: Any, objective: Any) -> Any:
    grads = jax.grad(lambda w: objective(w))(params())
    return tx.update(grads, tx.init(params()), params(), value_fn=objective)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: cx.trajectory_loss(0, 3), "positive integer"),
        (lambda: cx.trajectory_loss(16, 3, lag=0), "positive integer"),
        (lambda: cx.trajectory_loss(16, 3, strength=-1.0), "strength"),
        (lambda: cx.trajectory_loss(16, 3, temperature=0.0), "divides the logits"),
        (lambda: cx.trajectory_loss(16, (4, 0)), "positive integer"),
        (
            lambda: update(cx.trajectory_loss(16, 5), weighted(batch_of(range(8)))),
            r"shape \[5\].*gives \[8, 3\]",
        ),
        (
            lambda: update(cx.trajectory_loss(16, 3, index="x"), weighted(batch_of(range(8)))),
            r"numbers of the examples.*float64 \[8, 4\]",
        ),
        (
            lambda: update(cx.trajectory_loss(16, 3, index="id"), weighted(batch_of(range(8)))),
            "'id' of the batch, which does not exist",
        ),
        (
            lambda: update(
                cx.per_group(4, cx.trajectory_loss(16, 3)), weighted(batch_of(range(8)))
            ),
            "inside `per_group`",
        ),
        (
            lambda: update(
                cx.trajectory_loss(16, 3),
                cx.Objective(lambda w, b: jnp.sum(w["kernel"]), batch_of(range(8))),
            ),
            "needs the model",
        ),
        (
            lambda: update(
                cx.trajectory_loss(16, 3) | cx.sam_perturb(0.1), weighted(batch_of(range(8)))
            ),
            "`sam_perturb`",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(make, cause):
    with pytest.raises((ValueError, TypeError), match=cause):
        make()
