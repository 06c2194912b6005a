"""The aux of a batch evaluated in pieces is the whole batch's, by name, or refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import assert_trees_close

import curvax as cx
from curvax.objective import value_aux_and_grad
from curvax.stages.per_group import per_group

N, TOKENS, CLASSES = 8, 5, 3
PARAMS = {"w": jax.random.normal(jax.random.key(1), (3, CLASSES))}
OLD = {"mean": jnp.arange(3.0), "count": jnp.int32(7)}


def make_batch() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "x": jax.random.normal(keys[0], (N, 3)),
        "tokens": jax.random.normal(keys[1], (N, TOKENS, 3)),
        "y": jnp.arange(N) % CLASSES,
        "mask": jax.random.uniform(keys[2], (N, TOKENS)) < 0.6,
    }


def seen(params: Any, batch: Any) -> Any:
    logits = batch["x"] @ params["w"]
    hit = jnp.argmax(logits, -1) == batch["y"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return logits, hit, losses


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(x * mask) / jnp.sum(mask)


@jax.jit
def f_score(hit: jax.Array, said: jax.Array, there: jax.Array) -> jax.Array:
    found = jnp.sum(hit & there)
    precision, recall = found / jnp.sum(said), found / jnp.sum(there)
    return 2 * precision * recall / (precision + recall)


def tokens_of(params: Any, batch: Any) -> jax.Array:
    return jnp.sum((batch["tokens"] @ params["w"]) ** 2, axis=-1)


# What follows from pieces, with the sizes of the whole.
MEASURES = {
    "correct": lambda p, b: jnp.sum(seen(p, b)[1]),
    "seen": lambda p, b: jnp.int32(seen(p, b)[1].size),
    "hits": lambda p, b: seen(p, b)[1].astype(jnp.float32),
    "logits": lambda p, b: seen(p, b)[0],
    "accuracy": lambda p, b: jnp.mean(seen(p, b)[1]),
    "worst": lambda p, b: jnp.max(seen(p, b)[2]),
    "best": lambda p, b: jnp.min(seen(p, b)[2]),
    "range": lambda p, b: jnp.max(seen(p, b)[2]) - jnp.min(seen(p, b)[2]),
    "any": lambda p, b: jnp.any(seen(p, b)[1]),
    "all": lambda p, b: jnp.all(seen(p, b)[1]),
    "sum": lambda p, b: jnp.sum(seen(p, b)[2]),
    "perplexity": lambda p, b: jnp.exp(jnp.mean(seen(p, b)[2])),
    "root mean square": lambda p, b: jnp.sqrt(jnp.mean(b["x"] ** 2, axis=0)),
    "F": lambda p, b: f_score(seen(p, b)[1], jnp.argmax(seen(p, b)[0], -1) == 1, b["y"] == 1),
    "of tokens": lambda p, b: masked_mean(tokens_of(p, b), b["mask"]),
    "tokens": lambda p, b: {"n": jnp.sum(b["mask"]), "each": tokens_of(p, b) * b["mask"]},
    "flat tokens": lambda p, b: tokens_of(p, b).reshape(-1),
    "tokens first": lambda p, b: tokens_of(p, b).T,
    "by class": lambda p, b: jnp.bincount(b["y"], length=CLASSES),
    "confusion": lambda p, b: jax.nn.one_hot(b["y"], CLASSES).T @ jax.nn.softmax(seen(p, b)[0]),
    "second moment": lambda p, b: jnp.einsum("ni,nj->ij", b["x"], b["x"]) / len(b["x"]),
    "penalty": lambda p, b: jnp.sum(p["w"] ** 2),
    "loss and penalty": lambda p, b: jnp.mean(seen(p, b)[2]) + 0.1 * jnp.sum(p["w"] ** 2),
    "count": lambda p, b: OLD["count"] + 1,
    "running mean": lambda p, b: 0.9 * OLD["mean"] + 0.1 * jnp.mean(b["x"], axis=0),
    "running sum": lambda p, b: 0.9 * OLD["mean"] + 0.1 * jnp.sum(b["x"], axis=0),
    "running maximum": lambda p, b: jnp.maximum(OLD["mean"], jnp.max(b["x"], axis=0)),
    "numbers": lambda p, b: jnp.arange(len(b["x"])),
    "nothing": lambda p, b: None,
    "key": lambda p, b: jax.random.key(3),
    "under a scan": lambda p, b: jnp.sum(
        jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), b["x"], None, length=2)[0]
    ),
    "rematerialised": lambda p, b: jnp.max(
        jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(b["x"])
    ),
}  # fmt: skip


def measured(measures: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(seen(params, batch)[2]), {n: f(params, batch) for n, f in measures.items()}

    return loss


def aux_of(loss: Any, **options: Any) -> Any:
    def both(params: Any, batch: Any) -> Any:
        return cx.Objective(loss, batch, has_aux=True, **options).value_and_grad(params)

    return jax.jit(both)(PARAMS, make_batch())


@pytest.mark.parametrize("microbatch", [1, 2])
def test_aux_of_microbatches_is_that_of_the_whole_batch(microbatch):
    loss = measured(MEASURES)
    (value, aux), grads = aux_of(loss)
    (value_found, found), grads_found = aux_of(loss, microbatch=microbatch)
    assert_trees_close((value_found, grads_found), (value, grads), tol=1e-14)
    for name in MEASURES:
        a, b = jax.tree.leaves(found[name]), jax.tree.leaves(aux[name])
        assert [x.dtype for x in a] == [x.dtype for x in b], name
        if name != "key":
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, err_msg=name), a, b)
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(aux["key"]).tolist()


def test_aux_of_a_model_is_reduced_over_microbatches_without_jit():
    def model(params: Any, batch: Any) -> Any:
        logits, hit, losses = seen(params, batch)
        return logits, {"correct": jnp.sum(hit), "worst": jnp.max(losses), "hits": hit}

    options: Any = dict(model=model, has_aux=True)
    whole = cx.Objective(cx.categorical("y"), make_batch(), **options)
    parts = cx.Objective(cx.categorical("y"), make_batch(), microbatch=2, **options)
    assert_trees_close(parts.value_and_grad(PARAMS), whole.value_and_grad(PARAMS), tol=1e-14)


UNDECIDED: dict[str, tuple[Any, str]] = {
    "a deviation": (lambda p, b: jnp.std(seen(p, b)[2]), "a spread"),
    "the place of the worst": (lambda p, b: jnp.argmax(seen(p, b)[2]), "`argmax`"),
    "the first": (lambda p, b: seen(p, b)[2][0], "over the examples"),
    "a median": (lambda p, b: jnp.median(seen(p, b)[2]), "(`sort`|a number of examples)"),
    "sorted": (lambda p, b: jnp.sort(seen(p, b)[2]), "`sort`"),
    "a running sum": (lambda p, b: jnp.cumsum(seen(p, b)[2]), "`cumsum`"),
    "half of them": (lambda p, b: b["x"][: len(b["x"]) // 2], "along the examples"),
    "tokens first and flat": (lambda p, b: tokens_of(p, b).T.reshape(-1), "`reshape`"),
    "all pairs": (lambda p, b: b["x"] @ b["x"].T, "examples by examples"),
    "a share of the batch's sum": (lambda p, b: jax.nn.softmax(seen(p, b)[2]), "a spread"),
    "centred": (lambda p, b: seen(p, b)[2] - jnp.mean(seen(p, b)[2]), "a spread"),
    "parts of the largest": (lambda p, b: seen(p, b)[2] / jnp.max(seen(p, b)[2]), "a spread"),
    "a mean by hand": (lambda p, b: jnp.sum(seen(p, b)[2] / len(b["x"])), "a number of examples"),
    "a mean by weights": (
        lambda p, b: seen(p, b)[2] @ jnp.full(len(b["x"]), 1 / len(b["x"])),
        "a number of examples",
    ),
    "a gradient of a mean": (
        lambda p, b: optax.tree.norm(jax.grad(lambda p: jnp.mean(seen(p, b)[2]))(p)),
        "a number of examples",
    ),
    "a product": (lambda p, b: jnp.prod(b["x"]), "`reduce_prod`"),
    "another program": (
        lambda p, b: jnp.sum(b["x"]) if len(b["x"]) > 2 else jnp.max(b["x"]),
        "another program",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDECIDED)
def test_aux_that_microbatches_cannot_determine_is_refused_by_name(name):
    measure, told = UNDECIDED[name]
    loss = measured({"odd": measure, "accuracy": MEASURES["accuracy"]})
    with pytest.raises(ValueError, match=rf"(?s)`odd` \(.*{told}.*reduce_aux"):
        aux_of(loss, microbatch=2)
    # Passes without aux still work.
    objective = cx.Objective(loss, make_batch(), has_aux=True, microbatch=2)
    (value, _), grads = cx.Objective(loss, make_batch(), has_aux=True).value_and_grad(PARAMS)
    assert_trees_close(objective(PARAMS), value, tol=1e-14)
    assert_trees_close(value_aux_and_grad(objective, PARAMS)[1], grads, tol=1e-14)
    if told != "another program":
        (_, found), _ = aux_of(loss, microbatch=2, reduce_aux={"odd": "max", "accuracy": None})
        (_, whole), _ = aux_of(loss)
        np.testing.assert_allclose(found["accuracy"], whole["accuracy"])


NAMED = ("mean", "sum", "max", "min")


@pytest.mark.parametrize("name", [*NAMED, "last", "concat"])
def test_reduce_aux_takes_names_of_reductions(name):
    first = measured({"first": lambda p, b: b["x"][0, 0] * jnp.ones(1)})
    pieces = np.asarray(make_batch()["x"][::2, 0])
    by_path = lambda path: name if path == ("first",) else None
    for reductions in (name, {"first": name}, by_path):
        (_, aux), _ = aux_of(first, microbatch=2, reduce_aux=reductions)
        expected = {"last": pieces[-1:], "concat": pieces}
        wanted = expected[name] if name in expected else [getattr(np, name)(pieces)]
        np.testing.assert_allclose(aux["first"], wanted, rtol=1e-15)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="`Objective\\(reduce_aux=\\)` takes 'mean', 'sum'"):
        cx.Objective(measured({}), make_batch(), has_aux=True, reduce_aux={"a": "average"})


def normed(params: Any, batch: Any, *, remat: bool) -> Any:
    """A loss behind batch norm, the variance of which is no mean of those of the pieces."""

    def block(x: jax.Array, old: jax.Array) -> Any:
        mean, square = jnp.mean(x, axis=0), jnp.mean(x**2, axis=0)
        spread = square - mean**2
        x = (x - mean[None]) * jax.lax.rsqrt(spread + 1e-5)[None]
        return x, {"mean": 0.9 * old + 0.1 * mean, "var": 0.9 * old + 0.1 * spread}

    x, new = (jax.checkpoint(block) if remat else block)(batch["x"], OLD["mean"])
    logits = x @ params["w"]
    hit = jnp.argmax(logits, -1) == batch["y"]
    return jnp.mean(logits**2), {"batch_stats": new, "correct": jnp.sum(hit), "logits": logits}


@pytest.mark.parametrize("remat", [False, True])
def test_batch_statistics_are_averaged_over_microbatches(remat):
    loss = partial(normed, remat=remat)
    (_, found), _ = aux_of(loss, microbatch=4)
    batch = make_batch()
    halves = [jax.tree.map(lambda x: x[i : i + 4], batch) for i in (0, 4)]  # noqa: B023
    auxes = [loss(PARAMS, half)[1] for half in halves]
    stats = jax.tree.map(lambda *x: sum(x) / 2, *(aux["batch_stats"] for aux in auxes))
    assert_trees_close(found["batch_stats"], stats, tol=1e-14)
    assert int(found["correct"]) == sum(int(aux["correct"]) for aux in auxes)
    logits = jnp.concatenate([aux["logits"] for aux in auxes])
    assert_trees_close(found["logits"], logits, tol=1e-14)


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_aux_of_groups_is_that_of_the_whole_batch(microbatch, sequential):
    names = ("correct", "hits", "worst", "accuracy", "of tokens")
    loss = measured({name: MEASURES[name] for name in names})
    found: list[Any] = []

    def kept(signal: Any, state: Any, params: Any, **extra: Any) -> Any:
        found.append(signal.aux)
        return signal, state

    keep = cx.stage(lambda params: None, kept)
    objective = cx.Objective(loss, make_batch(), has_aux=True, microbatch=microbatch)
    tx = per_group(4, cx.sam_perturb(0.05), sequential=sequential) | keep | optax.sgd(0.1)
    (_, aux), grads = cx.Objective(loss, make_batch(), has_aux=True).value_and_grad(PARAMS)
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=objective)
    assert_trees_close(found[-1], aux, tol=1e-14)
