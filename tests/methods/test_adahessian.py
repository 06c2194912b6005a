"""AdaHessian against its equations and its pipe, alone and in a partition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import assert_trees_close, net_batch, net_loss, net_params, quick_jit

import curvax as cx


def test_sharing_the_gradient_gives_the_same_update():
    tx = cx.adahessian(0.1, block=None)

    @quick_jit
    def both(params: Any) -> Any:
        shared, apart = (cx.Objective(net_loss, net_batch()) for _ in range(2))
        _, grads = shared.value_and_grad(params)
        one, _ = tx.update(grads, tx.init(params), params, value_fn=shared)
        other, _ = tx.update(jax.grad(apart)(params), tx.init(params), params, value_fn=apart)
        return one, other

    assert_trees_close(*both(net_params()))


N = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.array(N.normal(size=shape))


def run(tx: Any, params: Any, make_objective: Any, steps: int = 4) -> Any:
    """The parameters after each step, stacked."""

    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        objective = make_objective(i)
        _, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps))[1])(params)


def separable(i: Any) -> cx.Objective:
    """Σ aᵢ x⁴ with a Hessian that probes read exactly, and that moves with the step."""
    scale = 1.0 + 0.1 * i
    loss = lambda p: scale * sum(jnp.sum((1 + jnp.arange(x.size).reshape(x.shape)) * x**4)
                                 for x in jax.tree.leaves(p))  # fmt: skip
    return cx.Objective(loss)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(b1=0.5, b2=0.9, eps=1e-2, power=0.5),
        dict(weight_decay=0.1, mask={"conv": {"kernel": True, "bias": False}}),
        dict(every=2),
        dict(b2=0.0, block=None),
    ],
    ids=["defaults", "numbers", "decay", "every", "bare"],
)
def test_adahessian_is_its_equations(options):
    """Against a loop in NumPy, by Algorithm 1 of the paper and the conventions of its code."""
    start = {"conv": {"kernel": normal(3, 3, 2, 2) / 3, "bias": normal(2)}}
    found = run(cx.adahessian(0.02, **options), start, separable)
    b1, b2 = options.get("b1", 0.9), options.get("b2", 0.999)
    eps, power = options.get("eps", 1e-4), options.get("power", 1.0)
    for name, leaf in start["conv"].items():
        x, m, v = np.array(leaf), 0.0, 0.0
        a = 1 + np.arange(x.size).reshape(x.shape)
        for t in range(4):
            scale = 1 + 0.1 * t
            m = b1 * m + (1 - b1) * 4 * scale * a * x**3
            if t % options.get("every", 1) == 0:
                d = 12 * scale * a * x**2
                if name == "kernel" and options.get("block", "auto") == "auto":
                    d = np.broadcast_to(d.mean(axis=(0, 1), keepdims=True), d.shape)
            v = b2 * v + (1 - b2) * d**2
            denominator = np.sqrt(v / (1 - b2 ** (t + 1))) ** power + eps
            decay = options.get("weight_decay", 0.0) * x if name == "kernel" else 0.0
            x = x - 0.02 * (m / (1 - b1 ** (t + 1)) / denominator + decay)
            np.testing.assert_allclose(found["conv"][name][t], x, rtol=1e-11, atol=1e-13)


def test_adahessian_is_its_pipe():
    spelled = (
        cx.hutchinson_diag(3, probes=2) | cx.spatial_average(2) | cx.ema_rms(0.9) | optax.ema(0.8)
        | cx.scale_by_power(0.5, eps=1e-3) | optax.scale_by_learning_rate(0.1)
    )  # fmt: skip
    method = cx.adahessian(0.1, 0.8, 0.9, eps=1e-3, power=0.5, block=2, probes=2, key=3)
    objective = lambda i: cx.Objective(net_loss, net_batch())
    assert_trees_close(run(method, net_params(), objective), run(spelled, net_params(), objective))


def test_adahessian_at_power_zero_is_gradient_descent_with_momentum():
    plain = optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(0.1 / (1 + 1e-4)))
    objective = lambda i: cx.Objective(net_loss, net_batch())
    flat_method = cx.adahessian(0.1, power=0.0)
    assert_trees_close(
        run(flat_method, net_params(), objective), run(plain, net_params(), objective)
    )


# With another method for some of the leaves.


def embedded_loss(params: Any, batch: Any) -> jax.Array:
    rows = params["embed"]["embedding"][batch["word"]]
    logits = jnp.tanh(rows) @ params["dense"]["kernel"] + params["dense"]["bias"][None, :]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


EMBEDDED = {
    "embed": {"embedding": normal(5, 3)},
    "dense": {"kernel": normal(3, 2), "bias": normal(2)},
}
WORDS = {"word": jnp.array([0, 3, 3, 1]), "label": jnp.array([0, 1, 0, 1])}


def test_partition_trains_the_embedding_by_adagrad_and_the_rest_by_adahessian():
    labels = {"embed": "table", "dense": "rest"}
    parts = {"table": optax.adagrad(0.3), "rest": cx.adahessian(0.1, key=2)}
    found = run(cx.partition(parts, labels), EMBEDDED, lambda i: cx.Objective(embedded_loss, WORDS))

    table, dense = EMBEDDED["embed"], EMBEDDED["dense"]
    table_state, dense_state = parts["table"].init(table), parts["rest"].init(dense)
    for t in range(4):
        whole = {"embed": table, "dense": dense}
        grads = jax.grad(embedded_loss)(whole, WORDS)
        alone = lambda dense, table=table: embedded_loss({"embed": table, "dense": dense}, WORDS)
        to_table, table_state = parts["table"].update(grads["embed"], table_state, table)
        to_dense, dense_state = parts["rest"].update(
            grads["dense"], dense_state, dense, value_fn=alone
        )
        table = optax.apply_updates(table, to_table)
        dense = optax.apply_updates(dense, to_dense)
        reached = jax.tree.map(lambda x, t=t: x[t], found)
        assert_trees_close(reached, {"embed": table, "dense": dense}, tol=1e-11)


def test_partition_refuses_a_label_without_stages_at_init():
    with pytest.raises(ValueError, match="nothing"):
        cx.partition({"a": optax.sgd(0.1)}, {"embed": "a", "dense": "nothing"}).init(EMBEDDED)
