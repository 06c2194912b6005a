"""What AdaHessian does to rows of an embedding that few batches use, and Adagrad instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagonals import show_diagonal
from small_problems import quick_jit

import curvax as cx
from curvax.models import build

MODEL = build("dlrm", 1, categories=(6, 4), width=3, bottom=(5,), top=(5,))
USED = (0, 2, 5)


def batch_of(rows) -> dict[str, jax.Array]:
    rng = np.random.default_rng(len(rows))
    x = np.stack([rng.standard_normal(len(rows)), rows, rng.integers(0, 4, len(rows))], 1)
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 2, (len(rows), 1)) * 1.0)}


def objective(batch) -> cx.Objective:
    predict = lambda params, batch: MODEL.apply({"params": params}, batch["x"])
    return cx.Objective(cx.bernoulli("y"), batch, model=predict)


def step_of(tx):
    """The compiled (state, batch) ↦ (updates, state)."""

    @quick_jit
    def step(state, batch):
        loss = objective(batch)
        return tx.update(jax.grad(loss)(PARAMS), state, PARAMS, value_fn=loss)

    return step


def parameters():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), batch_of(USED)["x"])["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), shapes)


PARAMS = parameters()


def test_estimate_is_exactly_zero_on_rows_outside_of_the_batch():
    loss, table = objective(batch_of(USED)), PARAMS["table0"]["embedding"]
    at = lambda table: loss(PARAMS | {"table0": {"embedding": table}})
    dense = np.asarray(quick_jit(jax.hessian(at))(table)).reshape(6, 3, 18)
    unused = [row for row in range(6) if row not in USED]
    assert not dense[unused].any()
    tx = cx.hutchinson_diag(5) | show_diagonal
    found, _ = step_of(tx)(tx.init(PARAMS), batch_of(USED))
    diagonal = np.asarray(found["table0"]["embedding"])
    assert not diagonal[unused].any()
    assert (np.abs(diagonal[list(USED)]).max(1) > 1e-6).all()


def tables(params):
    return {name: name.startswith("table") for name in params}


@pytest.mark.parametrize("apart", [False, True])
def test_adahessian_moves_rows_of_earlier_batches_and_adagrad_none(apart):
    tx = cx.adahessian(0.1)
    if apart:
        tx = cx.partition({True: optax.adagrad(0.1), False: tx}, tables)
    step, state = step_of(tx), tx.init(PARAMS)
    for rows in ((1, 1, 1), USED):
        updates, state = step(state, batch_of(rows))
    moved = np.abs(updates["table0"]["embedding"]).max(1)
    assert (moved[list(USED)] > 0).all()
    assert bool(moved[1] > 0) != apart
    assert not moved[[3, 4]].any()


@pytest.mark.parametrize("period", [1, 4, 16])
def test_row_in_a_share_of_the_batches_takes_the_root_of_its_newton_step(period):
    """½ a (w - c)² in each `period`-th step only: the mean loss has its minimum at c as well."""
    a, c, decay = 3.0, 2.0, 0.999
    tx = cx.adahessian(1.0, b1=0.9, b2=decay, eps=0.0, block=None)
    loss = lambda used: lambda w: jnp.sum(used * a / 2 * (w - c) ** 2)
    w, steps = jnp.zeros(1), 4000

    def step(state, number):
        value_fn = loss(jnp.where(number % period == 0, 1.0, 0.0))
        updates, state = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        return state, updates[0]

    _, moved = jax.lax.scan(step, tx.init(w), jnp.arange(steps))
    expected = c * period**-0.5
    assert float(moved[-25 * period :].mean()) == pytest.approx(expected, rel=0.01)
